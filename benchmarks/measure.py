"""Seconds or peak memory of a piece of code, and a description of where they were measured.

Memory is the highest amount in use during the code above what was in use when it began:

* on CUDA from the allocator's own statistics;
* on Linux from the resident high-water mark of the process, which the kernel resets on request;
* elsewhere from the resident size sampled every millisecond, which can miss short peaks.

The C heap keeps freed blocks for reuse, which makes a resident size depend on what ran before. A
process started with the variables in `EXACT_MEMORY` has glibc map every large block separately
and hand it back when it is freed. This costs time, so that such a process measures its memory
first and calls `use_default_heap` before it measures seconds.
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

# Names and values of malloc.h, and where glibc's own adjustment of the two thresholds ends.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
DEFAULT_THRESHOLDS = {M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25}


@contextmanager
def timed(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield a function that tells the seconds since the beginning of the body."""
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
    """Yield a function that tells the peak memory since the beginning of the body, in bytes."""
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
    """From now on reuse freed blocks like a process that was started without `EXACT_MEMORY`."""
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
    """Sample the resident size on a thread; yield a function that tells the largest so far."""
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
    """What the numbers depend on besides the arguments."""
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
