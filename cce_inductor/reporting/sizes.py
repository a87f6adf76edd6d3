"""Sizes of tensors for people: bytes, shapes and dtypes, with dynamic sizes as they were at
compilation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cce_inductor.torch_internals.symbols import size_hint


def shape_hints(value: torch.Tensor) -> tuple[int, ...]:
    """The shape with each size as `size_hint` has it, -1 where only data tells."""
    return tuple(-1 if (at := size_hint(size)) is None else at for size in value.shape)


def tensor_bytes(value: torch.Tensor) -> int | None:
    """Bytes of a tensor with dynamic sizes as they were at compilation; None if they are known
    only at run time."""
    sizes = [size_hint(size) for size in value.shape]
    known = [size for size in sizes if size is not None]
    return math.prod(known) * value.dtype.itemsize if len(known) == len(sizes) else None


def format_bytes(count: int) -> str:
    """`count` in the largest binary unit that keeps it at least 1."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"


def format_tensor(shape: Sequence[int], dtype: torch.dtype | None) -> str:
    """``4x256x32768 float32``; of a size that is not known ``?``."""
    sizes = ("?" if size == -1 else str(size) for size in shape)
    return f"{'x'.join(sizes)} {str(dtype).removeprefix('torch.')}"
