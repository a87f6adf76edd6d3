"""``dot(q, y)``: the sum of ``q * y`` over the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.statistics.base import Numbers, Statistic, Upstream
from cce_inductor.kernels.statistics.cotangent import Cotangents
from cce_inductor.kernels.statistics.numerics import Exponential, center_of, row_sum
from cce_inductor.kernels.statistics.sum import Sum
from cce_inductor.kernels.statistics.template_lines import TemplateLines


class Dot(Statistic, name="dot"):
    """A tile keeps a number near the mean of `y`, weighted by the absolute values of `q`
    (`numerics.center_of`), and the sum of `q` times the distances of `y` from that number. The part
    is the product itself."""

    value_count = 2
    is_sum = True
    tile_dtypes = (torch.float32, torch.float32)

    @property
    def requirements(self) -> tuple[Statistic, ...]:
        return (Sum((self.value,)),)

    def reference(self, values: Mapping[Name, Tensor], operands: Sequence[Tensor]) -> Numbers:
        q, y = (values[name] for name in self.values)
        return ((q * y).sum(1),)

    def of_tile(
        self, values: Sequence[Tensor], tile: slice, index: Tensor | None, exp: Exponential
    ) -> Numbers:
        q, y = values
        center = center_of(q.abs(), y)
        return center, row_sum((y - center.unsqueeze(1)).mul_(q))

    def part(self, numbers: Numbers, required: Sequence[Numbers]) -> Numbers:
        center, weighted = numbers
        ((total,),) = required
        return (center.double() * total.double() + weighted.double(),)

    def nothing(self, rows: int, device: torch.device, index: Tensor | None) -> Numbers:
        return (torch.zeros(rows, dtype=torch.float64, device=device),)

    def combine(self, parts: Numbers, required: Sequence[Numbers]) -> Numbers:
        return (parts[0].sum(0),)

    def add_cotangents(self, cotangents: Cotangents, upstream: Upstream) -> None:
        q, y = self.values
        cotangents[q].add_multiple(upstream.grad, y)
        cotangents[y].add_multiple(upstream.grad, q)

    def write(self, lines: TemplateLines, position: int) -> None:
        q, y = self.values
        size = lines.begin(f"size{position}", "0.0")
        lines.weighted_sum(
            position,
            before=lines.sum_update(q),
            weights=lines.inside(q, "0.0"),
            y=lines.inside(y, "0.0"),
            rescale="{}",
            total=lines.sum(q),
            size=size,
        )
        lines.updates.append(f"{size} += tl.sum(tl.abs(weights{position}), 1)")
