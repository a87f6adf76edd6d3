"""``scatter`` of a number, or of one value a row, to one entry of each row."""

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


INDEX = torch.tensor([[[1], [2], [3]], [[4], [5], [6]]])
VALUES = torch.tensor([[[1.0], [-2.0], [0.5]], [[4.0], [0.0], [-6.0]]])


def test_graph():
    def fn(input, weight, target, index):
        logits = F.linear(input, weight).scatter(-1, index, -torch.inf)
        return F.cross_entropy(logits.view(-1, 50), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET, INDEX),
        """\
arange = torch.arange(50, device = device(type='cpu'))
reshape = torch.reshape(arange, (1, 1, -1))
expand_rows = torch.ops.cce_inductor.expand_rows.default(reshape, l_index_, 2, 50)
gather = torch.gather(expand_rows, 2, l_index_)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [gather, l_target_], 't0 = eq.Tensor(j, r0); t1 = where.ScalarSelf(t0, -inf, z); logsumexp(t1); target(t1, r1, -100)', skip_ignored = True)
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
    "a truth value": lambda x: x.scatter(-1, INDEX, True),
    "one value a row": lambda x: x.scatter(-1, INDEX, VALUES.to(x.dtype)),
    "one value a row, keyword": lambda x: x.scatter_(dim=-1, index=INDEX, src=VALUES.to(x.dtype)),
    "one value a row, transposed": lambda x: x.mT.scatter(1, INDEX.mT, VALUES.mT.to(x.dtype)).mT,
    "computed from the entries": lambda x: x.scatter(-1, INDEX, x.gather(-1, INDEX) - 0.35),
    "a mask": lambda x: torch.where(bools(x, False).scatter_(-1, INDEX, True), x.cos(), x),
    "a mask by one": lambda x: x.masked_fill(bools(x, False).scatter(-1, INDEX, 1), 0.25),
    "a mask of the others": lambda x: torch.where(bools(x, True).scatter(-1, INDEX, 0), x, x * 2),
    "a mask, inverted": lambda x: torch.where(~bools(x, False).scatter_(-1, INDEX, True), x, -x),
}


def bools(logits, value):
    return torch.full_like(logits, value, dtype=torch.bool)


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(change):
    assert_as_accurate_as_eager(loss_after(change), INPUT, WEIGHT, TARGET)


def test_graph_of_a_margin():
    """What is computed from the entries is known after one pass, and read in a second one."""

    def fn(input, weight, target, index):
        logits = F.linear(input, weight)
        logits = logits.scatter(-1, index, logits.gather(-1, index) - 0.35)
        return F.cross_entropy(logits.view(-1, 50), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET, INDEX),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_index_], 'gather(z, r0)')
getitem = reduce[0]
to = getitem.to(torch.float32)
sub = to - 0.35
arange = torch.arange(50, device = device(type='cpu'))
reshape = torch.reshape(arange, (1, 1, -1))
expand_rows = torch.ops.cce_inductor.expand_rows.default(reshape, l_index_, 2, 50)
gather_1 = torch.gather(expand_rows, 2, l_index_)
reduce_1 = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [gather_1, sub, l_target_], 't0 = eq.Tensor(j, r0); t1 = where.self(t0, r1, z); logsumexp(t1); target(t1, r2, -100)', skip_ignored = True)
getitem_1 = reduce_1[0]
getitem_2 = reduce_1[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_1, getitem_2, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_gradient_of_the_values():
    def fn(input, weight, target, values):
        logits = F.linear(input, weight).scatter(-1, INDEX, values)
        return F.cross_entropy(logits.view(-1, 50), target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET, VALUES.clone().requires_grad_())


@pytest.mark.parametrize("wrong", [50, -1])
@pytest.mark.parametrize("value", [-3.0, VALUES], ids=["a number", "values"])
def test_index_out_of_bounds(wrong, value):
    def fn(input, weight, target, index):
        return F.cross_entropy(F.linear(input, weight).scatter(-1, index, value).mT, target)

    index, target = INDEX.clone(), torch.zeros(2, 3, dtype=torch.int64)
    index[1, 2] = wrong
    with pytest.raises(RuntimeError) as eager:
        fn(INPUT, WEIGHT, target, index)
    assert rewritten_graph(fn, INPUT, WEIGHT, target, INDEX)
    options = {"min_logits_bytes": 0}
    with pytest.raises(RuntimeError) as ours:
        torch.compile(fn, backend="cce_inductor_eager", options=options)(
            INPUT, WEIGHT, target, index
        )
    assert str(ours.value) == str(eager.value)


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
    "the first of several values": (
        lambda x: x.scatter(-1, INDEX, torch.ones(2, 3, 50)),
        "scatter",
        reasons.SCATTERS_NO_VALUE_PER_ROW.sentence,
    ),
    "the logits": (
        lambda x: x.scatter(-1, INDEX, x.cos()),
        "scatter",
        reasons.SCATTERS_NO_VALUE_PER_ROW.sentence,
    ),
    "a sum": (
        lambda x: x.detach().scatter(-1, INDEX, 2.0, reduce="add"),
        "scatter",
        reasons.SCATTER_REDUCES.sentence,
    ),
    "several entries": (
        lambda x: x.scatter(-1, INDEX.expand(2, 3, 2), 2.0),
        "scatter",
        reasons.SCATTERS_SEVERAL_ENTRIES.sentence,
    ),
    "over the rows": (
        lambda x: x.scatter(1, INDEX.expand(2, 3, 50) % 3, 2.0),
        "scatter",
        reasons.SCATTERS_OVER_ROWS.sentence,
    ),
    "scatter_add": (
        lambda x: x.scatter_add(-1, INDEX, torch.ones(2, 3, 1)),
        "scatter_add",
        str(reasons.not_pointwise("aten.scatter_add.default")),
    ),
}


@pytest.mark.parametrize(("change", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(change, name, why):
    assert_used_by(reason_against(loss_after(change), INPUT, WEIGHT, TARGET), name, why)
