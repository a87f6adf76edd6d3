"""`F.kl_div`: distillation from a teacher's probabilities."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, reports_of, rewritten_graph
from expecttest import assert_expected_inline

from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TEACHER = torch.randn(6, 50).softmax(-1)


def loss_of(divergence):
    """The function whose logits and teacher's probabilities go to `divergence`."""

    def fn(input, weight, teacher):
        return divergence(F.linear(input, weight), teacher)

    return fn


def test_graph():
    fn = loss_of(lambda x, p: F.kl_div(x.log_softmax(-1), p, reduction="batchmean"))
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TEACHER),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_teacher_], 't0 = xlogy.Tensor(b0, b0); sum(t0); sum(b0); dot(b0, z); logsumexp(z)')
getitem = reduce[0]
getitem_1 = reduce[2]
getitem_2 = reduce[1]
getitem_3 = reduce[3]
mul = getitem_2 * getitem_3
sub = torch.ops.aten.sub.Tensor(getitem_1, mul)
sub_1 = torch.ops.aten.sub.Tensor(getitem, sub)
flatten = torch.flatten(sub_1, 1)
sum_1 = torch.sum(flatten, 1)
mean = torch.mean(sum_1, 0)
to = mean.to(torch.float32)
return (to,)
""",
    )


def test_graph_of_log_targets():
    fn = loss_of(lambda x, p: F.kl_div(x.log_softmax(-1), p, reduction="sum", log_target=True))
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TEACHER.log()),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_teacher_], 't0 = exp(b0); sum(t0); dot(t0, b0); dot(t0, z); logsumexp(z)')
getitem = reduce[1]
getitem_1 = reduce[2]
getitem_2 = reduce[0]
getitem_3 = reduce[3]
mul = getitem_2 * getitem_3
sub = torch.ops.aten.sub.Tensor(getitem_1, mul)
sub_1 = torch.ops.aten.sub.Tensor(getitem, sub)
sum_1 = torch.sum(sub_1)
to = sum_1.to(torch.float32)
return (to,)
""",
    )


SPELLINGS = {
    "mean": lambda x, p: F.kl_div(x.log_softmax(-1), p),
    "batchmean": lambda x, p: F.kl_div(x.log_softmax(-1), p, reduction="batchmean"),
    "sum": lambda x, p: F.kl_div(x.log_softmax(-1), p, reduction="sum"),
    "none": lambda x, p: F.kl_div(x.log_softmax(-1), p, reduction="none").sum(-1),
    "none, masked": lambda x, p: (
        F.kl_div(x.log_softmax(-1), p, reduction="none").sum(-1) * torch.arange(6)
    ),
    "size_average": lambda x, p: F.kl_div(x.log_softmax(-1), p, size_average=False),
    "reduce": lambda x, p: F.kl_div(x.log_softmax(-1), p, reduce=False).sum(-1),
    "log_target": lambda x, p: F.kl_div(
        x.log_softmax(-1), p.log(), reduction="batchmean", log_target=True
    ),
    "temperature": lambda x, p: 4 * F.kl_div((x / 2).log_softmax(-1), p, reduction="batchmean"),
    "module": lambda x, p: torch.nn.KLDivLoss(reduction="batchmean")(x.log_softmax(-1), p),
    "module, log_target": lambda x, p: torch.nn.KLDivLoss(reduction="sum", log_target=True)(
        x.log_softmax(-1), p.log()
    ),
    "log of softmax": lambda x, p: F.kl_div(x.softmax(-1).log(), p, reduction="batchmean"),
    "of no log_softmax": lambda x, p: F.kl_div(x, p, reduction="sum"),
    "as the target": lambda x, p: F.kl_div(p.log(), x.softmax(-1), reduction="batchmean"),
    "as the target, log": lambda x, p: F.kl_div(
        p.log(), x.log_softmax(-1), reduction="batchmean", log_target=True
    ),
    "targets of zero": lambda x, p: F.kl_div(x.log_softmax(-1), p * (p > 0.02), reduction="sum"),
    "from itself": lambda x, p: F.kl_div(
        (x * 2).log_softmax(-1), x.softmax(-1), reduction="batchmean"
    ),
    "from itself, detached": lambda x, p: F.kl_div(
        (x * 2).log_softmax(-1), x.detach().softmax(-1), reduction="batchmean"
    ),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("divergence", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(divergence):
    # A divergence is a difference of two numbers that are larger.
    assert_as_accurate_as_eager(loss_of(divergence), INPUT, WEIGHT, TEACHER, slack=10)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_no_rows(shape):
    """Of an empty batch the mean is nan, of a batch of nothing it is 0."""

    def fn(input, weight):
        target = torch.ones(*shape, 50) / 50
        return F.kl_div(F.linear(input, weight).log_softmax(-1), target, reduction="batchmean")

    assert_as_accurate_as_eager(fn, torch.randn(*shape, 8, requires_grad=True), WEIGHT)


def test_three_dimensions():
    def fn(input, weight, teacher):
        log_probs = F.linear(input, weight).view(2, 3, 50).log_softmax(-1)
        return F.kl_div(log_probs, teacher.view(2, 3, 50), reduction="batchmean")

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TEACHER)


LEFT_ALONE = {
    "the vocabulary first": (
        lambda x, p: F.kl_div(x.log_softmax(-1).T, p.T, reduction="batchmean"),
        f"kl_div cannot be rewritten: {reasons.BATCH_DIMENSION_IS_VOCABULARY.sentence}",
    ),
    "softmax of rows": (
        lambda x, p: F.kl_div((x + torch.ones(50)).log_softmax(0), p, reduction="sum"),
        reasons.REDUCES_ROWS.sentence,
    ),
}


@pytest.mark.parametrize(("divergence", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(divergence, why):
    assert reason_against(loss_of(divergence), INPUT, WEIGHT, TEACHER).endswith(why)


def test_teacher_with_a_gradient_is_left_alone():
    fn = loss_of(lambda x, p: F.kl_div(x.log_softmax(-1), p, reduction="sum"))
    reason = reason_against(fn, INPUT, WEIGHT, TEACHER.clone().requires_grad_())
    assert reason.endswith(reasons.OPERAND_LARGE_WITH_GRADIENT.sentence)


def test_divergence_of_each_entry_is_reported():
    fn = loss_of(lambda x, p: F.kl_div(x.log_softmax(-1), p, reduction="none"))
    (report,) = reports_of(fn, INPUT, WEIGHT, TEACHER)
    assert not report.rewritten
