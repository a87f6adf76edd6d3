"""``torch.stack`` of several heads' logits, of which one is taken again."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, assert_used_by, reports_of, rewritten_graph
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
unsqueeze = torch.unsqueeze(l_input_, 2)
getitem_1 = unsqueeze[(slice(None, None, None), slice(None, None, None), 0, slice(None, None, None))]
reduce = torch.ops.cce_inductor.reduce.default(getitem_1, l_second_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem_2 = reduce[0]
getitem_3 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_2, getitem_3, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
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


MIXED = reasons.MIXES_PROJECTIONS.sentence
LEFT_ALONE = {
    "summed": (lambda heads: [torch.stack(heads).sum(0)] * 2, "sum", MIXED),
    "biased": (lambda heads: torch.stack(heads) + torch.ones(50), "add", MIXED),
    "flat": (lambda heads: torch.stack(heads).flatten(1, 2), "flatten", MIXED),
    "masked": (
        lambda heads: torch.stack(heads).masked_fill(torch.arange(50) > 49, 0),
        "masked_fill",
        reasons.STACK_WITH_TENSOR.sentence,
    ),
    "with something else": (
        lambda heads: torch.stack([*heads, torch.ones(2, 3, 50)]),
        "stack",
        reasons.STACKS_WITH_SOMETHING_ELSE.sentence,
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
