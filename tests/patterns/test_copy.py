"""`contiguous` and `clone`."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, rewritten_graph
from expecttest import assert_expected_inline

torch.manual_seed(0)
INPUT = torch.randn(2, 3, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def loss_after(copy):
    """The function whose logits go through `copy`."""

    def fn(input, weight, target):
        return F.cross_entropy(copy(F.linear(input, weight)).view(-1, 50), target)

    return fn


def test_graph():
    assert_expected_inline(
        rewritten_graph(loss_after(lambda x: x.contiguous().clone()), INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


SPELLINGS = {
    "contiguous": lambda x: x.contiguous(),
    "contiguous, its format": lambda x: x.contiguous(memory_format=torch.contiguous_format),
    "clone": lambda x: x.clone(),
    "clone, its format": lambda x: x.clone(memory_format=torch.preserve_format),
    "torch.clone": lambda x: torch.clone(x),
    "torch.clone, keyword": lambda x: torch.clone(input=x),
    "twice": lambda x: x.clone().contiguous().clone(),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(spelling):
    assert_as_accurate_as_eager(loss_after(spelling), INPUT, WEIGHT, TARGET)


def test_clone_changed_in_place_is_left_alone():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        other = logits.clone()
        other.zero_()
        return F.cross_entropy(logits.view(-1, 50), target) + other.sum()

    assert reason_against(fn, INPUT, WEIGHT, TARGET).startswith("the logits are used by zero_ at ")


@pytest.mark.parametrize(
    ("copy", "name"),
    [
        (lambda x: x.detach(), "detach"),
        (lambda x: x.repeat(1, 1, 1), "repeat"),
        (lambda x: torch.zeros_like(x).copy_(x), "copy_"),
    ],
)
def test_other_copies_are_left_alone(copy, name):
    reason = reason_against(loss_after(copy), INPUT, WEIGHT, TARGET)
    assert reason.startswith(f"the logits are used by {name} at ")
