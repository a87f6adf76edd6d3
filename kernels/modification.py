"""The pointwise function between the projection and the loss, as a chain of steps.

`30.0 * tanh(logit / 30.0)` is written ``"div 30.0, tanh, mul 30.0"``: the steps in the order in
which the replaced code applied them, so that rounding is the same too.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

CONSTANT_STEPS = ("mul", "div")
"""Steps that take one finite or infinite constant."""


@dataclasses.dataclass(frozen=True)
class Modification:
    """A chain of steps; the empty chain is the identity.

    Attributes:
        steps: ``("mul", c)``, ``("div", c)`` or ``("tanh", None)``, first applied first.
    """

    steps: tuple[tuple[str, float | None], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Modification:
        """The inverse of ``str``.

        Raises:
            ValueError: `text` is not a chain of known steps.
        """
        steps: list[tuple[str, float | None]] = []
        for step in filter(None, (part.strip() for part in text.split(","))):
            name, _, constant = step.partition(" ")
            if name in CONSTANT_STEPS and constant:
                steps.append((name, float(constant)))
            elif step == "tanh":
                steps.append((step, None))
            else:
                raise ValueError(f"unknown step {step!r} in the logit modification {text!r}")
        return cls(tuple(steps))

    @classmethod
    def softcap(cls, cap: float) -> Modification:
        """``cap * tanh(logit / cap)``, as in Gemma 2 (arXiv 2408.00118, section 2)."""
        return cls((("div", cap), ("tanh", None), ("mul", cap)))

    def then(self, name: str, constant: float | None = None) -> Modification:
        """This chain with one more step at its end."""
        return Modification((*self.steps, (name, constant)))

    def __str__(self) -> str:
        return ", ".join(
            name if constant is None else f"{name} {constant!r}" for name, constant in self.steps
        )

    @property
    def is_linear(self) -> bool:
        """Whether the derivative is the same for every logit."""
        return all(name in CONSTANT_STEPS for name, _ in self.steps)

    def apply_(self, logits: Tensor) -> None:
        """Replaces `logits` by the modified logits."""
        for name, constant in self.steps:
            _STEPS[name](logits, constant)

    def apply_with_derivative_(self, logits: Tensor, derivative: Tensor | None) -> float:
        """Replaces `logits` by the modified logits and writes the derivative.

        Args:
            logits: any shape, a floating dtype; changed in place.
            derivative: the same shape and dtype, overwritten; None is allowed, and means the
                constant 1, when `is_linear`.

        Returns:
            A factor: the derivative with respect to the unmodified logit is
            ``factor * derivative``.
        """
        factor = 1.0
        if derivative is not None:
            derivative.fill_(1.0)
        for name, constant in self.steps:
            _STEPS[name](logits, constant)
            if name == "mul":
                factor *= constant  # type: ignore[operator]
            elif name == "div":
                factor /= constant  # type: ignore[operator]
            else:
                assert derivative is not None, "a chain with tanh needs room for its derivative"
                # d tanh(u) / du = 1 - tanh(u)^2
                derivative.addcmul_(derivative * logits, logits, value=-1.0)
        return factor


_STEPS = {
    "mul": lambda logits, constant: logits.mul_(constant),
    "div": lambda logits, constant: logits.div_(constant),
    "tanh": lambda logits, _: logits.tanh_(),
}

IDENTITY = Modification()
