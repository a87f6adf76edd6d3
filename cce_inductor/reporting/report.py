"""What was done about each loss, as a record for people and programs."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from cce_inductor.reporting.location import describe, location
from cce_inductor.reporting.reasons import Reason
from cce_inductor.reporting.sizes import format_bytes, format_tensor


@dataclasses.dataclass(frozen=True)
class LossReport:
    """One loss of one compiled graph.

    Attributes:
        rewritten: whether the fused operator replaced the loss. For logits that are only returned
            (``defer_logits="always"``), whether they are deferred.
        reason: why it was left alone, in one sentence. None if it was rewritten.
        location: ``file.py:line`` of the loss in the user's code, None if unknown.
        loss: the operations from the projection to the loss.
        logits_shape: the shape of the projection's result. A dynamic size is given by its value at
            compilation, or -1 if it is known only at run time. None if the projection was not
            found.
        logits_dtype: the dtype of the projection's result. None if it was not found.
        bytes_saved: the bytes of one copy of the logits if the loss was rewritten, without those
            that are stored, else 0. Also 0 if they are known only at run time. A training step
            saves more than that: the gradient of the logits, and the float32 copy if there was one.
        deferred: whether the function also returns these logits, as `DeferredLogits`.
        logits_bytes: the bytes of the logits, or of the loss's input if the projection was not
            found. None if they are known only at run time.
        failed: whether the reason is an unexpected exception in the pass.
        advice: what can be changed so that the loss is rewritten, None if nothing is known.
        sampled: whether its gradient is sampled (`Options.sample_below`), if it has one.
        exact_because: why it is not although `sample_below` is greater than 0, else None.
        stored_bytes: the bytes of the logits that the forward stores for the backward, because
            `Options.workspace_bytes` has room for them.
        with_loss: whether the forward computes the gradient as well, and the backward only
            multiplies it by the gradient of the loss. None if that is not known, because a cache
            answered or the graph was not compiled.
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
    sampled: bool = False
    exact_because: str | None = None
    stored_bytes: int = 0
    with_loss: bool | None = None

    def with_gradient(self, *, made_with_loss: bool) -> LossReport:
        """Return the report with `with_loss`. If it is true, no logits are stored any more."""
        if not made_with_loss:
            return dataclasses.replace(self, with_loss=False)
        saved = self.bytes_saved + self.stored_bytes
        return dataclasses.replace(self, with_loss=True, stored_bytes=0, bytes_saved=saved)

    @classmethod
    def of_failure(cls, node: Node, reason: Reason) -> LossReport:
        """Return the report of a loss in a graph on which the pass failed."""
        return cls(False, str(reason), location(node), describe(node), None, None, 0, failed=True)

    @property
    def sentence(self) -> str:
        """The report of a loss that was left alone, in one line."""
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
            if self.stored_bytes:
                lines.append(
                    f"  still stored, as workspace_bytes allows: {format_bytes(self.stored_bytes)}"
                )
            if self.with_loss:
                lines.append("  its gradient is computed with the loss")
            if self.sampled:
                lines.append("  its gradient is sampled")
            elif self.exact_because is not None:
                lines.append(f"  its gradient is exact, because {self.exact_because}")
            if self.deferred:
                lines.append("  the returned logits are deferred: computed when first used")
        else:
            lines.append(f"  because {self.reason}")
            if self.advice is not None:
                lines.append(f"  to change that: {self.advice}")
        return "\n".join(lines)
