"""Record versions, and check two matrix products that the gradient relies on.

The float32 sums of the gradient use `torch.mm` with ``out_dtype``, and ``addmm.dtype_out`` with its
first argument as output. Both are new and hardly documented, so they are compared with float64.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from .problem import relative_error
from .results import Fields, Results, arguments

PACKAGES = (
    "triton",
    "numpy",
    "pytest",
    "hypothesis",
    "transformers",
    "liger_kernel",
    "cut_cross_entropy",
    "quack",
)
SIZES = {"cuda": (4096, 2048, 1024), "cpu": (128, 64, 32)}


def environment() -> Fields:
    import cce_inductor

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cce_inductor": cce_inductor.__file__,
    }


def packages() -> Fields:
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    """Return the version of a package, or its location if it has no version."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is None:
            return "not importable"
        for each in (name, f"{name}-kernels"):
            try:
                return importlib.metadata.version(each)
            except importlib.metadata.PackageNotFoundError:
                continue
        return str(spec.origin)
    except Exception as error:
        return f"not importable: {error}"


def device_properties(device: torch.device) -> Fields:
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "gib": found.total_memory / 2**30,
    }


def products(results: Results, device: torch.device) -> None:
    m, k, n = SIZES[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b, total = (
        torch.randn(size, generator=generator, device=device) for size in ((m, k), (k, n), (m, n))
    )
    a, b = a.bfloat16(), b.bfloat16()
    exact = a.double() @ b.double()

    def rounded() -> Fields:
        return {"error": relative_error(torch.mm(a, b), exact)}

    def wide() -> Fields:
        return {"error": relative_error(torch.mm(a, b, out_dtype=torch.float32), exact)}

    def summed() -> Fields:
        found = torch.addmm(total, a, b, out_dtype=torch.float32)
        return {"error": relative_error(found, total.double() + exact)}

    def in_place() -> Fields:
        sum = total.clone()
        torch.ops.aten.addmm.dtype_out(sum, a, b, torch.float32, out=sum)
        return {"error": relative_error(sum, total.double() + exact)}

    for name, measure in {
        "mm, bfloat16": rounded,
        "mm(out_dtype=float32)": wide,
        "addmm(out_dtype=float32)": summed,
        "addmm.dtype_out(out=self)": in_place,
    }.items():
        results.attempt(name, measure)


def main() -> None:
    device, results, _ = arguments()
    results.attempt("environment", environment)
    results.attempt("packages", packages)
    if device.type == "cuda":
        results.attempt("device", lambda: device_properties(device))
    products(results, device)
    results.end()


if __name__ == "__main__":
    main()
