"""What it costs to look at deferred logits, said once for each place where somebody does."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from torch import Tensor

from ..location import in_torch
from ..options import DEFAULT_MIN_LOGITS_BYTES
from ..report import format_bytes

_PACKAGE = str(Path(__file__).parent.parent)
_told: set[tuple[str, int]] = set()


def tell(logits: Tensor) -> None:
    """Warns that logits are computed, if they are large and the place is new."""
    if logits.nbytes < DEFAULT_MIN_LOGITS_BYTES:
        return
    file, line = place = _place()
    if place in _told:
        return
    _told.add(place)
    shape = "x".join(map(str, logits.shape))
    warnings.warn_explicit(
        f"deferred logits are computed here: {shape} {str(logits.dtype).removeprefix('torch.')}, "
        f"{format_bytes(logits.nbytes)}. Rows of them, reductions over the vocabulary and losses "
        "cost no such memory; cce_inductor.install(defer_logits='never') lets the compiled "
        "function return them as before.",
        UserWarning,
        file,
        line,
    )


def _place() -> tuple[str, int]:
    """File and line of the innermost frame outside of PyTorch and this package."""
    frame = sys._getframe()
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_PACKAGE) and not in_torch(file):
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
