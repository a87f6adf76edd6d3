"""Every option of the package, validated where it enters."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

OnError = Literal["warn", "raise"]

DEFAULT_WORKSPACE_BYTES = 64 * 2**20
DEFAULT_MIN_LOGITS_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Options:
    """How the pass behaves.

    Attributes:
        min_logits_bytes: logits of fewer bytes (tokens x vocabulary x bytes of their dtype) are
            left alone: storing them costs less than computing them again. 0 rewrites everything.
        workspace_bytes: bound on the block of logits that the blockwise kernels hold at a time.
        on_error: what an unexpected exception in the pass does: ``"warn"`` logs it and compiles
            the graph as it was, ``"raise"`` lets it out (for debugging).

    Raises:
        TypeError: an option of another type.
        ValueError: an option out of its range.
    """

    min_logits_bytes: int = DEFAULT_MIN_LOGITS_BYTES
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    on_error: OnError = "warn"

    def __post_init__(self) -> None:
        _check_bytes("min_logits_bytes", self.min_logits_bytes, at_least=0)
        _check_bytes("workspace_bytes", self.workspace_bytes, at_least=1)
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error must be one of {get_args(OnError)}, got {self.on_error!r}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def create(cls, **options: Any) -> Options:
        """Like the constructor, with an error that lists the options for an unknown name."""
        unknown = sorted(set(options) - set(cls.names()))
        if unknown:
            raise TypeError(
                f"unknown option {unknown[0]!r}; the options are {', '.join(cls.names())}"
            )
        return cls(**options)


def _check_bytes(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int (bytes), got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
