"""Tensors that are made beside logits: their labels, their masks, another's dtype."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, reports_of

from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, 1, 7, 7])
COLUMN, WHOLE = torch.rand(6, 1), torch.rand(6, 50)

USES = {
    "labels": lambda x: F.cross_entropy(x, x.new_zeros(x.size(0), dtype=torch.long)),
    "labels of a class": lambda x: F.cross_entropy(x, x.new_full((6,), 3, dtype=torch.long)),
    "changed labels": lambda x: F.cross_entropy(x, x.new_zeros(6, dtype=torch.long).add_(1)),
    "weights": lambda x: (F.cross_entropy(x, TARGET, reduction="none") * x.new_ones(6)).mean(),
    "constant": lambda x: F.cross_entropy(x + x.new_full((6, 50), 2.0), TARGET),
    "one-hot": lambda x: F.cross_entropy(
        x - x.new_zeros(x.size()).scatter_(1, TARGET[:, None], 0.3), TARGET
    ),
    "expanded": lambda x: F.cross_entropy(x * COLUMN.expand_as(x), TARGET),
    "expanded mask": lambda x: F.cross_entropy(
        x.masked_fill((torch.arange(50) == 9).expand_as(x), float("-inf")), TARGET
    ),
    "cast mask": lambda x: F.cross_entropy(x + (torch.arange(50) > 9).type_as(x), TARGET),
    "cast to the logits": lambda x: F.cross_entropy(x * (COLUMN > 0.5).to(x), TARGET),
}


def of_logits(use):
    return lambda input, weight: use(F.linear(input, weight))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_rewritten(use):
    fn = of_logits(use)
    reports = reports_of(fn, INPUT, WEIGHT)
    assert reports
    assert all(report.rewritten for report in reports)
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT)


def expanded_and_changed(x):
    other = WHOLE.clone()
    other.expand_as(x).mul_(2)
    return F.cross_entropy(x + other, TARGET)


def cast_and_changed(x):
    other = COLUMN.clone()
    other.to(x).mul_(2)
    return F.cross_entropy(x * other, TARGET)


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (expanded_and_changed, reasons.RESULT_MAY_SHARE_MEMORY.sentence),
        (cast_and_changed, reasons.RESULT_MAY_SHARE_MEMORY.sentence),
    ],
)
def test_what_may_be_changed_in_two_places_is_left_alone(use, reason):
    assert reason in reason_against(of_logits(use), INPUT, WEIGHT)


def test_change_of_a_list_of_tensors_is_left_alone():
    def use(x):
        torch._foreach_mul_([x], 2.0)
        return F.cross_entropy(x, TARGET)

    assert "_foreach_mul_" in reason_against(of_logits(use), INPUT, WEIGHT)
