"""Hugging Face models, tiny and random: rewritten as they are, with the numbers of eager."""

import contextlib
from pathlib import Path

import pytest
import torch
import transformers

import cce_inductor
from cce_inductor.testing import relative_error

VOCABULARY = 5003
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
ATTENTION = {"num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama():
    config = transformers.LlamaConfig(**SIZES, **ATTENTION, **GROUPED, **TOKEN_IDS)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_positions=64, **TOKEN_IDS
    )
    return transformers.GPT2LMHeadModel(config)


def gpt2_with_loss_type():
    model = gpt2()
    model.loss_type = "ForCausalLM"  # unset, transformers logs a warning: a graph break
    return model


def gemma2():
    config = transformers.Gemma2Config(**SIZES, **ATTENTION, **GROUPED, **TOKEN_IDS)
    assert config.final_logit_softcapping == 30.0
    return transformers.Gemma2ForCausalLM(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **ATTENTION))


MODELS = [llama, gpt2_with_loss_type, gemma2, bert]


def build(make, dtype=torch.float32):
    """The same weights each time, and no dropout, which is random."""
    torch.manual_seed(0)
    model = make().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(dtype)


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    return ids, labels


def loss_of(model):
    return lambda ids, labels: model(input_ids=ids, labels=labels).loss


def compiled(fn, backend="cce_inductor_eager"):
    """`fn` compiled; its one loss must be rewritten once it has run."""
    torch._dynamo.reset()
    cce_inductor.clear_reports()
    return torch.compile(fn, backend=backend, options={"min_logits_bytes": 0})


def assert_rewritten():
    (report,) = cce_inductor.reports()
    assert report.rewritten, str(report)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def train(model, loss, steps=3):
    """The loss and the gradients of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(*batch())
        value.backward()
        history.append((value.detach(), gradients(model)))
        optimizer.step()
    return history


@pytest.mark.parametrize("make", MODELS)
def test_loss_is_rewritten(make):
    with cce_inductor.installed(min_logits_bytes=0):
        (report,) = cce_inductor.explain(loss_of(build(make)), *batch()).losses
    assert report.rewritten
    assert report.reason is None
    assert report.logits_shape == (2, 24, VOCABULARY)
    file, line = report.location.rsplit(":", 1)
    assert Path(transformers.__file__).parent in Path(file).parents
    source = Path(file).read_text().splitlines()[int(line) - 1]
    assert "= loss_fct(" in source if make is bert else "cross_entropy(" in source
    assert report.loss.endswith("cross_entropy(-100, 'mean', 0.0)") == (make is bert)
    assert ("div(30.0) > tanh > mul(30.0)" in report.loss) == (make is gemma2)


@pytest.mark.parametrize(
    ("make", "backend"),
    [*((make, "cce_inductor_eager") for make in MODELS), (llama, "cce_inductor")],
)
def test_three_training_steps(make, backend):
    ours, theirs = build(make), build(make)
    got = train(ours, compiled(loss_of(ours), backend))
    assert_rewritten()
    want = train(theirs, loss_of(theirs))
    assert want[2][0] < want[0][0]
    for (loss, grads), (eager_loss, eager_grads) in zip(got, want, strict=True):
        # About 100 roundings: each layer adds a few, and every step passes them on.
        assert relative_error(loss, eager_loss) < 1e-6
        # The gradient of a key's bias is zero but for rounding: hence the second term.
        rounding = 1e-8 * torch.cat([grad.flatten() for grad in eager_grads.values()]).norm()
        for name, eager_grad in eager_grads.items():
            difference = (grads[name] - eager_grad).norm()
            assert difference < 1e-5 * eager_grad.norm() + rounding, name


@pytest.mark.parametrize("autocast", [False, True], ids=["all parameters", "autocast"])
def test_bfloat16_llama(autocast):
    """Nearly all of the error is the layers', whose rounding is the same in both."""

    def step(model, loss, context):
        with context:
            value = loss(*batch())
        value.backward()
        grads = gradients(model).values()
        return value.detach(), torch.cat([grad.double().flatten() for grad in grads])

    # Weights that bfloat16 represents, so that all three models are the same.
    make = lambda: build(llama, torch.bfloat16)  # noqa: E731
    dtype = torch.float32 if autocast else torch.bfloat16
    ours, theirs, reference = make().to(dtype), make().to(dtype), make().double()
    context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    exact, exact_grads = step(reference, loss_of(reference), contextlib.nullcontext())
    eager, eager_grads = step(theirs, loss_of(theirs), context)
    loss, grads = step(ours, compiled(loss_of(ours)), context)
    assert_rewritten()
    assert loss.dtype == eager.dtype == torch.float32
    assert relative_error(loss, exact) <= relative_error(eager, exact) + 1e-4
    assert relative_error(grads, exact_grads) <= 1.05 * relative_error(eager_grads, exact_grads)


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("return_dict", [True, False])
def test_returned_logits_are_left_alone_if_they_must_not_be_deferred(make, return_dict):
    model = build(make)

    def whole_output(ids, labels):
        return model(ids, labels=labels, return_dict=return_dict)

    with cce_inductor.installed(min_logits_bytes=0, defer_logits="never"):
        explanation = cce_inductor.explain(whole_output, *batch())
    (report,) = explanation.losses
    assert not report.rewritten
    assert report.reason.startswith("the logits are returned by the compiled function")
    assert all(graph.before == graph.after for graph in explanation.graphs)


def test_gpt2_without_loss_type():
    """A logger breaks the graph between the head and the loss."""
    with cce_inductor.installed(min_logits_bytes=0, on_error="raise"):
        explanation = cce_inductor.explain(loss_of(build(gpt2)), *batch())
    returned, loss = explanation.losses
    assert returned.loss == "linear > returned"
    assert returned.deferred
    assert loss.rewritten
    assert "ends with a graph break" in str(explanation)
