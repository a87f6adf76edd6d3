"""The cotangent of a value: its gradient, through all statistics that read it.

Every statistic adds its own terms. Here the terms are computed for a block of logits with ordinary
tensor operations; `kernels.triton.gradient` writes them as the steps of a program.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cce_inductor.kernels.names import LOGIT, Name
from cce_inductor.kernels.statistics.numerics import Exponential, finite_or_zero, split


class Cotangents(dict[Name, "Cotangent"]):
    """The cotangent of each value that a statistic with a gradient reads.

    Args:
        rows: the number of rows.
        device: the device of the rows.
        dtype: the dtype of the values.
        exp: computes exponentials in place.
    """

    def __init__(self, rows: int, device: torch.device, dtype: torch.dtype, exp: Exponential):
        super().__init__()
        self.rows, self.device, self.dtype, self.exp = rows, device, dtype, exp

    def __missing__(self, name: Name) -> Cotangent:
        self[name] = made = Cotangent(name, self)
        return made


class Cotangent:
    """The terms of one value's gradient.

    Attributes:
        name: the value.
        lse: its logsumexp, float64 [rows]; None if no gradient goes through its softmax.
        grad_lse: the factor of its softmax, float64 [rows].
        grad_sum: what is added in every column, float64 [rows]; None for nothing.
        means: for each mean under softmax(name): its gradient, the mean, the value it is a mean of.
        probabilities: for each mean of this value: its gradient, and the logsumexp and the name of
            the value whose softmax weights it.
        factors: for each dot product with this value: its gradient, the other value.
        index, grad_index: the indices that have gradients of their own, and those gradients,
            [rows, k].
    """

    def __init__(self, name: Name, cotangents: Cotangents):
        self.name = name
        self._all = cotangents
        self.dtype = cotangents.dtype
        self.lse: Tensor | None = None
        self.grad_lse = torch.zeros(cotangents.rows, dtype=torch.float64, device=cotangents.device)
        self.grad_sum: Tensor | None = None
        self.means: list[tuple[Tensor, Tensor, Name]] = []
        self.probabilities: list[tuple[Tensor, Tensor, Name]] = []
        self.factors: list[tuple[Tensor, Name]] = []
        self._at: list[tuple[Tensor, Tensor]] = []

    def add_softmax(self, grad: Tensor, lse: Tensor) -> None:
        """Add ``grad * softmax(value)``."""
        self.lse = lse
        self.grad_lse = self.grad_lse + grad

    def add_constant(self, grad: Tensor) -> None:
        """Add `grad` in every column."""
        self.grad_sum = grad if self.grad_sum is None else self.grad_sum + grad

    def add_mean(self, grad: Tensor, lse: Tensor, mean: Tensor, y: Name) -> None:
        """Add ``grad * softmax(value) * (y - mean)``, and ``grad * softmax(value)`` to `y`."""
        self.lse = lse
        self.means.append((grad, mean, y))
        if y == self.name:  # An entropy's two gradients cancel exactly if added here.
            self.grad_lse = self.grad_lse + grad
        else:
            self._all[y].probabilities.append((grad, lse, self.name))

    def add_multiple(self, grad: Tensor, other: Name) -> None:
        """Add ``grad * other``."""
        self.factors.append((grad, other))

    def add_at(self, grad: Tensor, index: Tensor) -> None:
        """Add gradients [rows, k] in the columns `index` [rows, k]; negative indices add none."""
        self._at.append((index, grad.reshape(index.shape)))

    @property
    def has_indices(self) -> bool:
        return bool(self._at)

    def at_indices(self) -> tuple[Tensor, Tensor]:
        """Return all indices and their gradients, [rows, k], as they were added."""
        indices, grads = zip(*self._at, strict=True)
        return torch.cat(indices, 1), torch.cat(grads, 1)

    @property
    def reads_values(self) -> bool:
        """Whether values themselves are factors of it, and not only their exponentials. Then it
        must not overwrite them, and it can be nonzero where all probabilities are 0."""
        return bool(self.means or self.probabilities or self.factors)

    def prepare(self) -> None:
        """Compute what all blocks share, once every term has been added."""
        if self._at:
            self.index, self.grad_index = self.at_indices()
            if self.index.shape[1] > 1:  # Equal indices all get the sum of their gradients.
                sums = [
                    self.grad_index.where(self.index == column.unsqueeze(1), 0.0).sum(1)
                    for column in self.index.unbind(1)
                ]
                self.grad_index = torch.stack(sums, 1)
        if self.lse is not None:
            # exp(x - lse) = exp(x - shift) * exp(shift - lse): the first factor is exact where it
            # matters, for x near lse.
            self.shift, rest = split(self.lse, self.dtype)
            self.residual = rest.neg().exp()

    def of_pairs(self, rows: Tensor, weight: Tensor, place: Tensor) -> Cotangent:
        """Return the cotangent of some rows, with a weight for what is in proportion to a softmax,
        and without what is the same in every column.

        Args:
            rows: the numbers of the rows, [n].
            weight: float64 [n]; 1 for rows that have an index in the columns of interest.
            place: [vocabulary], the place of each column in the order in which tiles divide them.
        """
        made = Cotangent(self.name, self._all)
        made.lse = None if self.lse is None else self.lse[rows]
        made.grad_lse = self.grad_lse[rows] * weight
        made.means = [(grad[rows] * weight, mean[rows], y) for grad, mean, y in self.means]
        made.probabilities = [
            (grad[rows] * weight, lse[rows], x) for grad, lse, x in self.probabilities
        ]
        if self._at:
            index, made.grad_index = self.index[rows], self.grad_index[rows]
            made.index = placed(index, place)
            made._at = [(made.index, made.grad_index)]
        if self.lse is not None:
            made.shift, made.residual = self.shift[rows], self.residual[rows]
        return made

    def of_block(
        self,
        values: Mapping[Name, Tensor],
        block: slice | Tensor,
        tile: slice,
        *,
        overwrite: bool,
    ) -> Tensor:
        """Return the cotangent [rows, tile], in the memory of the values themselves if
        `overwrite`."""
        value = values[self.name].expand(values[LOGIT].shape)
        if self._at:
            inside, columns = columns_in(self.index[block], tile)
            at_index = value.gather(1, columns).double()
        if self.lse is None:
            cotangent = (
                value.zero_() if overwrite else value.new_zeros(value.shape, dtype=self.dtype)
            )
        else:
            shift = self.shift[block].unsqueeze(1)
            cotangent = self._all.exp(value.sub_(shift) if overwrite else value - shift)
            probability = cotangent
            if self.means:
                probability = cotangent * self._column(self.residual[block])
            cotangent.mul_(self._column(self.grad_lse[block] * self.residual[block]))
        if self._at:
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
            near, rest = split(mean[block], self.dtype)
            distance = values[y].to(self.dtype) - near.unsqueeze(1)
            distance -= self._column(finite_or_zero(rest))
            cotangent += distance.mul_(probability).mul_(self._column(grad_mean[block]))
        for grad_mean, lse, x in self.probabilities:
            near, rest = split(lse[block], self.dtype)
            mass = self._all.exp(values[x] - near.unsqueeze(1))
            cotangent += mass.mul_(self._column(grad_mean[block] * rest.neg().exp()))
        for grad_dot, other in self.factors:
            cotangent += values[other] * self._column(grad_dot[block])
        return cotangent

    def _column(self, row_values: Tensor) -> Tensor:
        return row_values.to(self.dtype).unsqueeze(1)


def placed(index: Tensor, place: Tensor) -> Tensor:
    """Return the places of indices in an order, given the place of each column, [vocabulary];
    negative indices, which are ignored, stay as they are."""
    return place[index].where(index >= 0, index)


def columns_in(index: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Return for each index whether it lies in `tile`, and its column in the tile. An index outside
    is clamped to the tile."""
    inside = (index >= tile.start) & (index < tile.stop)
    return inside, (index - tile.start).clamp_(0, tile.stop - tile.start - 1)
