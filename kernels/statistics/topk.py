"""``topk(x, k)``: the greatest k values of each row, greatest first, and their indices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.statistics.base import Numbers, Statistic, Upstream
from cce_inductor.kernels.statistics.cotangent import Cotangents
from cce_inductor.kernels.statistics.numerics import Exponential

MOST_K = 1024
"""The largest k."""

_BEYOND = torch.iinfo(torch.int64).max


class TopK(Statistic, name="topk"):
    """A tile keeps its k greatest values and their indices. Where it has fewer columns, values of
    -inf at an index beyond the vocabulary fill the rest."""

    result_dtypes = (torch.float64, torch.int64)

    @property
    def k(self) -> int:
        return int(self.args[1])

    def result_shapes(self, rows: Any, operands: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return [(rows, self.k)] * 2

    def reference(self, values: Mapping[Name, Tensor], operands: Sequence[Tensor]) -> Numbers:
        return tuple(values[self.value].topk(self.k, 1))

    def of_tile(
        self, values: Sequence[Tensor], tile: slice, index: Tensor | None, exp: Exponential
    ) -> Numbers:
        (x,) = values
        greatest, where = x.topk(min(self.k, x.shape[1]), 1)
        missing = (x.shape[0], self.k - greatest.shape[1])
        return (
            torch.cat([greatest, greatest.new_full(missing, -math.inf)], 1),
            torch.cat([where + tile.start, where.new_full(missing, _BEYOND)], 1),
        )

    def nothing(self, rows: int, device: torch.device, index: Tensor | None) -> Numbers:
        return (
            torch.full((rows, self.k), -math.inf, dtype=torch.float64, device=device),
            torch.full((rows, self.k), _BEYOND, dtype=torch.int64, device=device),
        )

    def combine(self, parts: Numbers, required: Sequence[Numbers]) -> Numbers:
        values, indices = (each.movedim(0, 1).flatten(1) for each in parts)
        # Stable sorts: of equal values, the one with the smaller index comes first.
        indices, order = indices.sort(dim=1)
        values = values.gather(1, order)
        values, greatest_first = values.sort(dim=1, descending=True, stable=True)
        return values[:, : self.k], indices.gather(1, greatest_first)[:, : self.k]

    def add_cotangents(self, cotangents: Cotangents, upstream: Upstream) -> None:
        cotangents[self.value].add_at(upstream.grad, upstream.results[1])
