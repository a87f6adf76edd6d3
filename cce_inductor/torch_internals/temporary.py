"""Compile a function temporarily, as `explain` and `cce_inductor.testing` do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cce_inductor.torch_internals.capture import forget_compiled
from cce_inductor.torch_internals.patches import without_recompile_limit


@contextlib.contextmanager
def temporarily_compiled(
    fn: Callable[..., Any], backend: Callable[..., Any]
) -> Iterator[Callable[..., Any]]:
    """Compile `fn` with `backend` for a with-block.

    Afterwards Dynamo has forgotten it, and the random number generators are as they were.
    """
    try:
        with preserved_random_state(), without_recompile_limit():
            yield torch.compile(uncompiled(fn), backend=backend)
    finally:
        forget_compiled(backend)


def preserved_random_state() -> contextlib.AbstractContextManager[Any]:
    """Restore the random number generators of all devices at the end of a with-block."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    context: contextlib.AbstractContextManager[Any] = torch.random.fork_rng(devices=devices)
    return context


def uncompiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function or module that `torch.compile` was given, if `fn` is its result."""
    original: Callable[..., Any] = getattr(
        fn, "_torchdynamo_orig_callable", getattr(fn, "_orig_mod", fn)
    )
    return original
