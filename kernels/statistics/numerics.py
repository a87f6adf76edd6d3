"""Exponentials, and sums over a row that keep their precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_PART = 128
_LOG2_E = math.log2(math.e)

Exponential = Callable[[Tensor], Tensor]
"""A function that replaces every number by its exponential, in place, and returns the tensor."""


def exp_(values: Tensor) -> Tensor:
    """Replace every number by its exponential."""
    return values.exp_()


def exp_of_rounded_(values: Tensor) -> Tensor:
    """Replace every number by its exponential, with a relative error of up to 2**-24 times the
    number.

    PyTorch's float32 `exp` calls MKL, which is slow on processors of AMD: there, a power of 2 takes
    a third of the time. The error is that of rounding the number to float32, so it does not matter
    where a number has been rounded to a narrower dtype before.
    """
    return values.mul_(_LOG2_E).exp2_()


def row_sum(values: Tensor) -> Tensor:
    """Return the sum of each row, float64 [rows], of `values` [rows, columns].

    At most 128 columns are added in float32 before the sum becomes float64, so that no block of
    float64 has to be stored.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    parts, rest = divmod(values.shape[1], _PART)
    in_parts = values[:, : parts * _PART].unflatten(1, (parts, _PART))
    total = in_parts.sum(2, dtype=dtype).sum(1, dtype=torch.float64)
    return total + values[:, parts * _PART :].sum(1, dtype=dtype) if rest else total


def finite_or_zero(values: Tensor) -> Tensor:
    return values.where(values.isfinite(), 0.0)


def subtrahend(greatest: Tensor) -> Tensor:
    """Return what is subtracted from a row before its exponential: its greatest value, but 0 in
    place of -inf, because -inf - -inf would be nan."""
    return greatest.masked_fill(greatest == -math.inf, 0.0)


def logsumexp(values: Tensor, dim: int) -> Tensor:
    """Compute `torch.logsumexp`, whose decomposition asks whether there are any rows. That is not
    known while a graph is traced whose number of rows depends on data."""
    shift = subtrahend(values.amax(dim, keepdim=True))
    return (values - shift).exp().sum(dim).log() + shift.squeeze(dim)


def center_of(weights: Tensor, y: Tensor) -> Tensor:
    """Return the weighted mean of `y` in each row, rounded to its dtype; 0 where the mean is not
    finite.

    A weighted sum of `y` equals this center times the sum of the weights, plus the weighted sum of
    the distances of `y` from it. Those distances are small where the weights are not. A loss is
    often the difference of such a sum and the row's logsumexp: it is near 0 where both are large,
    and computed this way it keeps its precision.
    """
    return finite_or_zero((weights * y).sum(1) / weights.sum(1))


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split a float64 tensor into the part that `dtype` can hold and the rest, which is float64.

    The difference of a number near `value` and the first part is exact. The rest of an infinite
    value is nan.
    """
    near = value.to(dtype)
    return near, value - near
