"""explain(), reports() and the log say what was done."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import cce_inductor
from cce_inductor import explain

WEIGHT = torch.randn(50, 8, requires_grad=True)
INPUT = torch.randn(2, 3, 8)
TARGET = torch.randint(50, (2, 3))


def loss(input, target):
    logits = F.linear(input, WEIGHT)
    return F.cross_entropy(logits.view(-1, 50), target.view(-1))


def broken_loss(input, target):
    logits = F.linear(input, WEIGHT)
    torch._dynamo.graph_break()
    return F.cross_entropy(logits.view(-1, 50), target.view(-1))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    cce_inductor.clear_reports()


def explain_all(fn, *args, **options):
    with cce_inductor.installed(min_logits_bytes=0, **options):
        return cce_inductor.explain(fn, *args)


def test_rewritten_loss():
    explanation = explain_all(loss, INPUT, TARGET)
    (report,) = explanation.losses
    assert report.rewritten
    assert report.reason is None
    line = loss.__code__.co_firstlineno + 2
    assert report.location == f"{__file__}:{line}"
    assert report.loss == "linear > view(-1, 50) > cross_entropy"
    assert report.logits_shape == (2, 3, 50)
    assert report.logits_dtype == torch.float32
    assert report.bytes_saved == 2 * 3 * 50 * 4
    (graph,) = explanation.graphs
    assert "cross_entropy(" in graph.before
    assert "cce_inductor.linear_cross_entropy" not in graph.before
    assert "cce_inductor.reduce" in graph.after
    assert graph.break_reason is None
    assert str(explanation) == (
        "1 loss(es) in 1 graph(s), 1 rewritten\n"
        "rewritten: linear > view(-1, 50) > cross_entropy\n"
        f"  at {__file__}:{line}\n"
        "  logits: 2x3x50 float32\n"
        "  not stored any more: 1.172 KiB"
    )


def test_not_installed_uses_the_defaults():
    (report,) = cce_inductor.explain(loss, INPUT, TARGET).losses
    assert not report.rewritten
    assert report.bytes_saved == 0
    assert report.reason.startswith("the logits are small (1.172 KiB, and min_logits_bytes is")
    assert not cce_inductor.is_installed()


def test_graph_break():
    explanation = explain_all(broken_loss, INPUT, TARGET, defer_logits="with_loss")
    (report,) = explanation.losses
    assert not report.rewritten
    assert "their projection is not in it" in report.reason
    first, second = explanation.graphs
    assert "graph_break" in first.break_reason
    assert second.break_reason is None
    assert "graph 1 ends with a graph break" in str(explanation)


def test_no_loss():
    explanation = cce_inductor.explain(lambda x: x + 1, torch.ones(2))
    assert explanation.losses == []
    assert "no operation with a loss rule" in str(explanation)


def test_module_compiled_or_not():
    class Model(torch.nn.Module):
        def forward(self, input, target):
            return loss(input, target)

    model = Model()
    for fn in (model, torch.compile(model), torch.compile(loss)):
        (report,) = explain_all(fn, INPUT, TARGET).losses
        assert report.rewritten


def test_leaves_nothing_behind():
    compilations = []

    def backend(module, example_inputs):
        compilations.append(module)
        return module.forward

    compiled = torch.compile(loss, backend=backend)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert len(explain_all(loss, INPUT, TARGET).losses) == 1
    state = torch.get_rng_state()
    explain_all(lambda x: torch.rand(3) + x, torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)
    compiled(INPUT, TARGET)
    compiled(INPUT, TARGET)
    assert len(compilations) == 1
    assert cce_inductor.reports() == []


def test_keeps_what_the_user_compiled():
    compilations = []

    def backend(module, example_inputs):
        compilations.append(module)
        return module.forward

    compiled = torch.compile(loss, backend=backend)
    compiled(INPUT, TARGET)
    explain_all(compiled, INPUT, TARGET)
    compiled(INPUT, TARGET)
    assert len(compilations) == 1


def test_exceptions_of_the_function_come_out():
    def fn(input):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        cce_inductor.explain(fn, INPUT)


def test_reports_of_real_compilations():
    compiled = torch.compile(loss, backend="cce_inductor_eager", options={"min_logits_bytes": 0})
    compiled(INPUT, TARGET)
    compiled(INPUT, TARGET)
    (report,) = cce_inductor.reports()
    assert report.rewritten
    compiled(INPUT[:1], TARGET[:1])
    assert len(cce_inductor.reports()) == 2
    cce_inductor.clear_reports()
    assert cce_inductor.reports() == []


def test_a_restarted_compilation_is_reported_once():
    class Model(torch.nn.Module):
        cap = 30.0

        def forward(self, input, target):
            logits = self.cap * torch.tanh(F.linear(input, WEIGHT) / self.cap)
            return F.cross_entropy(logits.view(-1, 50), target.view(-1))

    options = {"min_logits_bytes": 0}
    torch.compile(Model(), backend="cce_inductor", options=options, dynamic=True)(INPUT, TARGET)
    assert len(cce_inductor.reports()) == 1


SCRIPT = """
import torch, torch.nn.functional as F
weight = torch.randn(50, 8)
def fn(input, target):
    return F.cross_entropy(F.linear(input, weight), target)
compiled = torch.compile(fn, backend="cce_inductor_eager", options={"min_logits_bytes": 0})
compiled(torch.randn(4, 8), torch.randint(50, (4,)))
"""


@pytest.mark.parametrize(
    ("setting", "shown", "hidden"),
    [
        ("cce_inductor", "rewritten: linear > cross_entropy", "rewritten graph:"),
        ("+cce_inductor", "rewritten graph:", "no such line"),
        (None, "", "rewritten"),
    ],
)
def test_torch_logs(setting, shown, hidden):
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_LOGS"}
    if setting is not None:
        environment["TORCH_LOGS"] = setting
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert shown in result.stderr
    assert hidden not in result.stderr


def test_structured_trace(tmp_path):
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True)
    (log,) = tmp_path.glob("*.log")
    assert "cce_inductor_rewritten_graph" in log.read_text()
    assert "torch.ops.cce_inductor.reduce" in log.read_text()


def test_graph_break_is_explained():
    def fn(input, target):
        logits = F.linear(input, WEIGHT)
        print("in between")
        return F.cross_entropy(logits, target)

    text = str(explain(fn, INPUT.view(-1, 8), TARGET.view(-1)))
    assert "its logits come into this graph from outside" in text
    assert "to change that: compute the logits and the loss in one compiled function" in text
    assert re.search(r"graph 1 ends with a graph break at .*test_explain.py:\d+:\n  \w+", text)
    assert "print" in text


LOGITS = INPUT.view(-1, 8) @ WEIGHT.t()


def loss_of_logits(logits, target):
    return F.cross_entropy(logits, target)


def advice_for_logits_from_outside(rows=6, **options):
    with cce_inductor.installed(**options):
        (report,) = explain(loss_of_logits, LOGITS[:rows], TARGET.view(-1)[:rows]).losses
    assert "from outside, as 'l_logits_'" in report.reason
    return report.advice


TOGETHER = (
    "compute the logits and the loss in one compiled function, without a graph break between them"
)
UNCOMPILED = "if the head is not compiled, cce_inductor.defer(head) defers its logits"


@pytest.mark.parametrize(
    ("defer_logits", "rest"),
    [
        (
            "always",
            f"; {UNCOMPILED}; if it is compiled, the logits could not be deferred, and the report "
            "of its function says why",
        ),
        (
            "auto",
            f"; {UNCOMPILED}; if it is compiled and the logits require no gradient, "
            'defer_logits="always" defers them',
        ),
        *(
            (
                weaker,
                '; or, if a compiled function returns them, pass defer_logits="auto" (this does '
                "not help where FSDP frees the weight of the head after its forward)",
            )
            for weaker in ("with_loss", "never")
        ),
    ],
)
def test_advice_depends_on_what_is_in_force(defer_logits, rest):
    given = advice_for_logits_from_outside(min_logits_bytes=0, defer_logits=defer_logits)
    assert given == TOGETHER + rest


@pytest.mark.parametrize("defer_logits", ["with_loss", "always"])
def test_advice_for_chunks_that_are_too_small(defer_logits):
    """Each chunk of a chunked loss is the input of a graph, and is smaller than min_logits_bytes."""
    given = advice_for_logits_from_outside(rows=2, defer_logits=defer_logits)
    assert given == (
        "compute the logits and the loss in one compiled function, without a graph break between "
        "them, and lower min_logits_bytes: the logits are smaller than that"
    )


def test_advice_after_a_graph_break_that_always_does_not_cross():
    """The head is a module that is excluded from compilation, as FSDP's hooks do."""

    @torch._dynamo.disable
    def head(input):
        return F.linear(input, WEIGHT)

    def fn(input, target):
        return F.cross_entropy(head(input), target)

    with cce_inductor.installed(min_logits_bytes=0, defer_logits="always"):
        (report,) = explain(fn, INPUT.view(-1, 8), TARGET.view(-1)).losses
    assert UNCOMPILED in report.advice
    assert "pass defer_logits" not in report.advice


def test_sizes_that_are_known_only_at_run_time():
    """An unknown size is not made up, and counts as large enough."""

    def fn(input, target):
        kept = target > 10
        return F.cross_entropy(F.linear(input[kept], WEIGHT), target[kept])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (report,) = explain(fn, INPUT.view(-1, 8), TARGET.view(-1)).losses  # default options
    assert report.rewritten
    assert report.logits_bytes is None
    assert report.bytes_saved == 0
    assert report.logits_shape == (-1, 50)
    assert str(report) == (
        "rewritten: linear > cross_entropy\n"
        f"  at {__file__}:{fn.__code__.co_firstlineno + 2}\n"
        "  logits: ?x50 float32\n"
        "  not stored any more: as many bytes as they have at run time"
    )
