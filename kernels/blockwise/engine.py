"""Statistics of logits in blocks of rows and vocabulary, with ordinary tensor operations.

The vocabulary is cut into tiles of `TILE` entries and is the outermost loop, in the forward and in
the backward; rows are cut only when a tile's logits for all of them would not fit the workspace.
Only one block of logits exists at a time, with the blocks that the program computes from it. Row
statistics are float64 vectors: the loss of a confident row is the small difference of two large
numbers, and float32 would round it more than log_softmax of stored logits does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels import all_statistics
from cce_inductor.kernels.all_statistics import ByStatistic, Indices
from cce_inductor.kernels.blockwise import selected
from cce_inductor.kernels.blockwise.gradients import OperandGradient
from cce_inductor.kernels.blockwise.projection import Projection, ProjectionGradient
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.selected import Selected
from cce_inductor.kernels.blockwise.workspace import row_blocks, rows_of_block
from cce_inductor.kernels.head import TILE, Gradients, Head, Wanted, tile_count
from cce_inductor.kernels.names import LOGIT, Name
from cce_inductor.kernels.program.derivative import Derivative, derivative
from cce_inductor.kernels.program.schedule import schedule
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.statistics.base import Statistic
from cce_inductor.kernels.statistics.cotangent import Cotangent
from cce_inductor.kernels.statistics.indexed import NOWHERE, Indexed


def check_index(statistic: Indexed, index: Tensor, vocabulary: int) -> None:
    """Raise the replaced code's error for an index out of bounds on the CPU.

    On other devices the check is an assertion on the device, as in the replaced code. The host
    does not wait for it.
    """
    valid = statistic.is_valid(index, vocabulary)
    if index.device.type != "cpu":
        torch._assert_async(valid.all())
    elif not bool(valid.all()):
        raise statistic.error(int(index[valid.logical_not()].flatten()[0]), vocabulary)


def compute_statistics(input: Tensor, head: Head) -> list[Tensor]:
    """Return the statistics of each row.

    Args:
        input: [rows, hidden], any floating dtype and strides.
        head: the projection, and what is computed from its result.

    Returns:
        The results of the program's statistics, in order: float64 [rows] or [rows, k], int64 for
        indices. If the program has a logsumexp, they are followed by the first one's value for each
        tile, [rows, tiles] in the logit dtype.

    Raises:
        IndexError, RuntimeError: an index outside the vocabulary (CPU).
    """
    vocabulary, program = head.vocabulary, head.program
    kept = KeptRows(input.shape[0], head)
    kept_operands = _kept_indices(head, kept)
    for statistic in program.indexed:
        check_index(statistic, statistic.index_of(kept_operands).to(torch.int64), vocabulary)
    indices = all_statistics.prepared_indices(program, kept_operands, vocabulary)

    factors = head.factors(input)
    if selected.applies(head, indices):
        by_statistic = {
            each: (Selected(head, factors[LOGIT], kept, index).logits(),)
            for each, index in indices.items()
        }
        by_statistic = all_statistics.results(by_statistic, indices)
        return [kept.restore(by_statistic[each][0]) for each in program.statistics]
    rows = rows_of_block(head, list(factors.values()), kept.count, backward=False)
    projections = {
        name: Projection(head, each, kept, rows, backward=False) for name, each in factors.items()
    }
    accumulation = _Accumulation(head, indices, kept)
    forward = schedule(program)
    for number, tile in head.tiles():
        for projection in projections.values():
            projection.begin(tile)
        for block in row_blocks(kept.count, rows):
            values = kept.operands(head, block, tile)
            for name, projection in projections.items():
                values[name] = projection.logits(block)
            forward.run(values)
            accumulation.add(values, block, tile, number)
    return [kept.restore(result) for result in accumulation.results()]


class _Accumulation:
    """Combines the parts of all statistics over the tiles. It also keeps the part of each tile for
    the first logsumexp."""

    def __init__(self, head: Head, indices: Indices, kept: KeptRows):
        self.head, self.program, self.indices = head, head.program, indices
        self._whole: ByStatistic = {
            statistic: statistic.nothing(kept.count, kept.device, indices.get(statistic))
            for statistic in self.program.statistics
        }
        self._has_aliases = schedule(self.program).has_aliases
        # Each statistic once. Those that overwrite the values come last.
        self._in_order = sorted(self._whole, key=lambda each: each.overwrites)
        self._normalizer = self.program.normalizer
        tiles = 0 if self._normalizer is None else tile_count(head.vocabulary)
        self._of_tiles = torch.empty(kept.count, tiles, dtype=head.logit_dtype, device=kept.device)

    def add(self, values: dict[Name, Tensor], block: slice, tile: slice, number: int) -> None:
        """Add a block.

        Args:
            values: the program's values, which may be overwritten.
            block, tile: the block's rows and columns.
            number: the number of the tile.
        """
        numbers: ByStatistic = {}
        for statistic in self._in_order:
            index = self.indices.get(statistic)
            numbers[statistic] = statistic.of_tile(
                self._values_of(statistic, values), tile, None if index is None else index[block]
            )
        parts = all_statistics.parts(numbers)
        if self._normalizer is not None:
            self._of_tiles[block, number] = parts[self._normalizer][0].to(self._of_tiles.dtype)
        stacked: ByStatistic = {
            statistic: tuple(
                torch.stack([whole[block], part])
                for whole, part in zip(self._whole[statistic], each, strict=True)
            )
            for statistic, each in parts.items()
        }
        for statistic, combined in all_statistics.combined(stacked).items():
            for whole, new in zip(self._whole[statistic], combined, strict=True):
                whole[block] = new

    def _values_of(self, statistic: Statistic, values: dict[Name, Tensor]) -> list[Tensor]:
        read = []
        for name in statistic.values:
            value = values[name].expand(values[LOGIT].shape)
            is_own = name.is_block and 0 not in value.stride()
            if statistic.overwrites and (not is_own or self._has_aliases):
                value = value.clone()
            read.append(value.to(self.head.logit_dtype))
        return read

    def results(self) -> list[Tensor]:
        """Return the results of `compute_statistics` for the kept rows."""
        by_statistic = all_statistics.results(self._whole, self.indices)
        results = [result for each in self.program.statistics for result in by_statistic[each]]
        return results if self._normalizer is None else [*results, self._of_tiles]


def _kept_indices(head: Head, kept: KeptRows) -> list[Tensor]:
    """Return the operands, with only the kept rows of those that are indices."""
    operands = list(head.operands)
    for statistic in head.program.indexed:
        operands[statistic.index.position] = kept.select(statistic.index_of(head.operands))
    return operands


def compute_gradients(
    grads: Sequence[Tensor | None],
    results: Sequence[Tensor],
    input: Tensor,
    head: Head,
    wanted: Wanted,
) -> Gradients:
    """Return exact gradients, from logits that are computed again tile by tile.

    Args:
        grads: the gradient of each result, float64; None for a result without one.
        results: what `compute_statistics` returned.
        input, head: as in the forward.
        wanted: which gradients are asked for.
    """
    program = head.program
    kept = KeptRows(input.shape[0], head)
    indices = all_statistics.prepared_indices(program, _kept_indices(head, kept), head.vocabulary)
    kept_results = [kept.select(result) for result in results]
    kept_grads = [None if grad is None else kept.select(grad) for grad in grads]
    by_value = all_statistics.cotangents(
        program, kept_grads, kept_results, indices, head.logit_dtype
    )
    # Statistics without a gradient are dropped, with the heads that only they read.
    program = program.with_gradient([grad is not None for grad in grads])
    skipped = _massless_tiles(head, program, by_value, kept_results[-1], kept.count)
    head = dataclasses.replace(head, program=program)
    only = by_value.get(LOGIT) if program.is_plain else None
    overwrite = only is not None and not only.reads_values
    backward = None if program.is_plain else derivative(program, head.operands)

    factors = head.factors(input)
    if program.statistics and selected.applies(head, indices):
        index, grad = by_value[LOGIT].at_indices()
        gradients = Selected(head, factors[LOGIT], kept, index).gradients(
            grad, **_wanted(LOGIT, wanted)
        )
        return Gradients(*gradients, _or_zeros({}, head, wanted))
    rows = rows_of_block(head, list(factors.values()), kept.count, backward=True)
    projections = {
        name: ProjectionGradient(head, each, kept, rows, **_wanted(name, wanted))
        for name, each in factors.items()
    }
    d_operands = {
        name: OperandGradient(name, head.operands[name.position], kept)
        for name, kind in program.operands.items()
        if wanted.operands[name.position] and not kind.is_product
    }

    for number, tile in head.tiles():
        if skipped[number]:
            for projection in projections.values():
                projection.skip(tile)
            continue
        for projection in projections.values():
            projection.begin(tile)
        for block in row_blocks(kept.count, rows):
            values = {} if backward is None else kept.operands(head, block, tile)
            for name, projection in projections.items():
                values[name] = projection.logits(block)
            logits = values[LOGIT]
            if backward is None:
                dz = by_value[LOGIT].of_block(values, block, tile, overwrite=overwrite)
                projections[LOGIT].add(dz, block)
                continue
            _run_derivative(values, program, backward, by_value, block, tile)
            for name, gradient in d_operands.items():
                if name in backward.gradients:
                    gradient.add(values[backward.gradients[name]], logits, block, tile)
            for name, projection in projections.items():
                if projection.is_wanted:
                    projection.add(_gradient(name, values, backward, logits), block)
        for projection in projections.values():
            projection.end()

    by_position = {name.position: gradient.result() for name, gradient in d_operands.items()}
    for name in program.products:
        by_position |= zip(name.positions, projections[name].results(), strict=False)
    return Gradients(*projections[LOGIT].results(), _or_zeros(by_position, head, wanted))


def _or_zeros(
    by_position: Mapping[int, Tensor | None], head: Head, wanted: Wanted
) -> list[Tensor | None]:
    """Return the gradient of each operand, zeros for one that is asked for and has none."""
    return [
        torch.zeros_like(operand) if is_wanted and at not in by_position else by_position.get(at)
        for at, (operand, is_wanted) in enumerate(zip(head.operands, wanted.operands, strict=True))
    ]


def _wanted(name: Name, wanted: Wanted) -> dict[str, bool]:
    """Return which gradients of a matrix product's factors are asked for."""
    if name == LOGIT:
        asked = [wanted.input, wanted.linear_weight, wanted.linear_bias]
    else:
        asked = [wanted.operands[position] for position in name.positions]
    names = ("wants_input", "wants_weight", "wants_bias")
    return {**dict.fromkeys(names, False), **dict(zip(names, asked, strict=False))}


def _run_derivative(
    values: dict[Name, Tensor],
    program: Program,
    backward: Derivative,
    by_value: dict[Name, Cotangent],
    block: slice,
    tile: slice,
) -> None:
    """Add the gradients of a block's logits and operands to `values`."""
    logits = values[LOGIT]
    backward.forward.run(values)
    made = {
        root: values[name].expand(logits.shape)
        if isinstance(name, Name)
        else logits.new_full(logits.shape, name)
        for root, name in zip(program.roots, backward.roots, strict=True)
    }
    made[LOGIT] = logits
    for number, root in enumerate(program.roots):
        if root in by_value:
            values[Name(f"g{number}")] = by_value[root].of_block(made, block, tile, overwrite=False)
        else:
            values[Name(f"g{number}")] = logits.new_zeros(logits.shape)
    backward.backward.run(values)


def _gradient(
    name: Name, values: dict[Name, Tensor], backward: Derivative, logits: Tensor
) -> Tensor:
    """Return the gradient of a value as large as the logits, which `_run_derivative` computed."""
    if name not in backward.gradients:
        return logits.new_zeros(logits.shape)
    gradient = values[backward.gradients[name]]
    return (
        gradient if gradient.shape == logits.shape else gradient.expand(logits.shape).contiguous()
    )


def _massless_tiles(
    head: Head, program: Program, by_value: dict[Name, Cotangent], tile_lse: Tensor, rows: int
) -> list[bool]:
    """Return which tiles have a gradient that is exactly zero: no row's index lies in them, and
    every probability is below half the smallest number of the logit dtype, where exp rounds to
    zero.

    Args:
        head: the head, with the program of the forward.
        program: the part of that program that has a gradient.
        by_value: the cotangents of its values.
        tile_lse: the logsumexp of each tile, which the forward returned.
        rows: the number of rows that are computed.
    """
    tiles = tile_count(head.vocabulary)
    if rows == 0 or not by_value:
        return [True] * tiles
    normalizer = head.program.normalizer
    only = by_value.get(LOGIT) if program.is_plain else None
    if only is None or only.lse is None or normalizer is None or normalizer.value != LOGIT:
        return [False] * tiles
    if only.grad_sum is not None or only.reads_values:
        return [False] * tiles
    smallest = torch.finfo(head.logit_dtype).smallest_normal * torch.finfo(head.logit_dtype).eps
    underflow = math.log(smallest) - math.log(2)
    # The comparison is False for nan, so that such a tile is computed.
    massless = (tile_lse - only.lse.unsqueeze(1)).amax(0) < underflow
    if only.has_indices:
        index = only.index[only.index != NOWHERE]
        massless[index.div(TILE, rounding_mode="floor")] = False
    return massless.tolist()
