"""Block sizes of the templates, by kind of kernel and device."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import torch
from torch._inductor.utils import TMA_ALIGNMENT, can_use_tma
from torch._inductor.virtualized import V


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes and launch options of one kernel.

    Attributes:
        block_m, block_v, block_h: rows and columns of a tile, and how much of the hidden size is
            read at a time.
        num_warps, num_stages: Triton's launch options.
        group: the number of row tiles that share what they read of the weight.
        programs: the number of programs that take turns at the tiles; 0 for one program a tile.
    """

    block_m: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    group: int
    programs: int


class Kind(enum.Enum):
    """What a template computes."""

    STATISTICS = enum.auto()
    """Numbers for each row and tile of the vocabulary, in the forward."""
    GRADIENT = enum.auto()
    """The gradient of each logit, in the backward."""


class Situation(enum.Enum):
    """What decides the block sizes."""

    FLOAT32_STATISTICS = enum.auto()
    FLOAT32_GRADIENT = enum.auto()
    POINTERS = enum.auto()
    """16-bit operands, read by pointers: before Hopper, or where a descriptor cannot read them."""
    POINTERS_FULL = enum.auto()
    """The same, for a kernel that needs all registers."""
    DESCRIPTORS = enum.auto()
    """16-bit operands, read by TMA descriptors."""
    DESCRIPTORS_FULL = enum.auto()
    """The same, for a kernel that needs all registers."""
    HOPPER = enum.auto()
    """Descriptors on Hopper, for a kernel with registers to spare: larger tiles read less."""


# Rows, columns, hidden, warps, stages. The first of a situation's list is the default. With it,
# no kernel in docs/kernels.md spills registers.
_FLOAT32 = (
    (64, 128, 32, 8, 3),
    (128, 128, 32, 8, 2),
    (32, 128, 32, 4, 4),
)
_DESCRIPTORS = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (64, 128, 64, 4, 4),
)

SIZES: dict[Situation, tuple[tuple[int, int, int, int, int], ...]] = {
    Situation.FLOAT32_STATISTICS: ((64, 128, 32, 8, 2), *_FLOAT32),
    Situation.FLOAT32_GRADIENT: ((64, 128, 32, 4, 3), *_FLOAT32),
    Situation.POINTERS: (
        (128, 128, 32, 8, 3),
        (64, 128, 32, 4, 3),
        (64, 128, 32, 8, 3),
        (128, 128, 64, 8, 2),
        (64, 128, 64, 4, 2),
    ),
    Situation.POINTERS_FULL: (
        (64, 128, 32, 8, 3),
        (128, 128, 32, 8, 3),
        (64, 128, 32, 4, 3),
        (128, 128, 64, 8, 2),
        (64, 128, 64, 4, 2),
    ),
    Situation.DESCRIPTORS: _DESCRIPTORS,
    Situation.DESCRIPTORS_FULL: ((64, 128, 64, 8, 4), *_DESCRIPTORS),
    Situation.HOPPER: (
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
        (128, 128, 64, 4, 3),
        *_DESCRIPTORS,
    ),
}

GROUPS = (8, 16)
"""The values that are tried for `Config.group`."""

FEW_STEPS = {Kind.STATISTICS: 0, Kind.GRADIENT: 8}
"""Programs with at most this many steps leave registers free: cross-entropy of unmodified logits
has that many. With more steps, a single value for each column may take all registers."""

FEW_RESULTS = {Kind.STATISTICS: 3, Kind.GRADIENT: 1}
"""Programs with at most this many results leave registers free. Cross-entropy with label smoothing
keeps three numbers of each row: the logsumexp, the target and the sum."""

SHARED_MEMORY_OF_SYSTEM = 1024
"""Bytes of shared memory that CUDA takes for each block of threads."""

REGISTERS_BESIDE_SUMS = 56
"""Registers of a thread, beside the sums of the product, that the leanest kernels need
(docs/kernels.md)."""


def situation(
    kind: Kind, dtype: torch.dtype, device: Any, *, by_descriptor: bool, steps: int, results: int
) -> Situation:
    """Return what decides the block sizes; the arguments are those of `configs`."""
    if dtype == torch.float32:
        is_statistics = kind is Kind.STATISTICS
        return Situation.FLOAT32_STATISTICS if is_statistics else Situation.FLOAT32_GRADIENT
    has_few_steps = steps <= FEW_STEPS[kind]
    has_few_results = results <= FEW_RESULTS[kind]
    writes_more = kind is Kind.GRADIENT and not has_few_results
    if not by_descriptor:
        return Situation.POINTERS_FULL if writes_more else Situation.POINTERS
    capability = torch.cuda.get_device_capability(device)[0]
    if writes_more or (kind is Kind.GRADIENT and capability > 9 and not has_few_steps):
        return Situation.DESCRIPTORS_FULL
    if capability == 9 and has_few_steps and has_few_results:
        return Situation.HOPPER
    return Situation.DESCRIPTORS


def configs(
    kind: Kind, dtype: torch.dtype, device: Any, *, by_descriptor: bool, steps: int, results: int
) -> list[Config]:
    """Return the configurations that are tried, the default first.

    Args:
        kind: what the kernel computes.
        dtype: the dtype of the products' operands.
        device: the device that the kernel runs on.
        by_descriptor: whether TMA descriptors read the operands.
        steps: the number of steps that are applied to each logit; they need registers, too.
        results: the numbers of each row that a kernel of statistics keeps, or the values of each
            logit that a kernel of gradients writes.
    """
    chosen = situation(
        kind, dtype, device, by_descriptor=by_descriptor, steps=steps, results=results
    )
    return [
        Config(*sizes, group, _programs(*sizes, device) if by_descriptor else 0)
        for sizes in SIZES[chosen]
        for group in GROUPS
    ]


def _programs(
    block_m: int,
    block_v: int,
    block_h: int,
    num_warps: int,
    num_stages: int,
    device: Any,
) -> int:
    """Return how many programs of a kernel a device may hold if the kernel reads 16-bit operands by
    descriptors.

    Shared memory and registers limit the number. Of the registers, only those that hold the sums
    of the product are known. With more programs, some would only wait; with fewer, the device would
    be partly idle.
    """
    properties = torch.cuda.get_device_properties(device)
    shared = num_stages * (block_m + block_v) * block_h * 2
    threads = num_warps * 32
    registers = block_m * block_v // threads + REGISTERS_BESIDE_SUMS
    held = min(
        properties.shared_memory_per_multiprocessor // (shared + SHARED_MEMORY_OF_SYSTEM),
        properties.regs_per_multiprocessor // (registers * threads),
    )
    return int(properties.multi_processor_count) * max(1, held)


def reads_by_descriptor(matrices: list[Any], device: Any) -> bool:
    """Whether TMA descriptors read both matrices, input and weight, on sm_90 and later.

    They are not used for float32, whose products without tensor cores have no registers to spare,
    and not for a single row: a descriptor reads zeros beyond it, and Inductor leaves out the mask
    of a store to one entry.
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
    """Whether a view begins at an address that a descriptor can have.

    `can_use_tma` checks only the tensor that is viewed.
    """
    offset = matrix.get_layout().offset * matrix.get_dtype().itemsize
    return bool(V.graph.sizevars.statically_known_multiple_of(offset, TMA_ALIGNMENT))
