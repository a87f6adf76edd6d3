"""`sample_below` from the options to the gradients."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from checks import capture, code
from expecttest import assert_expected_inline
from torch.utils.checkpoint import checkpoint

import cce_inductor
from cce_inductor import Options, backends, linear_cross_entropy
from cce_inductor.kernels.head import TILE
from cce_inductor.rewriting.rewrite import rewrite
from cce_inductor.testing import assert_matches_eager
from cce_inductor.torch_internals import cuda_graphs

ROWS, HIDDEN, VOCABULARY, BELOW = 64, 24, 10 * TILE, 0.25
OPTIONS = {"min_logits_bytes": 0, "sample_below": BELOW}


def tensors(rows=ROWS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
    input, weight = draw(rows, HIDDEN), draw(VOCABULARY, HIDDEN) * 0.5
    target = torch.randint(VOCABULARY, (rows,), generator=generator)
    return input.requires_grad_(), weight.requires_grad_(), target


def loss(input, weight, target):
    return F.cross_entropy(F.linear(input, weight), target)


def gradients(fn, *args):
    """Return the loss, and the gradients of the arguments that require one."""
    leaves = [each for each in args if isinstance(each, torch.Tensor) and each.requires_grad]
    result = fn(*args)
    return [result.detach(), *torch.autograd.grad(result, leaves)]


def compiled(fn, **options):
    torch._dynamo.reset()
    options = {**OPTIONS, **options}
    return torch.compile(fn, backend="cce_inductor_eager", options=options)


def assert_sampled(ours, exact):
    """Assert that the loss is exact, and that each gradient is near the exact one and not it."""
    torch.testing.assert_close(ours[0], exact[0])
    for mine, theirs in zip(ours[1:], exact[1:], strict=True):
        assert 1e-4 * theirs.norm() < (mine - theirs).norm() < 0.5 * theirs.norm()
    share = cce_inductor.share_visited()
    assert share is not None
    assert 0.1 <= share < 0.75


@pytest.fixture(autouse=True)
def forget():
    cce_inductor.share_visited()
    cce_inductor.clear_reports()


def report():
    (only,) = cce_inductor.reports()
    return only


# Where it can be asked for


def test_graph():
    (module,) = capture(loss, *tensors())
    rewrite(module, Options(min_logits_bytes=0, sample_below=1 / 32))
    assert_expected_inline(
        code(module),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True, sample_below = 0.03125)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 10240, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_backend():
    exact = gradients(loss, *tensors())
    assert_sampled(gradients(compiled(loss), *tensors()), exact)
    assert report().sampled
    assert report().exact_because is None
    assert "its gradient is sampled" in str(report())


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_install(backend):
    exact = gradients(loss, *tensors())
    torch._dynamo.reset()
    with cce_inductor.installed(min_logits_bytes=0, sample_below=BELOW):
        fn = torch.compile(loss, backend=backend)
        if backend == "inductor":
            assert_sampled(gradients(fn, *tensors()), exact)
        else:  # The package is not part of other backends.
            assert all(map(torch.allclose, gradients(fn, *tensors()), exact))
            assert cce_inductor.share_visited() is None


def test_function():
    exact = gradients(loss, *tensors())
    ours = gradients(lambda *args: linear_cross_entropy(*args, sample_below=BELOW), *tensors())
    assert_sampled(ours, exact)


def test_deferred_logits():
    input, weight, target = tensors()
    exact = gradients(loss, input, weight, target)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.weight.data.copy_(weight.detach())
    cce_inductor.defer(head)
    with cce_inductor.installed(min_logits_bytes=0, sample_below=BELOW):
        result = F.cross_entropy(head(input), target)
        found = torch.autograd.grad(result, [input, head.weight])
    assert_sampled([result.detach(), *found], exact)


def test_assertions_for_models_compare_exact_gradients():
    with cce_inductor.installed(sample_below=BELOW):
        assert_matches_eager(loss, *tensors())
    assert cce_inductor.share_visited() is None


def test_exact_by_default():
    gradients(compiled(loss, sample_below=0.0), *tensors())
    assert (report().sampled, report().exact_because) == (False, None)
    assert "gradient" not in str(report())
    gradients(linear_cross_entropy, *tensors())
    assert cce_inductor.share_visited() is None


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-0.1, ValueError, r"sample_below must be in \[0, 1\], got -0.1"),
        (1.5, ValueError, r"sample_below must be in \[0, 1\], got 1.5"),
        (math.nan, ValueError, r"sample_below must be in \[0, 1\], got nan"),
        ("1/32", TypeError, "sample_below must be a float, got '1/32'"),
        (True, TypeError, "sample_below must be a float, got True"),
    ],
)
def test_wrong_values(value, error, message):
    with pytest.raises(error, match=message):
        Options.create(sample_below=value)
    with pytest.raises(error, match=message):
        linear_cross_entropy(*tensors(), sample_below=value)


# Losses


def smoothed(input, weight, target):
    return F.cross_entropy(F.linear(input, weight), target, label_smoothing=0.1)


def softcapped(input, weight, target):
    logits = 5 * torch.tanh(F.linear(input, weight) / 5)
    return F.cross_entropy(logits, target)


def with_z_loss(input, weight, target):
    logits = F.linear(input, weight)
    return F.cross_entropy(logits, target) + 0.01 * logits.logsumexp(-1).square().mean()


def with_entropy(input, weight, target):
    log_p = F.linear(input, weight).log_softmax(-1)
    picked = log_p.gather(1, target.unsqueeze(1)).mean()
    return 0.1 * (log_p.exp() * log_p).sum(-1).mean() - picked


def scaled(input, weight, target):
    return F.cross_entropy(0.7 * F.linear(input, weight), target, label_smoothing=0.05)


def rows_with_weights(input, weight, target):
    advantage = torch.linspace(-1, 1, len(target))
    return (advantage * F.cross_entropy(F.linear(input, weight), target, reduction="none")).sum()


@pytest.mark.parametrize(
    "fn", [smoothed, softcapped, with_z_loss, with_entropy, scaled, rows_with_weights]
)
def test_losses(fn):
    exact = gradients(fn, *tensors())
    ours = gradients(compiled(fn), *tensors())
    assert_sampled(ours, exact)
    assert all(each.sampled for each in cce_inductor.reports())


def with_accuracy(input, weight, target):
    logits = F.linear(input, weight)
    right = (logits.argmax(-1) == target).sum()
    return F.cross_entropy(logits, target) + 0 * right


def small(input, weight, target):
    return F.cross_entropy(F.linear(input, weight[: 2 * TILE]), target % (2 * TILE))


def smooth_and_softcapped(input, weight, target):
    logits = 5 * torch.tanh(F.linear(input, weight) / 5)
    return F.cross_entropy(logits, target, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (with_accuracy, "max depends on the order of the vocabulary"),
        (small, "the vocabulary has only 2 of at least 8 blocks"),
        (smooth_and_softcapped, "the sum of t2 has a gradient that depends on the logits"),
    ],
)
def test_exact_with_a_reason(fn, reason):
    exact = gradients(fn, *tensors())
    ours = gradients(compiled(fn), *tensors())
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert cce_inductor.share_visited() is None
    each = cce_inductor.reports()[0]
    assert (each.rewritten, each.sampled, each.exact_because) == (True, False, reason)
    assert f"its gradient is exact, because {reason}" in str(each)


def test_operand_that_needs_a_gradient():
    scale = torch.ones(VOCABULARY, requires_grad=True)

    def fn(input, weight, target, scale):
        return F.cross_entropy(F.linear(input, weight) * scale, target, label_smoothing=0.1)

    gradients(compiled(fn), *tensors(), scale)
    assert report().exact_because == "the sum of t0 has a gradient that depends on the logits"
    cce_inductor.clear_reports()
    gradients(compiled(fn), *tensors(), scale.detach())
    assert report().sampled


# CUDA graphs, with the CPU as the device that has them

GRAPHS = "CUDA graphs repeat launches of the same sizes, and samples differ in size"


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Nothing comes from a cache, where the decision would be an old one."""
    monkeypatch.setattr(cuda_graphs, "DEVICE", "cpu")
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def assert_exact(ours, exact):
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert cce_inductor.share_visited() is None


def with_argument(input, weight, target):
    return linear_cross_entropy(input, weight, target, sample_below=BELOW)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("how", ["backend", "install", "argument"])
def test_exact_in_cuda_graphs(how, mode, graphs_on_cpu):
    torch._dynamo.reset()
    exact = gradients(loss, *tensors())
    if how == "backend":
        fn = torch.compile(
            loss, backend=functools.partial(backends.cce_inductor, mode=mode, options=OPTIONS)
        )
        ours = gradients(fn, *tensors())
    elif how == "install":
        with cce_inductor.installed(min_logits_bytes=0, sample_below=BELOW):
            ours = gradients(torch.compile(loss, mode=mode), *tensors())
    else:
        ours = gradients(torch.compile(with_argument, mode=mode), *tensors())
    (assert_sampled if mode == "default" else assert_exact)(ours, exact)
    if how != "argument":
        assert report().exact_because == (None if mode == "default" else GRAPHS)
        assert report().sampled == (mode == "default")


def test_inductors_options_do_not_matter_in_eager_code(graphs_on_cpu):
    exact = gradients(loss, *tensors())
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert_sampled(gradients(with_argument, *tensors()), exact)


def test_the_report_is_right_for_graphs_that_are_not_compiled(graphs_on_cpu):
    """They are captured with the same options as those that are."""
    exact = gradients(loss, *tensors())
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        ours = gradients(compiled(loss), *tensors())
    assert_exact(ours, exact)
    assert report().exact_because == GRAPHS


@pytest.mark.parametrize("begins", ["before the forward", "before the backward"])
def test_exact_while_a_graph_is_recorded(begins, monkeypatch):
    """By whatever means: `torch.cuda.graph`, `make_graphed_callables`, another backend."""
    exact = gradients(loss, *tensors())
    input, weight, target = tensors()
    is_recording = begins == "before the forward"
    monkeypatch.setattr(cuda_graphs, "is_recording", lambda device: is_recording)
    result = with_argument(input, weight, target)
    is_recording = True
    assert_exact([result.detach(), *torch.autograd.grad(result, [input, weight])], exact)


# The same bits


def test_checkpoint_recomputes_the_same_gradient():
    fn = compiled(loss)
    plain = gradients(fn, *tensors())
    again = compiled(lambda *args: checkpoint(loss, *args, use_reentrant=False))
    for ours, theirs in zip(gradients(again, *tensors()), plain, strict=True):
        assert ours.equal(theirs)


def test_another_step_draws_other_numbers():
    fn = compiled(loss)
    input, weight, target = tensors()
    first = gradients(fn, input, weight, target)
    assert all(map(torch.equal, gradients(fn, input, weight, target), first))
    with torch.no_grad():
        weight.mul_(1.0001)
    moved = gradients(fn, input, weight, target)[1] - first[1]
    assert moved.norm() > 1e-3 * first[1].norm()  # more than the step changes the gradient


def test_one_compilation_for_all_numbers_of_rows():
    graphs = []

    def count(module, example_inputs):
        graphs.append(module)
        backend = torch._dynamo.lookup_backend("cce_inductor_eager")
        return backend(module, example_inputs, options=OPTIONS)

    torch._dynamo.reset()
    fn = torch.compile(loss, backend=count, dynamic=True)
    for rows in (64, 32, 100):
        exact = gradients(loss, *tensors(rows))
        assert_sampled(gradients(fn, *tensors(rows)), exact)
    assert len(graphs) == 1


def test_training_reaches_the_same_loss():
    """Full batches and a small step: noise with a bias would end elsewhere."""

    def train(fn):
        input, weight, target = tensors(256)
        optimizer = torch.optim.SGD([input, weight], lr=20.0)
        for _ in range(60):
            optimizer.zero_grad()
            value = fn(input, weight, target)
            value.backward()
            optimizer.step()
        return value.item()

    exact, sampled = train(loss), train(compiled(loss))
    assert exact < 0.7 * loss(*tensors(256)).item()
    assert sampled == pytest.approx(exact, rel=0.02)
