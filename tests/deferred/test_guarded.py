"""Tensors that logits are computed from, and what happens if these change."""

import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from deferred_logits import BATCH, HIDDEN, LENGTH, TARGET, VOCABULARY, Head, optimizer_step

from cce_inductor.deferred.tensor import defer
from cce_inductor.recipe.stale import StaleLogitsError

CHANGES = {
    "optimizer": (optimizer_step, "the weight"),
    "data": (lambda head: head.weight.data.mul_(1.01), "the weight"),
    "kernel": (lambda head: head.weight.detach().numpy().__imul__(1.01), "the weight"),
    "bias": (lambda head: head.bias.data.add_(1), "the bias"),
    "hidden": (lambda head: head.hidden.detach().zero_(), "the hidden state"),
    "freed": (lambda head: head.weight.untyped_storage().resize_(0), "the weight"),
}


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    "look",
    [
        lambda z: z.norm(),
        lambda z: z.argmax(-1),
        lambda z: F.cross_entropy(z.flatten(0, 1), TARGET.flatten()),
        lambda z: z[:, -1].tolist(),
        lambda z: z.float().cpu(),
        lambda z: pickle.dumps(z),
    ],
    ids=["norm", "argmax", "loss", "rows", "cpu", "pickle"],
)
def test_changed_since(change, name, look):
    head = Head(bias=True)
    logits = head.deferred()
    change(head)
    with pytest.raises(StaleLogitsError) as error:
        look(logits)
    assert re.search(rf"and {name}, which they are computed from, was .* since", str(error.value))
    assert 'defer_logits="never"' in str(error.value)


def test_a_frozen_weight_that_changed():
    """Merging an adapter or averaging weights does not count a version."""
    head = Head(requires_grad=False)
    logits = head.deferred()
    head.weight.data.add_(1)
    with pytest.raises(StaleLogitsError, match="the weight"):
        logits.argmax(-1)


def test_rows_and_columns_of_data():
    weight = torch.nn.Parameter(torch.randn(4000, 24))
    for change in [(0,), (7,), (2503,), (3999,), (..., 0), (..., 11), (..., 23)]:
        for matrix in (weight, torch.nn.Parameter(weight.detach().t().clone().t())):
            logits = defer(torch.randn(3, 24), matrix, None, torch.float32)
            matrix.data[change] += 1
            with pytest.raises(StaleLogitsError, match="the weight"):
                logits.argmax(-1)


OPERAND_LOOKS = {
    "rows": lambda z: z[:, -1].sum(),
    "mask": lambda z: z[TARGET > 3].sum(),
    "argmax": lambda z: z.argmax(-1),
    "detached": lambda z: z.detach().norm(),
    "loss": lambda z: F.cross_entropy(z.flatten(0, 1), TARGET.flatten()),
}


@pytest.mark.parametrize("look", OPERAND_LOOKS.values(), ids=OPERAND_LOOKS)
@pytest.mark.parametrize("made", ["once", "with a change in place"])
def test_an_operand_with_a_gradient_that_changed(made, look):
    head = Head()
    factor = torch.full((VOCABULARY,), 2.0, requires_grad=True) * 1
    if made != "once":
        with torch.no_grad():
            factor.add_(1)
    logits, plain = head.deferred() * factor, head.plain() * factor
    torch.testing.assert_close(look(logits), look(plain))
    logits = head.deferred() * factor
    with torch.no_grad():
        factor.add_(1)
    with pytest.raises(StaleLogitsError, match=r"an operand, which .* was changed in place"):
        look(logits)


class OwnParameter(torch.nn.Parameter):
    pass


def test_a_parameter_of_somebody_elses_class():
    head = Head()
    head.weight = OwnParameter(head.weight.detach())
    logits = head.deferred()
    F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()).backward()
    assert head.weight.grad is not None
    assert logits.is_deferred
    optimizer_step(head)
    with pytest.raises(StaleLogitsError, match="the weight"):
        logits.norm()


def test_an_element_of_inference_mode_that_changed():
    """A tensor of inference mode has no version counter."""
    with torch.inference_mode():
        hidden = torch.randn(100, HIDDEN)
        logits = defer(hidden, Head().weight, None, torch.float32)
        hidden[37, 2] += 1
        with pytest.raises(StaleLogitsError, match="the hidden state"):
            logits[37].norm()


def test_gradients_are_wanted_when_the_logits_are_made():
    """``requires_grad`` of a weight may be switched after the logits were made."""
    head = Head()
    head.weight.requires_grad_(False)
    losses = []
    for logits in (head.deferred(), head.plain()):
        losses.append(F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()))
        head.weight.requires_grad_(True)
        losses.append(F.cross_entropy(logits.flatten(0, 1), TARGET.flatten(), reduction="sum"))
        losses[-1].backward(retain_graph=True)
        assert head.weight.grad is None
        head.weight.requires_grad_(False)
    torch.testing.assert_close(losses[:2], losses[2:])


def test_a_weight_that_was_replaced():
    """The old weight still exists, but a gradient would be the new one's."""
    head = Head()
    logits, expected = head.deferred(), head.plain().detach()
    head.weight.data = torch.zeros(VOCABULARY, HIDDEN)
    with pytest.raises(StaleLogitsError, match="the weight"):
        F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())
    torch.testing.assert_close(logits.detach() + 0, expected)


def test_computed_before_the_change():
    head = Head(bias=True)
    logits, expected = head.deferred(), head.plain().detach()
    logits.norm()
    optimizer_step(head)
    torch.testing.assert_close(logits.detach() + 0, expected)


def test_shape_after_the_change():
    head = Head()
    logits = head.deferred()
    optimizer_step(head)
    assert logits.view(-1, VOCABULARY).shape == (10, VOCABULARY)
    assert (logits.size(), logits.size(0)) == ((BATCH, LENGTH, VOCABULARY), BATCH)
    assert "not computed" in repr(logits)


def test_an_operand_may_change():
    """A pointwise function uses the values that its operand had when it was called."""
    head = Head()
    scale, rows = torch.full((VOCABULARY,), 2.0), torch.tensor([0, 1])
    logits = head.deferred()
    scaled, taken = logits * scale, logits[rows]
    scale.zero_()
    rows.zero_()
    torch.testing.assert_close(scaled + 0, head.plain() * 2)
    torch.testing.assert_close(taken + 0, head.plain()[:2])


def test_nan_weights_are_not_a_change():
    head = Head()
    with torch.no_grad():
        head.weight[0] = torch.nan
    assert head.deferred().isnan().any()
