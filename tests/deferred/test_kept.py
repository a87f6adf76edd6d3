"""``stale_logits``: deferred logits that are used after an optimizer's step."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

import cce_inductor

VOCABULARY = 50


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 8)
        self.head = torch.nn.Linear(8, VOCABULARY)

    def forward(self, ids):
        logits = self.head(self.embedding(ids).tanh())
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten()), logits


IDS = torch.arange(12).view(3, 4)


def step(stale_logits, optimizer=torch.optim.SGD, **arguments):
    """Return logits after a step, their expected values, and the model."""
    torch._dynamo.reset()
    model = Model()
    options = {"min_logits_bytes": 0, "on_error": "raise", "stale_logits": stale_logits}
    loss, logits = torch.compile(model, backend="cce_inductor_eager", options=options)(IDS)
    assert logits.is_deferred
    expected = model(IDS)[1].detach()
    loss.backward()
    optimizer(model.parameters(), lr=0.5, **arguments).step()
    return logits, expected, model


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_kept(optimizer, arguments):
    logits, expected, model = step("keep", optimizer, **arguments)
    rows = logits[:1]
    torch.testing.assert_close(rows.detach() + 0, expected[:1])
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert logits.is_deferred
    torch.testing.assert_close(logits.detach() + 0, expected)
    assert not torch.allclose(model(IDS)[1], expected)


def test_raised():
    logits, _, _ = step("raise")
    with pytest.raises(cce_inductor.StaleLogitsError, match='stale_logits="keep"'):
        logits.argmax(-1)


def test_a_gradient_through_them_is_an_error():
    """Their gradient would be that of a weight that does not exist any more."""
    logits, _, _ = step("keep")
    with pytest.raises(cce_inductor.StaleLogitsError):
        logits.logsumexp(-1).sum().backward()


def test_a_second_step():
    logits, expected, model = step("keep")
    model(IDS)[0].backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    torch.testing.assert_close(logits.detach() + 0, expected)


def test_an_optimizer_of_other_parameters_copies_nothing():
    logits, expected, model = step("keep", lambda parameters, lr: torch.optim.SGD([torch.ones(1)]))
    source = logits._operation.without_gradient.args[1]
    assert source.tensor.data_ptr() == model.head.weight.data_ptr()
    torch.testing.assert_close(logits.detach() + 0, expected)


def test_the_copy_is_shared_and_freed():
    logits, _, _ = step("keep")
    views = logits[:1], logits.float() * 2
    copies = {each._operation.products()[0].without_gradient.args[1].tensor for each in views}
    assert len(copies) == 1
    copy = weakref.ref(copies.pop())
    del logits, views
    gc.collect()
    assert copy() is None
