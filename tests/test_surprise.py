"""Unexpected exceptions are raised with ``on_error="raise"``, wherever the package catches them.

Otherwise they are logged once, and the program continues without what failed.
"""

import logging
import threading

import pytest
import torch
import torch.nn.functional as F
from checks import capture

import cce_inductor
from cce_inductor import surprise
from cce_inductor.deferred import arguments, dispatch, eager
from cce_inductor.deferred.tensor import defer
from cce_inductor.kernels.program.tracing import NotPointwiseError
from cce_inductor.kernels.triton import lowering
from cce_inductor.operators import inductor
from cce_inductor.options import Options
from cce_inductor.rewriting.plan import Group
from cce_inductor.rewriting.rewrite import rewrite

INPUT = torch.randn(6, 8)
WEIGHT = torch.randn(50, 8)
TARGET = torch.randint(50, (6,))
MESSAGE = "not planned by anybody"


def loss(input, weight, target):
    return F.cross_entropy(F.linear(input, weight), target)


@pytest.fixture(autouse=True)
def _nothing_said(caplog):
    surprise._warn_once.cache_clear()
    eager._reduction.cache_clear()
    eager._rows.cache_clear()
    cce_inductor.clear_reports()
    torch._dynamo.reset()
    caplog.set_level(logging.WARNING)


def broken(*args, **kwargs):
    raise KeyError(MESSAGE)


def reduced_logits(monkeypatch):
    monkeypatch.setattr(eager, "rewrite_reductions", broken)
    return defer(INPUT, WEIGHT, None, torch.float32).logsumexp(-1)


def few_rows(monkeypatch):
    monkeypatch.setattr(eager, "rewrite", broken)
    return defer(INPUT, WEIGHT, None, torch.float32)[:2].cos().cpu().sum()


def derivative(monkeypatch):
    monkeypatch.setattr(Group, "check_derivative", broken)
    backend = torch.compile(loss, backend="cce_inductor_eager", options={"min_logits_bytes": 0})
    return backend(INPUT, WEIGHT, TARGET)


def deferred_argument(monkeypatch):
    monkeypatch.setattr(arguments, "_graph_of_operands", broken)
    logits = defer(INPUT, WEIGHT, None, torch.float32)
    return torch.compile(lambda z: z.logsumexp(-1), backend="cce_inductor_eager")(logits)


PLACES = [derivative, reduced_logits, few_rows, deferred_argument]


def with_choice(choice, place, monkeypatch):
    """Run code with the option, both as set by an installation and as the default of `Options`."""
    undo = surprise.set_default(choice)
    defaults = (*Options.__init__.__defaults__[:-1], choice)
    monkeypatch.setattr(Options.__init__, "__defaults__", defaults)
    try:
        return place(monkeypatch)
    finally:
        undo()


@pytest.mark.parametrize("place", PLACES)
def test_a_surprise_is_raised(place, monkeypatch):
    with pytest.raises(Exception, match=MESSAGE):
        with_choice("raise", place, monkeypatch)


@pytest.mark.parametrize("place", PLACES)
def test_a_surprise_is_said_once(place, monkeypatch, caplog):
    results = [with_choice("warn", place, monkeypatch) for _ in range(2)]
    torch.testing.assert_close(results[0], results[1])
    assert caplog.text.count("please report this") == 1
    assert "cce_inductor met an unexpected error, so " in caplog.text
    assert f"KeyError: '{MESSAGE}'" in caplog.text  # the traceback


def test_an_error_of_the_numbers_is_their_own(caplog):
    """An error that PyTorch raises for wrong arguments is not logged."""
    logits = defer(INPUT, WEIGHT, None, torch.float32)
    for wrong in (
        lambda: logits + torch.ones(7),
        lambda: F.cross_entropy(logits, TARGET[:-1]),
        lambda: logits.logsumexp(5),
        lambda: logits.sum(nonsense=1),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError, TypeError)):
            wrong()
    assert not caplog.text


def test_another_error_where_one_of_pytorch_may_come(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "PYTORCH_ERRORS", ())
    logits = defer(INPUT, WEIGHT, None, torch.float32)
    with surprise.on_error("raise"), pytest.raises(RuntimeError, match="Attempting to broadcast"):
        logits + torch.ones(7)
    assert logits.is_deferred
    with surprise.on_error("warn"), pytest.raises(RuntimeError, match="must match the size"):
        logits + torch.ones(7)
    assert not logits.is_deferred
    assert "so deferred logits are computed" in caplog.text


@pytest.mark.parametrize("choice", ["warn", "raise"])
def test_a_decomposition_that_fails(choice, caplog):
    decomposed = inductor._or_undecomposed(broken)
    with surprise.on_error(choice):
        if choice == "raise":
            with pytest.raises(KeyError, match=MESSAGE):
                decomposed(INPUT)
        else:
            assert decomposed(INPUT) is NotImplemented
            assert "a loss runs its blockwise kernels" in caplog.text


@pytest.mark.parametrize("choice", ["warn", "raise"])
def test_a_lowering_that_fails(choice, monkeypatch, caplog):
    class OnDevice:
        def get_device(self):
            return torch.device("cuda")

    monkeypatch.setattr(lowering, "fallback_handler", lambda operator, **_: lambda *args: "as is")
    lowered = lowering._or_fallback("tile_statistics", broken)
    with surprise.on_error(choice):
        if choice == "raise":
            with pytest.raises(KeyError, match=MESSAGE):
                lowered(OnDevice())
        else:
            assert lowered(OnDevice()) == "as is"
            assert "tile_statistics runs without a Triton kernel" in caplog.text


def test_only_what_is_not_pointwise_is_called_so(monkeypatch):
    (module,) = capture(loss, INPUT, WEIGHT, TARGET)
    before = module.code

    def not_pointwise(self):
        raise NotPointwiseError("aten.sort.default")

    monkeypatch.setattr(Group, "check_derivative", not_pointwise)
    (report,) = rewrite(module, Options(min_logits_bytes=0, on_error="raise"))
    assert report.reason == (
        "the function of the logits has a derivative that is not pointwise (aten.sort.default)"
    )
    (module,) = capture(loss, INPUT, WEIGHT, TARGET)
    monkeypatch.setattr(Group, "check_derivative", broken)
    (report,) = rewrite(module, Options(min_logits_bytes=0, on_error="warn"))
    assert report.reason == f"the pass failed with KeyError: '{MESSAGE}'"
    assert module.code == before


def test_the_choice_of_an_installation_holds_in_every_thread():
    said = []

    def ask():
        try:
            broken()
        except KeyError:
            try:
                surprise.surprised("it is tried")
                said.append("went on")
            except KeyError:
                said.append("raised")

    for choice in ("warn", "raise"):
        with cce_inductor.installed(on_error=choice):
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
    assert said == ["went on", "raised"]


def test_the_choice_of_a_block_goes_before_that_of_an_installation():
    with cce_inductor.installed(on_error="raise"), surprise.on_error("warn"):
        try:
            broken()
        except KeyError:
            surprise.surprised("it is tried")
