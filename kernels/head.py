"""The head of a model: how its logits are computed, and what is computed from them.

These are the arguments that all kernels share.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cce_inductor.kernels.names import LOGIT, Name
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.statistics.numerics import Exponential, exp_, exp_of_rounded_

TILE = 1024
"""Vocabulary entries of a tile: wide enough for products to run at full speed."""

GROUP = 8 * TILE
"""Vocabulary entries of a group of tiles. Sums over the tiles of a group are added to the sums of
other groups."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a sum of products of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_count(vocabulary: int) -> int:
    """Return the number of tiles that cover `vocabulary` entries; the last may be narrower."""
    return -(-vocabulary // TILE)


@dataclasses.dataclass(frozen=True)
class Factors:
    """The tensors of a matrix product that makes logits: ``input @ linear_weight.T + linear_bias``.

    Attributes:
        input: [rows, hidden], any floating dtype and strides.
        linear_weight: [vocabulary, hidden], any floating dtype and strides.
        linear_bias: [vocabulary] or None.
        compute_dtype: the dtype of the product's operands.
    """

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    compute_dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Head:
    """How logits are computed, and what is computed from them.

    Attributes:
        linear_weight: [vocabulary, hidden], any floating dtype and strides.
        linear_bias: [vocabulary] or None.
        operands: those that `program` names (see `OperandKind`); indices are [rows] or [rows, k],
            and another head takes two or three operands, one after another.
        program: what is computed from the logits.
        skip_ignored: whether to skip rows whose class indices are all ignored: they are neither
            read nor computed, and their results are 0.
        compute_dtype: the dtype of the operands of ``input @ linear_weight.T``.
        workspace_bytes: the most memory for a block of logits and the blocks computed from it.
        sample_below: pairs of a row and a tile that hold less of the row's softmax than this are
            sampled in the backward (see `kernels.sampling`); 0 computes everything.
        stored_tiles: the number of tiles, from the first, whose logits the forward stores for the
            backward (see `kernels.stored`).
        tile: the vocabulary entries of a tile, a multiple of `TILE`.
        order: [vocabulary] int64, the order in which the vocabulary is divided into tiles; None if
            it is divided as it lies.
    """

    linear_weight: Tensor
    linear_bias: Tensor | None
    operands: Sequence[Tensor]
    program: Program
    skip_ignored: bool
    compute_dtype: torch.dtype
    workspace_bytes: int
    sample_below: float = 0.0
    stored_tiles: int = 0
    tile: int = TILE
    order: Tensor | None = None

    SCHEMA: ClassVar[str] = (
        "Tensor linear_weight, Tensor? linear_bias, Tensor[] operands, str program, "
        "bool skip_ignored, ScalarType compute_dtype, SymInt workspace_bytes, float sample_below, "
        "int stored_tiles"
    )
    """The attributes, as arguments in an operator's schema."""

    @classmethod
    def of(
        cls,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        operands: Sequence[Tensor],
        program: str,
        *others: Any,
    ) -> Head:
        """Return a head from the arguments of an operator."""
        return cls(linear_weight, linear_bias, operands, Program.parse(program), *others)

    @property
    def vocabulary(self) -> int:
        return self.linear_weight.shape[0]

    @property
    def logit_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.compute_dtype)

    @property
    def exp(self) -> Exponential:
        """The exponential function, as precise as the logits are."""
        return exp_ if self.compute_dtype == self.logit_dtype else exp_of_rounded_

    def factors(self, input: Tensor) -> dict[Name, Factors]:
        """Return the factors of every matrix product that the program reads: those of ``z``, with
        `input`, first, and then those of other heads, which are computed in the dtype of their
        inputs."""
        logit = Factors(input, self.linear_weight, self.linear_bias, self.compute_dtype)
        every = {LOGIT: logit}
        for name in self.program.products:
            other, weight, *bias = (self.operands[position] for position in name.positions)
            every[name] = Factors(other, weight, bias[0] if bias else None, other.dtype)
        return every

    def tiles(self) -> Iterator[tuple[int, slice]]:
        """Yield each tile's number and its range of the vocabulary."""
        for number, start in enumerate(range(0, self.vocabulary, self.tile)):
            yield number, slice(start, min(start + self.tile, self.vocabulary))

    @property
    def tile_count(self) -> int:
        """The number of tiles."""
        return -(-self.vocabulary // self.tile)

    @property
    def _tiles_of_group(self) -> int:
        return max(1, GROUP // self.tile)

    @property
    def groups(self) -> int:
        """The number of groups of tiles, each of which one thread computes."""
        return -(-self.tile_count // self._tiles_of_group)

    def neighbours(self, group: int) -> Iterator[tuple[int, slice]]:
        """Yield the number and range of each tile of a group of adjacent tiles."""
        first = group * self._tiles_of_group
        return itertools.islice(self.tiles(), first, first + self._tiles_of_group)

    def strided(self, group: int) -> Iterator[tuple[int, slice]]:
        """Yield the number and range of each tile of a group of distant tiles.

        So each group has its share of the likely entries if the vocabulary is in their order.
        """
        return itertools.islice(self.tiles(), group, None, self.groups)

    def columns(self, tile: slice) -> slice | Tensor:
        """Return the vocabulary entries of a range of the order."""
        return tile if self.order is None else self.order[tile]

    def column_numbers(self, tile: slice) -> Tensor:
        """Return the same as numbers, [columns]."""
        if self.order is not None:
            return self.order[tile]
        return torch.arange(tile.start, tile.stop, device=self.linear_weight.device)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which gradients are asked for; nothing is computed for the others."""

    input: bool
    linear_weight: bool
    linear_bias: bool
    operands: Sequence[bool]

    @classmethod
    def of(cls, output_mask: Sequence[bool]) -> Wanted:
        """Return what the mask of an operator asks for."""
        input, linear_weight, linear_bias, *operands = output_mask
        return cls(input, linear_weight, linear_bias, operands)


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The gradients that were asked for, each with the shape and dtype of its tensor; None for the
    others."""

    input: Tensor | None
    linear_weight: Tensor | None
    linear_bias: Tensor | None
    operands: Sequence[Tensor | None]

    def computed(self) -> list[Tensor]:
        """Return the gradients that were asked for, in order."""
        every = (self.input, self.linear_weight, self.linear_bias, *self.operands)
        return [gradient for gradient in every if gradient is not None]
