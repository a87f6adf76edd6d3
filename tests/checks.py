"""Assertions about functions that contain a loss, shared by the tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule

import cce_inductor
from cce_inductor.options import Options
from cce_inductor.reporting import reasons
from cce_inductor.reporting.report import LossReport
from cce_inductor.rewriting.rewrite import rewrite
from cce_inductor.testing import assert_matches_eager

# The reason for an operation that changes an operand of the projection, without the operation's name.
MAY_CHANGE = str(reasons.may_change_operand(Graph().call_function(len))).removeprefix("len ")


def loss_after(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a function that applies `change` to its logits and takes the loss of [rows, 50]."""

    def fn(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(change(F.linear(input, weight)).reshape(-1, 50), target)

    return fn


def beside_a_loss(reduce: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    """Return a function that computes a loss and ``reduce(logits, target)`` of the same logits."""

    def fn(input: Tensor, weight: Tensor, target: Tensor) -> Any:
        logits = F.linear(input, weight)
        return F.cross_entropy(logits, target), reduce(logits, target)

    return fn


def capture(fn: Callable[..., Any], *args: Any, **compile_args: Any) -> list[GraphModule]:
    """Return the graphs that Dynamo captures from ``fn(*args)``; the call itself runs eagerly."""
    graphs: list[GraphModule] = []

    def backend(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, **compile_args)(*args)
    return graphs


def rewritten_graph(fn: Callable[..., Any], *args: Any, **compile_args: Any) -> str:
    """Return the code of the only graph of ``fn(*args)`` after the pass, without its signature.

    Fails unless every loss is rewritten.
    """
    (module,) = capture(fn, *args, **compile_args)
    reports = rewrite(module, Options(min_logits_bytes=0, on_error="raise"))
    assert reports
    assert all(report.rewritten for report in reports), "\n".join(map(str, reports))
    return code(module)


def code(module: GraphModule) -> str:
    """Return the statements of a graph, one per line, without renamed inputs and deletions."""
    lines = [
        line.strip().split(";  ")[0] for line in module.code.splitlines() if line[:4] == "    "
    ]
    body = [line for line in lines if line and not re.fullmatch(r"\w+ = L_\w+", line)]
    return "\n".join(body) + "\n"


def reports_of(fn: Callable[..., Any], *args: Any, **compile_args: Any) -> list[LossReport]:
    """Return the report of each loss of ``fn(*args)``, however small its logits."""
    graphs = capture(fn, *args, **compile_args)
    options = Options(min_logits_bytes=0, on_error="raise")
    return [report for module in graphs for report in rewrite(module, options)]


def reason_against(fn: Callable[..., Any], *args: Any, **compile_args: Any) -> str:
    """Return the reason against the only loss of ``fn(*args)``; fails if the graph changed."""
    (module,) = capture(fn, *args, **compile_args)
    before = module.code
    (report,) = rewrite(module, Options(min_logits_bytes=0, on_error="raise"))
    assert not report.rewritten, str(report)
    assert report.reason is not None
    assert module.code == before
    return report.reason


def assert_used_by(reason: str | None, name: str, why: str) -> None:
    """Assert that a reason blames the operation `name`, with the sentence `why`."""
    assert reason is not None
    assert reason.startswith(f"{reasons.USED_BY} {name} at ")
    assert reason.endswith(f": {why}")


def value_and_gradients(fn: Callable[..., Any], *args: Any) -> list[Tensor | None]:
    """Return ``fn(*args)`` and the gradients of the arguments that require one.

    A result that is not a scalar is reduced with distinct weights, so that swapped rows are noticed.
    """
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    result = fn(*args)
    outputs = list(result) if isinstance(result, tuple) else [result]
    total = sum(
        (output * torch.arange(1, output.numel() + 1).view(output.shape)).sum()
        for output in outputs
    )
    gradients = torch.autograd.grad(total, leaves, allow_unused=True) if leaves else []
    return [*(output.detach() for output in outputs), *gradients]


def assert_as_accurate_as_eager(
    fn: Callable[..., Any], *args: Any, backend: str = "cce_inductor_eager", slack: float = 1.25
) -> None:
    """Assert that results match eager's, and that every loss was rewritten."""
    cce_inductor.clear_reports()
    reports = assert_matches_eager(fn, *args, backend=backend, slack=slack)
    assert reports
    assert all(report.rewritten for report in reports), "\n".join(map(str, reports))
