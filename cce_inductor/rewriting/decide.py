"""Which of the losses that a walk has found are rewritten, and why the others are not."""

from __future__ import annotations

import dataclasses

from cce_inductor.kernels.program.tracing import NotPointwiseError
from cce_inductor.options import Options
from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.logits import Logits
from cce_inductor.reporting import reasons
from cce_inductor.reporting.reasons import Reason
from cce_inductor.rewriting.found import FoundLoss, Kept, Walk, logits_bytes
from cce_inductor.rewriting.plan import Group, plan
from cce_inductor.rewriting.returned import (
    Returned,
    are_deferred_already,
    is_worth_deferring,
)

DEVICES = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is done to a graph.

    Attributes:
        reasons: why each loss that was found is left alone, None if it is not.
        chosen: the losses that are rewritten.
        deferred: the logits that are not returned any more.
        groups: the operators.
    """

    reasons: list[Reason | None]
    chosen: list[FoundLoss]
    deferred: list[Returned]
    groups: list[Group]


def decide(found: Walk, options: Options, deferrable: list[Returned]) -> Decision:
    while True:
        against, kept = _reasons_to_keep(found, options)
        chosen = [
            each
            for each, reason in zip(found.losses, against, strict=True)
            if reason is None and each.result is not None
        ]
        deferred = _deferred(deferrable, chosen, kept, options)
        groups = plan(chosen, found)
        refused = _undifferentiable(groups)
        if refused is None:
            return Decision(against, chosen, deferred, groups)
        logits, reason = refused
        for each in chosen:
            assert each.logits is not None
            if not set(logits.projection.origins).isdisjoint(each.logits.projection.origins):
                each.reason = reason


def _deferred(
    deferrable: list[Returned], chosen: list[FoundLoss], kept: Kept, options: Options
) -> list[Returned]:
    """Those whose logits nothing else keeps, and that have come deferred, or from which a loss is
    rewritten, or, if the options say so, which are large."""
    of_losses = {
        origin
        for each in chosen
        if each.logits is not None
        for origin in each.logits.projection.origins
    }
    found = []
    for each in deferrable:
        if kept.reason(each.logits) is not None:
            continue
        has_loss = not of_losses.isdisjoint(each.logits.projection.origins)
        large = is_worth_deferring(each.logits) and not _reason_of_logits(each.logits, options)
        if (
            has_loss
            or are_deferred_already(each.logits)
            or (options.defer_logits == "always" and large)
        ):
            found.append(each)
    return found


def _undifferentiable(groups: list[Group]) -> tuple[Logits, Reason] | None:
    for group in groups:
        try:
            group.check_derivative()
        except NotPointwiseError as why:
            return group.logits, reasons.derivative_not_pointwise(str(why))
    return None


def _reasons_to_keep(found: Walk, options: Options) -> tuple[list[Reason | None], Kept]:
    """For each loss and each projection; a projection's losses are rewritten together or not at
    all."""
    against = [_reason_to_keep(each, options) for each in found.losses]
    kept = found.kept.copy()
    changed = True
    while changed:  # what one loss keeps may be joined with what another one reads
        changed = False
        for number, each in enumerate(found.losses):
            if each.logits is None:
                continue
            reason = against[number] or kept.reason(each.logits)
            changed = changed or reason != against[number]
            against[number] = reason
            if reason is not None:
                kept.add(each.logits, reason)
    return against, kept


def _reason_to_keep(found: FoundLoss, options: Options) -> Reason | None:
    if found.reason is not None:
        return found.reason
    assert found.logits is not None
    return _reason_of_logits(found.logits, options)


def _reason_of_logits(logits: Logits, options: Options) -> Reason | None:
    device = example(logits.projection.node).device.type
    if device not in DEVICES:
        return reasons.no_kernel(device)
    size = logits_bytes(logits)
    if size is not None and size < options.min_logits_bytes:
        return reasons.too_small(size, options.min_logits_bytes)
    return None
