"""Fake tensors outside of a compilation, while other threads do what they like."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


class ThreadFakeTensorMode(FakeTensorMode):
    """A `FakeTensorMode` that only the thread notices which enters it.

    Entering PyTorch's own tells every thread that there is a mode. Each of two threads restores
    what it found, so the last to leave may restore what the first had set, for good: Dynamo may
    then compile nothing more.
    """

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
