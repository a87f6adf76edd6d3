"""``log_softmax`` and ``softmax`` over the vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from checks import (
    assert_as_accurate_as_eager,
    assert_used_by,
    loss_after,
    reason_against,
    rewritten_graph,
)
from expecttest import assert_expected_inline

from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(2, 3, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def test_graph_of_log_softmax():
    def fn(input, weight, target):
        log_probs = F.linear(input, weight).log_softmax(-1)
        return -log_probs.gather(-1, target[..., None]).mean()

    target = TARGET.abs().view(2, 3) % 50
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, target),
        """\
getitem = l_target_[(Ellipsis, None)]
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [getitem], 'gather(z, r0); logsumexp(z)')
getitem_1 = reduce[0]
getitem_2 = reduce[1]
sub = torch.ops.aten.sub.Tensor(getitem_1, getitem_2)
to = sub.to(torch.float32)
mean = to.mean()
neg = -mean
return (neg,)
""",
    )


def test_graph_of_softmax():
    def fn(input, weight):
        return F.linear(input, weight).softmax(-1).square().sum(-1)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [], 'logsumexp(z)')
getitem = reduce[0]
to = torch_Tensor_to(getitem, torch.float32)
sub = getitem - to
nan_to_num = torch.nan_to_num(sub, 0.0, 0.0, 0.0)
detach = torch.detach(nan_to_num)
reduce_1 = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [getitem, detach], 't0 = sub.Tensor(z, r0); t1 = sub.Tensor(t0, r1); t2 = exp(t1); t3 = pow.Tensor_Scalar(t2, 2); sum(t3)')
getitem_1 = reduce_1[0]
sum_2 = torch.sum(getitem_1, (2,), keepdim = False)
to_1 = sum_2.to(torch.float32)
return (to_1,)
""",
    )


SPELLINGS = {
    "log_softmax": lambda x: x.log_softmax(-1),
    "torch.log_softmax": lambda x: torch.log_softmax(x, 2),
    "torch.special.log_softmax": lambda x: torch.special.log_softmax(x, -1),
    "F.log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "F.log_softmax, dtype": lambda x: F.log_softmax(x, -1, dtype=torch.float32),
    "F.log_softmax, double": lambda x: F.log_softmax(x, -1, dtype=torch.float64).float(),
    "LogSoftmax": lambda x: torch.nn.LogSoftmax(-1)(x),
    "no dimension": lambda x: F.log_softmax(x.view(-1, 50)),
    "of scaled logits": lambda x: (x / 2).log_softmax(-1) * 3,
    "twice": lambda x: x.log_softmax(-1).log_softmax(-1),
    "of transposed logits": lambda x: x.mT.log_softmax(1).mT,
    "softmax": lambda x: x.softmax(-1),
    "torch.softmax": lambda x: torch.softmax(x, -1),
    "torch.special.softmax": lambda x: torch.special.softmax(x, -1),
    "F.softmax": lambda x: F.softmax(x, -1),
    "Softmax": lambda x: torch.nn.Softmax(-1)(x),
    "log of softmax": lambda x: x.softmax(-1).log(),
    "scaled softmax": lambda x: (x / 2).softmax(-1) * 3,
}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning")
@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(change):
    assert_as_accurate_as_eager(loss_after(change), INPUT, WEIGHT, TARGET, slack=3)


ROWS = reasons.REDUCES_ROWS.sentence
LEFT_ALONE = {
    "log_softmax of rows": (lambda x: x.log_softmax(1), "log_softmax", ROWS),
    "softmax of rows": (lambda x: x.softmax(0), "softmax", ROWS),
    "part of a softmax": (
        lambda x: x.softmax(-1)[..., :49].repeat(1, 1, 2)[..., :50],
        "getitem",
        reasons.SELECTS_ENTRIES_OF_SOFTMAX.sentence,
    ),
}


@pytest.mark.parametrize(("change", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(change, name, why):
    assert_used_by(reason_against(loss_after(change), INPUT, WEIGHT, TARGET), name, why)
