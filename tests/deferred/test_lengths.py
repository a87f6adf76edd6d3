"""Losses of deferred logits in eager code, for one number of rows after another."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from cce_inductor.deferred import eager
from cce_inductor.deferred.form import Form
from cce_inductor.deferred.tape import Tape
from cce_inductor.deferred.tensor import defer
from cce_inductor.torch_internals.symbols import Size, Term, Versions

VOCABULARY, HIDDEN = 37, 13
WEIGHT = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1))


def shifted(z, y):
    return F.cross_entropy(z[:, :-1].flatten(0, 1).float(), y[:, 1:].flatten())


def in_chunks(z, y):
    z, y = z.flatten(0, 1), y.flatten()
    return sum(
        F.cross_entropy(z[i : i + 3], y[i : i + 3], reduction="sum") for i in range(0, len(z), 3)
    )


def of_a_mask(z, y):
    return F.cross_entropy(z[y > 9], y[y > 9], reduction="sum")


LOSSES = {
    "flattened": lambda z, y: F.cross_entropy(z.view(-1, VOCABULARY), y.view(-1)),
    "shifted": shifted,
    "in chunks": in_chunks,
    "split": lambda z, y: sum(
        F.cross_entropy(a.flatten(0, 1), b.flatten())
        for a, b in zip(z.split(2, 1), y.split(2, 1), strict=True)
    ),
    "of a mask": of_a_mask,
    "each sequence": lambda z, y: sum(map(F.cross_entropy, z, y)),
    "transposed": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "part of the vocabulary": lambda z, y: F.cross_entropy(z[..., :30].flatten(0, 1), y.flatten()),
    "gathered": lambda z, y: z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1).sum(),
    "shifted and gathered": lambda z, y: (
        z[:, :-1].log_softmax(-1).gather(-1, y[:, 1:, None]).squeeze(-1).sum()
    ),
    "last rows": lambda z, y: F.cross_entropy(
        z[:, -(z.shape[1] // 2 + 1) :].flatten(0, 1), y[:, -(z.shape[1] // 2 + 1) :].flatten()
    ),
    "weighted rows": lambda z, y: (z.logsumexp(-1) * y).sum(),
    "distilled": lambda z, y: F.kl_div(
        z.log_softmax(-1), torch.eye(VOCABULARY)[y], reduction="batchmean"
    ),
    "every second row": lambda z, y: F.cross_entropy(z[:, ::2].flatten(0, 1), y[:, ::2].flatten()),
}


def problem(batch, length):
    generator = torch.Generator().manual_seed(100 * batch + length)
    hidden = torch.randn(batch, length, HIDDEN, generator=generator, requires_grad=True)
    return hidden, torch.randint(30, (batch, length), generator=generator)


def with_gradients(loss, logits, target, leaves):
    value = loss(logits, target)
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_same(loss, batch, length):
    """Assert that deferred logits have the loss and gradients of plain ones, and stay deferred."""
    hidden, target = problem(batch, length)
    weight = WEIGHT.clone().requires_grad_()
    deferred = defer(hidden, weight, None, torch.float32)
    plain = F.linear(hidden, weight)
    ours = with_gradients(loss, deferred, target, (hidden, weight))
    theirs = with_gradients(loss, plain, target, (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=3e-5, equal_nan=True)
    assert deferred.is_deferred


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_number_of_rows(loss):
    """Also numbers of rows that are equal to each other, to the hidden size, or to 1."""
    for batch, length in itertools.product((2, 1, 3), (2, 4, 5, 6, HIDDEN, 3)):
        assert_same(loss, batch, length)


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if name not in ("in chunks", "split", "each sequence")]
)
def test_the_pass_sees_two_graphs(name, monkeypatch):
    """The first graph is for the first length, the second for all others."""
    graphs = []
    original = Form.graph

    def graph(self, numbers, environment):
        graphs.append(environment is not None)
        return original(self, numbers, environment)

    monkeypatch.setattr(Form, "graph", graph)
    eager._reduction.cache_clear()
    eager._rows.cache_clear()
    for length in (40, 40, 42, 50, 60, 42):
        assert_same(LOSSES[name], 4, length)
    assert graphs == [False, True]


def test_the_form_names_sizes():
    hidden = torch.randn(4, 6, HIDDEN)
    z = defer(hidden, WEIGHT, None, torch.float32)[:, 1:5].flatten(0, 1)
    tape = Tape()
    tape.record(F.cross_entropy, (z._operation, torch.zeros(16, dtype=torch.int64)), {})
    form, numbers = Form.of(tape)
    assert numbers == (4, 3, 6, 5, 24, 16, 15)
    assert form.terms == (
        *(None, Term((0,), offset=-1), None, Term((2,), offset=-1)),
        *(Term((0, 2)), None, Term((5,), offset=-1)),
    )
    assert form.tensors[0].shape == (Size(0), Size(2), HIDDEN)
    assert form.tensors[1].shape == (VOCABULARY, HIDDEN)
    assert form.tensors[2].shape == (Size(5),)


def test_versions():
    made = []

    def make(numbers, environment):
        made.append(environment is not None)
        return "many" if numbers[0] > numbers[1] else "few"

    versions = Versions((None, None), make)
    assert [versions.get(each) for each in ((5, 3), (5, 3), (6, 3), (7, 2))] == ["many"] * 4
    assert made == [False, True]
    assert versions.get((3, 7)) == versions.get((2, 2)) == "few"
    assert made == [False, True, True]
    assert versions.get((9, 3)) == "many"
    assert made == [False, True, True]


def test_versions_that_need_the_numbers():
    def make(numbers, environment):
        return numbers if environment is None else None

    versions = Versions((None, None), make)
    for numbers in ((5, 3), (6, 3), (7, 3), (6, 3)):
        assert versions.get(numbers) == numbers


def test_versions_that_cannot_be_made():
    made = []
    versions = Versions((None, None), lambda *arguments: made.append(arguments))
    for numbers in ((5, 3), (6, 3), (7, 3)):
        assert versions.get(numbers) is None
    assert len(made) == 2


def test_versions_of_no_numbers():
    versions = Versions((), lambda numbers, environment: [environment])
    assert versions.get(()) is versions.get(())
