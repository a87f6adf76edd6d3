"""Timing of functions in alternating rounds, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .results import Fields, Results, described

ROUNDS = {"cuda": 9, "cpu": 3}
LEAST_MS = 10.0
"""A shorter call is repeated, so that the launch overhead is not measured."""
MOST_CALLS = 100


class Stopwatch:
    """Measures milliseconds from its creation to each `mark`, with CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            torch.cuda.synchronize(device)
        self._marks: list[torch.cuda.Event | float] = []
        self.mark()

    def mark(self) -> None:
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        start, *marks = self._marks
        if self._on_cuda:
            torch.cuda.synchronize()
            return [start.elapsed_time(mark) for mark in marks]
        return [(mark - start) * 1e3 for mark in marks]


def milliseconds(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Return the milliseconds of one call, from `times` calls in a row."""
    watch = Stopwatch(device)
    for _ in range(times):
        call()
    watch.mark()
    return watch.milliseconds()[0] / times


@dataclass(frozen=True)
class Work:
    """A function to time.

    Attributes:
        call: the function.
        flops, bytes: the work of one call, for the rates; 0 if there is no such rate.
        fields: other fields of the result.
    """

    call: Callable[[], object]
    flops: float = 0.0
    bytes: float = 0.0
    fields: Fields = field(default_factory=dict)

    def rates(self, ms: float) -> Fields:
        rates = {}
        if self.flops:
            rates["tflops"] = self.flops / ms / 1e9
        if self.bytes:
            rates["gb_per_s"] = self.bytes / ms / 1e6
        return rates


def compare(
    results: Results, work: Mapping[str, Work], device: torch.device, against: str | None = None
) -> dict[str, float]:
    """Time functions in alternating rounds; write and return the medians.

    Args:
        results: where the medians are written, after each round.
        work: the functions by name.
        device: where they run.
        against: the name of the function to which ratios are computed.
    """
    results.plan(*work)
    times: dict[str, int] = {}
    for name, each in work.items():

        def prepare(name: str = name, each: Work = each) -> Fields:
            each.call()
            once = milliseconds(each.call, device)
            times[name] = max(1, min(MOST_CALLS, round(LEAST_MS / max(once, 1e-3))))
            return {"ms": once, **each.rates(once), **each.fields}

        results.attempt(name, prepare)
    samples: dict[str, list[float]] = {name: [] for name in times}
    medians: dict[str, float] = {}
    for names in turns(list(samples), device):
        for name in names:
            try:
                sample = milliseconds(work[name].call, device, times[name])
            except Exception as error:
                results.reason(name, described(error))
                del samples[name]
                continue
            samples[name].append(sample)
        medians = {name: statistics.median(each) for name, each in samples.items() if each}
        for name, ms in medians.items():
            fields = {"ms": ms, "rounds": len(samples[name]), **work[name].rates(ms)}
            if against in medians and name != against:
                fields |= {"ratio": ms / medians[against], "against": against}
            results.number(name, **fields)
        if results.left() <= 0:
            break
    return medians


def turns(names: Sequence[str], device: torch.device) -> Iterator[list[str]]:
    """Yield the order of the names for each round; each round starts with another name."""
    for number in range(ROUNDS[device.type]):
        at = number % max(1, len(names))
        yield [*names[at:], *names[:at]]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the peak above the memory in use before, in bytes.

    On the CPU it returns None.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)

    def peak() -> int:
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    yield peak
