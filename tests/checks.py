"""What the tests of this project assert about a function with a loss in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

import cce_inductor
from cce_inductor.options import Options
from cce_inductor.report import LossReport
from cce_inductor.rewrite import rewrite


def capture(fn: Callable[..., Any], *args: Any, **compile_args: Any) -> list[GraphModule]:
    """The graphs that Dynamo makes of ``fn(*args)``, which runs eagerly."""
    graphs: list[GraphModule] = []

    def backend(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, **compile_args)(*args)
    return graphs


def rewritten_graph(fn: Callable[..., Any], *args: Any, **compile_args: Any) -> str:
    """The code of the one graph of ``fn(*args)`` after the pass, without its signature.

    Every loss in it must be rewritten.
    """
    (module,) = capture(fn, *args, **compile_args)
    reports = rewrite(module, Options(min_logits_bytes=0, on_error="raise"))
    assert reports
    assert all(report.rewritten for report in reports), "\n".join(map(str, reports))
    return code(module)


def code(module: GraphModule) -> str:
    """The statements of a graph, one a line, with nothing of its inputs' bookkeeping."""
    lines = [line.strip().split(";")[0] for line in module.code.splitlines() if line[:4] == "    "]
    body = [line for line in lines if line and not re.fullmatch(r"\w+ = L_\w+", line)]
    return "\n".join(body) + "\n"


def reports_of(fn: Callable[..., Any], *args: Any, **compile_args: Any) -> list[LossReport]:
    """What the pass does about each loss of ``fn(*args)``, however small its logits."""
    graphs = capture(fn, *args, **compile_args)
    options = Options(min_logits_bytes=0, on_error="raise")
    return [report for module in graphs for report in rewrite(module, options)]


def reason_against(fn: Callable[..., Any], *args: Any, **compile_args: Any) -> str:
    """Why the one loss of ``fn(*args)`` is left alone; the graph must then be untouched."""
    (module,) = capture(fn, *args, **compile_args)
    before = module.code
    (report,) = rewrite(module, Options(min_logits_bytes=0, on_error="raise"))
    assert not report.rewritten, str(report)
    assert report.reason is not None
    assert module.code == before
    return report.reason


def value_and_gradients(fn: Callable[..., Any], *args: Any) -> list[Tensor | None]:
    """``fn(*args)`` and the gradients of all floating arguments that require one.

    A result that is no scalar is reduced with distinct weights, so that rows cannot be swapped.
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


def in_float64(args: Sequence[Any]) -> list[Any]:
    """The arguments with floating tensors exactly converted, as new leaves."""
    return [
        a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in args
    ]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``|value - reference| / |reference|`` in the Euclidean norm, absolute for a zero one."""
    difference = (value.double() - reference.double()).norm()
    norm = reference.double().norm()
    return (difference / norm if norm > 0 else difference).item()


def assert_as_accurate_as_eager(
    fn: Callable[..., Any], *args: Any, backend: str = "cce_inductor_eager", slack: float = 1.25
) -> None:
    """The rewritten `fn` must have the shapes and dtypes of eager's results, and be as near to
    float64 as eager is.

    Args:
        fn: of tensors; its result and its gradients with respect to every argument that requires
            one are compared.
        *args: its arguments.
        backend: what compiles it.
        slack: rounding is random: allowed error in units of eager's, plus one unit in the last
            place of the result's dtype.
    """
    torch._dynamo.reset()
    cce_inductor.clear_reports()
    compiled = torch.compile(fn, backend=backend, options={"min_logits_bytes": 0})
    got = value_and_gradients(compiled, *args)
    reports = cce_inductor.reports()
    assert reports
    assert all(report.rewritten for report in reports), "\n".join(map(str, reports))
    eager = value_and_gradients(fn, *args)
    reference = value_and_gradients(fn, *in_float64(args))
    assert len(got) == len(eager) == len(reference)
    for ours, theirs, exact in zip(got, eager, reference, strict=True):
        if exact is None:
            assert ours is None
            assert theirs is None
            continue
        assert ours is not None
        assert theirs is not None
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        allowed = slack * relative_error(theirs, exact) + torch.finfo(ours.dtype).eps
        assert relative_error(ours, exact) <= allowed
