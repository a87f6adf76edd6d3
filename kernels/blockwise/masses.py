"""How much of a row's softmax each tile has, and what that says about the tile's gradient.

A tile without mass has no gradient, and is skipped. A tile with little mass has little of the row's
gradient: its product with the weight may be rounded before it is added to those of other tiles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cce_inductor.kernels import sampling
from cce_inductor.kernels.head import Head
from cce_inductor.kernels.names import LOGIT, Name
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.statistics.cotangent import Cotangent
from cce_inductor.kernels.statistics.indexed import NOWHERE

LIGHT = 1 / 32
"""The largest share of a row's mass in a tile whose product may be rounded before it is added to
others. With the mass m of each such tile, these roundings add the sum of m**2, at most `LIGHT`, to
the square of what rounding the result costs, if the result is as large as a row of the weight. The
limit is lower if all rows of the weight have a large part in common, because that part cancels in
a gradient whose sum is 0 (`_spread`)."""

SAMPLE = 512
"""The most rows of the weight from which the common part is estimated."""

MOST_HEAVY = 0.5
"""If a larger share of the pairs is heavy, all are treated as such: gathering rows costs time."""


@dataclasses.dataclass(frozen=True)
class Masses:
    """A gradient that is a multiple of one softmax in each row, apart from the columns of indices.

    Attributes:
        log_mass: the logarithm of what the softmax has in each tile, float64 [rows, tiles].
        index: the columns of the indices, [rows, k], or `NOWHERE`; None without indices.
        dtype: the dtype of the logits.
        width: the vocabulary entries of a tile.
    """

    log_mass: Tensor
    index: Tensor | None
    dtype: torch.dtype
    width: int

    @classmethod
    def of(
        cls, head: Head, program: Program, by_value: Mapping[Name, Cotangent], tile_lse: Tensor
    ) -> Masses | None:
        """Return the masses of a gradient; None if it is another one.

        Args:
            head: the head, with the program of the forward.
            program: the part of that program that has a gradient.
            by_value: the cotangents of its values.
            tile_lse: the logsumexp of each tile, which the forward returned, [rows, tiles].
        """
        normalizer = next(iter(head.program.normalizers), None)
        only = by_value.get(LOGIT) if program.is_plain else None
        if only is None or only.lse is None or normalizer is None or normalizer.value != LOGIT:
            return None
        if only.grad_sum is not None or only.reads_values:
            return None
        index = only.index if only.has_indices else None
        return cls(tile_lse.double() - only.lse.unsqueeze(1), index, head.logit_dtype, head.tile)

    def massless_tiles(self) -> list[bool]:
        """Return which tiles have a gradient that is exactly zero: no row's index lies in them, and
        every probability is below half the smallest number of the dtype, where exp rounds to
        zero."""
        smallest = torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        # The comparison is False for nan, so that such a tile is computed.
        massless = self.log_mass.amax(0) < math.log(smallest) - math.log(2)
        if self.index is not None:
            index = self.index[self.index != NOWHERE]
            massless[index.div(self.width, rounding_mode="floor")] = False
        return massless.tolist()

    def heavy_pairs(self, linear_weight: Tensor) -> Tensor | None:
        """Return which pairs of a row and a tile are heavy, bool [rows, tiles]; None if all are
        better treated as such.

        Heavy are pairs that hold an index of the row, and pairs with more than `LIGHT` of the mass
        that the row has in tiles without an index; less if the rows of the weight are similar.
        """
        if self.index is None:  # Nothing makes the result as large as a row of the weight.
            return None
        rows, tiles = self.log_mass.shape
        held = sampling.held_pairs(
            [self.index], rows, tiles, self.width, device=self.log_mass.device
        )
        mass = self.log_mass.exp().masked_fill(held, 0.0)
        least = LIGHT * _spread(linear_weight)
        is_light = mass <= least * mass.sum(1, keepdim=True)  # False for nan
        heavy = held | ~is_light
        return heavy if heavy.double().mean() <= MOST_HEAVY else None


def _spread(linear_weight: Tensor) -> float:
    """Return the share of the rows' squares that is left without their mean, from 0 to 1; nan if
    the weight is not finite."""
    step = -(-linear_weight.shape[0] // SAMPLE)
    rows = linear_weight[::step].float()
    total = rows.square().sum()
    common = len(rows) * rows.mean(0).square().sum()
    return float((1 - common / total).clamp(min=0.0))
