"""Other shapes of the same rows: `view`, `flatten`, `squeeze`, `transpose`, `permute`, `expand`."""

from __future__ import annotations

from typing import Any

import torch

from cce_inductor.patterns.language import (
    HERE,
    WIDTH,
    Logits,
    Site,
    dimension,
    example,
    is_exactly,
    same_shape,
    same_size,
    tensor_example,
    transform,
)
from cce_inductor.reporting import reasons


def _sizes(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return sizes that are given as ``f(2, 3)`` or as ``f((2, 3))``."""
    if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        return tuple(arguments[0])
    return arguments


@transform("view", "reshape", torch.reshape, "view_as", "reshape_as")
def view(site: Site, input: Any, *shape: Any, **named: Any) -> Logits:
    logits = site.logits(input)
    before, after = tensor_example(input), site.example
    sizes = _sizes((*shape, *named.values()))
    if site.node.target in ("view_as", "reshape_as"):
        sizes = tuple(after.shape)
        if not all(isinstance(size, int) for size in sizes):
            site.unsupported(reasons.DYNAMIC_SHAPE_OF_TENSOR)
    if not sizes or isinstance(sizes[0], torch.dtype):
        site.unsupported(reasons.REINTERPRETS_BITS)
    if same_shape(after.shape, before.shape):
        return logits
    if any(isinstance(example(size), torch.Size) for size in sizes):
        site.unsupported(reasons.DYNAMIC_SHAPE_OF_TENSOR)
    if logits.vocabulary_dim != before.dim() - 1:
        site.unsupported(reasons.RESHAPES_VOCABULARY_NOT_LAST)
    if after.dim() == 0 or not same_size(after.shape[-1], before.shape[-1]):
        site.unsupported(reasons.VOCABULARY_NOT_KEPT_LAST)
    return logits.with_row_operation(
        torch.reshape, HERE, (*sizes[:-1], WIDTH), vocabulary_dim=after.dim() - 1, reshapes=True
    )


@transform("flatten", torch.flatten)
def flatten(site: Site, input: Any, start_dim: Any = 0, end_dim: Any = -1) -> Logits:
    logits = site.logits(input)
    rank = tensor_example(input).dim()
    start, end = dimension(start_dim, rank), dimension(end_dim, rank)
    if start <= logits.vocabulary_dim <= end and start != end:
        site.unsupported(reasons.FLATTENS_VOCABULARY)
    shift = end - start if end < logits.vocabulary_dim else 0
    return logits.with_row_operation(
        torch.flatten,
        HERE,
        start,
        end,
        vocabulary_dim=logits.vocabulary_dim - shift,
        reshapes=True,
    )


@transform("unflatten", torch.unflatten)
def unflatten(site: Site, input: Any, dim: Any, sizes: Any) -> Logits:
    logits = site.logits(input)
    dim = dimension(dim, tensor_example(input).dim())
    if dim == logits.vocabulary_dim:
        site.unsupported(reasons.SPLITS_VOCABULARY)
    moved = logits.vocabulary_dim + (len(sizes) - 1 if dim < logits.vocabulary_dim else 0)
    return logits.with_row_operation(
        torch.unflatten, HERE, dim, tuple(sizes), vocabulary_dim=moved, reshapes=True
    )


@transform("unsqueeze", torch.unsqueeze)
def unsqueeze(site: Site, input: Any, dim: Any) -> Logits:
    logits = site.logits(input)
    new = dimension(dim, tensor_example(input).dim() + 1)
    moved = logits.vocabulary_dim + (new <= logits.vocabulary_dim)
    return logits.with_row_operation(
        torch.unsqueeze, HERE, new, vocabulary_dim=moved, reshapes=True
    )


@transform("squeeze", torch.squeeze)
def squeeze(site: Site, input: Any, dim: Any = None) -> Logits:
    logits = site.logits(input)
    before = tensor_example(input)
    given = range(before.dim()) if dim is None else dim if isinstance(dim, tuple) else (dim,)
    dims = {dimension(each, before.dim()) for each in given}
    gone = sorted(each for each in dims if is_exactly(before.shape[each], 1))
    if logits.vocabulary_dim in gone:
        site.unsupported(reasons.SQUEEZES_VOCABULARY)
    if site.example.dim() != before.dim() - len(gone):
        site.unsupported(reasons.SQUEEZES_UNKNOWN_SIZE)
    for each in reversed(gone):
        moved = logits.vocabulary_dim - (each < logits.vocabulary_dim)
        logits = logits.with_row_operation(
            torch.squeeze, HERE, each, vocabulary_dim=moved, reshapes=True
        )
    return logits


@transform("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims)
def transpose(site: Site, input: Any, dim0: Any, dim1: Any) -> Logits:
    rank = tensor_example(input).dim()
    order = list(range(rank))
    first, second = dimension(dim0, rank), dimension(dim1, rank)
    order[first], order[second] = second, first
    return _permuted(site.logits(input), order)


@transform("permute", torch.permute)
def permute(site: Site, input: Any, *dims: Any, **named: Any) -> Logits:
    rank = tensor_example(input).dim()
    given = _sizes((*dims, *named.values()))
    return _permuted(site.logits(input), [dimension(dim, rank) for dim in given])


@transform("movedim", torch.movedim, "moveaxis", torch.moveaxis)
def movedim(site: Site, input: Any, source: Any, destination: Any) -> Logits:
    if not isinstance(source, int) or not isinstance(destination, int):
        site.unsupported(reasons.MOVES_SEVERAL_DIMENSIONS)
    rank = tensor_example(input).dim()
    order = list(range(rank))
    moved = order.pop(dimension(source, rank))
    order.insert(dimension(destination, rank), moved)
    return _permuted(site.logits(input), order)


@transform("t", torch.t, torch.ops.aten.numpy_T)
def matrix_transpose(site: Site, input: Any) -> Logits:
    rank = tensor_example(input).dim()
    return _permuted(site.logits(input), list(range(rank))[::-1])


@transform("adjoint", torch.adjoint, torch.ops.aten.mT)
def matrices_transpose(site: Site, input: Any) -> Logits:
    return transpose(site, input, -2, -1)


@transform(getattr)
def attribute(site: Site, input: Any, name: Any) -> Logits:
    if name == "T":
        return matrix_transpose(site, input)
    if name == "mT":
        return matrices_transpose(site, input)
    return site.unsupported(reasons.reads_attribute(name))


@transform("expand", torch.broadcast_to, "broadcast_to")
def expand(site: Site, input: Any, *sizes: Any) -> Logits:
    """Repeat rows, without a copy."""
    logits = site.logits(input)
    given = list(_sizes(sizes))
    dim = logits.vocabulary_dim + len(given) - tensor_example(input).dim()
    given[dim] = WIDTH
    return logits.with_row_operation(torch.Tensor.expand, HERE, tuple(given), vocabulary_dim=dim)


def _permuted(logits: Logits, order: list[int]) -> Logits:
    moved = order.index(logits.vocabulary_dim)
    return logits.with_row_operation(torch.permute, HERE, tuple(order), vocabulary_dim=moved)
