"""Dynamo and fake tensors, used in a way that leaves nothing behind in them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode


def forget_compiled(backend: Callable[..., Any]) -> None:
    """Remove what `backend` compiled from Dynamo's caches.

    Otherwise each capture would stay there and count towards the recompile limit of the code.
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


get_data = getattr(torch._C._autograd, "_get_data_attr", None)
"""The function that stands for ``tensor.data`` in a captured graph."""


def is_compiled_in_vain(module: torch.nn.Module) -> bool:
    """Whether ``module.compile()`` was called for a module of `torch.nn`, and compiles nothing.

    Dynamo skips the code of `torch.nn`: the method that it is given to compile, and what that calls
    there. From 2.14, it gets the method in a function that it captures. Before, that happens only
    with ``wrap_top_frame``.
    """
    return inspect.ismethod(getattr(module._compiled_call_impl, "__wrapped__", None))


@contextlib.contextmanager
def in_this_thread(mode: TorchDispatchMode) -> Iterator[None]:
    """Enter a mode in this thread only.

    ``with mode`` also sets a flag that all threads share. If two threads enter modes at the same
    time, the last one to leave can restore the flag that the first one had set. Dynamo then
    stops compiling.
    """
    _push_mode(mode)
    try:
        yield
    finally:
        _pop_mode()


class ThreadFakeTensorMode(FakeTensorMode):
    """A `FakeTensorMode` that is entered in one thread only, like `in_this_thread`."""

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
