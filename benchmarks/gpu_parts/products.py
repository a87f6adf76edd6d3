"""Measure the device: its copy rate, the library's matrix products, and float32 sums of products.

The loss needs four products of this shape, so the library's rate bounds its speed. The gradient of
the input is a float32 sum over blocks of the vocabulary; this shows how wide a block has to be. If
the vocabulary is not a multiple of 8, the library is slow unless the rows of the logits are padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem
from .results import Results, arguments
from .timing import Work, compare

COPY_BYTES = {"cuda": 2**32, "cpu": 2**24}
WIDTHS = {"cuda": (1024, 4096, 8192), "cpu": (256, 512, 1024)}
ODD_VOCABULARY = {"cuda": 50257, "cpu": 2001}
PRODUCT = "library product"


def copy(results: Results, device: torch.device) -> None:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work = Work(lambda: target.copy_(source), bytes=2.0 * source.nbytes)
    compare(results, {"copy": work}, device)


def of_the_shape(results: Results, problem: Problem) -> None:
    input, weight, _ = problem.inputs()
    dz = torch.ones(problem.tokens, problem.vocabulary, device=problem.device, dtype=input.dtype)
    work = {
        PRODUCT: Work(lambda: torch.mm(input, weight.t(), out=dz), problem.flops),
        "its d_input": Work(lambda: torch.mm(dz, weight), problem.flops),
        "its d_weight": Work(lambda: torch.mm(dz.t(), input), problem.flops),
    }
    compare(results, work, problem.device, PRODUCT)


def sums(results: Results, problem: Problem) -> None:
    """Time the sum of d_input for one block; ratios are to the product without the sum."""
    _, weight, _ = problem.inputs()
    for width in WIDTHS[problem.device.type]:
        block = weight[:width]
        dz = torch.ones(problem.tokens, width, device=problem.device, dtype=weight.dtype)
        total = torch.zeros(problem.tokens, problem.hidden, device=problem.device)
        flops = 2.0 * problem.tokens * width * problem.hidden

        def in_place(total: Tensor = total, dz: Tensor = dz, block: Tensor = block) -> None:
            torch.ops.aten.addmm.dtype_out(total, dz, block, torch.float32, out=total)

        def into_new(total: Tensor = total, dz: Tensor = dz, block: Tensor = block) -> Tensor:
            return torch.addmm(total, dz, block, out_dtype=torch.float32)

        def alone(dz: Tensor = dz, block: Tensor = block) -> Tensor:
            return torch.mm(dz, block)

        fields = {"blocks": -(-problem.vocabulary // width)}
        name = f"product of {width:,} columns"
        work = {
            name: Work(alone, flops, fields=fields),
            f"float32 addmm in place, {width:,} columns": Work(in_place, flops, fields=fields),
            f"float32 addmm, {width:,} columns": Work(into_new, flops, fields=fields),
        }
        compare(results, work, problem.device, name)


def odd_vocabulary(results: Results, problem: Problem) -> None:
    vocabulary = ODD_VOCABULARY[problem.device.type]
    padded = -(-vocabulary // 8) * 8
    odd = Problem(problem.tokens, vocabulary, problem.hidden, problem.device)
    input, weight, _ = odd.inputs()
    whole = torch.ones(odd.tokens, padded, device=odd.device, dtype=input.dtype)
    in_padded = whole[:, :vocabulary]
    plain = in_padded.contiguous()
    name = f"vocabulary {vocabulary:,}"
    forward, backward = f"{name}, forward", f"{name}, d_weight"
    work = {
        forward: Work(lambda: torch.mm(input, weight.t(), out=plain), odd.flops),
        f"{forward}, padded rows": Work(
            lambda: torch.mm(input, weight.t(), out=in_padded), odd.flops
        ),
    }
    compare(results, work, odd.device, forward)
    work = {
        backward: Work(lambda: torch.mm(plain.t(), input), odd.flops),
        f"{backward}, padded rows": Work(lambda: torch.mm(in_padded.t(), input), odd.flops),
    }
    compare(results, work, odd.device, backward)


@torch.no_grad()
def main() -> None:
    device, results, _ = arguments()
    problem = Problem.usual(device)
    copy(results, device)
    of_the_shape(results, problem)
    sums(results, problem)
    odd_vocabulary(results, problem)
    results.end()


if __name__ == "__main__":
    main()
