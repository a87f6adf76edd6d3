"""Logits whose weight has changed: only code that needs their values gets an error."""

import copy

import pytest
import torch
import torch.nn.functional as F

import cce_inductor
from cce_inductor.deferred.tensor import defer

pytestmark = pytest.mark.usefixtures("nothing_compiled")


def logits_of(weight, kind="plain"):
    hidden = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    if kind == "strided":
        hidden = hidden.t().contiguous().t()
    logits = defer(hidden.requires_grad_(), weight, None, torch.float32)
    if kind == "observed":
        logits.register_hook(lambda gradient: None)
    return logits[1:4] if kind == "rows" else logits


def stale(kind="plain"):
    weight = torch.nn.Parameter(torch.ones(50, 8))
    logits = logits_of(weight, kind)
    with torch.no_grad():
        weight.add_(1)
    return logits


def fresh(kind="plain"):
    return logits_of(torch.nn.Parameter(torch.ones(50, 8)), kind)


WITHOUT_VALUES = {
    "their shape": lambda logits, x: x * logits.shape[0],
    "their size": lambda logits, x: x * logits.numel() + logits.size(-1),
    "their dtype": lambda logits, x: x.to(logits.dtype) * 2,
    "their device": lambda logits, x: x.to(logits.device) * 2,
    "whether they have a gradient": lambda logits, x: x if logits.requires_grad else x * 2,
    "whether they are there": lambda logits, x: x if logits is None else x * 2,
    "nothing of them": lambda logits, x: x + 1,
    "another tensor like them": lambda logits, x: torch.zeros_like(logits),
    "themselves": lambda logits, x: (x * 2, logits)[0],
    "what is derived from them": lambda logits, x: (x * 2, logits * 2)[0],
    "what is not used": lambda logits, x: (x * 2, logits.float())[0],
}
NEEDING_VALUES = {
    "sum": lambda logits, x: logits.sum() + x,
    "loss": lambda logits, x: F.cross_entropy(logits, torch.zeros(len(logits)).long()) + x,
    "greatest": lambda logits, x: logits.argmax(-1).sum() + x,
}
KINDS = ["plain", "observed", "strided", "rows"]


def compiled(function, backend):
    options = {"min_logits_bytes": 0} if backend.startswith("cce_inductor") else None
    return torch.compile(function, backend=backend, options=options)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "cce_inductor_eager") for kind in KINDS), ("plain", "aot_eager")],
)
@pytest.mark.parametrize("when", ["compiled for them", "compiled before"])
def test_a_compiled_function_that_gets_them(kind, when, backend):
    x = torch.randn(3)
    for name, function in {**WITHOUT_VALUES, **NEEDING_VALUES}.items():
        torch._dynamo.reset()
        code = compiled(function, backend)
        if when == "compiled before":
            torch.testing.assert_close(code(fresh(kind), x), function(fresh(kind).plain(), x))
        if name in NEEDING_VALUES:
            with pytest.raises(cce_inductor.StaleLogitsError, match="was changed in place"):
                code(stale(kind), x)
        else:
            torch.testing.assert_close(code(stale(kind), x), function(fresh(kind).plain(), x))
        # The compiled function still works for other logits.
        torch.testing.assert_close(code(fresh(kind), x), function(fresh(kind).plain(), x))


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_no_values_in_eager_code(kind):
    logits = stale(kind)
    for look in (repr, str, type, id, "{}".format, len, lambda z: z.grad_fn, lambda z: z is None):
        look(logits)
    for function in WITHOUT_VALUES.values():
        function(logits, torch.randn(3))
    logits.__tensor_flatten__()
    assert logits.is_deferred
    for look in (torch.Tensor.tolist, copy.deepcopy, lambda z: (z + 1).max(), torch.Tensor.numpy):
        with pytest.raises(cce_inductor.StaleLogitsError):
            look(logits.detach())


def test_their_numbers_stay_if_somebody_has_looked():
    weight = torch.nn.Parameter(torch.ones(50, 8))
    logits = logits_of(weight)
    expected = torch.tensor(logits.tolist())
    with torch.no_grad():
        weight.add_(1)
    code = compiled(NEEDING_VALUES["sum"], "cce_inductor_eager")
    torch.testing.assert_close(code(logits, torch.zeros(())), expected.sum())
