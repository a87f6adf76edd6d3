"""CUDA graphs: launches of a device that are recorded once, and then repeated as they are.

The host must not wait for the device while they are recorded.
"""

from __future__ import annotations

import torch
from torch._guards import TracingContext

DEVICE = "cuda"
"""The type of device that has them."""


def is_recording(device: torch.device) -> bool:
    """Whether what is computed on a device now is recorded for a CUDA graph."""
    # Without a driver, the second function raises an error.
    on_cuda = device.type == DEVICE and torch.cuda.is_initialized()
    return on_cuda and torch.cuda.is_current_stream_capturing()


def will_record(device: torch.device) -> bool:
    """Whether Inductor is asked to record what is compiled now for a device."""
    if device.type != DEVICE or TracingContext.try_get() is None:
        return False
    return bool(torch._inductor.config.triton.cudagraphs)
