"""``sum`` and ``mean`` over the vocabulary, or over everything."""

import pytest
import torch
import torch.nn.functional as F
from checks import (
    assert_as_accurate_as_eager,
    assert_used_by,
    beside_a_loss,
    reports_of,
    rewritten_graph,
)
from expecttest import assert_expected_inline

from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, 1, 7, 7])


def test_graph():
    fn = beside_a_loss(lambda x, t: x.square().sum(-1))
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 't0 = pow.Tensor_Scalar(z, 2); logsumexp(z); target(z, r0, -100); sum(t0)')
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
getitem_2 = reduce[2]
sum_2 = torch.sum(getitem_2, (1,), keepdim = False)
to = sum_2.to(torch.float32)
return (cross_entropy_1, to)
""",
    )


def test_graph_of_a_mean_of_everything():
    fn = beside_a_loss(lambda x, t: x.mean())
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100); sum(z)')
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
getitem_2 = reduce[2]
mean_1 = torch.mean(getitem_2, (0, 1), keepdim = False)
div = torch.div(mean_1, 50)
to = div.to(torch.float32)
return (cross_entropy_1, to)
""",
    )


SPELLINGS = {
    "sum": lambda x, t: x.sum(-1),
    "sum of everything": lambda x, t: x.sum(),
    "sum of both dimensions": lambda x, t: x.sum((-1, 0)),
    "sum of no dimension": lambda x, t: x.sum(()),
    "torch.sum": lambda x, t: torch.sum(x, dim=1, keepdim=True),
    "sum, dtype": lambda x, t: x.sum(-1, dtype=torch.float64).float(),
    "sum of squares": lambda x, t: x.square().sum(-1),
    "sum of exp": lambda x, t: x.exp().sum(-1).log(),
    "sum of softmax": lambda x, t: x.softmax(-1).sum(-1) * 2,
    "sum of a comparison": lambda x, t: (x > 0).sum(-1),
    "sum of all comparisons": lambda x, t: (x > 0).sum(),
    "sum of rows": lambda x, t: x.sum(0),
    "mean": lambda x, t: x.mean(-1),
    "mean of everything": lambda x, t: x.mean(),
    "mean of both dimensions": lambda x, t: x.mean((0, 1), keepdim=True),
    "torch.mean": lambda x, t: torch.mean(x, 1, True),
    "mean, dtype": lambda x, t: x.mean(-1, dtype=torch.float64).float(),
    "mean of a comparison": lambda x, t: (x > 0).float().mean(-1),
    "of a constant": lambda x, t: torch.ones_like(x).sum(-1),
}


@pytest.mark.parametrize("reduce", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(reduce):
    assert_as_accurate_as_eager(beside_a_loss(reduce), INPUT, WEIGHT, TARGET, slack=2)


def test_alone_it_is_no_loss():
    assert reports_of(lambda x, w: F.linear(x, w).square().sum(-1), INPUT, WEIGHT) == []


ROWS = reasons.REDUCES_ROWS.sentence
LEFT_ALONE = {
    "sum of rows": (lambda x, t: (x + torch.arange(50)).sum(0), "sum", ROWS),
    "mean of rows": (lambda x, t: (x * torch.arange(50)).mean(0), "mean", ROWS),
    "prod": (
        lambda x, t: x.prod(-1),
        "prod",
        str(reasons.not_pointwise("aten.prod.dim_int")),
    ),
    "var": (
        lambda x, t: x.var(-1, unbiased=False),
        "var",
        str(reasons.not_pointwise("aten.var.correction")),
    ),
}


@pytest.mark.filterwarnings("ignore:var:UserWarning")
@pytest.mark.parametrize(("reduce", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(reduce, name, why):
    for report in reports_of(beside_a_loss(reduce), INPUT, WEIGHT, TARGET):
        assert_used_by(report.reason, name, why)
