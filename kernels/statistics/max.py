"""``max(x)``: the greatest value of each row and its first index. nan is the greatest of all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.statistics.base import Numbers, Statistic, Upstream
from cce_inductor.kernels.statistics.cotangent import Cotangents
from cce_inductor.kernels.statistics.numerics import Exponential
from cce_inductor.kernels.statistics.template_lines import MINUS_INFINITY, TemplateLines


class Max(Statistic, name="max"):
    result_dtypes = (torch.float64, torch.int64)
    tile_dtypes = (torch.float32, torch.int32)

    def reference(self, values: Mapping[Name, Tensor], operands: Sequence[Tensor]) -> Numbers:
        return tuple(values[self.value].max(1))

    def of_tile(
        self, values: Sequence[Tensor], tile: slice, index: Tensor | None, exp: Exponential
    ) -> Numbers:
        greatest, first = values[0].max(1)
        return greatest, first + tile.start

    def nothing(self, rows: int, device: torch.device, index: Tensor | None) -> Numbers:
        return (
            torch.full((rows,), -math.inf, dtype=torch.float64, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )

    def combine(self, parts: Numbers, required: Sequence[Numbers]) -> Numbers:
        greatest, which = parts[0].max(0)
        return greatest, parts[1].gather(0, which.unsqueeze(0)).squeeze(0)

    def results(self, whole: Numbers, required: Sequence[Numbers], index: Tensor | None) -> Numbers:
        greatest, first = whole
        return greatest, first.long()  # A Triton kernel stores int32.

    def add_cotangents(self, cotangents: Cotangents, upstream: Upstream) -> None:
        cotangents[self.value].add_at(upstream.grad, upstream.results[1].unsqueeze(1))

    def write(self, lines: TemplateLines, position: int) -> None:
        greatest = lines.begin(f"greatest{position}", MINUS_INFINITY)
        first = lines.begin(f"first{position}", "0", "int32")
        x = lines.inside(self.value, MINUS_INFINITY)
        lines.updates.append(
            f"{greatest}, {first} = device.greater({greatest}, {first}, {x}, first_column)"
        )
        lines.store(greatest)
        lines.store(first)
