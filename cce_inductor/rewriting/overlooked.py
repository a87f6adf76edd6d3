"""What `explain` says of a graph without a loss: its largest projection, and what reads it."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.logits import Value, all_logits
from cce_inductor.reporting.location import at, operation
from cce_inductor.reporting.sizes import format_bytes, format_tensor, shape_hints, tensor_bytes
from cce_inductor.rewriting.findings import Findings
from cce_inductor.rewriting.walk import walk
from cce_inductor.surprise import surprised


def largest_projection(module: GraphModule) -> str | None:
    """Describe the largest projection of a captured graph and of the graphs that it calls.

    Returns:
        Two lines, None if there is no projection.
    """
    try:
        walks = [walk(each.graph) for each in module.modules() if isinstance(each, GraphModule)]
    except Exception:
        surprised("an explanation says nothing of projections")
        return None
    findings_of = {
        node: findings
        for findings in walks
        for value in findings.values.values()
        for node in _projections(value)
    }
    if not findings_of:
        return None
    largest = max(findings_of, key=lambda node: tensor_bytes(example(node)) or 0)
    value = example(largest)
    size = tensor_bytes(value)
    shown = format_tensor(shape_hints(value), value.dtype)
    if size is not None:
        shown += f", {format_bytes(size)}"
    return (
        f"the largest projection is {operation(largest)}{at(largest)}, {shown}\n"
        f"  {_use(largest, findings_of[largest])}"
    )


def _projections(value: Value) -> list[Node]:
    return [logits.projection.node for logits in all_logits(value)]


def _use(projection: Node, findings: Findings) -> str:
    """Say what becomes of a projection that no loss is computed from."""
    of_router = (
        consumer.reason
        for consumer in findings.routers
        if consumer.logits is not None and consumer.logits.projection.node is projection
    )
    reason = findings.kept.reasons.get(projection) or next(of_router, None)
    if reason is not None:
        return str(reason)
    holders = [node for node, value in findings.values.items() if projection in _projections(value)]
    if any(node in findings.returned for node in holders):
        return "the function returns a tensor that is computed from it"
    readers = [user for node in holders for user in node.users if user not in findings.values]
    if not readers:
        return "nothing reads it"
    return (
        f"it is read by {operation(readers[0])}{at(readers[0])}, without a softmax over its "
        "columns, as a loss over classes has"
    )
