"""A bias that is added after the projection."""

import operator

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, reports_of, rewritten_graph
from expecttest import assert_expected_inline

from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(2, 3, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
BIAS = torch.randn(50, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def loss_after(add):
    """The function whose logits, [2, 3, 50], and bias go through `add`."""

    def fn(input, weight, bias, target):
        return F.cross_entropy(add(F.linear(input, weight), bias).view(-1, 50), target)

    return fn


def test_graph():
    def fn(input, weight, bias, target):
        return F.cross_entropy((F.linear(input, weight) + bias).view(-1, 50), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, BIAS, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, l_bias_, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_a_bias_with_more_dimensions():
    def fn(input, weight, bias, target):
        return F.cross_entropy((F.linear(input, weight) + bias).view(-1, 50), target)

    bias = BIAS.detach().view(1, 1, 50).requires_grad_()
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, bias, TARGET),
        """\
reshape = torch.reshape(l_bias_, (-1,))
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, reshape, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


SPELLINGS = {
    "x + b": lambda x, b: x + b,
    "b + x": lambda x, b: b + x,
    "x.add": lambda x, b: x.add(b),
    "b.add": lambda x, b: b.add(x),
    "x.__add__": lambda x, b: x.__add__(b),
    "x.__radd__": lambda x, b: x.__radd__(b),
    "operator.add": lambda x, b: operator.add(x, b),
    "torch.add": lambda x, b: torch.add(x, b),
    "torch.add, keywords": lambda x, b: torch.add(other=b, input=x, alpha=1),
    "one row": lambda x, b: x + b[None],
    "one row of one sequence": lambda x, b: x + b.view(1, 1, 50),
    "expression": lambda x, b: x + b.exp() * 2,
    "after a view": lambda x, b: x.view(-1, 50) + b,
    "after a slice": lambda x, b: x[:, :] + b,
    "after a cast": lambda x, b: x.float() + b,
    "before a scale": lambda x, b: (x + b) * 0.5,
    "before a softcap": lambda x, b: 3 * torch.tanh((x + b) / 3),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(spelling):
    assert_as_accurate_as_eager(loss_after(spelling), INPUT, WEIGHT, BIAS, TARGET)


def test_rows_in_another_order_before_the_bias():
    def fn(input, weight, bias, target):
        logits = F.linear(input, weight)[:, :-1].transpose(0, 1).reshape(-1, 50) + bias
        return F.cross_entropy(logits, target, reduction="none")

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, BIAS, TARGET[:4])


def test_wider_bias():
    def fn(input, weight, bias, target):
        logits = F.linear(input, weight) + bias
        return F.cross_entropy(logits.view(-1, 50), target)

    input, weight = (t.detach().bfloat16().requires_grad_() for t in (INPUT, WEIGHT))
    assert_as_accurate_as_eager(fn, input, weight, BIAS, TARGET)


def test_wider_bias_makes_the_loss_wider():
    def fn(input, weight, bias, target):
        return F.cross_entropy((F.linear(input, weight) + bias).view(-1, 50), target)

    bias = BIAS.detach().double().requires_grad_()
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, bias, TARGET)


def test_frozen_projection_with_a_trained_bias():
    def fn(input, weight, bias, target):
        return F.cross_entropy((F.linear(input, weight) + bias).view(-1, 50), target)

    assert_as_accurate_as_eager(fn, INPUT.detach(), WEIGHT.detach(), BIAS, TARGET)


def test_bias_before_transpose():
    def fn(input, weight, bias, target):
        logits = F.linear(input, weight) + bias
        return F.cross_entropy(logits.transpose(1, 2), target.view(2, 3))

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, BIAS, TARGET)


def test_dynamic_sizes():
    head = torch.nn.Linear(8, 50, bias=False)
    bias = torch.nn.Parameter(torch.randn(50))

    def fn(input, target):
        return F.cross_entropy((head(input) + bias).view(-1, 50), target)

    (report,) = reports_of(fn, INPUT, TARGET, dynamic=True)
    assert report.rewritten


ANYWHERE_ELSE = {
    "a value for each row": lambda x, b: x + torch.arange(6.0).view(2, 3, 1) * torch.arange(50),
    "a column": lambda x, b: (x + b[:3, None]).tanh(),
    "a matrix": lambda x, b: x + torch.linspace(-1, 1, 150).view(3, 50),
    "a number": lambda x, b: (x + 2).tanh(),
    "a tensor of no dimension": lambda x, b: (x + b[0]).tanh(),
    "a tensor of one element": lambda x, b: (x + b[:1]).tanh(),
    "a multiple": lambda x, b: torch.add(x, b, alpha=2),
    "a multiple of logits": lambda x, b: torch.add(b, x, alpha=2),
    "a second bias": lambda x, b: x + b + b * 2,
    "scaled logits": lambda x, b: x * 2 + b,
    "capped logits": lambda x, b: torch.tanh(x) + b,
    "the logits": lambda x, b: x + x,
    "other logits": lambda x, b: x + x * 2,
    "transposed logits": lambda x, b: (x.transpose(1, 2) + b[:3]).transpose(1, 2).tanh(),
    "transposed logits, a bias that fits": lambda x, b: (x.mT + b[:, None]).mT,
    "a difference": lambda x, b: x - b,
    "a difference from it": lambda x, b: b - x,
    "iadd": lambda x, b: operator.iadd(x, b),
    "add_": lambda x, b: x.add_(b),
    "add_, scaled logits": lambda x, b: (x * 2).add_(b, alpha=3),
}


@pytest.mark.parametrize("add", ANYWHERE_ELSE.values(), ids=ANYWHERE_ELSE)
def test_numbers_of_what_is_no_bias_of_the_projection(add):
    def fn(input, weight, bias, target):
        return F.cross_entropy(add(F.linear(input, weight), bias).reshape(-1, 50), target)

    # The gradient of one number is a sum of many that cancel.
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, BIAS, TARGET, slack=3)


def test_graph_of_a_bias_after_a_scale():
    fn = loss_after(lambda x, b: x * 2 + b)
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, BIAS, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_bias_, l_target_], 't0 = mul.Tensor(z, 2); t1 = add.Tensor(t0, c0); logsumexp(t1); target(t1, r1, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_a_value_for_each_row():
    fn = loss_after(lambda x, b: (x + b[:3, None]).tanh())
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, BIAS, TARGET),
        """\
getitem = l_bias_[(slice(None, 3, None), None)]
expand_rows = torch.ops.cce_inductor.expand_rows.default(getitem, l_input_, 2, 1)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [expand_rows, l_target_], 't0 = add.Tensor(z, r0); t1 = tanh(t0); logsumexp(t1); target(t1, r1, -100)', skip_ignored = True)
getitem_1 = reduce[0]
getitem_2 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_1, getitem_2, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


LEFT_ALONE = {
    "more logits": (lambda x, b: (x + torch.ones(2, 1, 1, 50))[0], "more dimensions"),
    "larger logits": (lambda x, b: x[:, :1] + torch.ones(3, 1), "does not broadcast to the logits"),
    "a matrix with a gradient": (lambda x, b: x + b.expand(3, 50), "requires a gradient"),
}


@pytest.mark.parametrize(("add", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(add, why):
    def fn(input, weight, bias, target):
        return F.cross_entropy(add(F.linear(input, weight), bias).reshape(-1, 50), target)

    reason = reason_against(fn, INPUT, WEIGHT, BIAS, TARGET)
    assert reason.startswith(f"{reasons.USED_BY} add at ")
    assert reason.endswith(why)
