"""The reports of this process, and where they are published."""

from __future__ import annotations

import collections
import itertools
import logging
import threading
from collections.abc import Collection

import torch
from torch.fx import GraphModule

from cce_inductor.options import Options
from cce_inductor.reporting.notice import warn_of_large_losses
from cce_inductor.reporting.report import LossReport

_logger = logging.getLogger(__name__)


MOST_REPORTS = 10_000


class ReportLog:
    """The latest reports of compilations in any thread.

    Dynamo may start a compilation again. The reports of the abandoned attempt are dropped.
    """

    def __init__(self, limit: int = MOST_REPORTS) -> None:
        """Keep at most `limit` reports."""
        self._lock = threading.Lock()
        self._entries: collections.deque[tuple[object, int, LossReport]] = collections.deque(
            maxlen=limit
        )
        self._count = 0

    def add(self, reports: list[LossReport]) -> None:
        trace = torch._guards.CompileContext.current_trace_id()
        compile_id, attempt = (trace.compile_id, trace.attempt) if trace else (object(), 0)
        with self._lock:
            while self._entries and self._entries[-1][0] == compile_id:
                if self._entries[-1][1] >= attempt:
                    break
                self._entries.pop()
                self._count -= 1
            self._count += len(reports)
            self._entries.extend((compile_id, attempt, report) for report in reports)

    def gradients_with_losses(self, locations: Collection[str | None]) -> None:
        """Complete the reports of the compilation that is under way: `LossReport.with_loss`.

        It is called once for each graph of a compilation, which may have graphs inside of others.

        Args:
            locations: those of the losses whose forward computes the gradient as well.
        """
        trace = torch._guards.CompileContext.current_trace_id()
        compile_id = trace.compile_id if trace else None
        with self._lock:
            for place, (entry_id, attempt, report) in enumerate(self._entries):
                if entry_id == compile_id and report.rewritten:
                    is_made = bool(report.with_loss) or report.location in locations
                    report = report.with_gradient(made_with_loss=is_made)
                    self._entries[place] = entry_id, attempt, report

    def all(self) -> list[LossReport]:
        with self._lock:
            return [report for _, _, report in self._entries]

    @property
    def count(self) -> int:
        """The number of reports so far, including those that are not kept any more."""
        return self._count

    def since(self, count: int) -> list[LossReport]:
        """Return the kept reports that came after the first `count`."""
        with self._lock:
            new = max(0, self._count - count)
            return [report for _, _, report in itertools.islice(reversed(self._entries), new)][::-1]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


log = ReportLog()


def publish(module: GraphModule, reports: list[LossReport], options: Options) -> None:
    """Publish the reports of one compilation.

    The reports go to `reports`, to the logger "cce_inductor" (``TORCH_LOGS``), and to
    ``torch._dynamo.utils.counters["cce_inductor"]``; a rewritten graph goes to the structured
    trace; and `notice.warn_of_large_losses` warns of large losses that were left alone.

    Args:
        module: the graph after the pass.
        reports: what was done about each loss in it.
        options: the options of the pass.
    """
    log.add(reports)
    counters = torch._dynamo.utils.counters["cce_inductor"]
    for report in reports:
        counters["rewritten" if report.rewritten else "left_alone"] += 1
        _logger.info("%s", report)
    warn_of_large_losses(reports, options)
    if not any(report.rewritten for report in reports):
        return
    if _logger.isEnabledFor(logging.DEBUG):
        _logger.debug("rewritten graph:\n%s", readable(module))
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "cce_inductor_rewritten_graph", "encoding": "string"},
        payload_fn=lambda: readable(module),
    )


def readable(module: GraphModule) -> str:
    """Return a graph as Python code with shapes, dtypes and source lines."""
    return module.print_readable(print_output=False)


def reports() -> list[LossReport]:
    """Return the losses of all compilations so far, rewritten or not, oldest first.

    These are compilations of `torch.compile` with Inductor while `install` is in force, and with
    the backends of this package. A function that is compiled again for other shapes is reported
    again. `explain` adds nothing. Only the last 10,000 reports are kept.
    """
    return log.all()


def clear_reports() -> None:
    """Forget all reports so far."""
    log.clear()
