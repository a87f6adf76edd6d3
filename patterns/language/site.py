"""A node as rules see it: what they can ask about its arguments, and what they can make of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.fx import Node

from cce_inductor.kernels.program.tracing import NotPointwiseError, RandomError
from cce_inductor.patterns.language.capture import capture
from cce_inductor.patterns.language.examples import (
    dimension,
    example,
    had_gradient,
    is_exactly,
    is_symbol,
    requires_grad,
    same_shape,
    same_size,
    tensor_example,
    with_fixed_number,
)
from cce_inductor.patterns.language.expression import (
    COLUMN,
    LOGIT,
    Apply,
    Expression,
    Operand,
    leaves,
    trains,
    where,
)
from cce_inductor.patterns.language.logits import HERE, Call, Logits, Stack, Value
from cce_inductor.patterns.language.rows import Statistic, parts
from cce_inductor.patterns.language.tables import Rule, UnsupportedError, block
from cce_inductor.reporting import reasons
from cce_inductor.reporting.reasons import Reason

_NUMPY = {
    "axis": "dim",
    "keepdims": "keepdim",
    "x": "input",
    "a": "input",
    "x1": "input",
    "x2": "other",
}
"""NumPy's names of arguments, which PyTorch takes wherever it has its own (see
``numpy_compatibility_arg_names`` in its ``python_arg_parser.cpp``)."""


class Site:
    """A node as rules see it: its arguments' examples, and which of them are logits.

    Args:
        node: the node.
        values: what each node holds that holds logits: `Logits`, or several in a tuple.
        is_late: whether a node is computed from a loss or reduction of these logits.
        is_changed: whether a tensor was changed in place since a node made it.
    """

    def __init__(
        self,
        node: Node,
        values: dict[Node, Value],
        is_late: Callable[[Node, Logits], bool] = lambda node, logits: False,
        is_changed: Callable[[Node], bool] = lambda node: False,
    ):
        self.node = node
        self._values = values
        self._is_late = is_late
        self.is_changed = is_changed
        self.stored: list[Node] = []
        """Logits that the rule reads as a stored tensor."""
        self.looked_through: list[Node] = []
        """What is computed from smaller tensors instead, of no use once its users are gone."""
        self._turned: list[tuple[Logits, tuple[Any, ...]]] = []  # with the shape of an argument
        self._made: dict[Node, Expression | None] = {}  # of smaller tensors

    def apply(self, rule: Rule, *first: Any) -> Any:
        """Calls `rule` with `first` and the node's arguments.

        Raises:
            UnsupportedError: the rule's own, or the arguments do not fit its signature.
        """
        signature = inspect.signature(rule)
        named = {
            name if name in signature.parameters else _NUMPY.get(name, name): value
            for name, value in self.node.kwargs.items()
        }
        try:
            bound = signature.bind(self, *first, *self.node.args, **named)
        except TypeError as error:
            raise UnsupportedError(reasons.unknown_call(error)) from None
        return rule(*bound.args, **bound.kwargs)

    def logits(self, argument: Any) -> Logits:
        """The logits that `argument` holds.

        Raises:
            UnsupportedError: it holds none, so the logits are another argument.
        """
        value = self._value(argument)
        if isinstance(value, Stack):
            raise UnsupportedError(reasons.MIXES_PROJECTIONS)
        if not isinstance(value, Logits):
            raise UnsupportedError(reasons.LOGITS_NOT_FIRST)
        return value

    def is_logits(self, argument: Any) -> bool:
        return isinstance(self._value(argument), Logits)

    def several(self, argument: Any) -> tuple[Logits, ...] | None:
        """The logits in a tuple of them, as `split` returns, None if `argument` is none."""
        value = self._value(argument)
        return value if isinstance(value, tuple) else None

    def stack(self, argument: Any) -> Stack | None:
        """The stacked logits that `argument` holds, None if it holds none."""
        value = self._value(argument)
        return value if isinstance(value, Stack) else None

    def _value(self, argument: Any) -> Value | None:
        return self._values.get(argument) if isinstance(argument, Node) else None

    def seeing(self, argument: Node, logits: Logits) -> Site:
        """The same place, with other logits in an argument."""
        return Site(self.node, {**self._values, argument: logits}, self._is_late, self.is_changed)

    def is_late(self, expression: Any, logits: Logits) -> bool:
        """Whether an expression reads what is reduced from the same logits before."""
        return any(
            isinstance(part, Statistic) or (isinstance(part, Node) and self._is_late(part, logits))
            for part in _sources(expression)
        )

    def over_vocabulary(self, logits: Logits, dim: Any) -> Logits:
        """The logits whose vocabulary is what `dim` counts: themselves, or for a matrix of two
        kinds of rows (contrastive learning), its transpose.

        Raises:
            UnsupportedError: `dim` counts rows.
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
        swapped = _swapped(logits)
        if swapped is None or swapped.vocabulary_dim != dim:
            self.unsupported(reasons.REDUCES_ROWS)
        self._turned.append((swapped, self.shape_of(logits)))
        return swapped

    def fixed_vocabulary(self, logits: Logits) -> int:
        """The size of a vocabulary that is the same in every call.

        Raises:
            UnsupportedError: it may be another in the next call.
        """
        if not isinstance(logits.vocabulary, int):
            self.unsupported(reasons.VOCABULARY_MAY_DIFFER)
        return logits.vocabulary

    def shape_of(self, logits: Logits) -> tuple[Any, ...]:
        for argument in self.node.all_input_nodes:
            if self._values.get(argument) is logits:
                return tuple(tensor_example(argument).shape)
        for turned, shape in self._turned:
            if turned is logits:
                return shape
        raise AssertionError("these logits are not an argument of the node")

    def operand(self, argument: Node, logits: Logits, shape: tuple[Any, ...]) -> Operand:
        """A tensor that is broadcast against logits of `shape`.

        Raises:
            UnsupportedError: it makes them larger, or is as large and needs a gradient.
        """
        value = tensor_example(argument)
        dim = logits.vocabulary_dim
        sizes = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
        if len(sizes) > len(shape):
            self.unsupported(reasons.BROADCAST_TO_MORE_DIMENSIONS)
        for size, expected in zip(sizes, shape, strict=True):
            if not is_exactly(size, 1) and not same_size(size, expected):
                self.unsupported(reasons.OPERAND_NOT_BROADCAST)
        over_rows = any(not is_exactly(size, 1) for at, size in enumerate(sizes) if at != dim)
        over_columns = not is_exactly(sizes[dim], 1)
        kind = {
            (False, False): "s",
            (True, False): "r",
            (False, True): "c",
            (True, True): "b",
        }[over_rows, over_columns]
        if kind == "s" and value.dim() > 0 and value.numel() != 1:
            self.unsupported(reasons.OPERAND_SIZE_UNKNOWN)
        if kind == "b" and value.requires_grad:
            self.unsupported(reasons.OPERAND_LARGE_WITH_GRADIENT)
        return Operand(kind, argument, logits.row_operations, dim, self.node)

    def pointwise(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Logits:
        """The logits after a pointwise function of them and of whatever broadcasts to them.

        Raises:
            UnsupportedError: it is not pointwise, or an operand does not fit.
        """
        nodes: list[Node] = []
        torch.fx.map_arg((args, kwargs), nodes.append)
        of_logits = [node for node in dict.fromkeys(nodes) if self.is_logits(node)]
        if not of_logits:
            self.unsupported(reasons.WITHOUT_RULE)
        # What needs a gradient cannot be read as a stored tensor.
        main = next((n for n in of_logits if tensor_example(n).requires_grad), of_logits[0])
        logits = self.logits(main)
        shape = tuple(tensor_example(main).shape)
        dtypes: list[torch.dtype | None] = [logits.compute_dtype]

        def meaning(node: Node) -> tuple[Any, torch.dtype]:
            dtypes.append(self._compute_dtype(node))
            return self.read(node, logits, shape), tensor_example(node).dtype

        expression = self.captured(function, args, kwargs, logits, meaning)
        is_number = isinstance(expression, (int, float))
        if had_gradient(self.node) and not trains(expression) and trains(logits.expression):
            # What was there has a gradient of 0, but it has one.
            always = Apply("ne.Scalar", (Apply("full_like", (LOGIT, 1.0)), 0))
            expression = where(always, expression, logits.expression)
        elif is_number:  # `zeros_like`, say
            expression = Apply("full_like", (LOGIT, float(expression)))
            if getattr(example(self.node), "dtype", None) == torch.bool:
                expression = Apply("ne.Scalar", (expression, 0))
        result = example(self.node)  # none for an assignment
        if getattr(result, "dtype", None) == torch.float64 or torch.float64 in dtypes:
            logits = logits.replace(compute_dtype=torch.float64)
        return logits.replace(expression=expression)

    def captured(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        logits: Logits,
        meaning: Callable[[Node], tuple[Any, torch.dtype]],
    ) -> Any:
        """The expression of a pointwise function, or a number; see `capture`.

        Args:
            logits: of which it is a function.
            meaning: for a tensor, the expression that it stands for, and its dtype.

        Raises:
            UnsupportedError: it is not pointwise.
        """
        args, kwargs = torch.fx.map_arg((args, kwargs), with_fixed_number)
        numbers: list[Node] = []

        def operand_of(node: Node) -> tuple[Any, torch.dtype]:
            if not is_symbol(node):
                return meaning(node)
            numbers.append(node)
            return self.number(node, logits), torch.float64

        try:
            return capture(function, args, kwargs, operand_of)
        except NotPointwiseError as why:
            if isinstance(why, RandomError) or _is_random(function):
                raise UnsupportedError(reasons.RANDOM) from None
            if numbers:
                return self._captured_of_tensors(function, args, kwargs, operand_of)
            raise UnsupportedError(reasons.not_pointwise(str(why))) from None

    def _captured_of_tensors(self, function: Any, args: Any, kwargs: Any, operand_of: Any) -> Any:
        """The same where each number is given as a tensor: some functions take no mixture."""
        try:
            return capture(function, args, kwargs, operand_of, numbers_as_tensors=True)
        except NotPointwiseError:
            raise UnsupportedError(reasons.NUMBER_MAY_DIFFER) from None

    def number(self, argument: Node | Call | int, logits: Logits) -> Operand:
        """A Python number that may be another in the next call, as an operand. Dynamo keeps its
        sum with a tensor symbolic."""
        device = tensor_example(logits.projection.node).device
        zero = Call(torch.zeros, ((),), (("dtype", torch.float64), ("device", device)))
        source = Call(torch.add, (zero, argument))
        return Operand("s", source, logits.row_operations, logits.vocabulary_dim, self.node)

    def read(
        self, argument: Node, logits: Logits, shape: tuple[Any, ...] | None = None
    ) -> Expression:
        """What an argument is in an expression of `logits`, whose shape the node's logits have
        if none is given.

        Raises:
            UnsupportedError: it does not fit.
        """
        shape = self.shape_of(logits) if shape is None else shape
        if self.is_logits(argument):
            other = self.logits(argument)
            if alike(other, logits) and same_shape(tensor_example(argument).shape, shape):
                return other.expression
            if set(other.projection.origins) & set(logits.projection.origins):
                self.unsupported(reasons.OTHER_ROWS_OF_SAME_LOGITS)
            self.stored.append(argument)
        elif argument in self._values:
            self.unsupported(reasons.TUPLE_OF_LOGITS)
        made = self._made_of_smaller(argument, logits, shape)
        if made is None or not (COLUMN in leaves(made) or tensor_example(argument).requires_grad):
            return self.operand(argument, logits, shape)
        # A rule's operation may also check its argument.
        self.looked_through += [
            node for node, of in self._made.items() if of and not block.get(node)
        ]
        return made

    def _made_of_smaller(
        self, argument: Node, logits: Logits, shape: tuple[Any, ...]
    ) -> Expression | None:
        """What makes a tensor as large as the logits, by `block` rules and pointwise functions of
        smaller tensors, which are read where it is made; None if there is no such thing."""
        value = tensor_example(argument)
        if (
            not same_shape(value.shape, shape)
            or argument in self._values
            or self.is_changed(argument)
        ):
            return None
        if argument not in self._made:
            site = Site(argument, self._values, self._is_late, self.is_changed)
            site._turned.append((logits, shape))
            site._made = self._made
            rule = block.get(argument)
            try:
                if rule is not None:
                    made = site.apply(rule, logits)
                else:
                    made = site._pointwise_block(logits, shape)
                has_gradient = any(map(requires_grad, _sources(made)))
                cut = has_gradient and not had_gradient(argument)
                self._made[argument] = detached(made) if cut else made
            except UnsupportedError:
                self._made[argument] = None
        return self._made[argument]

    def _pointwise_block(self, logits: Logits, shape: tuple[Any, ...]) -> Expression:
        node = self.node
        if node.op not in ("call_function", "call_method") or "out" in node.kwargs:
            self.unsupported(reasons.NOTHING_MAKES_IT)
        if any(map(self._moves, node.all_input_nodes)):
            self.unsupported(reasons.MOVES_ELEMENTS)
        by_method = node.op == "call_method"
        function = getattr(torch.Tensor, node.target) if by_method else node.target

        def meaning(argument: Node) -> tuple[Expression, torch.dtype]:
            made = self._made_of_smaller(argument, logits, shape)
            if made is None:
                made = self.operand(argument, logits, shape)
                if argument in self._values or made.kind == "b":
                    self.unsupported(reasons.MADE_OF_LARGE)
            return made, tensor_example(argument).dtype

        expression = self.captured(function, node.args, node.kwargs, logits, meaning)
        if not isinstance(expression, (Apply, Operand)):
            self.unsupported(reasons.CONSTANT)
        return _simplified(expression)

    def _moves(self, argument: Node) -> bool:
        """Whether the node may be a view of an argument with its elements in other places."""
        before, after = tensor_example(argument), self.example
        return before.numel() == after.numel() and before.stride() != after.stride()

    def _compute_dtype(self, node: Node) -> torch.dtype | None:
        return self.logits(node).compute_dtype if self.is_logits(node) else None

    @property
    def function(self) -> Callable[..., Any]:
        """What the node calls with its arguments.

        Raises:
            UnsupportedError: it calls something else than a function or a method of tensors.
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
        raise UnsupportedError(reason)


def _swapped(logits: Logits) -> Logits | None:
    """The logits with input and weight in each other's place, None if they have not the same
    form."""
    projection = logits.projection
    if projection.joined:
        return None
    input = tensor_example(projection.input)
    if (
        input.dim() != 2
        or projection.linear_bias is not None
        or not same_size(logits.vocabulary, projection.vocabulary)
        or any(operation.target is not torch.permute for operation in logits.row_operations)
        or any(isinstance(leaf, Operand) and leaf.kind != "s" for leaf in leaves(logits.expression))
        or COLUMN in leaves(logits.expression)
    ):
        return None
    rows = tuple(
        dataclasses.replace(operation, vocabulary_dim=1)
        for operation in projection.weight_operations
    )
    swapped = Logits(
        projection.replace(
            input=projection.linear_weight,
            linear_weight=projection.input,
            weight_operations=(),
            vocabulary=input.shape[0],
            vocabulary_dim=1 - (len(rows) % 2),
        ),
        vocabulary_dim=1,
        vocabulary=input.shape[0],
        compute_dtype=logits.compute_dtype,
        row_operations=rows,
        expression=logits.expression,
        path=logits.path,
    )
    if len(logits.row_operations) % 2 == 0:
        swapped = swapped.with_row_operation(torch.permute, HERE, (1, 0), vocabulary_dim=0)
    return swapped


def alike(first: Logits, second: Logits) -> bool:
    """Whether both are functions of the same logits in the same places."""
    return first.replace(expression=second.expression, path=(), compute_dtype=torch.float32) == (
        second.replace(path=(), compute_dtype=torch.float32)
    )


def _is_random(function: Callable[..., Any]) -> bool:
    """Whether ATen says of an operator of that name that it draws random numbers."""
    packet = getattr(torch.ops.aten, getattr(function, "__name__", ""), None)
    overloads = [] if packet is None else [getattr(packet, name) for name in packet.overloads()]
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def _sources(expression: Any) -> list[Any]:
    operands = [leaf for leaf in leaves(expression) if isinstance(leaf, Operand)]
    return [part for operand in operands for part in parts(operand.source)]


def _simplified(expression: Expression) -> Expression:
    """One of two numbers, converted to a floating dtype, is one of two others."""
    if isinstance(expression, Apply) and expression.target == "div.Tensor":
        chosen, divisor = expression.args
        if isinstance(chosen, Apply) and chosen.target == "where.Scalar" and divisor == 1:
            condition, *numbers = chosen.args
            return Apply("where.Scalar", (condition, *map(float, numbers)))
    return expression


def detached(expression: Any) -> Apply:
    return Apply("detach", (expression,))
