"""Which consumers of logits are rewritten, and why the others are not."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from cce_inductor.kernels.program.tracing import NotPointwiseError
from cce_inductor.options import Options
from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.logits import Logits
from cce_inductor.reporting import reasons
from cce_inductor.reporting.reasons import Reason
from cce_inductor.rewriting.findings import Consumer, Findings, KeptProjections, logits_bytes
from cce_inductor.rewriting.plan import Group, plan
from cce_inductor.rewriting.returned import Returned, are_deferred_already, is_worth_deferring

DEVICES_WITH_KERNELS = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is done to a graph.

    Attributes:
        reasons: for each consumer of the findings why it is left alone, None if it is not.
        chosen: the consumers that are replaced.
        deferred: the logits that the graph does not return any more.
        groups: the operators.
    """

    reasons: list[Reason | None]
    chosen: list[Consumer]
    deferred: list[Returned]
    groups: list[Group]


def decide(findings: Findings, options: Options, deferrable: list[Returned]) -> Decision:
    """Decide what is rewritten.

    Args:
        findings: what the walk found.
        options: the options in force.
        deferrable: the logits that the graph returns and need not.
    """
    while True:
        against, kept = _reasons_against(findings, options)
        chosen = [
            consumer
            for consumer, reason in zip(findings.consumers, against, strict=True)
            if reason is None and consumer.result is not None
        ]
        groups = plan(chosen, findings)
        not_differentiable = _not_differentiable(groups)
        if not_differentiable is None:
            deferred = _deferred(deferrable, chosen, kept, options)
            return Decision(against, chosen, deferred, groups)
        origins, reason = not_differentiable
        for consumer in chosen:
            if not origins.isdisjoint(consumer.origins):
                consumer.reason = reason


def _deferred(
    deferrable: list[Returned], chosen: list[Consumer], kept: KeptProjections, options: Options
) -> list[Returned]:
    """Return the logits that the graph stops returning.

    Nothing else may keep them. They were deferred when the function got them, or a loss of them is
    rewritten, or they are large and the options ask for it, or for those before a loss.
    """
    with_loss = {origin for consumer in chosen for origin in consumer.origins}
    deferred = []
    for returned in deferrable:
        logits = returned.logits
        if kept.reason(logits) is not None:
            continue
        if (
            not with_loss.isdisjoint(logits.origins)
            or are_deferred_already(logits)
            or (
                _asks_for(returned, options)
                and is_worth_deferring(logits)
                and _reason_against_logits(logits, options) is None
            )
        ):
            deferred.append(returned)
    return deferred


def _asks_for(returned: Returned, options: Options) -> bool:
    """Whether the options ask for logits to be deferred that have no loss in the graph."""
    if options.defer_logits == "auto":
        return returned.precedes_loss
    return options.defer_logits == "always"


def _not_differentiable(groups: list[Group]) -> tuple[set[Node], Reason] | None:
    """Return the projections that a group without a pointwise derivative reads, with the reason."""
    for group in groups:
        try:
            group.check_derivative()
        except NotPointwiseError as error:
            return group.origins, reasons.derivative_not_pointwise(str(error))
    return None


def _reasons_against(
    findings: Findings, options: Options
) -> tuple[list[Reason | None], KeptProjections]:
    """Return why each consumer and each projection is left alone.

    The consumers of a projection are rewritten together or not at all.
    """
    against = [_reason_against(consumer, options) for consumer in findings.consumers]
    kept = findings.kept.copy()
    changed = True
    while changed:  # logits of several projections may be joined, which passes a reason on
        changed = False
        for number, consumer in enumerate(findings.consumers):
            if consumer.logits is None:
                continue
            reason = against[number] or kept.reason(consumer)
            changed = changed or reason is not against[number]
            against[number] = reason
            if reason is not None:
                kept.add(consumer, reason)
    return against, kept


def _reason_against(consumer: Consumer, options: Options) -> Reason | None:
    if consumer.reason is not None:
        return consumer.reason
    assert consumer.logits is not None
    return _reason_against_logits(consumer.logits, options)


def _reason_against_logits(logits: Logits, options: Options) -> Reason | None:
    device = example(logits.projection.node).device.type
    if device not in DEVICES_WITH_KERNELS:
        return reasons.no_kernel(device)
    if are_deferred_already(logits):
        return None  # they may be a chunk of logits that are large together
    size = logits_bytes(logits)
    if size is not None and size < options.min_logits_bytes:
        return reasons.too_small(size, options.min_logits_bytes)
    return None
