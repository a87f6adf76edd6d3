"""Logits of several projections that become one, by ``cat`` or by a sum."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, reports_of, rewritten_graph
from expecttest import assert_expected_inline

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
OTHER = torch.randn(6, 8, requires_grad=True)
NARROW = torch.randn(6, 3, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
SECOND = torch.randn(50, 8, requires_grad=True)
ADAPTER = torch.randn(50, 3, requires_grad=True)
SCALE = torch.tensor(0.7, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def test_graph_of_chunks():
    def fn(input, weight, target):
        return F.cross_entropy(torch.cat([F.linear(c, weight) for c in input.split(2)]), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
split = l_input_.split(2)
c = split[0]
c_1 = split[1]
c_2 = split[2]
cat_1 = torch.cat((c, c_1, c_2), 0)
reduce = torch.ops.cce_inductor.reduce.default(cat_1, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem_3 = reduce[0]
getitem_4 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_3, getitem_4, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_an_adapter():
    def fn(input, narrow, weight, adapter, target):
        return F.cross_entropy(F.linear(input, weight) + 2 * F.linear(narrow, adapter), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, NARROW, WEIGHT, ADAPTER, TARGET),
        """\
mul_1 = torch.mul(l_narrow_, 2)
cat = torch.cat((l_input_, mul_1), 1)
cat_1 = torch.cat((l_weight_, l_adapter_), 1)
reduce = torch.ops.cce_inductor.reduce.default(cat, cat_1, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


ROWS = {
    "chunks": lambda x, y, w: torch.cat([F.linear(c, w) for c in x.split(2)]),
    "two inputs": lambda x, y, w: torch.cat([x[:2] @ w.T, y[2:] @ w.T]),
    "negative dimension": lambda x, y, w: torch.concat([x[:2] @ w.T, y[2:] @ w.T], dim=-2),
    "capped alike": lambda x, y, w: torch.cat([(z @ w.T / 3).tanh() * 3 for z in (x[:2], y[2:])]),
    "cast and reshaped": lambda x, y, w: torch.cat(
        [F.linear(z.view(1, 3, 8), w).double().view(3, 50) for z in (x[:3], y[3:])]
    ),
    "slices of rows": lambda x, y, w: torch.cat([(x @ w.T)[1:3], (y @ w.T)[2:]]),
}


@pytest.mark.parametrize("logits", ROWS.values(), ids=ROWS)
def test_rows(logits):
    def fn(input, other, weight, target):
        return F.cross_entropy(logits(input, other, weight), target)

    assert_as_accurate_as_eager(fn, INPUT, OTHER, WEIGHT, TARGET)


def test_vocabularies():
    def fn(input, weight, second, target):
        logits = torch.cat([F.linear(input, weight), F.linear(input, second)], -1)
        return F.cross_entropy(logits, target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, SECOND, TARGET)


SUMS = {
    "two heads": lambda x, y, n, w, v, a, s: F.linear(x, w) + F.linear(y, v),
    "adapter": lambda x, y, n, w, v, a, s: F.linear(x, w) + F.linear(n, a),
    "scaled": lambda x, y, n, w, v, a, s: F.linear(x, w) + 0.5 * F.linear(n, a),
    "divided": lambda x, y, n, w, v, a, s: F.linear(n, a) / 3 + F.linear(x, w),
    "learned scale": lambda x, y, n, w, v, a, s: F.linear(x, w) + s * F.linear(n, a),
    "in place": lambda x, y, n, w, v, a, s: F.linear(x, w).add_(F.linear(n, a)),
    "then capped": lambda x, y, n, w, v, a, s: (F.linear(x, w) + F.linear(n, a)).tanh(),
}


@pytest.mark.parametrize("logits", SUMS.values(), ids=SUMS)
def test_sums(logits):
    def fn(input, other, narrow, weight, second, adapter, scale, target):
        return F.cross_entropy(logits(input, other, narrow, weight, second, adapter, scale), target)

    assert_as_accurate_as_eager(fn, INPUT, OTHER, NARROW, WEIGHT, SECOND, ADAPTER, SCALE, TARGET)


LEFT_ALONE = {
    "two weights": lambda x, y, w, v: torch.cat([x[:2] @ w.T, y[2:] @ v.T]),
    "two functions": lambda x, y, w, v: torch.cat([x[:2] @ w.T, (y[2:] @ w.T).tanh()]),
    "something else": lambda x, y, w, v: torch.cat([x[:2] @ w.T, torch.ones(4, 50)]),
    "a product of two heads": lambda x, y, w, v: (x @ w.T) * (y @ v.T),
    "a sum under functions": lambda x, y, w, v: (x @ w.T).tanh() + (y @ v.T).tanh(),
}


@pytest.mark.parametrize("logits", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(logits):
    def fn(input, other, weight, second, target):
        return F.cross_entropy(logits(input, other, weight, second), target)

    assert reason_against(fn, INPUT, OTHER, WEIGHT, SECOND, TARGET)


def test_a_part_that_is_used_elsewhere_keeps_all():
    def fn(input, other, weight, target):
        first, second = input @ weight.T, other @ weight.T
        return F.cross_entropy(torch.cat([first, second]), target.repeat(2)), first.sort().values

    (report,) = reports_of(fn, INPUT, OTHER, WEIGHT, TARGET)
    assert not report.rewritten
    assert "used by sort" in report.reason
