"""The reports of what was done about each loss of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from cce_inductor.options import Options
from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.logits import Logits, Projection
from cce_inductor.reporting.location import describe, location
from cce_inductor.reporting.notice import is_large
from cce_inductor.reporting.reasons import Reason
from cce_inductor.reporting.report import LossReport
from cce_inductor.reporting.sizes import shape_hints, tensor_bytes
from cce_inductor.rewriting.decide import Decision
from cce_inductor.rewriting.findings import Consumer, Findings, logits_bytes
from cce_inductor.rewriting.plan import Group


def reports_of(findings: Findings, decision: Decision, options: Options) -> list[LossReport]:
    """Return a report for each loss, for logits that are only deferred, and for large routers."""
    deferred = {o for each in decision.deferred for o in each.logits.origins}
    reports = []
    for consumer, reason in zip(findings.consumers, decision.reasons, strict=True):
        is_rewritten = reason is None
        if is_rewritten and consumer.result is None:
            continue  # a loss that is itself logits, and is not stored
        if not (consumer.is_loss or consumer.reduces):
            continue
        origins = consumer.origins
        is_deferred = is_rewritten and not deferred.isdisjoint(origins)
        reports.append(
            _report(
                consumer.node,
                consumer.logits,
                describe(consumer.node),
                reason,
                options,
                deferred=is_deferred,
                others=consumer.projections,
                groups=_groups_of(consumer, decision),
            )
        )
        if is_rewritten:
            deferred.difference_update(origins)
    for returned in decision.deferred:
        logits = returned.logits
        if not deferred.isdisjoint(logits.origins):
            reports.append(_report(returned.node, logits, "returned", None, options, deferred=True))
    routers: set[Node] = set()
    for consumer in findings.routers:
        assert consumer.logits is not None
        router = consumer.logits.projection.node
        if router not in routers and is_large(logits_bytes(consumer.logits), options):
            name = describe(consumer.node)
            reports.append(_report(consumer.node, consumer.logits, name, consumer.reason, options))
        routers.add(router)
    return reports


def _report(
    node: Node,
    logits: Logits | None,
    operation: str,
    reason: Reason | None,
    options: Options,
    *,
    deferred: bool = False,
    others: Sequence[Projection] = (),
    groups: Sequence[Group] = (),
) -> LossReport:
    """Return the report of a loss, or of logits that the graph returns.

    Args:
        node: the loss, or the node that holds the returned logits.
        logits: the logits, None if they are not known.
        operation: what is done with the logits.
        reason: why they are left alone, None if they are not.
        options: the options in force.
        deferred: whether the function returns the logits deferred.
        others: all projections whose logits the loss reads.
        groups: the operators that compute its statistics.
    """
    samples = reason is None and options.sample_below > 0 and bool(groups)
    against = [group.reason_against_sampling() for group in groups] if samples else []
    stored = sum(group.stored_bytes(options) for group in groups) if reason is None else 0
    path = logits.path if logits is not None else ()
    shape = dtype = None
    size: int | None = 0
    if logits is not None:
        result = example(logits.projection.node)
        shape, dtype, size = shape_hints(result), result.dtype, tensor_bytes(result)
    else:
        read = [example(argument) for argument in node.all_input_nodes[:1]]
        size = tensor_bytes(read[0]) if read and isinstance(read[0], torch.Tensor) else 0
    return LossReport(
        rewritten=reason is None,
        reason=None if reason is None else str(reason),
        location=location(node),
        loss=" > ".join((*path, operation)),
        logits_shape=shape,
        logits_dtype=dtype,
        bytes_saved=max(0, _bytes_of(logits, others) - stored) if reason is None else 0,
        stored_bytes=stored,
        deferred=deferred,
        logits_bytes=size,
        advice=None if reason is None else reason.advice_for(options, size),
        sampled=samples and not any(against),
        exact_because=next(filter(None, against), None),
    )


def _groups_of(consumer: Consumer, decision: Decision) -> list[Group]:
    """Return the operators that compute the statistics of a consumer."""
    wanted = {id(statistic) for statistic in consumer.statistics}
    return [
        group
        for group in decision.groups
        if not wanted.isdisjoint(id(statistic) for statistic in group.statistics)
    ]


def _bytes_of(logits: Logits | None, others: Sequence[Projection]) -> int:
    """Return the bytes of the results of all projections, each counted once."""
    own = () if logits is None else logits.projections
    nodes = {projection.node for projection in (*own, *others)}
    return sum(tensor_bytes(example(node)) or 0 for node in nodes)
