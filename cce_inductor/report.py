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
from .notice import notice
from .options import Options
from .patterns import Logits, example, size_hint
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
            had at compilation, or -1 if it is known only at run time. None if the projection was
            not found.
        logits_dtype: dtype of the projection's result, None likewise.
        bytes_saved: bytes of one copy of those logits, if rewritten, else 0; also 0 if they are
            known only at run time. What a training step saves is more: the gradient of the logits,
            and a float32 copy where there was one.
        deferred: whether the function also returns these logits, as `DeferredLogits`.
        logits_bytes: bytes of those logits, or of the loss's input if the projection was not
            found; None if they are known only at run time.
        failed: whether the reason is an unexpected exception in the pass.
        advice: what can be changed so that it is rewritten, None if nothing is known.
    """

    rewritten: bool
    reason: str | None
    location: str | None
    loss: str
    logits_shape: tuple[int, ...] | None
    logits_dtype: torch.dtype | None
    bytes_saved: int
    deferred: bool = False
    logits_bytes: int | None = 0
    failed: bool = False
    advice: str | None = None

    @classmethod
    def of_failure(cls, node: Node, reason: str) -> LossReport:
        """The record of a loss in a graph that the pass could not look at."""
        return cls(False, reason, location(node), describe(node), None, None, 0, failed=True)

    @property
    def sentence(self) -> str:
        """All of it in a line, of a loss that is left alone."""
        size = "" if self.logits_bytes is None else f"{format_bytes(self.logits_bytes)} "
        name = self.loss.split(" > ")[-1].partition("(")[0]
        place = f" at {self.location}" if self.location else ""
        advice = f". To change that: {self.advice}" if self.advice is not None else ""
        return f"a {size}{name}{place} was left alone: {self.reason}{advice}"

    def __str__(self) -> str:
        head = "rewritten" if self.rewritten else "left alone"
        lines = [f"{head}: {self.loss}"]
        if self.location:
            lines.append(f"  at {self.location}")
        if self.logits_shape is not None:
            lines.append(f"  logits: {format_tensor(self.logits_shape, self.logits_dtype)}")
        if self.rewritten:
            saved = "as many bytes as they have at run time"
            if self.logits_bytes is not None:
                saved = format_bytes(self.bytes_saved)
            lines.append(f"  not stored any more: {saved}")
            if self.deferred:
                lines.append("  the returned logits are deferred: computed when looked at")
        else:
            lines.append(f"  because {self.reason}")
            if self.advice is not None:
                lines.append(f"  to change that: {self.advice}")
        return "\n".join(lines)


def loss_report(
    found: FoundLoss, reason: str | None, options: Options, *, deferred: bool = False
) -> LossReport:
    """The record of a loss that was rewritten (`reason` is None) or left alone."""
    return _report(found.node, found.logits, describe(found.node), reason, options, deferred)


def deferral_report(logits: Logits, node: Node, options: Options) -> LossReport:
    """The record of logits that are deferred and of which there is no loss."""
    return _report(node, logits, "returned", None, options, True)


def _report(
    node: Node,
    logits: Logits | None,
    consumer: str,
    reason: str | None,
    options: Options,
    deferred: bool,
) -> LossReport:
    path = logits.path if logits is not None else ()
    shape = dtype = None
    size: int | None = 0
    if logits is not None:
        result = example(logits.projection.node)
        shape, dtype, size = shape_hints(result), result.dtype, tensor_bytes(result)
    else:
        read = [example(argument) for argument in node.all_input_nodes[:1]]
        size = tensor_bytes(read[0]) if read and isinstance(read[0], torch.Tensor) else 0
    return LossReport(
        rewritten=reason is None,
        reason=reason,
        location=location(node),
        loss=" > ".join((*path, consumer)),
        logits_shape=shape,
        logits_dtype=dtype,
        bytes_saved=(size or 0) if reason is None else 0,
        deferred=deferred and reason is None,
        logits_bytes=size,
        advice=advice(reason, options, size),
    )


def logits_bytes(logits: Logits) -> int | None:
    """`tensor_bytes` of the projection's result."""
    return tensor_bytes(example(logits.projection.node))


def shape_hints(value: torch.Tensor) -> tuple[int, ...]:
    """The shape with each size as `size_hint` has it, -1 where only data tells."""
    return tuple(-1 if (at := size_hint(size)) is None else at for size in value.shape)


def tensor_bytes(value: torch.Tensor) -> int | None:
    """Bytes of a tensor with dynamic sizes as they were at compilation; None if they are known
    only at run time."""
    sizes = [size_hint(size) for size in value.shape]
    known = [size for size in sizes if size is not None]
    return math.prod(known) * value.dtype.itemsize if len(known) == len(sizes) else None


def format_bytes(count: int) -> str:
    """`count` in the largest binary unit that keeps it at least 1."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"


def format_tensor(shape: Sequence[int], dtype: torch.dtype | None) -> str:
    """``4x256x32768 float32``; of a size that is not known ``?``."""
    sizes = ("?" if size == -1 else str(size) for size in shape)
    return f"{'x'.join(sizes)} {str(dtype).removeprefix('torch.')}"


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
