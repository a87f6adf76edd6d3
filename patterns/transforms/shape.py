"""Other shapes of the same rows: view, reshape, flatten, (un)squeeze, transpose, permute."""

from __future__ import annotations

from typing import Any

import torch

from ..logits import HERE, Logits
from ..rules import Site, dimension, tensor_example, transform


def _sizes(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """``f(2, 3)`` and ``f((2, 3))`` are the same."""
    if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        return tuple(arguments[0])
    return arguments


def _hidden_size(logits: Logits) -> int:
    """The size of `input` where the logits have the vocabulary."""
    return tensor_example(logits.linear_weight).shape[0 if logits.transposed else 1]


@transform("view", "reshape", torch.reshape)
def view(site: Site, input: Any, *shape: Any) -> Logits:
    logits = site.logits(input)
    before, after = tensor_example(input), site.example
    sizes = _sizes(shape)
    if not sizes or isinstance(sizes[0], torch.dtype):
        site.unsupported("it reinterprets the logits as another dtype")
    if logits.vocabulary_dim != before.dim() - 1:
        site.unsupported("it reshapes logits whose last dimension is not the vocabulary")
    if after.dim() == 0 or after.shape[-1] != before.shape[-1]:
        site.unsupported("it does not keep the vocabulary as the last dimension")
    new_shape = (*sizes[:-1], _hidden_size(logits))
    return logits.with_row_operation(torch.reshape, HERE, new_shape, vocabulary_dim=after.dim() - 1)


@transform("flatten", torch.flatten)
def flatten(site: Site, input: Any, start_dim: Any = 0, end_dim: Any = -1) -> Logits:
    logits = site.logits(input)
    rank = tensor_example(input).dim()
    start, end = dimension(start_dim, rank), dimension(end_dim, rank)
    if start <= logits.vocabulary_dim <= end and start != end:
        site.unsupported("it flattens the vocabulary into the rows")
    shift = end - start if end < logits.vocabulary_dim else 0
    return logits.with_row_operation(
        torch.flatten, HERE, start, end, vocabulary_dim=logits.vocabulary_dim - shift
    )


@transform("unsqueeze", torch.unsqueeze)
def unsqueeze(site: Site, input: Any, dim: Any) -> Logits:
    logits = site.logits(input)
    new = dimension(dim, tensor_example(input).dim() + 1)
    moved = logits.vocabulary_dim + (new <= logits.vocabulary_dim)
    return logits.with_row_operation(torch.unsqueeze, HERE, new, vocabulary_dim=moved)


@transform("squeeze", torch.squeeze)
def squeeze(site: Site, input: Any, dim: Any) -> Logits:
    logits = site.logits(input)
    before = tensor_example(input)
    gone = dimension(dim, before.dim())
    if gone == logits.vocabulary_dim:
        site.unsupported("it squeezes the vocabulary")
    if site.example.dim() == before.dim():
        return logits
    moved = logits.vocabulary_dim - (gone < logits.vocabulary_dim)
    return logits.with_row_operation(torch.squeeze, HERE, gone, vocabulary_dim=moved)


@transform("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims)
def transpose(site: Site, input: Any, dim0: Any, dim1: Any) -> Logits:
    rank = tensor_example(input).dim()
    order = list(range(rank))
    first, second = dimension(dim0, rank), dimension(dim1, rank)
    order[first], order[second] = second, first
    return _permuted(site.logits(input), order)


@transform("permute", torch.permute)
def permute(site: Site, input: Any, *dims: Any) -> Logits:
    rank = tensor_example(input).dim()
    return _permuted(site.logits(input), [dimension(dim, rank) for dim in _sizes(dims)])


def _permuted(logits: Logits, order: list[int]) -> Logits:
    moved = order.index(logits.vocabulary_dim)
    return logits.with_row_operation(torch.permute, HERE, tuple(order), vocabulary_dim=moved)
