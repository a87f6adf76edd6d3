"""Compiled functions that return deferred logits, or take them as arguments."""

import contextlib
import gc
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import cce_inductor
from cce_inductor import installation
from cce_inductor.deferred import boundary
from cce_inductor.deferred.boundary import compile_with_deferral, deferral_for
from cce_inductor.deferred.tensor import DeferredLogits
from cce_inductor.options import Options
from cce_inductor.recipe.stale import StaleLogitsError
from cce_inductor.reporting import reasons
from cce_inductor.rewriting.rewrite import rewrite
from cce_inductor.torch_internals.patches import wrap_inductor

pytestmark = pytest.mark.usefixtures("nothing_compiled")

TOKENS, HIDDEN, VOCABULARY = 6, 8, 50
TARGET = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))


def leaf(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def leaves(dtype=torch.float32):
    return [leaf(TOKENS, HIDDEN, dtype=dtype), leaf(VOCABULARY, HIDDEN, seed=1, dtype=dtype)]


def compiled(fn, *, backend="cce_inductor_eager", dynamic=None, fullgraph=True, **options):
    options = {"min_logits_bytes": 0, "on_error": "raise", **options}
    return torch.compile(fn, backend=backend, options=options, dynamic=dynamic, fullgraph=fullgraph)


def loss_and_logits(x, w, target):
    logits = F.linear(x.tanh(), w)
    return F.cross_entropy(logits, target), logits


def same_numbers(fn, code, args, *, rtol=1e-5, atol=1e-5, use=None):
    """Return the results of the compiled function, after comparing them and all gradients with eager."""
    inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    outcomes, results = [], []
    for function in (code, fn):
        result = function(*args)
        results.append(result)
        parts = [use(part) if use else part for part in tree_leaves(result)]
        trained = [part for part in parts if part.requires_grad]
        total = sum((part.cumsum(-1) if part.dim() else part).sum() for part in trained)
        gradients = ()
        if trained and inputs:
            gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        outcomes.append(([part.detach() + 0 for part in parts], gradients))
    torch.testing.assert_close(*outcomes, rtol=rtol, atol=atol, equal_nan=True)
    mine, theirs = (tree_leaves(result) for result in results)
    for my, their in zip(mine, theirs, strict=True):
        assert my.stride() == their.stride()
        assert my.requires_grad == their.requires_grad
        assert my.is_leaf == their.is_leaf
    return results[0]


def test_what_a_function_returns():
    code = compiled(loss_and_logits)
    args = [*leaves(), TARGET]
    loss, logits = code(*args)
    assert type(loss) is torch.Tensor
    assert isinstance(logits, DeferredLogits)
    assert logits.is_deferred
    assert logits.requires_grad
    (report,) = cce_inductor.reports()
    assert report.rewritten
    assert report.deferred
    assert str(report).endswith("the returned logits are deferred: computed when first used")
    same_numbers(loss_and_logits, code, args)


def test_the_loss_alone_computes_nothing():
    args = [*leaves(), TARGET]
    loss, logits = compiled(loss_and_logits)(*args)
    loss.backward()
    mine = [each.grad.clone() for each in args[:2]]
    assert logits.is_deferred
    for each in args[:2]:
        each.grad = None
    loss_and_logits(*args)[0].backward()
    torch.testing.assert_close(mine, [each.grad for each in args[:2]])


def test_inductor():
    args = [*leaves(), TARGET]
    code = compiled(loss_and_logits, backend="cce_inductor")
    assert code(*args)[1].is_deferred
    same_numbers(loss_and_logits, code, args)
    with torch.no_grad():
        assert not code(*args)[1].requires_grad
        assert torch.equal(code(*args)[1].argmax(-1), loss_and_logits(*args)[1].argmax(-1))


def test_installed():
    args = [*leaves(), TARGET]
    with cce_inductor.installed(min_logits_bytes=0):
        code = torch.compile(loss_and_logits)
        assert code(*args)[1].is_deferred
        same_numbers(loss_and_logits, code, args)
    torch._dynamo.reset()
    assert type(torch.compile(loss_and_logits)(*args)[1]) is torch.Tensor


def test_from_the_cache(tmp_path, monkeypatch):
    """The cache distinguishes graphs with deferred logits from those without."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    args = [*leaves(), TARGET]
    for _ in range(2):
        torch._dynamo.reset()
        with cce_inductor.installed(min_logits_bytes=0):
            assert torch.compile(loss_and_logits)(*args)[1].is_deferred
        torch._dynamo.reset()
        with cce_inductor.installed(min_logits_bytes=0, defer_logits="never"):
            assert type(torch.compile(loss_and_logits)(*args)[1]) is torch.Tensor
        torch._dynamo.reset()
        assert type(torch.compile(loss_and_logits)(*args)[1]) is torch.Tensor
    assert torch._dynamo.utils.counters["aot_autograd"].get("autograd_cache_hit", 0) > 0 or (
        torch._dynamo.utils.counters["inductor"].get("fxgraph_cache_hit", 0) > 0
    )


# Options


def test_never():
    args = [*leaves(), TARGET]
    _, logits = compiled(loss_and_logits, defer_logits="never")(*args)
    assert type(logits) is torch.Tensor
    (report,) = cce_inductor.reports()
    assert report.reason == reasons.RETURNED_WITHOUT_DEFERRAL.sentence
    assert 'defer_logits="auto"' in report.advice


def head(x, w):
    return F.linear(x.tanh(), w)


def test_with_loss_leaves_a_head_alone():
    assert type(compiled(head, defer_logits="with_loss")(*leaves())) is torch.Tensor
    assert cce_inductor.reports() == []


def test_auto_defers_logits_that_require_a_gradient():
    code = compiled(head)
    assert code(*leaves()).is_deferred
    same_numbers(head, code, leaves())
    with torch.no_grad():
        assert type(code(*leaves())) is torch.Tensor
    assert type(code(*(each.detach() for each in leaves()))) is torch.Tensor


def head_before_break(x, w):
    logits = F.linear(x.tanh(), w)
    torch._dynamo.graph_break()
    return logits, logits.argmax(-1)


def test_auto_defers_logits_before_a_graph_break():
    """Also without a gradient, as in evaluation: a loss may follow in the same function."""
    args = [each.detach() for each in leaves()]
    for defer_logits, is_deferred in (("auto", True), ("with_loss", False)):
        torch._dynamo.reset()
        with cce_inductor.installed(min_logits_bytes=0, defer_logits=defer_logits):
            logits, best = torch.compile(head_before_break)(*args)
        assert hasattr(logits, "is_deferred") == is_deferred
        assert torch.equal(best, head(*args).argmax(-1))
        torch.testing.assert_close(logits + 0, head(*args))


def test_always():
    code = compiled(head, defer_logits="always")
    assert code(*leaves()).is_deferred
    (report,) = cce_inductor.reports()
    assert report.rewritten
    assert report.deferred
    assert report.loss == "linear > returned"
    same_numbers(head, code, leaves())


def test_always_means_large_ones():
    small = compiled(head, defer_logits="always", min_logits_bytes=2**20)
    assert type(small(*leaves())) is torch.Tensor
    narrow = compiled(head, defer_logits="always")
    assert type(narrow(leaf(TOKENS, HIDDEN), leaf(HIDDEN, HIDDEN))) is torch.Tensor


def test_always_outside_of_the_function():
    """A Lightning module's step: ``logits = self(x); loss = F.cross_entropy(...)``."""
    args = leaves()
    model = compiled(head, defer_logits="always")
    logits = model(*args)
    loss = F.cross_entropy(logits, TARGET)
    assert logits.is_deferred
    mine = torch.autograd.grad(loss, args)
    theirs = torch.autograd.grad(F.cross_entropy(head(*args), TARGET), args)
    torch.testing.assert_close(mine, theirs)


# Operations on logits before they are returned


def with_loss(change):
    def fn(x, w, *rest):
        *operands, target = rest
        logits = change(F.linear(x.tanh(), w), *operands)
        return F.cross_entropy(logits.float().flatten(0, -2), target), logits

    return fn


def set_columns(z):
    z[..., 40:] = -7.0
    return z


def scaled_in_place(z):
    z /= 0.5
    return z.tanh_()


RETURNED = {
    "as they are": lambda z: z,
    "softcap": lambda z: 30 * torch.tanh(z / 30),
    "three dimensions": lambda z: z.view(2, -1, VOCABULARY),
    "columns": set_columns,
    "in place": scaled_in_place,
    "slice of the vocabulary": lambda z: z[..., :40].contiguous(),
    "strided slice of the vocabulary": lambda z: z[..., :40],
    "masked": lambda z: z.masked_fill(torch.arange(VOCABULARY, device=z.device) > 44, -9.0),
    "where": lambda z: torch.where(torch.arange(VOCABULARY) > 44, torch.tensor(-9.0), z),
    "where, of a number": lambda z: torch.where(torch.arange(VOCABULARY) > 44, -9.0, z),
    "double": lambda z: z.double(),
    "half": lambda z: z.bfloat16(),
    "log_softmax": lambda z: z.log_softmax(-1),
    "less the greatest": lambda z: z - z.max(-1, keepdim=True).values,
    "scaled log_softmax": lambda z: (z / 0.7).log_softmax(-1) * 2,
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", RETURNED)
def test_returned(name, dynamic):
    fn = with_loss(RETURNED[name])
    target = TARGET.clamp(max=39)
    code = compiled(fn, dynamic=dynamic)
    if dynamic and name == "strided slice of the vocabulary":
        assert type(code(*leaves(), target)[1]) is torch.Tensor
        assert "strides are not known" in cce_inductor.reports()[0].reason
        return
    loose = 2e-2 if name == "half" else 1e-5
    _, logits = same_numbers(fn, code, [*leaves(), target], rtol=loose, atol=loose)
    assert isinstance(logits, DeferredLogits)
    if dynamic:
        fewer = [leaf(4, HIDDEN), leaves()[1], target[:4]]
        before = cce_inductor.reports()
        same_numbers(fn, code, fewer, rtol=loose, atol=loose)
        assert cce_inductor.reports() == before


def test_returned_with_the_vocabulary_first():
    def fn(x, w, target):
        logits = F.linear(x.tanh(), w)
        return F.cross_entropy(logits, target), logits.t()

    _, logits = same_numbers(fn, compiled(fn), [*leaves(), TARGET])
    assert isinstance(logits, DeferredLogits)
    assert logits.shape == (VOCABULARY, TOKENS)


def test_operands_are_trained():
    def change(z, bias, scale, rows):
        return (z + bias) * scale + rows[:, None]

    fn = with_loss(change)
    args = [*leaves(), leaf(VOCABULARY, seed=2), leaf(seed=3), leaf(TOKENS, seed=4), TARGET]
    code = compiled(fn)
    same_numbers(fn, code, args)
    for changed, name in zip(args[2:5], ("the bias", "an operand", "an operand"), strict=True):
        _, logits = code(*args)
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(StaleLogitsError, match=name):
            logits.norm()


WEIGHTS = {
    "matmul": lambda x, w: x @ w.T,
    "bias": lambda x, w: F.linear(x, w, w.sum(-1)),
    "normalised": lambda x, w: F.linear(x, F.normalize(w, dim=-1)),
    "cast": lambda x, w: F.linear(x.bfloat16(), w.to(torch.bfloat16)),
    "einsum": lambda x, w: torch.einsum("th,vh->tv", x, w),
    "hidden is an argument": lambda x, w: F.linear(x, w),
    "sum of two": lambda x, w: F.linear(x, w) + F.linear(x * 2, w[:, :4].repeat(1, 2)),
}


@pytest.mark.parametrize("project", WEIGHTS.values(), ids=WEIGHTS)
def test_projections(project):
    def fn(x, w, target):
        logits = project(x, w)
        return F.cross_entropy(logits.float(), target), logits

    loose = 3e-2 if project is WEIGHTS["cast"] else 1e-5
    _, logits = same_numbers(fn, compiled(fn), [*leaves(), TARGET], rtol=loose, atol=loose)
    assert isinstance(logits, DeferredLogits)


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_autocast(inside):
    def fn(x, w, target):
        with torch.autocast("cpu", torch.bfloat16) if inside else contextlib.nullcontext():
            logits = F.linear(x, w)
            return F.cross_entropy(logits, target), logits

    context = contextlib.nullcontext() if inside else torch.autocast("cpu", torch.bfloat16)
    args = [*leaves(), TARGET]
    with context:
        _, logits = compiled(fn)(*args)
        _, theirs = fn(*args)
    assert logits.is_deferred
    assert logits.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(logits.detach() + 0, theirs.detach())
    grads = torch.autograd.grad(logits.float().cumsum(-1).sum(), args[:2])
    expected = torch.autograd.grad(theirs.float().cumsum(-1).sum(), args[:2])
    torch.testing.assert_close(grads, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    def fn(x, w, target):
        logits = F.linear(x, w)
        return F.cross_entropy(logits.float(), target), logits

    code = compiled(fn)
    _, logits = code(*leaves(dtype), TARGET)
    assert logits.is_deferred
    assert torch.equal(logits.detach() + 0, fn(*leaves(dtype), TARGET)[1].detach())


def test_detached():
    def fn(x, w, target):
        logits = F.linear(x, w)
        return F.cross_entropy(logits, target), logits.detach()

    code = compiled(fn)
    _, logits = same_numbers(fn, code, [*leaves(), TARGET])
    assert isinstance(logits, DeferredLogits)


def no_grad_softmax(logits):
    with torch.no_grad():
        return logits.softmax(-1)


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z * no_grad_softmax(z),
        lambda z: z * z.detach().softmax(-1),
        lambda z: z * z.softmax(-1).detach(),
        lambda z: z.detach().log_softmax(-1),
        lambda z: z.softmax(-1) * z.detach(),
    ],
    ids=["no_grad", "of detached", "detached", "alone", "of another"],
)
def test_softmaxes_without_gradient(change):
    def fn(x, w, target):
        logits = F.linear(x.tanh(), w)
        return F.cross_entropy(logits, target), change(logits)

    _, changed = same_numbers(fn, compiled(fn), [*leaves(), TARGET])
    assert isinstance(changed, DeferredLogits)


def test_made_without_gradient():
    def fn(x, w, target):
        with torch.no_grad():
            logits = F.linear(x, w)
        return F.cross_entropy(logits, target) * w.sum(), logits

    _, logits = same_numbers(fn, compiled(fn), [*leaves(), TARGET])
    assert isinstance(logits, DeferredLogits)


def test_evaluation():
    args = [*leaves(), TARGET]
    code = compiled(loss_and_logits)
    with torch.no_grad():
        _, logits = code(*args)
        assert logits.is_deferred
        assert not logits.requires_grad
        torch.testing.assert_close(logits.sort(-1).values, head(*args[:2]).sort(-1).values)
    with torch.inference_mode():
        _, logits = code(*args)
        assert logits.is_deferred
        assert torch.equal(logits.argmax(-1), head(*args[:2]).argmax(-1))
        assert logits.is_deferred
        torch.testing.assert_close(logits + 0, head(*args[:2]))


def test_hidden_state_is_returned_too():
    def fn(x, w, target):
        hidden = x.tanh()
        logits = F.linear(hidden, w)
        return F.cross_entropy(logits, target), logits, hidden

    args = [*leaves(), TARGET]
    code = compiled(fn)
    same_numbers(fn, code, args)
    _, logits, hidden = code(*args)
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(StaleLogitsError, match="the hidden state"):
        logits.norm()


def test_tied_weight():
    def fn(ids, w):
        logits = F.linear(F.embedding(ids, w).tanh(), w)
        return F.cross_entropy(logits[:-1], ids[1:]), logits

    _, logits = same_numbers(fn, compiled(fn), [TARGET, leaves()[1]])
    assert isinstance(logits, DeferredLogits)


def test_two_heads():
    def fn(x, w, v, target):
        first, second = F.linear(x, w), F.linear(x, v)
        loss = F.cross_entropy(first, target) + F.cross_entropy(second, target)
        return {"loss": loss, "logits": (first, second.float() * 0.5)}

    args = [*leaves(), leaf(VOCABULARY, HIDDEN, seed=5), TARGET]
    result = same_numbers(fn, compiled(fn), args)
    assert all(isinstance(logits, DeferredLogits) for logits in result["logits"])


# Logits that are not deferred, and the reason in the report


REFUSED = {
    "shares their memory": lambda z, w: (z, z.view(2, 3, VOCABULARY)),
    "they are torch.bool": lambda z, w: (z > 0,),
    "is as large": lambda z, w: (
        z + w.detach()[: z.shape[0]].sum(-1, keepdim=True).expand(TOKENS, VOCABULARY).clone(),
    ),
    "computed from them": lambda z, w: (z.log_softmax(-1).log_softmax(-1),),
}


@pytest.mark.parametrize("said", REFUSED)
def test_not_deferred(said):
    def fn(x, w, target):
        logits = F.linear(x, w)
        return F.cross_entropy(logits, target), *REFUSED[said](logits, w)

    result = same_numbers(fn, compiled(fn), [*leaves(), TARGET])
    assert all(type(part) is torch.Tensor for part in result)
    (report,) = cce_inductor.reports()
    assert not report.rewritten
    assert "so they must be stored, and cannot be deferred: " in report.reason
    assert said in report.reason


def test_weight_changed_in_the_graph():
    def fn(x, w, target):
        logits = F.linear(x, w)
        loss = F.cross_entropy(logits, target)
        w.mul_(0.5)
        return loss, logits

    args = [each.detach() for each in leaves()]
    expected = fn(args[0], args[1].clone(), TARGET)
    torch.testing.assert_close(compiled(fn)(args[0], args[1].clone(), TARGET), expected)
    (report,) = cce_inductor.reports()
    assert "mul_" in report.reason


def test_used_otherwise():
    def fn(x, w, target):
        logits = F.linear(x, w)
        return F.cross_entropy(logits, target), logits, logits.cumsum(-1)

    result = same_numbers(fn, compiled(fn), [*leaves(), TARGET])
    assert all(type(part) is torch.Tensor for part in result)
    assert "used by cumsum" in cce_inductor.reports()[0].reason


def test_saved_functions_return_what_they_did(monkeypatch):
    monkeypatch.setattr(boundary, "saves_compiled", lambda: True)
    _, logits = compiled(loss_and_logits)(*leaves(), TARGET)
    assert type(logits) is torch.Tensor
    assert "the compiled function is saved" in cce_inductor.reports()[0].reason


def test_late_passes(monkeypatch):
    monkeypatch.setattr(installation, "passes_run_always", lambda: False)
    with cce_inductor.installed(min_logits_bytes=0):
        _, logits = torch.compile(loss_and_logits)(*leaves(), TARGET)
    assert type(logits) is torch.Tensor
    assert "pre_grad_pass_timing" in cce_inductor.reports()[0].reason


def test_without_a_place_in_the_compiler(monkeypatch, caplog):
    """Where the function to wrap is missing, a warning says so, and the rest works."""
    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", object)
    assert wrap_inductor(print) is None
    with (
        caplog.at_level(logging.WARNING, "cce_inductor"),
        cce_inductor.installed(min_logits_bytes=0),
    ):
        (record,) = caplog.records
        assert "cannot defer the logits that a compiled function returns" in record.message


def test_the_place_is_put_back():
    before = torch._TorchCompileInductorWrapper.__call__
    with cce_inductor.installed():
        assert torch._TorchCompileInductorWrapper.__call__ is not before
    assert torch._TorchCompileInductorWrapper.__call__ is before


def test_other_callers_of_inductor_get_logits():
    """``torch._inductor.compile`` calls the pass without the function that makes logits deferred."""
    from torch._inductor import compile as inductor_compile

    graphs = []
    torch.compile(loss_and_logits, backend=lambda m, _: graphs.append(m) or m.forward)(
        *leaves(), TARGET
    )
    args = [each.detach() for each in leaves()]
    order = [n.name for n in graphs[0].graph.find_nodes(op="placeholder")]
    values = {"l_x_": args[0], "l_w_": args[1], "l_target_": TARGET}
    with cce_inductor.installed(min_logits_bytes=0), torch.no_grad():
        given = [values[name] for name in order]
        _, logits = inductor_compile(graphs[0], given)(*given)
    torch.testing.assert_close(logits, head(*args))


# Compiled functions that take deferred logits


def deferred_and_plain(change=lambda z: z, args=None):
    args = args or leaves()
    return change(compiled(head, defer_logits="always")(*args)), change(head(*args)), args


def loss_of(logits, target):
    return F.cross_entropy(logits.float(), target)


BACKENDS = ["cce_inductor_eager", "cce_inductor", "eager", "aot_eager", "inductor"]
VIEWS = {
    "all": lambda z: z,
    "rows": lambda z: z[1:],
    "view": lambda z: z.view(2, 3, VOCABULARY).flatten(0, 1),
    "cast": lambda z: z.double(),
    "detached": lambda z: z.detach(),
    "looked at": lambda z: z if z.norm() else None,
    "changed": lambda z: z.mul_(2),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_compiled_function(backend, name):
    logits, plain, args = deferred_and_plain(VIEWS[name])
    was_deferred = getattr(logits, "is_deferred", False)
    target = TARGET[: logits.shape[0]]
    if backend.startswith("cce"):
        code = compiled(loss_of, backend=backend)
    else:
        code = torch.compile(loss_of, backend=backend, fullgraph=True)
    cce_inductor.clear_reports()
    loss, expected = code(logits, target), loss_of(plain, target)
    torch.testing.assert_close(loss, expected)
    if expected.requires_grad:
        mine = torch.autograd.grad(loss, args)
        torch.testing.assert_close(mine, torch.autograd.grad(expected, args), rtol=1e-4, atol=1e-5)
    if backend.startswith("cce") and was_deferred:
        (report,) = cce_inductor.reports()
        assert report.rewritten
        assert logits.is_deferred


def test_another_compiled_function_with_other_shapes():
    code = compiled(loss_of)
    for tokens in (6, 5, 4, 3):
        args = [leaf(tokens, HIDDEN), leaves()[1]]
        logits, plain, _ = deferred_and_plain(args=args)
        loss = code(logits, TARGET[:tokens])
        torch.testing.assert_close(loss, loss_of(plain, TARGET[:tokens]))
        mine = torch.autograd.grad(loss, args)
        theirs = torch.autograd.grad(loss_of(plain, TARGET[:tokens]), args)
        torch.testing.assert_close(mine, theirs)
        assert logits.is_deferred


SIZED = {
    "shifted": lambda z: z[:, :-1].contiguous().view(-1, VOCABULARY),
    "last": lambda z: z[:, -1],
    "flat": lambda z: z.flatten(0, 1),
    "some": lambda z: z[:, :2].reshape(-1, VOCABULARY) * 2,
    "indexed": lambda z: z.view(-1, VOCABULARY)[torch.tensor([0, 2])],
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", SIZED)
def test_another_compiled_function_with_rows_of_other_lengths(name, dynamic):
    """The number of compilations is that for plain tensors: one for the first length, one for any
    length, and one for any number of sequences."""

    def entropy(logits):
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()

    backend = "cce_inductor" if name == "last" else "cce_inductor_eager"
    code = compiled(entropy, dynamic=dynamic, backend=backend)
    for batch, length in ((2, 3), (2, 4), (2, 6), (3, 7), (4, 9), (5, 8), (2, 5)):
        args = [leaf(batch, length, HIDDEN, seed=length), leaves()[1]]
        logits, plain, _ = deferred_and_plain(SIZED[name], args)
        value, expected = code(logits), entropy(plain)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value, args), torch.autograd.grad(expected, args)
        )
        assert logits.is_deferred
    second = [report for report in cce_inductor.reports() if not report.loss.endswith("returned")]
    assert len(second) <= 3


def test_another_compiled_function_with_one_sequence():
    """A dimension of size 1 may have any stride."""
    args = [leaf(1, 3, HIDDEN), leaves()[1]]
    logits, plain, _ = deferred_and_plain(lambda z: z[:, -1:].reshape(-1, VOCABULARY), args)
    loss = compiled(loss_of)(logits, TARGET[:1])
    torch.testing.assert_close(loss, loss_of(plain, TARGET[:1]))


def with_norm(logits, target):
    return F.cross_entropy(logits.float(), target) + logits.cumsum(-1).float().norm()


@pytest.mark.parametrize("inner", [False, True], ids=["float32 inside", "bfloat16 inside"])
@pytest.mark.parametrize("outer", [False, True], ids=["float32 outside", "bfloat16 outside"])
def test_another_compiled_function_under_another_autocast(outer, inner):
    """The logits keep their dtype."""
    x, w = leaves()
    middle = leaf(HIDDEN, HIDDEN, seed=2)

    def model(x, middle, w):
        return F.linear(F.linear(x, middle), w)

    results = []
    for first, second in (
        (compiled(model, defer_logits="always"), compiled(with_norm)),
        (model, with_norm),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=inner):
            logits = first(x, middle, w)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            loss = second(logits, TARGET)
        results.append((logits.dtype, loss, *torch.autograd.grad(loss, (x, middle, w))))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=3e-2, atol=3e-2)
    if not inner:
        torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-4, atol=1e-4)


def test_graph_break_after_autocast():
    def fn(x, w, target):
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.linear(F.linear(x, x.mT @ x), w)
        torch._dynamo.graph_break()
        return with_norm(logits, target)

    code = compiled(fn, defer_logits="always", fullgraph=False)
    same_numbers(fn, code, [*leaves(), TARGET], rtol=3e-2, atol=3e-2)


WITHOUT_GRADIENTS = {
    "a difference": lambda z, x: z.sub_(x[:, :1]).shape,
    "a row": lambda z, x: z[0].fill_(1.0).shape,
    "a range": lambda z, x: z[:, :9].mul_(0.5).shape,
    "numbers": lambda z, x: z.argmax(-1),
    "a loss": lambda z, x: F.cross_entropy(z, TARGET),
    "the shape": lambda z, x: z.shape,
}


@pytest.mark.parametrize("use", WITHOUT_GRADIENTS.values(), ids=WITHOUT_GRADIENTS)
@pytest.mark.parametrize("whole", [False, True], ids=["a part", "the whole function"])
def test_deferred_logits_are_met_without_gradients(use, whole):
    """Dynamo flattens the logits when it first meets them, and again after tracing."""

    def first(x, w):
        return F.linear(x.tanh(), w)

    def second(logits, x, target):
        with torch.no_grad():
            used = use(logits, x)
        loss = F.cross_entropy(logits, target)
        return (loss, used) if isinstance(used, torch.Tensor) else loss

    def fn(x, w, target):
        logits = first(x, w)
        torch._dynamo.graph_break()
        return second(logits, x, target)

    code = compiled(fn, defer_logits="always", fullgraph=False)
    with torch.set_grad_enabled(not whole):
        for _ in range(2):
            same_numbers(fn, code, [*leaves(), TARGET])


def test_what_was_compiled_keeps_no_arguments():
    second = compiled(loss_of)
    logits, _, args = deferred_and_plain()
    second(logits, TARGET)
    kept = [weakref.ref(tensor) for tensor in (logits, *args)]
    del logits, _, args
    gc.collect()
    assert [reference() for reference in kept] == [None] * 3


def test_an_argmax_skips_no_gradient():
    logits, plain, _ = deferred_and_plain()
    weights = leaf(TOKENS, seed=4)
    result = compiled(lambda z, y: y * z.argmax(-1))(logits, weights)
    assert result.requires_grad
    logits.retain_grad()
    plain.retain_grad()
    loss_of(logits, TARGET).backward()
    loss_of(plain, TARGET).backward()
    torch.testing.assert_close(logits.grad, plain.grad)


def test_the_shape_of_stale_logits_is_known_in_a_compiled_function():
    logits, _, args = deferred_and_plain(lambda z: z[1:])
    code = compiled(lambda z, y: y * z.shape[0])
    for _ in range(2):
        assert code(logits, torch.ones(1)).item() == TOKENS - 1
        with torch.no_grad():
            args[1].add_(1)
    with pytest.raises(StaleLogitsError):
        compiled(loss_of, fullgraph=False)(logits, TARGET[1:])


def test_another_compiled_function_with_logits_made_otherwise():
    """Code that was compiled for one formula does not serve logits with another."""
    code = compiled(loss_of, fullgraph=False)
    for change in (
        lambda z: z,
        lambda z: z * 2,
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: z[torch.tensor([0, 1, 2, 3, 4, 4])],
        lambda z: z.detach(),
        lambda z: z if z.norm() else None,
    ):
        logits, plain, _ = deferred_and_plain(change)
        torch.testing.assert_close(code(logits, TARGET), loss_of(plain, TARGET))
        torch.testing.assert_close(code(plain, TARGET), loss_of(plain, TARGET))


def captured(fn, *args, whole=True):
    """Return the result of `compile_with_deferral` for the graph of `fn`, after running it."""
    found = []

    def compiler(module, example_inputs):
        rewrite(module, Options(min_logits_bytes=0), deferral=deferral_for(module))
        return module.forward

    def backend(module, example_inputs):
        if not whole:
            del module.compile_subgraph_reason
        found.append(compile_with_deferral(compiler, module, example_inputs))
        return module.forward

    torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return found[0]


def test_code_for_one_formula_is_given_another():
    """If Dynamo's guards miss that the formula differs, the graph runs without being compiled."""
    logits, _, _ = deferred_and_plain()
    code = captured(loss_of, logits, TARGET)
    others = [leaf(TOKENS, 2 * HIDDEN), leaf(VOCABULARY, 2 * HIDDEN, seed=1)]
    for change, args in (
        (lambda z: z, None),
        (lambda z: z * 2, None),
        (lambda z: z * 2.0, None),
        (lambda z: z.detach(), None),
        (lambda z: z, others),
        (lambda z: z.mul_(3), None),
    ):
        torch._dynamo.reset()
        logits, plain, _ = deferred_and_plain(change, args)
        torch.testing.assert_close(code(logits, TARGET)[0], loss_of(plain, TARGET))


def test_parts_of_a_graph_take_each_others_results():
    """Parts of a graph under DistributedDataParallel: the guards have seen a plain tensor."""
    logits, plain, _ = deferred_and_plain()
    code = captured(loss_of, plain, TARGET, whole=False)
    torch.testing.assert_close(code(logits, TARGET)[0], loss_of(plain, TARGET))
    assert not logits.is_deferred


def test_the_weight_is_an_argument_too():
    def fn(logits, w, target):
        return F.cross_entropy(logits, target) + w.pow(2).sum()

    logits, plain, args = deferred_and_plain()
    loss = compiled(fn)(logits, args[1], TARGET)
    mine = torch.autograd.grad(loss, args)
    theirs = torch.autograd.grad(fn(plain, args[1], TARGET), args)
    torch.testing.assert_close(mine, theirs)


def test_a_compiled_function_returns_them_again():
    def fn(logits, target):
        return F.cross_entropy(logits, target), logits * 2

    logits, plain, args = deferred_and_plain()
    loss, doubled = compiled(fn)(logits, TARGET)
    assert doubled.is_deferred
    assert logits.is_deferred
    mine = torch.autograd.grad(loss + doubled.cumsum(-1).sum(), args)
    loss, doubled = fn(plain, TARGET)
    theirs = torch.autograd.grad(loss + doubled.cumsum(-1).sum(), args)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cce_inductor_eager", "cce_inductor", "inductor"])
def test_a_compiled_function_returns_views_of_them(backend):
    def fn(logits):
        return logits.view(-1), logits[0]

    logits, plain, _ = deferred_and_plain()
    logits, plain = logits.detach(), plain.detach()
    code = compiled(fn, backend=backend) if "cce" in backend else torch.compile(fn)
    for each in (logits, plain):
        flat, first = code(each)
        first.add_(1)
        flat[-1] = 7
    torch.testing.assert_close(logits + 0, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_function_reads_their_data(backend):
    """Dynamo reads attributes of the argument itself while it traces."""

    def fn(logits, target):
        largest = logits.data.abs().amax() + logits.detach().amin()
        torch._dynamo.graph_break()
        return F.cross_entropy(logits.data + logits / largest, target), logits.is_leaf

    logits, plain, args = deferred_and_plain()
    if "cce" in backend:
        code = compiled(fn, backend=backend, fullgraph=False)
    else:
        code = torch.compile(fn, backend=backend)
    loss, *said = code(logits, TARGET)
    expected, *eager = fn(plain, TARGET)
    assert said == eager
    torch.testing.assert_close(loss, expected)
    mine = torch.autograd.grad(loss, args)
    torch.testing.assert_close(mine, torch.autograd.grad(expected, args), rtol=1e-4, atol=1e-5)


def test_a_compiled_function_changes_them():
    def fn(logits):
        logits.mul_(2)
        return logits.cumsum(-1)

    for backend in ("cce_inductor_eager", "cce_inductor"):
        torch._dynamo.reset()
        logits, plain, _ = deferred_and_plain()
        logits, plain = logits.detach(), plain.detach()
        torch.testing.assert_close(compiled(fn, backend=backend)(logits), fn(plain))
        torch.testing.assert_close(logits + 0, plain)


@pytest.mark.parametrize("backend", ["cce_inductor_eager", "cce_inductor"])
def test_graph_break_between_projection_and_loss(backend):
    def fn(x, w, target):
        logits = F.linear(x.tanh(), w)
        torch._dynamo.graph_break()
        return F.cross_entropy(logits.float(), target), logits

    args = [*leaves(), TARGET]
    code = compiled(fn, backend=backend, defer_logits="always", fullgraph=False)
    _, logits = same_numbers(fn, code, args)
    assert isinstance(logits, DeferredLogits)
    first, second = cce_inductor.reports()
    assert first.loss == "linear > returned"
    assert second.loss == "linear > float > cross_entropy"
    assert first.rewritten
    assert second.rewritten
    with torch.no_grad():
        loss, logits = code(*args)
        torch.testing.assert_close(loss, fn(*args)[0])


def test_stale_in_a_compiled_function():
    logits, _, args = deferred_and_plain()
    with torch.no_grad():
        args[1].add_(1)
    with pytest.raises(Exception, match='defer_logits="never"'):
        compiled(loss_of)(logits, TARGET)


def test_explained():
    with cce_inductor.installed(min_logits_bytes=0, defer_logits="always"):
        explanation = cce_inductor.explain(head, *leaves())
    assert str(explanation).splitlines()[:2] == [
        "1 loss(es) in 1 graph(s), 1 rewritten",
        "rewritten: linear > returned",
    ]
