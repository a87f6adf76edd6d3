"""What a program's reductions do with one block of values: forward accumulation, and cotangents.

Each class of the first half is one reduction, which sees every block once. `Cotangent` is the
opposite direction: what the gradients of all reductions of one value make of a block of it.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cce_inductor.kernels.program.text import Name, Program, Reduction

NOWHERE = -1
"""The index of a row that has none: its class index is ignored."""


def index_of(reduction: Reduction, operand: Tensor, vocabulary: int) -> Tensor:
    """[rows, k] int64 indices, counted from the front, `NOWHERE` where they are ignored."""
    index = operand
    if reduction.kind == "index":
        index = torch.where(index < 0, index + vocabulary, index)
    if reduction.kind == "target":
        index = index.masked_fill(index == reduction.args[2], NOWHERE)
    return index if index.dim() == 2 else index.unsqueeze(1)


def is_valid_index(reduction: Reduction, index: Tensor, vocabulary: int) -> Tensor:
    """Whether the code that is replaced would take each index, as it is given."""
    valid = (index >= (-vocabulary if reduction.kind == "index" else 0)) & (index < vocabulary)
    if reduction.kind == "target":
        valid = valid | (index == reduction.args[2])
    return valid


def columns_in(index: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """For each index whether it lies in `tile`, and a column of the tile to address: its own if
    it does, any valid one if not."""
    inside = (index >= tile.start) & (index < tile.stop)
    return inside, (index - tile.start).clamp_(0, tile.stop - tile.start - 1)


@dataclasses.dataclass(frozen=True)
class Block:
    """Where a block of values lies: its rows, its range of the vocabulary, the tile's number."""

    rows: slice
    tile: slice
    number: int


def row_sum(value: Tensor) -> Tensor:
    """[rows] float64, of [rows, columns]: what float32 rounds are sums of `_PART` columns, so that
    no block of float64 has to be stored."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    parts, rest = divmod(value.shape[1], _PART)
    in_parts = value[:, : parts * _PART].unflatten(1, (parts, _PART))
    total = in_parts.sum(2, dtype=dtype).sum(1, dtype=torch.float64)
    return total + value[:, parts * _PART :].sum(1, dtype=dtype) if rest else total


_PART = 128


class Accumulator(abc.ABC):
    """One reduction, which sees every block of its values once."""

    @abc.abstractmethod
    def add(self, at: Block, *values: Tensor) -> None:
        """Takes [rows, tile] of each value that the reduction names."""

    @abc.abstractmethod
    def results(self) -> tuple[Tensor, ...]: ...


class LogSumExp(Accumulator):
    """Of each tile, then of the tiles. Writes over the values."""

    def __init__(self, name: Name, rows: int, tiles: int, device: torch.device):
        self.name = name
        self.tiles = torch.empty(rows, tiles, dtype=torch.float64, device=device)

    def add(self, at: Block, *values: Tensor) -> None:
        (value,) = values
        shift = _shift(value)
        total = row_sum(value.sub_(shift.unsqueeze(1)).exp_())
        self.tiles[at.rows, at.number] = shift.double() + total.log()

    def results(self) -> tuple[Tensor, ...]:
        return (torch.logsumexp(self.tiles, 1),)


def _shift(value: Tensor) -> Tensor:
    """The greatest of each row, 0 in a row of only -inf, whose logsumexp then is -inf, not nan."""
    top = value.amax(1)
    return top.masked_fill(top == -math.inf, 0.0)


class Mean(Accumulator):
    """Of `y` under softmax(x), in each tile; then of the tiles under theirs."""

    def __init__(self, normalizer: LogSumExp):
        self.tiles = torch.empty_like(normalizer.tiles)
        self.normalizer = normalizer

    def add(self, at: Block, *values: Tensor) -> None:
        x, y = values[0], values[1].to(values[0].dtype)
        mass = (x - _shift(x).unsqueeze(1)).exp_()
        total = row_sum(mass)
        center = center_of(mass, y)
        rest = row_sum(mass.mul_(y - center.unsqueeze(1))) / total
        # A tile without any mass says 0, and will have no weight.
        self.tiles[at.rows, at.number] = (center.double() + rest).masked_fill(total == 0, 0.0)

    def results(self) -> tuple[Tensor, ...]:
        (lse,) = self.normalizer.results()
        weights = (self.normalizer.tiles - lse.unsqueeze(1)).exp()
        return ((weights * self.tiles).sum(1),)


def center_of(weights: Tensor, y: Tensor) -> Tensor:
    """The weighted mean of `y` in each row, as nearly as its dtype holds it; some finite number
    where that is not.

    A weighted sum of `y` is the product of this number and the sum of the weights, and the weighted
    sum of `y`'s distances from it, which are small where the weights are not. A loss is often such
    a sum less the logsumexp of the row, and near 0 where both are large.
    """
    return finite_or_zero((weights * y).sum(1) / weights.sum(1))


def finite_or_zero(value: Tensor) -> Tensor:
    return value.where(value.isfinite(), 0.0)


class Sum(Accumulator):
    def __init__(self, rows: int, device: torch.device):
        self.total = torch.zeros(rows, dtype=torch.float64, device=device)

    def add(self, at: Block, *values: Tensor) -> None:
        (value,) = values
        self.total[at.rows] += row_sum(value)

    def results(self) -> tuple[Tensor, ...]:
        return (self.total,)


class Dot(Accumulator):
    """The sum of ``q * y``."""

    def __init__(self, rows: int, device: torch.device, dtype: torch.dtype):
        self.total = torch.zeros(rows, dtype=torch.float64, device=device)
        self.dtype = dtype

    def add(self, at: Block, *values: Tensor) -> None:
        q, y = (value.to(self.dtype) for value in values)
        center = center_of(q.abs(), y)
        self.total[at.rows] += center.double() * row_sum(q)
        self.total[at.rows] += row_sum((y - center.unsqueeze(1)).mul_(q))

    def results(self) -> tuple[Tensor, ...]:
        return (self.total,)


class Gather(Accumulator):
    """The values at indices, [rows, k]; the result is [rows] if `flat`."""

    def __init__(self, index: Tensor, *, flat: bool):
        self.index = index
        self.flat = flat
        self.found = torch.zeros(index.shape, dtype=torch.float64, device=index.device)

    def add(self, at: Block, *values: Tensor) -> None:
        (value,) = values
        inside, columns = columns_in(self.index[at.rows], at.tile)
        here = value.gather(1, columns).double()
        self.found[at.rows] = torch.where(inside, here, self.found[at.rows])

    def results(self) -> tuple[Tensor, ...]:
        return (self.found.squeeze(1) if self.flat else self.found,)


class Max(Accumulator):
    """The greatest value and its first index; nan is greater than any number."""

    def __init__(self, rows: int, device: torch.device):
        self.value = torch.full((rows,), -math.inf, dtype=torch.float64, device=device)
        self.index = torch.zeros(rows, dtype=torch.int64, device=device)

    def add(self, at: Block, *values: Tensor) -> None:
        (value,) = values
        top, where = value.max(1)
        top, best = top.double(), self.value[at.rows]
        better = (top > best) | (top.isnan() & ~best.isnan())
        self.value[at.rows] = torch.where(better, top, best)
        self.index[at.rows] = torch.where(better, where + at.tile.start, self.index[at.rows])

    def results(self) -> tuple[Tensor, ...]:
        return self.value, self.index


class TopK(Accumulator):
    """The greatest k values, greatest first, and their indices; k is at most a tile."""

    def __init__(self, rows: int, k: int, device: torch.device):
        self.k = k
        self.value = torch.empty(rows, k, dtype=torch.float64, device=device)
        self.index = torch.empty(rows, k, dtype=torch.int64, device=device)

    def add(self, at: Block, *values: Tensor) -> None:
        (value,) = values
        top, where = value.topk(min(self.k, value.shape[1]), dim=1)
        top, where = top.double(), where + at.tile.start
        if at.number > 0:
            both = torch.cat([self.value[at.rows], top], 1)
            top, order = both.topk(self.k, dim=1)
            where = torch.cat([self.index[at.rows], where], 1).gather(1, order)
        self.value[at.rows], self.index[at.rows] = top, where

    def results(self) -> tuple[Tensor, ...]:
        return self.value, self.index


def accumulators(
    program: Program,
    indices: Mapping[str, Tensor],
    rows: int,
    tiles: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Accumulator]:
    """One for each of the program's reductions, in order.

    Args:
        program: whose reductions they are.
        indices: by the text of a reduction, the indices that it reads, as `index_of` makes them.
        rows: how many are reduced.
        tiles: how many the vocabulary has.
        device: where the results are.
        dtype: of the logits.
    """
    normalizers = {
        reduction.value: LogSumExp(reduction.value, rows, tiles, device)
        for reduction in program.reductions
        if reduction.kind == "logsumexp"
    }

    def made(reduction: Reduction) -> Accumulator:
        match reduction.kind:
            case "logsumexp":
                return normalizers[reduction.value]
            case "mean":
                return Mean(normalizers[reduction.value])
            case "sum":
                return Sum(rows, device)
            case "dot":
                return Dot(rows, device, dtype)
            case "max":
                return Max(rows, device)
            case "topk":
                return TopK(rows, reduction.args[1], device)
        return Gather(indices[str(reduction)], flat=reduction.kind != "gather")

    return [made(reduction) for reduction in program.reductions]


def in_two_parts(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `dtype` can hold of a float64 tensor, and the rest, in float64.

    A number near `value` minus the first part is exact. The rest of an infinite value is nan.
    """
    near = value.to(dtype)
    return near, value - near


class Cotangent:
    """The gradient of everything that is reduced from one value of the program.

    Attributes:
        name: the value.
        lse: its logsumexp, float64 [rows]; None if no gradient goes through its softmax.
        grad_lse, grad_sum: float64 [rows].
        means: for each mean under softmax(name): its gradient, the mean, of what.
        weights: for each mean of this value: its gradient, the logsumexp and value of the softmax.
        factors: for each dot product with this value: its gradient, the other value.
        grad_at: for each reduction at indices: the indices and their gradients, [rows, k].
    """

    def __init__(self, name: Name, rows: int, device: torch.device, dtype: torch.dtype):
        self.name = name
        self.dtype = dtype
        self.lse: Tensor | None = None
        self.grad_lse = torch.zeros(rows, dtype=torch.float64, device=device)
        self.grad_sum: Tensor | None = None
        self.means: list[tuple[Tensor, Tensor, Name]] = []
        self.weights: list[tuple[Tensor, Tensor, Name]] = []
        self.factors: list[tuple[Tensor, Name]] = []
        self.grad_at: list[tuple[Tensor, Tensor]] = []

    @property
    def reads_values(self) -> bool:
        """Whether values, not their exponentials only, are factors of it: it cannot be written over
        them, and is not 0 where every probability is."""
        return bool(self.means or self.weights or self.factors)

    def prepare(self) -> None:
        """Once, when every gradient has been added."""
        if self.grad_at:
            indices, grads = zip(*self.grad_at, strict=True)
            self.index, self.grad_index = torch.cat(indices, 1), torch.cat(grads, 1)
            if self.index.shape[1] > 1:  # of equal indices each gets what all of them get
                sums = [
                    self.grad_index.where(self.index == column.unsqueeze(1), 0.0).sum(1)
                    for column in self.index.unbind(1)
                ]
                self.grad_index = torch.stack(sums, 1)
        if self.lse is not None:
            # exp(x - lse) = exp(x - shift) * exp(shift - lse): the first factor is exact where it
            # matters (x near lse).
            self.shift, rest = in_two_parts(self.lse, self.dtype)
            self.residual = rest.neg().exp()

    def of_block(
        self, values: Mapping[Name, Tensor], block: slice, tile: slice, *, overwrite: bool
    ) -> Tensor:
        """[rows, tile], in the memory of the values themselves if `overwrite`."""
        value = values[self.name].expand(values[Name("z")].shape)
        if self.grad_at:
            inside, columns = columns_in(self.index[block], tile)
            at_index = value.gather(1, columns).double()
        if self.lse is None:
            cotangent = (
                value.zero_() if overwrite else value.new_zeros(value.shape, dtype=self.dtype)
            )
        else:
            shift = self.shift[block].unsqueeze(1)
            cotangent = (value.sub_(shift) if overwrite else value - shift).exp_()
            probability = cotangent
            if self.means:
                probability = cotangent * self._column(self.residual[block])
            cotangent.mul_(self._column(self.grad_lse[block] * self.residual[block]))
        if self.grad_at:
            grad = self.grad_index[block]
            if self.lse is not None:
                # The target's g p + g_t, with g_t near -g and p near 1: (g + g_t) + g (p - 1).
                grad_lse = self.grad_lse[block].unsqueeze(1)
                log_probability = at_index - self.lse[block].unsqueeze(1)
                grad = (grad_lse + grad) + grad_lse * log_probability.expm1()
            for k in range(columns.shape[1]):
                column = columns[:, k : k + 1]
                here = torch.where(
                    inside[:, k : k + 1],
                    grad[:, k : k + 1].to(self.dtype),
                    cotangent.gather(1, column),
                )
                cotangent.scatter_(1, column, here)
        if self.grad_sum is not None:
            cotangent += self._column(self.grad_sum[block])
        for grad_mean, mean, y in self.means:
            near, rest = in_two_parts(mean[block], self.dtype)
            distance = values[y].to(self.dtype) - near.unsqueeze(1)
            distance -= self._column(finite_or_zero(rest))
            cotangent += distance.mul_(probability).mul_(self._column(grad_mean[block]))
        for grad_mean, lse, x in self.weights:
            near, rest = in_two_parts(lse[block], self.dtype)
            mass = (values[x] - near.unsqueeze(1)).exp_()
            cotangent += mass.mul_(self._column(grad_mean[block] * rest.neg().exp()))
        for grad_dot, other in self.factors:
            cotangent += values[other] * self._column(grad_dot[block])
        return cotangent

    def _column(self, row_values: Tensor) -> Tensor:
        return row_values.to(self.dtype).unsqueeze(1)


def cotangents(
    program: Program,
    grads: list[Tensor | None],
    results: list[Tensor],
    indices: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[Name, Cotangent]:
    """A `Cotangent` for each value that a reduction with a gradient reads.

    Args:
        program: whose reductions they are.
        grads: of the results, float64; None for one that has none.
        results: of the forward, as many.
        indices: the operands that are indices, [rows, k] and `NOWHERE` where ignored; by the
            text of their reduction.
        dtype: of the values.
    """
    found: dict[Name, Cotangent] = {}
    lse: dict[Name, Tensor] = {}
    rows, device = results[0].shape[0], results[0].device

    def cotangent(name: Name) -> Cotangent:
        return found.setdefault(name, Cotangent(name, rows, device, dtype))

    for position, reduction in program.outputs:
        if reduction.kind == "logsumexp":
            lse[reduction.value] = results[position]
    for position, reduction in program.outputs:
        grad, result = grads[position], results[position]
        if grad is None:
            continue
        of = cotangent(reduction.value)
        if reduction.kind == "logsumexp":
            of.grad_lse = of.grad_lse + grad
            of.lse = result
        elif reduction.kind == "mean":
            y = Name(reduction.args[1])
            of.lse = lse[reduction.value]
            of.means.append((grad, result, y))
            if y == reduction.value:  # the two gradients of an entropy cancel: exactly, here
                of.grad_lse = of.grad_lse + grad
            else:
                cotangent(y).weights.append((grad, of.lse, reduction.value))
        elif reduction.kind == "dot":
            q, y = reduction.values
            cotangent(q).factors.append((grad, y))
            cotangent(y).factors.append((grad, q))
        elif reduction.kind == "sum":
            of.grad_sum = grad if of.grad_sum is None else of.grad_sum + grad
        else:
            index = indices.get(str(reduction))
            if index is None:  # max and topk
                index = results[position + 1]
            if index.dim() == 1:
                index, grad = index.unsqueeze(1), grad.unsqueeze(1)
            of.grad_at.append((index, grad.reshape(index.shape)))
    for each in found.values():
        each.prepare()
    return found
