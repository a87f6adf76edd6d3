"""Every report of this process, and who is told of one."""

from __future__ import annotations

import logging
import threading

import torch
from torch.fx import GraphModule

from cce_inductor.options import Options
from cce_inductor.reporting.notice import notice
from cce_inductor.reporting.report import LossReport

_logger = logging.getLogger(__name__)


class ReportLog:
    """Records of real compilations, from any thread.

    Dynamo may start a compilation over; what an abandoned attempt found is dropped.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[tuple[object, int, LossReport]] = []

    def add(self, reports: list[LossReport]) -> None:
        trace = torch._guards.CompileContext.current_trace_id()
        compile_id, attempt = (trace.compile_id, trace.attempt) if trace else (object(), 0)
        with self._lock:
            while self._entries and self._entries[-1][0] == compile_id:
                if self._entries[-1][1] >= attempt:
                    break
                self._entries.pop()
            self._entries += [(compile_id, attempt, report) for report in reports]

    def all(self) -> list[LossReport]:
        with self._lock:
            return [report for _, _, report in self._entries]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


log = ReportLog()


def publish(module: GraphModule, found: list[LossReport], options: Options) -> None:
    """Tells everybody who may ask what a compilation did: `reports`, the logger "cce_inductor"
    (TORCH_LOGS), ``torch._dynamo.utils.counters["cce_inductor"]`` and the structured trace; and
    what is said without being asked (`notice`)."""
    log.add(found)
    counters = torch._dynamo.utils.counters["cce_inductor"]
    for report in found:
        counters["rewritten" if report.rewritten else "left_alone"] += 1
        _logger.info("%s", report)
    notice(found, options)
    if not any(report.rewritten for report in found):
        return
    if _logger.isEnabledFor(logging.DEBUG):
        _logger.debug("rewritten graph:\n%s", readable(module))
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "cce_inductor_rewritten_graph", "encoding": "string"},
        payload_fn=lambda: readable(module),
    )


def readable(module: GraphModule) -> str:
    """The graph as Python code with shapes, dtypes and source lines."""
    return module.print_readable(print_output=False)


def reports() -> list[LossReport]:
    """The losses found in every compilation so far, rewritten or not, oldest first.

    A compilation is one of `torch.compile` with Inductor while `install` is in force, or one by a
    backend of this package; a function that is compiled again for other shapes is in it again.
    `explain` adds nothing.
    """
    return log.all()


def clear_reports() -> None:
    """Forgets what `reports` returned so far."""
    log.clear()
