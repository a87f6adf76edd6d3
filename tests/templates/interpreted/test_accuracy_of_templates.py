"""The numerics contract of `test_accuracy`, for the Triton templates."""

import functools

import pytest
import torch
from test_accuracy import PROBLEMS, SPELLINGS, assert_contract

import cce_inductor


class Compiled:
    """A spelling whose fused form goes through Inductor."""

    def __init__(self, spelling):
        self.unfused, self.exact = spelling.unfused, spelling.exact

    def fused(self, *arguments):
        with cce_inductor.installed(min_logits_bytes=0, on_error="raise"):
            return self.compiled(*arguments)

    @functools.cached_property
    def compiled(self):
        return torch.compile(lambda *arguments: self.unfused(*arguments), fullgraph=True)


@pytest.mark.parametrize("name", ["float", "entropy", "softcap"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_less_accurate_than_unfused(name, problem):
    cce_inductor.clear_reports()
    spelling = SPELLINGS[name]
    assert_contract(Compiled(spelling), PROBLEMS[problem], torch.float32, "none", torch.float32)
    assert all(report.rewritten for report in cce_inductor.reports())
    assert cce_inductor.reports()


def test_no_less_accurate_in_bfloat16():
    spelling = Compiled(SPELLINGS["float"])
    assert_contract(spelling, PROBLEMS["peaked"], torch.bfloat16, "none", torch.float32)
