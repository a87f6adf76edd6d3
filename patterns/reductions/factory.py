"""Tensors that take only their dtype, device or shape from logits: ``logits.new_zeros(n)``.

Contrastive losses make labels that way, if the first class is always the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cce_inductor.patterns.language import (
    ReductionResult,
    Row,
    Site,
    call,
    pointwise,
    reduction,
    same_shape,
    size_of,
    tensor_example,
)
from cce_inductor.reporting import reasons


@reduction("new_zeros")
def new_zeros(site: Site, input: Any, *size: Any, **options: Any) -> ReductionResult:
    return _made(site, torch.zeros, torch.zeros_like, input, size, options)


@reduction("new_ones")
def new_ones(site: Site, input: Any, *size: Any, **options: Any) -> ReductionResult:
    return _made(site, torch.ones, torch.ones_like, input, size, options)


@reduction("new_full")
def new_full(site: Site, input: Any, size: Any, fill_value: Any, **options: Any) -> ReductionResult:
    return _made(site, torch.full, torch.full_like, input, (size, fill_value), options)


@reduction("expand_as")
def expand_as(site: Site, input: Any, other: Any) -> Row:
    if site.is_logits(input):
        site.unsupported(reasons.REPEATS_ROWS)
    logits = site.logits(other)
    if tensor_example(input).numel() == site.example.numel():
        site.unsupported(reasons.RESULT_MAY_SHARE_MEMORY)
    sizes = [size_of(logits, dim, size) for dim, size in enumerate(site.shape_of(logits))]
    return call(torch.Tensor.expand, input, tuple(sizes))


def _made(
    site: Site,
    function: Callable[..., Any],
    like: Callable[..., Any],
    input: Any,
    given: tuple[Any, ...],
    options: dict[str, Any],
) -> ReductionResult:
    """Return a constant tensor, or constant logits if it has the shape of the logits."""
    made, shape = site.example, tensor_example(input).shape
    if same_shape(made.shape, shape):
        filler = given[1:] if function is torch.full else ()
        return pointwise(site, like, input, *filler, **options)
    kept = {name: value for name, value in options.items() if name not in ("dtype", "device")}
    given = tuple(tuple(each) if isinstance(each, (list, tuple)) else each for each in given)
    return call(function, *given, dtype=made.dtype, device=made.device, **kept)
