"""The pointwise function between projection and loss."""

import math

import pytest
import torch
from cce_inductor.kernels.modification import IDENTITY, Modification

CHAINS = [
    "",
    "mul 0.0625",
    "div 3.0",
    "tanh",
    "div 30.0, tanh, mul 30.0",
    "mul 3.0, div 2.0, tanh, mul 4.0, tanh, div -0.1",
]


@pytest.mark.parametrize("text", CHAINS)
def test_text_round_trip(text):
    assert str(Modification.parse(text)) == text


@pytest.mark.parametrize("constant", [0.1, 1e-300, -2.5e300, math.inf, 1 / 3, -0.0, 30])
def test_constants_are_written_exactly(constant):
    modification = IDENTITY.then("mul", constant)
    ((name, parsed),) = Modification.parse(str(modification)).steps
    assert name == "mul"
    assert parsed == constant
    assert math.copysign(1, parsed) == math.copysign(1, constant)


@pytest.mark.parametrize("text", [" div 2.0 ,tanh", "div 2.0, tanh,", "div  2.0, tanh"])
def test_space_is_free(text):
    assert Modification.parse(text) == IDENTITY.then("div", 2.0).then("tanh")


@pytest.mark.parametrize(
    "text", ["exp", "mul", "tanh 2.0", "mul x", "add 1.0", "mul 1.0 2.0", "TANH"]
)
def test_unknown_steps(text):
    with pytest.raises(ValueError, match=r"unknown step|could not convert"):
        Modification.parse(f"div 2.0, {text}")


def test_equal_chains_are_equal():
    assert Modification.parse("div 2.0, tanh, mul 2.0") == Modification.softcap(2.0)
    assert hash(Modification.parse("")) == hash(IDENTITY)
    assert IDENTITY.then("mul", 2.0).then("tanh") != IDENTITY.then("tanh").then("mul", 2.0)


@pytest.mark.parametrize(
    ("text", "linear"), [("", True), ("mul 2.0, div 3.0", True), ("mul 2.0, tanh", False)]
)
def test_is_linear(text, linear):
    assert Modification.parse(text).is_linear == linear


@pytest.mark.parametrize("text", CHAINS)
def test_value_and_derivative(text):
    logits = torch.linspace(-90, 90, 501, dtype=torch.float64, requires_grad=True)
    modification = Modification.parse(text)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        modified = logits.clone()
        modification.apply_(modified)
        (want,) = torch.autograd.grad(modified.sum(), logits)

    replaced, derivative = logits.detach().clone(), torch.full((501,), math.nan).double()
    factor = modification.apply_with_derivative_(replaced, derivative)
    torch.testing.assert_close(replaced, modified.detach(), rtol=0, atol=0)
    torch.testing.assert_close(factor * derivative, want)
    if modification.is_linear:
        assert modification.apply_with_derivative_(logits.detach().clone(), None) == factor


def test_softcap_is_what_models_write():
    logits = torch.randn(500) * 100
    capped = logits.clone()
    Modification.softcap(30.0).apply_(capped)
    assert torch.equal(capped, torch.tanh(logits / 30.0) * 30.0)
