"""Compile and time each of this package's two kernels alone, in any configuration or with an edit.

A kernel is reached through the operator that Inductor lowers to it. The small kernels around it are
recognized by their names in the profile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .problem import Problem
from .profiling import kernel_times
from .results import Fields
from .timing import milliseconds

PROGRAM = "logsumexp(z); target(z, r0, -100)"
TEMPLATE_PREFIX = "triton_tem"
CALLS = 5

Edit = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A function whose compiled code contains one of the two kernels.

    Attributes:
        name: the name of the kernel.
        function, arguments: the function, and the arguments of a call.
        flops: floating-point operations of the kernel's matrix products in one call.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Tensor, ...]
    flops: float


def statistics(problem: Problem) -> Kernel:
    """Return the forward: logsumexp and target logit of each row."""

    def forward(input: Tensor, weight: Tensor, target: Tensor) -> Any:
        return torch.ops.cce_inductor.reduce_rows(
            input, weight, None, [target], PROGRAM, True, input.dtype, 2**26, 0.0
        )[:2]

    return Kernel("statistics", forward, problem.inputs(), problem.flops)


def gradient(problem: Problem, block_width: int) -> Kernel:
    """Return the backward with the gradient of the input: the logits' gradient, block by block."""
    input, weight, target = problem.inputs()
    workspace_bytes = block_width * problem.tokens * input.dtype.itemsize
    lse = torch.full((problem.tokens,), 12.0, dtype=torch.float64, device=problem.device)

    def backward(lse: Tensor, input: Tensor, weight: Tensor, target: Tensor) -> Any:
        upstream = torch.full_like(lse, 1 / problem.tokens)
        return torch.ops.cce_inductor.reduce_rows_backward(
            [upstream, -upstream, None],
            [lse, lse, lse.unsqueeze(1)],
            input,
            weight,
            None,
            [target],
            PROGRAM,
            True,
            input.dtype,
            workspace_bytes,
            0.0,
            [True, False, False, False],
        )

    return Kernel("gradient", backward, (lse, input, weight, target), problem.flops)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Disable all caches: their keys contain neither the configuration nor the edit."""
    from cce_inductor.operators import (
        inductor,
        ops,  # noqa: F401  (registers the operators)
    )

    inductor.register()
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        yield


def candidates(kernel: Kernel) -> list[Any]:
    """Return the configurations that autotuning would try, the default first; runs the kernel."""
    from cce_inductor.kernels.triton import lowering

    offered: list[list[Any]] = []

    def spy(*args: Any, **kwargs: Any) -> list[Any]:
        offered.append(original(*args, **kwargs))
        return offered[-1]

    original = lowering.configs
    with _alone(), mock.patch.object(lowering, "configs", spy):
        torch.compile(kernel.function, fullgraph=True)(*kernel.arguments)
    if not offered:
        raise RuntimeError("the kernel's lowering asked for no configuration")
    return offered[0]


@contextlib.contextmanager
def _edited(edit: Edit, suffix: str) -> Iterator[list[str]]:
    """Apply `edit` to each template's source; yield the list of edited sources."""
    from cce_inductor.kernels.triton import lowering

    original = getattr(lowering._triton_template, "__wrapped__", lowering._triton_template)
    sources: list[str] = []

    @functools.cache
    def changed(template: Any) -> Any:
        sources.append(edit(template.source))
        name = f"{template.name}_{suffix}"
        return original(dataclasses.replace(template, name=name, source=sources[-1]))

    with mock.patch.object(lowering, "_triton_template", changed):
        yield sources


@contextlib.contextmanager
def _compiled_kernels() -> Iterator[list[Any]]:
    """Yield the list of template kernels, as Inductor's autotuners, that have run."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    found: list[Any] = []
    run = CachingAutotuner.run

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = str(self.inductor_meta.get("kernel_name") or self.fn.__name__)
        if name.startswith(TEMPLATE_PREFIX) and self not in found:
            found.append(self)
        return run(self, *args, **kwargs)

    with mock.patch.object(CachingAutotuner, "run", spy):
        yield found


def measured(
    kernel: Kernel, config: Any = None, edit: Edit | None = None, suffix: str = ""
) -> Fields:
    """Return the times of a kernel, its registers and its spills.

    Args:
        kernel: the kernel to measure.
        config: one of `candidates`; None for the default.
        edit: a function that changes the template's source.
        suffix: distinguishes the names of edited templates.
    """
    from cce_inductor.kernels.triton import lowering

    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone())
        asked = mock.Mock(return_value=[config])
        if config is not None:
            stack.enter_context(mock.patch.object(lowering, "configs", asked))
        sources = stack.enter_context(_edited(edit, suffix)) if edit is not None else [""]
        holders = stack.enter_context(_compiled_kernels())
        function = torch.compile(kernel.function, fullgraph=True)
        function(*kernel.arguments)
        if config is not None and not asked.called:
            raise RuntimeError("the lowering did not ask for a configuration")
        if not sources:
            raise RuntimeError("the lowering did not ask for a template")
    with torch.no_grad():
        fields = _times(kernel, function)
    if config is not None:
        fields["config"] = config_fields(config)
    return fields | _needs(holders)


def _times(kernel: Kernel, function: Callable[..., Any]) -> Fields:
    device = kernel.arguments[-1].device
    every = kernel_times(lambda: function(*kernel.arguments), CALLS)
    of_template = {name: ms for name, ms in every.items() if name.startswith(TEMPLATE_PREFIX)}
    if every and not of_template:
        raise RuntimeError(f"no kernel of a template ran, but {list(every)}")
    call_ms = milliseconds(lambda: function(*kernel.arguments), device, CALLS)
    fields: Fields = {"ms": sum(of_template.values()), "kernels": every}
    if not of_template:
        fields |= {"ms": call_ms, "timed": "the whole call: the profiler saw no kernel"}
    return fields | {"tflops": kernel.flops / fields["ms"] / 1e9, "call_ms": call_ms}


def _needs(holders: list[Any]) -> Fields:
    """Return registers and spills as far as Inductor knows them."""
    launchers = [launcher for holder in holders for launcher in getattr(holder, "launchers", [])]
    return {
        "registers": [getattr(launcher, "n_regs", None) for launcher in launchers],
        "spills": [getattr(launcher, "n_spills", None) for launcher in launchers],
    }


def config_fields(config: Any) -> Any:
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else repr(config)


ASSERTION = "tl.device_assert("
ANCHOR = "row_inside = "


def with_an_assertion(source: str) -> str:
    """Add an assertion on loaded values, which is not optimized away, to the loop over tiles."""
    lines = source.splitlines(keepends=True)
    places = [at for at, line in enumerate(lines) if line.lstrip().startswith(ANCHOR)]
    if not places:
        raise LookupError(f"the template has no line that begins with {ANCHOR!r}")
    indentation = lines[places[0]].partition(ANCHOR)[0]
    read = "tl.load(INPUT + rows, mask=row_inside, other=0.0).to(tl.float32)"
    assertion = f'{indentation}{ASSERTION}{read} < 3e38, "the input is finite")\n'
    lines.insert(places[0] + 1, assertion)
    return "".join(lines)
