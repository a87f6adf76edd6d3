"""Sizes of tensors as text. A dynamic size has the value that it had at compilation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cce_inductor.torch_internals.symbols import size_hint


def shape_hints(value: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor, with -1 for sizes that are known only at run time."""
    return tuple(-1 if (at := size_hint(size)) is None else at for size in value.shape)


def tensor_bytes(value: torch.Tensor) -> int | None:
    """Return the bytes of a tensor, None if they are known only at run time."""
    sizes = [size_hint(size) for size in value.shape]
    known = [size for size in sizes if size is not None]
    return math.prod(known) * value.dtype.itemsize if len(known) == len(sizes) else None


def format_bytes(count: int) -> str:
    """Return a number of bytes in the largest binary unit of which there is at least one."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"


def format_tensor(shape: Sequence[int], dtype: torch.dtype | None) -> str:
    """Return ``4x256x32768 float32``, with ``?`` for a size that is known only at run time."""
    sizes = ("?" if size == -1 else str(size) for size in shape)
    return f"{'x'.join(sizes)} {str(dtype).removeprefix('torch.')}"
