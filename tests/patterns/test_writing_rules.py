"""The examples in patterns/WRITING_RULES.md work as they stand there."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, beside_a_loss, loss_after, reason_against

from cce_inductor.patterns.language.tables import TABLES
from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, 1, 7, 7])


IMPORTS_OF_THE_OTHERS = """\
from typing import Any

import torch
import torch.nn.functional as F

from cce_inductor.patterns.language import *
from cce_inductor.reporting import reasons

"""


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The guide's blocks of code are imported; their rules are registered until the module ends."""
    text = (Path(__file__).parents[2] / "patterns" / "WRITING_RULES.md").read_text()
    rule, test, others = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    folder = tmp_path_factory.mktemp("guide")
    before = [dict(table._rules) for table in TABLES]
    imported(folder / "inner.py", rule)
    imported(folder / "others.py", IMPORTS_OF_THE_OTHERS + others)
    yield imported(folder / "test_inner.py", test)
    for table, rules in zip(TABLES, before, strict=True):
        table._rules = rules


def imported(file, source):
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_projection(guide):
    guide.test_graph()
    for project in guide.SPELLINGS.values():
        guide.test_numbers(project)
    guide.test_two_dimensions_of_classes_are_left_alone()


OTHERS = {
    "flipud": loss_after(torch.flipud),
    "count_nonzero": beside_a_loss(lambda z, t: z.relu().count_nonzero(-1)),
    "mse_loss, a sum": beside_a_loss(lambda z, t: F.mse_loss(z, z.detach() * 2, reduction="sum")),
    "mse_loss, no reduction": beside_a_loss(
        lambda z, t: F.mse_loss(z, z.detach() * 2, reduction="none").mean(-1)
    ),
    "eye": beside_a_loss(lambda z, t: (z * torch.eye(6, 50)).sum(-1)),
}


@pytest.mark.usefixtures("guide")
@pytest.mark.parametrize("fn", OTHERS.values(), ids=OTHERS)
def test_the_other_tables(fn):
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


@pytest.mark.usefixtures("guide")
def test_loss_of_two_projections():
    def fn(input, weight, target, teacher):
        logits = F.linear(input, weight)
        taught = F.mse_loss(logits, F.linear(teacher, weight.detach()))
        return F.cross_entropy(logits, target), taught

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET, torch.randn(6, 8))


@pytest.mark.usefixtures("guide")
def test_near_miss():
    fn = loss_after(lambda z: z.t().flipud().t())
    assert str(reasons.MOVES_ELEMENTS) in str(reason_against(fn, INPUT, WEIGHT, TARGET))
