"""Everything that is changed in the user's torch and Triton while this package is in use."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch


def set_config(config: ModuleType, name: str, value: Any) -> Callable[[], None]:
    """Sets an option of a torch config module for every thread.

    From 2.13 an assignment holds for the current context only, so a thread that compiles on its
    own, or a notebook's next cell, would not see it; there the fallback of all contexts, the
    default, is set as well.

    Returns:
        A function that puts back what was there.
    """
    previous = getattr(config, name)
    setattr(config, name, value)
    entry = config._config[name]
    fallbacks: dict[str, Any] = {}
    if isinstance(getattr(entry, "user_override", None), ContextVar):
        fallbacks["default"] = entry.default
        if isinstance(getattr(entry, "env_value_default", None), str):
            fallbacks["env_value_default"] = entry.env_value_default
        for fallback in fallbacks:
            setattr(entry, fallback, value)

    def restore() -> None:
        setattr(config, name, previous)
        for fallback, old in fallbacks.items():
            setattr(entry, fallback, old)

    return restore


def allocate_scratch_memory() -> None:
    """Lets kernels that need memory of their own, as tensor descriptors do, have it in any thread.

    Triton asks an allocator that is set for the current context only. Inductor sets one before it
    launches a kernel; from 2.13 only before the first launch, so that another thread (autograd's)
    or context (a notebook's next cell) has the one that only raises an error. PyTorch allocates
    instead. An allocator that somebody has set is used as before.
    """
    from triton.runtime._allocation import NullAllocator

    NullAllocator.__call__ = _device_bytes


def _device_bytes(unset: Any, size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory of the current device, whose allocator aligns to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def register_decomposition(operator: Any, function: Callable[..., Any]) -> None:
    """Makes Inductor decompose an operator, also in a compilation that has begun."""
    from torch._inductor import decomposition

    decomposition.decompositions[operator] = function
    decomposition.fast_random_decomps()[operator] = function  # a cached copy with some more


Wrapper = Callable[[Callable[[Any, Any], Any], Any, Any], Any]
"""Called with a compiler, a graph and its example inputs; calls the compiler."""


def wrap_inductor(wrapper: Wrapper) -> Callable[[], None] | None:
    """Puts a function around what `torch.compile` calls to compile a graph with Inductor.

    Returns:
        A function that takes it away again; None if the place was not found.
    """
    owner = getattr(torch, "_TorchCompileInductorWrapper", None)
    return _wrap_method(owner, "__call__", ["self", "model_", "inputs_"], wrapper)


def wrap_backends(wrapper: Wrapper) -> Callable[[], None] | None:
    """The same for what Dynamo calls to compile a graph with any backend."""
    from torch._dynamo.output_graph import OutputGraph

    return _wrap_method(
        OutputGraph, "call_user_compiler", ["self", "gm", "example_inputs"], wrapper
    )


def _wrap_method(
    owner: Any, name: str, parameters: list[str], wrapper: Wrapper
) -> Callable[[], None] | None:
    original = getattr(owner, name, None)
    if original is None or list(inspect.signature(original).parameters)[:3] != parameters:
        return None

    @functools.wraps(original)
    def call(self: Any, module: Any, example_inputs: Any, **kwargs: Any) -> Any:
        def compiler(module: Any, example_inputs: Any) -> Any:
            return original(self, module, example_inputs, **kwargs)

        return wrapper(compiler, module, example_inputs)

    setattr(owner, name, call)

    def restore() -> None:
        if getattr(owner, name) is call:
            setattr(owner, name, original)

    return restore
