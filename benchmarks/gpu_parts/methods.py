"""The implementations of the loss that are compared, by name.

Each takes a problem and returns a function of input, weight and target. If its package is missing,
the ImportError becomes the reason in the results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from sampled import RECOMMENDED, SAMPLED
from torch import Tensor

from .problem import Problem

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BASELINE = "torch.compile"
MIB = 2**20


def eager(problem: Problem) -> Loss:
    return problem.loss


def compiled(problem: Problem) -> Loss:
    return torch.compile(problem.loss)


class FellBackError(Exception):
    """The loss was computed, but by a fallback."""


class Warnings(logging.Handler):
    """Collects the package's warnings: it warns if slower code replaces a kernel."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def ours(workspace_bytes: int, sample_below: float = 0.0) -> Callable[[Problem], Loss]:
    def method(problem: Problem) -> Loss:
        import cce_inductor
        from cce_inductor import backends

        cce_inductor.clear_reports()
        warnings = Warnings()
        logging.getLogger("cce_inductor").addHandler(warnings)
        options = {
            "min_logits_bytes": 0,
            "on_error": "raise",
            "workspace_bytes": workspace_bytes,
            "sample_below": sample_below,
        }
        # The name "cce_inductor" is registered only if the package is installed.
        function = torch.compile(problem.loss, backend=backends.cce_inductor, options=options)

        def loss(*inputs: Tensor) -> Tensor:
            result = function(*inputs)
            reports = cce_inductor.reports()
            if not any(report.rewritten for report in reports):
                why = "; ".join(str(report.reason) for report in reports)
                raise FellBackError(f"the loss was left alone: {why or 'it was not found'}")
            exact = [report.exact_because for report in reports if report.exact_because]
            if exact:
                raise FellBackError(f"the gradient is exact, because {exact[0]}")
            if warnings.said:  # from this forward, or from the backward of the step before
                raise FellBackError("; ".join(warnings.said))
            return result

        return loss

    return method


def liger(problem: Problem) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()

    def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with problem.autocasting():
            return fused(weight, input, target)

    return loss


def cut_cross_entropy(problem: Problem) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with problem.autocasting():
            return linear_cross_entropy(input, weight, target)

    return loss


def quack(problem: Problem) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with problem.autocasting():
            return chunked_linear_cross_entropy(input, weight, target)

    return loss


METHODS: dict[str, Callable[[Problem], Loss]] = {
    "eager": eager,
    BASELINE: compiled,
    "cce_inductor, 64 MiB": ours(64 * MIB),
    "cce_inductor, 256 MiB": ours(256 * MIB),
    SAMPLED: ours(64 * MIB, float(RECOMMENDED)),
    "liger_kernel": liger,
    "cut_cross_entropy": cut_cross_entropy,
    "quack": quack,
}
CUDA_ONLY = {"liger_kernel", "cut_cross_entropy", "quack"}
