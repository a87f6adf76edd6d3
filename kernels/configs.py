"""Block sizes of the templates, by device and dtype; the first of a list is the default."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._inductor.utils import can_use_tma


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


def reads_by_descriptor(matrices: list[Any], compute_dtype: torch.dtype, device: Any) -> bool:
    """Whether TMA descriptors read both matrices: on sm_90 and later, if they need no cast. Not
    float32, whose products without tensor cores have no registers to spare."""
    if (
        compute_dtype == torch.float32
        or device.type != "cuda"
        or torch.cuda.get_device_capability(device)[0] < 9
    ):
        return False
    if any(matrix.get_dtype() != compute_dtype for matrix in matrices):
        return False
    hidden_last = all(matrix.get_stride()[1] == 1 for matrix in matrices)
    return hidden_last and bool(can_use_tma(*matrices))


_WIDE = [  # float32
    (64, 128, 32, 4, 3),
    (64, 128, 32, 8, 3),
    (128, 128, 32, 8, 2),
    (32, 128, 32, 4, 4),
]
_BY_POINTER = [
    (128, 128, 32, 8, 3),
    (64, 128, 32, 4, 3),
    (128, 128, 64, 8, 2),
    (64, 128, 64, 4, 2),
]
_BY_DESCRIPTOR = [
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
]
_FEW_STEPS = {"statistics": 0, "gradient": 8}  # those of a cross-entropy
_ON_HOPPER = {  # wider tiles, which leave the fewest registers
    "statistics": [(256, 128, 64, 8, 3)],
    "gradient": [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3)],
}


def configs(
    kind: str, dtype: torch.dtype, device: Any, *, by_descriptor: bool, steps: int
) -> list[Config]:
    """What is tried, the default first.

    Args:
        kind: "statistics", whose tiles have `tile_ops.TILE` columns, or "gradient".
        dtype: of the products' operands.
        device: that it runs on.
        by_descriptor: whether TMA reads the operands.
        steps: how many are applied to each logit; they need registers, too.
    """
    programs = 0
    sizes = _WIDE if dtype == torch.float32 else _BY_POINTER
    if by_descriptor:
        programs = _programs(device)
        sizes = _BY_DESCRIPTOR
        if torch.cuda.get_device_capability(device)[0] == 9:
            wide = _ON_HOPPER[kind]
            sizes = [*wide, *sizes] if steps <= _FEW_STEPS[kind] else [*sizes, *wide]
    return [Config(*size, group, programs) for size in sizes for group in (8, 16)]


def _programs(device: Any) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
