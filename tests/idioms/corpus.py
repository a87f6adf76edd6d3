"""How an idiom is registered: what it is called with, and the verdict it should get.

    @rewritten(hidden(), weight(), labels())
    def nanogpt(x, weight, targets): ...

A function is called with the tensors; a class is an `nn.Module`, made anew for every use, and its
parameters' gradients count too.
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
        name: of the function or class.
        subject: the file it is in.
        code: the function, or the class of a module.
        inputs: one maker for each argument.
        rewritten: whether every loss in it should be rewritten; otherwise none may be.
        reason: what the report says of a loss that is left alone, as a regular expression.
        dynamic: as for `torch.compile`.
        around: a context in which it is called, entered outside the compiled function.
        graphs: how many graphs Dynamo makes of it; None if that does not matter.
        dtype: what the parameters of a module are cast to.
        rounded: a dtype coarser than its inputs', in which it computes.
        smallest: the option ``min_logits_bytes``.
        stored: how many tensors of rows and vocabulary stay: a teacher's, which are read
            whole, or a weight that is joined from two.
        random: whether float64 would draw other numbers: then eager is what it is compared with.
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

    def make(self) -> tuple[Callable[..., Any], list[Any]]:
        """The function or a new module, and new arguments; the same numbers every time."""
        torch.manual_seed(0)
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
    """Registers an idiom all of whose losses should be rewritten."""
    return lambda code: _register(code, inputs, rewritten=True, **options)


def left_alone(reason: str | None, *inputs: Make, **options: Any) -> Callable[[Any], Any]:
    """Registers an idiom none of whose losses may be rewritten, because of `reason`.

    No reason means that there is no loss to be found, and perhaps no report.
    """
    return lambda code: _register(code, inputs, rewritten=False, reason=reason, **options)


def real(
    *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, grad: bool = True
) -> Make:
    """Normally distributed numbers."""
    return lambda: (torch.randn(shape) * scale).to(dtype).requires_grad_(grad)


def hidden(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Make:
    """What the last block of a model makes: [2, 6, 16]."""
    return real(*(shape or (BATCH, TIME, HIDDEN)), dtype=dtype, grad=grad)


def weight(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Make:
    """The weight of a head: [37, 16]."""
    return real(*(shape or (VOCABULARY, HIDDEN)), scale=0.5, dtype=dtype, grad=grad)


def bias(size: int = VOCABULARY, dtype: torch.dtype = torch.float32) -> Make:
    return real(size, dtype=dtype)


def labels(*shape: int, ignored: int | None = None, high: int = VOCABULARY) -> Make:
    """Class indices, [2, 6], some of them `ignored`."""

    def make() -> Tensor:
        values = torch.randint(high, shape or (BATCH, TIME))
        if ignored is not None:
            values.view(-1)[[1, -1]] = ignored
        return values

    return make


def mask(*shape: int) -> Make:
    """Ones and some zeros, as floats."""

    def make() -> Tensor:
        values = torch.ones(shape or (BATCH, TIME))
        values[..., 0] = 0
        values.view(-1)[-2:] = 0
        return values

    return make


def probabilities(*shape: int) -> Make:
    """A distribution over the vocabulary for each token."""
    return lambda: torch.randn(shape or (BATCH, TIME, VOCABULARY)).softmax(-1)


def number(value: Any) -> Make:
    """A Python number, or a tensor of one."""
    return lambda: torch.tensor(value) if isinstance(value, list) else value


class Body(nn.Module):
    """An embedding and a norm, in the place of a transformer."""

    def __init__(self, vocabulary: int = VOCABULARY, size: int = HIDDEN) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.embedding(ids))
