"""Private functions of PyTorch about tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def forbid_memory(tensor: torch.Tensor) -> None:
    """Make code that reads the memory of a tensor without any raise an error, not crash."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor.detach()``, which shares the tensor's version counter.

    Within `__torch_dispatch__`, ``tensor.detach()`` itself would get a counter of its own.
    """
    if tensor.is_inference():
        return tensor.detach()
    key = torch._C.DispatchKey.ADInplaceOrView
    with torch._C._PreserveDispatchKeyGuard():
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        torch._C._dispatch_tls_set_dispatch_key_included(key, True)
        return tensor.detach()


def without_hooks_on_saved_tensors() -> contextlib.AbstractContextManager[None]:
    """Return a context in which no hooks of the user's see the tensors that autograd saves."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def keeps_graph() -> bool:
    """Whether the backward that is in progress was called with ``retain_graph=True``."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def compiles_backwards() -> bool:
    """Whether a backward that starts now would be compiled ("compiled autograd")."""
    from torch._dynamo import compiled_autograd

    return torch._dynamo.config.compiled_autograd or compiled_autograd.compiled_autograd_enabled


def in_compiled_backward() -> bool:
    """Whether the backward that is in progress is a compiled one."""
    from torch._dynamo import compiled_autograd

    return bool(compiled_autograd.in_compiled_autograd_region)


def number_of_backward() -> int:
    """Return a number that no other backward has had, or has, than the one in progress."""
    return int(torch._C._current_graph_task_id())


def version_of(tensor: torch.Tensor) -> int | None:
    """Return PyTorch's count of changes in place, None in inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


def in_backward() -> bool:
    """Return whether this thread runs a backward."""
    return number_of_backward() >= 0


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward that is in progress has finished."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def without_torch_function() -> Any:
    """Return a context in which ``__torch_function__`` of tensor subclasses is not called."""
    return torch._C.DisableTorchFunctionSubclass()


@contextlib.contextmanager
def as_outside_of_dispatch() -> Iterator[None]:
    """Within `__torch_dispatch__`, call functions as a user's code does: autograd records them, and
    ``__torch_function__`` sees them."""
    with (
        torch.overrides.enable_reentrant_dispatch(),
        torch._C._EnableTorchFunction(),
        torch._C._PreserveDispatchKeyGuard(),
    ):
        # The caller may be a mode of the user's. While it is handling the call, it is not active,
        # but the state that was restored says that a mode is.
        if torch._C._len_torch_dispatch_stack() == 0:
            for name in ("Python", "PythonTLSSnapshot"):
                key = getattr(torch._C.DispatchKey, name)
                torch._C._dispatch_tls_set_dispatch_key_included(key, False)
        yield


def is_composite(func: torch._ops.OpOverload) -> bool:
    """Whether an operator is implemented by other operators, gradients included."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


def gathered_parameters() -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield each parameter that FSDP2 has gathered, and whether it is freed after the forward.

    A module has one group of parameters; from torch 2.13, it may have several.
    """
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
