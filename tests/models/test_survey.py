"""One class of transformers for each way to come from a projection to a loss.

All of them: ``python tests/models/survey.py``.
"""

import pytest
import survey
import torch

from cce_inductor.reporting import reasons

CHAINS = {
    "LlamaForCausalLM": "linear > float > view",
    "Gemma2ForCausalLM": "a softcap",
    "xLSTMForCausalLM": "a softcap, with the number on the left",
    "Inkling2ForCausalLM": "a softcap, then the padding of the vocabulary cut off",
    "CohereForCausalLM": "multiplied by a number",
    "GraniteForCausalLM": "divided by a number",
    "MambaForCausalLM": "two casts, after a vmap",
    "OPTForCausalLM": "contiguous",
    "BertForMaskedLM": "a bias in the projection",
    "BartForConditionalGeneration": "a bias of two dimensions added",
    "EsmForMaskedLM": "a bias of one dimension added",
    "MobileBertForMaskedLM": "matmul by a weight joined of two, a bias added in place",
    "PerceiverForMaskedLM": "reshape before matmul and after",
    "T5ForConditionalGeneration": "linear > view",
    "ProphetNetForCausalLM": "transpose, log_softmax, nll_loss",
}
VARIANTS = [
    ("LlamaForCausalLM", "bf16"),
    ("LlamaForCausalLM", "autocast"),
    ("LlamaForCausalLM", "numitems"),
    ("Gemma2ForCausalLM", "dynamic"),
    ("BartForConditionalGeneration", "autocast"),
    ("MobileBertForMaskedLM", "bf16"),
    ("LlamaForCausalLM", "whole"),
    ("Gemma2ForCausalLM", "whole"),
    ("GPT2LMHeadModel", "whole"),
    ("BartForConditionalGeneration", "whole"),
    ("ProphetNetForConditionalGeneration", "whole"),
    ("IBertForMaskedLM", "whole"),  # many graphs that take deferred results of linear layers
]


def assert_rewritten(result):
    why = "\n".join(survey.explained(result))
    assert not result.failure, why
    assert result.equal, why
    assert result.all_rewritten, why


@pytest.mark.parametrize("name", CHAINS)
def test_class(name):
    assert_rewritten(survey.measure(name))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_variant(name, variant):
    assert_rewritten(survey.measure(name, variant))


RETURNED = {
    "MusicgenForCausalLM": f"{reasons.USED_BY} reshape",  # which is what it returns
}


@pytest.mark.parametrize(("name", "reason"), RETURNED.items(), ids=RETURNED)
def test_class_with_a_graph_break(name, reason):
    """The frame that goes on after the break returns the logits, or only gets them."""
    result = survey.measure(name)
    assert not result.failure
    assert result.equal
    assert result.rewritten == 0
    assert result.breaks
    assert all(reason in said for said in result.reasons)
    assert not any(survey.INSTALLED in text for text in survey.explained(result))


def test_class_with_a_loss_after_a_graph_break():
    """The frame before the break returns deferred logits, and the loss after it is rewritten."""
    result = survey.measure("GPT2LMHeadModel")
    assert not result.failure
    assert result.equal
    assert result.rewritten == 1
    assert result.breaks


def test_a_wrong_gradient_is_noticed():
    right = {"the loss": torch.tensor(2.0), "small": torch.full((4,), 1e-2), "large": torch.ones(4)}
    assert survey.difference(right, right)[0] == 0.0
    for name in right:
        wrong = {key: value * (1.001 if key == name else 1.0) for key, value in right.items()}
        error, worst = survey.difference(wrong, right)
        assert worst == name
        assert error > survey.TOLERANCE["train"]
    assert survey.difference({**right, "large": right["large"] * torch.nan}, right)[0] == torch.inf
