"""What happens to an unexpected exception: the option ``on_error``.

Code that catches one calls `surprised`, and then continues without what failed. With
``on_error="raise"``, `surprised` raises the exception instead.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Literal

_log = logging.getLogger(__name__)

OnError = Literal["warn", "raise"]

_chosen: ContextVar[OnError | None] = ContextVar("cce_inductor_on_error", default=None)
_default: OnError = "warn"


@contextlib.contextmanager
def on_error(choice: OnError) -> Iterator[None]:
    """Set the option in this thread, for a with-block."""
    token = _chosen.set(choice)
    try:
        yield
    finally:
        _chosen.reset(token)


def set_default(choice: OnError) -> Callable[[], None]:
    """Set the option in all threads, where no `on_error` block is in force.

    Returns:
        A function that restores the previous value.
    """
    global _default
    before, _default = _default, choice

    def undo() -> None:
        global _default
        _default = before

    return undo


def surprised(consequence: str) -> None:
    """Log the exception that is being handled, or raise it if the option says so.

    It is logged with its traceback, the first time that one with this message is met.

    Args:
        consequence: what happens instead. It follows "so" in the logged sentence.
    """
    if (_chosen.get() or _default) == "raise":
        raise  # the exception that the caller handles
    error = sys.exception()
    _warn_once(consequence, type(error).__name__, str(error))


@functools.lru_cache(maxsize=1000)
def _warn_once(consequence: str, kind: str, message: str) -> None:
    _log.warning(
        "cce_inductor met an unexpected error, so %s. Results are as without cce_inductor; please "
        "report this with the traceback.",
        consequence,
        exc_info=True,
    )
