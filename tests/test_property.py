"""Whatever program is compiled, its numbers are those of eager.

`programs` makes random programs, hazards included. Each is compiled with every option that makes
the pass bolder, and must give the results and gradients of eager PyTorch: to 1e-9 in float64,
otherwise as near to float64 as eager is, within a factor. Where nothing is rewritten the graph
must be untouched, with a reason for each loss. A program that eager cannot run, or that Dynamo
alone breaks, says nothing.

300 programs in a fixed order belong to the tests. For more, at random:

    CCE_INDUCTOR_EXAMPLES=10000 pytest tests/test_property.py --hypothesis-show-statistics

which also shows how many losses were rewritten, and why the others were not.
"""

from __future__ import annotations

import gc
import linecache
import os
import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from programs import Program, programs
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cce_inductor.backends import cce_inductor_eager
from cce_inductor.report import LossReport, clear_reports, reports
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


def run(fn, inputs: list[Tensor]) -> Results:
    """Results, gradients, and the inputs afterwards, which the program may have changed."""
    leaves = [input for input in inputs if input.requires_grad]
    torch.manual_seed(0)
    outputs = fn(*inputs)
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
    """What is wrong with the results of the compiled function."""
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
            if error > 4 * allowed + 8 * epsilon:
                return f"result {number}: error {error:.3g}, eager's {allowed:.3g}: {ours} instead of {eager}"
    return None


@given(programs())
@settings(settings.get_profile("ci"))
def test_compiled_program(program: Program):
    check(program)


def check(program: Program) -> list[LossReport]:
    """Raises AssertionError if the pass changes what a program computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check(program)


def _check(program: Program) -> list[LossReport]:
    fn = program.function()
    try:
        expected = run(fn, program.inputs())
    except Exception:
        event("eager cannot run it")
        assume(False)
    exact: Results = []
    if not program.exact:
        inputs = _in_float64(program.inputs())
        try:
            with in_float64():
                exact = run(fn, inputs)
        except Exception:
            event("eager cannot run it in float64")
            assume(False)

    untouched = True

    def backend(module, example_inputs):
        nonlocal untouched
        before, count = module.code, len(reports())
        compiled = cce_inductor_eager(module, example_inputs, options=OPTIONS)
        if not any(report.rewritten for report in reports()[count:]):
            untouched = untouched and module.code == before
        return compiled

    clear_reports()
    wrong: BaseException | str | None
    try:
        got = run(torch.compile(fn, backend=backend), _marked(program))
        wrong = difference(program, got, expected, exact)
    except Exception as error:
        wrong = error
    found = reports()
    if wrong is not None:
        _assume_within_limits(program)
    if wrong is not None and _dynamo_alone_is_wrong(program, expected, exact):
        event("Dynamo alone is wrong")
        assume(False)
    _forget(fn)
    if isinstance(wrong, BaseException):
        raise AssertionError(f"the compiled function raises:\n{program}") from wrong
    shown = "\n".join(map(str, found))
    assert wrong is None, f"{wrong}\n{program}\n{shown}"
    assert untouched, f"the graph changed, and nothing was rewritten:\n{program}\n{shown}"
    assert all(report.rewritten or report.reason for report in found), shown
    _count(found)
    return found


def _marked(program: Program) -> list[Tensor]:
    inputs = dict(zip(program.arguments, program.inputs(), strict=True))
    for name, dim in program.dynamic_dims():
        torch._dynamo.maybe_mark_dynamic(inputs[name], dim)
    return list(inputs.values())


def _in_float64(inputs: list[Tensor]) -> list[Tensor]:
    return [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]


class _FindsInfinity(TorchFunctionMode):
    """Whether any function gives +inf, or nan."""

    infinity = nan = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.infinity = self.infinity or bool((result.detach() == torch.inf).any())
            self.nan = self.nan or bool(result.detach().isnan().any())
        return result


def _assume_within_limits(program: Program) -> None:
    """Those in the README."""
    with _FindsInfinity() as mode:
        program.function()(*program.inputs())
    if mode.infinity:
        event("a logit of +inf")
    nan_in_ignored_row = mode.nan and "-100" in str(program)
    if nan_in_ignored_row:
        event("perhaps nan in a row that is ignored")
    assume(not (mode.infinity or nan_in_ignored_row))


def _dynamo_alone_is_wrong(program: Program, expected: Results, exact: Results) -> bool:
    fn = program.function()
    try:
        got = run(torch.compile(fn, backend="eager"), _marked(program))
        return difference(program, got, expected, exact) is not None
    except Exception:
        return True
    finally:
        _forget(fn)


_checked = 0


def _forget(fn) -> None:
    """Frees what is kept of a function; emptying all of Dynamo's caches each time is slower."""
    global _checked
    linecache.cache.pop(fn.__code__.co_filename, None)
    _checked += 1
    if _checked % 50 == 0:
        torch._dynamo.reset()
        gc.collect()


def _count(found: list[LossReport]) -> None:
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
