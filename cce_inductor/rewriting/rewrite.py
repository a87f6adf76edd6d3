"""The pass: walks over a graph, decides, and puts one fused operator in the place of the losses."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from cce_inductor.operators import ops as _ops  # noqa: F401  (registers torch.ops.cce_inductor)
from cce_inductor.options import Options
from cce_inductor.patterns.language.tables import loss
from cce_inductor.reporting import reasons
from cce_inductor.reporting.reasons import Reason
from cce_inductor.reporting.report import LossReport
from cce_inductor.rewriting.build import computing_examples
from cce_inductor.rewriting.decide import decide
from cce_inductor.rewriting.record import reports_of
from cce_inductor.rewriting.replace import replace
from cce_inductor.rewriting.returned import (
    Deferral,
    returned_logits,
)
from cce_inductor.rewriting.walk import walk
from cce_inductor.surprise import on_error, surprised

# Key in the meta of the output of a graph that the pass has seen. That of a module may be shared
# by several, as the parts are that DistributedDataParallel makes of a graph.
_DONE = "cce_inductor"


def rewrite(
    module: GraphModule,
    options: Options,
    against: Reason | None = None,
    deferral: Deferral | None = None,
) -> list[LossReport]:
    """Rewrites the losses in `module` and in the subgraphs it calls, in place.

    Does nothing to a graph that it has seen before. An unexpected exception leaves that graph as
    it was and becomes the reason of its losses, or is raised with ``options.on_error="raise"``.

    Args:
        module: the graph.
        options: of the pass.
        against: why no loss may be rewritten, None if they may.
        deferral: takes the logits that `module` is not to return; None if it must return them.

    Returns:
        One report for each loss found, and for each projection that is only deferred.
    """
    reports: list[LossReport] = []
    for graph_module in _with_subgraphs(module):
        output = graph_module.graph.output_node()
        if output.meta.get(_DONE):
            continue
        output.meta[_DONE] = True
        of_graph = deferral if graph_module is module else None
        with computing_examples(), on_error(options.on_error):
            reports += _rewrite_graph(
                graph_module, options, against, of_graph, is_inner=graph_module is not module
            )
    return reports


def reduce_all(graph: Graph, options: Options) -> bool:
    """Rewrites every reduction of logits in `graph`, of losses or not, in place.

    Returns:
        Whether there are any and nothing else reads logits; the graph is as it was if not.
    """
    found = walk(graph, without_loss=True)
    if found.kept.reasons or found.returned or not all(each.reduces for each in found.losses):
        return False
    decision = decide(found, options, [])
    if not decision.groups or any(decision.reasons):
        return False
    with computing_examples():
        replace(graph, decision, found, options)
    return True


def _with_subgraphs(module: GraphModule) -> list[GraphModule]:
    """`module` and every graph that its nodes refer to, innermost first."""
    inner = [
        child
        for node in module.graph.find_nodes(op="get_attr")
        if isinstance(child := getattr(module, str(node.target), None), GraphModule)
    ]
    nested = [graph for child in dict.fromkeys(inner) for graph in _with_subgraphs(child)]
    return [*dict.fromkeys(nested), module]


def _rewrite_graph(
    module: GraphModule,
    options: Options,
    against: Reason | None,
    deferral: Deferral | None,
    *,
    is_inner: bool,
) -> list[LossReport]:
    try:
        found = walk(module.graph, is_inner=is_inner)
        for each in found.losses:
            each.reason = each.reason or against
        deferrable, stored = returned_logits(found, options, deferral)
        for logits, reason in stored:
            found.kept.add(logits, reason)
        if against is not None:
            deferrable = []
        decision = decide(found, options, deferrable)
        reports = reports_of(found, decision, options)
        if decision.groups or decision.deferred:
            outputs = replace(module.graph, decision, found, options)
            if deferral is not None and decision.deferred:
                deferral.outputs = outputs
            module.graph.lint()
            module.recompile()
        return reports
    except Exception as error:
        surprised("a graph is compiled as it was")
        reason = reasons.pass_failed(error)
        return [LossReport.of_failure(node, reason) for node in _losses(module.graph)]


def _losses(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if loss.get(node) is not None]
