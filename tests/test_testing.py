"""The assertions of `cce_inductor.testing` fail when they should, and only then."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cce_inductor
from cce_inductor import backends
from cce_inductor.reporting import reasons
from cce_inductor.testing import (
    assert_matches_eager,
    assert_not_rewritten,
    assert_rewritten,
    in_float64,
    relative_error,
)

TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


class Head(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.scale = scale

    def forward(self, tokens, labels):
        hidden = self.dropout(self.norm(self.embedding(tokens)))
        logits = F.linear(hidden, self.embedding.weight) * self.scale
        return {"loss": F.cross_entropy(logits.float(), labels), "hidden": hidden}

    def loss(self, tokens, labels):
        return self(tokens, labels)["loss"]


def returns_logits(input, weight, target):
    logits = F.linear(input, weight)
    return F.cross_entropy(logits, target), logits


def sums_logits(input, weight, target):
    logits = F.linear(input, weight)
    return F.cross_entropy(logits, target), logits.cumsum(-1)


def no_loss(input):
    return input.tanh()


def plain(input, weight, target):
    return F.cross_entropy(F.linear(input, weight), target)


def two_losses(input, weight, target):
    logits = F.linear(input, weight)
    shuffled = logits[:, torch.randperm(50)]
    other = F.linear(input.tanh(), weight)
    return F.cross_entropy(shuffled, target), F.cross_entropy(other, target)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    input, weight = torch.randn(6, 8), torch.randn(50, 8)
    return input.requires_grad_(), weight.requires_grad_(), TARGET


@pytest.fixture
def wrong(monkeypatch):
    """Return a function `wrong(change)` that changes the results of the compiled graph."""

    def install(change):
        def backend(module, example_inputs, *, options=None):
            run = backends.cce_inductor_eager(module, example_inputs, options=options)
            return lambda *args: tuple(change(value) for value in run(*args))

        monkeypatch.setitem(cce_inductor.testing._BACKENDS, "cce_inductor_eager", backend)

    return install


def test_rewritten(inputs):
    cce_inductor.clear_reports()
    (report,) = assert_rewritten(plain, *inputs)
    assert report.rewritten
    assert cce_inductor.reports() == []


def test_rewritten_module():
    (report,) = assert_rewritten(Head(), TARGET.clamp(min=0), labels=TARGET)
    assert report.loss == "linear > mul(1.0) > float > cross_entropy"


def test_rewritten_when_compiled_and_installed(inputs):
    with cce_inductor.installed(min_logits_bytes=2**40):
        assert len(assert_rewritten(torch.compile(plain), *inputs)) == 1


def test_rewritten_fails_for_a_loss_left_alone(inputs):
    with pytest.raises(AssertionError) as failure:
        assert_rewritten(sums_logits, *inputs)
    line = sums_logits.__code__.co_firstlineno + 2
    assert str(failure.value) == (
        "not every loss is rewritten:\n"
        "1 loss(es) in 1 graph(s), 0 rewritten\n"
        "left alone: linear > cross_entropy\n"
        f"  at {__file__}:{line}\n"
        "  logits: 6x50 float32\n"
        f"  because {reasons.USED_BY} cumsum at {__file__}:{line}: "
        f"{reasons.not_pointwise('aten.cumsum.default')}"
    )


def test_rewritten_fails_for_one_of_two(inputs):
    with pytest.raises(AssertionError, match=r"2 loss\(es\) in 1 graph\(s\), 1 rewritten"):
        assert_rewritten(two_losses, *inputs)


def test_rewritten_fails_without_a_loss(inputs):
    with pytest.raises(AssertionError, match="no operation with a loss rule was found"):
        assert_rewritten(no_loss, inputs[0])


def test_not_rewritten(inputs):
    (report,) = assert_not_rewritten(sums_logits, *inputs, reason="used by cumsum")
    assert not report.rewritten
    assert len(assert_not_rewritten(sums_logits, *inputs)) == 1
    assert assert_not_rewritten(no_loss, inputs[0]) == []


def test_not_rewritten_fails_for_another_reason(inputs):
    with pytest.raises(AssertionError, match="left alone because of 'argmax'") as failure:
        assert_not_rewritten(sums_logits, *inputs, reason="argmax")
    assert f"{reasons.USED_BY} cumsum" in str(failure.value)


def test_not_rewritten_fails_without_a_loss_that_could_have_the_reason(inputs):
    with pytest.raises(AssertionError, match="0 loss"):
        assert_not_rewritten(no_loss, inputs[0], reason="")


@pytest.mark.parametrize("fn", [plain, two_losses])
def test_not_rewritten_fails_for_a_rewritten_loss(fn, inputs):
    with pytest.raises(AssertionError, match="a loss is rewritten:\n"):
        assert_not_rewritten(fn, *inputs)


def test_not_rewritten_fails_for_a_changed_graph(inputs, monkeypatch):
    def rewrite(module, options, deferral=None):
        module.graph.create_node("call_function", torch.rand, (1,))
        module.recompile()
        return []

    monkeypatch.setattr(cce_inductor.explanation, "rewrite", rewrite)
    with pytest.raises(AssertionError, match="a graph changed"):
        assert_not_rewritten(plain, *inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_matches_eager(inputs, dtype):
    input, weight, target = inputs
    (report,) = assert_matches_eager(plain, input.to(dtype), weight.to(dtype), target)
    assert report.rewritten


def test_matches_eager_with_inductor(inputs):
    (report,) = assert_matches_eager(plain, *inputs, backend="cce_inductor")
    assert report.rewritten


def test_matches_eager_with_a_module():
    head = Head()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    state = torch.get_rng_state()
    tokens = TARGET.clamp(min=0)
    for fn, args in (
        (head, ()),
        (torch.compile(head), ()),
        (head.loss, ()),
        (functools.partial(head, labels=TARGET), ()),
        (lambda tokens, labels: head(tokens, labels), ()),
        (lambda model, tokens, labels: model(tokens, labels), (head,)),
        (lambda models, tokens, labels: models["head"](tokens, labels), ({"head": head},)),
    ):
        (report,) = assert_matches_eager(fn, *args, tokens, labels=TARGET)
        assert report.rewritten
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])
    assert head.embedding.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_matches_eager_passes_losses_left_alone(inputs):
    (report,) = assert_matches_eager(sums_logits, *inputs)
    assert not report.rewritten


def test_matches_eager_looks_at_deferred_logits(inputs):
    (report,) = assert_matches_eager(returns_logits, *inputs)
    assert report.rewritten
    assert report.deferred


def test_matches_eager_where_numbers_are_not_finite(inputs):
    input, weight, target = inputs
    (report,) = assert_matches_eager(plain, input, weight, torch.full_like(target, -100))
    assert report.rewritten


def test_matches_eager_compares_results(inputs, wrong):
    wrong(lambda value: value * (1 + 1e-5))
    with pytest.raises(AssertionError, match=r"^result has an error of 1\.\d+e-05, and "):
        assert_matches_eager(plain, *inputs)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_matches_eager_compares_results_that_are_not_finite(inputs, wrong, number):
    wrong(lambda value: value * number)
    with pytest.raises(AssertionError, match=r"^result has an error of inf, and "):
        assert_matches_eager(plain, *inputs)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + 1e-5)


def test_matches_eager_compares_gradients_of_arguments(inputs, wrong):
    wrong(WrongGradient.apply)
    with pytest.raises(AssertionError, match=r"^gradient of args\[0\] has an error of "):
        assert_matches_eager(plain, *inputs)


def test_matches_eager_compares_gradients_of_parameters(wrong):
    wrong(WrongGradient.apply)
    head = Head()
    with pytest.raises(AssertionError, match=r"^gradient of fn\.embedding\.weight has an error"):
        assert_matches_eager(head, TARGET.clamp(min=0), TARGET)
    with pytest.raises(AssertionError, match=r"^gradient of fn\.head\.embedding\.weight has an"):
        assert_matches_eager(lambda *args: head(*args), TARGET.clamp(min=0), TARGET)


def test_matches_eager_compares_gradients_that_are_absent(inputs, wrong):
    wrong(torch.Tensor.detach)
    with pytest.raises(AssertionError, match=r"^gradient of args\[0\] is absent, torch.float32"):
        assert_matches_eager(plain, *inputs)


def test_matches_eager_compares_dtypes_and_shapes(inputs, wrong):
    wrong(torch.Tensor.double)
    with pytest.raises(AssertionError, match=r"^result is torch.float64 \(\), torch.float32 \(\)"):
        assert_matches_eager(plain, *inputs)
    wrong(lambda value: value[None])
    with pytest.raises(AssertionError, match=r"^result is torch.float32 \(1,\), torch.float32 \("):
        assert_matches_eager(plain, *inputs)


def test_matches_eager_compares_integers(inputs, wrong):
    def fn(input, weight, target):
        return {"best": F.linear(input, weight).argmax(-1)}

    assert_matches_eager(fn, *inputs)
    wrong(lambda value: value + 1)
    with pytest.raises(AssertionError, match=r"^result\['best'\] is tensor"):
        assert_matches_eager(fn, *inputs)


def test_matches_eager_distinguishes_rows(inputs, wrong):
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight), target, reduction="none")

    assert_matches_eager(fn, *inputs)

    class Swapped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.flip(0)

    wrong(Swapped.apply)
    with pytest.raises(AssertionError, match=r"^gradient of args\[0\] has an error of "):
        assert_matches_eager(fn, *inputs)


def test_matches_eager_needs_a_tensor():
    with pytest.raises(TypeError, match="no tensor in the result"):
        assert_matches_eager(lambda input: input.shape[0], torch.ones(2))


def test_matches_eager_knows_its_backends(inputs):
    with pytest.raises(ValueError, match=r"^backend must be one of .*'inductor'$"):
        assert_matches_eager(plain, *inputs, backend="inductor")


def test_exceptions_of_the_function_come_out(inputs):
    def fn(input):
        raise ZeroDivisionError("mine")

    for check in (assert_rewritten, assert_not_rewritten, assert_matches_eager):
        with pytest.raises(ZeroDivisionError, match="mine"):
            check(fn, inputs[0])


def test_in_float64():
    x = torch.rand(3, dtype=torch.float64)
    with in_float64():
        for result in (
            x.float(),
            x.half(),
            x.bfloat16(),
            x.to(torch.float32),
            x.to(dtype=torch.bfloat16),
            x.softmax(0, dtype=torch.float32),
            torch.ones(3),
            torch.zeros_like(x, dtype=torch.float32),
        ):
            assert result.dtype == torch.float64
        assert torch.equal(x.float(), x)
        assert x.to(torch.int64).dtype == torch.int64
    assert x.float().dtype == torch.float32
    assert torch.ones(3).dtype == torch.float32


def test_relative_error():
    inf, nan = torch.inf, torch.nan
    for value, reference, error in (
        ([1.0, 2.0], [1.0, 2.0], 0),
        ([3.0, 0.0], [0.0, 4.0], 1.25),
        ([3.0, 0.0], [0.0, 0.0], 3),
        ([nan, inf, 1.0], [nan, inf, 2.0], 0.5),
        ([1.0, inf], [1.0, -inf], inf),
        ([1.0, nan], [1.0, inf], inf),
        ([nan, 1.0], [1.0, 1.0], inf),
        ([inf, 1.0], [1.0, 1.0], inf),
        ([], [], 0),
    ):
        assert relative_error(torch.tensor(value), torch.tensor(reference)) == error
