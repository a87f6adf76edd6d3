"""``einsum`` of logits with something like them, summed over the vocabulary."""

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
    fn = beside_a_loss(lambda x, t: torch.einsum("nv,nv->n", F.one_hot(t, 50).float(), x))
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
unsqueeze = torch.unsqueeze(l_target_, 1)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_, unsqueeze], 't0 = eq.Tensor(j, r1); t1 = where.Scalar(t0, 1.0, 0.0); t2 = mul.Tensor(t1, z); logsumexp(z); target(z, r0, -100); sum(t2)')
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
one_hot = torch._C._nn.one_hot(l_target_, 50)
getitem_2 = reduce[2]
squeeze = torch.squeeze(getitem_2, 1)
to = squeeze.to(torch.float32)
return (cross_entropy_1, to)
""",
    )


SPELLINGS = {
    "a tensor": lambda x, t: torch.einsum("nv,nv->n", torch.linspace(0, 1, 300).view(6, 50), x),
    "a list": lambda x, t: torch.einsum("nv,nv->n", [x, x / 2]),
    "an entropy": lambda x, t: torch.einsum("nv,nv->n", x.softmax(-1), x.log_softmax(-1)),
    "three dimensions": lambda x, t: torch.einsum(
        "bsv,bsv->bs", x.view(2, 3, 50), F.one_hot(t, 50).view(2, 3, 50).float()
    ),
}


@pytest.mark.parametrize("reduce", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(reduce):
    assert_as_accurate_as_eager(beside_a_loss(reduce), INPUT, WEIGHT, TARGET, slack=2)


NO_PRODUCT = reasons.NOT_A_PRODUCT_OF_SAME_SHAPE.sentence
NO_SUM = reasons.NOT_A_SUM_OVER_VOCABULARY.sentence
LEFT_ALONE = {
    "a vector": (lambda x, t: torch.einsum("nv,v->n", x, torch.ones(50)), "einsum", NO_PRODUCT),
    "other rows": (lambda x, t: torch.einsum("nv,mv->nm", x, x), "einsum", NO_PRODUCT),
    "three": (lambda x, t: torch.einsum("nv,nv,nv->n", x, x, x), "einsum", NO_PRODUCT),
    "of everything": (lambda x, t: torch.einsum("nv,nv->", x, x), "einsum", NO_SUM),
    "of rows": (lambda x, t: torch.einsum("nv,nv->v", x, x), "einsum", NO_SUM),
    "of nothing": (lambda x, t: torch.einsum("nv,nv->nv", x, x), "einsum", NO_SUM),
}


@pytest.mark.parametrize(("reduce", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(reduce, name, why):
    for report in reports_of(beside_a_loss(reduce), INPUT, WEIGHT, TARGET):
        assert_used_by(report.reason, name, why)


def logaddexp(q, k, queue):
    positive = torch.einsum("nc,nc->n", q, k)
    return (torch.logaddexp(positive, (q @ queue).logsumexp(1)) - positive).mean()


def with_a_column(q, k, queue):
    positive = torch.einsum("n c, n c -> n", [q, k]).unsqueeze(1)
    return F.cross_entropy(torch.cat([positive, q @ queue], 1), POSITIVE)


def of_heads(q, k, queue):
    query, key = F.linear(q, k), F.linear(k, k)
    return F.cross_entropy(query @ queue, POSITIVE) - torch.einsum("nc,nc->n", query, key).mean()


def of_a_square(q, k, queue):
    logits = q @ k.T
    return F.cross_entropy(logits, POSITIVE) - torch.einsum("nc,nc->n", q, k).mean()


POSITIVE = torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize("fn", [logaddexp, with_a_column, of_heads, of_a_square])
def test_product_of_rows_beside_logits(fn):
    """It is no projection, also where both have as many rows as hidden units."""
    q, k = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    assert_as_accurate_as_eager(fn, q, k, torch.randn(8, 40, requires_grad=True), slack=2)
