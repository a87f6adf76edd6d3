"""How much of the gradient of the logits the sampled losses have computed."""

from __future__ import annotations

import threading

_lock = threading.Lock()
_computed = _every = 0


def count(computed: int, every: int) -> None:
    """Record that a backward computed some of its pairs of a row and a block of the vocabulary."""
    global _computed, _every
    with _lock:
        _computed, _every = _computed + computed, _every + every


def share_visited() -> float | None:
    """Return the share of the logits whose gradient was computed since the last call.

    Only losses with `sample_below` > 0 are counted whose gradient can be sampled. The share is 1 if
    so much would have been computed that everything was. It costs nothing: call it after each step,
    or when you log.

    Returns:
        A number in [0, 1]; None if there was no backward of such a loss since the last call.
    """
    global _computed, _every
    with _lock:
        computed, every, _computed, _every = _computed, _every, 0, 0
    return computed / every if every else None
