"""Measure the alternative to the templates: a library product of a block, then one fused pass.

The templates are worth having only if they are faster. A block is bfloat16, or float32 if the
library can write float32. Times are for the whole vocabulary, extrapolated from one block. Ratios
are to the library's product of the whole vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem
from .products import PRODUCT
from .results import Results, arguments
from .timing import Work, compare

WIDTH = {"cuda": 8192, "cpu": 512}


def block_statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.float()
    top = z.amax(1)
    return top, (z - top[:, None]).exp().sum(1)


def block_gradient(z: Tensor, lse: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    here = torch.arange(z.shape[1], device=z.device) == target[:, None]
    dz = ((z.float() - lse[:, None]).exp() - here.float()) * scale[:, None]
    return dz.to(torch.bfloat16)


def measure(results: Results, problem: Problem) -> None:
    device, width = problem.device, WIDTH[problem.device.type]
    input, weight, target = problem.inputs()
    block = weight[:width]
    whole = torch.empty(problem.tokens, problem.vocabulary, device=device, dtype=input.dtype)
    rounded = torch.mm(input, block.t())
    wide = rounded.float()
    lse = torch.full((problem.tokens,), 12.0, device=device)
    scale = torch.full((problem.tokens,), 1 / problem.tokens, device=device)
    statistics = torch.compile(block_statistics)
    gradient = torch.compile(block_gradient)

    def wide_product() -> Tensor:
        return torch.mm(input, block.t(), out_dtype=torch.float32)

    flops = 2.0 * problem.tokens * width * problem.hidden
    passes = {
        "block product, bfloat16": Work(lambda: torch.mm(input, block.t(), out=rounded), flops),
        "block product, float32": Work(wide_product, flops),
        "statistics of a bfloat16 block": Work(lambda: statistics(rounded), bytes=rounded.nbytes),
        "statistics of a float32 block": Work(lambda: statistics(wide), bytes=wide.nbytes),
        "dz of a bfloat16 block": Work(
            lambda: gradient(rounded, lse, target, scale), bytes=2.0 * rounded.nbytes
        ),
        "dz of a float32 block": Work(
            lambda: gradient(wide, lse, target, scale), bytes=wide.nbytes + rounded.nbytes
        ),
    }
    product = Work(lambda: torch.mm(input, weight.t(), out=whole), problem.flops)
    names = [
        f"{kind}, {dtype} blocks"
        for kind in ("statistics", "dz")
        for dtype in ("bfloat16", "float32")
    ]
    results.plan(*names)
    medians = compare(results, {PRODUCT: product, **passes}, device)
    blocks = problem.vocabulary / width
    for name in names:
        kind, dtype = name.removesuffix(" blocks").split(", ")
        parts = (f"block product, {dtype}", f"{kind} of a {dtype} block")
        missing = [part for part in parts if part not in medians]
        if missing:
            results.reason(name, f"{missing[0]} was not measured")
            continue
        ms = blocks * sum(medians[part] for part in parts)
        ratio = {}
        if PRODUCT in medians:
            ratio = {"ratio": ms / medians[PRODUCT], "against": PRODUCT}
        results.number(name, ms=ms, blocks=blocks, **ratio)


@torch.no_grad()
def main() -> None:
    device, results, _ = arguments()
    measure(results, Problem.usual(device))
    results.end()


if __name__ == "__main__":
    main()
