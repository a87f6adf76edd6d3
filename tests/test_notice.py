"""Warnings: once for each place with a large loss that is left alone, and at the end of a process
in which nothing was rewritten."""

import gc
import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import cce_inductor
from cce_inductor.options import Options
from cce_inductor.reporting import notice, reasons
from cce_inductor.reporting.log import MOST_REPORTS, ReportLog
from cce_inductor.reporting.notice import compiled_in_place, exit_warning, is_large
from cce_inductor.reporting.report import LossReport
from cce_inductor.torch_internals.capture import is_compiled_in_vain

INPUT = torch.randn(1024, 8)
WEIGHT = torch.randn(4096, 8)
TARGET = torch.randint(4096, (1024,))
DROPPED = (
    f"{reasons.USED_BY} dropout at {{}}: {reasons.RANDOM.sentence}. "
    f"To change that: {reasons.RANDOM.advice}"
)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    cce_inductor.clear_reports()


@pytest.fixture
def said(caplog):
    """Return a function that returns the warnings so far."""
    caplog.set_level(logging.WARNING, "cce_inductor")
    return lambda: [record.getMessage() for record in caplog.records]


def compiled(fn, **options):
    return torch.compile(fn, backend="cce_inductor_eager", options=options, dynamic=False)


def line(fn, after):
    return f"{__file__}:{fn.__code__.co_firstlineno + after}"


def test_a_large_loss_is_said_once_a_place(said):
    def fn(input, weight, target):
        logits = F.dropout(F.linear(input, weight))
        return F.cross_entropy(logits, target)

    compiled(fn)(INPUT, WEIGHT, TARGET)
    sentence = (
        f"cce_inductor: a 16 MiB cross_entropy at {line(fn, 2)} was left alone: "
        + DROPPED.format(line(fn, 1))
    )
    assert said() == [sentence]
    compiled(fn)(torch.cat([INPUT, INPUT]), WEIGHT, torch.cat([TARGET, TARGET]))
    assert len(cce_inductor.reports()) == 2
    assert said() == [sentence]


def test_a_loss_that_gets_its_logits_is_as_large_as_they_are(said):
    def fn(logits, target):
        return F.cross_entropy(logits, target)

    compiled(fn)(INPUT @ WEIGHT.t(), TARGET)
    (sentence,) = said()
    assert sentence.startswith(
        f"cce_inductor: a 16 MiB cross_entropy at {line(fn, 1)} was left alone: "
        "its logits come into this graph from outside"
    )


def test_several_losses_with_one_reason_are_one_sentence(said):
    def fn(input, weight, target):
        logits = F.dropout(F.linear(input, weight))
        first = F.cross_entropy(logits, target)
        second = F.cross_entropy(logits, target, reduction="sum")
        return first + second

    compiled(fn)(INPUT, WEIGHT, TARGET)
    assert len(cce_inductor.reports()) == 2
    assert len(said()) == 1


def test_two_reasons_are_two_sentences(said):
    def fn(input, weight, target):
        first = F.cross_entropy(F.dropout(F.linear(input, weight)), target)
        second = F.cross_entropy(F.linear(input * 2, weight).cumsum(1), target)
        return first + second

    compiled(fn)(INPUT, WEIGHT, TARGET)
    assert [" dropout " in sentence for sentence in said()] == [True, False]


def test_small_losses_and_rewritten_ones_are_not_said(said):
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight), target)

    compiled(fn)(INPUT[:-1], WEIGHT, TARGET[:-1])  # just below 16 MiB
    compiled(fn)(INPUT, WEIGHT, TARGET)
    assert [report.rewritten for report in cce_inductor.reports()] == [False, True]
    assert said() == []


def test_explain_says_it_itself(said):
    def fn(input, weight, target):
        return F.cross_entropy(F.dropout(F.linear(input, weight)), target)

    assert reasons.RANDOM.sentence in str(cce_inductor.explain(fn, INPUT, WEIGHT, TARGET))
    assert said() == []


def test_what_is_large():
    assert is_large(16 * 2**20, Options())
    assert not is_large(16 * 2**20 - 1, Options())
    assert not is_large(
        2**29, Options(min_logits_bytes=2**30)
    )  # the option takes precedence over the default
    assert not is_large(2**10, Options(min_logits_bytes=0))
    assert is_large(None, Options())


SCRIPT = """
import sys, torch, torch.nn.functional as F, cce_inductor
cce_inductor.install(min_logits_bytes=0)
def step(input, weight, target):
    return F.cross_entropy(F.linear(input, weight), target)
def other(input, weight, target):
    return input + 1
arguments = torch.randn(4, 8), torch.randn(50, 8), torch.randint(50, (4,))
for act in sys.argv[1:]:
    if act == "uninstall":
        cce_inductor.uninstall()
    elif act == "in place":
        head = torch.nn.Linear(8, 50)
        head.compile()
        F.cross_entropy(head(arguments[0]), arguments[2])
    elif act == "explain":
        cce_inductor.explain(step, *arguments)
    else:
        torch.compile({"step": step, "other": other}[act])(*arguments)
"""


def said_at_exit(acts):
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_LOGS"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *acts],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [text for text in result.stderr.splitlines() if "cce_inductor" in text]


def is_captured_in_place(module):
    graphs = []
    module.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    module(torch.randn(4, module.in_features))
    return bool(graphs)


@pytest.mark.parametrize(
    ("acts", "expected"),
    [
        ([], exit_warning(0, 0, 0)),
        (["explain"], exit_warning(0, 0, 0)),
        (["other"], exit_warning(1, 0, 0)),
        (["in place", "step"], None),
        (["step"], None),
        (["other", "step"], None),
        (["uninstall"], None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_at_exit(acts, expected):
    assert said_at_exit(acts) == ([] if expected is None else [f"cce_inductor: {expected}"])


def test_at_exit_after_a_head_was_compiled_in_place():
    """Where Dynamo captures it, its logits are deferred, and the loss is rewritten."""
    captured = is_captured_in_place(torch.nn.Linear(2, 3))
    expected = [] if captured else [f"cce_inductor: {exit_warning(0, 0, 1)}"]
    assert said_at_exit(["in place"]) == expected


@pytest.mark.parametrize("wrapped", [False, True])
def test_linear_modules_that_were_compiled_in_place(wrapped):
    """Code of one's own is captured, and also PyTorch's if it is wrapped."""

    class Own(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input)

    gc.collect()
    before = compiled_in_place()
    modules = [torch.nn.Linear(2, 3), Own(2, 3)]
    with torch._dynamo.config.patch(wrap_top_frame=wrapped):
        captured = [is_captured_in_place(module) for module in modules]
    assert captured[0] or not wrapped
    assert captured[1]
    assert compiled_in_place() == before + captured.count(False)
    disabled = torch.nn.Linear(2, 3)
    disabled.compile(disable=True)
    assert not is_compiled_in_vain(disabled)
    assert not is_compiled_in_vain(torch.nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((0, 0, 0), "torch.compile compiled nothing with Inductor after cce_inductor.install()"),
        ((3, 0, 0), "there is no loss in the 3 graph(s) that were compiled"),
        ((3, 0, 1), "1 torch.nn.Linear module(s) were compiled by module.compile(), which"),
        ((3, 2, 0), "all of the 2 loss(es) in the 3 graph(s) that were compiled were left alone"),
    ],
)
def test_the_exit_warning_is_one_line(counts, said):
    assert said in exit_warning(*counts)
    assert "\n" not in exit_warning(*counts)


def test_the_command_line_says_nothing_at_exit():
    command = [sys.executable, "-W", "ignore", "-m", "cce_inductor", "patterns"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""


def report_at(place):
    return LossReport(False, "it is late", place, "cross_entropy", None, None, 0)


def test_the_oldest_reports_are_forgotten():
    log = ReportLog(limit=3)
    for number in range(5):
        log.add([report_at(f"a.py:{number}")])
    assert [report.location for report in log.all()] == ["a.py:2", "a.py:3", "a.py:4"]
    assert f"{MOST_REPORTS:,} reports" in cce_inductor.reports.__doc__
    assert [report.location for report in log.since(4)] == ["a.py:4"]
    assert log.since(0) == log.all()
    assert log.since(log.count) == []
    log.clear()
    assert log.all() == log.since(0) == []


def test_a_place_is_remembered_for_a_while(monkeypatch):
    monkeypatch.setattr(notice, "_MOST_PLACES", 2)
    tally = notice._Tally()
    asked = ["a", "b", "a", "c", "b", "a"]  # the third replaces the first
    assert [tally.remember(place) for place in asked] == [True, True, False, True, False, True]
    assert len(tally._warned) == 2
