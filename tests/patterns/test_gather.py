"""One entry, or some, of each row: ``gather``, ``take_along_dim``, index tensors, a diagonal."""

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
    fn = beside_a_loss(lambda x, t: x.gather(1, t[:, None]))
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
getitem = l_target_[(slice(None, None, None), None)]
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_, getitem], 'logsumexp(z); target(z, r0, -100); gather(z, r1)')
getitem_1 = reduce[0]
getitem_2 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_1, getitem_2, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
getitem_3 = reduce[2]
to = getitem_3.to(torch.float32)
return (cross_entropy_1, to)
""",
    )


def test_graph_of_index_tensors():
    def fn(input, weight, target):
        log_probs = F.linear(input, weight).log_softmax(-1)
        return -log_probs[torch.arange(6), target].mean()

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
arange = torch.arange(6)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'index(z, r0); logsumexp(z)')
getitem_1 = reduce[0]
getitem_2 = reduce[1]
sub = torch.ops.aten.sub.Tensor(getitem_1, getitem_2)
squeeze = torch.squeeze(sub, 1)
to = squeeze.to(torch.float32)
mean = to.mean()
neg = -mean
return (neg,)
""",
    )


PERMUTED = torch.tensor([5, 4, 3, 2, 1, 0])
SPELLINGS = {
    "gather": lambda x, t: x.gather(1, t[:, None]),
    "torch.gather": lambda x, t: torch.gather(x, -1, t[:, None]).squeeze(-1),
    "gather, several": lambda x, t: x.gather(1, torch.stack([t, t % 3, t * 0], 1)),
    "gather of log_softmax": lambda x, t: x.log_softmax(-1).gather(-1, t[:, None]),
    "gather of softmax": lambda x, t: x.softmax(-1).gather(-1, t[:, None]),
    "gather of transposed logits": lambda x, t: x.T.gather(0, t[None]),
    "gather of rows": lambda x, t: x.gather(0, PERMUTED[:, None].expand(6, 50)).logsumexp(-1),
    "take_along_dim, from the end": lambda x, t: x.take_along_dim(t[:, None] - 50, 1),
    "take_along_dim": lambda x, t: x.take_along_dim(t[:, None], 1),
    "torch.take_along_dim": lambda x, t: torch.take_along_dim(x, t[:, None], dim=1),
    "index tensors": lambda x, t: x[torch.arange(6), t],
    "index tensors, a step": lambda x, t: x[torch.arange(0, 6, 2), t[:3]],
    "index tensors, int32": lambda x, t: x[torch.arange(6), t.int()],
    "index tensors, from the end": lambda x, t: x[torch.arange(6), t - 50],
    "index tensors, rows in another order": lambda x, t: x[PERMUTED, t],
    "index tensors, one row twice": lambda x, t: x[torch.tensor([1, 1]), t[:2]],
    "index tensors, from a start": lambda x, t: x[torch.arange(0, 6, device=t.device), t],
    "index tensors, keywords": lambda x, t: x[torch.arange(end=6).to(t), t],
    "a range": lambda x, t: x[range(6), t],
    "a list": lambda x, t: x[[0, 1, 2, 3, 4, 5], t],
    "three dimensions": lambda x, t: x.view(2, 3, 50)[
        torch.arange(2)[:, None].expand(2, 3), torch.arange(3).expand(2, 3), t.view(2, 3)
    ],
}


@pytest.mark.parametrize("reduce", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(reduce):
    assert_as_accurate_as_eager(beside_a_loss(reduce), INPUT, WEIGHT, TARGET, slack=2)


def test_alone():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        return logits.logsumexp(-1) - logits.gather(1, target[:, None])[:, 0]

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


DIAGONALS = {
    "diagonal": lambda x: x.diagonal(),
    "torch.diagonal": lambda x: torch.diagonal(x, 0, 0, 1),
    "the other way": lambda x: x.diagonal(dim1=-1, dim2=-2),
    "diag": lambda x: x.diag(),
    "torch.diag": lambda x: torch.diag(x, diagonal=0),
    "linalg.diagonal": lambda x: torch.linalg.diagonal(x),
    "one index twice": lambda x: (lambda i: x[i, i])(torch.arange(x.size(0), device=x.device)),
    "diagonal of log_softmax": lambda x: x.log_softmax(-1).diagonal(),
}


@pytest.mark.parametrize("diagonal", DIAGONALS.values(), ids=DIAGONALS)
def test_diagonal(diagonal):
    def fn(first, second):
        similarity = first @ second.T
        return F.cross_entropy(similarity, torch.arange(6)), diagonal(similarity)

    assert_as_accurate_as_eager(fn, INPUT, torch.randn(6, 8, requires_grad=True))


def test_diagonal_of_more_classes_than_rows():
    def fn(first, second):
        similarity = first @ second.T
        loss = F.cross_entropy(similarity, torch.arange(6))
        similarity.t().diagonal().sub_(0.5)
        return loss, similarity.diagonal(), similarity.logsumexp(1)

    assert_as_accurate_as_eager(fn, INPUT, torch.randn(9, 8, requires_grad=True))


OTHER_DIAGONALS = [
    (lambda x: x.diagonal(1), reasons.NOT_THE_DIAGONAL_OF_A_MATRIX.sentence),
    (lambda x: x[:, :4].diagonal(), reasons.DIAGONAL_WITHOUT_SOME_ROWS.sentence),
    (lambda x: x.diag(-1), reasons.NOT_THE_DIAGONAL_OF_A_MATRIX.sentence),
]


@pytest.mark.parametrize(("diagonal", "why"), OTHER_DIAGONALS)
def test_other_diagonals_are_left_alone(diagonal, why):
    def fn(first, second):
        similarity = first @ second.T
        return F.cross_entropy(similarity, torch.arange(6)), diagonal(similarity)

    for report in reports_of(fn, INPUT, torch.randn(6, 8, requires_grad=True)):
        assert report.reason.endswith(f": {why}")


LEFT_ALONE = {
    "fewer rows": (
        lambda x, t: x.gather(1, t[:3, None]),
        "gather",
        reasons.INDEX_WITHOUT_ROWS.sentence,
    ),
    "rows that differ in the vocabulary": (
        lambda x, t: x.gather(0, torch.zeros(6, 50, dtype=torch.int64)),
        "gather",
        reasons.INDEX_MAY_DIFFER_IN_VOCABULARY.sentence,
    ),
    "from all logits": (
        lambda x, t: x.take_along_dim(t),
        "take_along_dim",
        reasons.TAKES_FROM_ALL.sentence,
    ),
    "index tensors of two shapes": (
        lambda x, t: x[torch.arange(6)[:, None], t],
        "getitem",
        reasons.INDEX_IS_BROADCAST.sentence,
    ),
    "one row": (
        lambda x, t: x[torch.tensor([2]), t],
        "getitem",
        reasons.INDEX_IS_BROADCAST.sentence,
    ),
    "one entry": (
        lambda x, t: x[torch.arange(6), 3],
        "getitem",
        reasons.SELECTS_SOME_ENTRIES.sentence,
    ),
}


@pytest.mark.parametrize(("reduce", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(reduce, name, why):
    for report in reports_of(beside_a_loss(reduce), INPUT, WEIGHT, TARGET):
        assert_used_by(report.reason, name, why)
