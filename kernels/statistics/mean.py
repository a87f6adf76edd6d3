"""``mean(x, y)``: the mean of `y` under the probabilities ``softmax(x)``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.statistics.base import Numbers, Statistic, Upstream
from cce_inductor.kernels.statistics.cotangent import Cotangents
from cce_inductor.kernels.statistics.logsumexp import LogSumExp
from cce_inductor.kernels.statistics.numerics import (
    Exponential,
    center_of,
    logsumexp,
    row_sum,
    subtrahend,
)
from cce_inductor.kernels.statistics.template_lines import TemplateLines


class Mean(Statistic, name="mean"):
    """A tile keeps a number near the mean of `y` (`numerics.center_of`), and the sum of the masses
    of `x` times the distances of `y` from that number. The part is the mean itself."""

    value_count = 2
    has_softmax = True
    is_sum = True
    tile_dtypes = (torch.float32, torch.float32)

    @property
    def requirements(self) -> tuple[Statistic, ...]:
        return (LogSumExp((self.value,)),)

    def reference(self, values: Mapping[Name, Tensor], operands: Sequence[Tensor]) -> Numbers:
        x, y = (values[name] for name in self.values)
        return ((torch.softmax(x, 1) * y).sum(1),)

    def of_tile(
        self, values: Sequence[Tensor], tile: slice, index: Tensor | None, exp: Exponential
    ) -> Numbers:
        x, y = values
        mass = exp(x - subtrahend(x.amax(1)).unsqueeze(1))
        center = center_of(mass, y)
        return center, row_sum(mass.mul_(y - center.unsqueeze(1)))

    def part(self, numbers: Numbers, required: Sequence[Numbers]) -> Numbers:
        center, weighted = numbers
        ((_, total),) = required
        mean = center.double() + weighted.double() / total.double()
        return (mean.masked_fill(total == 0, 0.0),)  # A tile without any mass has no weight.

    def nothing(self, rows: int, device: torch.device, index: Tensor | None) -> Numbers:
        return (torch.zeros(rows, dtype=torch.float64, device=device),)

    def combine(self, parts: Numbers, required: Sequence[Numbers]) -> Numbers:
        ((lse,),) = required
        share = (lse - logsumexp(lse, 0)).exp().masked_fill(lse == -math.inf, 0.0)
        return ((share * parts[0]).sum(0),)

    def results(self, whole: Numbers, required: Sequence[Numbers], index: Tensor | None) -> Numbers:
        ((lse,),) = required
        return (whole[0].masked_fill(lse == -math.inf, math.nan),)

    def add_cotangents(self, cotangents: Cotangents, upstream: Upstream) -> None:
        ((lse,),) = upstream.required
        x, y = self.values
        cotangents[x].add_mean(upstream.grad, lse, upstream.results[0], y)

    def write(self, lines: TemplateLines, position: int) -> None:
        x, y = self.values
        masses = lines.masses(x)
        lines.weighted_sum(
            position,
            before=masses.update,
            weights=masses.mass,
            y=lines.inside(y, "0.0"),
            rescale=masses.rescale,
            total=masses.rescale.format(masses.total),
            size=masses.rescale.format(masses.total),
        )
