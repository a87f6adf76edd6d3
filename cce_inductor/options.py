"""Every option of the package. Values are validated when an `Options` is made."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from cce_inductor.surprise import OnError

DeferLogits = Literal["auto", "with_loss", "always", "never"]
StaleLogits = Literal["raise", "keep"]

DEFAULT_WORKSPACE_BYTES = 96 * 2**20
DEFAULT_MIN_LOGITS_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Options:
    """How the pass behaves.

    Attributes:
        min_logits_bytes: logits with fewer bytes (tokens x vocabulary x bytes of their dtype) are
            left alone, because storing them costs less than computing them again. 0 rewrites
            everything. If the size is known only at run time, the logits count as large.
        workspace_bytes: the bound on the block of logits that exists at a time; on CUDA, on the
            block of their gradients. A block has at least 1,024 columns on the CPU and 8,192 on
            CUDA (128 MiB for 8,192 tokens in bfloat16). Each block reads and writes the float32
            sum of the input's gradient, which would cost the most if blocks were narrow. On the
            CPU, it also decides how many matrix products a step takes: three instead of four if
            the gradient is known up to one factor and the logits of 128 rows fit, which 96 MiB do
            for 196,608 entries in float32. For other losses of a number of tokens that does not
            change, what exceeds 96 MiB keeps logits for the backward.
        sample_below: 0 computes exact gradients. Otherwise the gradient of a pair of a row and a
            block of 1,024 vocabulary entries that holds less of the row's softmax than this is
            computed with a probability of mass / `sample_below`, and weighted by the inverse. The
            loss is exact and the gradient unbiased; a larger number saves more time and adds more
            noise (docs/sampling.md). At most 1. With CUDA graphs, all gradients are exact.
        defer_logits: which logits that a compiled function returns are computed only when they are
            used (`DeferredLogits`). ``"with_loss"``: those with a loss that is rewritten.
            ``"auto"``: also those that a loss is expected to follow, because they require a
            gradient or a graph break separates them from the rest of the function.
            ``"always"``: all. ``"never"``: none, so their losses are left alone. Without a loss,
            only logits of at least `min_logits_bytes` are deferred.
        stale_logits: what happens if deferred logits are used after an optimizer has changed the
            weight that they are computed with. ``"raise"``: a `StaleLogitsError`. ``"keep"``: the
            weight is copied before the step, if such logits still exist, and the copy is freed with
            them.
        eager_heads: whether every `torch.nn.Linear` with more outputs than inputs, and at least
            `min_logits_bytes` of them, returns deferred logits in code that is not compiled, as
            after `defer`. Only for `install`.
        on_error: what an unexpected exception in this package does. ``"warn"`` logs it once with
            its traceback and continues without the part that failed: the graph is compiled as it
            was, or deferred logits are computed. ``"raise"`` raises it, for debugging.

    Raises:
        TypeError: an option has another type.
        ValueError: an option is out of its range.
    """

    min_logits_bytes: int = DEFAULT_MIN_LOGITS_BYTES
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    sample_below: float = 0.0
    defer_logits: DeferLogits = "auto"
    stale_logits: StaleLogits = "raise"
    eager_heads: bool = False
    on_error: OnError = "warn"

    def __post_init__(self) -> None:
        _check_bytes("min_logits_bytes", self.min_logits_bytes, at_least=0)
        _check_bytes("workspace_bytes", self.workspace_bytes, at_least=1)
        check_sample_below(self.sample_below)
        _check_choice("defer_logits", self.defer_logits, get_args(DeferLogits))
        _check_choice("stale_logits", self.stale_logits, get_args(StaleLogits))
        if not isinstance(self.eager_heads, bool):
            raise TypeError(f"eager_heads must be a bool, got {self.eager_heads!r}")
        _check_choice("on_error", self.on_error, get_args(OnError))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def create(cls, **options: Any) -> Options:
        """Make options by name. The error for an unknown name lists all names."""
        unknown = sorted(set(options) - set(cls.names()))
        if unknown:
            raise TypeError(
                f"unknown option {unknown[0]!r}; the options are {', '.join(cls.names())}"
            )
        return cls(**options)


def options_in_force() -> Options:
    """Return the options of `install`, or the defaults if it is not in force."""
    return _in_force or Options()


def is_in_force() -> bool:
    """Return whether `install` is in force."""
    return _in_force is not None


def put_in_force(options: Options | None) -> None:
    """Set what `options_in_force` returns, None for the defaults."""
    global _in_force
    _in_force = options


_in_force: Options | None = None


def check_sample_below(value: object) -> None:
    """Check `Options.sample_below`, which is also an argument of `linear_cross_entropy`.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not in [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"sample_below must be a float, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"sample_below must be in [0, 1], got {value}")


def _check_bytes(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int (bytes), got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
