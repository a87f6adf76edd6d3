"""What is said without being asked: which large losses were left alone, and at the end of a process
in which `install` was called, that nothing was rewritten."""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import threading

from cce_inductor.options import DEFAULT_MIN_LOGITS_BYTES, Options, is_in_force
from cce_inductor.reporting.report import LossReport

_log = logging.getLogger(__name__)


def is_large(size: int | None, options: Options) -> bool:
    """Whether somebody would want to hear of logits that are stored, be it that nobody asked.

    Who raises `min_logits_bytes` wants to hear of no smaller ones; who lowers it, to try small
    models say, has nothing to lose by them.

    Args:
        size: in bytes, None if it is known only at run time.
        options: of the pass.
    """
    return size is None or size >= max(options.min_logits_bytes, DEFAULT_MIN_LOGITS_BYTES)


class _Tally:
    """Counts of this process's compilations.

    Attributes:
        graphs: how many the pass has seen.
        losses: how many were found in them.
        rewritten: how many of those were.
    """

    def __init__(self) -> None:
        self.graphs = self.losses = self.rewritten = 0
        self._lock = threading.Lock()
        self._said: set[str] = set()

    def add(self, found: list[LossReport]) -> None:
        with self._lock:
            self.graphs += 1
            self.losses += len(found)
            self.rewritten += sum(report.rewritten for report in found)

    def is_new(self, place: str) -> bool:
        """Whether nothing was said of a place before."""
        with self._lock:
            new = place not in self._said
            self._said.add(place)
            return new


tally = _Tally()


def notice(found: list[LossReport], options: Options) -> None:
    """Counts a compilation, and says which large losses it left alone: once a place, and of what
    one graph leaves alone for one reason the first."""
    tally.add(found)
    reasons: set[str] = set()
    for report in found:
        if report.reason is None or report.reason in reasons:
            continue
        if not report.failed and is_large(report.logits_bytes, options):
            reasons.add(report.reason)
            if tally.is_new(report.location or report.loss):
                _log.warning("cce_inductor: %s", report.sentence)


@functools.cache
def speak_at_exit() -> None:
    """From now on the end of this process is a time to say that nothing was rewritten."""
    atexit.register(_at_exit)


def _at_exit() -> None:
    said = last_word(tally.graphs, tally.losses, tally.rewritten)
    # A process of a data loader, say, that is started with the script's imports has no such task.
    is_helper = multiprocessing.parent_process() is not None and not tally.graphs
    if is_in_force() and said is not None and not is_helper:
        _log.warning("cce_inductor: %s", said)


def last_word(graphs: int, losses: int, rewritten: int) -> str | None:
    """What to say at the end of a process with that many compilations; None for nothing."""
    if rewritten:
        return None
    if not graphs:
        return (
            "it was installed, and nothing was rewritten: torch.compile compiled nothing with "
            "Inductor after cce_inductor.install(). Is the training step compiled, and does it run?"
        )
    if not losses:
        return (
            f"it was installed, and nothing was rewritten: there is no loss in the {graphs} "
            "graph(s) that were compiled. cce_inductor.explain(step, *args) shows what is in them."
        )
    return (
        f"it was installed, and nothing was rewritten: all of the {losses} loss(es) in the "
        f"{graphs} graph(s) that were compiled were left alone. TORCH_LOGS=cce_inductor or "
        "cce_inductor.reports() says why."
    )
