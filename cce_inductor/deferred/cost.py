"""What it costs to look at deferred logits, said once for each place where somebody does."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import Tensor

from cce_inductor.options import DEFAULT_MIN_LOGITS_BYTES
from cce_inductor.reporting.location import calling_frame, in_torch
from cce_inductor.reporting.sizes import format_bytes, format_tensor

_PACKAGE = Path(__file__).parent.parent
_told: set[tuple[str, int]] = set()


def tell(logits: Tensor) -> None:
    """Warns that logits are computed, if they are large and the place is new."""
    if logits.nbytes < DEFAULT_MIN_LOGITS_BYTES:
        return
    frame = calling_frame(lambda file: _PACKAGE in Path(file).parents or in_torch(file))
    file, line = place = frame.f_code.co_filename, frame.f_lineno
    if place in _told:
        return
    _told.add(place)
    warnings.warn_explicit(
        f"deferred logits are computed here: {format_tensor(logits.shape, logits.dtype)}, "
        f"{format_bytes(logits.nbytes)}. Rows of them, reductions over the vocabulary and losses "
        "cost no such memory; cce_inductor.install(defer_logits='never') lets the compiled "
        "function return them as before.",
        UserWarning,
        file,
        line,
    )
