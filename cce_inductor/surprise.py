"""What an unexpected exception does.

Whoever catches one calls `surprised` and then goes on without what failed. This package's option
``on_error`` decides whether he gets that far.
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
    """What a surprise does in this thread while the block runs."""
    token = _chosen.set(choice)
    try:
        yield
    finally:
        _chosen.reset(token)


def set_default(choice: OnError) -> Callable[[], None]:
    """Says what a surprise does outside of `on_error`, in every thread.

    Returns:
        A function that puts back what was said before.
    """
    global _default
    before, _default = _default, choice

    def undo() -> None:
        global _default
        _default = before

    return undo


def surprised(consequence: str) -> None:
    """Raises the exception that is being handled if the option says so, else logs it with its
    traceback, the first time that one like it comes.

    Args:
        consequence: what happens instead, to follow "so".
    """
    if (_chosen.get() or _default) == "raise":
        raise  # what the caller is handling
    error = sys.exception()
    _warn_once(consequence, type(error).__name__, str(error))


@functools.cache
def _warn_once(consequence: str, kind: str, message: str) -> None:
    _log.warning(
        "cce_inductor met an unexpected error, so %s. Results are as without cce_inductor; please "
        "report this with the traceback.",
        consequence,
        exc_info=True,
    )
