"""Sizes and numbers that Dynamo keeps symbolic."""

from __future__ import annotations

import torch


def size_hint(size: int | torch.SymInt) -> int | None:
    """The size itself, what a dynamic one was at compilation, or None where only data tells."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if isinstance(hint, int) else None
