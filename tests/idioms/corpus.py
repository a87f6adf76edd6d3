"""Registration of idioms: ways to write a loss, with arguments and the expected outcome.

    @rewritten(hidden(), weight(), labels())
    def nanogpt(x, weight, targets): ...

A function is called with the tensors. A class is an `nn.Module`, created anew for each use; the
gradients of its parameters are compared as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TIME, HIDDEN, VOCABULARY = 2, 6, 16, 37

Make = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Idiom:
    """One way of writing a loss.

    Attributes:
        name: the name of the function or class.
        subject: the name of its file.
        code: the function, or the class of a module.
        inputs: a function for each argument that creates it.
        rewritten: whether every loss should be rewritten; otherwise none may be.
        reason: a regular expression for the reason in the report of a loss that is left alone.
        dynamic: the argument `dynamic` of `torch.compile`.
        around: a context manager around the call, outside the compiled function.
        graphs: how many graphs Dynamo captures; None if that does not matter.
        dtype: the dtype of a module's parameters.
        rounded: the dtype in which it computes, if it is coarser than that of its inputs.
        smallest: the option ``min_logits_bytes``.
        stored: how many tensors of [rows, vocabulary] remain: a teacher's probabilities, which are
            used whole, or a weight that is joined from two.
        random: whether float64 would draw other random numbers, so that the result is compared
            with eager's in the same dtype.
    """

    name: str
    subject: str
    code: Callable[..., Any]
    inputs: tuple[Make, ...]
    rewritten: bool
    reason: str | None = None
    dynamic: bool | None = None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    graphs: int | None = 1
    dtype: torch.dtype | None = None
    rounded: torch.dtype | None = None
    smallest: int = 0
    stored: int = 0
    random: bool = False

    def make(self, seed: int = 0) -> tuple[Callable[..., Any], list[Any]]:
        """Return the function or a new module, and new arguments whose values `seed` decides."""
        torch.manual_seed(seed)
        arguments = [make() for make in self.inputs]
        code = self.code
        if isinstance(code, type):
            code = code()
            if self.dtype is not None:
                code.to(self.dtype)
        return code, arguments


IDIOMS: dict[str, Idiom] = {}


def _register(code: Any, inputs: tuple[Make, ...], **verdict: Any) -> Any:
    name = code.__name__
    assert name not in IDIOMS, name
    subject = code.__module__.rpartition(".")[2]
    IDIOMS[name] = Idiom(name, subject, code, inputs, **verdict)
    return code


def rewritten(*inputs: Make, **options: Any) -> Callable[[Any], Any]:
    """Register an idiom in which every loss should be rewritten."""
    return lambda code: _register(code, inputs, rewritten=True, **options)


def left_alone(reason: str | None, *inputs: Make, **options: Any) -> Callable[[Any], Any]:
    """Register an idiom in which no loss may be rewritten, because of `reason`.

    Without a reason, it contains no loss, and a report is optional.
    """
    return lambda code: _register(code, inputs, rewritten=False, reason=reason, **options)


def real(
    *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, grad: bool = True
) -> Make:
    """Return a maker of normally distributed values."""
    return lambda: (torch.randn(shape) * scale).to(dtype).requires_grad_(grad)


def hidden(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Make:
    """Return a maker of hidden states, [2, 6, 16] by default."""
    return real(*(shape or (BATCH, TIME, HIDDEN)), dtype=dtype, grad=grad)


def weight(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Make:
    """Return a maker of a head's weight, [37, 16] by default."""
    return real(*(shape or (VOCABULARY, HIDDEN)), scale=0.5, dtype=dtype, grad=grad)


def bias(size: int = VOCABULARY, dtype: torch.dtype = torch.float32) -> Make:
    return real(size, dtype=dtype)


def labels(*shape: int, ignored: int | None = None, high: int = VOCABULARY) -> Make:
    """Return a maker of class indices, [2, 6] by default, of which two are `ignored` if given."""

    def make() -> Tensor:
        values = torch.randint(high, shape or (BATCH, TIME))
        if ignored is not None:
            values.view(-1)[[1, -1]] = ignored
        return values

    return make


def mask(*shape: int) -> Make:
    """Return a maker of a float mask with some zeros."""

    def make() -> Tensor:
        values = torch.ones(shape or (BATCH, TIME))
        values[..., 0] = 0
        values.view(-1)[-2:] = 0
        return values

    return make


def probabilities(*shape: int) -> Make:
    """Return a maker of a distribution over the vocabulary for each token."""
    return lambda: torch.randn(shape or (BATCH, TIME, VOCABULARY)).softmax(-1)


def number(value: Any) -> Make:
    """Return a maker of a Python number, or of a tensor if `value` is a list."""
    return lambda: torch.tensor(value) if isinstance(value, list) else value


class Body(nn.Module):
    """An embedding and a norm, as a substitute for a transformer."""

    def __init__(self, vocabulary: int = VOCABULARY, size: int = HIDDEN) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.embedding(ids))
