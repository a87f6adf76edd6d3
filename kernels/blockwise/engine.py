"""Reductions of logits in blocks of rows and vocabulary, with ordinary tensor operations.

The vocabulary is cut into tiles of `TILE` entries and is the outermost loop, in the forward and in
the backward; rows are cut only when a tile's logits for all of them would not fit the workspace.
At any time one block of logits exists, with what the program makes of it. Row statistics are
float64 vectors: the loss of a confident row is the small difference of two large numbers, and
float32 would round it more than the stored logits' log_softmax does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.product import WideProduct, accumulation_dtype
from cce_inductor.kernels.program.derivative import Derivative, derivative
from cce_inductor.kernels.program.schedule import schedule
from cce_inductor.kernels.program.text import INDEXED, WEIGHTED, Name, Program, Reduction, position
from cce_inductor.kernels.statistics.reductions import (
    NOWHERE,
    Block,
    Cotangent,
    LogSumExp,
    accumulators,
    cotangents,
    index_of,
    is_valid_index,
)

TILE = 1024
"""Vocabulary entries per tile: wide enough for products to run at full speed."""

Z, COLUMN = Name("z"), Name("j")


def tile_count(vocabulary: int) -> int:
    """The number of tiles that cover `vocabulary` entries; the last may be narrower."""
    return -(-vocabulary // TILE)


@dataclasses.dataclass(frozen=True)
class Head:
    """What makes a logit, and what is made of it.

    Attributes:
        linear_weight: [vocabulary, hidden], any floating dtype and strides.
        linear_bias: [vocabulary] or None.
        operands: what `program` names: [rows] or an index's [rows, k], [vocabulary], [], or
            [rows, vocabulary].
        program: what is computed.
        skip_ignored: whether rows all of whose class indices are ignored are left out: neither
            read nor computed, with zeros for every result.
        compute_dtype: the dtype of the matrix products' operands, an `operand_dtype`.
        workspace_bytes: bound on the block of logits and its companions; at least one row of one
            tile is always used.
    """

    linear_weight: Tensor
    linear_bias: Tensor | None
    operands: Sequence[Tensor]
    program: Program
    skip_ignored: bool
    compute_dtype: torch.dtype
    workspace_bytes: int

    @property
    def logit_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.compute_dtype)

    def tiles(self) -> Iterator[tuple[int, slice]]:
        """Every tile's number and its range of the vocabulary."""
        vocabulary = self.linear_weight.shape[0]
        for number, start in enumerate(range(0, vocabulary, TILE)):
            yield number, slice(start, min(start + TILE, vocabulary))

    def weight_of(self, tile: slice) -> Tensor:
        """[tile, hidden] in the compute dtype; a copy only if the weight has another one."""
        return self.linear_weight[tile].to(self.compute_dtype)

    def block_operands(self, kept: KeptRows, block: slice, tile: slice) -> dict[Name, Tensor]:
        """The operands as they broadcast against a block of logits."""
        device = self.linear_weight.device
        values: dict[Name, Tensor] = {}
        if self.program.reads_columns:
            values[COLUMN] = torch.arange(tile.start, tile.stop, device=device).unsqueeze(0)
        for name, at in self.program.operands.items():
            operand = self.operands[at]
            if name[0] == "r":
                operand = kept.select(operand)[block].unsqueeze(1)
            elif name[0] == "c":
                operand = operand[tile].unsqueeze(0)
            elif name[0] == "b":
                operand = kept.select_block(operand, block, tile)
            if operand.is_floating_point():
                operand = operand.to(self.logit_dtype)
            values[name] = operand.to(device)
        return values


class KeptRows:
    """The rows that are computed: all, or those with a class index that is not ignored."""

    def __init__(self, tokens: int, head: Head):
        self.rows: Tensor | None = None
        self.tokens = tokens
        if head.skip_ignored:
            keep = torch.zeros(tokens, dtype=torch.bool, device=head.linear_weight.device)
            for reduction in head.program.reductions:
                if reduction.kind == "target":
                    _, index, ignore_index = reduction.args
                    keep |= head.operands[position(index)].to(torch.int64) != ignore_index
            if not bool(keep.all()):
                self.rows = keep.nonzero().squeeze(1)
        self.device = head.linear_weight.device
        self.count = tokens if self.rows is None else self.rows.shape[0]

    def select(self, tensor: Tensor) -> Tensor:
        """Those rows of `tensor`, which is itself when all are kept."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    def select_block(self, tensor: Tensor, block: slice, tile: slice) -> Tensor:
        """A block of a [rows, vocabulary] tensor."""
        rows = tensor[block] if self.rows is None else tensor[self.rows[block]]
        return rows[:, tile]

    def restore(self, kept: Tensor) -> Tensor:
        """The opposite of `select`, with zeros in the other rows."""
        if self.rows is None:
            return kept
        full = kept.new_zeros(self.tokens, *kept.shape[1:])
        return full.index_copy_(0, self.rows, kept)


class Workspace:
    """Buffers for one block of rows and one tile, allocated once and handed out as views.

    Attributes:
        rows: rows of a block: what `Head.workspace_bytes` holds, at least 1.
        product: the matrix product, with its scratch.
    """

    def __init__(self, head: Head, rows: int, hidden: int, device: torch.device, *, backward: bool):
        width = min(TILE, head.linear_weight.shape[0])
        longest = max(width, hidden) if backward else width
        with_operand = backward and head.compute_dtype != head.logit_dtype
        program = head.program
        blocks = 1
        if not program.is_plain:
            blocks += (
                derivative(program, head.operands).peak if backward else schedule(program).peak()
            )
        if any(reduction.kind in WEIGHTED for reduction in program.reductions):
            blocks += 3 if backward else 2
        row_bytes = (
            width * head.logit_dtype.itemsize * blocks
            + width * head.compute_dtype.itemsize * with_operand
            + longest * WideProduct.scratch_itemsize(head.compute_dtype)
        )
        self.rows = max(1, min(rows, head.workspace_bytes // max(1, row_bytes)))

        def buffer(dtype: torch.dtype) -> Tensor:
            return torch.empty(self.rows * width, dtype=dtype, device=device)

        self._logits = buffer(head.logit_dtype)
        self._operand = buffer(head.compute_dtype) if with_operand else None
        capacity = max(self.rows * longest, hidden * width if backward else 0)
        self.product = WideProduct(head.compute_dtype, capacity, device)

    def row_blocks(self, rows: int) -> Iterator[slice]:
        """Ranges that cover `rows` rows, each within the workspace."""
        for start in range(0, rows, self.rows):
            yield slice(start, min(start + self.rows, rows))

    def logits(self, head: Head, input: Tensor, weight: Tensor, tile: slice) -> Tensor:
        """The block's logits, [rows, tile] in the logit dtype.

        They are rounded to the compute dtype once, after the bias, as `linear` rounds them. With
        a bias of another dtype they are not rounded at all.
        """
        rows, width = input.shape[0], weight.shape[0]
        logits = self._logits[: rows * width].view(rows, width)
        bias = None if head.linear_bias is None else head.linear_bias[tile]
        if bias is None or bias.dtype == head.compute_dtype:
            self.product.rounded(logits, input, weight.t(), bias)
        else:
            self.product(logits, input, weight.t(), beta=0)
            logits.add_(bias)
        return logits

    def operand(self, dz: Tensor) -> Tensor:
        """`dz` in the compute dtype."""
        if self._operand is None:
            return dz
        return self._operand[: dz.numel()].view(dz.shape).copy_(dz)


def check_index(reduction: Reduction, index: Tensor, vocabulary: int) -> None:
    """Raises what the replaced code does on CPU for an index out of bounds: the IndexError of
    `torch.nn.functional.cross_entropy` or of indexing, the RuntimeError of `torch.gather`.

    On other devices the check is an assertion on the device, as there, which waits for nothing.
    """
    valid = is_valid_index(reduction, index, vocabulary)
    if index.device.type != "cpu":
        torch._assert_async(valid.all())
    elif not bool(valid.all()):
        first = index[valid.logical_not()].flatten()[0].item()
        if reduction.kind == "target":
            raise IndexError(f"Target {first} is out of bounds.")
        error = IndexError if reduction.kind == "index" else RuntimeError
        raise error(f"index {first} is out of bounds for dimension 1 with size {vocabulary}")


def reduce(input: Tensor, head: Head) -> list[Tensor]:
    """What the program says about each row.

    Args:
        input: [rows, hidden], any floating dtype and strides.
        head: the projection, and what is computed from its result.

    Returns:
        The results of the program's reductions, in order: float64 [rows] or [rows, k], int64 for
        indices. After them, if the program has a logsumexp, the logsumexp of each tile of the
        first one, [rows, tiles] in the logit dtype.

    Raises:
        IndexError, RuntimeError: an index outside the vocabulary (CPU).
    """
    vocabulary, hidden = head.linear_weight.shape
    program, device = head.program, input.device
    kept = KeptRows(input.shape[0], head)
    kept_input = kept.select(input).to(head.compute_dtype)
    workspace = Workspace(head, kept.count, hidden, device, backward=False)
    indices = _indices(head, kept, check=True)

    reducing = accumulators(
        program, indices, kept.count, tile_count(vocabulary), device, head.logit_dtype
    )
    normalizers = {id(each): each for each in reducing if isinstance(each, LogSumExp)}

    forward = schedule(program)
    for number, tile in head.tiles():
        weight = head.weight_of(tile)
        for rows in workspace.row_blocks(kept.count):
            values = head.block_operands(kept, rows, tile)
            values[Z] = logits = workspace.logits(head, kept_input[rows], weight, tile)
            forward.run(values)
            at = Block(rows, tile, number)
            for reduction, accumulator in zip(program.reductions, reducing, strict=True):
                if id(accumulator) not in normalizers:
                    found = [values[name].expand(logits.shape) for name in reduction.values]
                    accumulator.add(at, *found)
            for normalizer in normalizers.values():  # last, as they write over the values
                value = values[normalizer.name].expand(logits.shape)
                normalizer.add(at, _own_memory(value, normalizer.name, head))

    results = [result for accumulator in reducing for result in accumulator.results()]
    results += [normalizer.tiles.to(head.logit_dtype) for normalizer in normalizers.values()][:1]
    return [kept.restore(result) for result in results]


def _own_memory(value: Tensor, name: Name, head: Head) -> Tensor:
    """A block of the logit dtype that may be written over."""
    if schedule(head.program).has_aliases or name[0] not in "zt" or 0 in value.stride():
        value = value.clone()
    return value.to(head.logit_dtype)


def _indices(head: Head, kept: KeptRows, *, check: bool) -> dict[str, Tensor]:
    """For each reduction with an index, by its text, the indices of the kept rows."""
    indices = {}
    for reduction in head.program.reductions:
        if reduction.kind in INDEXED:
            index = kept.select(head.operands[position(reduction.args[1])]).to(torch.int64)
            if check:
                check_index(reduction, index, head.linear_weight.shape[0])
            indices[str(reduction)] = index_of(reduction, index, head.linear_weight.shape[0])
    return indices


@dataclasses.dataclass
class Wanted:
    """Which gradients are asked for; nothing is computed for the others."""

    input: bool
    linear_weight: bool
    linear_bias: bool
    operands: Sequence[bool]


@dataclasses.dataclass
class Gradients:
    """What was asked for, with the shapes and dtypes of what they belong to; else None."""

    input: Tensor | None
    linear_weight: Tensor | None
    linear_bias: Tensor | None
    operands: list[Tensor | None]


def reduce_backward(
    grads: Sequence[Tensor | None],
    results: Sequence[Tensor],
    input: Tensor,
    head: Head,
    wanted: Wanted,
) -> Gradients:
    """Exact gradients, from logits that are computed again tile by tile.

    Args:
        grads: of the results that have one, float64; None for the others.
        results: what `reduce` returned.
        input, head: as in the forward.
        wanted: which gradients are asked for.
    """
    hidden = input.shape[1]
    vocabulary = head.linear_weight.shape[0]
    program, device = head.program, input.device
    kept = KeptRows(input.shape[0], head)
    kept_input = kept.select(input).to(head.compute_dtype)
    workspace = Workspace(head, kept.count, hidden, device, backward=True)
    indices = _indices(head, kept, check=False)
    kept_results = [kept.select(result) for result in results]
    kept_grads = [None if grad is None else kept.select(grad) for grad in grads]
    by_value = cotangents(program, kept_grads, kept_results, indices, head.logit_dtype)
    skipped = _massless_tiles(head, by_value, kept_results[-1], kept.count)
    only = by_value.get(Z) if program.is_plain else None
    overwrite = only is not None and not only.reads_values

    like_logit = {"dtype": head.logit_dtype, "device": device}
    d_weight = d_bias = None
    if wanted.input:
        input_gradient = InputGradient(kept_input, head, workspace)
    if wanted.linear_weight:
        d_weight = head.linear_weight.new_empty(head.linear_weight.shape)
        weight_gradient = WeightGradient(kept_input, d_weight, head, workspace)
    if wanted.linear_bias:
        d_bias = torch.zeros(vocabulary, **like_logit)
    d_operands = {
        name: OperandGradient(name, head.operands[at], kept)
        for name, at in program.operands.items()
        if wanted.operands[at]
    }

    for number, tile in head.tiles():
        if skipped[number]:
            if d_weight is not None:
                d_weight[tile] = 0
            continue
        weight = head.weight_of(tile)
        for block in workspace.row_blocks(kept.count):
            logits = workspace.logits(head, kept_input[block], weight, tile)
            if program.is_plain:
                values = {Z: logits}
                dz = by_value[Z].of_block(values, block, tile, overwrite=overwrite)
            else:
                values = head.block_operands(kept, block, tile)
                values[Z] = logits
                backward = derivative(program, head.operands)
                dz = _through_program(values, program, backward, by_value, block, tile)
                for name, gradient in d_operands.items():
                    if name in backward.gradients:
                        gradient.add(values[backward.gradients[name]], logits, block, tile)

            if d_bias is not None:
                d_bias[tile] += dz.sum(0)
            operand = workspace.operand(dz)
            if wanted.input:
                input_gradient.add(operand, weight, block)
            if d_weight is not None:
                weight_gradient.add(operand, block)
        if wanted.input:
            input_gradient.end_tile()
        if d_weight is not None:
            weight_gradient.write(tile)

    d_input = None
    if wanted.input:
        d_input = kept.restore(input_gradient.total().to(input.dtype))
    if d_bias is not None:
        assert head.linear_bias is not None, "a gradient for a bias that is not there"
        d_bias = d_bias.to(head.linear_bias.dtype)
    by_position = {position(name): g.result() for name, g in d_operands.items()}
    return Gradients(
        d_input, d_weight, d_bias, [by_position.get(i) for i in range(len(head.operands))]
    )


def _through_program(
    values: dict[Name, Tensor],
    program: Program,
    backward: Derivative,
    by_value: dict[Name, Cotangent],
    block: slice,
    tile: slice,
) -> Tensor:
    """The gradient of a block of logits; that of each operand is added to `values`."""
    shape = values[Z].shape
    backward.forward.run(values)
    made = {
        root: values[name].expand(shape)
        if isinstance(name, Name)
        else values[Z].new_full(shape, name)
        for root, name in zip(program.roots, backward.roots, strict=True)
    }
    made[Z] = values[Z]
    for number, root in enumerate(program.roots):
        if root in by_value:
            values[Name(f"g{number}")] = by_value[root].of_block(made, block, tile, overwrite=False)
        else:
            values[Name(f"g{number}")] = values[Z].new_zeros(shape)
    backward.backward.run(values)
    if Z not in backward.gradients:
        return values[Z].new_zeros(shape)
    dz = values[backward.gradients[Z]]
    return dz if dz.shape == shape else dz.expand(shape).contiguous()


class OperandGradient:
    """The gradient of an operand of the program, summed over what it was broadcast to."""

    def __init__(self, name: Name, operand: Tensor, kept: KeptRows):
        self.name, self.operand, self.kept = name, operand, kept
        shape = (kept.count,) if name[0] == "r" else operand.shape
        self._sum = torch.zeros(shape, dtype=torch.float64, device=kept.device)

    def add(self, gradient: Tensor, like: Tensor, block: slice, tile: slice) -> None:
        gradient = gradient.expand(like.shape)
        if self.name[0] == "r":
            self._sum[block] += gradient.sum(1)
        elif self.name[0] == "c":
            self._sum[tile] += gradient.sum(0)
        else:
            self._sum += gradient.sum(1).sum(0, dtype=torch.float64)

    def result(self) -> Tensor:
        total = self.kept.restore(self._sum) if self.name[0] == "r" else self._sum
        return total.to(dtype=self.operand.dtype, device=self.operand.device)


def _massless_tiles(
    head: Head, by_value: dict[Name, Cotangent], tile_lse: Tensor, rows: int
) -> list[bool]:
    """Which tiles have a gradient that is exactly zero: no row's index, and every probability
    below half the smallest number of the logit dtype, where exp rounds to zero."""
    tiles = tile_count(head.linear_weight.shape[0])
    if rows == 0 or not by_value:
        return [True] * tiles
    only = by_value.get(Z) if head.program.is_plain else None
    if only is None or only.lse is None:
        return [False] * tiles
    if only.grad_sum is not None or only.reads_values:
        return [False] * tiles
    smallest = torch.finfo(head.logit_dtype).smallest_normal * torch.finfo(head.logit_dtype).eps
    underflow = math.log(smallest) - math.log(2)
    # False for nan, as it must be.
    massless = (tile_lse - only.lse.unsqueeze(1)).amax(0) < underflow
    if only.grad_at:
        index = only.index[only.index != NOWHERE]
        massless[index.div(TILE, rounding_mode="floor")] = False
    return massless.tolist()


class InputGradient:
    """``dz @ weight`` summed over the tiles, in groups of some first: of all tiles one after
    another, the sum would lose more in float32 than the one product of stored logits does."""

    TILES = 16

    def __init__(self, input: Tensor, head: Head, workspace: Workspace):
        self._total = torch.zeros(input.shape, dtype=head.logit_dtype, device=input.device)
        self._group = torch.empty_like(self._total)
        self._tiles = 0
        self.product = workspace.product

    def add(self, dz: Tensor, weight: Tensor, block: slice) -> None:
        self.product(self._group[block], dz, weight, beta=int(self._tiles > 0))

    def end_tile(self) -> None:
        self._tiles += 1
        if self._tiles == self.TILES:
            self.total()

    def total(self) -> Tensor:
        """The sum of all tiles so far."""
        if self._tiles:
            self._total += self._group
            self._tiles = 0
        return self._total


class WeightGradient:
    """``dz.T @ input`` of one tile after another, summed over the row blocks, rounded once.

    The product is made as ``input.T @ dz``, [hidden, tile]: the input is transposed in memory
    once, where ``dz.T`` would be for each block, which costs low precision a third of its speed.
    """

    def __init__(self, input: Tensor, d_weight: Tensor, head: Head, workspace: Workspace):
        self.d_weight = d_weight
        self.input_t = input.t()
        if not workspace.product.exact:
            self.input_t = self.input_t.contiguous()
        # One product needs no wider sum than the gradient it is rounded to.
        self.one_product = input.shape[0] <= workspace.rows and d_weight.dtype == head.compute_dtype
        dtype = head.compute_dtype if self.one_product else head.logit_dtype
        width = min(TILE, d_weight.shape[0])
        self._sum = torch.empty(input.shape[1] * width, dtype=dtype, device=input.device)
        self.product = workspace.product

    def add(self, dz: Tensor, block: slice) -> None:
        hidden, width = self.input_t.shape[0], dz.shape[1]
        total = self._sum[: hidden * width].view(hidden, width)
        if self.one_product:
            torch.mm(self.input_t, dz, out=total)
        else:
            self.product(total, self.input_t[:, block], dz, beta=int(block.start > 0))

    def write(self, tile: slice) -> None:
        """Moves the sum to the tile's rows of the gradient."""
        out = self.d_weight[tile]
        out.copy_(self._sum[: out.numel()].view(out.shape[1], out.shape[0]).t())
