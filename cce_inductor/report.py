"""What was done about each loss, as records that a person or a program can read."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from .advice import advice
from .location import describe, location
from .patterns import Logits, example
from .walk import FoundLoss

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LossReport:
    """One loss of one compiled graph.

    Attributes:
        rewritten: whether the fused operator took its place; for logits that are only returned
            (``defer_logits="always"``), whether they are deferred.
        reason: why not, in one sentence; None if it was rewritten.
        location: ``file.py:line`` of the loss in the user's code, None if unknown.
        loss: the operations from the projection to the loss.
        logits_shape: shape of the projection's result; a dynamic size is given by the value it
            had at compilation. None if the projection was not found.
        logits_dtype: dtype of the projection's result, None likewise.
        bytes_saved: bytes of one copy of those logits, if rewritten, else 0. What a training step
            saves is more: the gradient of the logits, and a float32 copy where there was one.
        deferred: whether the function also returns these logits, as `DeferredLogits`.
    """

    rewritten: bool
    reason: str | None
    location: str | None
    loss: str
    logits_shape: tuple[int, ...] | None
    logits_dtype: torch.dtype | None
    bytes_saved: int
    deferred: bool = False

    @property
    def advice(self) -> str | None:
        """What can be changed so that it is rewritten, None if nothing is known."""
        return advice(self.reason)

    @classmethod
    def of_failure(cls, node: Node, reason: str) -> LossReport:
        """The record of a loss in a graph that the pass could not look at."""
        return cls(False, reason, location(node), describe(node), None, None, 0)

    def __str__(self) -> str:
        head = "rewritten" if self.rewritten else "left alone"
        lines = [f"{head}: {self.loss}"]
        if self.location:
            lines.append(f"  at {self.location}")
        if self.logits_shape is not None:
            lines.append(f"  logits: {format_tensor(self.logits_shape, self.logits_dtype)}")
        if self.rewritten:
            lines.append(f"  not stored any more: {format_bytes(self.bytes_saved)}")
            if self.deferred:
                lines.append("  the returned logits are deferred: computed when looked at")
        else:
            lines.append(f"  because {self.reason}")
            if self.advice is not None:
                lines.append(f"  to change that: {self.advice}")
        return "\n".join(lines)


def loss_report(found: FoundLoss, reason: str | None, *, deferred: bool = False) -> LossReport:
    """The record of a loss that was rewritten (`reason` is None) or left alone."""
    return _report(found.node, found.logits, describe(found.node), reason, deferred)


def deferral_report(logits: Logits, node: Node) -> LossReport:
    """The record of logits that are deferred and of which there is no loss."""
    return _report(node, logits, "returned", None, True)


def _report(
    node: Node, logits: Logits | None, consumer: str, reason: str | None, deferred: bool
) -> LossReport:
    path = logits.path if logits is not None else ()
    shape = dtype = None
    if logits is not None:
        result = example(logits.projection.node)
        shape, dtype = tuple(size_hint(size) for size in result.shape), result.dtype
    return LossReport(
        rewritten=reason is None,
        reason=reason,
        location=location(node),
        loss=" > ".join((*path, consumer)),
        logits_shape=shape,
        logits_dtype=dtype,
        bytes_saved=logits_bytes(logits) if logits is not None and reason is None else 0,
        deferred=deferred and reason is None,
    )


def logits_bytes(logits: Logits) -> int:
    """Bytes of the projection's result, with dynamic sizes as they were at compilation."""
    result = example(logits.projection.node)
    return math.prod(size_hint(size) for size in result.shape) * result.dtype.itemsize


def size_hint(size: int | torch.SymInt) -> int:
    """The size itself, what a dynamic one was at compilation, or 2^31-1 where only data tells."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if isinstance(hint, int) else 2**31 - 1


def format_bytes(count: int) -> str:
    """`count` in the largest binary unit that keeps it at least 1."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"


def format_tensor(shape: Sequence[int], dtype: torch.dtype | None) -> str:
    """``4x256x32768 float32``."""
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


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


def publish(module: GraphModule, found: list[LossReport]) -> None:
    """Tells everybody who may ask what a compilation did: `reports`, the logger "cce_inductor"
    (TORCH_LOGS), ``torch._dynamo.utils.counters["cce_inductor"]`` and the structured trace."""
    log.add(found)
    counters = torch._dynamo.utils.counters["cce_inductor"]
    for report in found:
        counters["rewritten" if report.rewritten else "left_alone"] += 1
        _logger.info("%s", report)
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
