"""The graph is changed: new nodes take the place of old ones, which are erased.

This happens only after every new node has been built, so that an error leaves the graph as it was.
"""

from __future__ import annotations

import math

from torch.fx import Graph, Node

from cce_inductor.options import Options
from cce_inductor.patterns.language.logits import all_logits
from cce_inductor.rewriting.build import Builder, Head
from cce_inductor.rewriting.decide import Decision
from cce_inductor.rewriting.found import Walk
from cce_inductor.rewriting.returned import (
    DeferredOutput,
    Source,
)


def replace(
    graph: Graph, decision: Decision, found: Walk, options: Options
) -> list[int | DeferredOutput]:
    """Changes the graph; returns where its results are now."""
    builder = Builder(graph, decision.groups, found, options)
    try:
        new = [(each, builder.result(each)) for each in decision.chosen]
        heads = {each.node: builder.head(each) for each in decision.deferred}
        for group in decision.groups:
            for node in group.hoisted:
                assert group.first is not None, "every group is built"
                group.first.prepend(node)
        graph.lint()
    except Exception:
        builder.undo()
        raise
    place = _places(graph, found)
    replaced: dict[Node, Node] = {}
    for each, nodes in sorted(new, key=lambda pair: -found.position[pair[0].place]):
        # Users before the place see an earlier value of a view, whose turn is next.
        old, first = each.node, found.position[each.place]
        if isinstance(nodes, tuple):
            replaced |= {user: nodes[user.args[1]] for user in old.users}
            continue
        replaced.setdefault(old, nodes)
        old.replace_all_uses_with(nodes, lambda user, first=first: place[user] > first)
    for old, node in replaced.items():
        old.replace_all_uses_with(node)
        graph.erase_node(old)
    for each, _ in new:
        if each.node not in replaced:
            graph.erase_node(each.node)
    outputs = _return_instead(graph, heads, replaced) if heads else []
    _erase_unused(graph, decision, found)
    return outputs


def _places(graph: Graph, found: Walk) -> dict[Node, float]:
    """Where each node is in the graph as the user wrote it; a new one right before the node of
    the user's that follows it."""
    places: dict[Node, float] = {}
    following = math.inf
    for node in reversed(graph.nodes):
        following = found.position.get(node, following)
        places[node] = following if node in found.position else following - 0.5
    return places


def _return_instead(
    graph: Graph, heads: dict[Node, Head], replaced: dict[Node, Node]
) -> list[int | DeferredOutput]:
    """Returns what deferred logits are made of in their place, each tensor once."""
    output = graph.output_node()
    placeholders = graph.find_nodes(op="placeholder")
    old = output.args[0]
    assert isinstance(old, (list, tuple)), "Dynamo's graphs return a tuple"
    results = [node for node in old if node not in heads]

    def source(node: Node) -> Source:
        node = replaced.get(node, node)
        if node in placeholders:
            return Source("arguments", placeholders.index(node))
        if node not in results:
            results.append(node)
        return Source("results", results.index(node))

    outputs: list[int | DeferredOutput] = []
    kept = 0
    for node in old:
        head = heads.get(node)
        if head is None:
            outputs.append(kept)
            kept += 1
            continue
        outputs.append(
            DeferredOutput(
                head.formula,
                source(head.input),
                source(head.linear_weight),
                None if head.linear_bias is None else source(head.linear_bias),
                tuple(map(source, head.operands)),
            )
        )
    output.args = (type(old)(results),)
    return outputs


def _erase_unused(graph: Graph, decision: Decision, found: Walk) -> None:
    """What held logits and holds nothing now; nothing else, for a graph before autograd has
    nodes without users that matter."""
    changed = [each.logits for each in decision.chosen]
    changed += [returned.logits for returned in decision.deferred]
    origins = {o for logits in changed if logits is not None for o in logits.projection.origins}
    unused = [
        node
        for node in found.unused
        for argument in node.all_input_nodes
        for logits in all_logits(found.values.get(argument, ()))
        if not origins.isdisjoint(logits.projection.origins)
    ]
    _erase_with_users(graph, unused)
    of_logits = {**found.values, **found.assignments}
    for node in sorted(of_logits, key=lambda node: -found.position[node]):
        for logits in all_logits(of_logits[node]):
            if origins.isdisjoint(logits.projection.origins):
                continue
            if not node.users and node in graph.nodes:
                graph.erase_node(node)
            for absorbed in logits.projection.absorbed:
                if not absorbed.users and absorbed in graph.nodes:
                    graph.erase_node(absorbed)
    for node in sorted(set(found.looked_through), key=lambda node: -found.position[node]):
        if not node.users and node in graph.nodes:
            graph.erase_node(node)


def _erase_with_users(graph: Graph, nodes: list[Node]) -> None:
    for node in nodes:
        if node in graph.nodes:
            _erase_with_users(graph, list(node.users))
            graph.erase_node(node)
