"""The operators, `torch.ops.cce_inductor.*`, with their meta and autograd formulas.

- `row_statistics`: (input, weight, target) -> `lse`, `target_logit`, `logit_sum`, `tile_lse`
- `row_statistics_backward`: its gradients, from logits computed again
- `linear_cross_entropy`: the loss in terms of them, one node in a rewritten graph; a composite, so
  the compiler and autograd see only `row_statistics` and small operations on [tokens] vectors
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .kernels import blockwise
from .kernels.modification import Modification
from .kernels.product import accumulation_dtype, operand_dtype
from .options import DEFAULT_WORKSPACE_BYTES

NAMESPACE = "cce_inductor"


def _head(
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logit_sum_weight: Tensor | None,
    with_logit_sum: bool,
    ignore_index: int,
    modification: str,
    compute_dtype: torch.dtype,
    workspace_bytes: int,
) -> blockwise.Head:
    return blockwise.Head(
        linear_weight,
        linear_bias,
        logit_sum_weight,
        with_logit_sum,
        ignore_index,
        Modification.parse(modification),
        operand_dtype(compute_dtype),
        workspace_bytes,
    )


def _without_autocast(input: Tensor) -> torch.autocast:
    """The kernels choose every dtype themselves."""
    return torch.autocast(input.device.type, enabled=False)


@torch.library.custom_op(f"{NAMESPACE}::row_statistics", mutates_args=())
def row_statistics(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    logit_sum_weight: Tensor | None,
    with_logit_sum: bool,
    ignore_index: int,
    modification: str,
    compute_dtype: torch.dtype,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.blockwise.row_statistics`."""
    head = _head(
        linear_weight,
        linear_bias,
        logit_sum_weight,
        with_logit_sum,
        ignore_index,
        modification,
        compute_dtype,
        workspace_bytes,
    )
    with _without_autocast(input):
        return blockwise.row_statistics(input, target, head)


@row_statistics.register_fake
def _(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    logit_sum_weight: Tensor | None,
    with_logit_sum: bool,
    ignore_index: int,
    modification: str,
    compute_dtype: torch.dtype,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = input.shape[0]
    tiles = blockwise.tile_count(linear_weight.shape[0])
    lse, target_logit = (input.new_empty(tokens, dtype=torch.float64) for _ in range(2))
    logit_sum = input.new_empty(tokens if with_logit_sum else 0, dtype=torch.float64)
    tile_lse = input.new_empty(tokens, tiles, dtype=accumulation_dtype(compute_dtype))
    return lse, target_logit, logit_sum, tile_lse


@torch.library.custom_op(f"{NAMESPACE}::row_statistics_backward", mutates_args=())
def row_statistics_backward(
    grad_lse: Tensor,
    grad_target_logit: Tensor,
    grad_logit_sum: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    logit_sum_weight: Tensor | None,
    lse: Tensor,
    tile_lse: Tensor,
    with_logit_sum: bool,
    ignore_index: int,
    modification: str,
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.blockwise.row_statistics_backward`; gradients not asked for are empty."""
    head = _head(
        linear_weight,
        linear_bias,
        logit_sum_weight,
        with_logit_sum,
        ignore_index,
        modification,
        compute_dtype,
        workspace_bytes,
    )
    need_input, need_weight, need_bias = output_mask
    grads = blockwise.RowGradients(grad_lse, grad_target_logit, grad_logit_sum)
    with _without_autocast(input):
        d_input, d_weight, d_bias = blockwise.row_statistics_backward(
            grads, input, target, lse, tile_lse, head, (need_input, need_weight, need_bias)
        )
    return tuple(input.new_empty(0) if d is None else d for d in (d_input, d_weight, d_bias))


@row_statistics_backward.register_fake
def _(
    grad_lse: Tensor,
    grad_target_logit: Tensor,
    grad_logit_sum: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    logit_sum_weight: Tensor | None,
    lse: Tensor,
    tile_lse: Tensor,
    with_logit_sum: bool,
    ignore_index: int,
    modification: str,
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        input.new_empty(0) if primal is None or not wanted else primal.new_empty(primal.shape)
        for primal, wanted in zip((input, linear_weight, linear_bias), output_mask, strict=True)
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        input,
        linear_weight,
        linear_bias,
        target,
        logit_sum_weight,
        ctx.with_logit_sum,
        ctx.ignore_index,
        ctx.modification,
        ctx.compute_dtype,
        ctx.workspace_bytes,
    ) = inputs
    lse, _, _, tile_lse = output
    ctx.mark_non_differentiable(tile_lse)
    ctx.save_for_backward(
        input, linear_weight, linear_bias, target, logit_sum_weight, lse, tile_lse
    )


def _backward(
    ctx: Any,
    grad_lse: Tensor,
    grad_target_logit: Tensor,
    grad_logit_sum: Tensor,
    _grad_tile_lse: Tensor,
) -> tuple[Tensor | None, ...]:
    input, linear_weight, linear_bias, target, logit_sum_weight, lse, tile_lse = ctx.saved_tensors
    output_mask = ctx.needs_input_grad[:3]
    gradients = torch.ops.cce_inductor.row_statistics_backward(
        grad_lse,
        grad_target_logit,
        grad_logit_sum,
        input,
        linear_weight,
        linear_bias,
        target,
        logit_sum_weight,
        lse,
        tile_lse,
        ctx.with_logit_sum,
        ctx.ignore_index,
        ctx.modification,
        ctx.compute_dtype,
        ctx.workspace_bytes,
        output_mask,
    )
    wanted = (d if needed else None for d, needed in zip(gradients, output_mask, strict=True))
    return *wanted, *(None,) * 7


row_statistics.register_autograd(_backward, setup_context=_save_for_backward)


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "cce_inductor: the fused linear cross-entropy has no second derivative; compute the "
        "logits and torch.nn.functional.cross_entropy without cce_inductor for a double backward"
    )


row_statistics_backward.register_autograd(_refuse_double_backward)


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    modification: str = "",
    compute_dtype: torch.dtype | None = None,
    result_dtype: torch.dtype | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    vocabulary = linear_weight.shape[0]
    rows = target.reshape(-1).to(torch.int64)
    smoothed = label_smoothing > 0  # as `cross_entropy`, which ignores a negative one
    lse, target_logit, logit_sum, _ = torch.ops.cce_inductor.row_statistics(
        input.reshape(-1, input.shape[-1]),
        linear_weight,
        linear_bias,
        rows,
        weight if smoothed else None,
        smoothed,
        ignore_index,
        modification,
        compute_dtype or input.dtype,
        workspace_bytes,
    )
    # Ignored rows are zero in every statistic, hence in every term below.
    kept = rows != ignore_index
    loss = lse - target_logit
    if weight is None:
        total_weight, row_weight = vocabulary, kept
    else:
        class_weight = weight.to(torch.float64)
        total_weight = class_weight.sum()
        row_weight = class_weight[rows.masked_fill(~kept, 0)].masked_fill(~kept, 0.0)
        loss = loss * row_weight
    if smoothed:
        smooth = (lse * total_weight - logit_sum) / vocabulary
        loss = loss * (1.0 - label_smoothing) + smooth * label_smoothing
    if reduction == "none":
        loss = loss.reshape(target.shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            loss = loss / row_weight.sum()
    return loss.to(result_dtype or input.dtype)


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, "
    "Tensor? linear_bias=None, Tensor? weight=None, str reduction='mean', "
    "SymInt ignore_index=-100, float label_smoothing=0.0, str modification='', "
    "ScalarType? compute_dtype=None, ScalarType? result_dtype=None, "
    f"int workspace_bytes={DEFAULT_WORKSPACE_BYTES}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("linear_cross_entropy", _linear_cross_entropy, "CompositeImplicitAutograd")
