"""``torch.stack`` of several heads' logits, of which one is taken again, or a sum of all."""

import pytest
import torch
import torch.nn.functional as F
from checks import (
    assert_as_accurate_as_eager,
    assert_used_by,
    reports_of,
    rewritten_graph,
)
from expecttest import assert_expected_inline

from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(2, 3, 8, requires_grad=True)
FIRST, SECOND = (torch.randn(50, 8, requires_grad=True) for _ in range(2))
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def losses_after(change):
    """The loss of two heads whose stacked logits, [2, 3, 50] each, go through `change`."""

    def fn(input, first, second, target):
        heads = change([F.linear(input, first), F.linear(input, second)])
        return sum(F.cross_entropy(heads[i].reshape(-1, 50), target) for i in range(2))

    return fn


def test_graph():
    def fn(input, first, second, target):
        heads = torch.stack([F.linear(input, first), F.linear(input, second)], 2)
        return F.cross_entropy(heads[:, :, 1].view(-1, 50), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, FIRST, SECOND, TARGET),
        """\
linear = torch._C._nn.linear(l_input_, l_first_)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_second_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem_1 = reduce[0]
getitem_2 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_1, getitem_2, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


SPELLINGS = {
    "first": torch.stack,
    "second": lambda heads: torch.stack(heads, 1).permute(1, 0, 2, 3),
    "from the end": lambda heads: torch.stack(heads, dim=-2).permute(2, 0, 1, 3),
    "transposed": lambda heads: torch.stack(heads, 1).transpose(0, 1),
    "cast": lambda heads: torch.stack(heads).float(),
    "contiguous": lambda heads: torch.stack(heads).contiguous(),
    "scaled": lambda heads: torch.stack(heads) / 2,
    "capped": lambda heads: 3 * torch.tanh(torch.stack(heads) / 3),
    "a slice of everything": lambda heads: torch.stack(heads)[:, :, :],
    "some rows": lambda heads: torch.stack(heads, 1)[:, :, :].transpose(0, 1),
}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(change):
    assert_as_accurate_as_eager(losses_after(change), INPUT, FIRST, SECOND, TARGET)


REDUCED = {
    "sum": lambda heads: torch.stack(heads).sum(0),
    "mean": lambda heads: torch.stack(heads, 1).mean(1),
    "mean that keeps the dimension": lambda heads: torch.stack(heads, 1).mean((1,), keepdim=True),
    "logsumexp": lambda heads: torch.logsumexp(torch.stack(heads, 2), dim=2),
    "logsumexp of log-probabilities": lambda heads: torch.stack(
        [head.log_softmax(-1) for head in heads]
    ).logsumexp(0),
    "of three heads": lambda heads: torch.stack([*heads, heads[0] * 2]).logsumexp(0),
    "with a tensor": lambda heads: torch.stack([torch.ones(2, 3, 50), *heads]).logsumexp(0),
    "scaled before": lambda heads: (torch.stack(heads) / 2).logsumexp(0),
    "rows taken before": lambda heads: torch.stack(heads)[:, :, :].sum(0),
    "of one head": lambda heads: torch.stack(heads[:1]).sum(0),
}


def loss_of_combined(reduce):
    def fn(input, first, second, target):
        logits = reduce([F.linear(input, first), F.linear(input, second)])
        return F.cross_entropy(logits.reshape(-1, 50), target)

    return fn


@pytest.mark.parametrize("reduce", REDUCED.values(), ids=REDUCED)
def test_reduced_to_one(reduce):
    fn = loss_of_combined(reduce)
    assert all(report.rewritten for report in reports_of(fn, INPUT, FIRST, SECOND, TARGET))
    # The gradients of two passes over the vocabulary are rounded twice.
    assert_as_accurate_as_eager(fn, INPUT, FIRST, SECOND, TARGET, slack=2.0)


def test_masked_in_every_head():
    """The gradient is nan, as that of `torch.logsumexp` is."""
    hole = torch.zeros(50).index_fill(0, torch.tensor([1, 8]), -torch.inf)
    fn = loss_of_combined(
        lambda heads: torch.stack([(head + hole).log_softmax(-1) for head in heads]).logsumexp(0)
    )
    assert_as_accurate_as_eager(fn, INPUT, FIRST, SECOND, TARGET.clamp(min=0), slack=2.0)


def test_graph_of_a_mixture():
    fn = loss_of_combined(lambda heads: torch.stack(heads).logsumexp(0))
    assert_expected_inline(
        rewritten_graph(fn, INPUT, FIRST, SECOND, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_first_, None, [l_input_, l_second_, l_target_], 't0 = logaddexp(z, p0); logsumexp(t0); target(t0, r2, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


MIXED = reasons.MIXES_PROJECTIONS.sentence
LEFT_ALONE = {
    "summed over rows": (lambda heads: [torch.stack(heads).sum(1)] * 2, "sum", MIXED),
    "summed over heads and rows": (
        lambda heads: [torch.stack(heads).sum((0, 1)).expand(2, 3, 50)] * 2,
        "sum",
        MIXED,
    ),
    "the greatest": (lambda heads: [torch.stack(heads).amax(0)] * 2, "amax", MIXED),
    "the greatest with its index": (
        lambda heads: [torch.stack(heads).max(0)[0]] * 2,
        "max",
        MIXED,
    ),
    "normalized over the heads": (lambda heads: torch.stack(heads).softmax(0), "softmax", MIXED),
    "biased": (lambda heads: torch.stack(heads) + torch.ones(50), "add", MIXED),
    "flat": (lambda heads: torch.stack(heads).flatten(1, 2), "flatten", MIXED),
    "masked": (
        lambda heads: torch.stack(heads).masked_fill(torch.arange(50) > 49, 0),
        "masked_fill",
        reasons.STACK_WITH_TENSOR.sentence,
    ),
    "with a tensor that has a gradient": (
        lambda heads: torch.stack([*heads, (FIRST.sum() * torch.ones(2, 3, 50)).cumsum(1)]),
        "stack",
        reasons.OPERAND_LARGE_WITH_GRADIENT.sentence,
    ),
    "several of them": (
        lambda heads: torch.stack(heads)[0:2],
        "getitem",
        reasons.TAKES_SEVERAL_PROJECTIONS.sentence,
    ),
}


@pytest.mark.parametrize(("change", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(change, name, why):
    for report in reports_of(losses_after(change), INPUT, FIRST, SECOND, TARGET):
        assert_used_by(report.reason, name, why)
