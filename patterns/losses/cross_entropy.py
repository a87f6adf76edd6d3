"""`torch.nn.functional.cross_entropy` of class indices or probabilities, and `nll_loss`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from cce_inductor.patterns.language import (
    Algebra,
    Apply,
    Call,
    Logits,
    Operand,
    OperandKind,
    Row,
    Site,
    UnsupportedError,
    call,
    constant,
    ignoring,
    is_symbol,
    late,
    loss,
    loss_reduction,
    number_operand,
    operand,
    read,
    tensor_example,
    vocabulary_of,
)
from cce_inductor.reporting import reasons


@loss(F.cross_entropy)
def cross_entropy(
    site: Site,
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
    label_smoothing: Any = 0.0,
) -> Row:
    logits = _over_classes(site, input)
    reduction = loss_reduction(size_average, reduce, reduction)
    _check_weight(site, weight)
    smoothing = float(constant(label_smoothing))
    if site.is_logits(target) or tensor_example(target).is_floating_point():
        return _with_probabilities(site, logits, target, weight, reduction, smoothing)
    _check_indices(site, target, input)
    target, ignored = _targets(site, target, ignore_index)
    return _with_indices(site, logits, target, weight, ignored, reduction, smoothing)


@loss(F.nll_loss)
def nll_loss(
    site: Site,
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
) -> Row:
    logits = _over_classes(site, input)
    _check_weight(site, weight)
    _check_indices(site, target, input)
    target, ignored = _targets(site, target, ignore_index)
    target_logit = Algebra(site, logits).target(logits.expression, target, ignored)
    return call(
        torch.ops.cce_inductor.cross_entropy.default,
        None,
        ignoring(target_logit, target, ignored),
        None,
        target,
        weight,
        vocabulary_of(logits),
        loss_reduction(size_average, reduce, reduction),
        ignored,
        0.0,
        site.example.dtype,
    )


def _with_indices(
    site: Site,
    logits: Logits,
    target: Any,
    weight: Any,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Call:
    algebra, x = Algebra(site, logits), logits.expression
    logit_sum = None
    if label_smoothing > 0:  # PyTorch ignores a negative one
        summed = x if weight is None else Apply("mul.Tensor", (x, _classes(site, weight, logits)))
        logit_sum = ignoring(algebra.sum(summed), target, ignore_index)
    lse = algebra.logsumexp(x)
    target_logit = algebra.target(x, target, ignore_index)
    return call(
        torch.ops.cce_inductor.cross_entropy.default,
        ignoring(lse, target, ignore_index),
        ignoring(target_logit, target, ignore_index),
        logit_sum,
        target,
        weight,
        vocabulary_of(logits),
        reduction,
        ignore_index,
        label_smoothing,
        site.example.dtype,
    )


def _with_probabilities(
    site: Site, logits: Logits, target: Any, weight: Any, reduction: str, smoothing: float
) -> Row:
    algebra, x = Algebra(site, logits), logits.expression
    expected = read(site, target, logits)
    if smoothing > 0:
        scaled = Apply("mul.Tensor", (expected, 1.0 - smoothing))
        if isinstance(logits.vocabulary, int):
            share: Any = smoothing / logits.vocabulary
        else:
            share = Apply(
                "div.Tensor", (smoothing, number_operand(site, vocabulary_of(logits), logits))
            )
        expected = Apply("add.Tensor", (scaled, share))
    if weight is not None:
        expected = Apply("mul.Tensor", (expected, _classes(site, weight, logits)))
    log_probability = Apply("sub.Tensor", (x, late(site, algebra.logsumexp(x), logits)))
    rows = call(torch.neg, algebra.sum(Apply("mul.Tensor", (expected, log_probability))))
    if reduction == "none":
        return call(torch.squeeze, rows, logits.vocabulary_dim)
    return call(torch.mean if reduction == "mean" else torch.sum, rows)


def _over_classes(site: Site, input: Any) -> Logits:
    logits = site.logits(input)
    rank = tensor_example(input).dim()
    try:
        return site.over_vocabulary(logits, 0 if rank == 1 else 1)
    except UnsupportedError:
        return site.unsupported(reasons.CLASS_DIMENSION_NOT_VOCABULARY)


def _classes(site: Site, weight: Any, logits: Logits) -> Operand:
    return operand(site, OperandKind.COLUMN, weight, logits)


_IGNORED = torch.iinfo(torch.int64).min


def _targets(site: Site, target: Any, ignore_index: Any) -> tuple[Any, int]:
    """Return the class indices and the ignored index.

    If the user's ignored index may differ in the next call, it is replaced by a constant.
    """
    if not is_symbol(ignore_index):
        return target, int(constant(ignore_index))
    if tensor_example(target).dtype != torch.int64:
        site.unsupported(reasons.NUMBER_MAY_DIFFER)
    ignored = call(torch.eq, target, ignore_index)
    return call(torch.masked_fill, target, ignored, _IGNORED), _IGNORED


def _check_weight(site: Site, weight: Any) -> None:
    if weight is not None and tensor_example(weight).requires_grad:
        site.unsupported(reasons.CLASS_WEIGHTS_WITH_GRADIENT)


def _check_indices(site: Site, target: Any, input: Any) -> None:
    if site.is_logits(target):
        site.unsupported(reasons.TARGETS_ARE_LOGITS)
    if tensor_example(target).device != tensor_example(input).device:
        site.unsupported(reasons.TARGETS_ON_ANOTHER_DEVICE)
