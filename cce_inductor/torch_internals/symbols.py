"""Sizes and numbers that Dynamo keeps symbolic."""

from __future__ import annotations

import torch


def size_hint(size: int | torch.SymInt) -> int | None:
    """Return a size; a dynamic one as it was at compilation, None if it depends on data."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if isinstance(hint, int) else None
