"""Logits as an abstract value: what a graph node would hold, without having been computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language.expression import LOGIT, Expression
from cce_inductor.torch_internals.symbols import size_hint


@dataclasses.dataclass(frozen=True)
class _Placeholder:
    name: str

    def __repr__(self) -> str:
        return f"<{self.name}>"


HERE = _Placeholder("here")
"""Stands in `TensorOperation.args` for the tensor that the operation is applied to."""

WIDTH = _Placeholder("width")
"""Stands there for the size of that tensor in the vocabulary dimension."""


@dataclasses.dataclass(frozen=True)
class TensorOperation:
    """An operation on the rows of the logits, to be replayed on the projection's input and on
    whatever else has such rows; or an operation on the weight.

    Attributes:
        target: a function, called with `args` and `kwargs`.
        args: its positional arguments, `HERE` in the place of the tensor.
        kwargs: its keyword arguments.
        reshapes: whether it leaves all rows in their order in memory.
        vocabulary_dim: the dimension that counts the vocabulary afterwards.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    reshapes: bool = False
    vocabulary_dim: int = 0

    @property
    def nodes(self) -> list[Node]:
        found: list[Node] = []
        torch.fx.map_arg((self.args, dict(self.kwargs)), found.append)
        return found

    def args_for(self, tensor: Any, width: Any = None) -> tuple[Any, ...]:
        """The arguments that apply it to `tensor`, whose vocabulary dimension has size `width`."""

        def fill(argument: Any) -> Any:
            if isinstance(argument, tuple):
                return tuple(fill(each) for each in argument)
            return tensor if argument is HERE else width if argument is WIDTH else argument

        return tuple(fill(argument) for argument in self.args)


@dataclasses.dataclass(frozen=True)
class Projection:
    """A matrix product that makes logits: ``input @ weight.T + bias``.

    Attributes:
        node: whose result they are, in the user's code.
        input: [..., hidden], hidden in `vocabulary_dim`; a node, or what is made of several.
        linear_weight: what `weight_operations` make a [vocabulary, hidden] matrix of.
        weight_operations: in order.
        linear_bias: a node of `vocabulary` elements, or None.
        bias_operations: what makes [vocabulary] of the bias, in order.
        vocabulary: of the node's result; symbolic if it may be another in the next call.
        hidden: its size.
        vocabulary_dim: the dimension of the result that counts the vocabulary, from the front.
        absorbed: nodes that a rule looked through, of no use once their users are gone.
        joined: the projections that this one is made of, if several.
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
        """The size of the vocabulary at compilation, None where only data tells."""
        return size_hint(self.vocabulary)

    @property
    def has_more_classes(self) -> bool:
        """Whether there are more classes than hidden units, so that logits are larger than what
        they are made of."""
        return self.classes is None or self.classes > self.hidden

    @property
    def origins(self) -> tuple[Node, ...]:
        """The nodes that compute the logits, all of which go or stay."""
        if not self.joined:
            return (self.node,)
        return tuple(dict.fromkeys(node for each in self.joined for node in each.origins))


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits that nobody has computed, or a pointwise function of them.

    Attributes:
        projection: where they come from.
        vocabulary_dim: the dimension that counts the vocabulary, from the front.
        vocabulary: its size.
        compute_dtype: dtype of the matrix product.
        row_operations: what happened to the rows since, first applied first.
        expression: what happened to each logit.
        path: the operations so far as a person would write them, for reports.
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

    def with_row_operation(
        self,
        target: Any,
        *args: Any,
        vocabulary_dim: int | None = None,
        reshapes: bool = False,
        **kwargs: Any,
    ) -> Logits:
        """After one more operation on rows, which leaves the vocabulary in `vocabulary_dim`."""
        dim = self.vocabulary_dim if vocabulary_dim is None else vocabulary_dim
        operation = TensorOperation(target, args, tuple(kwargs.items()), reshapes, dim)
        return self.replace(row_operations=(*self.row_operations, operation), vocabulary_dim=dim)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Logits of several projections, stacked.

    Attributes:
        dim: the dimension that counts them, from the front.
        parts: of each projection, with 1 in that dimension.
    """

    dim: int
    parts: tuple[Logits, ...]


Value = Logits | Stack | tuple[Logits, ...]
"""What the walk knows of a node whose result is logits."""


def all_logits(value: Value) -> tuple[Logits, ...]:
    if isinstance(value, Logits):
        return (value,)
    return value.parts if isinstance(value, Stack) else value


def each_logits(value: Value, change: Callable[[Logits], Logits]) -> Value:
    """The value with all its logits changed."""
    if isinstance(value, Logits):
        return change(value)
    if isinstance(value, Stack):
        return Stack(value.dim, tuple(change(part) for part in value.parts))
    return tuple(change(part) for part in value)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A function of values of rows: ``target(*args, **kwargs)``."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


def applied(source: Any, operations: tuple[TensorOperation, ...], width: int) -> Any:
    """A tensor after operations, of a given size in the vocabulary dimension."""
    for operation in operations:
        source = Call(operation.target, operation.args_for(source, width), operation.kwargs)
    return source
