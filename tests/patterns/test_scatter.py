"""``scatter`` of one number to one entry of each row."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, loss_after, reason_against, rewritten_graph
from expecttest import assert_expected_inline

torch.manual_seed(0)
INPUT = torch.randn(2, 3, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


INDEX = torch.tensor([[[1], [2], [3]], [[4], [5], [6]]])


def test_graph():
    def fn(input, weight, target, index):
        logits = F.linear(input, weight).scatter(-1, index, -torch.inf)
        return F.cross_entropy(logits.view(-1, 50), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET, INDEX),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_index_, l_target_], 't0 = eq.Tensor(j, r0); t1 = where.ScalarSelf(t0, -inf, z); logsumexp(t1); target(t1, r1, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


SPELLINGS = {
    "scatter": lambda x: x.scatter(-1, INDEX, -3.0),
    "scatter, keyword": lambda x: x.scatter(2, INDEX, value=-3.0),
    "scatter_": lambda x: x.scatter_(-1, INDEX, -3.0),
    "torch.scatter": lambda x: torch.scatter(x, -1, INDEX, -3.0),
    "a one-hot": lambda x: x + torch.zeros_like(x).scatter(-1, INDEX, 1.0),
    "a one-hot, in place": lambda x: x + torch.zeros_like(x).scatter_(-1, INDEX, 1.0),
    "of scaled logits": lambda x: (x * 2).scatter(-1, INDEX, -3.0) / 3,
    "of flat logits": lambda x: x.view(-1, 50).scatter(1, INDEX.view(-1, 1), -3.0),
    "of transposed logits": lambda x: x.mT.scatter(1, INDEX.mT, -3.0).mT,
}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(change):
    assert_as_accurate_as_eager(loss_after(change), INPUT, WEIGHT, TARGET)


@pytest.mark.parametrize("index", [INDEX[:1], INDEX[:, :1]])
def test_index_of_fewer_rows(index):
    fn = loss_after(lambda x: x.scatter(-1, index, -3.0))
    torch.testing.assert_close(
        torch.compile(fn, backend="cce_inductor_eager", options={"min_logits_bytes": 0})(
            INPUT, WEIGHT, TARGET
        ),
        fn(INPUT, WEIGHT, TARGET),
    )


LEFT_ALONE = {
    "a tensor": (
        lambda x: x.scatter(-1, INDEX, torch.ones(2, 3, 1)),
        "scatter",
        "it scatters a tensor, or reduces",
    ),
    "a sum": (
        lambda x: x.detach().scatter(-1, INDEX, 2.0, reduce="add"),
        "scatter",
        "it scatters a tensor, or reduces",
    ),
    "several entries": (
        lambda x: x.scatter(-1, INDEX.expand(2, 3, 2), 2.0),
        "scatter",
        "it scatters to several entries of a row",
    ),
    "over the rows": (
        lambda x: x.scatter(1, INDEX.expand(2, 3, 50) % 3, 2.0),
        "scatter",
        "it scatters over the rows",
    ),
    "scatter_add": (
        lambda x: x.scatter_add(-1, INDEX, torch.ones(2, 3, 1)),
        "scatter_add",
        "it is not a pointwise function (aten.scatter_add.default)",
    ),
}


@pytest.mark.parametrize(("change", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(change, name, why):
    reason = reason_against(loss_after(change), INPUT, WEIGHT, TARGET)
    assert reason.startswith(f"the logits are used by {name} at ")
    assert reason.endswith(f": {why}")
