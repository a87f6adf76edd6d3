"""Reductions of a deferred gradient that is large, like its norm, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce_inductor.deferred.dispatch import on_meta
from cce_inductor.deferred.gradient import GradientTensor, NotByRowsError
from cce_inductor.deferred.rows import blocks_of_rows, rows_of
from cce_inductor.options import options_in_force
from cce_inductor.recipe.stale import StaleLogitsError
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.tensors import as_outside_of_dispatch

aten = torch.ops.aten


Dims = tuple[int, ...]


class _Reduction(NamedTuple):
    """A reduction of a matrix, by parts of it.

    Attributes:
        of_block: reduces a block [rows, vocabulary] over dimensions. Its arguments are the block,
            the dimensions, and the operator's other arguments by their names.
        combine: returns one result for several, [parts, ...].
        finish: returns what the operator returns.
        of_floats: whether the operator does not accept integers.
    """

    of_block: Callable[[Tensor, Dims, dict[str, Any]], Tensor]
    combine: Callable[[Tensor, dict[str, Any]], Tensor]
    finish: Callable[[Tensor, dict[str, Any]], Tensor] = lambda result, named: result
    of_floats: bool = False


def is_large(gradient: Tensor) -> bool:
    """Whether a gradient, or a function of one, has not been computed and exceeds the workspace."""
    return (
        isinstance(gradient, GradientTensor)
        and gradient.is_deferred
        and not gradient.is_complex()
        and gradient.numel() * torch.float32.itemsize > options_in_force().workspace_bytes
    )


def reduced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a reduction of a large gradient over the vocabulary, or over everything.

    Returns:
        NotImplemented if the gradient must be computed.
    """
    reduction = _REDUCTIONS.get(func)
    if reduction is None or not is_large(args[0]):
        return NotImplemented
    gradient, *others = args
    names = [argument.name for argument in func._schema.arguments]
    named = {**dict(zip(names[1:], others, strict=False)), **kwargs}
    dims = _dims(named.get("dim"), gradient.dim())
    over_everything = len(dims) == gradient.dim()
    if not (over_everything or len(dims) == 1) or not _accepts(reduction, gradient.dtype, named):
        return NotImplemented
    if named.get("dim") in ([], ()) and func in _KEEPS_ELEMENTS:
        return NotImplemented
    like = func(on_meta(gradient), *others, **kwargs)
    operation = gradient._operation
    while over_everything and operation.function in _RESHAPES:
        operation = operation.args[0]
    try:
        with as_outside_of_dispatch(), torch.inference_mode(False), torch.no_grad():
            rows = rows_of(operation)
            if not over_everything and dims != {rows.dim}:
                return NotImplemented
            parts = [
                reduction.of_block(rows.compute(block), (0, 1) if over_everything else (1,), named)
                for block in blocks_of_rows(rows.count, rows.shape[rows.dim], gradient.device)
            ]
            whole = (
                reduction.combine(torch.stack(parts), named)
                if over_everything
                else torch.cat(parts)
            )
            return reduction.finish(whole, named).to(like.dtype).reshape(like.shape)
    except NotByRowsError:
        return NotImplemented
    except StaleLogitsError:
        raise
    except Exception:
        surprised("a reduction of the gradient of deferred logits computes the gradient")
        return NotImplemented


def _accepts(reduction: _Reduction, dtype: torch.dtype, named: dict[str, Any]) -> bool:
    """Whether a reduction of elements of a dtype is what the operator computes."""
    if reduction.of_floats and not dtype.is_floating_point:
        return False
    cast = named.get("dtype")  # The operator casts the elements first.
    return cast is None or torch.promote_types(cast, dtype) == cast


def _dims(dim: Any, rank: int) -> set[int]:
    """Return the dimensions that a reduction is over."""
    given = [dim] if isinstance(dim, int) else dim or range(rank)
    return {each % rank for each in given}


def _sum(block: Tensor, dims: Dims, named: dict[str, Any]) -> Tensor:
    return block.sum(dims, dtype=torch.float64 if block.is_floating_point() else None)


def _total(parts: Tensor, named: dict[str, Any]) -> Tensor:
    return parts.sum(0)


def _norm(block: Tensor, dims: Dims, named: dict[str, Any]) -> Tensor:
    return torch.linalg.vector_norm(block, named.get("ord", 2), dims, dtype=torch.float64)


def _norm_of_norms(norms: Tensor, named: dict[str, Any]) -> Tensor:
    order = named.get("ord", 2)
    return norms.sum(0) if order == 0 else torch.linalg.vector_norm(norms, order, 0)


def _moments(block: Tensor, dims: Dims, named: dict[str, Any]) -> Tensor:
    """Return the count, the mean and the sum of squared differences from it, [..., 3]."""
    variance, mean = torch.var_mean(block.double(), dims, correction=0)
    count = torch.full_like(mean, math.prod(block.shape[dim] for dim in dims))
    return torch.stack([count, mean, variance * count], dim=-1)


def _joint_moments(parts: Tensor, named: dict[str, Any]) -> Tensor:
    """Combine moments (Chan et al., "Updating formulae and a pairwise algorithm", 1979)."""
    counts, means, squares = parts.unbind(-1)
    mean = (counts * means).sum(0) / counts.sum(0)
    squares = squares.sum(0) + (counts * (means - mean).square()).sum(0)
    return torch.stack([counts.sum(0), mean, squares], dim=-1)


def _mean(moments: Tensor, named: dict[str, Any]) -> Tensor:
    return moments[..., 1]


def _variance(moments: Tensor, named: dict[str, Any]) -> Tensor:
    correction = named.get("correction")
    count, _, squares = moments.unbind(-1)
    return squares / (count - (1 if correction is None else correction)).clamp(min=0)


def _deviation(moments: Tensor, named: dict[str, Any]) -> Tensor:
    return _variance(moments, named).sqrt()


_MAXIMUM = _Reduction(
    lambda block, dims, named: block.amax(dims), lambda parts, named: parts.amax(0)
)
_MINIMUM = _Reduction(
    lambda block, dims, named: block.amin(dims), lambda parts, named: parts.amin(0)
)
_ANY = _Reduction(
    lambda block, dims, named: (block != 0).amax(dims), lambda parts, named: parts.amax(0)
)
_ALL = _Reduction(
    lambda block, dims, named: (block != 0).amin(dims), lambda parts, named: parts.amin(0)
)
_COUNT = _Reduction(lambda block, dims, named: (block != 0).sum(dims), _total)

_REDUCTIONS: dict[Any, _Reduction] = {
    aten.linalg_vector_norm.default: _Reduction(_norm, _norm_of_norms, of_floats=True),
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList), _Reduction(_sum, _total)),
    **dict.fromkeys(
        (aten.mean.default, aten.mean.dim),
        _Reduction(_moments, _joint_moments, _mean, of_floats=True),
    ),
    aten.var.correction: _Reduction(_moments, _joint_moments, _variance, of_floats=True),
    aten.std.correction: _Reduction(_moments, _joint_moments, _deviation, of_floats=True),
    **dict.fromkeys((aten.amax.default, aten.max.default), _MAXIMUM),
    **dict.fromkeys((aten.amin.default, aten.min.default), _MINIMUM),
    **dict.fromkeys((aten.any.default, aten.any.dim, aten.any.dims), _ANY),
    **dict.fromkeys((aten.all.default, aten.all.dim, aten.all.dims), _ALL),
    **dict.fromkeys((aten.count_nonzero.default, aten.count_nonzero.dim_IntList), _COUNT),
}
"""The operators that are computed in this way."""

_KEEPS_ELEMENTS = (aten.any.dims, aten.all.dims)
"""Operators that reduce nothing if they are given no dimension; the others reduce everything."""

_RESHAPES = (aten.reshape.default, aten._unsafe_view.default)
"""Operators that matter to no reduction over everything."""
