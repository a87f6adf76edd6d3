"""A fast subset of the set-ups; ``run.py`` measures all of them."""

import pytest
from run import check, measure
from setups import SETUPS

FAST = (
    "PyTorch, loss outside of the model",
    "PyTorch without torch.compile",
    "accelerate, regional compilation",
    "FSDP2, each block is a unit",
)


@pytest.mark.parametrize("name", FAST)
def test_setup(name):
    theirs, ours = measure(name, "without"), measure(name, "with")
    check(SETUPS[name], theirs, ours)
    assert not theirs.reports
    assert all(report["rewritten"] for report in ours.reports)


def test_the_check_can_fail():
    theirs = measure(FAST[1], "without")
    with pytest.raises(AssertionError):
        check(SETUPS[FAST[1]], theirs, theirs)
