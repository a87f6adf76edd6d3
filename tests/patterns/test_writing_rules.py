"""The examples in patterns/WRITING_RULES.md work as they stand there."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, beside_a_loss, loss_after, reason_against

from cce_inductor.patterns import language
from cce_inductor.patterns.language.tables import TABLES
from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, 1, 7, 7])


@pytest.fixture(scope="module")
def examples():
    """The namespaces of the guide's blocks of code; their rules are registered until the end."""
    guide = (Path(__file__).parents[2] / "patterns" / "WRITING_RULES.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    before = [dict(table._rules) for table in TABLES]
    projection, test, others = ({} for _ in blocks)
    exec(blocks[0], projection)
    exec(blocks[1], test)
    others.update(vars(language), F=F, reasons=reasons, torch=torch, Any=object)
    exec(blocks[2], others)
    yield test
    for table, rules in zip(TABLES, before, strict=True):
        table._rules = rules


def test_the_projection(examples):
    examples["test_graph"]()
    for project in examples["SPELLINGS"].values():
        examples["test_numbers"](project)
    examples["test_two_dimensions_of_classes_are_left_alone"]()


OTHERS = {
    "flipud": loss_after(torch.flipud),
    "count_nonzero": beside_a_loss(lambda z, t: z.relu().count_nonzero(-1)),
    "mse_loss": beside_a_loss(
        lambda z, t: F.mse_loss(z, F.linear(INPUT.detach() * 2, WEIGHT.detach()))
    ),
    "mse_loss, a sum": beside_a_loss(lambda z, t: F.mse_loss(z, z.detach() * 2, reduction="sum")),
    "mse_loss, no reduction": beside_a_loss(
        lambda z, t: F.mse_loss(z, z.detach() * 2, reduction="none").mean(-1)
    ),
    "eye": beside_a_loss(lambda z, t: (z * torch.eye(6, 50)).sum(-1)),
}


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("fn", OTHERS.values(), ids=OTHERS)
def test_the_other_tables(fn):
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


@pytest.mark.usefixtures("examples")
def test_near_miss():
    fn = loss_after(lambda z: z.t().flipud().t())
    assert str(reasons.MOVES_ELEMENTS) in str(reason_against(fn, INPUT, WEIGHT, TARGET))
