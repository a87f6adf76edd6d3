"""Which statistics one operator computes, and where in the graph it stands.

Statistics of the same rows of the same logits share an operator, so that the logits are computed
once. The operator stands before the first node that needs one of them. A statistic of a tensor that
is not available there gets an operator of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.kernels import sampling, stored
from cce_inductor.kernels.head import Head
from cce_inductor.kernels.names import Name, OperandKind
from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.program.text import Program, Step
from cce_inductor.kernels.statistics.base import Statistic
from cce_inductor.kernels.statistics.indexed import Indexed
from cce_inductor.kernels.statistics.target import Target
from cce_inductor.options import Options
from cce_inductor.patterns.language.examples import example, is_exactly
from cce_inductor.patterns.language.expression import Apply, Leaf, Operand
from cce_inductor.patterns.language.logits import (
    Call,
    Logits,
    TensorOperation,
    origins_of,
    same_logits,
)
from cce_inductor.patterns.language.rows import (
    AtRows,
    RowStatistic,
    is_sum,
    parts,
    rest_of,
)
from cce_inductor.patterns.operations import may_move
from cce_inductor.rewriting.findings import Consumer, Findings
from cce_inductor.torch_internals import cuda_graphs


class Group:
    """Statistics that one operator computes.

    Attributes:
        logits: the logits whose rows the operator reads.
        anchor: the node before which the operator stands.
        level: one more than the highest level of the groups whose results it reads, 0 if none.
        gradients_off: whether the graph has disabled gradients there.
        statistics: the statistics that it computes.
        operands: the operands of the program by the position of their first tensor; a statistic
            stands for its index.
        hoisted: the nodes that are moved before the operator, in order.
        first: the first node that was built for the operator, None before it is built.
        results: the node of the operator, None before it is built.
        outputs: the nodes of the operator's results, by position.
    """

    def __init__(self, logits: Logits, anchor: Node, level: int, *, gradients_off: bool = False):
        self.logits = logits
        self.anchor = anchor
        self.level = level
        self.gradients_off = gradients_off
        self.statistics: list[RowStatistic] = []
        self.operands: dict[int, Operand | RowStatistic] = {}
        self.hoisted: list[Node] = []
        self.first: Node | None = None
        self.results: Node | None = None
        self.outputs: dict[int, Node] = {}
        self._steps: dict[str, Step] = {}
        self._outputs: dict[str, Statistic] = {}
        self._names: dict[int, tuple[Apply, Name]] = {}  # by the identity of the expression

    def add(self, statistic: RowStatistic) -> None:
        """Make the operator compute a statistic."""
        self.statistics.append(statistic)
        output = self._output(statistic)
        for each in (*output.requirements, output):
            self._outputs.setdefault(str(each), each)

    def output(self, statistic: RowStatistic) -> int:
        """Return the position of a statistic among the operator's results."""
        wanted = str(self._output(statistic))
        first = {str(output): place.start for place, output in self.program.places}
        return first[wanted] + statistic.output

    @property
    def program(self) -> Program:
        return Program(tuple(self._steps.values()), tuple(self._outputs.values()))

    def check_derivative(self) -> None:
        """Check that the derivative of the program is made of pointwise operators.

        Raises:
            NotPointwiseError: it is not, although the derivative of each step is.
        """
        derivative(self.program, self._dtype_examples)

    @property
    def is_recorded(self) -> bool:
        """Whether the operator is to be recorded for a CUDA graph."""
        return cuda_graphs.will_record(self._device)

    @property
    def _device(self) -> torch.device:
        return example(self.logits.projection.node).device

    def reason_against_sampling(self) -> str | None:
        """Return why the gradient is exact although `sample_below` is greater than 0; None if it is
        sampled."""
        if self.is_recorded:
            return "CUDA graphs repeat launches of the same sizes, and samples differ in size"
        wanted = [
            name
            for name in self.program.operands
            if isinstance(operand := self.operands.get(name.position), Operand)
            and isinstance(operand.source, Node)
            and example(operand.source).requires_grad
        ]
        return sampling.reason_against(
            self.program, self.logits.vocabulary, self._dtype_examples, self._device.type, wanted
        )

    def stored_bytes(self, options: Options) -> int:
        """Return the bytes of the logits that the forward stores for the backward."""
        logits, projection = self.logits, self.logits.projection
        like = example(projection.node)
        has_gradient = like.requires_grad and not self.gradients_off
        has_room = stored.room(options.workspace_bytes) > 0
        if not has_gradient or not has_room or not isinstance(logits.vocabulary, int):
            return 0
        bias = example(projection.linear_bias)
        head = Head(
            like.new_empty(logits.vocabulary, 0),
            None if bias is None else bias.new_empty(logits.vocabulary),
            self._dtype_examples,
            self.program,
            self.skip_ignored,
            logits.compute_dtype,
            options.workspace_bytes,
            options.sample_below,
        )
        rows = self._row_count(like)
        return stored.stored_bytes(stored.with_stored_tiles(head, rows), rows)

    def _row_count(self, result: torch.Tensor) -> int | torch.SymInt:
        """Return the number of rows that the operator reads, of the result of the projection.

        The example of a result that was transposed in place shows its last shape. Then all of its
        rows are counted, also those that are not read.
        """
        logits, projection = self.logits, self.logits.projection
        dim, vocabulary = projection.vocabulary_dim, projection.vocabulary
        if dim >= result.dim() or not is_exactly(result.shape[dim], vocabulary):
            return result.numel() // vocabulary
        # One column for each row is enough.
        rows = result.new_empty([*result.shape[:dim], 1, *result.shape[dim + 1 :]])
        for operation in logits.row_operations:
            args, kwargs = torch.fx.map_arg(
                (operation.args_for(rows, 1), dict(operation.kwargs)), example
            )
            rows = operation.target(*args, **kwargs)
        return rows.numel()

    @property
    def _dtype_examples(self) -> list[torch.Tensor]:
        """Tensors with the dtypes of the operands."""
        return [
            torch.empty((), dtype=_dtype(operand))
            for operand in self.operands.values()
            for _ in range(_tensors(operand))
        ]

    @property
    def origins(self) -> set[Node]:
        """The nodes whose matrix products the operator replaces."""
        read = (each for statistic in self.statistics for each in statistic.projections)
        return set(origins_of(read))

    @property
    def skip_ignored(self) -> bool:
        """Whether nothing reads the results of rows whose targets are ignored."""
        ignored = {s.ignored for s in self.statistics}
        targets = {(s.index, *s.constants) for s in self.statistics if s.kind is Target}
        return None not in ignored and ignored == targets

    def _output(self, statistic: RowStatistic) -> Statistic:
        args: list[Any] = [self.name(value) for value in statistic.values]
        if issubclass(statistic.kind, Indexed):
            args.append(self._operand_name(OperandKind.ROW, statistic))
        return statistic.kind((*args, *statistic.constants))

    def _operand_name(self, kind: OperandKind, operand: Operand | RowStatistic) -> Name:
        for position, known in self.operands.items():
            if _same_operand(known, operand):
                return Name(f"{kind}{position}")
        position = sum(map(_tensors, self.operands.values()))
        self.operands[position] = operand
        return Name(f"{kind}{position}")

    def name(self, value: Any) -> Any:
        """Return the name of an expression in the program, and add the steps that compute it."""
        if isinstance(value, Leaf):
            return value.name
        if isinstance(value, Operand):
            return self._operand_name(value.kind, value)
        if not isinstance(value, Apply):
            return value
        if id(value) not in self._names:
            self._names[id(value)] = value, self._step_name(value)
        return self._names[id(value)][1]

    def _step_name(self, value: Apply) -> Name:
        args = tuple(self.name(argument) for argument in value.args)
        kwargs = tuple((name, self.name(argument)) for name, argument in value.kwargs)
        name = self._step(value.target, args, kwargs)
        if value.target in ("add.Tensor", "sub.Tensor") and not value.kwargs:
            # Late operands are float64 and the steps are float32: add what rounding took away.
            for argument, target in zip(value.args, ("add.Tensor", value.target), strict=True):
                rest = self._rest(argument)
                if rest is not None:
                    name = self._step(target, (name, self.name(rest)), ())
        return name

    def _step(self, target: str, args: tuple[Any, ...], kwargs: tuple[Any, ...]) -> Name:
        step = Step(Name(f"t{len(self._steps)}"), target, args, kwargs)
        return self._steps.setdefault(step.call, step).name

    def _rest(self, argument: Any) -> Operand | None:
        """Return what float32 cannot hold of a late operand, None for anything else."""
        if self.logits.compute_dtype == torch.float64:
            return None
        if not isinstance(argument, Operand) or argument.kind is not OperandKind.ROW:
            return None
        if not is_sum(argument.source):
            return None
        return dataclasses.replace(argument, source=rest_of(argument.source))


def _tensors(operand: Operand | RowStatistic) -> int:
    """Return the number of tensors that an operand of a program consists of."""
    return operand.kind.tensors if isinstance(operand, Operand) else 1


def _dtype(operand: Operand | RowStatistic) -> torch.dtype:
    """Return the dtype of an operand, or one that is like it if it is computed from statistics."""
    source = operand.source if isinstance(operand, Operand) else None
    while isinstance(source, AtRows):
        source = source.operand.source
    if isinstance(source, Call) and source.target is torch.unsqueeze:
        source = source.args[0]
    return example(source).dtype if isinstance(source, Node) else torch.float64


def _same_operand(first: Operand | RowStatistic, second: Operand | RowStatistic) -> bool:
    if isinstance(first, RowStatistic) or isinstance(second, RowStatistic):
        if not (isinstance(first, RowStatistic) and isinstance(second, RowStatistic)):
            return False
        return (first.index, first.kind) == (second.index, second.kind)
    return (
        first.kind == second.kind
        and _same_source(first.source, second.source)
        and first.row_operations == second.row_operations
        and first.vocabulary_dim == second.vocabulary_dim
    )


def _same_source(first: Any, second: Any) -> bool:
    if isinstance(first, Call) and isinstance(second, Call):
        first, second = ((c.target, c.args, c.kwargs) for c in (first, second))
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_same_source, first, second))
    if isinstance(first, AtRows) and isinstance(second, AtRows):
        return first.operand is second.operand and same_logits(first.logits, second.logits)
    if isinstance(first, RowStatistic) and isinstance(second, RowStatistic):
        return first is second or _same_statistic(first, second)
    if isinstance(first, (Node, RowStatistic)):
        return first is second
    return type(first) is type(second) and bool(first == second)


def _same_statistic(first: RowStatistic, second: RowStatistic) -> bool:
    """Return whether two statistics are the same function of the same logits."""
    known: dict[tuple[int, int], bool] = {}

    def same(one: Any, other: Any) -> bool:
        if one is other or not (isinstance(one, Apply) and isinstance(other, Apply)):
            if isinstance(one, Operand) and isinstance(other, Operand):
                return _same_operand(one, other)
            return one is other or (type(one) is type(other) and bool(one == other))
        key = id(one), id(other)
        if key not in known:
            known[key] = (
                (one.target, one.kwargs) == (other.target, other.kwargs)
                and len(one.args) == len(other.args)
                and all(map(same, one.args, other.args))
            )
        return known[key]

    return (
        (first.kind, first.constants, first.output)
        == (second.kind, second.constants, second.output)
        and first.index is second.index
        and first.ignored == second.ignored
        and same_logits(first.logits, second.logits)
        and first.logits.compute_dtype == second.logits.compute_dtype
        and len(first.values) == len(second.values)
        and all(map(same, first.values, second.values))
    )


class Placed:
    """The group of each statistic: one whose results have a gradient, and maybe one that has none.

    The latter is that of a consumer in ``no_grad``, where the statistic could not be computed
    before.
    """

    def __init__(self, groups: Sequence[Group] = ()) -> None:
        self._groups: dict[tuple[int, bool], Group] = {}
        for group in groups:
            for statistic in group.statistics:
                self.add(statistic, group)

    def add(self, statistic: RowStatistic, group: Group) -> None:
        self._groups[id(statistic), group.gradients_off] = group

    def get(self, statistic: RowStatistic, *, gradients_off: bool) -> Group | None:
        """Return the group whose results are read where gradients are on or off."""
        group = self._groups.get((id(statistic), False))
        if group is None and gradients_off:
            group = self._groups.get((id(statistic), True))
        return group


def plan(chosen: list[Consumer], findings: Findings) -> list[Group]:
    """Put every statistic that the chosen consumers need into a group."""
    planner = _Planner(findings)
    for consumer in chosen:
        for statistic in consumer.statistics:
            planner.place(statistic, consumer)
    return planner.groups


class _Planner:
    def __init__(self, findings: Findings):
        self.findings = findings
        self.groups: list[Group] = []
        self.placed = Placed()

    def place(self, statistic: RowStatistic, consumer: Consumer) -> None:
        """Add a statistic that a consumer needs to a group, or to a new one."""
        gradients_off = self._is_off(consumer.place)
        if self.placed.get(statistic, gradients_off=gradients_off) is not None:
            return
        logits, level = _base(statistic.logits), self._level(statistic, consumer)
        for group in self.groups:
            if _joins(group.logits, logits) and group.level == level:
                hoisted = self._hoisted(statistic, group.anchor, consumer)
                if hoisted is not None:
                    group.hoisted += [node for node in hoisted if node not in group.hoisted]
                    break
        else:
            anchor = self._anchor(statistic, consumer)
            group = Group(logits, anchor, level, gradients_off=self._is_off(anchor))
            self.groups.append(group)
        group.add(statistic)
        self.placed.add(statistic, group)

    def _level(self, statistic: RowStatistic, consumer: Consumer) -> int:
        """Return the level of a statistic's group: above those of the statistics that it reads."""
        return max((group.level + 1 for group in self._inner(statistic, consumer)), default=0)

    def _inner(self, statistic: RowStatistic, consumer: Consumer) -> list[Group]:
        """Return the groups of the statistics that a statistic reads."""
        gradients_off = self._is_off(consumer.place)
        inner = [part for part in parts(statistic)[:-1] if isinstance(part, RowStatistic)]
        groups = [self.placed.get(part, gradients_off=gradients_off) for part in inner]
        return [group for group in groups if group is not None]

    def _anchor(self, statistic: RowStatistic, consumer: Consumer) -> Node:
        """Return the node before which the operator of a statistic stands.

        This is the place of the consumer. If gradients are off there, it is the place where they
        were switched off, so that consumers that need gradients can share the operator.
        """
        node = consumer.place
        if not self._is_off(statistic.logits.projection.node):
            while self._is_off(node):
                node = node.prev
        return node if self._hoisted(statistic, node, consumer) == [] else consumer.place

    def _is_off(self, node: Node) -> bool:
        """Return whether the graph has disabled gradients at a node."""
        return self.findings.gradient_mode[node] is False

    def _hoisted(
        self, statistic: RowStatistic, anchor: Node, consumer: Consumer
    ) -> list[Node] | None:
        """Return the nodes that must move before `anchor` for a statistic to be computed there.

        None if some of them cannot move, or if the consumer needs gradients and they are off there.
        """
        position = self.findings.position
        value = torch.utils._pytree.tree_leaves(example(consumer.node))[0]
        if self._is_off(anchor) and isinstance(value, torch.Tensor) and value.requires_grad:
            return None
        inner = [group.anchor for group in self._inner(statistic, consumer)]
        if any(position[each] > position[anchor] for each in inner):
            return None
        hoisted: list[Node] = []
        pending = [node for node, _ in statistic.reads]
        while pending:
            node = pending.pop()
            if self.findings.mutation_between(node, position[anchor], position[consumer.place]):
                return None
            if position[node] >= position[anchor]:
                if not may_move(node):
                    return None
                hoisted.append(node)
                pending += node.all_input_nodes
        return sorted(set(hoisted), key=lambda node: position[node])


def _base(logits: Logits) -> Logits:
    """Return the same rows before the last operations that only reshape them."""
    operations: tuple[TensorOperation, ...] = logits.row_operations
    while operations and operations[-1].reshapes:
        operations = operations[:-1]
    dim = operations[-1].vocabulary_dim if operations else logits.projection.vocabulary_dim
    return logits.replace(row_operations=operations, vocabulary_dim=dim)


def _joins(group: Logits, logits: Logits) -> bool:
    return (
        group.projection == logits.projection
        and group.compute_dtype == logits.compute_dtype
        and group.row_operations == logits.row_operations
    )
