"""The tables of rules and the decorators that fill them.

A rule is a function with the signature of the operation that it stands for, preceded by a `Site`.
It is registered for every spelling of the operation in a graph: functions by themselves, methods by
name. What it may return is written down in `protocol`. For an operation that it cannot follow it
raises `UnsupportedError`, with a reason from `cce_inductor.reporting.reasons`.

- *projection*: makes logits.
- *transform*: turns logits into logits. Pointwise functions need no rule.
- *reduction*: makes one value of each row.
- *loss*: a reduction that is a loss function. If it is not rewritten, the reason is reported.
- *block*: makes a tensor as large as the logits out of smaller tensors. The result is an expression
  of the logits that it is combined with, so that the tensor need not be stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch.fx import Node

from cce_inductor.patterns.language.protocol import (
    BlockResult,
    LossResult,
    ProjectionResult,
    ReductionResult,
    TransformResult,
)
from cce_inductor.reporting.reasons import Reason

Spelling = str | Callable[..., Any]
Rule = Callable[..., Any]
Result = TypeVar("Result")


class UnsupportedError(Exception):
    """An operation has a rule, but the rule cannot follow this form of it."""

    def __init__(self, reason: Reason):
        super().__init__(reason)
        self.reason = reason


class Table(Generic[Result]):
    """Rules by spelling. A type checker verifies that each rule returns a `Result`."""

    def __init__(self, name: str):
        self.name = name
        self._rules: dict[Spelling, Rule] = {}

    def __call__(self, *spellings: Spelling) -> Callable[[Callable[..., Result]], Rule]:
        """Register the decorated function for `spellings`: functions, or names of methods."""

        def register(rule: Callable[..., Result]) -> Rule:
            for spelling in spellings:
                if spelling in self._rules:
                    raise ValueError(f"{spelling} has a {self.name} rule already")
                self._rules[spelling] = rule
            return rule

        return register

    def get(self, node: Node) -> Rule | None:
        """Return the rule for the node's operation, None if there is none."""
        if node.op not in ("call_function", "call_method"):
            return None
        return self._rules.get(node.target)

    def __contains__(self, spelling: Spelling) -> bool:
        return spelling in self._rules

    def items(self) -> list[tuple[Spelling, Rule]]:
        return list(self._rules.items())


projection = Table[ProjectionResult]("projection")
transform = Table[TransformResult]("transform")
reduction = Table[ReductionResult]("reduction")
loss = Table[LossResult]("loss")
block = Table[BlockResult]("block")
TABLES = (projection, transform, reduction, loss, block)
