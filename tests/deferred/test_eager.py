"""Reductions of deferred logits in eager code, which do not compute the logits."""

import threading

import pytest
import torch
import torch.nn.functional as F
from deferred_logits import BATCH, LENGTH, REDUCTIONS, TARGET, VOCABULARY, Head, assert_as_accurate

import cce_inductor
from cce_inductor.deferred import eager
from cce_inductor.deferred.tensor import defer


def test_targets_that_a_loss_does_not_take():
    with pytest.raises(RuntimeError, match="Int"):
        F.cross_entropy(Head().deferred().flatten(0, 1), TARGET.flatten().int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
def test_fused(reduce, dtype):
    assert_as_accurate(reduce, dtype=dtype)
    assert_as_accurate(reduce, dtype=dtype, bias=True)


INDICES = {
    "argmax": lambda z: z.argmax(-1),
    "torch.argmax": lambda z: torch.argmax(z.view(-1, VOCABULARY), dim=1),
    "max": lambda z: z.max(dim=-1).indices,
    "topk": lambda z: z.topk(4).indices,
    "argmin": lambda z: z.argmin(-1),
    "accuracy": lambda z: (z[:, :-1].argmax(-1) == TARGET[:, 1:]).float().mean(),
}


@pytest.mark.parametrize("reduce", INDICES.values(), ids=INDICES)
def test_indices(reduce):
    head = Head()
    logits = head.deferred()
    got = reduce(logits)
    assert type(got) is torch.Tensor
    assert logits.is_deferred
    assert torch.equal(got, reduce(head.plain()))


def test_argmax_of_logits_whose_gradient_is_observed():
    logits = Head().deferred()
    logits.register_hook(lambda gradient: None)
    assert not logits.argmax(-1).requires_grad
    assert torch.argmin(logits, -1).shape == (BATCH, LENGTH)
    assert logits.is_deferred


def test_namedtuples():
    head = Head()
    values, indices = got = head.deferred().max(-1)
    assert type(got) is torch.return_types.max
    assert type(head.deferred().topk(2)) is torch.return_types.topk
    torch.testing.assert_close(values, head.plain().max(-1).values)
    assert torch.equal(indices, head.plain().max(-1).indices)


def test_the_workspace_is_that_of_the_options(monkeypatch):
    seen = []
    original = eager.rewrite_reductions
    monkeypatch.setattr(
        eager,
        "rewrite_reductions",
        lambda graph, options: seen.append(options) or original(graph, options),
    )
    with cce_inductor.installed(workspace_bytes=12345):
        Head().deferred().logsumexp(-1)
    assert seen[0].workspace_bytes == 12345


def test_constants_that_are_equal_but_not_the_same():
    head = Head()
    for fn in (
        lambda z: z.copysign(0.0).sum(-1),
        lambda z: z.copysign(-0.0).sum(-1),
        lambda z: ((z > 0) * 1).sum(-1),
        lambda z: ((z > 0) * 1.0).sum(-1),
        lambda z: ((z > 0) * True).amax(-1),
        lambda z: ((z > 0) * 1).amax(-1),
    ):
        torch.testing.assert_close(fn(head.deferred()), fn(head.plain()))


def test_threads_reduce():
    head = Head()
    expected = head.plain().logsumexp(-1).detach()
    results = []

    def reduce():
        for _ in range(20):
            results.append(head.deferred().logsumexp(-1).detach())

    threads = [threading.Thread(target=reduce) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for result in results:
        torch.testing.assert_close(result, expected)


def test_functorch():
    head = Head()
    scale = torch.tensor(0.5)

    def gradient(logits):
        logits = logits.flatten(0, 1)
        return torch.func.grad(lambda s: F.cross_entropy(logits * s, TARGET.flatten()))(scale)

    torch.testing.assert_close(gradient(head.deferred()), gradient(head.plain()))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.vmap(lambda row: row.softmax(-1))(head.deferred()),
            torch.vmap(lambda row: row.softmax(-1))(head.plain()),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Under autocast, eager losses are computed in float32, as for plain logits."""
    head = Head(dtype=torch.float32)
    losses = []
    for logits in (defer(head.hidden, head.weight, None, dtype), None):
        with torch.autocast("cpu", dtype):
            logits = F.linear(head.hidden, head.weight) if logits is None else logits
            assert logits.dtype == dtype
            losses.append(F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()))
    mine, theirs = losses
    assert mine.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("rows", "hidden", "vocabulary"), [((2,), 8, 0), ((2, 3), 8, 0), ((0,), 8, 5), ((2,), 0, 5)]
)
def test_gradients_of_sizes_of_0(rows, hidden, vocabulary):
    x = torch.randn(*rows, hidden, requires_grad=True)
    w = torch.randn(vocabulary, hidden, requires_grad=True)
    bias = torch.randn(vocabulary, requires_grad=True)
    found = [
        torch.autograd.grad(logits.exp().sum(), (x, w, bias))
        for logits in (defer(x, w, bias, torch.float32), F.linear(x, w, bias))
    ]
    torch.testing.assert_close(*found)
