"""Time this package's two kernels alone, in two cases.

- ``assertion``: the statistics kernel without and with an assertion in its loop over tiles. With an
  assertion, the compiler may serialize the matrix products on Hopper; this measures the cost.
- ``candidates``: both kernels in each configuration that autotuning would try, the defaults first,
  beside the library's product and Triton's persistent product.

``ms`` is the time of the kernel alone, from the profiler; ``call_ms`` is the time of the whole
compiled call.
"""

from __future__ import annotations

import re

import torch

from . import templates
from .problem import Problem
from .products import PRODUCT
from .profiling import kernel_times
from .results import NEEDS_CUDA, Fields, Results, arguments
from .timing import Work, compare, milliseconds

VOCABULARY = 32768
BLOCK_WIDTH = 8192
TRITON_PRODUCT = "Triton's persistent product"
ASSERTION_VARIANTS = {
    "statistics, as it is": None,
    "statistics, with an assertion": templates.with_an_assertion,
}
CONFIGURATIONS = "statistics and gradient in their configurations"


def library(results: Results, problem: Problem) -> float | None:
    """Return the milliseconds of the library's product of the same shape."""
    input, weight, _ = problem.inputs()
    out = torch.empty(problem.tokens, problem.vocabulary, device=problem.device, dtype=input.dtype)
    work = {PRODUCT: Work(lambda: torch.mm(input, weight.t(), out=out), problem.flops)}
    return compare(results, work, problem.device).get(PRODUCT)


def with_ratio(fields: Fields, product_ms: float | None) -> Fields:
    if product_ms is not None:
        fields |= {"ratio": fields["ms"] / product_ms, "against": PRODUCT}
    return fields


def assertion(results: Results, problem: Problem) -> None:
    results.plan(PRODUCT, *ASSERTION_VARIANTS)
    product_ms = library(results, problem)
    kernel = templates.statistics(problem)
    for name, edit in ASSERTION_VARIANTS.items():

        def measure(name: str = name, edit: templates.Edit | None = edit) -> Fields:
            suffix = re.sub(r"\W+", "_", name)
            return with_ratio(templates.measured(kernel, edit=edit, suffix=suffix), product_ms)

        results.attempt(name, measure)


def triton_product(problem: Problem) -> Fields:
    """Time the best Triton kernel that Inductor finds for the same product."""
    from torch._inductor.utils import run_and_get_code

    input, weight, _ = problem.inputs()
    options = {
        "max_autotune": True,
        "max_autotune_gemm_backends": "TRITON",
        "triton.enable_persistent_tma_matmul": True,
    }

    def product(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(input, weight.t())

    compiled = torch.compile(product, fullgraph=True, options=options)
    _, codes = run_and_get_code(compiled, input, weight)
    times = kernel_times(lambda: compiled(input, weight))
    ms = sum(times.values()) or milliseconds(lambda: compiled(input, weight), problem.device)
    return {
        "ms": ms,
        "tflops": problem.flops / ms / 1e9,
        "kernels": times,
        "won": won("\n".join(codes)),
    }


def won(code: str) -> str:
    """Describe the template and the configuration that won the autotuning, read off the code."""
    if "extern_kernels.mm" in code:
        return "the library's product, which should have been excluded"
    kind = "persistent" if "NUM_SMS" in code else "not persistent"
    reads = "descriptors" if "tensor_descriptor" in code else "pointers"
    blocks = re.findall(r"(BLOCK_[MNK]) : tl\.constexpr = (\d+)", code)
    launch = re.findall(r"(num_warps|num_stages)=(\d+)", code)
    sizes = [f"{name} {size}" for name, size in dict([*blocks, *launch]).items()]
    return ", ".join([kind, reads, *sizes])


def candidates(results: Results, problem: Problem) -> None:
    results.plan(PRODUCT, TRITON_PRODUCT)
    product_ms = library(results, problem)
    queues: dict[str, list[tuple[str, templates.Kernel, object]]] = {}
    for kernel in (templates.statistics(problem), templates.gradient(problem, BLOCK_WIDTH)):
        queues[kernel.name] = queue(results, kernel)
    for each in queues.values():
        if each:
            measure(results, *each.pop(0), product_ms)
    results.attempt(TRITON_PRODUCT, lambda: with_ratio(triton_product(problem), product_ms))
    while any(queues.values()):
        for each in queues.values():
            if each:
                measure(results, *each.pop(0), product_ms)


def queue(results: Results, kernel: templates.Kernel) -> list[tuple[str, templates.Kernel, object]]:
    """Return a kernel's configurations: first the group of the default, then the rest."""
    found: list[object] = []

    def ask() -> Fields:
        found.extend(templates.candidates(kernel))
        return {"configurations": len(found), "detail": True}

    if not results.attempt(f"{kernel.name}, its configurations", ask):
        return []
    of_default = getattr(found[0], "group", None)
    found.sort(key=lambda config: getattr(config, "group", None) != of_default)
    named = [(f"{kernel.name} {short(config)}", kernel, config) for config in found]
    results.plan(*(name for name, _, _ in named))
    return named


def short(config: object) -> str:
    """Return a short name of a configuration, for example ``128x128x32 warps 8 stages 3``."""
    fields = templates.config_fields(config)
    if not isinstance(fields, dict):
        return str(fields)
    initials = {"block_m": "", "block_v": "x", "block_h": "x"}
    return "".join(
        f"{initials.get(name, ' ' + name.removeprefix('num_') + ' ')}{value}"
        for name, value in fields.items()
    )


def measure(
    results: Results,
    name: str,
    kernel: templates.Kernel,
    config: object,
    product_ms: float | None,
) -> None:
    results.attempt(name, lambda: with_ratio(templates.measured(kernel, config), product_ms))


@torch.no_grad()
def main() -> None:
    device, results, case = arguments(("assertion", "candidates"))
    if device.type != "cuda":
        names = [*ASSERTION_VARIANTS] if case == "assertion" else [CONFIGURATIONS, TRITON_PRODUCT]
        for name in names:
            results.reason(name, NEEDS_CUDA)
        results.end()
    whole = Problem.usual(device)
    if case == "assertion":
        assertion(results, whole)
    else:
        candidates(results, Problem(whole.tokens, VOCABULARY, whole.hidden, device))
    results.end()


if __name__ == "__main__":
    main()
