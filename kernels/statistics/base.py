"""The base class of statistics: reductions of each row of logits over the vocabulary.

A statistic is one class in one file of this folder. Every file here is imported.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.output import Output
from cce_inductor.kernels.statistics.cotangent import Cotangents
from cce_inductor.kernels.statistics.numerics import Exponential
from cce_inductor.kernels.statistics.template_lines import TemplateLines

Numbers = tuple[Tensor, ...]
"""What a statistic keeps of some columns: tensors whose first dimension is rows."""


@dataclasses.dataclass(frozen=True)
class Upstream:
    """The arguments of a statistic's backward.

    Attributes:
        grad: the gradient of its first result, float64; other results are indices.
        results: the results of the forward.
        required: the results of its `requirements`.
        index: as for `Statistic.of_tile`.
    """

    grad: Tensor
    results: Numbers
    required: Sequence[Numbers]
    index: Tensor | None


class Statistic(Output):
    """A reduction of each row of logits over the vocabulary.

    The vocabulary is computed in tiles, and the results are made in four steps:

    1. `of_tile` computes a few numbers for each row of a tile, [rows] each. A Triton kernel can
       store the same numbers (`write`, `tile_dtypes`).
    2. `part` converts them to float64 numbers that can be combined.
    3. `combine` merges the parts of several tiles, or of several devices, into one.
    4. `results` computes the results from the part of the whole vocabulary.

    A statistic may use the numbers of other statistics, its `requirements`. The program must then
    have these as well.

    Class attributes:
        value_count: the number of its arguments that are values of the program.
        result_dtypes: the dtype of each result.
        tile_dtypes: float32 or int32 for each number that a Triton kernel stores; empty if there is
            no kernel.
        has_softmax: whether it involves a softmax over the vocabulary, as losses over classes do.
        is_sum: whether it adds up values over the vocabulary, rather than selecting some.
        overwrites: whether `of_tile` writes over the values that it is given.
    """

    value_count: ClassVar[int] = 1
    result_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64,)
    tile_dtypes: ClassVar[tuple[torch.dtype, ...]] = ()
    has_softmax: ClassVar[bool] = False
    is_sum: ClassVar[bool] = False
    overwrites: ClassVar[bool] = False

    @property
    def values(self) -> tuple[Name, ...]:
        return tuple(map(Name, self.args[: self.value_count]))

    @property
    def has_template(self) -> bool:
        """Whether a Triton kernel can compute it."""
        return bool(self.tile_dtypes)

    @property
    def requirements(self) -> tuple[Statistic, ...]:
        """The statistics that the program must also have."""
        return ()

    def result_shapes(self, rows: Any, operands: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        """Return the shape of each result."""
        return [(rows,) for _ in self.result_dtypes]

    @abc.abstractmethod
    def reference(self, values: Mapping[Name, Tensor], operands: Sequence[Tensor]) -> Numbers:
        """Return the results from stored values [rows, vocabulary]: the specification."""

    @abc.abstractmethod
    def of_tile(
        self, values: Sequence[Tensor], tile: slice, index: Tensor | None, exp: Exponential
    ) -> Numbers:
        """Return the numbers of one tile.

        Args:
            values: [rows, columns] of each value that it reads, in the dtype of the logits.
            tile: the columns' range in the vocabulary.
            index: [rows, k] int64 for a statistic that reads the values at indices (`indexed`);
                None for all others.
            exp: computes exponentials in place.
        """

    def part(self, numbers: Numbers, required: Sequence[Numbers]) -> Numbers:
        """Convert the numbers of `of_tile`, which may be float32, to what `combine` takes.

        Args:
            numbers: of any shape: [rows] of one tile, [tiles, rows] of all.
            required: the numbers of its `requirements`.
        """
        return tuple(each.double() if each.is_floating_point() else each for each in numbers)

    @abc.abstractmethod
    def nothing(self, rows: int, device: torch.device, index: Tensor | None) -> Numbers:
        """Return the part of an empty range of columns, which changes nothing in `combine`."""

    @abc.abstractmethod
    def combine(self, parts: Numbers, required: Sequence[Numbers]) -> Numbers:
        """Return the part of all columns, from the parts of ranges of columns in their order.

        Args:
            parts: stacked along dimension 0.
            required: the parts of its `requirements`, stacked likewise.
        """

    def results(self, whole: Numbers, required: Sequence[Numbers], index: Tensor | None) -> Numbers:
        """Return the results, from the part of all columns and the parts of `requirements`."""
        return whole

    @abc.abstractmethod
    def add_cotangents(self, cotangents: Cotangents, upstream: Upstream) -> None:
        """Add the gradient of its first result to the cotangents of the values that it reads."""

    def write(self, lines: TemplateLines, position: int) -> None:
        """Write the lines of the Triton template that compute and store the numbers of a tile.

        Args:
            lines: the lines of all statistics of the program. `store` is called once for each of
                `tile_dtypes`, in that order.
            position: the position of this statistic, to make the names of its variables unique.
        """
        raise NotImplementedError(f"{self.name} has no Triton template")
