"""Which reductions one operator computes, and where in the graph it stands.

Reductions of the same rows of the same logits share an operator, so that the logits are computed
once. It stands before the first node that needs it; a reduction of something that is not known
there gets an operator of its own.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.program.text import INDEXED, WEIGHTED, Name, Program, Reduction, Step
from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.expression import Apply, Leaf, Operand, leaves
from cce_inductor.patterns.language.logits import Call, Logits, TensorOperation
from cce_inductor.patterns.language.rows import (
    AtRows,
    Statistic,
    is_reduced,
    is_sum,
    parts,
    rest_of,
)
from cce_inductor.rewriting.found import FoundLoss, Walk


class Group:
    """Reductions that one operator computes.

    Attributes:
        logits: the rows that it sees.
        anchor: the node before which it stands.
        level: 0, or one more than that of the groups whose results it reads.
        operands: those of the program; a statistic stands for its index.
        hoisted: nodes that are moved before the operator, in order.
        first, results: the first node built for the operator, and itself, once they are.
        outputs: the nodes of its results.
    """

    def __init__(self, logits: Logits, anchor: Node, level: int):
        self.logits = logits
        self.anchor = anchor
        self.level = level
        self.statistics: list[Statistic] = []
        self.operands: list[Operand | Statistic] = []
        self.hoisted: list[Node] = []
        self.first: Node | None = None
        self.results: Node | None = None
        self.outputs: dict[int, Node] = {}
        self._steps: dict[str, Step] = {}
        self._reductions: dict[str, Reduction] = {}
        self._names: dict[int, tuple[Apply, Name]] = {}  # of an expression, by its identity

    def add(self, statistic: Statistic) -> None:
        self.statistics.append(statistic)
        reduction = self._reduction(statistic)
        if reduction.kind in WEIGHTED:
            self._reductions.setdefault(str(reduction.weights), reduction.weights)
        self._reductions.setdefault(str(reduction), reduction)

    def output(self, statistic: Statistic) -> int:
        """Which of the operator's results a statistic is."""
        wanted = str(self._reduction(statistic))
        first = {str(reduction): at for at, reduction in self.program.outputs}
        return first[wanted] + statistic.output

    @property
    def program(self) -> Program:
        return Program(tuple(self._steps.values()), tuple(self._reductions.values()))

    def check_derivative(self) -> None:
        """Raises NotPointwiseError if the program's derivative is not made of pointwise
        operators, as that of each step is."""
        dtypes = [
            example(operand.source).dtype
            if isinstance(operand, Operand) and isinstance(operand.source, Node)
            else torch.float64
            for operand in self.operands
        ]
        derivative(self.program, [torch.empty((), dtype=dtype) for dtype in dtypes])

    @property
    def skip_ignored(self) -> bool:
        """Whether nobody looks at the results of rows all of whose targets are ignored."""
        ignored = {s.ignored for s in self.statistics}
        targets = {(s.index, *s.constants) for s in self.statistics if s.kind == "target"}
        return None not in ignored and ignored == targets

    def _reduction(self, statistic: Statistic) -> Reduction:
        args: list[Any] = [self.name(value) for value in statistic.values]
        if statistic.kind in INDEXED:
            args.append(self._operand_name("r", statistic))
        return Reduction(statistic.kind, (*args, *statistic.constants))

    def _operand_name(self, kind: str, operand: Operand | Statistic) -> Name:
        for position, known in enumerate(self.operands):
            if _same_operand(known, operand):
                return Name(f"{kind}{position}")
        self.operands.append(operand)
        return Name(f"{kind}{len(self.operands) - 1}")

    def name(self, value: Any) -> Any:
        """The name of an expression in the program, whose steps it adds."""
        if isinstance(value, Leaf):
            return Name(value.name)
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
            # The difference of two large numbers must not be that of their roundings.
            for argument, target in zip(value.args, ("add.Tensor", value.target), strict=True):
                rest = self._rest(argument)
                if rest is not None:
                    name = self._step(target, (name, self.name(rest)), ())
        return name

    def _step(self, target: str, args: tuple[Any, ...], kwargs: tuple[Any, ...]) -> Name:
        step = Step(Name(f"t{len(self._steps)}"), target, args, kwargs)
        return self._steps.setdefault(step.call, step).name

    def _rest(self, argument: Any) -> Operand | None:
        """Of a late value what the program's numbers cannot hold; None for anything else."""
        if self.logits.compute_dtype == torch.float64:
            return None
        if not isinstance(argument, Operand) or argument.kind != "r":
            return None
        if not is_sum(argument.source):
            return None
        return dataclasses.replace(argument, source=rest_of(argument.source))


def _same_operand(first: Operand | Statistic, second: Operand | Statistic) -> bool:
    if isinstance(first, Statistic) or isinstance(second, Statistic):
        if not (isinstance(first, Statistic) and isinstance(second, Statistic)):
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
    if isinstance(first, (Node, Statistic, AtRows)):
        return first is second
    return type(first) is type(second) and bool(first == second)


def plan(chosen: list[FoundLoss], found: Walk) -> list[Group]:
    """Puts every statistic that the losses need into a group."""
    planner = _Planner(found)
    for each in chosen:
        for part in parts(each.result):
            if isinstance(part, Statistic):
                planner.place(part, each)
    return planner.groups


class _Planner:
    def __init__(self, found: Walk):
        self.found = found
        self.groups: list[Group] = []
        self.of_statistic: dict[int, Group] = {}

    def place(self, statistic: Statistic, consumer: FoundLoss) -> None:
        if id(statistic) in self.of_statistic:
            return
        logits, level = _base(statistic.logits), self._level(statistic)
        for group in self.groups:
            if _joins(group.logits, logits) and group.level == level:
                hoisted = self._hoisted(statistic, group.anchor, consumer)
                if hoisted is not None:
                    group.hoisted += [node for node in hoisted if node not in group.hoisted]
                    break
        else:
            group = Group(logits, self._anchor(statistic, consumer), level)
            self.groups.append(group)
        group.add(statistic)
        self.of_statistic[id(statistic)] = group

    def _level(self, statistic: Statistic) -> int:
        inner = [part for part in parts(statistic)[:-1] if isinstance(part, Statistic)]
        return max((self.of_statistic[id(part)].level + 1 for part in inner), default=0)

    def _anchor(self, statistic: Statistic, consumer: FoundLoss) -> Node:
        """The consumer's place, or where gradients were switched off before it: what comes before
        that may be shared with consumers that need them."""
        node = consumer.place
        if not self._is_off(statistic.logits.projection.node):
            while self._is_off(node):
                node = node.prev
        return node if self._hoisted(statistic, node, consumer) == [] else consumer.place

    def _is_off(self, node: Node) -> bool:
        return self.found.gradient_mode[node] is False

    def _hoisted(
        self, statistic: Statistic, anchor: Node, consumer: FoundLoss
    ) -> list[Node] | None:
        """The nodes to move before `anchor`, so that all that a statistic reads is there as its
        consumer sees it; None if that cannot be, or gradients are off there."""
        position = self.found.position
        value = torch.utils._pytree.tree_leaves(example(consumer.node))[0]
        if self._is_off(anchor) and isinstance(value, torch.Tensor) and value.requires_grad:
            return None
        operands = [leaf for v in statistic.values for leaf in leaves(v)]
        if anchor is not consumer.place and any(
            isinstance(leaf, Operand) and is_reduced(leaf.source) for leaf in operands
        ):
            return None
        hoisted: list[Node] = []
        pending = [node for node, _ in statistic.reads]
        while pending:
            node = pending.pop()
            if self.found.mutation_between(node, position[anchor], position[consumer.place]):
                return None
            if position[node] >= position[anchor]:
                if not _may_move(node):
                    return None
                hoisted.append(node)
                pending += node.all_input_nodes
        return sorted(set(hoisted), key=lambda node: position[node])


_MOVABLE_NAMES = (
    "view",
    "reshape",
    "flatten",
    "getitem",
    "contiguous",
    "unsqueeze",
    "squeeze",
    "transpose",
    "t",
    "permute",
    "clone",
    "expand",
    "to",
    "long",
    "int",
    "clamp",
    "clamp_min",
    "clamp_max",
    "where",
    "masked_fill",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and_",
    "or_",
    "invert",
    "bitwise_not",
    "logical_not",
    "detach",
)
_MOVABLE = frozenset(
    [
        *_MOVABLE_NAMES,  # methods
        *(
            getattr(module, name)
            for module in (torch, torch.Tensor, operator)
            for name in _MOVABLE_NAMES
            if hasattr(module, name)
        ),
    ]
)


def _may_move(node: Node) -> bool:
    """Whether an earlier place makes no difference: indices, reshaped or masked."""
    value = example(node)
    return (
        node.target in _MOVABLE
        and isinstance(value, torch.Tensor)
        and not value.is_floating_point()
    )


def _base(logits: Logits) -> Logits:
    """The same rows before the last operations that only reshape them."""
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
