"""Measure the time and peak memory of a block of code, and describe the machine.

Peak memory is the largest amount in use during the code, minus the amount in use when it began:

* on CUDA, from the statistics of PyTorch's allocator;
* on Linux, from the resident high-water mark of the process, which can be reset;
* elsewhere, from the resident size sampled every millisecond, which can miss short peaks.

The C heap keeps freed blocks for reuse, so the resident size depends on what ran before. In a
process that is started with the variables in `EXACT_MEMORY`, glibc maps each large block separately
and returns it to the system when it is freed. This costs time, so such a process measures its
memory first and calls `use_default_heap` before it measures time.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"
SAMPLE_SECONDS = 0.001
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}

# Constants of malloc.h, and the largest values to which glibc itself adjusts the two thresholds.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
DEFAULT_THRESHOLDS = {M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25}


@contextmanager
def timed(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds since the body began."""
    synchronize(device)
    start = time.perf_counter()

    def seconds() -> float:
        synchronize(device)
        return time.perf_counter() - start

    yield seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak memory since the body began, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    if libc := glibc():
        libc.malloc_trim(0)
    if os.access(CLEAR_REFS, os.W_OK):
        CLEAR_REFS.write_text(RESET_PEAK)
        before = status_bytes("VmRSS")
        yield lambda: status_bytes("VmHWM") - before
    else:
        with sampled_resident_peak() as peak:
            before = peak()
            yield lambda: peak() - before


def glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def use_default_heap() -> None:
    """Reuse freed blocks from now on, as in a process started without `EXACT_MEMORY`."""
    if libc := glibc():
        for parameter, value in DEFAULT_THRESHOLDS.items():
            libc.mallopt(parameter, value)


def status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise LookupError(f"{STATUS} has no {field}")


@contextmanager
def sampled_resident_peak() -> Iterator[Callable[[], int]]:
    """Sample the resident size in a thread; yield a function that returns the largest so far."""
    process = psutil.Process()
    largest = process.memory_info().rss
    stopped = threading.Event()

    def peak() -> int:
        nonlocal largest
        largest = max(largest, process.memory_info().rss)
        return largest

    def sample() -> None:
        while not stopped.wait(SAMPLE_SECONDS):
            peak()

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stopped.set()
        sampler.join()


def environment(device: torch.device) -> dict[str, str | int]:
    """Return the versions and the hardware that the numbers depend on."""
    described: dict[str, str | int] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
