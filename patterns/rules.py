"""The three tables of rules and the decorators that fill them.

A rule is a function with the signature of the operation it stands for, after a `Site` that knows
the node. It is registered for the ways in which a graph spells the operation: functions by
themselves, methods by name.

- *projection* makes logits: returns `Logits`, or None when the operation is something else.
- *transform* keeps logits logits: returns the `Logits` after the operation.
- *loss* consumes them: returns what replaces the node.

A rule raises `UnsupportedError` with a sentence that says why the operation cannot be followed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.fx import Node

from .logits import Logits

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

    def items(self) -> list[tuple[Spelling, Rule]]:
        return list(self._rules.items())


projection = Table("projection")
transform = Table("transform")
loss = Table("loss")


class Site:
    """A node as rules see it: its arguments' examples, and which of them are logits."""

    def __init__(self, node: Node, logits: dict[Node, Logits]):
        self.node = node
        self._logits = logits

    def apply(self, rule: Rule) -> Any:
        """Calls `rule` with the node's arguments.

        Raises:
            UnsupportedError: the rule's own, or the arguments do not fit its signature.
        """
        try:
            bound = inspect.signature(rule).bind(self, *self.node.args, **self.node.kwargs)
        except TypeError as error:
            raise UnsupportedError(f"it is called in an unknown way ({error})") from None
        return rule(*bound.args, **bound.kwargs)

    def logits(self, argument: Any) -> Logits:
        """The logits that `argument` holds.

        Raises:
            UnsupportedError: it holds none, so the logits are another argument.
        """
        if not self.is_logits(argument):
            raise UnsupportedError("the logits are not its first operand")
        return self._logits[argument]

    def is_logits(self, argument: Any) -> bool:
        return isinstance(argument, Node) and argument in self._logits

    @property
    def example(self) -> torch.Tensor:
        """The fake tensor that Dynamo computed for the node's result."""
        return tensor_example(self.node)

    def unsupported(self, why: str) -> NoReturn:
        raise UnsupportedError(why)


def example(argument: Any) -> Any:
    """The example value of a node, anything else as it is; None for a node that has none."""
    if isinstance(argument, Node):
        return argument.meta.get("example_value", argument.meta.get("val"))
    return argument


def tensor_example(argument: Any) -> torch.Tensor:
    """The example of a node that must hold a tensor.

    Raises:
        UnsupportedError: it holds something else, or nobody knows what.
    """
    value = example(argument)
    if not isinstance(value, torch.Tensor):
        raise UnsupportedError(f"{argument} is not a tensor")
    return value


def is_tensor(argument: Any) -> bool:
    return isinstance(example(argument), torch.Tensor)


def constant(argument: Any) -> float:
    """A Python number, also one that `dynamic=True` made symbolic (which then is guarded on).

    Raises:
        UnsupportedError: `argument` is not a number.
    """
    value = example(argument)
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnsupportedError("it has an operand that is a tensor, not a number")
    return float(value)


def dimension(dim: Any, rank: int) -> int:
    """A dimension counted from the front.

    Raises:
        UnsupportedError: `dim` is not a plain int.
    """
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise UnsupportedError("its dimension is not a constant")
    return dim + rank if dim < 0 else dim
