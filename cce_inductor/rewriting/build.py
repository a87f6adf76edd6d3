"""Build the nodes that replace consumers of logits, and those that returned logits are made of.

All statistics of the same rows of the same logits come from one operator (see `plan`). Ordinary
nodes compute everything else from its results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from cce_inductor.kernels.names import OperandKind
from cce_inductor.kernels.statistics.gather import Gather
from cce_inductor.options import DEFAULT_WORKSPACE_BYTES, Options
from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.expression import Operand
from cce_inductor.patterns.language.logits import Call, Logits, TensorOperation
from cce_inductor.patterns.language.rows import AtRows, RowStatistic, vocabulary_of
from cce_inductor.recipe.formula import Formula
from cce_inductor.rewriting.findings import Consumer, Findings
from cce_inductor.rewriting.plan import Group, Placed
from cce_inductor.rewriting.returned import Returned


def computing_examples() -> torch.autograd.graph.saved_tensors_hooks:
    """Disable the user's saved-tensor hooks while the example values of new nodes are computed.

    The hooks of activation checkpointing, for example, count the tensors that they see.
    """
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _fake_mode(*values: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the fake mode of the example values, in which new tensors are fake, too."""
    for value in torch.utils._pytree.tree_leaves(values):
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class DeferredNodes:
    """The nodes that deferred logits are computed from.

    Attributes:
        formula: how the logits are computed from the nodes.
        input: [..., hidden].
        linear_weight: [vocabulary, hidden].
        linear_bias: [vocabulary], or None.
        operands: the other tensors that the formula reads.
    """

    formula: Formula
    input: Node
    linear_weight: Node
    linear_bias: Node | None
    operands: list[Node]


class Builder:
    """Inserts nodes with example values into a graph, and can erase them again.

    Attributes:
        placed: the group of each statistic.
        built: the nodes that were inserted.
    """

    def __init__(self, graph: Graph, groups: list[Group], findings: Findings, options: Options):
        self.graph = graph
        self.findings = findings
        self.placed = Placed(groups)
        self.options = options
        self.built: list[Node] = []
        self._fake_mode = _fake_mode([example(node) for node in findings.values])
        self._memo: dict[Any, Any] = {}
        self._gradients_off = False
        self._place = graph.output_node()  # the node before which nodes are inserted

    def undo(self) -> None:
        """Erase all nodes that were built."""
        for node in reversed(self.built):
            self.graph.erase_node(node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call of a function."""
        name = getattr(target, "_opname", None)  # "cross_entropy", without the overload's name
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self.built.append(node)
        values, named_values = torch.fx.map_arg((args, kwargs), example)
        with self._fake_mode:
            node.meta["example_value"] = target(*values, **named_values)
        return node

    def method(self, name: str, input: Node, *args: Any) -> Node:
        """Insert a call of a method of `input`."""
        node = self.graph.call_method(name, (input, *args))
        self.built.append(node)
        node.meta["example_value"] = getattr(example(input), name)(*args)
        return node

    def result(self, consumer: Consumer) -> Node | tuple[Node, ...]:
        """Build the nodes that replace a consumer, at its place."""
        first = len(self.built)
        replaced = consumer.node
        self._gradients_off = self.findings.gradient_mode[consumer.place] is False
        self._place = consumer.place
        with self.graph.inserting_before(consumer.place):
            expected = example(replaced)
            if isinstance(consumer.result, tuple):
                for user in replaced.users:
                    if user.target is not operator.getitem or not isinstance(user.args[1], int):
                        raise AssertionError(f"{user} reads the tuple {replaced} as a whole")
                pairs = zip(consumer.result, expected, strict=True)
                node = tuple(self._like(self.row(row), value) for row, value in pairs)
            else:
                node = self._like(self.row(consumer.result), expected)
        for built in self.built[first:]:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                if key in replaced.meta:
                    built.meta[key] = replaced.meta[key]
        return node

    def _like(self, node: Node, expected: torch.Tensor) -> Node:
        """Give a node the dtype of what it replaces, and its own memory if that is changed."""
        value = example(node)
        if not isinstance(expected, torch.Tensor):
            return node
        if value.dtype != expected.dtype:
            node = self.method("to", node, expected.dtype)
        elif self.findings.is_changed(expected):
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
        """Build the node of a `Row`. Numbers and nodes are returned as they are."""
        if isinstance(row, tuple):
            return tuple(self.row(each) for each in row)
        if not isinstance(row, (RowStatistic, Call, AtRows)):
            return row
        key = (id(row), self._gradients_off)  # nodes built without gradients have none
        if key not in self._memo:
            if isinstance(row, RowStatistic):
                node = self._statistic(row)
            elif isinstance(row, AtRows):
                node = self._at_rows(row.operand, row.logits)
            else:
                # This operator takes the rows of its statistics flattened.
                flat = row.target is torch.ops.cce_inductor.cross_entropy.default
                args = [
                    self._statistic(argument, flat=True)
                    if flat and isinstance(argument, RowStatistic)
                    else self.row(argument)
                    for argument in row.args
                ]
                kwargs = {name: self.row(argument) for name, argument in row.kwargs}
                node = self.call(row.target, *args, **kwargs)
            self._memo[key] = node
        return self._memo[key]

    def _statistic(self, statistic: RowStatistic, *, flat: bool = False) -> Node:
        """Build a statistic: a result of its group's operator, in the shape of its rows or flat."""
        group = self.placed.get(statistic, gradients_off=self._gradients_off)
        assert group is not None, "every statistic of a consumer is in a group"
        if group.results is None:
            self._add_operator(group)
        assert group.results is not None
        output = group.output(statistic)
        node = group.outputs.get(output)
        if node is None or node > self._place:
            node = group.outputs[output] = self.call(operator.getitem, group.results, output)
        logits, base = statistic.logits, group.logits
        rest = logits.row_operations[len(base.row_operations) :]
        if flat:
            return node
        if not rest:
            return self._from_last(node, logits.vocabulary_dim)
        node = self._from_last(node, base.vocabulary_dim)
        return self._replay(node, rest, example(node).shape[base.vocabulary_dim])

    def _add_operator(self, group: Group) -> None:
        """Build the operator of a group, at the group's anchor."""
        logits = group.logits
        memo, self._memo = self._memo, {}  # nodes built before may stand after the anchor
        gradients_off, self._gradients_off = self._gradients_off, group.gradients_off
        place, self._place = self._place, group.anchor
        with self.graph.inserting_before(group.anchor):
            first = len(self.built)
            input, weight, bias = self._projection(logits)
            operands = self._operands(group, logits)
            arguments = {
                "skip_ignored": (group.skip_ignored, False),
                "compute_dtype": (logits.compute_dtype, example(input).dtype),
                "workspace_bytes": (self.options.workspace_bytes, DEFAULT_WORKSPACE_BYTES),
                "sample_below": (
                    0.0 if group.is_recorded else float(self.options.sample_below),
                    0.0,
                ),
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
        self._memo, self._gradients_off, self._place = memo, gradients_off, place

    def _projection(self, logits: Logits) -> tuple[Node, Node, Node | None]:
        """Build the input, weight and bias of the matrix product whose rows are those of `logits`.

        Returns:
            input [..., hidden], weight [vocabulary, hidden], and bias [vocabulary] or None.
        """
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

    def deferred(self, returned: Returned) -> DeferredNodes:
        """Build the nodes that returned logits are computed from, at the end of the graph."""
        logits, value = returned.logits, example(returned.node)
        names = Group(logits, returned.output, 0)
        name = names.name(returned.expression)
        product_dtype = example(logits.projection.node).dtype
        wide = torch.promote_types(logits.compute_dtype, torch.float32)
        self._place = returned.output
        with self.graph.inserting_before(returned.output):
            input, weight, bias = self._projection(logits)
            operands = self._operands(names, logits)
        formula = Formula(
            product_dtype=product_dtype,
            steps=names.program.steps,
            value=name,
            wide=wide,
            vocabulary_dim=logits.vocabulary_dim,
            dtype=value.dtype,
            strides=returned.strides,
        )
        return DeferredNodes(formula, input, weight, bias, operands)

    def _operands(self, group: Group, logits: Logits) -> list[Node]:
        """Build the operands of a group's program, for the rows of `logits`."""
        operands: list[Node] = []
        for operand in group.operands.values():
            if isinstance(operand, Operand) and isinstance(operand.source, Logits):
                operands += self._factors(operand, operand.source, logits)
            else:
                operands.append(self._operand(operand, logits))
        return operands

    def _factors(self, operand: Operand, source: Logits, logits: Logits) -> list[Node]:
        """Build the factors of another head's matrix product, in the dtype of its result."""
        rest = logits.row_operations[len(operand.row_operations) :]
        dim = logits.vocabulary_dim if rest else operand.vocabulary_dim
        rows = source.replace(row_operations=(*source.row_operations, *rest), vocabulary_dim=dim)
        dtype = example(source.projection.node).dtype
        return [
            factor if example(factor).dtype == dtype else self.method("to", factor, dtype)
            for factor in self._projection(rows)
            if factor is not None
        ]

    def _operand(self, operand: Operand | RowStatistic, logits: Logits) -> Node:
        """Build an operand of a program for the rows of `logits`, with the vocabulary last."""
        if isinstance(operand, RowStatistic):
            assert operand.index is not None
            index = self.row(operand.index)
            if operand.kind is Gather:
                return self._to_last(index, operand.logits.vocabulary_dim)
            return index
        if not operand.kind.varies_over_rows:
            return self.row(operand.source)
        width = self.row(vocabulary_of(logits)) if operand.kind.varies_over_columns else 1
        node, dim = self.row(operand.source), operand.vocabulary_dim
        if operand.row_operations == logits.row_operations and dim == example(node).dim() - 1:
            return node
        node = self._expanded(node, operand, logits, width)
        rest = logits.row_operations[len(operand.row_operations) :]
        if rest:
            node, dim = self._replay(node, rest, width), logits.vocabulary_dim
        return self._to_last(node, dim)

    def _at_rows(self, operand: Operand, logits: Logits) -> Node:
        """Build an operand that has one value, or one for each row, for the rows of `logits`."""
        node = self.row(operand.source)
        rest = logits.row_operations[len(operand.row_operations) :]
        if not rest:
            return node
        if operand.kind is OperandKind.SCALAR:
            # It may have as many dimensions as the logits had when it was read.
            has_dims = isinstance(example(node), torch.Tensor) and example(node).dim() > 0
            return self.call(torch.reshape, node, ()) if has_dims else node
        return self._replay(self._expanded(node, operand, logits, 1), rest, 1)

    def _expanded(self, node: Node, operand: Operand, logits: Logits, width: int) -> Node:
        """Expand an operand to the rows that it was broadcast to where it was read."""
        projection = logits.projection
        rows = self._replay(self.row(projection.input), operand.row_operations, projection.hidden)
        expand = torch.ops.cce_inductor.expand_rows.default
        return self.call(expand, node, rows, operand.vocabulary_dim, width)

    def _replay(
        self, node: Node, operations: tuple[TensorOperation, ...], width: Any = None
    ) -> Node:
        """Apply operations to a node whose vocabulary dimension has size `width`."""
        for operation in operations:
            args = operation.args_for(node, width)
            node = self.call(operation.target, *args, **dict(operation.kwargs))
        return node

    def _to_last(self, node: Node, dim: int) -> Node:
        return node if dim == example(node).dim() - 1 else self.call(torch.movedim, node, dim, -1)

    def _from_last(self, node: Node, dim: int) -> Node:
        return node if dim == example(node).dim() - 1 else self.call(torch.movedim, node, -1, dim)
