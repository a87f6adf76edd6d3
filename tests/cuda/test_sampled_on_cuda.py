"""The sampled gradient on a GPU: numbers, and how often the host waits."""

import contextlib
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import PROGRAMS, case, expected, gradients_of, random
from torch.utils.checkpoint import checkpoint

import cce_inductor
from cce_inductor.kernels import sampling
from cce_inductor.kernels.blockwise import control_variate, engine
from cce_inductor.kernels.blockwise.product import WideProduct
from cce_inductor.kernels.head import TILE
from cce_inductor.testing import relative_error
from cce_inductor.torch_internals import wide_products

DEVICE = "cuda"
ROWS, HIDDEN, VOCABULARY, BELOW = 512, 128, 16 * TILE + 300, 1 / 8
DRAWS = 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def installed():
    torch._dynamo.reset()
    cce_inductor.share_visited()
    cce_inductor.clear_reports()
    with cce_inductor.installed(min_logits_bytes=0, on_error="raise", sample_below=BELOW):
        yield


def problem(dtype=torch.float32, ignored=True):
    input = (2 * random(ROWS, HIDDEN)).to(DEVICE, dtype).requires_grad_()
    weight = (random(VOCABULARY, HIDDEN) / HIDDEN**0.5).to(DEVICE, dtype).requires_grad_()
    target = torch.arange(ROWS, device=DEVICE) * 31 % VOCABULARY
    if ignored:
        target[1::3] = -100
    return input, weight, target


def loss(input, weight, target):
    return F.cross_entropy(F.linear(input, weight).float(), target)


def in_eager_code(input, weight, target):
    return cce_inductor.linear_cross_entropy(input, weight, target, sample_below=BELOW)


def compiled(input, weight, target):
    return torch.compile(loss)(input, weight, target)


def gradients(fn, input, weight, target):
    result = fn(input, weight, target)
    return [result.detach(), *torch.autograd.grad(result, (input, weight))]


def assert_sampled(ours, exact):
    torch.testing.assert_close(ours[0].float(), exact[0].float(), rtol=1e-2, atol=1e-2)
    for mine, theirs in zip(ours[1:], exact[1:], strict=True):
        assert 1e-5 < relative_error(mine, theirs) < 0.3
    assert 0.0 < cce_inductor.share_visited() < 0.75


def assert_exact(ours, exact):
    for mine, theirs in zip(ours, exact, strict=True):
        assert relative_error(mine, theirs) < 2e-2
    assert cce_inductor.share_visited() is None


@pytest.mark.parametrize("fn", [in_eager_code, compiled])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers(dtype, fn):
    inputs = problem(dtype)
    assert_sampled(gradients(fn, *inputs), gradients(loss, *inputs))
    if fn is compiled:
        assert all(report.sampled for report in cce_inductor.reports())


@pytest.mark.parametrize("skips", [True, False], ids=["skips ignored rows", "skips none"])
@pytest.mark.parametrize("name", ["target", "softcap", "entropy", "class weights", "means"])
def test_unbiased(name, skips, monkeypatch):
    """The mean of many draws is about the exact gradient, and nearer than a draw is."""
    monkeypatch.setattr(control_variate, "ROWS_OF_CLUSTER", 8)
    input, head = case(PROGRAMS[name], 9 * TILE + 300, 33, torch.float32, sample_below=0.5)
    skips = skips and any(each.ignores for each in head.program.indexed)
    head = dataclasses.replace(head, skip_ignored=skips)
    _, exact = expected(input, head)
    moved = dataclasses.replace(
        head,
        linear_weight=head.linear_weight.to(DEVICE),
        linear_bias=head.linear_bias.to(DEVICE),
        operands=[each.to(DEVICE) if each.dim() else each for each in head.operands],
    )

    def on_device(grads, *others):
        grads = [None if each is None else each.to(DEVICE) for each in grads]
        return engine.compute_gradients(grads, *others)

    sums = [torch.zeros_like(each) for each in exact]
    spread = torch.zeros(len(exact), dtype=torch.float64)
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)

        def offsets(lse, generator=generator):
            drawn = torch.randint(sampling.UNIT, (len(lse),), generator=generator)
            return drawn.to(lse.device)

        monkeypatch.setattr(sampling, "offsets", offsets)
        _, found = gradients_of(engine.compute_statistics, on_device, input.to(DEVICE), moved)
        for at, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
            sums[at] += ours.cpu().double() - theirs
            spread[at] += (ours.cpu().double() - theirs).square().sum()
    for total, squares, theirs in zip(sums, spread, exact, strict=True):
        allowed = 2.5 * (squares / DRAWS).sqrt() / DRAWS**0.5 + 1e-5 * theirs.norm()
        assert (total / DRAWS).norm() <= allowed


def test_ignored_rows_are_not_read():
    input, weight, target = problem()
    plain = gradients(in_eager_code, input, weight, target)
    with torch.no_grad():
        input[1::3] = torch.nan
    again = gradients(in_eager_code, input, weight, target)
    for ours, theirs in zip(again, plain, strict=True):
        assert ours.equal(theirs)


@contextlib.contextmanager
def waits():
    """Yield a list that has a warning for each time that the host has waited, at the end."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        seen = []
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen += [each for each in found if "synchroniz" in str(each.message)]


def test_waits_are_seen():
    with waits() as found:
        torch.ones(2, device=DEVICE).sum().item()
    assert len(found) == 1


@pytest.mark.parametrize("fn", [in_eager_code, torch.compile(loss)], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_host_waits_once_in_the_backward(dtype, fn):
    input, weight, target = problem(dtype)
    fn(input, weight, target).backward()
    with waits() as in_forward:
        result = fn(input, weight, target)
    with waits() as in_backward:
        result.backward()
    assert (len(in_forward), len(in_backward)) == (0, 1)


def test_cuda_graphs_of_inductor_are_exact():
    inputs = problem()
    exact = gradients(loss, *inputs)
    fn = torch.compile(loss, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_exact(gradients(fn, *inputs), exact)
    (report,) = cce_inductor.reports()
    assert report.exact_because.startswith("CUDA graphs")


def test_cuda_graphs_of_eager_code_are_exact():
    """The first steps, which are not recorded, are sampled."""
    inputs = problem()
    exact = gradients(loss, *inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            assert_sampled(gradients(in_eager_code, *inputs), exact)
    torch.cuda.current_stream().wait_stream(stream)
    # The operator compiles itself before it is recorded.
    gradients(cce_inductor.linear_cross_entropy, *inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = gradients(in_eager_code, *inputs)
    graph.replay()
    assert_exact(ours, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_inputs_have_the_same_bits(dtype):
    inputs = problem(dtype)
    first = gradients(in_eager_code, *inputs)
    recomputed = gradients(
        lambda *args: checkpoint(in_eager_code, *args, use_reentrant=False), *inputs
    )
    for again in (gradients(in_eager_code, *inputs), recomputed):
        assert all(ours.equal(theirs) for ours, theirs in zip(again, first, strict=True))


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("shape", [(513, 1024, 256), (1, 1024, 256), (1024, 300, 77)], ids=str)
def test_products_of_the_library_are_wide(shape, beta):
    m, k, n = shape
    device = torch.device(DEVICE)
    a, b = (random(*size).to(device, torch.bfloat16) for size in ((m, k), (k, n)))
    exact = a.double() @ b.double() + 3.0 * beta
    out = torch.full((m, n), 3.0 if beta else torch.nan, device=device)
    assert wide_products.applies(a.dtype, device)
    WideProduct(a.dtype, m * n, device)(out, a, b, beta=beta)
    assert relative_error(out, exact) < 1e-5
