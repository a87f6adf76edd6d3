"""Functions of the logits of several heads: neither head's logits are stored."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from checks import (
    MAY_CHANGE,
    assert_as_accurate_as_eager,
    capture,
    code,
    reason_against,
    reports_of,
    rewritten_graph,
)
from expecttest import assert_expected_inline

from cce_inductor.kernels.program.tracing import NotPointwiseError
from cce_inductor.options import Options
from cce_inductor.rewriting.plan import Group
from cce_inductor.rewriting.rewrite import rewrite

torch.manual_seed(0)
INPUT, OTHER = (torch.randn(2, 3, size, requires_grad=True) for size in (8, 5))
WEIGHT, SECOND = (torch.randn(50, size, requires_grad=True) for size in (8, 5))
BIAS = torch.randn(50, requires_grad=True)
TARGET = torch.tensor([[3, 0, 49], [-100, 7, 7]])
HEADS = (INPUT, WEIGHT, OTHER, SECOND)


def loss_of_two(loss):
    """Return a function that takes the loss of a student and a teacher, both trained."""

    def fn(input, weight, other, second):
        return loss(F.linear(input, weight), F.linear(other, second))

    return fn


def forward_kl(student, teacher):
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


def reverse_kl(student, teacher):
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1).mean()


def test_graph():
    def fn(input, weight, other, second):
        with torch.no_grad():
            teacher = F.linear(other, second)
        return forward_kl(F.linear(input, weight), teacher)

    assert_expected_inline(
        rewritten_graph(fn, *HEADS),
        """\
_set_grad_enabled = torch._C._set_grad_enabled(False)
_set_grad_enabled_1 = torch._C._set_grad_enabled(True)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_other_, l_second_], 't0 = detach(p0); t1 = eq.Scalar(t0, -inf); t2 = where.ScalarSelf(t1, 0.0, t0); logsumexp(t0); logsumexp(p0); mean(t0, t2); mean(t0, z); logsumexp(z)')
getitem = reduce[0]
getitem_1 = reduce[1]
detach = torch.detach(getitem_1)
neg = -detach
add = getitem + neg
exp = torch.exp(add)
getitem_2 = reduce[2]
sub = torch.ops.aten.sub.Tensor(getitem_2, detach)
mul = exp * sub
neg_1 = -detach
add_1 = getitem + neg_1
exp_1 = torch.exp(add_1)
getitem_3 = reduce[3]
getitem_4 = reduce[4]
sub_1 = torch.ops.aten.sub.Tensor(getitem_3, getitem_4)
mul_1 = exp_1 * sub_1
sub_2 = torch.ops.aten.sub.Tensor(mul, mul_1)
flatten = torch.flatten(sub_2, 1)
sum_1 = torch.sum(flatten, 1)
mean = torch.mean(sum_1, 0)
to = mean.to(torch.float32)
return (to,)
""",
    )


def test_graph_of_two_passes():
    def total_variation(student, teacher):
        return (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1).mean()

    assert_expected_inline(
        rewritten_graph(loss_of_two(total_variation), *HEADS),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_other_, l_second_], 'logsumexp(p0); logsumexp(z)')
getitem = reduce[1]
to = torch_Tensor_to(getitem, torch.float32)
sub_1 = getitem - to
nan_to_num = torch.nan_to_num(sub_1, 0.0, 0.0, 0.0)
detach = torch.detach(nan_to_num)
getitem_1 = reduce[0]
to_1 = torch_Tensor_to(getitem_1, torch.float32)
sub_2 = getitem_1 - to_1
nan_to_num_1 = torch.nan_to_num(sub_2, 0.0, 0.0, 0.0)
detach_1 = torch.detach(nan_to_num_1)
reduce_1 = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [getitem, detach, l_other_, l_second_, getitem_1, detach_1], 't0 = sub.Tensor(z, r0); t1 = sub.Tensor(t0, r1); t2 = exp(t1); t3 = sub.Tensor(p2, r4); t4 = sub.Tensor(t3, r5); t5 = exp(t4); t6 = sub.Tensor(t2, t5); t7 = abs(t6); sum(t7)')
getitem_2 = reduce_1[0]
sum_2 = torch.sum(getitem_2, (2,), keepdim = False)
to_2 = sum_2.to(torch.float32)
mean = to_2.mean()
return (mean,)
""",
    )


def square(student, teacher):
    return F.cross_entropy((student - teacher).square().flatten(0, 1), TARGET.flatten())


def beside_a_loss(student, teacher):
    losses = [F.cross_entropy(each.flatten(0, 1), TARGET.flatten()) for each in (student, teacher)]
    return sum(losses) + reverse_kl(student, teacher)


def shifted(student, teacher):
    return forward_kl(student[:, :-1] / 2, teacher[:, 1:] / 2)


def other_shape(student, teacher):
    return forward_kl(student.view(-1, 50), teacher.flatten(0, 1).float())


def contrasted(student, teacher):
    """Contrastive decoding, as a loss."""
    return F.cross_entropy((1.5 * student - 0.5 * teacher).flatten(0, 1), TARGET.flatten())


def masked(student, teacher):
    hole = torch.arange(50) == 8
    teacher = teacher.masked_fill(hole, -torch.inf)
    return forward_kl(student.masked_fill(TARGET.unsqueeze(-1) == 7, 0.5), teacher.detach())


def in_place(student, teacher):
    student -= teacher
    return F.cross_entropy(student.flatten(0, 1), TARGET.flatten())


def scaled_rows(student, teacher):
    teacher = teacher * TARGET.unsqueeze(-1)
    return reverse_kl(student[:, 1:], teacher[:, :-1])


def two_scales(student, teacher):
    return (student.log_softmax(-1) + teacher.sigmoid()).logsumexp(-1).mean()


def both_directions(student, teacher):
    return reverse_kl(student, teacher) + reverse_kl(teacher, student)


def capped(student, teacher):
    student, teacher = (30 * torch.tanh(each / 30) for each in (student, teacher))
    return forward_kl(student, teacher)


def reduced_before(student, teacher):
    """The teacher's logits are divided by a statistic of their rows."""
    return reverse_kl(student, teacher / teacher.amax(-1, keepdim=True).detach())


def greatest(student, teacher):
    return (student.softmax(-1) * teacher).amax(-1).sum()


def weighted_by_confidence(student, teacher):
    confidence = teacher.softmax(-1).amax(-1)
    kl = F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    )
    return (kl.sum(-1) * confidence).mean()


def jensen_shannon(student, teacher):
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    divergences = (student.exp() * (student - mixture), teacher.exp() * (teacher - mixture))
    return 0.5 * sum(each.sum(-1).mean() for each in divergences)


def trained_targets(student, teacher):
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1).detach(), reduction="sum")


LOSSES = [
    *(forward_kl, reverse_kl, square, beside_a_loss, shifted, other_shape, contrasted, masked),
    *(in_place, scaled_rows, two_scales, both_directions, capped, reduced_before, greatest),
    *(weighted_by_confidence, jensen_shannon, trained_targets),
]
TWO_PASSES = (two_scales, greatest, jensen_shannon, square)
"""Their gradients are rounded twice, see the limits in the README."""

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


@every_loss
@pytest.mark.parametrize("teacher", ["trained", "frozen", "in no_grad"])
def test_numbers(loss, teacher):
    def fn(input, weight, other, second):
        with torch.set_grad_enabled(teacher != "in no_grad"):
            logits = F.linear(other, second)
        return loss(F.linear(input, weight), logits)

    heads = [each.detach() for each in HEADS[2:]] if teacher == "frozen" else HEADS[2:]
    arguments = (INPUT, WEIGHT, *heads)
    (module,) = capture(fn, *arguments)
    reports = rewrite(module, Options(min_logits_bytes=0, on_error="raise"))
    assert all(report.rewritten for report in reports), "\n".join(map(str, reports))
    assert "linear" not in code(module)
    assert_as_accurate_as_eager(fn, *arguments, slack=3.0 if loss in TWO_PASSES else 1.5)


def test_each_head_is_multiplied_once():
    """The teacher's divergence, which begins with the teacher's logits, reads the student's."""
    graph = rewritten_graph(loss_of_two(jensen_shannon), *HEADS)
    programs = [line for line in graph.splitlines() if "reduce.default" in line]
    assert all(len(set(re.findall(r"p\d+", program))) == 1 for program in programs)


def test_report_counts_both_heads():
    (report,) = reports_of(loss_of_two(reverse_kl), *HEADS)
    assert report.bytes_saved == 2 * (2 * 3 * 50 * 4)


def test_frozen_student():
    student = [each.detach() for each in HEADS[:2]]
    assert_as_accurate_as_eager(loss_of_two(reverse_kl), *student, *HEADS[2:], slack=1.5)


def test_bias():
    def fn(input, weight, other, second, bias):
        return reverse_kl(F.linear(input, weight), F.linear(other, second, bias))

    assert "q0" in rewritten_graph(fn, *HEADS, BIAS)
    assert_as_accurate_as_eager(fn, *HEADS, BIAS, slack=1.5)


def test_other_rows_of_the_same_head():
    """R-Drop, with both passes in one batch."""

    def fn(input, weight):
        first, second = F.linear(input, weight).chunk(2)
        return reverse_kl(first, second) + reverse_kl(second, first)

    assert "linear" not in rewritten_graph(fn, INPUT, WEIGHT)
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, slack=1.5)


def test_three_heads():
    def fn(input, weight, other, second, bias):
        first, another = F.linear(input, weight), F.linear(other, second)
        third = F.linear(input * 2, weight, bias)
        mixture = (first.softmax(-1) + another.softmax(-1) + third.softmax(-1)) / 3
        return F.nll_loss(mixture.log().flatten(0, 1), TARGET.flatten())

    assert "linear" not in rewritten_graph(fn, *HEADS, BIAS)
    assert_as_accurate_as_eager(fn, *HEADS, BIAS, slack=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    arguments = [each.detach().to(dtype).requires_grad_() for each in HEADS]
    assert_as_accurate_as_eager(
        loss_of_two(lambda s, t: reverse_kl(s.float(), t.float())), *arguments
    )


def test_autocast():
    def fn(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of_two(lambda s, t: reverse_kl(s.float(), t.float()))(*arguments)

    assert_as_accurate_as_eager(fn, *HEADS)


def test_dtypes_of_their_own():
    teacher = [each.detach().to(torch.bfloat16) for each in HEADS[2:]]
    fn = loss_of_two(lambda s, t: reverse_kl(s, t.float()))
    assert_as_accurate_as_eager(fn, *HEADS[:2], *teacher, slack=1.5)


def test_dynamic_rows():
    fn = loss_of_two(reverse_kl)
    compiled = torch.compile(
        fn, backend="cce_inductor_eager", dynamic=True, options={"min_logits_bytes": 0}
    )
    for rows in (2, 5, 7):
        heads = (torch.randn(rows, 3, 8), WEIGHT, torch.randn(rows, 3, 5), SECOND)
        torch.testing.assert_close(compiled(*heads), fn(*heads))


# Heads that are stored


def test_teacher_that_is_stored_is_read():
    """Something needs the teacher's logits. The student's still need not be stored."""

    def fn(input, weight, other, second):
        teacher = F.linear(other, second).detach()
        return forward_kl(F.linear(input, weight), teacher), teacher.sort().values

    (module,) = capture(fn, *HEADS)
    report, *others = rewrite(module, Options(min_logits_bytes=0, on_error="raise"))
    assert report.rewritten
    assert not others
    graph = code(module)
    assert graph.count("linear(") == 1
    assert "b0" in graph
    assert_as_accurate_as_eager(fn, *HEADS, slack=1.5)


def test_trained_teacher_that_is_stored_keeps_the_student():
    def fn(input, weight, other, second):
        teacher = F.linear(other, second)
        return reverse_kl(F.linear(input, weight), teacher), teacher.sort().values

    assert not any(report.rewritten for report in reports_of(fn, *HEADS))


def test_student_that_is_stored_keeps_the_teacher():
    def fn(input, weight, other, second):
        student = F.linear(input, weight)
        return reverse_kl(student, F.linear(other, second)), student.sort().values

    assert not any(report.rewritten for report in reports_of(fn, *HEADS))


def test_vocabularies_of_other_dimensions():
    """The rows of one are the vocabulary of the other."""

    def fn(input, weight, other, second):
        return F.cross_entropy(input @ weight.T + (other @ second.T).T, torch.arange(3))

    square = [torch.randn(3, 3, requires_grad=True) for _ in range(4)]
    assert reason_against(fn, *square)


def test_change_of_a_weight_between_the_products():
    def fn(input, weight, other, second):
        teacher = F.linear(other, second)
        with torch.no_grad():
            second += 1
        return reverse_kl(F.linear(input, weight), teacher)

    frozen = [each.detach().clone() for each in HEADS[2:]]
    reports = reports_of(fn, *HEADS[:2], *frozen)
    assert reports
    assert all(MAY_CHANGE in report.reason for report in reports)


# Gradients that are off


UNDER_NO_GRAD = {
    "temperature": lambda z, operand: z / operand[0],
    "added bias": lambda z, operand: z + operand,
    "scale of columns": lambda z, operand: z * operand,
    "scale of rows": lambda z, operand: z * operand[:3, None],
    "in place": lambda z, operand: z.clone().add_(operand),
    "stacked": lambda z, operand: torch.stack([z, z * operand[1]]).logsumexp(0),
}


@pytest.mark.parametrize("change", UNDER_NO_GRAD.values(), ids=UNDER_NO_GRAD)
def test_trained_operand_in_no_grad_has_no_gradient(change):
    def fn(input, weight, other, second, operand):
        with torch.no_grad():
            teacher = change(F.linear(other, second), operand)
        return forward_kl(F.linear(input, weight), teacher)

    assert_as_accurate_as_eager(fn, *HEADS, BIAS, slack=1.5)
    assert_as_accurate_as_eager(fn, *HEADS[:2], *(each.detach() for each in HEADS[2:]), BIAS)


def test_statistic_that_is_first_read_in_no_grad():
    """It is computed where gradients are on, because a loss reads it later."""

    def fn(input, weight, other, second):
        logits = F.linear(other, second).softmax(-1).log_softmax(-1) - F.linear(input, weight)
        with torch.no_grad():
            total = logits.logsumexp(-1).mean()
        return logits.logsumexp(-1).sum() + total

    assert_as_accurate_as_eager(fn, *HEADS, slack=3.0)


def test_statistic_that_can_only_be_computed_in_no_grad():
    def fn(input, weight):
        probabilities = F.linear(input, weight).softmax(-1)
        with torch.no_grad():
            scale = input.detach().sum(-1, keepdim=True).cumsum(1)
            shift = (probabilities * scale).log_softmax(-1).amax(-1, keepdim=True)
        return (probabilities.log_softmax(-1) * 3 - shift).exp().sum()

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, slack=4.0)


def test_row_mask_of_the_second_head():
    rows = torch.tensor([[True, False, True], [False, True, False]]).unsqueeze(-1)

    def fn(input, weight, other, second):
        teacher = F.linear(other, second)
        teacher.mul_(2)
        masked = teacher.masked_fill(rows, 0.5)
        return teacher.logsumexp(-1).sum() + forward_kl(F.linear(input, weight), masked)

    assert "linear" not in rewritten_graph(fn, *HEADS)
    assert_as_accurate_as_eager(fn, *HEADS, slack=1.5)


def test_heads_of_a_loss_without_a_pointwise_derivative_are_all_left_alone(monkeypatch):
    """Such a loss is found after the walk. The in-place change must not be lost."""

    def fn(input, weight, other, second):
        teacher = F.linear(other, second)
        teacher.mul_(2)
        return teacher.logsumexp(-1).sum() + forward_kl(F.linear(input, weight), teacher)

    def check(group):
        if any("p" in name for name in map(str, group.program.operands)):
            raise NotPointwiseError("for the test")

    monkeypatch.setattr(Group, "check_derivative", check)
    assert not any(report.rewritten for report in reports_of(fn, *HEADS))
