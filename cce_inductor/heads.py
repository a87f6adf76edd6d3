"""Heads that are not compiled: linear modules whose logits are deferred in eager code.

`defer` changes one module, by a ``forward`` of its own; ``install(eager_heads=True)`` changes
``torch.nn.Linear`` as long as it is in force. Code that Dynamo captures sees the usual forward,
where the pass does the rest.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module

from cce_inductor.deferred.boundary import prepare_compilers
from cce_inductor.deferred.kept import keep
from cce_inductor.deferred.tensor import DeferredLogits
from cce_inductor.deferred.tensor import defer as defer_product
from cce_inductor.options import options_in_force
from cce_inductor.recipe.sharded import is_freed_after_forward
from cce_inductor.recipe.stale import is_plain
from cce_inductor.torch_internals.callers import is_tracing_transform

_log = logging.getLogger(__name__)


def defer(module: Module) -> Module:
    """Have a head that is not compiled return deferred logits.

    A loss of them, eager or compiled, is fused with the head, so that the logits are not stored.
    Logits of fewer than ``min_logits_bytes`` (see `Options`) are computed as before; chunks of one
    hidden state count together. So are logits whose weight FSDP frees after the forward of the
    module. The change survives ``state_dict``, ``copy.deepcopy``, ``fully_shard`` and
    ``Module.compile``.

    Args:
        module: a `torch.nn.Linear`, also with a tied weight, a bias, or PEFT's LoRA adapters.

    Returns:
        The module.

    Raises:
        TypeError: the module is not linear, or its weight is not a floating-point matrix (for
            example, because it is quantized).
    """
    for linear in _linears(module):
        linear.forward = MethodType(forward, linear)
    prepare_compilers()
    return module


def undefer(module: Module) -> Module:
    """Undo `defer`. Does nothing to a module that returns its logits as before.

    Returns:
        The module.
    """
    for each in module.modules():
        if getattr(each.__dict__.get("forward"), "__func__", None) is forward:
            del each.__dict__["forward"]
    return module


def defer_all() -> Callable[[], None]:
    """Have every `torch.nn.Linear` with more outputs than inputs return deferred logits.

    Returns:
        A function that undoes it.
    """
    original = Linear.forward
    Linear.forward = _forward_of_all
    prepare_compilers()

    def undo() -> None:
        Linear.forward = original

    return undo


def _linears(module: Module) -> list[Linear]:
    """Return the linear modules that compute the logits of a head.

    PEFT's LoRA layer adds the results of its base layer and of its adapters.
    """
    base = getattr(module, "base_layer", module)
    adapters = getattr(module, "lora_B", {}) if base is not module else {}
    linears = [base, *adapters.values()]
    for each in linears:
        kind = type(each)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not isinstance(each, Linear) or kind.forward not in (Linear.forward, _plain_forward):
            raise TypeError(
                f"cce_inductor.defer takes the head of a model, a torch.nn.Linear, and this is a "
                f"{name}, whose logits are not a matrix product that can be computed later"
            )
        if not each.weight.is_floating_point() or each.weight.dim() != 2:
            raise TypeError(
                f"cce_inductor.defer: the weight of this {name} is not a floating-point matrix but "
                f"{each.weight.dtype} of shape {tuple(each.weight.shape)}"
            )
    return linears


_plain_forward = Linear.forward


def forward(self: Linear, input: Tensor) -> Tensor:
    """The forward of a module that `defer` has changed."""
    logits = _deferred(self, input)
    return type(self).forward(self, input) if logits is None else logits


def _forward_of_all(self: Linear, input: Tensor) -> Tensor:
    logits = None
    if not torch.compiler.is_compiling() and self.out_features > self.in_features:
        logits = _deferred(self, input)
    return _plain_forward(self, input) if logits is None else logits


def _deferred(linear: Linear, input: Tensor) -> Tensor | None:
    """Return the result of a linear module as deferred logits, None if it must be computed."""
    if torch.compiler.is_compiling() or not _can_be_deferred(linear, input):
        return None
    dtype = _dtype_of_product(input)
    rows = (input if input._base is None else input._base).numel() // max(linear.in_features, 1)
    options = options_in_force()
    if rows * linear.out_features * dtype.itemsize < options.min_logits_bytes:
        return None
    if is_freed_after_forward([linear.weight]):
        _warn_of_freed_weight()
        return None
    logits = defer_product(input, linear.weight, linear.bias, dtype)
    if options.stale_logits == "keep" and isinstance(logits, DeferredLogits):
        keep(logits)
    return logits


def _can_be_deferred(linear: Linear, input: Any) -> bool:
    tensors = [each for each in (input, linear.weight, linear.bias) if each is not None]
    return (
        all(isinstance(each, Tensor) and is_plain(each) for each in tensors)
        and input.dim() > 1
        and input.shape[-1] == linear.in_features
        and (input.dtype == linear.weight.dtype or torch.is_autocast_enabled(input.device.type))
        and input.device == linear.weight.device
        and not is_tracing_transform()
    )


@functools.cache
def _warn_of_freed_weight() -> None:
    _log.warning(
        "the logits of a head that is not compiled are computed and stored: FSDP frees the weight "
        "after the forward of the head. To change that: pass reshard_after_forward=False for the "
        "head, or make it a part of the root unit"
    )


def _dtype_of_product(input: Tensor) -> torch.dtype:
    """Return the dtype of ``F.linear``, which autocast may change for all dtypes but float64."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return input.dtype
