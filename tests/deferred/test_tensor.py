"""Deferred logits as tensors: what they answer, inference mode, and how long they live."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from deferred_logits import (
    BATCH,
    HIDDEN,
    LENGTH,
    REDUCTIONS,
    STAYING_DEFERRED,
    TARGET,
    VOCABULARY,
    Head,
    assert_same_gradients,
)

from cce_inductor.deferred import eager
from cce_inductor.deferred.tensor import DeferredLogits, defer


def test_plain():
    """`plain` returns a plain tensor with the same memory and gradient."""
    head = Head()
    logits = head.deferred()
    plain = logits.plain()
    assert type(plain) is torch.Tensor
    assert not logits.is_deferred
    assert plain.data_ptr() == logits.data_ptr()
    plain.norm().backward()
    assert_same_gradients(head, lambda other: other.plain().norm().backward())


def test_only_users_methods_are_public():
    public = {name for name in dir(DeferredLogits) if not name.startswith("_")}
    assert public - set(dir(torch.Tensor)) == {"is_deferred", "plain"}


def test_without_gradient():
    head = Head(requires_grad=False)
    logits = head.deferred()
    assert not logits.requires_grad
    assert logits.grad_fn is None
    loss = F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())
    assert not loss.requires_grad
    assert logits.is_deferred


def test_what_a_tensor_says_without_being_computed():
    logits = Head().deferred()
    assert isinstance(logits, torch.Tensor)
    assert torch.is_tensor(logits)
    assert logits.shape == (BATCH, LENGTH, VOCABULARY)
    assert logits.size(-1) == VOCABULARY
    assert (logits.dim(), logits.ndim, len(logits), logits.numel()) == (3, 3, BATCH, 500)
    assert (logits.dtype, logits.device, logits.layout) == (
        torch.float32,
        torch.device("cpu"),
        torch.strided,
    )
    assert logits.stride() == (LENGTH * VOCABULARY, VOCABULARY, 1)
    assert logits.is_contiguous()
    assert logits.is_floating_point()
    assert (logits.nbytes, logits.itemsize, logits.element_size()) == (2000, 4, 4)
    assert logits.requires_grad
    assert not logits.is_leaf
    assert logits.grad_fn is not None
    assert logits._version == 0
    assert logits.is_deferred
    assert (
        repr(logits)
        == str(logits)
        == f"{logits}"
        == (
            "DeferredLogits(shape=(2, 5, 50), dtype=torch.float32, device='cpu', requires_grad=True, "
            "not computed)"
        )
    )
    assert repr([logits]) == f"[{logits}]"
    assert logits.is_deferred
    logits.norm()
    assert repr(logits).startswith("tensor([[[")


def test_inference_mode_after_training():
    head = Head()
    logits = head.deferred()
    with torch.inference_mode():
        for change in STAYING_DEFERRED.values():
            changed = change(logits)
            assert changed.is_deferred
            if changed.shape[-1] == VOCABULARY:
                assert torch.equal(changed.argmax(-1), change(head.plain()).argmax(-1))
        assert logits.is_deferred
    F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()).backward()
    assert_same_gradients(
        head,
        lambda other: F.cross_entropy(other.plain().flatten(0, 1), TARGET.flatten()).backward(),
    )


def test_metrics_after_inference_mode():
    head = Head()
    with torch.inference_mode():
        logits = defer(head.leaf * 1.0, head.weight, None, torch.float32)
    rows, expected = logits.flatten(0, 1), head.plain().flatten(0, 1)
    for name in ("cross_entropy", "entropy", "topk", "max"):
        got = REDUCTIONS[name](logits)
        assert not got.requires_grad
        torch.testing.assert_close(got, REDUCTIONS[name](head.plain()).detach())
    assert torch.equal(rows.argmax(-1), expected.argmax(-1))
    student = head.deferred().flatten(0, 1)
    total = F.cross_entropy(student + rows, TARGET.flatten())
    total.backward()
    assert_same_gradients(
        head,
        lambda other: F.cross_entropy(
            other.plain().flatten(0, 1) + expected.detach(), TARGET.flatten()
        ).backward(),
    )


def test_nothing_keeps_them_alive():
    """There are no reference cycles: the garbage collector is not needed."""
    gc.collect()
    gc.disable()
    try:
        head = Head()
        logits = head.deferred()
        derived = logits.view(-1, VOCABULARY).float()[1:] * 2
        F.cross_entropy(derived, TARGET.flatten()[1:])
        derived.norm()
        logits._values()
        alive = [weakref.ref(each) for each in (logits, derived, head.hidden)]
        alive.append(weakref.ref(logits._operation))
        del logits, derived
        head.hidden = None
        assert [each() for each in alive] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "keep",
    [lambda z: z.detach(), lambda z: z.detach()[:, -1], lambda z: z.argmax(-1)],
    ids=["all", "rows", "argmax"],
)
def test_what_is_detached_keeps_no_graph_of_autograd(keep):
    head = Head()
    activations = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True) * 1.0
    logits = defer(activations.sin(), head.weight, None, torch.float32)
    expected = keep(logits.detach().clone())
    activations = weakref.ref(activations)
    kept = keep(logits)
    del logits
    gc.collect()
    assert activations() is None
    torch.testing.assert_close(kept + 0, expected + 0)


def test_no_grad_keeps_no_graph_of_autograd():
    head = Head()
    activations = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True) * 1.0
    logits = defer(activations.sin(), head.weight, None, torch.float32)
    activations = weakref.ref(activations)
    with torch.no_grad():
        kept = logits.softmax(-1)
    del logits
    gc.collect()
    assert kept.is_deferred
    assert activations() is None


def test_no_leak_in_a_thousand_steps():
    def step():
        head = Head()
        logits = head.deferred()
        F.cross_entropy(
            logits[:, :-1].reshape(-1, VOCABULARY), TARGET[:, 1:].reshape(-1)
        ).backward()
        logits.argmax(-1)
        if step.number % 10 == 0:
            logits.norm()
        step.number += 1

    step.number = 0
    for _ in range(20):
        step()
    gc.collect()
    tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    plans = eager._reduction.cache_info().currsize
    for _ in range(1000):
        step()
    gc.collect()
    assert sum(isinstance(each, torch.Tensor) for each in gc.get_objects()) <= tensors
    assert eager._reduction.cache_info().currsize == plans


def test_inference_mode():
    with torch.inference_mode():
        head = Head(requires_grad=False)
        head.hidden = head.hidden + 0
        logits = head.deferred()
        assert logits.is_inference()
        assert torch.equal(logits.argmax(-1), head.plain().argmax(-1))
        for change in STAYING_DEFERRED.values():
            assert change(logits).is_deferred
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), TARGET[:, 1:].reshape(-1))
        assert loss.item() == pytest.approx(
            F.cross_entropy(
                head.plain()[:, :-1].reshape(-1, VOCABULARY), TARGET[:, 1:].reshape(-1)
            ).item()
        )
        assert logits.is_deferred
        torch.testing.assert_close(logits.sort(-1).values, head.plain().sort(-1).values)
