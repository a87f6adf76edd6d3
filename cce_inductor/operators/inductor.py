"""How Inductor compiles the operators of `ops` on devices that have Triton templates.

The operators are decomposed into those of `kernels.triton.specification`, for which
`kernels.triton.lowering` has templates, and small tensor code, which Inductor fuses. An operator
that cannot be decomposed stays as it is, and runs the blockwise kernels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.utils._triton import has_triton

from cce_inductor.kernels import sampling
from cce_inductor.kernels.head import Head, Wanted
from cce_inductor.kernels.triton import tiled
from cce_inductor.kernels.triton.gradient import UntiledError
from cce_inductor.operators.fingerprint import sources
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.patches import allocate_scratch_memory, register_decomposition

_log = logging.getLogger(__name__)


def prepare(input: Tensor) -> None:
    """Make Inductor use the templates, if it may be compiling for a device that has them."""
    if input.device.type in tiled.DEVICES and TracingContext.try_get() is not None:
        register()


@functools.cache
def register() -> None:
    from cce_inductor.kernels.triton import lowering

    operators = torch.ops.cce_inductor
    for operator, decomposition in (
        (operators.reduce_rows.default, _reduce_rows),
        (operators.reduce_rows_backward.default, _reduce_rows_backward),
    ):
        register_decomposition(operator, _or_undecomposed(decomposition))
    allocate_scratch_memory()
    lowering.register()


def _or_undecomposed(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """Fall back to the undecomposed operator, which is slower, if the decomposition raises."""

    @functools.wraps(decomposition)
    def decomposed(*arguments: Any) -> Any:
        try:
            return decomposition(*arguments)
        except Exception:
            surprised("a loss runs its blockwise kernels, which are slower on a GPU")
            return NotImplemented

    return decomposed


def _reduce_rows(input: Tensor, *arguments: Any) -> Any:
    head = Head.of(*arguments)
    return (
        tiled.compute_statistics(input, head, sources())
        if _is_tiled(input, head)
        else NotImplemented
    )


def _reduce_rows_backward(
    grads: Sequence[Tensor | None],
    results: Sequence[Tensor],
    input: Tensor,
    *arguments: Any,
) -> Any:
    head, output_mask = Head.of(*arguments[:-1]), arguments[-1]
    if not _is_tiled(input, head):
        return NotImplemented
    wanted = Wanted.of(output_mask)
    try:
        gradients = tiled.compute_gradients(grads, results, input, head, wanted, sources())
    except UntiledError as why:
        _warn(f"the gradient has no template: {why}")
        return NotImplemented
    return gradients.computed()


def has_templates(input: Tensor, head: Head) -> bool:
    """Whether the operators have templates for the rows of `input` and a head."""
    return _may_be_tiled(input, head) and _reason_against(input.device, head) is None


def _is_tiled(input: Tensor, head: Head) -> bool:
    """Return `has_templates`, and warn of a reason against them."""
    if not _may_be_tiled(input, head):
        return False
    why = _reason_against(input.device, head)
    if why is not None:
        _warn(why)
    return why is None


def _may_be_tiled(input: Tensor, head: Head) -> bool:
    """Whether there is something to launch, on a kind of device for which templates exist, and the
    gradient is exact. The blockwise kernels compute a sampled one, and the statistics that it needs
    of the forward: that is no reason to warn."""
    is_empty = isinstance(input.shape[0], int) and input.shape[0] == 0
    return input.device.type in tiled.DEVICES and not is_empty and not sampling.applies(head)


def _reason_against(device: torch.device, head: Head) -> str | None:
    """Return why there are no templates for a head on a device; None if there are."""
    return tiled.reason_against(head) or _reason_against_device(device)


def _reason_against_device(device: torch.device) -> str | None:
    """Return why a device has no templates; None if it has some."""
    if not has_triton():
        return "Triton is not installed"
    if torch.version.hip:
        return "the templates are for NVIDIA devices"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the templates are for devices of compute capability 8.0 and later"
    return None


def _warn(why: str) -> None:
    _log.warning("cce_inductor uses its blockwise kernels, which are slower on a GPU: %s", why)
