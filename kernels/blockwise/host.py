"""When the host waits for the device that computes.

Where the host reads a number from a device, or needs to know how many entries of a tensor are not
zero, it waits until the device has computed everything before, and the device has nothing to do
until the host continues. It cannot wait at all while a CUDA graph is recorded.
"""

from __future__ import annotations

import torch


def runs_ahead(device: torch.device) -> bool:
    """Whether operations on a device return before they are computed."""
    return device.type != "cpu"
