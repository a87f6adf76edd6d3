"""Work in several threads, each of which computes blocks of its own.

PyTorch divides every operation among its threads, and waits for all of them before the next one. A
block of logits takes some twenty short operations. If another program keeps one of the cores busy,
each of them waits until the operating system returns the core, which takes longer than the
operation. Here a thread computes whole blocks, and a thread on a busy core computes fewer of them.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

MOST = 4
"""The largest number of lanes. Where PyTorch has more threads, several of them work in each."""


class Lane(Protocol):
    """What computes blocks, with its own buffers."""

    def compute(self, group: int) -> None:
        """Compute a group of blocks. The other lanes compute other groups meanwhile."""

    def commit(self) -> None:
        """Add what was computed to what the lanes share. This happens one group after another, in
        the order of their numbers, so that sums have the same bits in each run."""


def lane_count(device: torch.device, groups: int, lane_bytes: int, most_bytes: int) -> int:
    """Return how many lanes compute the groups.

    Args:
        device: where they are computed; there are several lanes only on the CPU.
        groups: the number of groups.
        lane_bytes: the memory of a lane, beside its share of the workspace.
        most_bytes: the memory that all lanes together may have.
    """
    if device.type != "cpu":
        return 1
    return max(1, min(MOST, torch.get_num_threads(), groups, most_bytes // max(1, lane_bytes)))


def run(lanes: Sequence[Lane], groups: int) -> None:
    """Compute the groups 0, 1, ..., each in one of the lanes."""
    if len(lanes) == 1:
        for group in range(groups):
            lanes[0].compute(group)
            lanes[0].commit()
        return
    schedule = _Schedule(groups)
    pool = _pool(len(lanes), max(1, torch.get_num_threads() // len(lanes)))
    for done in [pool.submit(schedule.work, lane) for lane in lanes]:
        done.result()


class _Schedule:
    """Which group is computed next, and which is committed next."""

    def __init__(self, groups: int):
        self._groups = iter(range(groups))
        self._committed = 0
        self._failed = False
        self._changed = threading.Condition()
        self._inference = torch.is_inference_mode_enabled()  # of the caller's thread

    def work(self, lane: Lane) -> None:
        """Compute groups until there are no more."""
        try:
            with torch.inference_mode(self._inference), torch.no_grad():
                while (group := self._next()) is not None:
                    lane.compute(group)
                    with self._changed:
                        while self._committed != group and not self._failed:
                            self._changed.wait()
                        if self._failed:
                            return
                        lane.commit()
                        self._committed += 1
                        self._changed.notify_all()
        except BaseException:
            with self._changed:
                self._failed = True
                self._changed.notify_all()
            raise

    def _next(self) -> int | None:
        with self._changed:
            return None if self._failed else next(self._groups, None)


_pool_lock = threading.Lock()


def _pool(lanes: int, threads: int) -> ThreadPoolExecutor:
    """Return threads for `lanes` lanes, in which PyTorch uses `threads` threads each."""
    with _pool_lock:
        return _new_pool(lanes, threads)


@functools.lru_cache(maxsize=4)
def _new_pool(lanes: int, threads: int) -> ThreadPoolExecutor:
    ready = threading.Barrier(lanes)
    before: list[int] = []

    def begin() -> None:
        before.append(torch.get_num_threads())
        torch.set_num_threads(threads)
        ready.wait()

    pool = ThreadPoolExecutor(lanes, "cce_inductor", begin)
    for done in [pool.submit(ready.wait) for _ in range(lanes)]:
        done.result()
    # They also changed the number that new threads begin with. `set_num_threads` changes that of
    # the calling thread as well, so a thread of its own restores it. The first number in the list
    # was read before any was changed.
    restoring = threading.Thread(target=torch.set_num_threads, args=[before[0]])
    restoring.start()
    restoring.join()
    return pool


def _begin_child() -> None:
    """Forget the threads in a child process, which has none but the one that forked."""
    global _pool_lock
    _pool_lock = threading.Lock()
    _new_pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)
