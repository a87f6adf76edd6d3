"""Block sizes of the templates, by device and dtype; the first of a list is the default."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._inductor.utils import TMA_ALIGNMENT, can_use_tma
from torch._inductor.virtualized import V


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes and launch options of one kernel.

    Attributes:
        block_m, block_v, block_h: rows and columns of a tile, and how much of hidden is read at a
            time.
        group: row tiles that share what they read of the weight.
        programs: how many run at a time and take turns; 0 for one a tile.
        num_warps, num_stages: Triton's.
    """

    block_m: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    group: int
    programs: int


def reads_by_descriptor(matrices: list[Any], device: Any) -> bool:
    """Whether TMA descriptors read both matrices, input and weight: on sm_90 and later, where they
    may. Not float32, whose products without tensor cores have no registers to spare. Not a single
    row: descriptors read zeros beyond it, and Inductor leaves out the mask of a store to one entry.
    """
    if (
        V.graph.sizevars.statically_known_equals(matrices[0].get_size()[0], 1)
        or any(matrix.get_dtype() == torch.float32 for matrix in matrices)
        or device.type != "cuda"
        or torch.cuda.get_device_capability(device)[0] < 9
    ):
        return False
    if not all(matrix.get_stride()[1] == 1 and _begins_aligned(matrix) for matrix in matrices):
        return False
    return bool(can_use_tma(*matrices))


def _begins_aligned(matrix: Any) -> bool:
    """Whether a view begins at an address that a descriptor can have, which `can_use_tma` does not
    ask (it knows whether the tensor that is viewed does)."""
    offset = matrix.get_layout().offset * matrix.get_dtype().itemsize
    return bool(V.graph.sizevars.statically_known_multiple_of(offset, TMA_ALIGNMENT))


SHARED_MEMORY_OF_SYSTEM = 1024
"""Bytes that CUDA takes for each block."""

REGISTERS_BESIDE_SUMS = 56
"""Of a thread, at least: what the leanest kernels need (docs/kernels.md)."""

_FIRST_WIDE = {"statistics": (64, 128, 32, 8, 2), "gradient": (64, 128, 32, 4, 3)}
_WIDE = [  # float32
    (64, 128, 32, 8, 3),
    (128, 128, 32, 8, 2),
    (32, 128, 32, 4, 4),
]
_BY_POINTER = [
    (128, 128, 32, 8, 3),
    (64, 128, 32, 4, 3),
    (64, 128, 32, 8, 3),
    (128, 128, 64, 8, 2),
    (64, 128, 64, 4, 2),
]
_BY_DESCRIPTOR = [
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (64, 128, 64, 4, 4),
]
_LEANEST = {False: (64, 128, 32, 8, 3), True: (64, 128, 64, 8, 4)}
"""By pointer and by descriptor, for a gradient that needs the most registers: one that writes more
than that of the logit or, beyond Hopper, has many steps."""

_FEW_STEPS = {"statistics": 0, "gradient": 8}
"""Steps of a program that leave registers: a cross-entropy's, of the logits as they are. Of more, a
value a column alone may take all of them."""

_ON_HOPPER = [
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
]
"""For few steps: tiles that read the least, and leave the fewest registers."""


def configs(
    kind: str, dtype: torch.dtype, device: Any, *, by_descriptor: bool, steps: int, results: int
) -> list[Config]:
    """What is tried, the default first.

    Args:
        kind: "statistics" or "gradient".
        dtype: of the products' operands.
        device: that it runs on.
        by_descriptor: whether TMA reads the operands.
        steps: how many are applied to each logit; they need registers, too.
        results: how many values of each logit are reduced or written.
    """
    if dtype == torch.float32:
        sizes = [_FIRST_WIDE[kind], *_WIDE]
    else:
        sizes = _BY_DESCRIPTOR if by_descriptor else _BY_POINTER
        capability = torch.cuda.get_device_capability(device)[0] if by_descriptor else 0
        few_steps = steps <= _FEW_STEPS[kind]
        if kind == "gradient" and (results > 1 or (capability > 9 and not few_steps)):
            first = _LEANEST[by_descriptor]
            sizes = [first, *(size for size in sizes if size != first)]
        elif by_descriptor and capability == 9 and few_steps:
            sizes = [*_ON_HOPPER, *sizes]
    return [
        Config(*size, group, _programs(*size, device) if by_descriptor else 0)
        for size in sizes
        for group in (8, 16)
    ]


def _programs(
    block_m: int,
    block_v: int,
    block_h: int,
    num_warps: int,
    num_stages: int,
    device: Any,
) -> int:
    """How many programs of a kernel that reads 16-bit numbers by descriptors the device may hold:
    by its shared memory, and by its registers, of which the sums of the product are a part that is
    known. More than it does hold would only wait, fewer would leave it idle."""
    properties = torch.cuda.get_device_properties(device)
    shared = num_stages * (block_m + block_v) * block_h * 2
    threads = num_warps * 32
    registers = block_m * block_v // threads + REGISTERS_BESIDE_SUMS
    held = min(
        properties.shared_memory_per_multiprocessor // (shared + SHARED_MEMORY_OF_SYSTEM),
        properties.regs_per_multiprocessor // (registers * threads),
    )
    return int(properties.multi_processor_count) * max(1, held)
