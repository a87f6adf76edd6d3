"""The tables of rules, the decorators that fill them, and what a rule can ask.

A rule is a function with the signature of the operation it stands for, after a `Site` that knows
the node. It is registered for the ways in which a graph spells the operation: functions by
themselves, methods by name.

- *projection* makes logits: returns `Logits`, or None when the operation is something else.
- *transform* keeps logits logits: returns the `Logits` after the operation. Pointwise functions
  need no rule.
- *reduction* makes one value of each row: returns what replaces the node.
- *loss* is a reduction that means a loss: one that is left alone is reported with the reason.
- *block* makes a tensor as large as logits of one that is not: called with the logits first,
  returns an `Expression` of them, in which nothing as large need be stored.

A rule raises `UnsupportedError` with a sentence that says why the operation cannot be followed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

Spelling = str | Callable[..., Any]
Rule = Callable[..., Any]


class UnsupportedError(Exception):
    """An operation on logits that has a rule, in a form that the rule cannot follow."""


class Table:
    """Rules by spelling."""

    def __init__(self, name: str):
        self.name = name
        self._rules: dict[Spelling, Rule] = {}

    def __call__(self, *spellings: Spelling) -> Callable[[Rule], Rule]:
        """Registers the decorated function for `spellings`: functions, or names of methods."""

        def register(rule: Rule) -> Rule:
            for spelling in spellings:
                if spelling in self._rules:
                    raise ValueError(f"{spelling} has a {self.name} rule already")
                self._rules[spelling] = rule
            return rule

        return register

    def get(self, node: Node) -> Rule | None:
        """The rule for the node's operation, if there is one."""
        if node.op not in ("call_function", "call_method"):
            return None
        return self._rules.get(node.target)

    def __contains__(self, spelling: Spelling) -> bool:
        return spelling in self._rules

    def items(self) -> list[tuple[Spelling, Rule]]:
        return list(self._rules.items())


projection = Table("projection")
transform = Table("transform")
reduction = Table("reduction")
loss = Table("loss")
block = Table("block")
TABLES = (projection, transform, reduction, loss, block)
