"""The statistics of all rows, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cce_inductor.kernels import all_statistics
from cce_inductor.kernels.all_statistics import ByStatistic, Indices
from cce_inductor.kernels.blockwise.projection import Projection, Tile
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.workspace import BlockRows, row_blocks
from cce_inductor.kernels.head import Head
from cce_inductor.kernels.names import LOGIT, Name
from cce_inductor.kernels.program.schedule import schedule
from cce_inductor.kernels.saved import saved_normalizers
from cce_inductor.kernels.statistics.base import Statistic


class Statistics:
    """The parts of all statistics, combined over the tiles.

    Args:
        head: the head.
        indices: the indices of its statistics.
        kept: the rows that are computed.

    Attributes:
        of_tiles: for each of `saved_normalizers`, its part of each tile, [rows, tiles] in the logit
            dtype. Each tile writes its own column.
    """

    def __init__(self, head: Head, indices: Indices, kept: KeptRows):
        self.head, self.indices, self.kept = head, indices, kept
        shape = kept.count, head.tile_count
        self.of_tiles = {
            each: torch.empty(shape, dtype=head.logit_dtype, device=kept.device)
            for each in saved_normalizers(head)
        }
        self._whole = self.nothing()

    def nothing(self) -> ByStatistic:
        """Return the parts of no tile."""
        return {
            statistic: statistic.nothing(
                self.kept.count, self.kept.device, self.indices.get(statistic)
            )
            for statistic in self.head.program.statistics
        }

    def add(self, parts: ByStatistic) -> None:
        """Add the parts of a group of tiles."""
        _add(self._whole, parts, slice(None))

    def results(self) -> list[Tensor]:
        """Return the results of the statistics, and what the forward saves, for the kept rows."""
        by_statistic = all_statistics.results(self._whole, self.indices)
        results = [result for each in self.head.program.statistics for result in by_statistic[each]]
        return [*results, *self.of_tiles.values()]


class ForwardLane:
    """Computes the statistics of groups of tiles.

    Args:
        shared: the statistics, to which all lanes add.
        projections: the matrix products.
        rows: the rows of a block.
    """

    def __init__(self, shared: Statistics, projections: Mapping[Name, Projection], rows: BlockRows):
        self._shared, self._rows = shared, rows
        self._tiles = {name: Tile(each, rows) for name, each in projections.items()}
        program = shared.head.program
        self._schedule = schedule(program)
        # Each statistic once. Those that overwrite the values come last.
        self._in_order = sorted(dict.fromkeys(program.statistics), key=lambda each: each.overwrites)

    def compute(self, group: int) -> None:
        shared = self._shared
        self._group = shared.nothing()
        for number, tile in shared.head.neighbours(group):
            for each in self._tiles.values():
                each.begin(tile)
            for block in row_blocks(shared.kept.count, self._rows.block):
                values = shared.kept.operands(shared.head, block, tile)
                for name, each in self._tiles.items():
                    values[name] = each.logits(block)
                self._schedule.run(values)
                self._add(values, block, tile, number)

    def commit(self) -> None:
        self._shared.add(self._group)

    def _add(self, values: dict[Name, Tensor], block: slice, tile: slice, number: int) -> None:
        """Add a block of a tile. Its values may be overwritten."""
        numbers: ByStatistic = {}
        for statistic in self._in_order:
            index = self._shared.indices.get(statistic)
            numbers[statistic] = statistic.of_tile(
                self._values_of(statistic, values),
                tile,
                None if index is None else index[block],
                self._shared.head.exp,
            )
        parts = all_statistics.parts(numbers)
        for normalizer, of_tiles in self._shared.of_tiles.items():
            of_tiles[block, number] = parts[normalizer][0].to(of_tiles.dtype)
        _add(self._group, parts, block)

    def _values_of(self, statistic: Statistic, values: dict[Name, Tensor]) -> list[Tensor]:
        read = []
        for name in statistic.values:
            value = values[name].expand(values[LOGIT].shape)
            is_own = name.is_block and 0 not in value.stride()
            if statistic.overwrites and (not is_own or self._schedule.has_aliases):
                value = value.clone()
            read.append(value.to(self._shared.head.logit_dtype))
        return read


def _add(whole: ByStatistic, parts: ByStatistic, block: slice) -> None:
    """Combine the parts of some columns, in the rows of a block, with those of other columns."""
    stacked: ByStatistic = {
        statistic: tuple(
            torch.stack([before[block], part])
            for before, part in zip(whole[statistic], each, strict=True)
        )
        for statistic, each in parts.items()
    }
    for statistic, combined in all_statistics.combined(stacked).items():
        for before, new in zip(whole[statistic], combined, strict=True):
            before[block] = new
