"""How Dynamo and fake tensors are used without a trace being left in them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode


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


get_data = getattr(torch._C._autograd, "_get_data_attr", None)
"""What Dynamo makes of ``tensor.data``."""


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
