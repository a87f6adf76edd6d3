"""Statistics of logits in blocks of rows and vocabulary, with ordinary tensor operations.

The vocabulary is cut into tiles of `Head.tile` entries and is the outermost loop, in the forward
and in the backward; rows are cut when a tile's logits for all of them would not fit the workspace.
Each of a few lanes computes tiles of its own, and has one block of logits at a time, with the
blocks that the program computes from it. Row statistics are float64 vectors: the loss of a
confident row is the small difference of two large numbers, and float32 would round it more than
log_softmax of stored logits does.

With `Head.sample_below`, the forward divides the vocabulary in the order of its probabilities at
the mean hidden state, and the backward computes a sample of the pairs of a row and a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from cce_inductor.kernels import all_statistics, sampling
from cce_inductor.kernels.all_statistics import Indices
from cce_inductor.kernels.blockwise import host, lanes, selected
from cce_inductor.kernels.blockwise.backward import (
    BackwardLane,
    SharedGradients,
    or_zeros,
    wanted_of,
)
from cce_inductor.kernels.blockwise.centers import vocabulary_order
from cce_inductor.kernels.blockwise.control_variate import ControlVariate
from cce_inductor.kernels.blockwise.forward import ForwardLane, Statistics
from cce_inductor.kernels.blockwise.masses import Masses
from cce_inductor.kernels.blockwise.product import operand_dtype
from cce_inductor.kernels.blockwise.projection import Projection
from cce_inductor.kernels.blockwise.pullback import Pullback
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.selected import Selected
from cce_inductor.kernels.blockwise.visits import EveryRow, Sample
from cce_inductor.kernels.blockwise.workspace import block_rows
from cce_inductor.kernels.head import Gradients, Head, Wanted
from cce_inductor.kernels.names import LOGIT
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.statistics.cotangent import placed
from cce_inductor.kernels.statistics.indexed import NOWHERE, Indexed
from cce_inductor.kernels.stored import stored_dtype, stored_shape
from cce_inductor.torch_internals import cuda_graphs


def check_index(statistic: Indexed, index: Tensor, vocabulary: int) -> None:
    """Raise the replaced code's error for an index out of bounds on the CPU.

    On other devices the check is an assertion on the device, as in the replaced code. The host
    does not wait for it.
    """
    valid = statistic.is_valid(index, vocabulary)
    if host.runs_ahead(index.device):
        torch._assert_async(valid.all())
    elif not bool(valid.all()):
        raise statistic.error(int(index[valid.logical_not()].flatten()[0]), vocabulary)


def compute_statistics(input: Tensor, head: Head, stored: Tensor | None = None) -> list[Tensor]:
    """Return the statistics of each row.

    Args:
        input: [rows, hidden], any floating dtype and strides.
        head: the projection, and what is computed from its result.
        stored: memory for the logits of `Head.stored_tiles`, as `saved_tensors` says; None for
            new memory.

    Returns:
        The results of the program's statistics, in order: float64 [rows] or [rows, k], int64 for
        indices. They are followed by what the backward needs beside them (`saved_tensors`).

    Raises:
        IndexError, RuntimeError: an index outside the vocabulary (CPU).
    """
    vocabulary, program = head.vocabulary, head.program
    kept = KeptRows(input.shape[0], head)
    kept_operands = _kept_indices(head, kept)
    for statistic in program.indexed:
        index = kept.once(statistic.index_of(kept_operands).to(torch.int64), 0)
        check_index(statistic, index, vocabulary)
    indices = _prepared(head, kept, kept_operands)

    if selected.applies(head, indices):
        factors = head.factors(input)[LOGIT]
        by_statistic = {
            each: (Selected(head, factors, kept, index).logits(),)
            for each, index in indices.items()
        }
        by_statistic = all_statistics.results(by_statistic, indices)
        return [kept.restore(by_statistic[each][0]) for each in program.statistics]
    order = None
    if sampling.applies(head):
        order = vocabulary_order(input, head, kept)
        head = dataclasses.replace(head, order=order)
        place = order.argsort()
        indices = {each: placed(index, place) for each, index in indices.items()}
    if head.stored_tiles and stored is None:
        stored = input.new_empty(stored_shape(head, input.shape[0]), dtype=stored_dtype(head))
    results = _statistics(input, head, kept, indices, stored)
    saved = [each for each in (order, stored) if each is not None]
    return [*(kept.restore(result) for result in results), *saved]


def _statistics(
    input: Tensor, head: Head, kept: KeptRows, indices: Indices, stored: Tensor | None
) -> list[Tensor]:
    """Return the results for the kept rows, and store the logits of the first tiles in `stored`.
    The indices are places in the head's order."""
    every = head.factors(input)
    shared = Statistics(head, indices, kept)
    projections = {
        name: Projection(head, each, kept, stored if name == LOGIT else None)
        for name, each in every.items()
    }
    count = lanes.lane_count(kept.device, head.groups, 1, head.workspace_bytes)
    rows = block_rows(head, list(every.values()), kept.count, count, backward=False)
    lanes.run([ForwardLane(shared, projections, rows) for _ in range(count)], head.groups)
    return shared.results()


def _kept_indices(head: Head, kept: KeptRows) -> list[Tensor]:
    """Return the operands, with only the computed rows of those that are indices."""
    operands = list(head.operands)
    for statistic in head.program.indexed:
        operands[statistic.index.position] = kept.select(statistic.index_of(head.operands))
    return operands


def _prepared(head: Head, kept: KeptRows, kept_operands: Sequence[Tensor]) -> Indices:
    """Return the indices of the computed rows, given what `_kept_indices` returns."""
    indices = all_statistics.prepared_indices(head.program, kept_operands, head.vocabulary)
    return {each: kept.once(index, NOWHERE) for each, index in indices.items()}


def compute_gradients(
    grads: Sequence[Tensor | None],
    results: Sequence[Tensor],
    input: Tensor,
    head: Head,
    wanted: Wanted,
    d_weight: Tensor | None = None,
) -> Gradients:
    """Return the gradients, from logits that are computed again tile by tile. They are exact, or
    unbiased if `sampling.applies`.

    Args:
        grads: the gradient of each result, float64; None for a result without one.
        results: what `compute_statistics` returned.
        input, head: as in the forward.
        wanted: which gradients are asked for.
        d_weight: [vocabulary, hidden] in the dtype of the logits, to which the gradient of the
            weight is added; None for a new tensor. Only if the gradient has a softmax and is not
            sampled.
    """
    kept = KeptRows(input.shape[0], head)
    order = stored = None
    if head.stored_tiles:
        *results, stored = results
    if sampling.applies(head):
        *results, order = results
    kept_results = [kept.select(result) for result in results]
    kept_grads = [None if grad is None else kept.once(kept.select(grad), 0.0) for grad in grads]
    indices = _prepared(head, kept, _kept_indices(head, kept))
    cotangents = all_statistics.cotangents(
        head.program, kept_grads, kept_results, indices, head.logit_dtype, head.exp
    )
    # Statistics without a gradient are dropped, with the heads that only they read.
    program = head.program.with_gradient([grad is not None for grad in grads])
    pulled = dataclasses.replace(head, program=program)
    if program.statistics and selected.applies(pulled, indices):
        index, grad = cotangents[LOGIT].at_indices()
        at_indices = Selected(pulled, head.factors(input)[LOGIT], kept, index).gradients(
            grad, **wanted_of(LOGIT, wanted)
        )
        return Gradients(*at_indices, or_zeros({}, head, wanted))
    pullback = Pullback.of(program, head.operands, cotangents)
    if order is None:
        every = _every_row(head, kept, pullback, kept_results[-1])
    else:
        ordered = dataclasses.replace(pulled, order=order)
        sample = _sample(ordered, kept, pullback, head.program, kept_results, wanted)
        if sample is not None:
            variate = ControlVariate(input, ordered, kept, sample, cotangents)
            return _computed(SharedGradients(input, ordered, kept, sample, variate, wanted))
        every = EveryRow(kept.count, pullback)
    return _computed(SharedGradients(input, pulled, kept, every, None, wanted, stored, d_weight))


def _every_row(head: Head, kept: KeptRows, pullback: Pullback, tile_lse: Tensor) -> EveryRow:
    """Return all rows of every tile that has a gradient.

    Args:
        head: the head, with the program of the forward.
        kept: the rows that are computed.
        pullback: the gradient.
        tile_lse: the logsumexp of each tile, which the forward returned, [rows, tiles].
    """
    program, cotangents = pullback.program, pullback.cotangents
    if kept.count == 0 or not cotangents:
        return EveryRow(0, pullback)
    masses = Masses.of(head, program, cotangents, tile_lse)
    if masses is None:
        return EveryRow(kept.count, pullback)
    is_rounded = operand_dtype(head.compute_dtype) != head.logit_dtype
    heavy = masses.heavy_pairs(head.linear_weight) if is_rounded else None
    return EveryRow(kept.count, pullback, masses.massless_tiles(), heavy)


def _sample(
    head: Head,
    kept: KeptRows,
    pullback: Pullback,
    program: Program,
    results: Sequence[Tensor],
    wanted: Wanted,
) -> Sample | None:
    """Return the pairs that are computed; None if all are, as in a CUDA graph, for which the host
    must not ask how many pairs there are.

    Args:
        head: the head, with its order.
        kept: the rows that are computed.
        pullback: the gradient.
        program: the program of the forward.
        results: what the forward returned, without the order.
        wanted: which gradients are asked for.
    """
    names = [name for name in pullback.program.operands if wanted.operands[name.position]]
    has_pairs = kept.count > 0 and bool(pullback.program.statistics)
    if not has_pairs or cuda_graphs.is_recording(kept.device):
        return None
    why_not = sampling.reason_against(
        pullback.program, head.vocabulary, head.operands, kept.device.type, names
    )
    if why_not is not None:
        return None
    places = {statistic: place.start for place, statistic in program.places}
    lse = {each.value: results[places[each]] for each in program.normalizers}
    saved = results[len(results) - len(lse) :]
    tile_lse = dict(zip(lse, saved, strict=True))
    return Sample.draw(head, kept, pullback, lse, tile_lse)


def _computed(shared: SharedGradients) -> Gradients:
    """Compute all tiles, and return the gradients."""
    head, kept = shared.head, shared.kept
    every = [each.factors for each in shared.projections.values()]
    hidden = every[0].linear_weight.shape[1]
    lane_bytes = 2 * kept.count * hidden * head.logit_dtype.itemsize
    count = lanes.lane_count(kept.device, head.groups, lane_bytes, head.workspace_bytes)
    rows = block_rows(head, every, kept.count, count, backward=True)
    lanes.run([BackwardLane(shared, rows) for _ in range(count)], head.groups)
    return shared.results()
