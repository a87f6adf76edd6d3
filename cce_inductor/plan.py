"""Which reductions one operator computes, and where in the graph it stands.

Reductions of the same rows of the same logits share an operator, so that the logits are computed
once. It stands before the first node that needs it; a reduction of something that is not known
there gets an operator of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from .kernels.program import INDEXED, Name, Program, call_text
from .location import operation
from .patterns import (
    Apply,
    Leaf,
    Logits,
    Operand,
    Statistic,
    TensorOperation,
    example,
    leaves,
    parts,
)
from .walk import FoundLoss, Walk


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
        self._steps: dict[str, Name] = {}
        self._reductions: list[str] = []
        self._outputs: dict[str, int] = {}
        self._count = 0

    def add(self, statistic: Statistic) -> None:
        self.statistics.append(statistic)
        names = [self._name(value) for value in statistic.values]
        if statistic.kind == "mean":
            self._reduction("logsumexp", (names[0],), 1)
        self._reduction(*self._call(statistic, names))

    def output(self, statistic: Statistic) -> int:
        """Which of the operator's results a statistic is."""
        names = [self._name(value) for value in statistic.values]
        kind, args, _ = self._call(statistic, names)
        return self._outputs[call_text(kind, args, ())] + statistic.output

    @property
    def program(self) -> str:
        steps = [f"{name} = {text}" for text, name in self._steps.items()]
        return "; ".join([*steps, *self._reductions])

    def check_derivative(self) -> None:
        """Raises NotPointwiseError if the program's derivative is not made of pointwise
        operators, as that of each step is."""
        dtypes = [
            example(operand.source).dtype
            if isinstance(operand, Operand) and isinstance(operand.source, Node)
            else torch.float64
            for operand in self.operands
        ]
        Program.parse(self.program).backward([torch.empty((), dtype=dtype) for dtype in dtypes])

    @property
    def skip_ignored(self) -> bool:
        """Whether nobody looks at the results of rows all of whose targets are ignored."""
        ignored = {s.ignored for s in self.statistics}
        targets = {(s.index, *s.constants) for s in self.statistics if s.kind == "target"}
        return None not in ignored and ignored == targets

    def _call(self, statistic: Statistic, names: list[Name]) -> tuple[str, tuple[Any, ...], int]:
        args: list[Any] = list(names)
        if statistic.kind in INDEXED:
            args.append(self._operand_name("r", statistic))
        args += statistic.constants
        return statistic.kind, tuple(args), 2 if statistic.kind in ("max", "topk") else 1

    def _reduction(self, kind: str, args: tuple[Any, ...], outputs: int) -> None:
        text = call_text(kind, args, ())
        if text not in self._outputs:
            self._outputs[text] = self._count
            self._reductions.append(text)
            self._count += outputs

    def _operand_name(self, kind: str, operand: Operand | Statistic) -> Name:
        for position, known in enumerate(self.operands):
            if _same_operand(known, operand):
                return Name(f"{kind}{position}")
        self.operands.append(operand)
        return Name(f"{kind}{len(self.operands) - 1}")

    def _name(self, value: Any) -> Any:
        """The name of an expression in the program, whose steps it adds."""
        if isinstance(value, Leaf):
            return Name(value.name)
        if isinstance(value, Operand):
            return self._operand_name(value.kind, value)
        if not isinstance(value, Apply):
            return _number(value)
        args = [self._name(argument) for argument in value.args]
        kwargs = [(name, self._name(argument)) for name, argument in value.kwargs]
        text = call_text(value.target, args, kwargs)
        return self._steps.setdefault(text, Name(f"t{len(self._steps)}"))


def _number(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return Name("nan")
    return value


def _same_operand(first: Operand | Statistic, second: Operand | Statistic) -> bool:
    if isinstance(first, Statistic) or isinstance(second, Statistic):
        if not (isinstance(first, Statistic) and isinstance(second, Statistic)):
            return False
        return (first.index, first.kind) == (second.index, second.kind)
    return (
        first.kind == second.kind
        and first.source is second.source
        and first.row_operations == second.row_operations
        and first.vocabulary_dim == second.vocabulary_dim
    )


def plan(chosen: list[FoundLoss], found: Walk) -> dict[int, Group]:
    """The group of every statistic, by the statistic's id."""
    planner = _Planner(found)
    for each in chosen:
        for part in parts(each.result):
            if isinstance(part, Statistic):
                planner.place(part, each.node)
    return planner.of_statistic


class _Planner:
    def __init__(self, found: Walk):
        self.found = found
        self.groups: list[Group] = []
        self.of_statistic: dict[int, Group] = {}

    def place(self, statistic: Statistic, consumer: Node) -> None:
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

    def _anchor(self, statistic: Statistic, consumer: Node) -> Node:
        """The consumer, or where gradients were switched off before it: what comes before that
        may be shared with consumers that need them."""
        node = consumer
        if not self._is_off(statistic.logits.projection.node):
            while self._is_off(node):
                node = node.prev
        return node if self._hoisted(statistic, node, consumer) == [] else consumer

    def _is_off(self, node: Node) -> bool:
        return self.found.gradient_mode[node] is False

    def _hoisted(self, statistic: Statistic, anchor: Node, consumer: Node) -> list[Node] | None:
        """The nodes to move before `anchor`, so that all that a statistic reads is there as its
        consumer sees it; None if that cannot be, or gradients are off there."""
        position = self.found.position
        value = torch.utils._pytree.tree_leaves(example(consumer))[0]
        if self._is_off(anchor) and isinstance(value, torch.Tensor) and value.requires_grad:
            return None
        operands = [leaf for v in statistic.values for leaf in leaves(v)]
        if anchor is not consumer and any(
            isinstance(leaf, Operand) and not isinstance(leaf.source, Node) for leaf in operands
        ):
            return None
        hoisted: list[Node] = []
        pending = _reads(statistic)
        while pending:
            node = pending.pop()
            if self.found.mutation_between(node, position[anchor], position[consumer]):
                return None
            if position[node] >= position[anchor]:
                if not _may_move(node):
                    return None
                hoisted.append(node)
                pending += node.all_input_nodes
        return sorted(set(hoisted), key=lambda node: position[node])


_MOVABLE = frozenset(
    [
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
    ]
)


def _may_move(node: Node) -> bool:
    """Whether an earlier place makes no difference: indices, reshaped or masked."""
    value = example(node)
    return (
        operation(node) in _MOVABLE
        and isinstance(value, torch.Tensor)
        and not value.is_floating_point()
    )


def _reads(statistic: Statistic) -> list[Node]:
    nodes = list(statistic.logits.projection.nodes)
    nodes += [node for op in statistic.logits.row_operations for node in op.nodes]
    for value in statistic.values:
        nodes += [
            leaf.source
            for leaf in leaves(value)
            if isinstance(leaf, Operand) and isinstance(leaf.source, Node)
        ]
    return [*nodes, *(part for part in parts(statistic.index) if isinstance(part, Node))]


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
