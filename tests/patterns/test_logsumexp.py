"""``logsumexp`` over the vocabulary."""

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


def test_graph_of_a_z_loss():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        z_loss = logits.logsumexp(-1).square().mean()
        return F.cross_entropy(logits, target) + 1e-4 * z_loss

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)')
getitem = reduce[0]
squeeze = torch.squeeze(getitem, 1)
to = squeeze.to(torch.float32)
square = to.square()
z_loss = square.mean()
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
mul = 0.0001 * z_loss
add = cross_entropy_1 + mul
return (add,)
""",
    )


SPELLINGS = {
    "logsumexp": lambda x, t: x.logsumexp(-1),
    "torch.logsumexp": lambda x, t: torch.logsumexp(x, 1),
    "torch.logsumexp, keywords": lambda x, t: torch.logsumexp(input=x, dim=-1),
    "torch.special.logsumexp": lambda x, t: torch.special.logsumexp(x, (-1,)),
    "keepdim": lambda x, t: x.logsumexp(-1, keepdim=True),
    "of scaled logits": lambda x, t: (x / 2).logsumexp(-1),
    "of log_softmax": lambda x, t: x.log_softmax(-1).logsumexp(-1) + 1,
    "of transposed logits": lambda x, t: x.T.logsumexp(0),
    "of detached logits": lambda x, t: x.detach().logsumexp(-1),
    "of a constant": lambda x, t: torch.ones_like(x).logsumexp(-1),
    "of rows": lambda x, t: x.logsumexp(0),
    "of some rows": lambda x, t: x[1:].logsumexp(-1),
}


@pytest.mark.parametrize("reduce", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(reduce):
    assert_as_accurate_as_eager(beside_a_loss(reduce), INPUT, WEIGHT, TARGET, slack=2)


def test_alone():
    assert_as_accurate_as_eager(lambda x, w: F.linear(x, w).logsumexp(-1), INPUT, WEIGHT)


LEFT_ALONE = {
    "of rows": (
        lambda x, t: (x + torch.arange(50)).logsumexp(0),
        "logsumexp",
        reasons.REDUCES_ROWS.sentence,
    ),
    "of everything": (
        lambda x, t: x.logsumexp((0, 1)),
        "logsumexp",
        reasons.REDUCES_ROWS_AND_VOCABULARY.sentence,
    ),
    "logcumsumexp": (
        lambda x, t: x.logcumsumexp(-1),
        "logcumsumexp",
        str(reasons.not_pointwise("aten.logcumsumexp.default")),
    ),
}


@pytest.mark.parametrize(("reduce", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(reduce, name, why):
    for report in reports_of(beside_a_loss(reduce), INPUT, WEIGHT, TARGET):
        assert_used_by(report.reason, name, why)
