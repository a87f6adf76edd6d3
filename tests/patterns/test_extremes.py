"""``argmax``, ``max``, ``topk`` and their brothers."""

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


def test_graph_of_an_accuracy():
    fn = beside_a_loss(lambda x, t: torch.eq(x.argmax(-1), t).float().mean())
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100); max(z)')
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
getitem_2 = reduce[3]
squeeze = torch.squeeze(getitem_2, 1)
detach = torch.detach(squeeze)
eq = torch.eq(detach, l_target_)
float_1 = eq.float()
mean = float_1.mean()
return (cross_entropy_1, mean)
""",
    )


def test_graph_of_max():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        value, index = logits.softmax(-1).max(-1)
        return F.cross_entropy(logits, target), value, index

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'max(z); logsumexp(z); target(z, r0, -100)')
getitem_2 = reduce[0]
getitem_3 = reduce[2]
neg = -getitem_3
add = getitem_2 + neg
exp = torch.exp(add)
squeeze = torch.squeeze(exp, 1)
to = squeeze.to(torch.float32)
getitem_4 = reduce[1]
squeeze_1 = torch.squeeze(getitem_4, 1)
getitem_5 = reduce[3]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_3, getitem_5, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1, to, squeeze_1)
""",
    )


SPELLINGS = {
    "argmax": lambda x, t: x.argmax(-1),
    "torch.argmax": lambda x, t: torch.argmax(x, 1, keepdim=True),
    "argmax of log_softmax": lambda x, t: x.log_softmax(-1).argmax(-1),
    "argmin": lambda x, t: x.argmin(-1),
    "torch.argmin": lambda x, t: torch.argmin(x, dim=-1),
    "max": lambda x, t: x.max(-1).values,
    "max, its index": lambda x, t: x.max(-1)[1],
    "max, both": lambda x, t: tuple(x.max(dim=1)),
    "torch.max": lambda x, t: torch.max(x, 1, keepdim=True).values,
    "max of everything": lambda x, t: x.max(),
    "max of softmax": lambda x, t: x.softmax(-1).max(-1).values,
    "max of detached logits": lambda x, t: x.detach().max(-1).values,
    "amax": lambda x, t: x.amax(-1),
    "torch.amax": lambda x, t: torch.amax(x, (1,), True),
    "argmax of rows": lambda x, t: x.argmax(0),
    "topk": lambda x, t: x.topk(5).values,
    "topk, its indices": lambda x, t: x.topk(5).indices,
    "torch.topk": lambda x, t: torch.topk(x, 3, -1)[0],
    "topk, unsorted": lambda x, t: x.topk(3, sorted=False).values.sum(-1),
    "topk of log_softmax": lambda x, t: x.log_softmax(-1).topk(3).values,
    "topk of softmax": lambda x, t: x.softmax(-1).topk(3).values,
    "accuracy in the best five": lambda x, t: (x.topk(5)[1] == t[:, None]).any(-1).float().mean(),
}


@pytest.mark.parametrize("reduce", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(reduce):
    assert_as_accurate_as_eager(beside_a_loss(reduce), INPUT, WEIGHT, TARGET, slack=2)


def test_alone_it_is_no_loss():
    assert reports_of(lambda x, w: F.linear(x, w).argmax(-1), INPUT, WEIGHT) == []


ROWS = reasons.REDUCES_ROWS.sentence
BOTH = reasons.REDUCES_ROWS_AND_VOCABULARY.sentence
OTHER = str(reasons.not_pointwise(""))
LEFT_ALONE = {
    "argmax of rows": (lambda x, t: (x + torch.arange(50)).argmax(0), "argmax", ROWS),
    "argmax of everything": (lambda x, t: x.argmax(), "argmax", BOTH),
    "amax of everything": (lambda x, t: x.amax(), "amax", BOTH),
    "max of rows": (lambda x, t: (x * torch.arange(50)).max(0).values, "max", ROWS),
    "max with a tensor": (
        lambda x, t: torch.max(x, torch.zeros(50)),
        "max",
        reasons.TENSOR_INSTEAD_OF_DIMENSION.sentence,
    ),
    "the smallest": (
        lambda x, t: x.topk(3, largest=False).values,
        "topk",
        reasons.TAKES_THE_SMALLEST.sentence,
    ),
    "min": (lambda x, t: x.min(-1).values, "min", f"{OTHER} (aten.min.dim)"),
    "amin": (lambda x, t: x.amin(-1), "amin", f"{OTHER} (aten.amin.default)"),
    "median": (lambda x, t: x.median(-1).values, "median", f"{OTHER} (aten.median.dim)"),
}


@pytest.mark.parametrize(("reduce", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(reduce, name, why):
    for report in reports_of(beside_a_loss(reduce), INPUT, WEIGHT, TARGET):
        assert_used_by(report.reason, name, why)
