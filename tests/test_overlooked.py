"""Losses without a rule, or that do not look like losses, are still reported."""

import inspect
import logging

import pytest
import torch
import torch.nn.functional as F
from checks import reports_of
from torch.utils.checkpoint import checkpoint

import cce_inductor
from cce_inductor import explain
from cce_inductor.reporting import reasons

INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, 2, 7, 7])
NO_LOSS = "no operation with a loss rule was found in what Dynamo captured\n"


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    cce_inductor.clear_reports()


def place(fn, text):
    """Return ``file.py:line`` of the only line of `fn` that contains `text`."""
    lines, first = inspect.getsourcelines(fn)
    (line,) = [first + number for number, line in enumerate(lines) if text in line]
    return f"{__file__}:{line}"


def margin_by_scatter(x, w, y):
    z = F.linear(x, w)
    z = z.scatter(1, y[:, None], z.gather(1, y[:, None]) - 0.35)  # the margin
    return F.cross_entropy(z, y)


def margin_by_a_new_tensor(x, w, y):
    z = F.linear(x, w)
    shift = torch.zeros(6, 50).scatter(1, y[:, None], z.gather(1, y[:, None]))  # the margin
    return F.cross_entropy(shift, y)


def margin_in_place(x, w, y):
    z = F.linear(x, w)
    least = z.gather(1, y[:, None]) - 0.35
    z.scatter_(1, y[:, None], least)  # the margin
    return F.cross_entropy(z, y)


def hardest_alone(x, w, y):
    z = F.linear(x, w)
    best = z.max(1, keepdim=True).values
    return F.cross_entropy(best.expand(6, 50), y)  # the margin


@pytest.mark.parametrize(
    "fn", [margin_by_scatter, margin_by_a_new_tensor, margin_in_place, hardest_alone]
)
def test_a_loss_of_what_is_made_from_a_reduction_is_reported(fn):
    (report,) = [r for r in reports_of(fn, INPUT, WEIGHT, TARGET) if "cross_entropy" in r.loss]
    assert report.rewritten or report.reason
    assert report.location == place(fn, "F.cross_entropy")


def test_a_loss_of_one_value_a_row_is_none_of_classes():
    """For example, the KL divergence of rewards, one per row."""

    def fn(x, w, y):
        z = F.linear(x, w)
        scores = z.logsumexp(1).view(2, 3)
        return F.cross_entropy(scores, y[:2].clamp(max=2)) + F.cross_entropy(z, y)

    reports = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert [report.rewritten for report in reports if report.loss.endswith("cross_entropy")] == [
        True
    ]


WITHOUT_RULE = {
    "multi_margin_loss": lambda z, y: F.multi_margin_loss(z, y),
    "binary_cross_entropy_with_logits": lambda z, y: F.binary_cross_entropy_with_logits(
        z, F.one_hot(y, 50).float()
    ),
    "binary_cross_entropy": lambda z, y: F.binary_cross_entropy(
        z.sigmoid(), F.one_hot(y, 50).float()
    ),
    "multilabel_soft_margin_loss": lambda z, y: F.multilabel_soft_margin_loss(
        z, F.one_hot(y, 50).float()
    ),
    "multilabel_margin_loss": lambda z, y: F.multilabel_margin_loss(z, F.one_hot(y, 50)),
    "soft_margin_loss": lambda z, y: F.soft_margin_loss(z, F.one_hot(y, 50) * 2.0 - 1),
}


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_a_loss_without_a_rule_is_named(name):
    take = WITHOUT_RULE[name]

    def fn(x, w, y):
        return take(F.linear(x, w), y)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.loss.split(" > ")[0] == "linear"
    assert report.loss.split(" > ")[-1] == name
    assert report.logits_shape == (6, 50)
    assert report.reason == (
        f"{reasons.USED_BY} {name} at {report.location}: {reasons.LOSS_WITHOUT_RULE.sentence}"
    )


class HandWritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, y):
        lse = z.logsumexp(-1)
        ctx.save_for_backward(z, y, lse)
        return (lse - z.gather(-1, y[:, None])[:, 0]).mean()

    @staticmethod
    def backward(ctx, g):
        z, y, lse = ctx.saved_tensors
        return g * ((z - lse[:, None]).exp() - F.one_hot(y, z.shape[-1])) / len(y), None


class Named(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward(z, y)
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx, g):
        z, y = ctx.saved_tensors
        return g * (z.softmax(-1) - F.one_hot(y, z.shape[-1])) / len(y), None


class NoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (z.view(6, 5, 10).softmax(-1) * z.view(6, 5, 10)).sum()

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return g * z


def test_a_loss_in_an_autograd_function():
    def fn(x, w, y):
        return HandWritten.apply(F.linear(x, w), y)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        f"{reasons.USED_BY} autograd_function_apply at {place(fn, 'apply')}: "
        + reasons.NOT_FOLLOWED.sentence
    )
    assert report.logits_shape == (6, 50)


def test_a_loss_with_a_name_in_an_autograd_function():
    """It cannot cross a graph break, and no option changes that."""

    def fn(x, w, y):
        return Named.apply(F.linear(x, w), y)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.location == place(Named.forward, "F.cross_entropy")
    assert report.reason == reasons.FROM_CALLING_GRAPH.sentence
    assert report.advice is None


def test_a_function_with_a_softmax_over_something_else_is_no_loss():
    assert reports_of(lambda x, w, y: NoLoss.apply(F.linear(x, w)), INPUT, WEIGHT, TARGET) == []


def by_hand(x, w, y):
    z = x @ w.t()
    return (z.logsumexp(-1) - z.gather(-1, y[:, None])[:, 0]).mean()


@pytest.mark.parametrize("tokens", [1024, 1023])
def test_a_large_softmax_over_few_classes_is_reported(tokens, caplog):
    """A shard of a vocabulary may have fewer classes than there are hidden units."""
    caplog.set_level(logging.WARNING, "cce_inductor")
    arguments = torch.randn(tokens, 4096), torch.randn(4096, 4096), torch.zeros(tokens).long()
    torch.compile(by_hand, backend="cce_inductor_eager", dynamic=False)(*arguments)
    reports = cce_inductor.reports()
    if tokens == 1023:  # small logits, as in a router
        assert reports == []
        assert not caplog.text
        return
    (report,) = reports
    reason = reasons.taken_for_router(classes=4096, hidden=4096)
    assert report.reason == str(reason)
    assert report.advice == reason.advice
    assert "a 16 MiB logsumexp at " in caplog.text


def test_the_advice_for_a_softmax_over_few_classes_holds():
    def fn(x, w, y):
        return F.nll_loss(F.log_softmax(F.linear(x, w), -1), y)

    (report,) = reports_of(fn, torch.randn(6, 64), torch.randn(50, 64), TARGET)
    assert report.rewritten


def squared(x, w, y):
    return F.mse_loss(F.linear(x, w), torch.zeros(6, 50))  # the projection


def focal(x, w, y):
    z = F.linear(x, w)  # the projection
    return (z.sigmoid() ** 2).mean()


def few_classes(x, w, y):
    z = torch.cat([x] * 8, 1) @ torch.cat([w] * 8, 1).t()  # the projection
    return (z.logsumexp(-1) - z.gather(-1, y[:, None])[:, 0]).mean()


def returned(x, w, y):
    return F.linear(x, w) * 2  # the projection


def several(x, w, y):
    hidden = F.linear(x, torch.ones(8, 8)).relu()
    return F.linear(hidden, w).cumsum(-1).mean()  # the projection


@pytest.mark.parametrize(
    ("fn", "use"),
    [
        (squared, f"{reasons.USED_BY} mse_loss at {{}}: {reasons.not_pointwise('')}"),
        (focal, "it is read by mean at {}, without a softmax over its columns"),
        (few_classes, "a hand-written softmax over 50 classes"),
        (returned, "the function returns a tensor that is computed from it"),
        (several, f"{reasons.USED_BY} cumsum at {{}}: {reasons.not_pointwise('')}"),
    ],
)
def test_an_explanation_without_losses_says_what_was_seen(fn, use):
    text = str(explain(fn, INPUT, WEIGHT, TARGET))
    assert NO_LOSS in text
    seen = text.partition(NO_LOSS)[2].splitlines()
    name = "matmul" if fn is few_classes else "linear"
    where = place(fn, "# the projection")
    assert seen[0] == f"the largest projection is {name} at {where}, 6x50 float32, 1.172 KiB"
    used_at = place(fn, "return") if fn is focal else where
    assert seen[1].startswith("  " + use.format(used_at))
    assert len(seen) == 2


def test_a_projection_in_a_graph_that_the_graph_calls_is_seen():
    def fn(x, w, y):
        return checkpoint(focal, x, w, y, use_reentrant=False)

    text = str(explain(fn, INPUT, WEIGHT, TARGET))
    assert f"the largest projection is linear at {place(focal, '# the proj')}, 6x50" in text


def test_a_surprise_in_an_explanation_without_losses(monkeypatch, caplog):
    def broken(graph):
        raise KeyError("not planned")

    monkeypatch.setattr("cce_inductor.rewriting.overlooked.walk", broken)
    with pytest.raises(Exception, match="not planned"):
        explain(focal, INPUT, WEIGHT, TARGET)
    with cce_inductor.installed(on_error="warn"):
        assert str(explain(focal, INPUT, WEIGHT, TARGET)).endswith(NO_LOSS.strip())
    assert "an explanation says nothing of projections" in caplog.text


def test_a_graph_without_projection_has_nothing_to_say():
    assert str(explain(lambda x: x + 1, torch.ones(2))).endswith(NO_LOSS.strip())


def test_a_graph_with_a_loss_says_nothing_more():
    def fn(x, w, y):
        return F.cross_entropy(F.linear(x, w), y)

    assert "largest projection" not in str(explain(fn, INPUT, WEIGHT, TARGET))
