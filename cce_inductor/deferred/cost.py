"""The warning that deferred logits are computed, once for each line of the user's code."""

from __future__ import annotations

import warnings

from torch import Tensor

from cce_inductor.options import DEFAULT_MIN_LOGITS_BYTES
from cce_inductor.reporting.sizes import format_bytes, format_tensor
from cce_inductor.torch_internals.callers import users_frame

_MOST_LINES = 1000
_warned: set[tuple[str, int]] = set()
"""The lines that were warned about. It is emptied when it has `_MOST_LINES`."""


def warn_of_cost(logits: Tensor, what: str) -> None:
    """Warn that logits are computed, if they are large and the user's line is new.

    Args:
        logits: a tensor with their shape and dtype.
        what: what the warning calls them, in the plural.
    """
    if logits.nbytes < DEFAULT_MIN_LOGITS_BYTES:
        return
    frame = users_frame()
    file, line = place = frame.f_code.co_filename, frame.f_lineno
    if place in _warned:
        return
    if len(_warned) >= _MOST_LINES:
        _warned.clear()
    _warned.add(place)
    warnings.warn_explicit(
        f"{what} are computed here: {format_tensor(logits.shape, logits.dtype)}, "
        f"{format_bytes(logits.nbytes)}. Single rows, reductions over the vocabulary and losses do "
        "not need that memory. With cce_inductor.install(defer_logits='never') the compiled "
        "function returns computed logits.",
        UserWarning,
        file,
        line,
    )
