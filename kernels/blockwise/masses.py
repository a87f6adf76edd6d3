"""What the share of a row's softmax in each tile says about the tile's part of the gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cce_inductor.kernels import sampling
from cce_inductor.kernels.head import TILE, Head
from cce_inductor.kernels.names import LOGIT, Name
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.statistics.cotangent import Cotangent
from cce_inductor.kernels.statistics.indexed import NOWHERE

LIGHT = 1 / 16
"""The largest share of a row's gradient in a tile whose product may be rounded before it is added
to others. The rounding of such parts, each independent of the others, adds at most
``sqrt(1 + LIGHT) - 1``, 3%, to what the rounding of the sum costs."""

MOST_HEAVY = 0.5
"""If a larger share of the pairs is heavy, all are treated as such: gathering rows costs time."""


@dataclasses.dataclass(frozen=True)
class Masses:
    """A gradient that is a multiple of one softmax in each row, apart from the columns of indices.

    Attributes:
        log_mass: the logarithm of what the softmax has in each tile, float64 [rows, tiles].
        index: the columns of the indices, [rows, k], or `NOWHERE`; None without indices.
        dtype: the dtype of the logits.
    """

    log_mass: Tensor
    index: Tensor | None
    dtype: torch.dtype

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
        return cls(tile_lse.double() - only.lse.unsqueeze(1), index, head.logit_dtype)

    def massless_tiles(self) -> list[bool]:
        """Return which tiles have a gradient that is exactly zero: no row's index lies in them, and
        every probability is below half the smallest number of the dtype, where exp rounds to
        zero."""
        smallest = torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        # The comparison is False for nan, so that such a tile is computed.
        massless = self.log_mass.amax(0) < math.log(smallest) - math.log(2)
        if self.index is not None:
            index = self.index[self.index != NOWHERE]
            massless[index.div(TILE, rounding_mode="floor")] = False
        return massless.tolist()

    def heavy_pairs(self) -> Tensor | None:
        """Return which tiles hold an index of a row, or more than `LIGHT` of what its softmax has
        in the other tiles, bool [rows, tiles]; None if most do."""
        rows, tiles = self.log_mass.shape
        held = sampling.held_pairs([] if self.index is None else [self.index], rows, tiles)
        mass = self.log_mass.exp().masked_fill(held, 0.0)
        is_light = mass <= LIGHT * mass.sum(1, keepdim=True)  # False for nan
        heavy = held | ~is_light
        return heavy if heavy.double().mean() <= MOST_HEAVY else None
