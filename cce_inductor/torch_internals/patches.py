"""Everything that this package changes outside of itself: when, and what undoes it.

By `install`, until `uninstall`:

- Inductor's options ``pre_grad_custom_pass``, ``pre_grad_pass_timing`` and
  ``joint_custom_pre_pass``, and ``cache_key_tag`` of ``torch.compiler.config`` (`set_config`);
- the function by which `torch.compile` calls Inductor (`wrap_inductor`);
- with ``eager_heads=True``, ``torch.nn.Linear.forward`` (`heads.defer_all`).

By `defer`, until `undefer`: the ``forward`` of one module.

By `explain` and `cce_inductor.testing`, until they return: Dynamo's recompile limits
(`without_recompile_limit`), and its caches (`capture.forget_compiled`).

By the backend "cce_inductor", while it compiles: Inductor's options and ``cache_key_tag``.

For good, from the first compiled function on that returns deferred logits, because these can
outlive `uninstall`:

- the function by which Dynamo calls any backend (`wrap_backends`);
- tables of tensor types in installed packages, which get an entry for `DeferredLogits`
  (`deferred.type_tables`);
- with ``stale_logits="keep"``, a hook before the step of every optimizer (`deferred.kept`).

For good, from the first compilation on for a device with Triton templates:

- Inductor's decompositions (`register_decomposition`) and lowerings (`kernels.triton.lowering`) of
  this package's operators, which nothing else uses;
- Inductor's list of all Triton templates, which gets one for each kind of program;
- Triton's allocator of scratch memory, if none has been set (`allocate_scratch_memory`):
  compiled kernels need it as long as they live.

For good: the operators in ``torch.ops.cce_inductor``, from the import of their modules on, and
``torch._dynamo.utils.counters["cce_inductor"]``, from the first report on; and a function that runs
at the exit of the process, from the first `install` on (`reporting.notice`).

Modes and contexts that are entered and left within one call are not listed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch


def set_config(config: ModuleType, name: str, value: Any) -> Callable[[], None]:
    """Set an option of a torch config module in all threads.

    From torch 2.13, an assignment holds in the current context only. Another thread, or the next
    cell of a notebook, does not see it. The default, which all contexts fall back to, is therefore
    set as well.

    Returns:
        A function that restores the previous value.
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


def without_recompile_limit() -> contextlib.AbstractContextManager[None]:
    """Return a context in which Dynamo recompiles a function any number of times."""
    limit = 2**31
    context: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch(
        recompile_limit=limit, accumulated_recompile_limit=limit
    )
    return context


def allocate_scratch_memory() -> None:
    """Make PyTorch allocate the scratch memory of Triton kernels if no allocator has been set.

    Kernels with tensor descriptors need scratch memory. Triton asks the allocator of the current
    context for it. Inductor sets one before it launches a kernel, but from torch 2.13 only before
    the first launch: in another thread (autograd's) or context (the next cell of a notebook),
    Triton's default allocator raises an error. This function replaces the default. An allocator
    that the user has set is still used.
    """
    from triton.runtime._allocation import NullAllocator

    NullAllocator.__call__ = _device_bytes


def _device_bytes(unset: Any, size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Return memory of the current device. PyTorch aligns it to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def register_decomposition(operator: Any, function: Callable[..., Any]) -> None:
    """Make Inductor decompose an operator, even in a compilation that has begun."""
    from torch._inductor import decomposition

    decomposition.decompositions[operator] = function
    decomposition.fast_random_decomps()[operator] = function  # a cached copy


Wrapper = Callable[[Callable[[Any, Any], Any], Any, Any], Any]
"""A function of a compiler, a graph and its example inputs, which calls the compiler."""


def wrap_inductor(wrapper: Wrapper) -> Callable[[], None] | None:
    """Wrap the function that `torch.compile` calls to compile a graph with Inductor.

    Returns:
        A function that removes the wrapper, None if this version of torch has no such function.
    """
    owner = getattr(torch, "_TorchCompileInductorWrapper", None)
    return _wrap_method(owner, "__call__", ["self", "model_", "inputs_"], wrapper)


def wrap_backends(wrapper: Wrapper) -> Callable[[], None] | None:
    """Wrap the function that Dynamo calls to compile a graph with any backend.

    Returns:
        A function that removes the wrapper, None if this version of torch has no such function.
    """
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
