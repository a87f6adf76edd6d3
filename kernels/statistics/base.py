"""What defines a statistic: a reduction of each row of logits over the vocabulary.

One class in one file of this folder is all there is to a statistic. Every file here is imported.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cce_inductor.kernels.program.names import Name
from cce_inductor.kernels.program.output import Output
from cce_inductor.kernels.statistics.cotangent import Cotangents
from cce_inductor.kernels.statistics.template_lines import TemplateLines

Numbers = tuple[Tensor, ...]
"""What a statistic keeps of some columns: tensors whose first dimension is rows."""


@dataclasses.dataclass(frozen=True)
class TileNumber:
    """A number that a Triton kernel stores for each row.

    Attributes:
        name: of the kernel's argument, in capitals.
        dtype: float32 or int32.
    """

    name: str
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass(frozen=True)
class Upstream:
    """What the backward of a statistic is given.

    Attributes:
        grad: the gradient of its first result, float64; other results are indices.
        results: of the forward.
        required: the results of its `requirements`.
        index: as for `Statistic.of_tile`.
    """

    grad: Tensor
    results: Numbers
    required: Sequence[Numbers]
    index: Tensor | None


class Statistic(Output):
    """A reduction of each row of logits over the vocabulary.

    The vocabulary is computed in tiles. Of each tile, `of_tile` keeps a few numbers, which a Triton
    kernel can store (`tile_numbers`); `part` makes float64 numbers of them, `combine` those of
    several tiles (or shards), and `results` the results of the whole row. A statistic may use the
    numbers of others that the same program has: those are its `requirements`.

    Class attributes:
        value_count: how many of its arguments are values of the program.
        result_dtypes: one for each result.
        has_softmax: whether it involves a softmax over the vocabulary, as losses over classes do.
        is_sum: whether it adds up numbers over the vocabulary, rather than choosing some.
        overwrites: whether `of_tile` writes over the values that it is given.
        tile_numbers: what a Triton kernel stores of each tile; empty if there is no kernel for it.
    """

    value_count: ClassVar[int] = 1
    result_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64,)
    has_softmax: ClassVar[bool] = False
    is_sum: ClassVar[bool] = False
    overwrites: ClassVar[bool] = False
    tile_numbers: ClassVar[tuple[TileNumber, ...]] = ()

    @property
    def values(self) -> tuple[Name, ...]:
        return tuple(map(Name, self.args[: self.value_count]))

    @property
    def requirements(self) -> tuple[Statistic, ...]:
        """Statistics that the program has as well."""
        return ()

    def result_shapes(self, rows: Any, operands: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        """The shape of each result."""
        return [(rows,) for _ in self.result_dtypes]

    @abc.abstractmethod
    def reference(self, values: Mapping[Name, Tensor], operands: Sequence[Tensor]) -> Numbers:
        """Return the results from stored values [rows, vocabulary]: the specification."""

    @abc.abstractmethod
    def of_tile(self, values: Sequence[Tensor], tile: slice, index: Tensor | None) -> Numbers:
        """Return what is kept of one tile.

        Args:
            values: [rows, columns] of each value that it reads, in the dtype of the logits.
            tile: the columns' place in the vocabulary.
            index: of a statistic at indices: [rows, k] int64, see `indexed.prepared`.
        """

    def part(self, numbers: Numbers, required: Sequence[Numbers]) -> Numbers:
        """Return what `combine` takes, from the numbers of `of_tile`, which may be float32.

        Args:
            numbers: of any shape: [rows] of one tile, [tiles, rows] of all.
            required: the numbers of its `requirements`.
        """
        return tuple(each.double() if each.is_floating_point() else each for each in numbers)

    @abc.abstractmethod
    def nothing(self, rows: int, device: torch.device, index: Tensor | None) -> Numbers:
        """Return the part of no columns at all, which `combine` leaves out."""

    @abc.abstractmethod
    def combine(self, parts: Numbers, required: Sequence[Numbers]) -> Numbers:
        """Return the part of all columns, from those of ranges of columns in their order.

        Args:
            parts: stacked along dimension 0.
            required: the parts of its `requirements`, stacked likewise.
        """

    def results(self, whole: Numbers, required: Sequence[Numbers], index: Tensor | None) -> Numbers:
        """Return the results from the part of all columns, and those of its `requirements`."""
        return whole

    @abc.abstractmethod
    def add_cotangents(self, cotangents: Cotangents, upstream: Upstream) -> None:
        """Add the gradient of its first result to the cotangents of the values that it reads."""

    def write(self, lines: TemplateLines, number: int) -> None:
        """Write the lines of the Triton template that compute `tile_numbers`.

        Args:
            lines: those of all statistics of the program.
            number: the position of this one, to make its variables' names unique.
        """
        raise NotImplementedError(f"{self.name} has no Triton template")
