"""Cut Cross-Entropy in blocks of rows and vocabulary, with ordinary tensor operations.

The vocabulary is cut into tiles of `TILE` entries and is the outermost loop, in the forward and in
the backward; rows are cut only when a tile's logits for all of them would not fit the workspace.
At any time one block of logits exists, in a workspace that every block reuses. Row statistics are
float64 [tokens] vectors: the loss of a confident row is the small difference of two large numbers,
and float32 would round it more than the stored logits' log_softmax does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .modification import Modification
from .product import WideProduct, accumulation_dtype

TILE = 1024
"""Vocabulary entries per tile: wide enough for products to run at full speed."""


def tile_count(vocabulary: int) -> int:
    """The number of tiles that cover `vocabulary` entries; the last may be narrower."""
    return -(-vocabulary // TILE)


@dataclasses.dataclass(frozen=True)
class Head:
    """What makes a logit: the projection's parameters and the function applied after it.

    Attributes:
        linear_weight: [vocabulary, hidden], any floating dtype and strides.
        linear_bias: [vocabulary] or None.
        logit_sum_weight: [vocabulary], None for all ones; weights of `logit_sum`.
        with_logit_sum: whether `logit_sum` is wanted at all.
        ignore_index: rows with this target are neither read nor computed.
        modification: applied to each logit.
        compute_dtype: the dtype of the matrix products' operands, an `operand_dtype`.
        workspace_bytes: bound on the block of logits and its companions; at least one row of one
            tile is always used.
    """

    linear_weight: Tensor
    linear_bias: Tensor | None
    logit_sum_weight: Tensor | None
    with_logit_sum: bool
    ignore_index: int
    modification: Modification
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


class Workspace:
    """Buffers for one block of rows and one tile, allocated once and handed out as views.

    Attributes:
        rows: rows of a block: what `Head.workspace_bytes` holds, at least 1.
        product: the matrix product, with its scratch.
    """

    def __init__(self, head: Head, rows: int, hidden: int, device: torch.device, *, backward: bool):
        width = min(TILE, head.linear_weight.shape[0])
        longest = max(width, hidden) if backward else width
        low_precision = head.compute_dtype != head.logit_dtype
        with_derivative = backward and not head.modification.is_linear
        with_operand = backward and low_precision
        row_bytes = (
            width * head.logit_dtype.itemsize * (1 + with_derivative)
            + width * head.compute_dtype.itemsize * with_operand
            + longest * WideProduct.scratch_itemsize(head.compute_dtype)
        )
        self.rows = max(1, min(rows, head.workspace_bytes // max(1, row_bytes)))

        def buffer(dtype: torch.dtype) -> Tensor:
            return torch.empty(self.rows * width, dtype=dtype, device=device)

        self._logits = buffer(head.logit_dtype)
        self._derivative = buffer(head.logit_dtype) if with_derivative else None
        self._operand = buffer(head.compute_dtype) if with_operand else None
        capacity = max(self.rows * longest, hidden * width if backward else 0)
        self.product = WideProduct(head.compute_dtype, capacity, device)

    def row_blocks(self, rows: int) -> Iterator[slice]:
        """Ranges that cover `rows` rows, each within the workspace."""
        for start in range(0, rows, self.rows):
            yield slice(start, min(start + self.rows, rows))

    def logits(self, head: Head, input: Tensor, weight: Tensor, tile: slice) -> Tensor:
        """The block's unmodified logits, [rows, tile] in the logit dtype.

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

    def derivative(self, logits: Tensor) -> Tensor | None:
        """Room for the derivative of each of `logits`, None where it is constant."""
        if self._derivative is None:
            return None
        return self._derivative[: logits.numel()].view(logits.shape)

    def operand(self, dz: Tensor) -> Tensor:
        """`dz` in the compute dtype."""
        if self._operand is None:
            return dz
        return self._operand[: dz.numel()].view(dz.shape).copy_(dz)


def kept_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows that are not ignored, or None when that is all of them."""
    kept = target != ignore_index
    return None if bool(kept.all()) else kept.nonzero().squeeze(1)


def select(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The kept rows of `tensor`, which is itself when all are kept."""
    return tensor if rows is None else tensor.index_select(0, rows)


def check_target(target: Tensor, vocabulary: int) -> None:
    """Raises the IndexError of `torch.nn.functional.cross_entropy` on CPU.

    On other devices the check is an assertion on the device, as there, which waits for nothing.
    """
    valid = (target >= 0) & (target < vocabulary)
    if target.device.type != "cpu":
        torch._assert_async(valid.all())
    elif not bool(valid.all()):
        first = target[valid.logical_not()][0].item()
        raise IndexError(f"Target {first} is out of bounds.")


def target_columns(target: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """For each row whether its target lies in `tile`, and a column of the tile to address:
    the target's if it does, any valid one if not; [rows] and [rows, 1]."""
    inside = (target >= tile.start) & (target < tile.stop)
    columns = (target - tile.start).clamp_(0, tile.stop - tile.start - 1)
    return inside, columns.unsqueeze(1)


def row_statistics(
    input: Tensor, target: Tensor, head: Head
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the losses are made of, and where the softmax mass is.

    Args:
        input: [tokens, hidden], any floating dtype and strides.
        target: [tokens], int64.
        head: the projection and the modification of its result.

    Returns:
        ``(lse, target_logit, logit_sum, tile_lse)``: float64 [tokens] three times (`logit_sum` is
        empty unless asked for), and [tokens, tiles] in the logit dtype, the logsumexp of each
        tile. Ignored rows are 0.

    Raises:
        IndexError: a target outside the vocabulary that is not `ignore_index` (CPU).
    """
    tokens, hidden = input.shape
    rows = kept_rows(target, head.ignore_index)
    kept_target = select(target, rows)
    check_target(kept_target, head.linear_weight.shape[0])
    kept_input = select(input, rows).to(head.compute_dtype)
    count = kept_target.shape[0]

    workspace = Workspace(head, count, hidden, input.device, backward=False)
    like_row = {"dtype": torch.float64, "device": input.device}
    target_logit = torch.zeros(count, **like_row)
    logit_sum = torch.zeros(count if head.with_logit_sum else 0, **like_row)
    tile_lse = torch.empty(count, tile_count(head.linear_weight.shape[0]), **like_row)

    for number, tile in head.tiles():
        weight = head.weight_of(tile)
        for block in workspace.row_blocks(count):
            logits = workspace.logits(head, kept_input[block], weight, tile)
            head.modification.apply_(logits)

            inside, columns = target_columns(kept_target[block], tile)
            value = logits.gather(1, columns).squeeze(1).double()
            target_logit[block] = torch.where(inside, value, target_logit[block])
            if head.with_logit_sum:
                logit_sum[block] += _weighted_sum(logits, head.logit_sum_weight, tile)
            tile_lse[block, number] = _logsumexp_(logits)

    lse = torch.logsumexp(tile_lse, 1)
    tile_lse = tile_lse.to(head.logit_dtype)
    if rows is None:
        return lse, target_logit, logit_sum, tile_lse
    lse, target_logit, tile_lse = (
        _scatter_rows(kept, rows, tokens) for kept in (lse, target_logit, tile_lse)
    )
    if head.with_logit_sum:
        logit_sum = _scatter_rows(logit_sum, rows, tokens)
    return lse, target_logit, logit_sum, tile_lse


def _logsumexp_(logits: Tensor) -> Tensor:
    """Row-wise logsumexp in float64 of a block, whose memory it uses for the exponentials."""
    top = logits.amax(1)
    # A row of only -inf: subtract 0 so that its logsumexp is -inf, not nan.
    shift = top.masked_fill(top == -math.inf, 0.0)
    total = logits.sub_(shift.unsqueeze(1)).exp_().sum(1)
    return shift.double() + total.double().log()


def _weighted_sum(logits: Tensor, weight: Tensor | None, tile: slice) -> Tensor:
    if weight is None:
        return logits.sum(1)
    return logits @ weight[tile].to(logits.dtype)


def _scatter_rows(kept: Tensor, rows: Tensor, tokens: int) -> Tensor:
    full = kept.new_zeros(tokens, *kept.shape[1:])
    return full.index_copy_(0, rows, kept)


@dataclasses.dataclass(frozen=True)
class RowGradients:
    """Gradients of the loss with respect to the row statistics, each float64 [tokens]."""

    lse: Tensor
    target_logit: Tensor
    logit_sum: Tensor


def row_statistics_backward(
    grads: RowGradients,
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    tile_lse: Tensor,
    head: Head,
    output_mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Exact gradients, from logits that are computed again tile by tile.

    Args:
        grads: of `lse`, `target_logit` and `logit_sum`.
        input, target, head: as in the forward.
        lse, tile_lse: the forward's results.
        output_mask: whether the gradients of `input`, `linear_weight` and `linear_bias` are
            wanted; nothing is computed for those that are not.

    Returns:
        ``(d_input, d_weight, d_bias)`` with the shapes and dtypes of what they belong to.
    """
    need_input, need_weight, need_bias = output_mask
    tokens, hidden = input.shape
    vocabulary = head.linear_weight.shape[0]
    rows = kept_rows(target, head.ignore_index)
    kept_target, kept_lse = select(target, rows), select(lse, rows)
    kept_input = select(input, rows).to(head.compute_dtype)
    count = kept_target.shape[0]
    workspace = Workspace(head, count, hidden, input.device, backward=True)
    skipped = _massless_tiles(kept_target, kept_lse, select(tile_lse, rows), head)

    # exp(z - lse) = exp(z - shift) * exp(shift - lse): the first factor is exact where it matters
    # (z near lse), the second one carries what float32 cannot hold of lse.
    shift = kept_lse.to(head.logit_dtype)
    grad_lse = select(grads.lse, rows)
    probability_scale = (grad_lse * (shift - kept_lse).exp()).to(head.logit_dtype)
    # The target's g p + g_t, with g_t near -g and p near 1, is (g + g_t) + g (p - 1).
    grad_total = grad_lse + select(grads.target_logit, rows)
    grad_logit_sum = (
        select(grads.logit_sum, rows).to(head.logit_dtype) if head.with_logit_sum else None
    )

    d_input = d_weight = d_bias = None
    like_logit = {"dtype": head.logit_dtype, "device": input.device}
    if need_input:
        input_gradient = InputGradient(kept_input, head, workspace)
    if need_weight:
        d_weight = head.linear_weight.new_empty(head.linear_weight.shape)
        weight_gradient = WeightGradient(kept_input, d_weight, head, workspace)
    if need_bias:
        d_bias = torch.zeros(vocabulary, **like_logit)

    for number, tile in head.tiles():
        if skipped[number]:
            if d_weight is not None:
                d_weight[tile] = 0
            continue
        weight = head.weight_of(tile)
        for block in workspace.row_blocks(count):
            logits = workspace.logits(head, kept_input[block], weight, tile)
            derivative = workspace.derivative(logits)
            factor = head.modification.apply_with_derivative_(logits, derivative)

            inside, columns = target_columns(kept_target[block], tile)
            log_probability = logits.gather(1, columns).squeeze(1) - kept_lse[block]
            on_target = grad_total[block] + grad_lse[block] * log_probability.expm1()
            dz = logits.sub_(shift[block].unsqueeze(1)).exp_()
            dz.mul_(probability_scale[block].unsqueeze(1))
            on_target = torch.where(inside, on_target, dz.gather(1, columns).squeeze(1))
            dz.scatter_(1, columns, on_target.to(dz.dtype).unsqueeze(1))
            if grad_logit_sum is not None:
                _add_logit_sum_gradient_(dz, grad_logit_sum[block], head, tile)
            if derivative is not None:
                dz.mul_(derivative)
            if factor != 1.0:
                dz.mul_(factor)

            if d_bias is not None:
                d_bias[tile] += dz.sum(0)
            operand = workspace.operand(dz)
            if need_input:
                input_gradient.add(operand, weight, block)
            if d_weight is not None:
                weight_gradient.add(operand, block)
        if need_input:
            input_gradient.end_tile()
        if d_weight is not None:
            weight_gradient.write(tile)

    if need_input:
        d_input = input_gradient.total().to(input.dtype)
        if rows is not None:
            d_input = _scatter_rows(d_input, rows, tokens)
    if d_bias is not None:
        assert head.linear_bias is not None, "a gradient for a bias that is not there"
        d_bias = d_bias.to(head.linear_bias.dtype)
    return d_input, d_weight, d_bias


def _massless_tiles(target: Tensor, lse: Tensor, tile_lse: Tensor, head: Head) -> list[bool]:
    """Which tiles have a gradient that is exactly zero: no row's target, and every probability
    below half the smallest number of the logit dtype, where exp rounds to zero."""
    tiles = tile_count(head.linear_weight.shape[0])
    if target.shape[0] == 0:
        return [True] * tiles
    if head.with_logit_sum:
        return [False] * tiles
    smallest = torch.finfo(head.logit_dtype).smallest_normal * torch.finfo(head.logit_dtype).eps
    underflow = math.log(smallest) - math.log(2)
    massless = (tile_lse - lse.unsqueeze(1)).amax(0) < underflow  # False for nan, as it must be
    massless[target.div(TILE, rounding_mode="floor")] = False
    return massless.tolist()


def _add_logit_sum_gradient_(dz: Tensor, grad: Tensor, head: Head, tile: slice) -> None:
    grad = grad.unsqueeze(1)
    if head.logit_sum_weight is None:
        dz.add_(grad)
    else:
        dz.addcmul_(grad, head.logit_sum_weight[tile].to(dz.dtype))


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
