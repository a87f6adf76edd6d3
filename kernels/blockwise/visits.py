"""Which rows of each tile of the vocabulary are computed in the backward."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels import sampling, visited
from cce_inductor.kernels.blockwise.pullback import Pullback
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.workspace import row_blocks
from cce_inductor.kernels.head import Head
from cce_inductor.kernels.names import Name
from cce_inductor.kernels.statistics.cotangent import Cotangent, placed


class Visits(abc.ABC):
    """The rows of each tile, in blocks."""

    @abc.abstractmethod
    def blocks(self, number: int, most: int) -> Iterator[Visit]:
        """Yield blocks of at most `most` rows that cover the rows of a tile."""


@dataclasses.dataclass(frozen=True)
class Visit:
    """Rows of a tile that are computed together.

    Attributes:
        rows: a slice of the kept rows, or their numbers, each once.
        pullback: the gradient.
        block: the rows among those of the pullback.
        heavy: places in the block, int64, of the rows whose product for the gradient of the input
            is not rounded; None for all rows.
    """

    rows: slice | Tensor
    pullback: Pullback
    block: slice
    heavy: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class EveryRow(Visits):
    """All rows of every tile, but none of those whose gradient is zero.

    Attributes:
        rows: the number of rows.
        pullback: the gradient.
        skipped: for each tile, whether its gradient is zero; empty if none is.
        heavy_pairs: see `Masses.heavy_pairs`.
    """

    rows: int
    pullback: Pullback
    skipped: Sequence[bool] = ()
    heavy_pairs: Tensor | None = None

    def blocks(self, number: int, most: int) -> Iterator[Visit]:
        if self.skipped and self.skipped[number]:
            return
        for block in row_blocks(self.rows, most):
            heavy = None
            if self.heavy_pairs is not None:
                heavy = self.heavy_pairs[block, number].nonzero().squeeze(1)
            yield Visit(block, self.pullback, block, heavy)


@dataclasses.dataclass(frozen=True)
class Sample(Visits):
    """A sample of the rows of each tile; see `kernels.sampling`.

    Attributes:
        pullback: the gradient of all rows.
        place: the place of each vocabulary entry in the order, [vocabulary].
        masses: the mass of each pair for each softmax, float64 [rows, tiles].
        tile_lse: the logsumexp of each pair, likewise.
        weight: what the gradient of each pair is multiplied by, float64 [rows, tiles]; 0 for a pair
            that is not computed.
        rows: the numbers of the rows that are computed of each tile.
    """

    pullback: Pullback
    place: Tensor
    masses: Mapping[Name, Tensor]
    tile_lse: Mapping[Name, Tensor]
    weight: Tensor
    rows: Sequence[Tensor]

    @classmethod
    def draw(
        cls,
        head: Head,
        kept: KeptRows,
        pullback: Pullback,
        lse: Mapping[Name, Tensor],
        tile_lse: Mapping[Name, Tensor],
    ) -> Sample | None:
        """Draw a sample. None if so many pairs are expected that all are better computed.

        For the number of pairs of each tile, the host waits once (`blockwise.host`).

        Args:
            head: the head, with its order.
            kept: the rows that are computed if all pairs are.
            pullback: the gradient.
            lse: the logsumexp of each value that has one, float64 [rows].
            tile_lse: its part of each tile, [rows, tiles].
        """
        assert head.order is not None, "the vocabulary has an order"
        place = head.order.argsort()
        used = _softmaxes(pullback.cotangents)
        if not used:
            return None
        masses = {x: (tile_lse[x].double() - lse[x].unsqueeze(1)).exp_() for x in used}
        rows, tiles = masses[used[0]].shape
        indexed = [each for each in pullback.cotangents.values() if each.has_indices]
        places = [placed(each.index, place) for each in indexed]
        held = sampling.held_pairs(places, rows, tiles, device=kept.device)
        chances = sampling.chances(
            list(masses.values()), _active_rows(pullback.cotangents), held, head.sample_below
        )
        drawn = sampling.drawn(chances, lse[used[0]])
        numbers = torch.zeros(2 + tiles, dtype=torch.float64, device=kept.device)
        numbers[0] = chances.sum(1).double().sum() / sampling.UNIT
        numbers[1] = kept.own_count
        numbers[2:] = drawn.sum(0)
        expected, own_rows, *counts = numbers.tolist()
        total, pairs = round(sum(counts)), round(own_rows) * tiles
        if expected > sampling.MAX_SHARE * rows * tiles:
            visited.count(pairs, pairs)
            return None
        visited.count(total, pairs)
        weight = drawn * (sampling.UNIT / chances.where(drawn, sampling.UNIT).double())
        computed = drawn.t().nonzero_static(size=total)[:, 1].contiguous()
        of_tiles = computed.split([round(count) for count in counts])
        return cls(pullback, place, masses, tile_lse, weight, of_tiles)

    def blocks(self, number: int, most: int) -> Iterator[Visit]:
        weight = self.weight[:, number]
        for rows in self.rows[number].split(most):
            if len(rows):
                pullback = self.pullback.of_pairs(rows, weight[rows], self.place)
                yield Visit(rows, pullback, slice(0, len(rows)))


def _softmaxes(cotangents: Mapping[Name, Cotangent]) -> list[Name]:
    """Return the values whose softmax is a factor of a gradient."""
    own = [name for name, each in cotangents.items() if each.lse is not None]
    others = [x for each in cotangents.values() for _, _, x in each.probabilities]
    return list(dict.fromkeys([*own, *others]))


def _active_rows(cotangents: Mapping[Name, Cotangent]) -> Tensor:
    """Return the rows in which the gradient of any softmax is not 0, bool [rows]."""
    factors = [each.grad_lse for each in cotangents.values()]
    for each in cotangents.values():
        factors += [grad for grad, _, _ in (*each.means, *each.probabilities)]
    return torch.stack(factors).ne(0).any(0)
