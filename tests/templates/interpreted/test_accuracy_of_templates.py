"""The numerics contract of `test_accuracy`, for the Triton templates."""

import functools

import pytest
import torch
from test_accuracy import PROBLEMS, SPELLINGS, assert_contract

import cce_inductor
from cce_inductor.kernels.triton import lowering, tiled
from cce_inductor.kernels.triton.configs import Config


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter's time is that of its calls, whatever they compute."""
    config = Config(128, 512, 32, 4, 3, group=8, programs=0)
    monkeypatch.setattr(lowering, "configs", lambda *_, **__: [config])
    monkeypatch.setattr(tiled, "STATISTICS_WIDTHS", (1024,))


class Compiled:
    """A spelling whose fused form goes through Inductor."""

    seeds = 4  # each takes seconds

    def __init__(self, spelling):
        self.unfused, self.exact = spelling.unfused, spelling.exact

    def fused(self, *arguments):
        with cce_inductor.installed(min_logits_bytes=0, on_error="raise"):
            return self.compiled(*arguments)

    @functools.cached_property
    def compiled(self):
        return torch.compile(lambda *arguments: self.unfused(*arguments), fullgraph=True)


CASES = [
    *(("float", problem) for problem in PROBLEMS),
    ("entropy", "peaked"),
    ("entropy", "certain"),
    ("softcap", "confident"),
    ("label smoothing", "random"),
    ("kl of temperatures", "peaked"),
]


@pytest.mark.parametrize(("name", "problem"), CASES)
def test_no_less_accurate_than_unfused(name, problem):
    cce_inductor.clear_reports()
    spelling = Compiled(SPELLINGS[name])
    assert_contract(spelling, PROBLEMS[problem], torch.float32, "none", torch.float32)
    assert cce_inductor.reports()
    assert all(report.rewritten for report in cce_inductor.reports())


def test_no_less_accurate_in_bfloat16():
    spelling = Compiled(SPELLINGS["float"])
    assert_contract(spelling, PROBLEMS["peaked"], torch.bfloat16, "none", torch.float32)
