"""Which reductions belong to a loss, when the graph does not call it by its name.

A projection with a reduction over its columns need not make logits. The router of a mixture of
experts has a softmax, too; but it has fewer experts than hidden units, and to store its logits
costs next to nothing.
"""

from __future__ import annotations

from cce_inductor.reporting import reasons
from cce_inductor.rewriting.findings import Consumer, Findings


def drop_without_loss(findings: Findings) -> None:
    """Forget the consumers of projections that no loss is computed from.

    A projection is kept if a loss, or what may be one, reads it. So is one of the same vocabulary
    size: it may be a teacher, whose argmax is the target of the loss.
    """
    of_losses = [
        projection
        for consumer in findings.consumers
        if consumer.logits is not None and (consumer.is_loss or _may_be_loss(consumer))
        for projection in consumer.projections
    ]
    origins = {origin for projection in of_losses for origin in projection.origins}
    vocabularies = {projection.classes for projection in of_losses}
    every, findings.consumers = findings.consumers, []
    for consumer in every:
        if (
            consumer.logits is None
            or not origins.isdisjoint(consumer.origins)
            or consumer.logits.projection.classes in vocabularies
        ):
            findings.consumers.append(consumer)
        elif consumer.has_softmax:
            projection = consumer.logits.projection
            consumer.reason = findings.kept.reason(consumer) or reasons.taken_for_router(
                projection.classes, projection.hidden
            )
            findings.routers.append(consumer)


def _may_be_loss(consumer: Consumer) -> bool:
    """Return whether a consumer with a softmax may be part of a loss written by hand."""
    assert consumer.logits is not None
    return consumer.has_softmax and consumer.logits.projection.has_more_classes
