"""Clusters of similar rows, each with a center that stands for its rows.

The center's hidden state is the mean of those of the rows. So its logits, and what a program makes
of them, are near those of the rows, and they cost as much as one row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.product import operand_dtype
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.head import Head
from cce_inductor.kernels.names import COLUMN, LOGIT, Name
from cce_inductor.kernels.program.schedule import Schedule
from cce_inductor.kernels.program.text import Program

_ITERATIONS = 2
"""Power iterations to find the direction in which the rows of a cluster differ most."""


class Centers:
    """Clusters of equal size.

    Attributes:
        rows: the kept rows of each cluster, int64 [clusters, size]. Some clusters have one row less
            than others, and the last row of all in its place.
        is_own: which of them are rows of the cluster, bool [clusters, size].

    Args:
        input: [rows, hidden].
        head: the head.
        kept: the rows that are computed, at least one.
        depth: the rows are divided in half so many times.
    """

    def __init__(self, input: Tensor, head: Head, kept: KeptRows, depth: int):
        self._head, self._kept = head, kept
        hidden = kept.select(input).to(head.logit_dtype)
        self.rows, self.is_own = _clusters(hidden, depth)
        self._dtype = operand_dtype(head.compute_dtype)
        self._means = self.of_rows(hidden).mean(1).to(self._dtype)
        self._operands = {
            name: self._operand(name)
            for name, kind in head.program.operands.items()
            if kind.varies_over_rows
        }

    def of_rows(self, tensor: Tensor) -> Tensor:
        """Return what a tensor [kept rows, ...] has for the rows of each cluster,
        [clusters, size, ...]. A single cluster is all rows in their order, without a copy."""
        return tensor[self.rows] if len(self.rows) > 1 else tensor.unsqueeze(0)

    def for_rows(self, tensor: Tensor) -> Tensor:
        """Return what a tensor [clusters, ...] has for the cluster of each kept row,
        [kept rows, ...]."""
        number = torch.arange(len(self.rows), device=self.rows.device).unsqueeze(1)
        cluster = self.rows.new_zeros(self._kept.count)
        cluster.index_add_(0, self.rows.flatten(), (number * self.is_own).flatten())
        return tensor[cluster]

    def _operand(self, name: Name) -> Tensor:
        """Return an operand for each center: the mean of those of its rows if there is one number
        for each row, else that of its first row."""
        operand = self._head.operands[name.position].to(self._kept.device, non_blocking=True)
        if name.kind is not None and name.kind.varies_over_columns:
            first = self.rows[:, 0]
            return operand[first if self._kept.rows is None else self._kept.rows[first]]
        rows = self.of_rows(self._kept.select(operand))
        return rows.mean(1) if rows.is_floating_point() else rows[:, 0]

    def values(self, tile: slice, weight: Tensor, bias: Tensor | None) -> dict[Name, Tensor]:
        """Return the logits and operands of the centers in a tile, [clusters, columns] or a shape
        that broadcasts against it.

        Args:
            tile: a range of the head's order of the vocabulary.
            weight, bias: those of the tile, in the dtype of the product.
        """
        head, columns = self._head, self._head.columns(tile)
        logits = torch.mm(self._means, weight.t())
        if bias is not None:
            logits = logits + bias
        values: dict[Name, Tensor] = {LOGIT: logits.to(head.logit_dtype)}
        if head.program.reads_columns:
            values[COLUMN] = head.column_numbers(tile).unsqueeze(0)
        for name, kind in head.program.operands.items():
            operand = self._operands.get(name, head.operands[name.position])
            value = kind.of_block(operand, slice(None), columns)
            if value.is_floating_point():
                value = value.to(head.logit_dtype)
            values[name] = value.to(self._kept.device, non_blocking=True)
        return values

    def of_tiles(self) -> Iterator[dict[Name, Tensor]]:
        """Yield the values in each tile."""
        weight, bias = self._head.linear_weight, self._head.linear_bias
        for _, tile in self._head.tiles():
            columns = self._head.columns(tile)
            of_tile = None if bias is None else bias[columns]
            yield self.values(tile, weight[columns].to(self._dtype), of_tile)


def value_of(program: Program, name: Name, values: dict[Name, Tensor]) -> Tensor:
    """Return a value of a program, [clusters, columns]."""
    made = dict(values)
    Schedule(program.steps, (name,)).run(made, in_place=False)
    return made[name].to(values[LOGIT].dtype).expand(values[LOGIT].shape)


def vocabulary_order(input: Tensor, head: Head, kept: KeptRows) -> Tensor:
    """Return the vocabulary in the order of the first softmax at the mean hidden state, the
    likeliest entry first, int64 [vocabulary].

    Then few tiles hold most of the mass of most rows.
    """
    if kept.count == 0:
        return torch.arange(head.vocabulary, device=kept.device)
    name = head.program.normalizers[0].value
    center = Centers(input, head, kept, 0)
    parts = [value_of(head.program, name, values) for values in center.of_tiles()]
    return torch.cat(parts, 1).squeeze(0).argsort(descending=True, stable=True)


def _clusters(hidden: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Divide rows [rows, hidden] in half `depth` times, at the median along the direction in which
    they differ most. Return what `Centers` says of `rows` and `is_own`."""
    count, device = hidden.shape[0], hidden.device
    size = -(-count // 2**depth) * 2**depth
    every = torch.arange(size, device=device).unsqueeze(0)
    rows = every.clamp(max=count - 1)
    for _ in range(depth):
        here = hidden[rows]
        here = here - here.mean(1, keepdim=True)
        direction = here[:, :1]
        for _ in range(_ITERATIONS):
            direction = torch.bmm(torch.bmm(direction, here.transpose(1, 2)), here)
            direction = torch.nn.functional.normalize(direction, dim=2)
        order = torch.bmm(direction, here.transpose(1, 2)).squeeze(1).argsort(dim=1, stable=True)
        every, rows = (each.gather(1, order).view(2 * len(each), -1) for each in (every, rows))
    return rows, every < count
