"""`linear_cross_entropy`: the fused loss as a function."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cce_inductor.operators import ops as _ops  # noqa: F401  (registers torch.ops.cce_inductor)
from cce_inductor.options import check_sample_below


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    sample_below: float = 0.0,
) -> Tensor:
    """Return ``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without logits.

    Arguments that `torch.nn.functional.linear_cross_entropy` or
    `torch.nn.functional.cross_entropy` also has mean the same there.

    Args:
        input: [tokens, hidden] or [hidden]; float16, bfloat16, float32 or float64.
        linear_weight: [vocabulary, hidden], the dtype of `input`.
        target: [tokens] or [], class indices in [0, vocabulary) or `ignore_index`; int64.
        linear_bias: [vocabulary], the dtype of `input`.
        weight: [vocabulary], a rescaling weight for each class, the dtype of `input`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: rows with this target add nothing to the loss, and are not computed.
        label_smoothing: in [0, 1].
        softcap: if given, logits become ``softcap * tanh(logits / softcap)`` (Gemma 2,
            arXiv 2408.00118); greater than 0.
        sample_below: 0 for exact gradients; otherwise they are unbiased and cheaper, see `Options`.

    Returns:
        The loss in the dtype of `input`: a scalar, or [tokens] for ``reduction="none"``.

    Raises:
        RuntimeError, ValueError, TypeError: what `linear` and `cross_entropy` raise for the same
            arguments. A second derivative raises RuntimeError; a `softcap` that is not finite or
            not greater than 0 raises ValueError, and so does a `sample_below` outside of [0, 1].
        IndexError: a target out of bounds (CPU).
        NotImplementedError: targets that are class probabilities, or a `linear_weight` for a
            K-dimensional loss; `cross_entropy` takes both.
    """
    if input.dim() not in (1, 2):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() != 2:
        raise NotImplementedError(
            "linear_cross_entropy takes a linear_weight of shape [vocabulary, hidden], got "
            f"{tuple(linear_weight.shape)}"
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"expected a finite softcap greater than 0, got {softcap}")
    check_sample_below(sample_below)
    if target.is_floating_point():
        raise NotImplementedError(
            "linear_cross_entropy takes class indices; for targets that are class probabilities "
            "use torch.nn.functional.cross_entropy on the logits"
        )

    def unfused(input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            F.linear(input, linear_weight, linear_bias),
            target,
            weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    if not _accepts(unfused, input, target):
        unfused(input, target)  # raises
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:1])}, "
            f"got {tuple(linear_bias.shape)}"
        )
    operands, statements, logit = [target], [], "z"
    if softcap is not None:
        cap = repr(float(softcap))
        statements = [f"t0 = div.Tensor(z, {cap})", "t1 = tanh(t0)", f"t2 = mul.Tensor(t1, {cap})"]
        logit = "t2"
    summed = logit
    smoothed = label_smoothing > 0  # PyTorch ignores a negative label smoothing.
    if smoothed and weight is not None:
        operands.append(weight)
        statements.append(f"t3 = mul.Tensor({logit}, c1)")
        summed = "t3"
    statements += [f"logsumexp({logit})", f"target({logit}, r0, {ignore_index})"]
    if smoothed:
        statements.append(f"sum({summed})")
    lse, target_logit, *logit_sum = torch.ops.cce_inductor.reduce(
        input,
        linear_weight,
        linear_bias,
        operands,
        "; ".join(statements),
        skip_ignored=True,
        sample_below=float(sample_below),
    )
    return torch.ops.cce_inductor.cross_entropy(
        lse,
        target_logit,
        logit_sum[0] if logit_sum else None,
        target,
        weight,
        linear_weight.shape[0],
        reduction,
        ignore_index,
        label_smoothing,
        input.dtype,
    )


def _accepts(unfused: Callable[[Tensor, Tensor], Tensor], input: Tensor, target: Tensor) -> bool:
    """Whether PyTorch accepts the arguments.

    They are tried without rows, which costs nothing. torch 2.11 checks the dtype of the target only
    if there are rows, so an unusual dtype is tried with one row and one class as well.
    """
    if target.shape != input.shape[:-1]:
        return False
    try:
        with torch.no_grad():
            unfused(input.reshape(-1, input.shape[-1])[:0], target.reshape(-1)[:0])
            if target.dtype != torch.int64:
                torch.ops.aten.nll_loss_nd(input.new_zeros(1, 1), target.new_zeros(1))
    except Exception:
        return False
    return True
