"""Deferred logits and their gradients, a few rows at a time.

A *row* of a tensor is what it has at one place along all dimensions but that of the vocabulary.
Rows are numbered as if the other dimensions were flattened.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cce_inductor.deferred import lazy
from cce_inductor.deferred.dispatch import on_meta
from cce_inductor.deferred.eager import few_rows
from cce_inductor.deferred.gradient import (
    IDENTITIES,
    FusedBackward,
    NotByRowsError,
    SentGradient,
    sum_of,
)
from cce_inductor.options import options_in_force
from cce_inductor.recipe.operation import Operation, map_arguments, project
from cce_inductor.recipe.stale import Guarded

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Rows:
    """A tensor that can be computed row by row.

    Attributes:
        shape: of the tensor.
        dim: the dimension of the vocabulary.
        compute: returns [k, vocabulary] for the numbers [k] of some rows.
    """

    shape: tuple[int, ...]
    dim: int
    compute: Callable[[Tensor], Tensor]

    @property
    def count(self) -> int:
        return math.prod(self.outer(self.shape))

    def outer(self, sizes: Sequence[int]) -> list[int]:
        """Return sizes with 1 in the place of the vocabulary."""
        return [1 if at == self.dim else size for at, size in enumerate(sizes)]

    def same(self, shape: Sequence[int], dim: int) -> Rows:
        """Return the same rows in the same order as another tensor."""
        return Rows(tuple(shape), dim, self.compute)

    def placed(self, function: Callable[[Tensor], Tensor], shape: Sequence[int], dim: int) -> Rows:
        """Return a tensor that consists of rows of this one, in other places, and of zeros.

        Args:
            function: makes the tensor, from one in whose shape the vocabulary has size 1.
            shape: of the tensor.
            dim: the dimension of its vocabulary.

        Raises:
            NotByRowsError: a row is left out, or is a sum of several.
        """
        numbers = torch.arange(1, self.count + 1).view(self.outer(self.shape))
        placed = function(numbers)
        if int(placed.count_nonzero()) != self.count:
            raise NotByRowsError
        flat = placed.flatten()

        def compute(rows: Tensor) -> Tensor:
            source = flat[rows.cpu()].to(rows.device)
            present = source.nonzero().squeeze(1)
            if len(present) == 0:
                return torch.zeros(len(rows), shape[dim], device=rows.device)
            found = self.compute(source[present] - 1)
            if len(present) == len(rows):
                return found
            return found.new_zeros(len(rows), shape[dim]).index_copy_(0, present, found)

        return Rows(tuple(shape), dim, compute)


def blocks_of_rows(count: int, width: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the numbers of all rows, in blocks that are computed in the workspace.

    Args:
        count: the number of rows.
        width: the size of the vocabulary.
        device: the device of the numbers.
    """
    row_bytes = _TENSORS * max(width, 1) * torch.float32.itemsize
    size = max(1, options_in_force().workspace_bytes // row_bytes)
    yield from torch.arange(count, device=device).split(size)


_TENSORS = 12
"""How many tensors as large as a block exist at a time, roughly."""


def vocabulary_dim(operation: Operation, shape: Sequence[int]) -> int:
    """Return which dimension of logits is the vocabulary.

    It is recognized by its size. If it is another one, the losses of the logits are not fused.
    """
    sizes = {each.args[1].tensor.shape[0] for each in operation.products()}
    return next((at for at in reversed(range(len(shape))) if shape[at] in sizes), len(shape) - 1)


def rows_of_logits(operation: Operation, shape: Sequence[int], dim: int) -> Rows:
    """Return the rows of deferred logits.

    Args:
        operation: computes the logits.
        shape: of the logits.
        dim: the dimension of the vocabulary.

    Raises:
        NotByRowsError: some rows cannot be computed without the others.
    """
    if _is_pointwise(operation.function):
        return _applied(operation, operation.args, tuple(shape), dim)
    order = [*(at for at in range(len(shape)) if at != dim), dim]
    moved = Operation(aten.permute.default, (operation.without_gradient, order))
    copied = Operation(aten.clone.default, (moved,), {"memory_format": torch.contiguous_format})
    flat = Operation(aten.view.default, (copied, [-1, shape[dim]]))

    def compute(rows: Tensor) -> Tensor:
        values = few_rows(Operation(aten.index.Tensor, (flat, [Guarded(rows, "the rows")])))
        if values is None:
            raise NotByRowsError
        return values

    return Rows(tuple(shape), dim, compute)


def rows_of_tensor(tensor: Tensor, shape: Sequence[int], dim: int) -> Rows:
    """Return the rows of a tensor that broadcasts to a shape. Their own width may be 1."""
    tensor = tensor.reshape((*[1] * (len(shape) - tensor.dim()), *tensor.shape)).movedim(dim, -1)
    own = tensor.shape[:-1]
    others = [size for at, size in enumerate(shape) if at != dim]
    numbers = torch.arange(math.prod(own)).view(own).expand(others).flatten()
    flat = tensor.reshape(math.prod(own), tensor.shape[-1])
    return Rows(tuple(shape), dim, lambda rows: flat[numbers[rows.cpu()].to(flat.device)])


def rows_of(operation: Operation) -> Rows:
    """Return the rows of a gradient, or of a function of gradients.

    Raises:
        NotByRowsError: some rows cannot be computed without the others.
    """
    function, args = operation.function, operation.args
    if function in IDENTITIES and isinstance(args[0], SentGradient):
        backward = args[0].backward
        if not isinstance(backward, FusedBackward):
            raise NotByRowsError
        rows: Rows = backward.rows(args[0].position)
        return rows
    if function in _PLACING:
        return _PLACING[function](function, *args)
    if function in _ALONG_VOCABULARY:
        return _of_rows(operation, dim_at=_ALONG_VOCABULARY[function])
    if function is aten._to_copy.default or _is_pointwise(function):
        return _of_rows(operation)
    raise NotByRowsError


def _of_rows(operation: Operation, dim_at: int | None = None) -> Rows:
    """Return the rows of a function that computes each row from those of its arguments.

    Args:
        operation: computes it. A gradient is among its arguments.
        dim_at: the position of the argument that is the dimension of the vocabulary, if it has one.
    """
    gradients = [
        rows_of(each)
        for each in operation.arguments
        if isinstance(each, Operation) and _is_gradient(each)
    ]
    (shape, dim), *others = {(each.shape, each.dim) for each in gradients}
    if others or (dim_at is not None and operation.args[dim_at] % len(shape) != dim):
        raise NotByRowsError
    args = list(operation.args)
    if dim_at is not None:
        args[dim_at] = 1
    return _applied(operation, args, shape, dim)


def _applied(operation: Operation, args: Sequence[Any], shape: tuple[int, ...], dim: int) -> Rows:
    """Return the rows of an operation, with other arguments, that computes each row by itself."""
    rows = {id(each): _rows_of_argument(each, shape, dim) for each in operation.arguments}

    def compute(numbers: Tensor) -> Tensor:
        def value(argument: Any) -> Any:
            own = rows.get(id(argument))
            if own is not None:
                return own.compute(numbers)
            return argument.read() if isinstance(argument, Guarded) else argument

        values, named = map_arguments(value, (args, operation.kwargs))
        made: Tensor = operation.function(*values, **named)
        return made

    return Rows(shape, dim, compute)


def _rows_of_argument(
    argument: Operation | Guarded, shape: tuple[int, ...], dim: int
) -> Rows | None:
    """Return the rows of an argument that broadcasts to a shape, None if it has no dimensions."""
    if isinstance(argument, Guarded):
        tensor = argument.read()
        if tensor.dim() and torch.broadcast_shapes(tensor.shape, shape) != shape:
            raise NotByRowsError
        return rows_of_tensor(tensor, shape, dim) if tensor.dim() else None
    if _is_gradient(argument):
        return rows_of(argument)
    if argument.function in IDENTITIES:
        return _rows_of_argument(argument.args[0], shape, dim)
    if _shape_of(argument) != shape:
        raise NotByRowsError
    return rows_of_logits(argument, shape, dim)


def _shape_of(operation: Operation) -> tuple[int, ...]:
    """Return the shape of deferred logits."""
    likes: dict[int, Tensor] = {}

    def like(argument: Any) -> Any:
        if isinstance(argument, Guarded):
            return on_meta(argument.tensor)
        return likes[id(argument)] if isinstance(argument, Operation) else argument

    for each in operation.history():
        args, kwargs = map_arguments(like, (each.args, each.kwargs))
        if each.function is project:
            shape = (*args[0].shape[:-1], args[1].shape[0])
            likes[id(each)] = torch.empty(shape, dtype=args[-1], device="meta")
        else:
            likes[id(each)] = each.function(*args, **kwargs)
    return tuple(likes[id(operation)].shape)


def _is_pointwise(function: Any) -> bool:
    return isinstance(function, torch._ops.OpOverload) and lazy.is_pointwise(function)


def _is_gradient(operation: Operation) -> bool:
    sources = (source for each in operation.history() for source in each.sources)
    return any(isinstance(source, SentGradient) for source in sources)


# Functions that put rows in other places


def _identity(function: Any, gradient: Operation, *_: Any) -> Rows:
    return rows_of(gradient)


def _sum(function: Any, terms: Sequence[Operation], shape: Any, dtype: Any, device: Any) -> Rows:
    found = {id(each): rows_of(each) for each in terms if _is_gradient(each)}
    dims = {each.dim for each in found.values()}
    if len(dims) != 1:
        raise NotByRowsError
    (dim,) = dims
    every: list[Rows] = []
    for each in terms:
        rows_of_term = found.get(id(each)) or _rows_of_argument(each, shape, dim)
        assert rows_of_term is not None, "a term has the shape of the sum"
        every.append(rows_of_term)

    def compute(rows: Tensor) -> Tensor:
        values = [each.compute(rows) for each in every]
        made: Tensor = function(values, values[0].shape, dtype, device)
        return made

    return Rows(shape, dim, compute)


def _reshaped(function: Any, gradient: Operation, sizes: Sequence[int]) -> Rows:
    rows = rows_of(gradient)
    shape = torch.empty(rows.shape, device="meta").reshape(sizes).shape
    if rows.dim != len(rows.shape) - 1 or shape[-1] != rows.shape[-1]:
        raise NotByRowsError
    return rows.same(shape, len(shape) - 1)


def _moved(function: Any, gradient: Operation, *dims: Any) -> Rows:
    rows = rows_of(gradient)
    order = list(function(torch.empty(list(range(len(rows.shape))), device="meta"), *dims).shape)
    shape = [rows.shape[at] for at in order]
    return rows.placed(lambda numbers: function(numbers, *dims), shape, order.index(rows.dim))


def _unsqueezed(function: Any, gradient: Operation, dim: int) -> Rows:
    rows = rows_of(gradient)
    dim %= len(rows.shape) + 1
    shape = [*rows.shape[:dim], 1, *rows.shape[dim:]]
    return rows.same(shape, rows.dim + (dim <= rows.dim))


def _squeezed(function: Any, gradient: Operation, *dims: Any) -> Rows:
    rows = rows_of(gradient)
    # Each size tells which dimension it is; those that are 1 stay 1.
    marked = [1 if size == 1 else at + 2 for at, size in enumerate(rows.shape)]
    left = list(function(torch.empty(marked, device="meta"), *dims).shape)
    if rows.shape[rows.dim] == 1:
        raise NotByRowsError
    shape = [size if size == 1 else rows.shape[size - 2] for size in left]
    return rows.same(shape, left.index(rows.dim + 2))


def _slice_backward(
    function: Any, gradient: Operation, sizes: Sequence[int], dim: int, *others: Any
) -> Rows:
    rows = rows_of(gradient)
    if dim % len(sizes) == rows.dim:
        width = sizes[dim]
        return Rows(
            tuple(sizes),
            rows.dim,
            lambda numbers: function(rows.compute(numbers), [len(numbers), width], 1, *others),
        )
    outer = rows.outer(sizes)
    return rows.placed(lambda numbers: function(numbers, outer, dim, *others), sizes, rows.dim)


def _select_backward(
    function: Any, gradient: Operation, sizes: Sequence[int], dim: int, index: int
) -> Rows:
    rows = rows_of(gradient)
    vocabulary = rows.dim + (dim % len(sizes) <= rows.dim)
    outer = [1 if at == vocabulary else size for at, size in enumerate(sizes)]
    return rows.placed(lambda numbers: function(numbers, outer, dim, index), sizes, vocabulary)


def _index_put(
    function: Any, zeros: Operation, indices: Sequence[Any], gradient: Operation, accumulate: bool
) -> Rows:
    shape = zeros.args[0]
    rows = rows_of(gradient)
    if rows.dim != len(rows.shape) - 1 or len(indices) >= len(shape):
        raise NotByRowsError
    outer = torch.zeros([*shape[:-1], 1], dtype=torch.int64)
    if not all(each is None or isinstance(each, Guarded) for each in indices):
        raise NotByRowsError
    places = [None if each is None else each.read().cpu() for each in indices]
    return rows.placed(
        lambda numbers: function(outer, places, numbers, accumulate), shape, len(shape) - 1
    )


def _index_add(
    function: Any, zeros: Operation, dim: int, index: Guarded, gradient: Operation
) -> Rows:
    shape = zeros.args[0]
    rows = rows_of(gradient)
    if dim % len(shape) == rows.dim:
        raise NotByRowsError
    outer = torch.zeros(rows.outer(shape), dtype=torch.int64)
    place = index.read().cpu()
    return rows.placed(lambda numbers: function(outer, dim, place, numbers), shape, rows.dim)


_PLACING: dict[Any, Callable[..., Rows]] = {
    **dict.fromkeys((*IDENTITIES, aten.clone.default), _identity),
    sum_of: _sum,
    **dict.fromkeys((aten.reshape.default, aten._unsafe_view.default), _reshaped),
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.t.default), _moved),
    aten.unsqueeze.default: _unsqueezed,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeezed),
    aten.slice_backward.default: _slice_backward,
    aten.select_backward.default: _select_backward,
    aten.index_put.default: _index_put,
    aten.index_add.default: _index_add,
}

_ALONG_VOCABULARY = {
    aten._softmax_backward_data.default: 2,
    aten._log_softmax_backward_data.default: 2,
}
"""Functions of whole rows, with the position of the argument that says along which dimension."""
