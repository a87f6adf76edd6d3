"""Functions that compute all statistics of a program together.

A statistic may need the numbers of another: a mean needs the logsumexp of its softmax. The
functions here pass them on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.statistics.base import Numbers, Statistic, Upstream
from cce_inductor.kernels.statistics.cotangent import Cotangent, Cotangents
from cce_inductor.kernels.statistics.numerics import Exponential, exp_

ByStatistic = dict[Statistic, Numbers]
Indices = Mapping[Statistic, Tensor]
"""The indices of each statistic that has some, as `Indexed.prepared` makes them."""


def _required(statistic: Statistic, of_all: Mapping[Statistic, Numbers]) -> list[Numbers]:
    return [of_all[each] for each in statistic.requirements]


def parts(numbers: ByStatistic) -> ByStatistic:
    """Return the part of every statistic, from what is kept of a tile."""
    return {s: s.part(each, _required(s, numbers)) for s, each in numbers.items()}


def combined(stacked: ByStatistic) -> ByStatistic:
    """Return the parts of all columns, from those of column ranges, stacked along dimension 0."""
    return {s: s.combine(each, _required(s, stacked)) for s, each in stacked.items()}


def results(whole: ByStatistic, indices: Indices) -> ByStatistic:
    """Return the results of every statistic, from the parts of all columns."""
    return {s: s.results(each, _required(s, whole), indices.get(s)) for s, each in whole.items()}


def prepared_indices(program: Program, operands: Sequence[Tensor], vocabulary: int) -> Indices:
    """Return the indices of the statistics that have some, from operands of any integer dtype."""
    return {
        each: each.prepared(each.index_of(operands).to(torch.int64), vocabulary)
        for each in program.indexed
    }


def kept_rows(program: Program, operands: Sequence[Tensor]) -> Tensor | None:
    """Return which rows have a class index that is not ignored, bool [rows]; None if no statistic
    ignores any."""
    kept = [each.is_kept(each.index_of(operands).to(torch.int64)) for each in program.indexed]
    some = [each for each in kept if each is not None]
    return torch.stack(some).any(0) if some else None


def cotangents(
    program: Program,
    grads: Sequence[Tensor | None],
    results: Sequence[Tensor],
    indices: Indices,
    dtype: torch.dtype,
    exp: Exponential = exp_,
) -> dict[Name, Cotangent]:
    """Return the cotangent of each value that a statistic with a gradient reads.

    Args:
        program: the forward's program.
        grads: the gradient of each result, float64; None for a result without one.
        results: the forward's results, as many as `grads`.
        indices: what `prepared_indices` returns.
        dtype: the dtype of the values.
        exp: computes exponentials in place.
    """
    rows, device = results[0].shape[0], results[0].device
    by_value = Cotangents(rows, device, dtype, exp)
    by_statistic: ByStatistic = {s: tuple(results[place]) for place, s in program.places}
    for place, statistic in program.places:
        grad = grads[place.start]
        if grad is not None:
            upstream = Upstream(
                grad,
                by_statistic[statistic],
                _required(statistic, by_statistic),
                indices.get(statistic),
            )
            statistic.add_cotangents(by_value, upstream)
    for cotangent in by_value.values():
        cotangent.prepare()
    return dict(by_value)
