"""A node as rules see it: its arguments, and which of them hold logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.fx import Node

from cce_inductor.patterns.language.examples import arguments_of, dimension, tensor_example
from cce_inductor.patterns.language.expression import Expression, operands_of
from cce_inductor.patterns.language.logits import Logits, Stack, Value
from cce_inductor.patterns.language.rows import RowStatistic, parts
from cce_inductor.patterns.language.tables import Rule, UnsupportedError
from cce_inductor.patterns.language.transposed import transposed_logits
from cce_inductor.reporting import reasons
from cce_inductor.reporting.reasons import Reason

_NUMPY_NAMES = {
    "axis": "dim",
    "keepdims": "keepdim",
    "x": "input",
    "a": "input",
    "x1": "input",
    "x2": "other",
}
"""NumPy's names of arguments, which PyTorch accepts for its own (see
``numpy_compatibility_arg_names`` in its ``python_arg_parser.cpp``)."""


class Site:
    """A node as rules see it: its arguments, and which of them hold logits.

    Args:
        node: the node.
        values: what the walk knows of each node whose result is logits.
        is_late: whether a node is computed from a loss or a reduction of these logits.
        is_changed: whether a tensor was changed in place since its node computed it.
        is_stored: whether logits will be computed in any case, so that other logits read them as a
            stored tensor.

    Attributes:
        stored: logits that the rule reads as a stored tensor, which keeps their projection.
        looked_through: nodes that the rule did not read because it reads what they are computed
            from. They are erased if nothing else uses them.
        blocks: what `read` knows of tensors as large as the logits: their expression, or None.
    """

    def __init__(
        self,
        node: Node,
        values: dict[Node, Value],
        is_late: Callable[[Node, Logits], bool] = lambda node, logits: False,
        is_changed: Callable[[Node], bool] = lambda node: False,
        is_stored: Callable[[Logits], bool] = lambda logits: False,
    ):
        self.node = node
        self.is_changed = is_changed
        self.is_stored = is_stored
        self.stored: list[Node] = []
        self.looked_through: list[Node] = []
        self.blocks: dict[Node, Expression | None] = {}
        self._values = values
        self._is_late = is_late
        # The shapes of logits that no argument holds.
        self._shapes: list[tuple[Logits, tuple[Any, ...]]] = []

    def at_argument(self, argument: Node, logits: Logits, shape: tuple[Any, ...]) -> Site:
        """Return a site for the node that computes an argument, where `logits` have this shape."""
        site = self._site(argument, self._values)
        site._shapes.append((logits, shape))
        site.blocks = self.blocks
        return site

    def with_logits(self, argument: Node, logits: Logits) -> Site:
        """Return a site for the same node, with other logits in an argument."""
        return self._site(self.node, {**self._values, argument: logits})

    def _site(self, node: Node, values: dict[Node, Value]) -> Site:
        return Site(node, values, self._is_late, self.is_changed, self.is_stored)

    def apply(self, rule: Rule, *first: Any) -> Any:
        """Call `rule` with `first` and the node's arguments (see `arguments_of`).

        Raises:
            UnsupportedError: the rule's own, or the arguments do not fit its signature.
        """
        signature = inspect.signature(rule)
        args, kwargs = arguments_of(self.node)
        named = {
            name if name in signature.parameters else _NUMPY_NAMES.get(name, name): value
            for name, value in kwargs.items()
        }
        try:
            bound = signature.bind(self, *first, *args, **named)
        except TypeError as error:
            raise UnsupportedError(reasons.unknown_call(error)) from None
        return rule(*bound.args, **bound.kwargs)

    def logits(self, argument: Any) -> Logits:
        """Return the logits that an argument holds.

        Raises:
            UnsupportedError: it holds none: the logits are another argument.
        """
        value = self._value(argument)
        if isinstance(value, Stack):
            raise UnsupportedError(reasons.MIXES_PROJECTIONS)
        if not isinstance(value, Logits):
            raise UnsupportedError(reasons.LOGITS_NOT_FIRST)
        return value

    def is_logits(self, argument: Any) -> bool:
        """Whether an argument holds logits, not several of them."""
        return isinstance(self._value(argument), Logits)

    def holds_logits(self, argument: Any) -> bool:
        """Whether an argument holds logits, a tuple of logits or stacked logits."""
        return self._value(argument) is not None

    def several(self, argument: Any) -> tuple[Logits, ...] | None:
        """Return the logits in a tuple, as `split` returns one; None if it is no tuple of them."""
        value = self._value(argument)
        return value if isinstance(value, tuple) else None

    def stack(self, argument: Any) -> Stack | None:
        """Return the stacked logits that an argument holds, None if it holds none."""
        value = self._value(argument)
        return value if isinstance(value, Stack) else None

    def _value(self, argument: Any) -> Value | None:
        return self._values.get(argument) if isinstance(argument, Node) else None

    def is_late(self, expression: Any, logits: Logits) -> bool:
        """Whether an expression reads a value that is reduced from the same logits."""
        return any(
            isinstance(part, RowStatistic)
            or (isinstance(part, Node) and self._is_late(part, logits))
            for operand in operands_of(expression)
            for part in parts(operand.source)
        )

    def over_vocabulary(self, logits: Logits, dim: Any) -> Logits:
        """Return the logits with the vocabulary in `dim`.

        These are the logits themselves, or for a matrix of two kinds of rows (contrastive
        learning) its transpose, whose vocabulary is what the rows were.

        Raises:
            UnsupportedError: `dim` is a dimension of rows.
        """
        rank = len(self.shape_of(logits))
        if dim is None or isinstance(dim, (tuple, list)):
            dims = dim or range(rank)
            if len(dims) != 1:
                self.unsupported(reasons.REDUCES_ROWS_AND_VOCABULARY)
            (dim,) = dims
        dim = dimension(dim, rank)
        if dim == logits.vocabulary_dim:
            return logits
        transposed = transposed_logits(logits)
        if transposed is None or transposed.vocabulary_dim != dim:
            self.unsupported(reasons.REDUCES_ROWS)
        self._shapes.append((transposed, self.shape_of(logits)))
        return transposed

    def fixed_vocabulary(self, logits: Logits) -> int:
        """Return the size of a vocabulary that is the same in every call.

        Raises:
            UnsupportedError: it may differ in the next call.
        """
        if not isinstance(logits.vocabulary, int):
            self.unsupported(reasons.VOCABULARY_MAY_DIFFER)
        return logits.vocabulary

    def shape_of(self, logits: Logits) -> tuple[Any, ...]:
        """Return the shape of logits that an argument holds, or that this site was asked for."""
        for argument in self.node.all_input_nodes:
            if self._values.get(argument) is logits:
                return tuple(tensor_example(argument).shape)
        for known, shape in self._shapes:
            if known is logits:
                return shape
        raise AssertionError("these logits are not an argument of the node")

    @property
    def function(self) -> Callable[..., Any]:
        """The function that the node calls with its arguments.

        Raises:
            UnsupportedError: it calls neither a function nor a method of tensors.
        """
        target = self.node.target
        if self.node.op == "call_method":
            method: Callable[..., Any] = getattr(torch.Tensor, str(target))
            return method
        if self.node.op != "call_function" or not callable(target):
            self.unsupported(reasons.WITHOUT_RULE)
        if isinstance(target, torch._ops.HigherOrderOperator):
            self.unsupported(reasons.NOT_FOLLOWED)
        return target

    @property
    def example(self) -> torch.Tensor:
        """The fake tensor that Dynamo computed for the node's result."""
        return tensor_example(self.node)

    def unsupported(self, reason: Reason) -> NoReturn:
        """Raise an `UnsupportedError`."""
        raise UnsupportedError(reason)
