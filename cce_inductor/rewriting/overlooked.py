"""What is said of a graph in which no loss was found: its largest projection, and what reads it."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.logits import all_logits
from cce_inductor.reporting.location import at, operation
from cce_inductor.reporting.sizes import format_bytes, format_tensor, shape_hints, tensor_bytes
from cce_inductor.rewriting.found import Walk
from cce_inductor.rewriting.walk import walk
from cce_inductor.surprise import surprised


def largest_projection(module: GraphModule) -> str | None:
    """Two lines; None if what Dynamo captured, with the graphs that it calls, has no projection."""
    try:
        walks = [walk(each.graph) for each in module.modules() if isinstance(each, GraphModule)]
    except Exception:
        surprised("an explanation says nothing of projections")
        return None
    projections = {
        node: found
        for found in walks
        for value in found.values.values()
        for node in _projections(value)
    }
    if not projections:
        return None
    largest = max(projections, key=lambda node: tensor_bytes(example(node)) or 0)
    value = example(largest)
    size = tensor_bytes(value)
    shown = format_tensor(shape_hints(value), value.dtype)
    if size is not None:
        shown += f", {format_bytes(size)}"
    return (
        f"the largest projection is {operation(largest)}{at(largest)}, {shown}\n"
        f"  {_use(largest, projections[largest])}"
    )


def _projections(value: Any) -> list[Node]:
    return [logits.projection.node for logits in all_logits(value)]


def _use(node: Node, found: Walk) -> str:
    """What becomes of a projection that no loss is taken of."""
    reasons = (e.reason for e in found.dropped if e.logits and e.logits.projection.node is node)
    reason = found.kept.reasons.get(node) or next(reasons, None)
    if reason is not None:
        return str(reason)
    made_of_it = [other for other, value in found.values.items() if node in _projections(value)]
    if any(other in found.returned for other in made_of_it):
        return "the function returns what is made of it"
    readers = [u for other in made_of_it for u in other.users if u not in found.values]
    if not readers:
        return "nothing reads it"
    return (
        f"it is read by {operation(readers[0])}{at(readers[0])}, without a softmax over its "
        "columns, as a loss over classes has"
    )
