"""Everything that differs between the supported versions of torch (2.11 to 2.15), by feature.

No version number is compared; each function looks for what it needs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode


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


def pass_list(value: Any) -> list[Any]:
    """The passes in a custom-pass option: None, one, or (from 2.13) several."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def may_choose_pass_timing(inductor_config: ModuleType) -> bool:
    """Whether custom pre-grad passes could run before or after the cache lookup, and the user
    left the choice open (``pre_grad_pass_timing``, from 2.13; before, they always run)."""
    return getattr(inductor_config, "pre_grad_pass_timing", None) == "default"


def forget_compiled(backend: Callable[..., Any]) -> None:
    """Removes from Dynamo's caches what `backend` compiled, and nothing else.

    Otherwise each capture would stay, and count against the recompile limit of the code.
    """
    from torch._dynamo.convert_frame import input_codes, output_codes
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    for reference in (*input_codes.seen, *output_codes.seen):
        code = reference()
        entries = _debug_get_cache_entry_list(code) if code is not None else []
        of_backend = [
            entry
            for entry in entries
            if getattr(entry.backend, "compiler_fn", entry.backend) is backend
        ]
        if of_backend and len(of_backend) == len(entries):
            reset_code(code)
            continue
        for entry in of_backend:
            deleted = DeletedGuardManagerWrapper("captured for explain")
            entry.guard_manager.extra_state.invalidate(entry, deleted)


def modification_takes(argument: str) -> bool:
    """Whether a Triton template's ``modification`` has an argument (``input_shapes`` and
    ``input_dtypes``, which say more about what it is given, came with 2.13)."""
    from torch._inductor.select_algorithm import TritonTemplateKernel

    return argument in inspect.signature(TritonTemplateKernel.modification).parameters


def triton_template(name: str, grid: Any, source: str) -> Any:
    """A `TritonTemplate` whose inputs keep the layout they have (an option from 2.12)."""
    from torch._inductor.select_algorithm import TritonTemplate

    options = {}
    if "always_freeze_layout" in inspect.signature(TritonTemplate.__init__).parameters:
        options["always_freeze_layout"] = True
    return TritonTemplate(name=name, grid=grid, source=source, **options)


def selected(result: Any) -> Any:
    """The node in what `autotune_select_algorithm` returns: with the choice, from 2.12."""
    return result[0] if isinstance(result, tuple) else result


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


def size_hints(sizes: Any) -> list[int]:
    """Numbers for the sizes of a tensor in Inductor's IR (renamed in 2.12)."""
    from torch._inductor.virtualized import V

    sizevars = V.graph.sizevars
    hints = getattr(sizevars, "optimization_hints", None) or sizevars.size_hints
    return list(hints(sizes))


def saves_compiled() -> bool:
    """Whether the function that a backend returns is saved, to be loaded in another process."""
    import torch._functorch.config as functorch_config

    return bool(
        getattr(torch._dynamo.config, "caching_precompile", False)
        or getattr(functorch_config, "bundled_autograd_cache", False)
    )


def passes_run_always() -> bool:
    """Whether custom pre-grad passes run also when a cache has the compiled graph (they may not,
    from 2.13)."""
    import torch._inductor.codecache

    timing = getattr(torch._inductor.codecache, "resolve_pre_grad_pass_timing", None)
    return timing is None or timing() == "early"


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


def guarded_dictionaries() -> Iterator[dict[Any, Any]]:
    """Those that the function reads that Dynamo is about to compile, as its guards name them."""
    from torch._dynamo.output_graph import OutputGraph

    code = inspect.unwrap(OutputGraph.call_user_compiler).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return
    graph = frame.f_locals["self"]
    scope = {"L": graph.local_scope, "G": graph.global_scope}
    for guard in list(graph.guards):
        try:
            value = eval(guard.name, scope)
        except Exception:  # not every name can be told without Dynamo's own functions
            continue
        if isinstance(value, dict):
            yield value


def forbid_memory(tensor: torch.Tensor) -> None:
    """Lets code that reads the memory of a tensor without any raise an error, not crash."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


get_data = getattr(torch._C._autograd, "_get_data_attr", None)
"""What Dynamo makes of ``tensor.data``."""


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.detach()`` that counts versions with the tensor also within `__torch_dispatch__`,
    where PyTorch gives it a count of its own."""
    if tensor.is_inference():
        return tensor.detach()
    key = torch._C.DispatchKey.ADInplaceOrView
    with torch._C._PreserveDispatchKeyGuard():
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        torch._C._dispatch_tls_set_dispatch_key_included(key, True)
        return tensor.detach()


def gathered_parameters() -> Iterator[tuple[torch.Tensor, bool]]:
    """Those that FSDP2 has gathered from their shards, each with whether it is freed after the
    forward of its module (which may have several groups of them from 2.13)."""
    from torch.distributed._composable_state import _module_state_mapping

    for reference in list(_module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for parameter in getattr(group, "fsdp_params", ()):
                gathered = getattr(parameter, "_unsharded_param", None)
                if gathered is not None:
                    yield gathered, group.post_forward_mesh_info is not None


@contextlib.contextmanager
def in_this_thread(mode: TorchDispatchMode) -> Iterator[None]:
    """What ``with mode`` does for this thread alone.

    PyTorch's own tells every thread that there is a mode. Each of two threads restores what it
    found, so the last to leave may restore what the first had set, for good: Dynamo may then
    compile nothing more.
    """
    _push_mode(mode)
    try:
        yield
    finally:
        _pop_mode()


class ThreadFakeTensorMode(FakeTensorMode):
    """A `FakeTensorMode` that only the thread notices which enters it, like `in_this_thread`."""

    def __enter__(self) -> ThreadFakeTensorMode:
        before = torch._C._unset_dispatch_mode(self._mode_key)
        self.enter_stack.append((True, before, None))
        torch._C._set_dispatch_mode(self)
        return self

    def __exit__(self, *error: Any) -> None:
        torch._C._unset_dispatch_mode(self._mode_key)
        _, before, _ = self.enter_stack.pop()
        if before is not None:
            torch._C._set_dispatch_mode(before)
