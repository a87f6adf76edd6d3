"""Gradients of and through deferred logits, and hooks and functions that observe them."""

import pytest
import torch
import torch.nn.functional as F
from deferred_logits import (
    BATCH,
    LENGTH,
    TARGET,
    VOCABULARY,
    Head,
    assert_as_accurate,
    assert_same_gradients,
)
from torch.utils.checkpoint import checkpoint

from cce_inductor.deferred.autograd import with_strides


def test_values_computed_under_no_grad_keep_the_gradient():
    head = Head()
    logits = head.deferred()
    with torch.no_grad():
        logits.norm()
    with torch.inference_mode():
        logits.std()
    logits.norm().backward()
    assert_same_gradients(head, lambda other: other.plain().norm().backward())


def test_strides():
    logits = Head().deferred()
    strides = (LENGTH * VOCABULARY * 2, VOCABULARY * 2, 1)
    other = with_strides(logits, strides)
    assert other.stride() == strides
    assert logits.is_deferred
    assert with_strides(logits, logits.stride()) is logits
    assert other._values().stride() == strides
    assert torch.equal(other._values(), logits._values())
    assert_as_accurate(lambda z: with_strides(z, strides).logsumexp(-1))
    assert_as_accurate(lambda z: with_strides(z, strides).cumsum(-1), computed=True)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_hooks_of_modules():
    for register in ("register_full_backward_hook", "register_backward_hook"):
        seen = []

        class Projection(torch.nn.Module):
            def forward(self, hidden, logits):
                return logits

        module, head = Projection(), Head()
        hook = lambda module, inward, outward: seen.append(outward[0].shape)  # noqa: B023, E731
        getattr(module, register)(hook)
        logits = module(head.hidden, head.deferred())
        F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()).backward()
        assert seen == [logits.shape]


def test_a_leaf_made_of_them_gets_its_gradient():
    """Chunked losses detach the logits, compute a gradient there, and pass it on."""
    head = Head()
    logits = head.deferred()
    leaf = logits.detach().requires_grad_()
    assert leaf.is_leaf
    F.cross_entropy(leaf.flatten(0, 1), TARGET.flatten()).backward()
    logits.backward(leaf.grad)

    def whole(other):
        F.cross_entropy(other.plain().flatten(0, 1), TARGET.flatten()).backward()

    assert_same_gradients(head, whole)


def test_torch_autograd_backward():
    head = Head()
    grad = torch.ones(BATCH, LENGTH, VOCABULARY)
    torch.autograd.backward(head.deferred(), grad)
    assert_same_gradients(head, lambda other: torch.autograd.backward(other.plain(), grad))


def test_what_is_detached_halfway_stays_detached():
    def fn(z):
        with torch.no_grad():
            p = z.softmax(-1)
        return (p * z).sum(-1)

    assert_as_accurate(fn)
    assert_as_accurate(lambda z: (z.detach().softmax(-1) * z).sum(-1))

    def view_without_gradient(z):
        with torch.no_grad():
            rows = z.view(-1, VOCABULARY)
        return rows.logsumexp(-1).sum() + z.logsumexp(-1).sum()

    # Such a view is a leaf: gradients end there.
    assert_as_accurate(view_without_gradient, computed=True)

    def function_of_a_view_without_gradient(z):
        with torch.no_grad():
            rows = z.view(-1, VOCABULARY)
        return (rows * 2).logsumexp(-1).sum() + z.logsumexp(-1).sum()

    assert_as_accurate(function_of_a_view_without_gradient, computed=True)


def test_checkpoint_that_meets_a_loss_for_the_first_time():
    """A checkpoint counts the tensors that are saved for the backward."""
    head = Head()
    logits = head.deferred()

    def loss(logits):
        return F.cross_entropy(logits[1:].flatten(0, 1), TARGET[1], label_smoothing=0.123)

    checkpoint(loss, logits, use_reentrant=False).backward()
    assert logits.is_deferred
    assert_same_gradients(head, lambda other: loss(other.plain()).backward())


def test_second_derivative():
    outcomes = []
    for make in (Head.deferred, Head.plain):
        head = Head()
        logits = make(head)
        (first,) = torch.autograd.grad(
            logits.pow(3).cumsum(-1).sum(), head.weight, create_graph=True
        )
        outcomes.append(torch.autograd.grad(first.pow(2).sum(), head.leaves))
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-2)


class Reversed(torch.autograd.Function):
    """Gradient reversal, used in domain adaptation."""

    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, grad: -grad)


class Itself(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x)
    backward = staticmethod(lambda ctx, grad: 3 * grad)


class StraightThrough(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.round())
    backward = staticmethod(lambda ctx, grad: grad)


class Copied(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, grad: 3 * grad)


def doubled_by_module(z):
    module = torch.nn.Identity()
    module.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    return module(z)


def doubled_before_module(z):
    module = torch.nn.Identity()
    module.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))
    return module(z)


def doubled_by_node(z):
    z.grad_fn.register_prehook(lambda grads: (grads[0] * 2,))
    return z


def doubled_by_later_node(z):
    doubled = z * 1
    doubled.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * 2, *inputs[1:]))
    return doubled


OWN_GRADIENTS = {
    "reversed": Reversed.apply,
    "itself": Itself.apply,
    "copied": Copied.apply,
    "straight through": StraightThrough.apply,
    "module hook": doubled_by_module,
    "module prehook": doubled_before_module,
    "node prehook": doubled_by_node,
    "node hook": doubled_by_later_node,
    "checkpoint": lambda z: checkpoint(lambda x: x.tanh() * 2, z, use_reentrant=False),
    "reentrant checkpoint": lambda z: checkpoint(lambda x: x.tanh() * 2, z, use_reentrant=True),
}


@pytest.mark.parametrize("change", OWN_GRADIENTS.values(), ids=OWN_GRADIENTS)
def test_gradients_of_users(change):
    outcomes = []
    for make in (Head.deferred, Head.plain):
        head = Head()
        logits = make(head)
        loss = F.cross_entropy(change(logits)[:, 1:].flatten(0, 1), TARGET[:, 1:].flatten())
        (loss + F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())).backward()
        outcomes.append([leaf.grad for leaf in head.leaves])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-6)


def test_an_in_place_change_makes_a_new_gradient():
    """No loss has bypassed the gradient of the modified logits."""
    outcomes = []
    for make in (Head.deferred, Head.plain):
        head = Head()
        logits = make(head)
        loss = F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())
        logits.mul_(2)
        logits.retain_grad()
        (logits.cumsum(0).sum() + loss).backward()
        outcomes.append([logits.grad, *(leaf.grad for leaf in head.leaves)])
    torch.testing.assert_close(*outcomes)
