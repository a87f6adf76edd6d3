"""``logsumexp(x)``: the normalizer of a softmax over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.statistics.base import Numbers, Statistic, Upstream
from cce_inductor.kernels.statistics.cotangent import Cotangents
from cce_inductor.kernels.statistics.numerics import Exponential, logsumexp, row_sum, subtrahend
from cce_inductor.kernels.statistics.template_lines import TemplateLines


class LogSumExp(Statistic, name="logsumexp"):
    """A tile keeps its greatest value, and the sum of the masses ``exp(x - greatest)``, where a
    greatest value of -inf counts as 0. The part is the logsumexp itself."""

    has_softmax = True
    is_sum = True
    overwrites = True
    tile_dtypes = (torch.float32, torch.float32)

    def reference(self, values: Mapping[Name, Tensor], operands: Sequence[Tensor]) -> Numbers:
        return (torch.logsumexp(values[self.value], 1),)

    def of_tile(
        self, values: Sequence[Tensor], tile: slice, index: Tensor | None, exp: Exponential
    ) -> Numbers:
        (x,) = values
        greatest = x.amax(1)
        return greatest, row_sum(exp(x.sub_(subtrahend(greatest).unsqueeze(1))))

    def part(self, numbers: Numbers, required: Sequence[Numbers]) -> Numbers:
        greatest, total = numbers
        return (subtrahend(greatest).double() + total.double().log(),)

    def nothing(self, rows: int, device: torch.device, index: Tensor | None) -> Numbers:
        return (torch.full((rows,), -math.inf, dtype=torch.float64, device=device),)

    def combine(self, parts: Numbers, required: Sequence[Numbers]) -> Numbers:
        return (logsumexp(parts[0], 0),)

    def add_cotangents(self, cotangents: Cotangents, upstream: Upstream) -> None:
        cotangents[self.value].add_softmax(upstream.grad, *upstream.results)

    def write(self, lines: TemplateLines, position: int) -> None:
        masses = lines.masses(self.value)
        lines.store(masses.greatest)
        lines.store(masses.total)
