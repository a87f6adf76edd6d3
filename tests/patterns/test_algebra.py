"""Losses that are written by hand: in how few passes over the logits they are computed."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reports_of, rewritten_graph
from expecttest import assert_expected_inline

from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, 1, 7, 7])
TEACHER = torch.randn(6, 50).softmax(-1)


def loss_of(function):
    """The function whose logits, targets and teacher's probabilities go to `function`."""

    def fn(input, weight, target, teacher):
        return function(F.linear(input, weight), target, teacher)

    return fn


def smoothed(x, t, p):
    log_probs = x.log_softmax(-1)
    nll = -log_probs.gather(-1, t[:, None]).squeeze(-1)
    return (0.9 * nll - 0.1 * log_probs.mean(-1)).mean()


def smoothed_by_one_hot(x, t, p):
    expected = F.one_hot(t, 50) * 0.9 + 0.1 / 50
    return -(expected * x.log_softmax(-1)).sum(-1).mean()


def entropy(x, t, p):
    log_probs = x.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()


def with_z_loss(x, t, p):
    return F.cross_entropy(x, t) + 1e-4 * x.logsumexp(-1).square().mean()


def with_entropy_bonus(x, t, p):
    log_probs = x.log_softmax(-1)
    chosen = log_probs.gather(1, t[:, None])[:, 0]
    return -(chosen + 0.01 * -(log_probs.exp() * log_probs).sum(-1)).mean()


def distilled(x, t, p):
    soft = F.kl_div((x / 2).log_softmax(-1), p, reduction="batchmean") * 4
    return 0.5 * F.cross_entropy(x, t) + 0.5 * soft


def with_accuracies(x, t, p):
    best, fifth = x.argmax(-1) == t, (x.topk(5)[1] == t[:, None]).any(-1)
    return F.cross_entropy(x, t), best.float().mean(), fifth.float().mean()


def several_losses(x, t, p):
    smooth = F.cross_entropy(x, t, reduction="sum", label_smoothing=0.1)
    return F.cross_entropy(x, t), smooth, x.mean()


ONE_PASS = {
    "log_softmax, gather": lambda x, t, p: -x.log_softmax(-1).gather(1, t[:, None]).mean(),
    "logsumexp less gather": lambda x, t, p: (
        x.logsumexp(-1) - x.gather(1, t[:, None])[:, 0]
    ).mean(),
    "log_softmax, nll_loss": lambda x, t, p: F.nll_loss(x.log_softmax(-1), t),
    "log_softmax, one-hot": lambda x, t, p: -(x.log_softmax(-1) * F.one_hot(t, 50)).sum(-1),
    "probability of the target": lambda x, t, p: x.softmax(-1).gather(1, t[:, None]).mean(),
    "smoothed": smoothed,
    "smoothed by a one-hot": smoothed_by_one_hot,
    "entropy": entropy,
    "entropy of softmax": lambda x, t, p: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1),
    "teacher": lambda x, t, p: -(p * x.log_softmax(-1)).sum(-1).mean(),
    "z-loss": with_z_loss,
    "entropy bonus": with_entropy_bonus,
    "distilled": distilled,
    "accuracies": with_accuracies,
    "several losses": several_losses,
}


@pytest.mark.parametrize("function", ONE_PASS.values(), ids=ONE_PASS)
def test_one_pass(function):
    fn = loss_of(function)
    graph = rewritten_graph(fn, INPUT, WEIGHT, TARGET, TEACHER)
    assert graph.count("cce_inductor.reduce.") == 1
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET, TEACHER, slack=5)


def by_hand(x, t, p):
    shifted = x - x.max(-1, keepdim=True).values
    log_sum = shifted.exp().sum(-1, keepdim=True).log()
    return -(shifted - log_sum).gather(1, t[:, None]).mean()


def by_hand_detached(x, t, p):
    shifted = x - x.amax(-1, keepdim=True).detach()
    return (shifted.exp().sum(-1).log() - shifted.gather(1, t[:, None])[:, 0]).mean()


def focal(x, t, p):
    log_prob = x.log_softmax(-1).gather(1, t[:, None])
    return -((1 - log_prob.exp()) ** 2 * log_prob).mean()


HAND_WRITTEN = {
    "max, sub, exp, sum, log": by_hand,
    "max, sub, exp, sum, log, detached": by_hand_detached,
    "focal": focal,
}


@pytest.mark.parametrize("function", HAND_WRITTEN.values(), ids=HAND_WRITTEN)
def test_hand_written(function):
    fn = loss_of(function)
    graph = rewritten_graph(fn, INPUT, WEIGHT, TARGET, TEACHER)
    assert graph.count("cce_inductor.reduce.") == 1
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET, TEACHER, slack=5)


TWO_PASSES = {
    "log of softmax, gather": lambda x, t, p: -x.softmax(-1).log().gather(1, t[:, None]).mean(),
    "sum of squared probabilities": lambda x, t, p: x.softmax(-1).square().sum(-1),
    "variance": lambda x, t, p: (x - x.mean(-1, keepdim=True)).square().sum(-1) + x.logsumexp(-1),
    "softmax of softmax": lambda x, t, p: F.cross_entropy(x.softmax(-1), t),
    "clamped log_softmax": lambda x, t, p: F.nll_loss(x.log_softmax(-1).clamp(min=-5), t),
}


@pytest.mark.parametrize("function", TWO_PASSES.values(), ids=TWO_PASSES)
def test_two_passes(function):
    fn = loss_of(function)
    graph = rewritten_graph(fn, INPUT, WEIGHT, TARGET, TEACHER)
    assert graph.count("cce_inductor.reduce.") == 2
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET, TEACHER, slack=5)


def test_graph_of_label_smoothing():
    fn = loss_of(smoothed)
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET, TEACHER),
        """\
getitem = l_target_[(slice(None, None, None), None)]
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [getitem], 'gather(z, r0); logsumexp(z); sum(z)')
getitem_1 = reduce[0]
getitem_2 = reduce[1]
sub_1 = torch.ops.aten.sub.Tensor(getitem_1, getitem_2)
to = sub_1.to(torch.float32)
squeeze = to.squeeze(-1)
nll = -squeeze
mul = 0.9 * nll
getitem_3 = reduce[2]
mul_2 = getitem_2 * 50
sub_2 = torch.ops.aten.sub.Tensor(getitem_3, mul_2)
mean_2 = torch.mean(sub_2, (1,), keepdim = False)
div = torch.div(mean_2, 50)
to_1 = div.to(torch.float32)
mul_1 = 0.1 * to_1
sub = mul - mul_1
mean_1 = sub.mean()
return (mean_1,)
""",
    )


def test_graph_of_an_entropy():
    fn = loss_of(entropy)
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET, TEACHER),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [], 'logsumexp(z); mean(z, z)')
getitem = reduce[0]
neg_1 = -getitem
add = getitem + neg_1
exp_1 = torch.exp(add)
getitem_1 = reduce[1]
sub = torch.ops.aten.sub.Tensor(getitem_1, getitem)
mul_1 = exp_1 * sub
sum_2 = torch.sum(mul_1, (1,), keepdim = False)
to = sum_2.to(torch.float32)
mean = to.mean()
neg = -mean
return (neg,)
""",
    )


def test_graph_of_max_sub_exp_sum_log():
    fn = loss_of(by_hand)
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET, TEACHER),
        """\
getitem_2 = l_target_[(slice(None, None, None), None)]
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [getitem_2], 'max(z); logsumexp(z); gather(z, r0)')
getitem_3 = reduce[0]
to = getitem_3.to(torch.float32)
getitem_4 = reduce[1]
getitem_5 = reduce[2]
neg_1 = -to
add = getitem_5 + neg_1
exp_1 = torch.exp(add)
sum_2 = torch.sum(exp_1, (1,), keepdim = True)
to_1 = sum_2.to(torch.float32)
log_sum = to_1.log()
getitem_6 = reduce[3]
sub_2 = torch.ops.aten.sub.Tensor(getitem_6, to)
sub_3 = torch.ops.aten.sub.Tensor(sub_2, log_sum)
to_2 = sub_3.to(torch.float32)
mean = to_2.mean()
neg = -mean
return (neg,)
""",
    )


def test_sum_of_another_softmax_is_left_alone():
    fn = loss_of(lambda x, t, p: (x.softmax(0) * x.log_softmax(-1)).sum(-1))
    for report in reports_of(fn, INPUT, WEIGHT, TARGET, TEACHER):
        assert report.reason.endswith(f": {reasons.REDUCES_ROWS.sentence}")


TRANSPOSED_LATE_VALUES = {
    "mean": lambda z: (z.logsumexp(-1) - z).mean(),
    "sum of a row": lambda z: (2 * z.logsumexp(-1) - z).sum(-1),
    "negated": lambda z: -(z.amax(-1) - 2 * z).mean(-1) + z.logsumexp(-1),
    "product": lambda z: (z * z.logsumexp(-1)).sum(-1),
    "quotient": lambda z: (z / z.logsumexp(-1)).mean(),
    "logsumexp": lambda z: (z - z.logsumexp(-1)).logsumexp(-1),
    "mean under a softmax": lambda z: (z.softmax(-1) * (z - z.logsumexp(-1))).sum(-1),
    "one column": lambda z: (z.logsumexp(-1) - z).log_softmax(-1).gather(1, TARGET[:, None] % 6),
}


@pytest.mark.parametrize("reduce", TRANSPOSED_LATE_VALUES.values(), ids=TRANSPOSED_LATE_VALUES)
def test_value_of_a_row_that_is_broadcast_over_the_rows_of_square_logits(reduce):
    """What was reduced from row j is then subtracted from column j."""

    def fn(input, weight):
        return reduce(input @ weight[:6].t()) + F.cross_entropy(input @ weight[6:].t(), TARGET % 6)

    for report in reports_of(fn, INPUT, WEIGHT):
        assert report.rewritten
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, slack=5)
