"""The records of what was done about each loss of a graph."""

from __future__ import annotations

import torch
from torch.fx import Node

from cce_inductor.options import Options
from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.logits import Logits
from cce_inductor.reporting.location import describe, location
from cce_inductor.reporting.notice import is_large
from cce_inductor.reporting.reasons import Reason
from cce_inductor.reporting.report import LossReport
from cce_inductor.reporting.sizes import shape_hints, tensor_bytes
from cce_inductor.rewriting.decide import Decision
from cce_inductor.rewriting.found import FoundLoss, Walk, logits_bytes


def reports_of(found: Walk, decision: Decision, options: Options) -> list[LossReport]:
    deferred = {o for each in decision.deferred for o in each.logits.projection.origins}
    reports = []
    for each, reason in zip(found.losses, decision.reasons, strict=True):
        if (each.result is None and reason is None) or not (each.is_loss or each.reduces):
            continue
        origins = each.logits.projection.origins if each.logits is not None else ()
        also = not deferred.isdisjoint(origins)
        reports.append(loss_report(each, reason, options, deferred=also))
        if reason is None:
            deferred.difference_update(origins)
    for returned in decision.deferred:
        if not deferred.isdisjoint(returned.logits.projection.origins):
            reports.append(deferral_report(returned.logits, returned.node, options))
    routers: set[Node] = set()
    for each in found.dropped:
        assert each.logits is not None
        if each.logits.projection.node in routers:
            continue
        routers.add(each.logits.projection.node)
        if is_large(logits_bytes(each.logits), options):
            reports.append(loss_report(each, each.reason, options))
    return reports


def loss_report(
    found: FoundLoss, reason: Reason | None, options: Options, *, deferred: bool = False
) -> LossReport:
    """The record of a loss that was rewritten (`reason` is None) or left alone."""
    return _report(found.node, found.logits, describe(found.node), reason, options, deferred)


def deferral_report(logits: Logits, node: Node, options: Options) -> LossReport:
    """The record of logits that are deferred and of which there is no loss."""
    return _report(node, logits, "returned", None, options, True)


def _report(
    node: Node,
    logits: Logits | None,
    consumer: str,
    reason: Reason | None,
    options: Options,
    deferred: bool,
) -> LossReport:
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
        loss=" > ".join((*path, consumer)),
        logits_shape=shape,
        logits_dtype=dtype,
        bytes_saved=(size or 0) if reason is None else 0,
        deferred=deferred and reason is None,
        logits_bytes=size,
        advice=None if reason is None else reason.advice_for(options, size),
    )
