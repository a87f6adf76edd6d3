"""Logits as an abstract value: what a graph node would hold, without having been computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from ..kernels.modification import IDENTITY, Modification


class Here:
    """Stands in `RowOperation.args` for the tensor that the operation is applied to."""

    def __repr__(self) -> str:
        return "<here>"


HERE = Here()


@dataclasses.dataclass(frozen=True)
class RowOperation:
    """An operation on rows, to be replayed on the projection's input instead of its result.

    Attributes:
        target: a function, called with `args` and `kwargs`.
        args: its positional arguments, `HERE` in the place of the tensor.
        kwargs: its keyword arguments.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits that nobody has computed: ``modification(rows(input) @ linear_weight.T + bias)``.

    Attributes:
        projection: the node whose result they are, in the user's code.
        input: [..., hidden].
        linear_weight: [vocabulary, hidden], or [hidden, vocabulary] if `transposed`.
        transposed: which of the two.
        linear_bias: a node of `vocabulary` elements, or None.
        row_operations: what happened to the rows since, first applied first.
        vocabulary_dim: the dimension that counts the vocabulary, from the front.
        modification: what happened to each logit.
        compute_dtype: dtype of the matrix product.
        absorbed: nodes that a rule looked through, of no use once their users are gone.
        path: the operations so far as a person would write them, for reports.
    """

    projection: Node
    input: Node
    linear_weight: Node
    transposed: bool
    linear_bias: Node | None
    vocabulary_dim: int
    compute_dtype: torch.dtype
    row_operations: tuple[RowOperation, ...] = ()
    modification: Modification = IDENTITY
    absorbed: tuple[Node, ...] = ()
    path: tuple[str, ...] = ()

    def replace(self, **changes: Any) -> Logits:
        return dataclasses.replace(self, **changes)

    def with_row_operation(
        self, target: Any, *args: Any, vocabulary_dim: int | None = None, **kwargs: Any
    ) -> Logits:
        """After one more operation on rows, which leaves the vocabulary in `vocabulary_dim`."""
        operation = RowOperation(target, args, kwargs)
        dim = self.vocabulary_dim if vocabulary_dim is None else vocabulary_dim
        return self.replace(row_operations=(*self.row_operations, operation), vocabulary_dim=dim)

    @property
    def captured(self) -> tuple[Node, ...]:
        """Every node whose value is read where the loss is computed, not where it was made."""
        captured = [self.input, self.linear_weight]
        if self.linear_bias is not None:
            captured.append(self.linear_bias)
        for operation in self.row_operations:
            torch.fx.map_arg((operation.args, operation.kwargs), captured.append)
        return tuple(captured)


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """A loss that one call of ``cce_inductor::linear_cross_entropy`` computes.

    Attributes:
        logits: what it is computed from.
        target: node of class indices, shaped like the rows.
        weight, reduction, ignore_index, label_smoothing: as in
            `torch.nn.functional.cross_entropy`; `ignore_index` may be a SymInt's node.
    """

    logits: Logits
    target: Node
    weight: Node | None
    reduction: str
    ignore_index: int | Node
    label_smoothing: float
