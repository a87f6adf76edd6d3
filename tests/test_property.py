"""Random programs give the same numbers with the pass as in eager PyTorch.

`programs` generates them, hazards included. Each is compiled with the options that rewrite most, and
must give the results and gradients of eager PyTorch: to 1e-9 in float64, otherwise as near to float64
as eager is, within a factor. If nothing is rewritten, the graph must be unchanged, and each loss must
have a reason. A program that eager cannot run, or that Dynamo alone breaks, is skipped.

A program whose numbers or batch size vary is called several times, and may compile no more graphs
than with a backend that does nothing.

The tests run 300 programs in a fixed order. To run more random programs:

    CCE_INDUCTOR_EXAMPLES=10000 pytest tests/test_property.py --hypothesis-show-statistics

This also shows how many losses were rewritten, and why the others were not. The 300 programs are
called at most twice, because each call may compile.
"""

from __future__ import annotations

import gc
import linecache
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from programs import Program, programs
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cce_inductor.backends import cce_inductor_eager
from cce_inductor.reporting.log import clear_reports, reports
from cce_inductor.reporting.report import LossReport
from cce_inductor.testing import in_float64, relative_error

EXAMPLES = int(os.environ.get("CCE_INDUCTOR_EXAMPLES", "0"))
settings.register_profile(
    "ci",
    max_examples=EXAMPLES or 300,
    deadline=None,
    derandomize=not EXAMPLES,
    print_blob=bool(EXAMPLES),
    suppress_health_check=list(HealthCheck),
)
OPTIONS = {"min_logits_bytes": 0, "on_error": "raise"}
Results = list[Tensor | None]


def run(fn, arguments: list[Any]) -> Results:
    """Return results, gradients, and the inputs, which the program may have changed."""
    inputs = [x for x in arguments if isinstance(x, Tensor)]
    leaves = [input for input in inputs if input.requires_grad]
    torch.manual_seed(0)
    outputs = fn(*arguments)
    total = torch.zeros((), dtype=torch.float64)
    for number, output in enumerate(outputs, 1):
        if output.requires_grad:
            weights = number + torch.arange(output.numel()).view(output.shape) / 7
            total = total + (output.double() * weights).sum()
    gradients: list[Tensor | None] = [None] * len(leaves)
    if total.requires_grad:
        gradients = list(torch.autograd.grad(total, leaves, allow_unused=True))
    return [*(x.detach() for x in outputs), *gradients, *(x.detach() for x in inputs)]


def difference(program: Program, got: Results, expected: Results, exact: Results) -> str | None:
    """Describe how the results of the compiled function are wrong."""
    values = [x[x.isfinite()] for x in expected if x is not None and x.is_floating_point()]
    largest = max((x.abs().max().item() for x in values if x.numel()), default=0.0)
    for number, (ours, eager) in enumerate(zip(got, expected, strict=True)):
        if ours is None or eager is None:
            if ours is not eager:
                return f"result {number}: {ours} instead of {eager}"
        elif (ours.shape, ours.dtype) != (eager.shape, eager.dtype):
            return f"result {number}: {ours} instead of {eager}"
        elif program.exact or not ours.is_floating_point():
            # Rounding decides between equal entries.
            if ours.dtype == torch.int64 and "bfloat16" in str(program):
                continue
            close = torch.allclose(ours, eager, 1e-9, 1e-11 * max(1, largest), equal_nan=True)
            if not close:
                return f"result {number}: {ours} instead of {eager}"
        else:
            reference = exact[number]
            assert reference is not None
            error, allowed = relative_error(ours, reference), relative_error(eager, reference)
            epsilon = torch.finfo(torch.bfloat16 if "bfloat16" in str(program) else ours.dtype).eps
            if reference.norm() < 1e-9 * largest:  # 0, except for the rounding of terms that cancel
                error, allowed = (x.double().norm().item() / largest for x in (ours, eager))
            if error > 4 * allowed + 8 * epsilon:
                return f"result {number}: error {error:.3g}, eager's {allowed:.3g}: {ours} instead of {eager}"
    return None


@given(programs())
@settings(settings.get_profile("ci"))
def test_compiled_program(program: Program):
    check(program)


def check(program: Program) -> list[LossReport]:
    """Raise AssertionError if the pass changes what a program computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check(program)


def _check(program: Program) -> list[LossReport]:
    expected = _in_eager(program)
    exact = _in_float64(program, len(expected)) if not program.exact else expected
    untouched = True

    def backend(module, example_inputs):
        nonlocal untouched
        before, count = module.code, len(reports())
        compiled = cce_inductor_eager(module, example_inputs, options=OPTIONS)
        if not any(report.rewritten for report in reports()[count:]):
            untouched = untouched and module.code == before
        return compiled

    clear_reports()
    graphs, wrong = _compiled(program, expected, exact, backend)
    found = reports()
    if wrong is not None:
        _assume_within_limits(program, len(expected))
    if wrong is not None or len(expected) > 1:
        fewest, wrong_alone = _compiled(program, expected, exact, _nothing)
        if wrong_alone is not None:
            event("Dynamo alone is wrong")
            assume(False)
    if isinstance(wrong, BaseException):
        raise AssertionError(f"the compiled function raises:\n{program}") from wrong
    shown = "\n".join(map(str, found))
    assert wrong is None, f"{wrong}\n{program}\n{shown}"
    if len(expected) > 1:
        assert graphs <= fewest, f"{graphs} graphs instead of {fewest}:\n{program}\n{shown}"
    assert untouched, f"the graph changed, and nothing was rewritten:\n{program}\n{shown}"
    assert all(report.rewritten or report.reason for report in found), shown
    _count(found, len(expected))
    return found


def _in_eager(program: Program) -> list[Results]:
    """Return the results of the calls that eager can run, which include the first."""
    fn = program.function()
    found = []
    for call in range(program.calls if EXAMPLES else min(2, program.calls)):
        try:
            found.append(run(fn, program.inputs(call)))
        except Exception:
            break
    if not found:
        event("eager cannot run it")
        assume(False)
    return found


def _in_float64(program: Program, calls: int) -> list[Results]:
    fn = program.function()
    inputs = [list(map(_widened, program.inputs(call))) for call in range(calls)]
    try:
        with in_float64():
            return [run(fn, each) for each in inputs]
    except Exception:
        event("eager cannot run it in float64")
        assume(False)
    raise AssertionError


def _widened(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def _compiled(
    program: Program,
    expected: list[Results],
    exact: list[Results],
    backend: Callable[..., Any],
) -> tuple[int, BaseException | str | None]:
    """Return how many graphs the calls compile, and how the results are wrong."""
    graphs = 0

    def counting(module, example_inputs):
        nonlocal graphs
        graphs += 1
        return backend(module, example_inputs)

    fn = program.function()
    compiled = torch.compile(fn, backend=counting)
    wrong: BaseException | str | None = None
    for call, results in enumerate(expected):
        try:
            got = run(compiled, _marked(program, call))
            wrong = difference(program, got, results, exact[call])
        except Exception as error:
            wrong = error
        if isinstance(wrong, str) and len(expected) > 1:
            wrong = f"call {call}, {wrong}"
        if wrong is not None:
            break
    _forget(fn)
    return graphs, wrong


def _nothing(module, example_inputs):
    return module.forward


def _marked(program: Program, call: int) -> list[Any]:
    inputs = program.inputs(call)
    named = dict(zip(program.arguments, inputs, strict=False))
    for name, dim in program.dynamic_dims():
        torch._dynamo.maybe_mark_dynamic(named[name], dim)
    return inputs


class _FindsInfinity(TorchFunctionMode):
    """Records whether any function returns +inf or nan."""

    infinity = nan = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.infinity = self.infinity or bool((result.detach() == torch.inf).any())
            self.nan = self.nan or bool(result.detach().isnan().any())
        return result


def _assume_within_limits(program: Program, calls: int) -> None:
    """Skip a program that is affected by a limit in the README."""
    with _FindsInfinity() as mode:
        for call in range(calls):
            program.function()(*program.inputs(call))
    if mode.infinity:
        event("a logit of +inf")
    nan_in_ignored_row = mode.nan and "-100" in str(program)
    if nan_in_ignored_row:
        event("perhaps nan in a row that is ignored")
    assume(not (mode.infinity or nan_in_ignored_row))


_checked = 0


def _forget(fn) -> None:
    """Free the compiled code of a function; emptying all of Dynamo's caches is slower."""
    global _checked
    linecache.cache.pop(fn.__code__.co_filename, None)
    _checked += 1
    if _checked % 50 == 0:
        torch._dynamo.reset()
        gc.collect()


def _count(found: list[LossReport], calls: int) -> None:
    event(f"{calls} calls")
    rewritten = sum(report.rewritten for report in found)
    event(f"{rewritten} of {len(found)} losses rewritten" if found else "no loss found")
    for report in found:
        if report.reason is not None:
            event(
                "left alone: "
                + re.sub(r" at <program.*?>:\d+|'\w*\d'|\d+", "…", report.reason)[:90]
            )


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
