"""Compile every template ahead of time and write what it needs of a device: docs/kernels.md.

    python tests/templates/resources.py --output docs/kernels.md

No device is needed; it takes some minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from ahead_of_time import Compiled, compile_templates
from fake_cuda import SHARED_MEMORY, output_code

from cce_inductor.kernels.triton import configs as configurations
from cce_inductor.kernels.triton.configs import Config
from cce_inductor.operators import (
    inductor,
    ops,  # noqa: F401  (registers the operators)
)

ROWS, VOCABULARY, HIDDEN = 8192, 32768, 4096
PROGRAMS = {
    "cross-entropy": "logsumexp(z); target(z, r0, -100)",
    "softcapped": "t0 = div.Tensor(z, 30.0); t1 = tanh(t0); t2 = mul.Tensor(t1, 30.0); "
    "logsumexp(t2); target(t2, r0, -100)",
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Inputs = list[tuple[tuple[int, ...], torch.dtype]]


def statistics(program: str, dtype: torch.dtype) -> tuple[Callable[..., Any], Inputs]:
    """The forward of a loss, and its inputs."""

    def forward(input: Any, weight: Any, target: Any) -> Any:
        return torch.ops.cce_inductor.reduce_rows(
            input, weight, None, [target], program, True, dtype, 2**30, 0.0, 0
        )[:2]

    return forward, [((ROWS, HIDDEN), dtype), ((VOCABULARY, HIDDEN), dtype), ((ROWS,), torch.int64)]


def gradient(
    program: str, dtype: torch.dtype, workspace_bytes: int = 2**30
) -> tuple[Callable[..., Any], Inputs]:
    """The backward, and its inputs."""

    def backward(grad_lse: Any, grad_target: Any, lse: Any, target_logit: Any, *rest: Any) -> Any:
        input, weight, target = rest
        return torch.ops.cce_inductor.reduce_rows_backward(
            [grad_lse, grad_target, None],
            [lse, target_logit, lse.unsqueeze(1)],
            input,
            weight,
            None,
            [target],
            program,
            True,
            dtype,
            workspace_bytes,
            0.0,
            0,
            [True, True, False, False],
        )

    _, inputs = statistics(program, dtype)
    return backward, [*[((ROWS,), torch.float64)] * 4, *inputs]


KINDS = {"statistics": statistics, "gradient": gradient}


def compiled(
    kind: str, program: str, dtype: torch.dtype, capability: int, config: Config | None = None
) -> Compiled:
    """A template's kernel, in the default configuration if none is given."""
    inductor.register()
    function, inputs = KINDS[kind](program, dtype)
    chosen = configurations.configs if config is None else mock.Mock(return_value=[config])
    with mock.patch(f"{configurations.__package__}.lowering.configs", chosen):
        code = output_code(function, inputs, capability)
    (found,) = compile_templates(code, capability).values()
    return found


def every_config(kind: str, program: str, dtype: torch.dtype, capability: int) -> list[Config]:
    """What autotuning tries, the default first; the group size changes nothing here."""
    inductor.register()
    tried: list[Config] = []

    def spy(*arguments: Any, **options: Any) -> list[Config]:
        tried[:] = configurations.configs(*arguments, **options)
        return tried

    with mock.patch(f"{configurations.__package__}.lowering.configs", spy):
        output_code(*KINDS[kind](program, dtype), capability)
    return [config for config in tried if config.group == tried[0].group]


def rows() -> Iterator[list[Any]]:
    for capability in SHARED_MEMORY:
        for dtype in DTYPES:
            for kind in KINDS:
                for name, program in PROGRAMS.items():
                    tried = every_config(kind, program, dtype, capability)
                    for number, config in enumerate(tried):
                        found = compiled(kind, program, dtype, capability, config)
                        yield [
                            f"sm_{capability}",
                            str(dtype).removeprefix("torch."),
                            f"{kind}, {name}",
                            f"{config.block_m} x {config.block_v} x {config.block_h}"
                            + (" (default)" if number == 0 else ""),
                            config.num_warps,
                            config.num_stages,
                            found.registers,
                            found.spilled,
                            f"{found.shared / 1024:.0f}",
                            found.tensor_cores,
                            "loads and stores"
                            if found.tma_stores
                            else "loads"
                            if found.tma_loads
                            else "no",
                            *found.code.after_product,
                        ]


HEADERS = (
    "device",
    "dtype",
    "kernel",
    "tile: rows x columns x hidden",
    "warps",
    "stages",
    "registers",
    "spilled, bytes",
    "shared, KiB",
    "product",
    "TMA",
    "instructions after the product",
    "with targets",
)
TEXT = f"""\
# What the CUDA kernels need

The register count, shared memory and instructions of every configuration of both Triton templates.
They were compiled ahead of time by Triton {triton.__version__} with the options that Inductor of torch
{torch.__version__.split("+")[0]} passes; none of these devices was present.

The configuration marked as default is used unless `mode="max-autotune"` is set, which tries all and
keeps the fastest. A kernel that spills registers to memory is slower; none of the defaults below
does. The last two columns count the instructions that each warp executes for a tile besides the
matrix product, for a tile without the target of any row and for a tile with targets. During these
instructions, the tensor cores may be idle.

To update this page, run `python tests/templates/resources.py --output docs/kernels.md`. It takes some
minutes and needs no GPU.

Problem size: {ROWS:,} tokens, vocabulary {VOCABULARY:,}, hidden size {HIDDEN:,}. Shared memory of a block:
{", ".join(f"{size // 1024} KiB on sm_{name}" for name, size in SHARED_MEMORY.items())}.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    lines = [HEADERS, ["---"] * len(HEADERS), *rows()]
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    arguments.output.write_text(f"{TEXT}{table}\n")


if __name__ == "__main__":
    main()
