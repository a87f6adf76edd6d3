"""Puts one fused operator in the place of the losses that the walk can explain.

Every reduction of the same rows of the same logits comes from one operator (`plan`); the small
operations on its results follow (`_Builder`). The graph is changed only after every new node has
been built, so that an error leaves it as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from . import ops as _ops  # noqa: F401  (registers torch.ops.cce_inductor)
from .deferred.formula import Formula
from .kernels.program import NotPointwiseError
from .kernels.surprise import on_error, surprised
from .notice import is_large
from .options import DEFAULT_WORKSPACE_BYTES, Options
from .patterns import (
    AtRows,
    Call,
    Logits,
    Operand,
    Statistic,
    TensorOperation,
    all_logits,
    example,
    loss,
    vocabulary_of,
)
from .plan import Group, plan
from .report import LossReport, deferral_report, format_bytes, logits_bytes, loss_report
from .returned import (
    Deferral,
    DeferredOutput,
    Returned,
    Source,
    are_deferred_already,
    is_worth_deferring,
    returned_logits,
)
from .walk import FoundLoss, Kept, Walk, walk

DEVICES = ("cpu", "cuda")
# Key in the meta of the output of a graph that the pass has seen. That of a module may be shared
# by several, as the parts are that DistributedDataParallel makes of a graph.
_DONE = "cce_inductor"


def computing_examples() -> torch.autograd.graph.saved_tensors_hooks:
    """While values of new nodes are computed: hooks on saved tensors that are in force, those of a
    checkpoint, say, are for the user's, which they count."""
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def rewrite(
    module: GraphModule,
    options: Options,
    refused: str | None = None,
    deferral: Deferral | None = None,
) -> list[LossReport]:
    """Rewrites the losses in `module` and in the subgraphs it calls, in place.

    Does nothing to a graph that it has seen before. An unexpected exception leaves that graph as
    it was and becomes the reason of its losses, or is raised with ``options.on_error="raise"``.

    Args:
        module: the graph.
        options: of the pass.
        refused: why no loss may be rewritten, None if they may.
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
                graph_module, options, refused, of_graph, is_inner=graph_module is not module
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
    decision = _decide(found, options, [])
    if not decision.groups or any(decision.reasons):
        return False
    with computing_examples():
        _replace(graph, decision, found, options)
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
    refused: str | None,
    deferral: Deferral | None,
    *,
    is_inner: bool,
) -> list[LossReport]:
    try:
        found = walk(module.graph, is_inner=is_inner)
        for each in found.losses:
            each.reason = each.reason or refused
        deferrable, stored = returned_logits(found, options, deferral)
        for logits, reason in stored:
            found.kept.add(logits, reason)
        if refused is not None:
            deferrable = []
        decision = _decide(found, options, deferrable)
        reports = _reports(found, decision, options)
        if decision.groups or decision.deferred:
            outputs = _replace(module.graph, decision, found, options)
            if deferral is not None and decision.deferred:
                deferral.outputs = outputs
            module.graph.lint()
            module.recompile()
        return reports
    except Exception as error:
        surprised("a graph is compiled as it was")
        reason = f"the pass failed with {type(error).__name__}: {error}"
        return [LossReport.of_failure(node, reason) for node in _losses(module.graph)]


def _reports(found: Walk, decision: Decision, options: Options) -> list[LossReport]:
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


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is done to a graph.

    Attributes:
        reasons: why each loss that was found is left alone, None if it is not.
        chosen: the losses that are rewritten.
        deferred: the logits that are not returned any more.
        groups: the operators.
    """

    reasons: list[str | None]
    chosen: list[FoundLoss]
    deferred: list[Returned]
    groups: list[Group]


def _decide(found: Walk, options: Options, deferrable: list[Returned]) -> Decision:
    while True:
        reasons, kept = _reasons_to_keep(found, options)
        chosen = [
            each
            for each, reason in zip(found.losses, reasons, strict=True)
            if reason is None and each.result is not None
        ]
        deferred = _deferred(deferrable, chosen, kept, options)
        groups = plan(chosen, found)
        refused = _undifferentiable(groups)
        if refused is None:
            return Decision(reasons, chosen, deferred, groups)
        logits, reason = refused
        for each in chosen:
            assert each.logits is not None
            if not set(logits.projection.origins).isdisjoint(each.logits.projection.origins):
                each.reason = reason


def _deferred(
    deferrable: list[Returned], chosen: list[FoundLoss], kept: Kept, options: Options
) -> list[Returned]:
    """Those whose logits nothing else keeps, and that have come deferred, or from which a loss is
    rewritten, or, if the options say so, which are large."""
    of_losses = {
        origin
        for each in chosen
        if each.logits is not None
        for origin in each.logits.projection.origins
    }
    found = []
    for each in deferrable:
        if kept.reason(each.logits) is not None:
            continue
        has_loss = not of_losses.isdisjoint(each.logits.projection.origins)
        large = is_worth_deferring(each.logits) and not _reason_of_logits(each.logits, options)
        if (
            has_loss
            or are_deferred_already(each.logits)
            or (options.defer_logits == "always" and large)
        ):
            found.append(each)
    return found


def _undifferentiable(groups: list[Group]) -> tuple[Logits, str] | None:
    for group in groups:
        try:
            group.check_derivative()
        except NotPointwiseError as why:
            reason = f"the function of the logits has a derivative that is not pointwise ({why})"
            return group.logits, reason
    return None


def _losses(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if loss.get(node) is not None]


def _reasons_to_keep(found: Walk, options: Options) -> tuple[list[str | None], Kept]:
    """For each loss and each projection; a projection's losses are rewritten together or not at
    all."""
    reasons = [_reason_to_keep(each, options) for each in found.losses]
    kept = found.kept.copy()
    changed = True
    while changed:  # what one loss keeps may be joined with what another one reads
        changed = False
        for number, each in enumerate(found.losses):
            if each.logits is None:
                continue
            reason = reasons[number] or kept.reason(each.logits)
            changed = changed or reason != reasons[number]
            reasons[number] = reason
            if reason is not None:
                kept.add(each.logits, reason)
    return reasons, kept


def _reason_to_keep(found: FoundLoss, options: Options) -> str | None:
    if found.reason is not None:
        return found.reason
    assert found.logits is not None
    return _reason_of_logits(found.logits, options)


def _reason_of_logits(logits: Logits, options: Options) -> str | None:
    device = example(logits.projection.node).device.type
    if device not in DEVICES:
        return f"there is no kernel for the device {device!r}"
    size = logits_bytes(logits)
    if size is not None and size < options.min_logits_bytes:
        return (
            f"the logits are small ({format_bytes(size)}, and "
            f"min_logits_bytes is {format_bytes(options.min_logits_bytes)})"
        )
    return None


def _replace(
    graph: Graph, decision: Decision, found: Walk, options: Options
) -> list[int | DeferredOutput]:
    """Changes the graph; returns where its results are now."""
    builder = _Builder(graph, decision.groups, found, options)
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


def _fake_mode(*values: Any) -> contextlib.AbstractContextManager[Any]:
    """The mode of the example values, in which new tensors are examples too."""
    for value in torch.utils._pytree.tree_leaves(values):
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Head:
    """The nodes that deferred logits are made of."""

    formula: Formula
    input: Node
    linear_weight: Node
    linear_bias: Node | None
    operands: list[Node]


class _Builder:
    """Inserts nodes, with example values, and can take them out again."""

    def __init__(self, graph: Graph, groups: list[Group], found: Walk, options: Options):
        self.graph = graph
        self.found = found
        self.group_of = {id(s): group for group in groups for s in group.statistics}
        self.options = options
        self.built: list[Node] = []
        self._fake_mode = _fake_mode([example(node) for node in found.values])
        self._memo: dict[Any, Any] = {}
        self._gradients_off = False

    def undo(self) -> None:
        for node in reversed(self.built):
            self.graph.erase_node(node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        name = getattr(target, "_opname", None)  # without the overload's: "cross_entropy"
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self.built.append(node)
        values, named_values = torch.fx.map_arg((args, kwargs), example)
        with self._fake_mode:
            node.meta["example_value"] = target(*values, **named_values)
        return node

    def method(self, name: str, input: Node, *args: Any) -> Node:
        node = self.graph.call_method(name, (input, *args))
        self.built.append(node)
        node.meta["example_value"] = getattr(example(input), name)(*args)
        return node

    def result(self, found: FoundLoss) -> Node | tuple[Node, ...]:
        """What takes the place of a loss, right before it, or before what has changed it."""
        first = len(self.built)
        self._gradients_off = self.found.gradient_mode[found.place] is False
        with self.graph.inserting_before(found.place):
            expected = example(found.node)
            if isinstance(found.result, tuple):
                for user in found.node.users:
                    if user.target is not operator.getitem or not isinstance(user.args[1], int):
                        raise AssertionError(f"{user} reads the tuple {found.node} as a whole")
                pairs = zip(found.result, expected, strict=True)
                node = tuple(self._like(self.row(row), value) for row, value in pairs)
            else:
                node = self._like(self.row(found.result), expected)
        for built in self.built[first:]:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                if key in found.node.meta:
                    built.meta[key] = found.node.meta[key]
        return node

    def _like(self, node: Node, expected: torch.Tensor) -> Node:
        """With the dtype of what is replaced, and memory of its own if somebody changes it."""
        value = example(node)
        if not isinstance(expected, torch.Tensor):
            return node
        if value.dtype != expected.dtype:
            node = self.method("to", node, expected.dtype)
        elif self.found.is_changed(expected):
            node = self.call(torch.clone, node)
        value = example(node)
        if value.dim() != expected.dim() or value.dtype != expected.dtype:
            raise AssertionError(
                f"the fused result is {value.dtype} {tuple(value.shape)}, "
                f"the replaced one {expected.dtype} {tuple(expected.shape)}"
            )
        node.meta["example_value"] = expected
        return node

    def row(self, row: Any) -> Any:
        """The node of a value of rows; numbers and nodes are themselves."""
        if isinstance(row, tuple):
            return tuple(self.row(each) for each in row)
        if not isinstance(row, (Statistic, Call, AtRows)):
            return row
        key = (id(row), self._gradients_off)  # what is made without gradients has none
        if key not in self._memo:
            if isinstance(row, Statistic):
                node = self._statistic(row)
            elif isinstance(row, AtRows):
                node = self._at_rows(row.operand, row.logits)
            else:
                # This one flattens the rows itself.
                flat = row.target is torch.ops.cce_inductor.cross_entropy.default
                args = [
                    self._statistic(argument, flat=True)
                    if flat and isinstance(argument, Statistic)
                    else self.row(argument)
                    for argument in row.args
                ]
                kwargs = {name: self.row(argument) for name, argument in row.kwargs}
                node = self.call(row.target, *args, **kwargs)
            self._memo[key] = node
        return self._memo[key]

    def _statistic(self, statistic: Statistic, *, flat: bool = False) -> Node:
        """A result of its group's operator, in the shape of its rows unless `flat`."""
        group = self.group_of[id(statistic)]
        if group.results is None:
            self._reduce(group)
        assert group.results is not None
        output = group.output(statistic)
        if output not in group.outputs:
            group.outputs[output] = self.call(operator.getitem, group.results, output)
        node = group.outputs[output]
        logits, base = statistic.logits, group.logits
        rest = logits.row_operations[len(base.row_operations) :]
        if flat:
            return node
        if not rest:
            return self._from_last(node, logits.vocabulary_dim)
        node = self._from_last(node, base.vocabulary_dim)
        return self._replay(node, rest, example(node).shape[base.vocabulary_dim])

    def _reduce(self, group: Group) -> None:
        """The operator of a group, where the group says."""
        logits = group.logits
        memo, self._memo = self._memo, {}  # what was built may come after the anchor
        with self.graph.inserting_before(group.anchor):
            first = len(self.built)
            input, weight, bias = self._projection(logits)
            operands = [self._operand(operand, logits) for operand in group.operands]
            arguments = {
                "skip_ignored": (group.skip_ignored, False),
                "compute_dtype": (logits.compute_dtype, example(input).dtype),
                "workspace_bytes": (self.options.workspace_bytes, DEFAULT_WORKSPACE_BYTES),
            }
            group.results = self.call(
                torch.ops.cce_inductor.reduce.default,
                input,
                weight,
                bias,
                operands,
                str(group.program),
                **{k: value for k, (value, default) in arguments.items() if value != default},
            )
        group.first = self.built[first]
        self._memo = memo

    def _projection(self, logits: Logits) -> tuple[Node, Node, Node | None]:
        """The factors of a matrix product with the rows of `logits`, and its bias."""
        projection = logits.projection
        input = self.row(projection.input)
        input = self._replay(input, logits.row_operations, projection.hidden)
        input = self._to_last(input, logits.vocabulary_dim)
        weight = self._replay(self.row(projection.linear_weight), projection.weight_operations)
        bias = projection.linear_bias
        if bias is not None:
            if example(bias).dim() > 1:
                bias = self.call(torch.reshape, bias, (-1,))
            bias = self._replay(bias, projection.bias_operations)
        return input, weight, bias

    def head(self, returned: Returned) -> Head:
        """What returned logits are made of, before the graph ends."""
        logits, value = returned.logits, example(returned.node)
        names = Group(logits, returned.output, 0)
        name = names.name(returned.expression)
        product_dtype = example(logits.projection.node).dtype
        wide = torch.promote_types(logits.compute_dtype, torch.float32)
        with self.graph.inserting_before(returned.output):
            input, weight, bias = self._projection(logits)
            operands = [self._operand(operand, logits) for operand in names.operands]
        formula = Formula(
            product_dtype=product_dtype,
            steps=names.program.steps,
            value=name,
            wide=wide,
            vocabulary_dim=logits.vocabulary_dim,
            dtype=value.dtype,
            strides=returned.strides,
        )
        return Head(formula, input, weight, bias, operands)

    def _operand(self, operand: Operand | Statistic, logits: Logits) -> Node:
        """What a program's operand is at the rows of `logits`, with the vocabulary last."""
        if isinstance(operand, Statistic):
            assert operand.index is not None
            index = self.row(operand.index)
            if operand.kind == "gather":
                return self._to_last(index, operand.logits.vocabulary_dim)
            return index
        if operand.kind in ("c", "s"):
            return self.row(operand.source)
        width = 1 if operand.kind == "r" else self.row(vocabulary_of(logits))
        node, dim = self.row(operand.source), operand.vocabulary_dim
        if operand.row_operations == logits.row_operations and dim == example(node).dim() - 1:
            return node
        node = self._expanded(node, operand, logits, width)
        rest = logits.row_operations[len(operand.row_operations) :]
        if rest:
            node, dim = self._replay(node, rest, width), logits.vocabulary_dim
        return self._to_last(node, dim)

    def _at_rows(self, operand: Operand, logits: Logits) -> Node:
        node = self.row(operand.source)
        rest = logits.row_operations[len(operand.row_operations) :]
        if not rest:
            return node
        if operand.kind == "s":
            # It may have as many dimensions as the logits had when it was read.
            has_dims = isinstance(example(node), torch.Tensor) and example(node).dim() > 0
            return self.call(torch.reshape, node, ()) if has_dims else node
        return self._replay(self._expanded(node, operand, logits, 1), rest, 1)

    def _expanded(self, node: Node, operand: Operand, logits: Logits, width: int) -> Node:
        """An operand as large as the rows were when it was read."""
        projection = logits.projection
        rows = self._replay(self.row(projection.input), operand.row_operations, projection.hidden)
        expand = torch.ops.cce_inductor.expand_rows.default
        return self.call(expand, node, rows, operand.vocabulary_dim, width)

    def _replay(
        self, node: Node, operations: tuple[TensorOperation, ...], width: Any = None
    ) -> Node:
        for operation in operations:
            args = operation.args_for(node, width)
            node = self.call(operation.target, *args, **dict(operation.kwargs))
        return node

    def _to_last(self, node: Node, dim: int) -> Node:
        return node if dim == example(node).dim() - 1 else self.call(torch.movedim, node, dim, -1)

    def _from_last(self, node: Node, dim: int) -> Node:
        return node if dim == example(node).dim() - 1 else self.call(torch.movedim, node, -1, dim)
