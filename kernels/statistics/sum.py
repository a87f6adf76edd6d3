"""``sum(x)``: the sum of a value over the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.statistics.base import Numbers, Statistic, Upstream
from cce_inductor.kernels.statistics.cotangent import Cotangents
from cce_inductor.kernels.statistics.numerics import Exponential, row_sum
from cce_inductor.kernels.statistics.template_lines import TemplateLines


class Sum(Statistic, name="sum"):
    is_sum = True
    tile_dtypes = (torch.float32,)

    def reference(self, values: Mapping[Name, Tensor], operands: Sequence[Tensor]) -> Numbers:
        return (values[self.value].sum(1),)

    def of_tile(
        self, values: Sequence[Tensor], tile: slice, index: Tensor | None, exp: Exponential
    ) -> Numbers:
        return (row_sum(values[0]),)

    def nothing(self, rows: int, device: torch.device, index: Tensor | None) -> Numbers:
        return (torch.zeros(rows, dtype=torch.float64, device=device),)

    def combine(self, parts: Numbers, required: Sequence[Numbers]) -> Numbers:
        return (parts[0].sum(0),)

    def add_cotangents(self, cotangents: Cotangents, upstream: Upstream) -> None:
        cotangents[self.value].add_constant(upstream.grad)

    def write(self, lines: TemplateLines, position: int) -> None:
        lines.store(lines.sum(self.value))
