"""Gradients that are made with the loss, and losses for which they cannot be."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import cce_inductor
from cce_inductor.kernels.blockwise.with_gradients import LEAST_ROWS, compute_with_gradients
from cce_inductor.kernels.head import TILE
from cce_inductor.operators import ops, with_loss

ROWS, HIDDEN, VOCABULARY = 160, 16, 2 * TILE
OPERATORS = torch.ops.cce_inductor


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    input, weight = torch.randn(ROWS, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    target = torch.randint(VOCABULARY, (ROWS,))
    target[::7] = -100
    return input.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def mean(input, weight, target):
    return F.cross_entropy(F.linear(input, weight), target)


def with_advantages(input, weight, target):
    log_probabilities = F.log_softmax(F.linear(input, weight), -1)
    chosen = log_probabilities.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    advantages = torch.linspace(-1, 1, ROWS, dtype=input.dtype)
    return -(chosen * advantages).mean()


JOINED = {
    "mean": mean,
    "sum": lambda x, w, t: F.cross_entropy(F.linear(x, w), t, reduction="sum"),
    "divided": lambda x, w, t: mean(x, w, t) / 3,
    "with another loss": lambda x, w, t: mean(x, w, t) + 0.1 * x.square().mean(),
    "smoothing": lambda x, w, t: F.cross_entropy(F.linear(x, w), t, label_smoothing=0.1),
    "softcap": lambda x, w, t: F.cross_entropy(5 * torch.tanh(F.linear(x, w) / 5), t),
    "bias": lambda x, w, t: F.cross_entropy(
        F.linear(x, w, torch.linspace(0, 1, VOCABULARY, dtype=x.dtype)), t
    ),
    "class weights": lambda x, w, t: F.cross_entropy(
        F.linear(x, w), t, torch.linspace(0.5, 2, VOCABULARY, dtype=x.dtype)
    ),
    "shifted": lambda x, w, t: F.cross_entropy(F.linear(x, w)[:-1], t[1:]),
    "advantages": with_advantages,
    "mean of a mask": lambda x, w, t: (
        (F.cross_entropy(F.linear(x, w), t, reduction="none") * (t > 5)).sum() / (t > 5).sum()
    ),
    "token accuracy beside it": lambda x, w, t: (
        mean(x, w, t) + 0 * (F.linear(x, w).argmax(-1) == t).float().mean()
    ),
}


def two_losses(x, w, t):
    logits = F.linear(x, w)
    return F.cross_entropy(logits, t), torch.logsumexp(logits, -1).mean()


def random_weights(x, w, t):
    rows = F.cross_entropy(F.linear(x, w), t, reduction="none")
    return (rows * torch.rand(ROWS)).mean()


NOT_JOINED = {
    "z-loss": lambda x, w, t: torch.logsumexp(F.linear(x, w), -1).square().mean(),
    "focal": lambda x, w, t: F.cross_entropy(F.linear(x, w), t, reduction="none").square().mean(),
    "each row": lambda x, w, t: F.cross_entropy(F.linear(x, w), t, reduction="none"),
    "two losses": two_losses,
    "exponential of the loss": lambda x, w, t: mean(x, w, t).exp(),
    "learned temperature": lambda x, w, t: F.cross_entropy(F.linear(x, w) * x[0, 0], t),
}


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    cce_inductor.clear_reports()


def gradients(fn, x, w, t):
    """Return the results and gradients for upstream gradients other than 1."""
    results = fn(x, w, t)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [torch.full_like(r, 0.7) + torch.arange(r.numel()).view_as(r) for r in results]
    found = torch.autograd.grad(results, (x, w), upstream)
    return [*(r.detach() for r in results), *found]


def compiled(fn, **options):
    options = {"min_logits_bytes": 0, "force_disable_caches": True, **options}
    return torch.compile(fn, backend="cce_inductor", options=options)


def assert_right(fn, joined, dtype=torch.float32, **options):
    exact = gradients(fn, *tensors(torch.float64))
    found = gradients(compiled(fn, **options), *tensors(dtype))
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {}
    for ours, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, wanted.to(ours.dtype), **tolerance)
    reports = cce_inductor.reports()
    assert all(report.rewritten for report in reports)
    assert any(report.with_loss for report in reports) == joined
    assert any("computed with the loss" in str(report) for report in reports) == joined


@pytest.mark.parametrize("name", JOINED)
def test_joined(name):
    assert_right(JOINED[name], True)


@pytest.mark.parametrize("name", NOT_JOINED)
def test_not_joined(name):
    assert_right(NOT_JOINED[name], False)


def test_float64():
    assert_right(mean, True, torch.float64)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),  # Gradients would be rounded twice.
        (torch.float32, {"workspace_bytes": LEAST_ROWS * VOCABULARY * 4 - 1}),
    ],
)
def test_computed_again(dtype, options):
    compiled(mean, **options)(*tensors(dtype)).backward()
    assert not cce_inductor.reports()[-1].with_loss


def test_sampled_gradients_are_not_computed_with_the_loss():
    x, _, t = tensors()
    weight = torch.randn(10 * TILE, HIDDEN, requires_grad=True)
    compiled(mean, sample_below=0.2)(x, weight, t).backward()
    report = cce_inductor.reports()[-1]
    assert (report.sampled, report.with_loss) == (True, False)


def test_random_numbers_are_drawn_once():
    """Row weights that are drawn after the logits would be drawn twice if they were copied."""
    fn = compiled(random_weights, fallback_random=True)
    x, w, t = tensors()
    torch.manual_seed(3)
    loss = fn(x, w, t)
    found = torch.autograd.grad(loss, w)
    torch.manual_seed(3)
    exact_loss = random_weights(x, w, t)
    torch.testing.assert_close(loss, exact_loss)
    torch.testing.assert_close(found, torch.autograd.grad(exact_loss, w))


def test_a_retained_graph_has_its_backward_twice():
    x, w, t = tensors()
    loss = compiled(mean)(x, w, t)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("retained", [False, True])
def test_the_backward_multiplies_the_gradients_in_their_memory(retained, monkeypatch):
    made = []

    def recorded(*args):
        statistics, gradients = compute_with_gradients(*args)
        made.extend(each.data_ptr() for each in (gradients.input, gradients.linear_weight))
        return statistics, gradients

    monkeypatch.setattr(ops, "compute_with_gradients", recorded)
    x, w, t = tensors()
    compiled(mean)(x, w, t).backward(retain_graph=retained)
    assert (made == [x.grad.data_ptr(), w.grad.data_ptr()]) != retained


@pytest.mark.parametrize(("missing", "joined"), [(0, True), (1, False)])
def test_otherwise_a_copy_must_fit_the_workspace(missing, joined):
    _, _, t = tensors()
    x = torch.randn(ROWS, 2 * LEAST_ROWS, requires_grad=True)
    w = torch.randn(VOCABULARY, 2 * LEAST_ROWS, requires_grad=True)
    with torch._functorch.config.patch(donated_buffer=False):
        compiled(mean, workspace_bytes=w.numel() * 4 - missing)(x, w, t).backward()
    assert cce_inductor.reports()[-1].with_loss is joined


def test_without_a_gradient_nothing_more_is_computed():
    fn = compiled(mean)
    x, w, t = tensors()
    with torch.no_grad():
        torch.testing.assert_close(fn(x, w, t), mean(x, w, t))
    assert cce_inductor.reports()[-1].with_loss is False


def test_it_is_not_known_if_nothing_is_compiled():
    fn = torch.compile(mean, backend="cce_inductor_eager", options={"min_logits_bytes": 0})
    fn(*tensors())
    assert cce_inductor.reports()[-1].with_loss is None


def test_any_number_of_tokens():
    """The number is symbolic from the second one on."""
    fn = compiled(mean)
    x, w, t = tensors()
    for rows in (ROWS, 30, 50, 1):
        found = gradients(fn, x[:rows], w, t[-rows:])
        for ours, wanted in zip(found, gradients(mean, x[:rows], w, t[-rows:]), strict=True):
            torch.testing.assert_close(ours, wanted, equal_nan=True)
    assert all(report.with_loss for report in cce_inductor.reports())


def test_installed():
    before = torch._inductor.config.joint_custom_pre_pass
    without_cache = torch._inductor.config.patch(force_disable_caches=True)
    with without_cache, cce_inductor.installed(min_logits_bytes=0):
        gradients(torch.compile(mean), *tensors())
        assert cce_inductor.reports()[-1].with_loss
    assert torch._inductor.config.joint_custom_pre_pass is before


def test_the_passes_that_were_there_run_first():
    seen = []
    options = {"joint_custom_pre_pass": seen.append}
    compiled(mean, **options)(*tensors())
    assert seen
    assert cce_inductor.reports()[-1].with_loss


@pytest.mark.parametrize("mode", ["warn", "raise"])
def test_an_error_changes_nothing(mode, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(with_loss._Joint, "_joined", fail)
    expects = (
        pytest.raises(Exception, match="ZeroDivision")
        if mode == "raise"
        else contextlib.nullcontext()
    )
    with expects:
        assert_right(mean, False, on_error=mode)
