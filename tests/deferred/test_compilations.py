"""Deferred logits cause no more compilations than stored logits."""

import importlib
import site
import sys

import einops
import pytest
import torch
import torch.nn.functional as F

from cce_inductor.backends import cce_inductor_eager
from cce_inductor.deferred.tensor import DeferredLogits

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, 1, 7, 7])
OPTIONS = {"min_logits_bytes": 0, "on_error": "raise", "defer_logits": "always"}


class Counting:
    """A backend that counts the graphs it compiles, with the pass or without."""

    def __init__(self, rewriting):
        self.rewriting = rewriting
        self.graphs = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        if not self.rewriting:
            return module.forward
        return cce_inductor_eager(module, example_inputs, options=OPTIONS)


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()


SCHEDULES = {
    "temperature": lambda z, t: z / t,
    "softcap": lambda z, t: t * torch.tanh(z / t),
    "bounds": lambda z, t: z.clamp(-t, t),
    "lower bound": lambda z, t: z.clamp_min(-t),
    "masked fill": lambda z, t: z.masked_fill(torch.arange(50) % 3 == 2, -t),
    "where": lambda z, t: torch.where(z > t, z, t * z),
    "difference": lambda z, t: t - z,
    "power": lambda z, t: torch.sigmoid(z) * t + z,
}


@pytest.mark.parametrize("scale", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("compiled_loss", [True, False], ids=["compiled loss", "eager loss"])
def test_schedule_between_head_and_loss(scale, compiled_loss):
    backend = Counting(rewriting=True)
    head = torch.compile(F.linear, backend=backend)
    loss = torch.compile(F.cross_entropy, backend=backend) if compiled_loss else F.cross_entropy
    for number in (0.5, 0.7, 1.5, 2.0):
        logits = scale(head(INPUT, WEIGHT), number)
        assert isinstance(logits, DeferredLogits)
        found = loss(logits, TARGET)
        assert logits.is_deferred
        expected = F.cross_entropy(scale(F.linear(INPUT, WEIGHT), number), TARGET)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, [INPUT, WEIGHT]),
            torch.autograd.grad(expected, [INPUT, WEIGHT]),
        )
    assert backend.graphs == 1 + compiled_loss


def test_a_number_keeps_the_dtype():
    head = torch.compile(F.linear, backend=Counting(rewriting=True))
    logits = head(INPUT.bfloat16(), WEIGHT.bfloat16())
    for scaled in (logits / 0.7, logits * 3, 2.0 - logits, logits.clamp(-0.5, 0.5)):
        assert isinstance(scaled, DeferredLogits)
        assert scaled.dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [1, 2, 0.5])
@pytest.mark.parametrize("number", [1, 0.7])
@pytest.mark.parametrize(
    "function",
    [torch.rsub, torch.sub, torch.add, torch.ops.aten.sub.Scalar],
    ids=["rsub", "sub", "add", "sub.Scalar"],
)
def test_a_number_and_its_factor(function, number, alpha):
    def scaled(logits):
        if function is torch.ops.aten.sub.Scalar:
            return function(logits, number, alpha)
        return function(logits, number, alpha=alpha)

    head = torch.compile(F.linear, backend=Counting(rewriting=True))
    logits = scaled(head(INPUT, WEIGHT))
    assert isinstance(logits, DeferredLogits)
    assert logits.is_deferred
    torch.testing.assert_close(logits + 0, scaled(F.linear(INPUT, WEIGHT)))


class Model(torch.nn.Module):
    def __init__(self, rearrange):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 8)
        self.head = torch.nn.Linear(8, 50, bias=False)
        self.rearrange = rearrange

    def forward(self, tokens):
        hidden = self.rearrange(self.embedding(tokens), "b s (h d) -> b s h d", h=2)
        return self.head(self.rearrange(hidden, "b s h d -> b s (h d)"))


def loss_of(rearrange):
    def loss(logits, target):
        return F.cross_entropy(
            rearrange(logits, "b s v -> (b s) v"), rearrange(target, "b s -> (b s)")
        )

    return loss


def count(rewriting, rearrange, compiled_loss):
    torch._dynamo.reset()
    backend = Counting(rewriting)
    model = torch.compile(Model(rearrange), backend=backend)
    loss = loss_of(rearrange)
    if compiled_loss:
        loss = torch.compile(loss, backend=backend)
    for _ in range(3):
        loss(model(torch.randint(50, (2, 6))), torch.randint(50, (2, 6))).backward()
    return backend.graphs


LIBRARY = """
import einops

KNOWN_TYPES = {}


def rearrange(tensor, pattern, **sizes):
    kind = type(tensor)
    if kind not in KNOWN_TYPES:
        KNOWN_TYPES[kind] = kind.__name__
    assert len(list(KNOWN_TYPES)) > 0
    return einops.rearrange(tensor, pattern, **sizes)
"""


@pytest.fixture
def another_library(tmp_path, monkeypatch):
    """An installed package with a table of tensor types, like einops."""
    (tmp_path / "another_library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    yield importlib.import_module("another_library")
    del sys.modules["another_library"]


@pytest.mark.parametrize("compiled_loss", [True, False], ids=["compiled loss", "eager loss"])
def test_table_of_tensor_types(compiled_loss):
    einops.rearrange(torch.zeros(2, 2), "a b -> (a b)")
    expected = count(False, einops.rearrange, compiled_loss)
    assert count(True, einops.rearrange, compiled_loss) == expected


@pytest.mark.parametrize("compiled_loss", [True, False], ids=["compiled loss", "eager loss"])
def test_table_of_another_library(compiled_loss, another_library):
    another_library.rearrange(torch.zeros(2, 2), "a b -> (a b)")
    expected = count(False, another_library.rearrange, compiled_loss)
    assert count(True, another_library.rearrange, compiled_loss) == expected
    assert DeferredLogits in another_library.KNOWN_TYPES


TYPES = {torch.Tensor: 1.0}


def test_a_table_of_the_program_stays_as_it_is():
    @torch.compile(backend=Counting(rewriting=True))
    def head(input, weight):
        return F.linear(input, weight) * len(TYPES)

    for rows in (6, 3):
        logits = head(INPUT[:rows], WEIGHT)
        torch.testing.assert_close(logits.sum(), F.linear(INPUT[:rows], WEIGHT).sum())
    assert {torch.Tensor: 1.0} == TYPES


def test_other_dictionaries_stay_as_they_are():
    handlers = {"tensor": torch.Tensor, torch.Tensor: 1}

    @torch.compile(backend=Counting(rewriting=True))
    def head(input, weight):
        return F.linear(input, weight) * len(handlers)

    head(INPUT, WEIGHT)
    assert handlers == {"tensor": torch.Tensor, torch.Tensor: 1}


SCALES = {torch.Tensor: 1.0}


def test_table_of_a_function_that_has_no_deferred_logits_stays_as_it_is():
    def fn(x):
        return x.sum() * len(SCALES)

    compiled = torch.compile(fn, backend=Counting(rewriting=True))
    for size in (3, 4, 5):
        assert compiled(torch.ones(size)) == size
    assert list(SCALES) == [torch.Tensor]
