"""The pass: walk over a graph, decide, and put fused operators in the place of its losses."""

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
from cce_inductor.rewriting.findings import Findings
from cce_inductor.rewriting.record import reports_of
from cce_inductor.rewriting.replace import replace
from cce_inductor.rewriting.returned import Deferral, Returned, returned_logits
from cce_inductor.rewriting.walk import walk
from cce_inductor.surprise import on_error, surprised

# A key in the meta of the output node of a graph that the pass has seen. The meta of a module would
# not do: several modules may share one, the parts that DistributedDataParallel splits a graph into
# for example.
_SEEN = "cce_inductor"


def rewrite(
    module: GraphModule,
    options: Options,
    against: Reason | None = None,
    deferral: Deferral | None = None,
) -> list[LossReport]:
    """Rewrite the losses in `module` and in the subgraphs that it calls, in place.

    A graph that the pass has seen before is not changed again. An unexpected exception leaves its
    graph as it was and becomes the reason of the losses in it; with ``options.on_error="raise"`` it
    is raised.

    Args:
        module: the graph.
        options: the options of the pass.
        against: why no loss may be rewritten, None if they may.
        deferral: takes the logits that `module` stops returning. None if it must return them.

    Returns:
        A report for each loss, and for each projection that is only deferred.
    """
    reports: list[LossReport] = []
    for graph_module in _with_subgraphs(module):
        output = graph_module.graph.output_node()
        if output.meta.get(_SEEN):
            continue
        output.meta[_SEEN] = True
        is_inner = graph_module is not module
        with computing_examples(), on_error(options.on_error):
            reports += _rewrite_graph(
                graph_module, options, against, None if is_inner else deferral, is_inner=is_inner
            )
    return reports


def rewrite_reductions(graph: Graph, options: Options) -> bool:
    """Rewrite every reduction of logits in `graph` in place, whether it belongs to a loss or not.

    Returns:
        Whether there are reductions and nothing else reads logits. If not, the graph is as it was.
    """
    findings = walk(graph, without_loss=True)
    only_reductions = all(consumer.reduces for consumer in findings.consumers)
    if findings.kept.reasons or findings.returned or not only_reductions:
        return False
    decision = decide(findings, options, [])
    if not decision.groups or any(decision.reasons):
        return False
    with computing_examples():
        replace(graph, decision, findings, options)
    return True


def _with_subgraphs(module: GraphModule) -> list[GraphModule]:
    """Return `module` and every graph that its nodes refer to, the innermost first."""
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
        findings, deferrable = _found(module.graph, options, deferral, is_inner=is_inner)
        for consumer in findings.consumers:
            consumer.reason = consumer.reason or against
        decision = decide(findings, options, deferrable if against is None else [])
        reports = reports_of(findings, decision, options)
        if decision.groups or decision.deferred:
            outputs = replace(module.graph, decision, findings, options)
            if deferral is not None and decision.deferred:
                deferral.outputs = outputs
                deferral.keeps_stale = options.stale_logits == "keep"
            module.graph.lint()
            module.recompile()
        return reports
    except Exception as error:
        surprised("a graph is compiled as it was")
        losses = [node for node in module.graph.nodes if loss.get(node) is not None]
        return [LossReport.of_failure(node, reasons.pass_failed(error)) for node in losses]


def _found(
    graph: Graph, options: Options, deferral: Deferral | None, *, is_inner: bool
) -> tuple[Findings, list[Returned]]:
    """Return what a walk finds, and the logits that the graph returns and need not compute.

    If a head that is read beside others must be stored, the others read its logits as a tensor; if
    it requires a gradient, they are stored, too. Which heads are stored is known only after a walk,
    so the graph is walked again.
    """
    stored: frozenset[Node] = frozenset()
    while True:
        findings = walk(graph, is_inner=is_inner, stored=stored)
        deferrable, returned = returned_logits(findings, options, deferral)
        for logits, reason in returned:
            findings.kept.add(logits, reason)
        more = findings.stored_beside() - stored
        if not more:
            return findings, deferrable
        stored |= more
