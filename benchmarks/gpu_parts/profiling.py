"""The time of each kernel that a call launches, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def kernel_times(call: Callable[[], object], calls: int = 5) -> dict[str, float]:
    """Return the mean milliseconds per call of each kernel by its name, the longest first."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiled.events():
        # Inductor's annotations of whole graphs are also on the device's timeline.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            ms = event.time_range.elapsed_us() / 1e3 / calls
            times[event.name] = times.get(event.name, 0.0) + ms
    return dict(sorted(times.items(), key=lambda item: -item[1]))
