"""Logits as an abstract value, which stands for the tensor of a node that is never computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language.expression import LOGIT, Expression, operands_of
from cce_inductor.torch_internals.symbols import size_hint


@dataclasses.dataclass(frozen=True)
class _Placeholder:
    name: str

    def __repr__(self) -> str:
        return f"<{self.name}>"


HERE = _Placeholder("here")
"""Stands in `TensorOperation.args` for the tensor that the operation is applied to."""

WIDTH = _Placeholder("width")
"""Stands in `TensorOperation.args` for the size of that tensor in the vocabulary dimension."""


@dataclasses.dataclass(frozen=True)
class TensorOperation:
    """An operation on the rows of the logits, or on the weight.

    An operation on rows is replayed on the projection's input and on every operand that has these
    rows.

    Attributes:
        target: a function, called with `args` and `kwargs`.
        args: its positional arguments, with `HERE` for the tensor.
        kwargs: its keyword arguments.
        reshapes: whether all rows keep their order in memory.
        vocabulary_dim: the vocabulary's dimension afterwards.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    reshapes: bool = False
    vocabulary_dim: int = 0

    @property
    def nodes(self) -> list[Node]:
        """The nodes among the arguments."""
        nodes: list[Node] = []
        torch.fx.map_arg((self.args, dict(self.kwargs)), nodes.append)
        return nodes

    def args_for(self, tensor: Any, width: Any = None) -> tuple[Any, ...]:
        """Return the arguments that apply the operation to `tensor`.

        Args:
            tensor: stands where `HERE` is.
            width: the size of its vocabulary dimension, which stands where `WIDTH` is.
        """

        def fill(argument: Any) -> Any:
            if isinstance(argument, tuple):
                return tuple(fill(each) for each in argument)
            return tensor if argument is HERE else width if argument is WIDTH else argument

        return tuple(fill(argument) for argument in self.args)


@dataclasses.dataclass(frozen=True)
class Projection:
    """A matrix product that makes logits: ``input @ weight.T + bias``.

    Attributes:
        node: the node of the user's graph that makes the logits.
        input: [..., hidden], with hidden in `vocabulary_dim`; a node, or a call of several nodes.
        linear_weight: a node, or a call of several.
        weight_operations: turn `linear_weight` into [vocabulary, hidden], in order.
        linear_bias: a node of `vocabulary` elements, or None.
        bias_operations: turn `linear_bias` into [vocabulary], in order.
        vocabulary: the size of the vocabulary; symbolic if it may change in the next call.
        hidden: the size that is summed over.
        vocabulary_dim: the vocabulary's dimension in the result, counted from the front.
        absorbed: nodes that the rule looked through (the transpose of the weight, for example).
            They are erased if nothing else uses them.
        joined: the projections that this one joins, empty if it is only one.
    """

    node: Node
    input: Node | Call
    linear_weight: Node | Call
    weight_operations: tuple[TensorOperation, ...]
    linear_bias: Node | None
    vocabulary: int | torch.SymInt
    hidden: int
    vocabulary_dim: int
    absorbed: tuple[Node, ...] = ()
    bias_operations: tuple[TensorOperation, ...] = ()
    joined: tuple[Projection, ...] = ()

    def replace(self, **changes: Any) -> Projection:
        return dataclasses.replace(self, **changes)

    @property
    def classes(self) -> int | None:
        """The size of the vocabulary at compilation, None if it depends on data."""
        return size_hint(self.vocabulary)

    @property
    def has_more_classes(self) -> bool:
        """Whether there are more classes than hidden units: the logits are larger than `input`."""
        return self.classes is None or self.classes > self.hidden

    @property
    def origins(self) -> tuple[Node, ...]:
        """The nodes that compute its logits, several if it joins projections. Either all of them
        are replaced or none."""
        return origins_of(self.joined) if self.joined else (self.node,)


def origins_of(projections: Iterable[Projection]) -> tuple[Node, ...]:
    """Return each node that computes the logits of some projections once."""
    return tuple(dict.fromkeys(node for each in projections for node in each.origins))


def projections_read(expression: Any) -> list[Projection]:
    """Return the projections of the other heads that an expression reads."""
    return [each.source.projection for each in operands_of(expression) if each.kind.is_product]


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits that are not computed, or a pointwise function of them.

    Attributes:
        projection: the matrix product that makes them.
        vocabulary_dim: the vocabulary's dimension, counted from the front.
        vocabulary: the size of the vocabulary.
        compute_dtype: the dtype of the matrix product.
        row_operations: what was done to the rows since the projection, in order.
        expression: what was done to each logit since the projection.
        path: the operations so far as the user would write them, for reports.
    """

    projection: Projection
    vocabulary_dim: int
    vocabulary: int | torch.SymInt
    compute_dtype: torch.dtype
    row_operations: tuple[TensorOperation, ...] = ()
    expression: Expression = LOGIT
    path: tuple[str, ...] = ()

    def replace(self, **changes: Any) -> Logits:
        return dataclasses.replace(self, **changes)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Their projection, and those of the other heads that the expression reads."""
        return (self.projection, *projections_read(self.expression))

    @property
    def origins(self) -> tuple[Node, ...]:
        """The nodes whose matrix products they read. Either all of them are replaced or none."""
        return origins_of(self.projections)

    def with_row_operation(
        self,
        target: Any,
        *args: Any,
        vocabulary_dim: int | None = None,
        reshapes: bool = False,
        **kwargs: Any,
    ) -> Logits:
        """Return the logits after one more operation on their rows.

        Args:
            target: a function that works on any tensor with these rows.
            args, kwargs: its arguments, with `HERE` for the logits and `WIDTH` for their
                vocabulary.
            vocabulary_dim: the vocabulary's dimension afterwards, unchanged if None.
            reshapes: whether all rows keep their order in memory.
        """
        dim = self.vocabulary_dim if vocabulary_dim is None else vocabulary_dim
        operation = TensorOperation(target, args, tuple(kwargs.items()), reshapes, dim)
        return self.replace(row_operations=(*self.row_operations, operation), vocabulary_dim=dim)


def same_logits(first: Logits, second: Logits) -> bool:
    """Whether both are pointwise functions of the same logits in the same places."""
    return first.replace(expression=second.expression, path=(), compute_dtype=torch.float32) == (
        second.replace(path=(), compute_dtype=torch.float32)
    )


@dataclasses.dataclass(frozen=True)
class Stack:
    """Logits of several projections, stacked along a new dimension.

    Attributes:
        dim: the new dimension, counted from the front.
        parts: the logits of each projection, with size 1 in that dimension.
    """

    dim: int
    parts: tuple[Logits, ...]


Value = Logits | Stack | tuple[Logits, ...]
"""What the walk knows of a node whose result is logits."""


def all_logits(value: Value) -> tuple[Logits, ...]:
    """Return every `Logits` in a value."""
    if isinstance(value, Logits):
        return (value,)
    return value.parts if isinstance(value, Stack) else value


def each_logits(value: Value, change: Callable[[Logits], Logits]) -> Value:
    """Return the value with every `Logits` in it changed."""
    if isinstance(value, Logits):
        return change(value)
    if isinstance(value, Stack):
        return Stack(value.dim, tuple(change(part) for part in value.parts))
    return tuple(change(part) for part in value)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """``target(*args, **kwargs)``, a node of the rewritten graph. Its arguments may be rows."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


def applied(source: Any, operations: tuple[TensorOperation, ...], width: int) -> Any:
    """Return a tensor after operations.

    Args:
        source: a node or a call.
        operations: in order.
        width: the size of its vocabulary dimension.
    """
    for operation in operations:
        source = Call(operation.target, operation.args_for(source, width), operation.kwargs)
    return source
