"""Milliseconds of pieces of code that take turns, and peak memory."""

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
"""What is shorter is called several times in a row, so that no launch is seen."""
MOST_CALLS = 100


class Stopwatch:
    """Milliseconds between its making and each `mark`, of work that a device may do later."""

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
    """Of one call, from several in a row."""
    watch = Stopwatch(device)
    for _ in range(times):
        call()
    watch.mark()
    return watch.milliseconds()[0] / times


@dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        call: does it.
        flops, bytes: of one call, for its rate; 0 for none.
        fields: what else to write beside its numbers.
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
    """Medians of rounds in which all take turns, written after every round.

    Args:
        against: which of them the others' ratios are to.
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
    """For each round those that take part, beginning with another one each time."""
    for number in range(ROUNDS[device.type]):
        at = number % max(1, len(names))
        yield [*names[at:], *names[:at]]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function that tells the peak above what was in use before, in bytes; None on a
    device that does not count."""
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
