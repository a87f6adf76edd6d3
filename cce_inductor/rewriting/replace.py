"""Replace the consumers of logits in a graph, and erase nodes that are not needed any more.

The graph changes only after every new node has been built, so an error leaves it as it was.
"""

from __future__ import annotations

import math

from torch.fx import Graph, Node

from cce_inductor.options import Options
from cce_inductor.patterns.language.logits import all_logits
from cce_inductor.rewriting.build import Builder, DeferredNodes
from cce_inductor.rewriting.decide import Decision
from cce_inductor.rewriting.findings import Findings
from cce_inductor.rewriting.returned import DeferredOutput, Source


def replace(
    graph: Graph, decision: Decision, findings: Findings, options: Options
) -> list[int | DeferredOutput]:
    """Rewrite a graph as was decided.

    Returns:
        For each result of the graph before, its position among the results now, or what it is
        computed from. Empty if the graph returns what it did.
    """
    builder = Builder(graph, decision.groups, findings, options)
    try:
        new = [(consumer, builder.result(consumer)) for consumer in decision.chosen]
        deferred = {each.node: builder.deferred(each) for each in decision.deferred}
        for group in decision.groups:
            for node in group.hoisted:
                assert group.first is not None, "every group is built"
                group.first.prepend(node)
        graph.lint()
    except Exception:
        builder.undo()
        raise
    place = _places(graph, findings)
    replaced: dict[Node, Node] = {}
    for consumer, nodes in sorted(new, key=lambda pair: -findings.position[pair[0].place]):
        # A row view has a value for each change. Users before this one see an earlier value.
        old, first = consumer.node, findings.position[consumer.place]
        if isinstance(nodes, tuple):
            replaced |= {user: nodes[user.args[1]] for user in old.users}
            continue
        replaced.setdefault(old, nodes)
        old.replace_all_uses_with(nodes, lambda user, first=first: place[user] > first)
    for old, node in replaced.items():
        old.replace_all_uses_with(node)
        graph.erase_node(old)
    for consumer, _ in new:
        if consumer.node not in replaced:
            graph.erase_node(consumer.node)
    outputs = _return_instead(graph, deferred, replaced) if deferred else []
    _erase_unused(graph, decision, findings)
    return outputs


def _places(graph: Graph, findings: Findings) -> dict[Node, float]:
    """Return the position of each node among the user's nodes.

    A new node is half a position before the user's node that follows it.
    """
    places: dict[Node, float] = {}
    following = math.inf
    for node in reversed(graph.nodes):
        following = findings.position.get(node, following)
        places[node] = following if node in findings.position else following - 0.5
    return places


def _return_instead(
    graph: Graph, deferred: dict[Node, DeferredNodes], replaced: dict[Node, Node]
) -> list[int | DeferredOutput]:
    """Make the graph return what deferred logits are computed from, each tensor once."""
    output = graph.output_node()
    placeholders = graph.find_nodes(op="placeholder")
    old = output.args[0]
    assert isinstance(old, (list, tuple)), "Dynamo's graphs return a tuple"
    results = [node for node in old if node not in deferred]

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
        nodes = deferred.get(node)
        if nodes is None:
            outputs.append(kept)
            kept += 1
            continue
        outputs.append(
            DeferredOutput(
                nodes.formula,
                source(nodes.input),
                source(nodes.linear_weight),
                None if nodes.linear_bias is None else source(nodes.linear_bias),
                tuple(map(source, nodes.operands)),
            )
        )
    output.args = (type(old)(results),)
    return outputs


def _erase_unused(graph: Graph, decision: Decision, findings: Findings) -> None:
    """Erase the nodes that held logits and that nothing reads now.

    Other nodes without users stay: before autograd, some of them matter.
    """
    origins = {origin for consumer in decision.chosen for origin in consumer.origins}
    origins.update(origin for each in decision.deferred for origin in each.logits.origins)
    unused = [
        node
        for node in findings.unused
        for argument in node.all_input_nodes
        for logits in all_logits(findings.values.get(argument, ()))
        if not origins.isdisjoint(logits.origins)
    ]
    _erase_with_users(graph, unused)
    held = {**findings.values, **findings.assignments}
    for node in sorted(held, key=lambda node: -findings.position[node]):
        for logits in all_logits(held[node]):
            if origins.isdisjoint(logits.origins):
                continue
            _erase_if_unused(graph, node)
            for projection in logits.projections:
                for absorbed in projection.absorbed:
                    _erase_if_unused(graph, absorbed)
    for node in sorted(set(findings.looked_through), key=lambda node: -findings.position[node]):
        _erase_if_unused(graph, node)


def _erase_if_unused(graph: Graph, node: Node) -> None:
    if not node.users and node in graph.nodes:
        graph.erase_node(node)


def _erase_with_users(graph: Graph, nodes: list[Node]) -> None:
    for node in nodes:
        if node in graph.nodes:
            _erase_with_users(graph, list(node.users))
            graph.erase_node(node)
