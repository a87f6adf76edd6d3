"""Warnings: which large losses were left alone, and at the end that none was rewritten."""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import multiprocessing
import threading

import torch

from cce_inductor.options import DEFAULT_MIN_LOGITS_BYTES, Options, is_in_force
from cce_inductor.reporting.report import LossReport
from cce_inductor.torch_internals.capture import is_compiled_in_vain

_log = logging.getLogger(__name__)


def is_large(size: int | None, options: Options) -> bool:
    """Return whether stored logits are worth a warning.

    They are if they take at least `min_logits_bytes`, or its default if that is more: a lower value
    is for tests with small models, where stored logits cost nothing.

    Args:
        size: the size of the logits in bytes, None if it is known only at run time.
        options: the options of the pass.
    """
    return size is None or size >= max(options.min_logits_bytes, DEFAULT_MIN_LOGITS_BYTES)


_MOST_PLACES = 10_000


class _Tally:
    """Counts of what the pass has seen in this process.

    Attributes:
        graphs: the number of graphs.
        losses: the number of losses in them.
        rewritten: the number of losses that were rewritten.
    """

    def __init__(self) -> None:
        self.graphs = self.losses = self.rewritten = 0
        self._lock = threading.Lock()
        self._warned: dict[str, None] = {}  # the latest places, in the order of their warnings

    def add(self, reports: list[LossReport]) -> None:
        """Count the losses of one graph."""
        with self._lock:
            self.graphs += 1
            self.losses += len(reports)
            self.rewritten += sum(report.rewritten for report in reports)

    def remember(self, place: str) -> bool:
        """Remember a place, with the latest 10,000; return whether it is new."""
        with self._lock:
            if place in self._warned:
                return False
            if len(self._warned) >= _MOST_PLACES:
                del self._warned[next(iter(self._warned))]
            self._warned[place] = None
            return True


tally = _Tally()


def warn_of_large_losses(reports: list[LossReport], options: Options) -> None:
    """Count the losses of a graph, and warn of large ones that were left alone.

    There is one warning for each place in the user's code. If several losses of the graph have the
    same reason, only the first is named.
    """
    tally.add(reports)
    reasons: set[str] = set()
    for report in reports:
        if report.reason is None or report.reason in reasons:
            continue
        if not report.failed and is_large(report.logits_bytes, options):
            reasons.add(report.reason)
            if tally.remember(report.location or report.loss):
                _log.warning("cce_inductor: %s", report.sentence)


@functools.cache
def warn_at_exit() -> None:
    """Warn at the end of this process if nothing was rewritten."""
    atexit.register(_at_exit)


def _at_exit() -> None:
    # The workers of a data loader import the script, but are not expected to compile anything.
    is_helper = multiprocessing.parent_process() is not None and not tally.graphs
    if is_in_force() and not is_helper and not tally.rewritten:
        in_place = 0 if tally.losses else compiled_in_place()
        _log.warning("cce_inductor: %s", exit_warning(tally.graphs, tally.losses, in_place))


def compiled_in_place() -> int:
    """Return for how many of PyTorch's linear modules ``module.compile()`` compiled nothing."""
    linear = torch.nn.Linear
    return sum(
        issubclass(type(each), linear)
        and type(each).forward is linear.forward
        and is_compiled_in_vain(each)
        for each in gc.get_objects()
    )


def exit_warning(graphs: int, losses: int, in_place: int) -> str:
    """Return what to warn of at the end of a process in which nothing was rewritten.

    Args:
        graphs: the number of graphs that were compiled.
        losses: the number of losses in them.
        in_place: see `compiled_in_place`.
    """
    if in_place:
        return (
            f"it was installed, and nothing was rewritten: {in_place} torch.nn.Linear module(s) "
            "were compiled by module.compile(), which compiles nothing for PyTorch's own modules "
            "before torch 2.14. Compile the function that calls them, or use "
            "cce_inductor.defer(module)."
        )
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
