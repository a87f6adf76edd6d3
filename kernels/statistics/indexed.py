"""The base class of `gather`, `index` and `target`, which read the values in some columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.statistics.base import Numbers, Statistic, Upstream
from cce_inductor.kernels.statistics.cotangent import Cotangents, columns_in
from cce_inductor.kernels.statistics.numerics import Exponential
from cce_inductor.kernels.statistics.template_lines import TemplateLines

NOWHERE = -1
"""Stands for an index that is ignored."""


class Indexed(Statistic):
    """The values in the columns that an operand names.

    Its part is [rows, k]: the values at the indices that lie in the columns, -0.0 at the others,
    which changes no number that it is added to. A Triton kernel stores [rows, k] likewise.
    """

    is_flat: ClassVar[bool] = True
    """Whether there is one index for each row, so that the result is [rows]."""

    ignores: ClassVar[bool] = False
    """Whether an index may be ignored, so that its row has no value."""

    @property
    def has_template(self) -> bool:
        return True

    @property
    def index(self) -> Name:
        """The operand that holds the indices."""
        return Name(self.args[1])

    def index_of(self, operands: Sequence[Tensor]) -> Tensor:
        """Return the operand that holds the indices."""
        return operands[self.index.position]

    def result_shapes(self, rows: Any, operands: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return [tuple(self.index_of(operands).shape)]

    def prepared(self, index: Tensor, vocabulary: int) -> Tensor:
        """Return the indices as [rows, k], counted from the front, `NOWHERE` for ignored ones."""
        return index.unsqueeze(1) if self.is_flat else index

    def is_valid(self, index: Tensor, vocabulary: int) -> Tensor:
        """Whether the replaced code accepts each index, as it is given."""
        return (index >= 0) & (index < vocabulary)

    def is_kept(self, index: Tensor) -> Tensor | None:
        """Return which rows are not ignored; None for a statistic that ignores none."""
        return None

    def error(self, index: int, vocabulary: int) -> Exception:
        """Return the error that the replaced code raises on the CPU for an index out of bounds."""
        return IndexError(f"index {index} is out of bounds for dimension 1 with size {vocabulary}")

    def reference(self, values: Mapping[Name, Tensor], operands: Sequence[Tensor]) -> Numbers:
        x = values[self.value]
        index = self.prepared(self.index_of(operands).to(torch.int64), x.shape[1])
        at_index = x.gather(1, index.clamp(min=0)).where(index != NOWHERE, 0.0)
        return (at_index.squeeze(1) if self.is_flat else at_index,)

    def of_tile(
        self, values: Sequence[Tensor], tile: slice, index: Tensor | None, exp: Exponential
    ) -> Numbers:
        assert index is not None
        inside, columns = columns_in(index, tile)
        return (values[0].gather(1, columns).where(inside, -0.0),)

    def nothing(self, rows: int, device: torch.device, index: Tensor | None) -> Numbers:
        assert index is not None
        return (torch.full(index.shape, -0.0, dtype=torch.float64, device=device),)

    def combine(self, parts: Numbers, required: Sequence[Numbers]) -> Numbers:
        return (parts[0].sum(0),)

    def results(self, whole: Numbers, required: Sequence[Numbers], index: Tensor | None) -> Numbers:
        assert index is not None
        at_index = whole[0].masked_fill(index == NOWHERE, 0.0)
        return (at_index.squeeze(1) if self.is_flat else at_index,)

    def add_cotangents(self, cotangents: Cotangents, upstream: Upstream) -> None:
        assert upstream.index is not None
        cotangents[self.value].add_at(upstream.grad, upstream.index)

    def write(self, lines: TemplateLines, position: int) -> None:
        lines.at_indices(position, self.value, is_target=self.ignores)
