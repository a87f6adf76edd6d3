"""Norms and other reductions of the gradient of deferred logits, without storing it."""

import pytest
import torch
import torch.nn.functional as F
from deferred_logits import LENGTH, REDUCTIONS, TARGET, Head
from test_gradient import WITH_GRADIENT
from test_several_heads import LOSSES, Heads
from torch.utils._python_dispatch import TorchDispatchMode

import cce_inductor
from cce_inductor.deferred import rows
from cce_inductor.deferred.eager import few_rows
from cce_inductor.deferred.gradient import NotByRowsError, Recorder, sent_term
from cce_inductor.deferred.row_gradients import _numbers_in, numbered
from cce_inductor.deferred.tensor import defer

pytestmark = pytest.mark.usefixtures("small_workspace")


@pytest.fixture
def small_workspace():
    """Every gradient is larger than the workspace, and a block is one row."""
    with cce_inductor.installed(workspace_bytes=1):
        yield


def loss_of(logits):
    return F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())


GRADIENT_REDUCTIONS = {
    "norm": lambda g: g.norm(),
    "norm of float32": lambda g: g.float().norm(),
    "linalg norm": lambda g: torch.linalg.vector_norm(g),
    "largest magnitude": lambda g: g.abs().max(),
    "maximum norm": lambda g: g.norm(float("inf")),
    "least norm": lambda g: g.norm(-float("inf")),
    "sum of magnitudes": lambda g: g.norm(1),
    "number of nonzeros": lambda g: g.norm(0),
    "count of nonzeros": lambda g: g.count_nonzero(),
    "sum of squares": lambda g: (g**2).sum(),
    "product with itself": lambda g: (g * g).sum(),
    "mean": lambda g: g.mean(),
    "mean of squares": lambda g: g.square().mean(),
    "standard deviation": lambda g: g.std(),
    "variance of a population": lambda g: g.var(correction=0),
    "maximum": lambda g: g.max(),
    "minimum": lambda g: g.amin(),
    "any nan": lambda g: g.isnan().any(),
    "all finite": lambda g: torch.isfinite(g).all(),
    "share above a bound": lambda g: (g.abs() > 1e-3).float().mean(),
    "norm of each row": lambda g: g.norm(dim=-1),
    "norm of each row, dimension kept": lambda g: g.norm(dim=-1, keepdim=True),
    "deviation of each row": lambda g: g.std(-1),
    "maximum of each row": lambda g: g.abs().amax(-1),
    "scaled": lambda g: (g / 0.5).norm(),
    "reshaped": lambda g: g.reshape(-1, g.shape[-1]).norm(dim=-1),
}
"""Reductions that are computed in blocks of rows."""


def reductions_in_a_hook(loss, logits, reductions):
    """Return the reductions of the gradient of logits."""
    found = []
    logits.register_hook(lambda gradient: found.extend(each(gradient) for each in reductions))
    loss(logits).float().square().sum().backward()
    return found


def assert_same_reductions(loss, dtype=torch.float32, reductions=GRADIENT_REDUCTIONS, rtol=1e-4):
    half = dtype in (torch.bfloat16, torch.float16)
    tolerance = {"rtol": 3e-2, "atol": 1e-2} if half else {"rtol": rtol, "atol": 1e-6}
    ours, theirs = (
        reductions_in_a_hook(loss, logits, reductions.values())
        for logits in (Head(dtype=dtype).deferred(), Head(dtype=dtype).plain())
    )
    for name, mine, their in zip(reductions, ours, theirs, strict=True):
        assert type(mine) is torch.Tensor
        torch.testing.assert_close(
            mine, their, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_every_reduction(dtype, computed):
    assert_same_reductions(loss_of, dtype)
    assert not computed


def total(value):
    return value if isinstance(value, torch.Tensor) else sum(each.sum() for each in value)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_gradient_of_every_loss(name, computed):
    some = {key: GRADIENT_REDUCTIONS[key] for key in ("norm", "largest magnitude", "any nan")}
    assert_same_reductions(lambda z: total(REDUCTIONS[name](z)), reductions=some)
    assert not computed


SUMS = ("expand", "index of rows")
"""A row of the gradient is the sum of several, so the gradient is computed."""


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_way_from_the_loss(name, computed):
    some = {key: GRADIENT_REDUCTIONS[key] for key in ("norm", "largest magnitude", "mean")}
    tolerance = 3e-2 if name == "bfloat16" else 1e-4
    assert_same_reductions(
        lambda z: WITH_GRADIENT[name](z).float().logsumexp(-1), reductions=some, rtol=tolerance
    )
    assert bool(computed) == (name in SUMS)


VIEWS_OF_SEVERAL = {
    *("contrasted", "jsd", "jsd by a method"),
    *("sum", "mean", "mean of the last but one", "sum that keeps the dimension"),
}
"""The loss reads a view or a softmax of a combination of both heads: no rows of it are found."""


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_two_heads(name, computed):
    found = []
    for kind in ("deferred", "plain"):
        heads = getattr(Heads(trains_teacher=True), kind)()
        norms = [[], []]
        for each, own in zip(heads, norms, strict=True):
            each.register_hook(lambda gradient, own=own: own.append(gradient.norm()))
        LOSSES[name](*heads).backward()
        found.append(norms)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert bool(computed) == (name in VIEWS_OF_SEVERAL)


def test_a_teacher_without_gradient(computed):
    found = []
    for kind in ("deferred", "plain"):
        student, teacher = getattr(Heads(), kind)()
        norms = []
        student.register_hook(lambda gradient, norms=norms: norms.append(gradient.norm()))
        F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum").backward()
        found += norms
    torch.testing.assert_close(*found)
    assert not computed


def test_several_losses(computed):
    def loss(logits):
        return loss_of(logits) + 0.1 * logits.logsumexp(-1).square().mean()

    assert_same_reductions(loss)
    assert not computed


def test_a_gradient_that_is_flattened(computed):
    assert_same_reductions(loss_of, reductions={"flattened": lambda g: g.flatten().norm()})
    assert not computed


def test_gradient_that_is_retained(computed):
    norms = []
    for logits in (Head().deferred(), Head().plain()):
        logits.retain_grad()
        loss_of(logits).backward()
        norms.append(logits.grad.norm())
    torch.testing.assert_close(*norms)
    assert not computed


def test_gradients_of_the_head_stay_fused(computed):
    """A reduction changes nothing about the gradients of the hidden state and the weight."""
    head, other = Head(), Head()
    logits = head.deferred()
    logits.register_hook(lambda gradient: None if gradient.norm() > 0 else gradient)
    loss_of(logits).backward()
    loss_of(other.deferred()).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(head.leaves, other.leaves, strict=True))
    assert not computed


def norm_under_anomaly_mode(gradient):
    with torch.autograd.detect_anomaly():
        return gradient.norm()


UNUSUAL = {
    "sum of integers": lambda g: (g * 1000).sum(dtype=torch.int64),
    "sum of integers in each row": lambda g: (g * 1000).sum(-1, dtype=torch.int32),
    "sum in double precision": lambda g: g.sum(dtype=torch.float64),
    "complex deviation": lambda g: (g * 1j).std(),
    "complex norm of each row": lambda g: (g * 1j).norm(dim=-1),
    "complex mean": lambda g: ((g * 1j) * (g * 1j) * 1j).mean(),
    "dtype of a condition": lambda g: ((g > 0) * 0.5).sort().values,
    "sum of truths": lambda g: g.bool().sum(),
    "sum of truncated": lambda g: (g * 1000).long().sum(),
    "any of each element": lambda g: (g > 0).any(dim=()),
    "sum over no dimensions": lambda g: g.sum(()),
    "sum with a number": lambda g: (g + 1e-8).norm(),
    "product with a row of logits": lambda g: (g * SHIFT[:1]).norm(),
    "under inference mode": lambda g: torch.inference_mode()(g.norm)(),
    "under anomaly mode": norm_under_anomaly_mode,
}
SHIFT = torch.randn(*TARGET.shape, 50, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_reductions(name):
    assert_same_reductions(loss_of, reductions={name: UNUSUAL[name]})


def test_errors_are_those_of_pytorch():
    logits = Head().deferred()
    logits.register_hook(lambda gradient: (gradient > 0).var())
    with pytest.raises(RuntimeError, match="floating point"):
        loss_of(logits).backward()


def test_the_terms_of_a_cast_to_integers_are_added_first():
    """The gradients of two equal losses cancel before the cast, not after it."""

    def loss(logits):
        return loss_of(logits) + 0.3 * logits.logsumexp(-1).square().mean()

    some = {key: UNUSUAL[key] for key in ("sum of truncated", "sum of truths")}
    assert_same_reductions(loss, reductions=some)
    assert_same_reductions(lambda z: loss_of(z) - loss_of(z), reductions=some)


def test_logits_that_broadcast_against_the_gradient():
    norms = []
    for kind in ("deferred", "plain"):
        logits = getattr(Head(), kind)()
        first = logits.detach()[:1]
        logits.register_hook(
            lambda gradient, first=first: norms.append(
                [(gradient * first).norm(), torch.where(first > 0, gradient, 0.0).norm()]
            )
        )
        loss_of(logits).backward()
    torch.testing.assert_close(*norms)


EMPTY = {
    "no row": lambda z: F.cross_entropy(z[TARGET < 0], TARGET[TARGET < 0], reduction="sum"),
    "no row beside others": lambda z: EMPTY["no row"](z) + loss_of(z),
    "shifted by all": lambda z: (
        F.cross_entropy(z[:, LENGTH:].flatten(0, 1), TARGET[:, LENGTH:].flatten(), reduction="sum")
        + loss_of(z)
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_losses_without_rows(name):
    some = {key: GRADIENT_REDUCTIONS[key] for key in ("norm", "largest magnitude", "any nan")}
    assert_same_reductions(EMPTY[name], reductions=some)


def test_each_row_is_computed_for_its_own_chunk(monkeypatch):
    calls = []
    monkeypatch.setattr(rows, "few_rows", lambda each: calls.append(each) or few_rows(each))
    count = 24
    x, weight = torch.randn(count, 4, requires_grad=True), torch.randn(30, 4)
    logits = defer(x, weight, None, torch.float32)
    norms = []
    logits.register_hook(lambda gradient: norms.append(gradient.norm()))
    sum(F.cross_entropy(logits[i : i + 1], torch.tensor([i])) for i in range(count)).backward()
    assert len(norms) == 1
    assert len(calls) == 2 * count


def test_the_kind_of_numbers_does_not_decide(computed):
    """A condition of float32 takes a quarter of the memory, and is computed from the float32."""
    with cce_inductor.installed(workspace_bytes=2 * TARGET.numel() * 50):
        assert_same_reductions(loss_of, reductions={"any nan": GRADIENT_REDUCTIONS["any nan"]})
    assert not computed


COMPUTED = {
    "norm of each column": lambda g: g.norm(dim=(0, 1)),
    "sorted": lambda g: g.sort().values.sum(),
    "product": lambda g: g.exp().prod(),
    "median": lambda g: g.median(),
    "element": lambda g: g[0, 0, 0],
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_needs_the_gradient(name, computed):
    assert_same_reductions(loss_of, reductions={name: COMPUTED[name]})
    assert len(computed) == 1


def test_a_function_that_a_hook_returns(computed):
    """It takes the gradient's place, so its values are needed."""
    head = Head()
    logits = head.deferred()
    logits.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    loss_of(logits).backward()
    other = Head()
    logits = other.plain()
    logits.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    loss_of(logits).backward()
    for mine, theirs in zip(head.leaves, other.leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert computed


def test_a_function_that_a_hook_keeps():
    """It is computed before an optimizer can change the weight."""
    kept = []
    for kind in ("deferred", "plain"):
        head = Head()
        logits = getattr(head, kind)()
        logits.register_hook(lambda gradient: kept.append(gradient.abs()))
        loss_of(logits).backward()
        torch.optim.SGD(head.leaves, lr=1.0).step()
    torch.testing.assert_close(kept[0].sum(), kept[1].sum())
    torch.testing.assert_close(kept[0].plain(), kept[1])


def test_a_loss_that_reads_the_values(computed):
    def loss(logits):
        return loss_of(logits) * logits.std()

    assert_same_reductions(loss, reductions={"norm": torch.norm})


def test_a_small_gradient_is_computed(computed):
    with cce_inductor.installed(workspace_bytes=2**20):
        assert_same_reductions(loss_of, reductions={"norm": torch.norm})
    assert len(computed) == 1


def test_an_argument_that_has_changed(computed):
    head = Head()
    logits = head.deferred()
    logits.retain_grad()
    loss_of(logits).backward()
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(cce_inductor.StaleLogitsError, match="the weight"):
        logits.grad.norm()


class LargestResult(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(results):
            if type(each) is torch.Tensor and each.device.type != "meta":
                self.elements = max(self.elements, each.numel())
        return results


def test_memory():
    count, hidden, vocabulary = 64, 4, 1000
    x, weight = torch.randn(count, hidden, requires_grad=True), torch.randn(vocabulary, hidden)
    logits = defer(x, weight, None, torch.float32)
    norms = []

    def note(gradient):
        with LargestResult() as seen:
            norms.append(gradient.norm())
        norms.append(seen.elements)

    logits.register_hook(note)
    with cce_inductor.installed(workspace_bytes=2**17):
        F.cross_entropy(logits, torch.arange(count)).backward()
    (gradient,) = torch.autograd.grad(
        F.cross_entropy(plain := F.linear(x, weight), torch.arange(count)), plain
    )
    torch.testing.assert_close(norms[0], gradient.norm())
    assert norms[1] <= 10 * vocabulary


def test_a_compiled_loss(computed):
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(50, 4)
    target = torch.arange(6)

    def loss(logits):
        return F.cross_entropy(logits.float() * 2, target, label_smoothing=0.1)

    torch._dynamo.reset()
    norms = []
    for logits, fn in (
        (defer(hidden, weight, None, torch.float32), torch.compile(loss)),
        (F.linear(hidden, weight), loss),
    ):
        logits.register_hook(lambda gradient: norms.append(gradient.norm()))
        fn(logits).backward()
    torch.testing.assert_close(*norms)
    assert not computed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_numbered_rows(dtype):
    matrix = numbered(70_000, 3, dtype, torch.device("cpu"))
    head, numbers = _numbers_in(matrix)
    assert head == 3
    assert torch.equal(numbers, torch.arange(70_000))
    assert (matrix @ matrix[:5].t()).isnan().all()
    with pytest.raises(NotByRowsError):
        _numbers_in(torch.randn(3, 6))
    with pytest.raises(NotByRowsError):
        _numbers_in(torch.cat([matrix[:2], numbered(2, 4, dtype, matrix.device)]))


def test_a_gradient_whose_paths_are_being_found():
    with pytest.raises(NotByRowsError):
        rows.rows_of(sent_term(Recorder(), 0))
