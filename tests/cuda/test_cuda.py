"""The compiled templates on a GPU: numbers, determinism, and no synchronization with the host."""

import threading

import pytest
import torch
import torch.nn.functional as F
from cases import (
    TILED_PROGRAMS,
    expected,
    head_of,
    operands_of,
    random,
    upstream_of,
    wants_gradient,
)
from torch._inductor.utils import run_and_get_code

import cce_inductor
from cce_inductor.testing import relative_error

DEVICE = "cuda"
CROSS_ENTROPY = "logsumexp(z); target(z, r0, -100)"
SHAPES = [(70, 300, 40), (129, 257, 64), (512, 5003, 256), (1, 128, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TEMPLATES = {
    name: text
    for name, text in TILED_PROGRAMS.items()
    if "topk" not in text and not text.startswith(("target", "max(z)"))
}


@pytest.fixture(autouse=True)
def installed():
    torch._dynamo.reset()
    with cce_inductor.installed(min_logits_bytes=0, on_error="raise"):
        yield


def loss(input, weight, target):
    logits = F.linear(input, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def problem(rows, vocabulary, hidden, dtype=torch.bfloat16, ignored=True):
    input = random(rows, hidden).to(DEVICE, dtype).requires_grad_()
    weight = (random(vocabulary, hidden) / hidden**0.5).to(DEVICE, dtype).requires_grad_()
    target = torch.arange(rows, device=DEVICE) * 31 % vocabulary
    if ignored and rows > 2:
        target[1::3] = -100
    return input, weight, target


def assert_no_less_accurate(fn, input, weight, target):
    """Compare with eager code, with slack for chance; assert that the templates ran."""
    result, (code, *_) = run_and_get_code(torch.compile(fn), input, weight, target)
    gradients = torch.autograd.grad(result, (input, weight))
    assert "triton_tem_" in code
    wide = [tensor.detach().double().requires_grad_() for tensor in (input, weight)]
    exact = fn(*wide, target)
    eager = fn(input, weight, target)
    for ours, their, reference in zip(
        (result, *gradients),
        (eager, *torch.autograd.grad(eager, (input, weight))),
        (exact, *torch.autograd.grad(exact, wide)),
        strict=True,
    ):
        allowed = 1.25 * relative_error(their, reference) + torch.finfo(ours.dtype).eps
        assert relative_error(ours, reference) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers(shape, dtype):
    assert_no_less_accurate(loss, *problem(*shape, dtype))


def test_float32_weights_under_autocast():
    def in_bfloat16(input, weight, target):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=input.dtype == torch.float32):
            return loss(input, weight, target)

    assert_no_less_accurate(in_bfloat16, *problem(512, 20003, 256, torch.float32))


@pytest.mark.parametrize("offset", [4, 8])
def test_views_that_begin_anywhere(offset):
    """Offsets of 8 and of 16 bytes."""

    def of_views(input, weight, target):
        return loss(input[:, offset:-offset], weight[:, offset:-offset], target)

    assert_no_less_accurate(of_views, *problem(512, 5003, 256 + 2 * offset))


@pytest.mark.parametrize("width", [1, 5])
def test_a_last_block_that_is_narrow(width):
    assert_no_less_accurate(loss, *problem(512, 16384 + width, 64))


def test_a_step_in_another_thread():
    """The first launches were in this thread."""
    inputs = problem(512, 5003, 256)
    compiled = torch.compile(loss)
    compiled(*inputs).backward()
    found = []
    thread = threading.Thread(target=lambda: found.append(compiled(*inputs)))
    thread.start()
    thread.join()
    found[0].backward()


@pytest.mark.parametrize("name", TEMPLATES)
def test_program(name):
    rows, vocabulary, hidden, dtype = 70, 300, 40, torch.float32
    operands = operands_of(vocabulary, rows, dtype)
    head = head_of(
        random(vocabulary, hidden).to(dtype),
        random(vocabulary).to(dtype),
        operands,
        TEMPLATES[name],
        compute_dtype=dtype,
    )
    input = random(rows, hidden).to(dtype)
    want, want_gradients = expected(input, head)
    wanted = [at for at, needed in enumerate(wants_gradient(head)) if needed]
    leaves = [input, head.linear_weight, head.linear_bias, *(operands[at] for at in wanted)]
    leaves = [leaf.to(DEVICE).requires_grad_() for leaf in leaves]
    moved = [operand.to(DEVICE) for operand in operands]
    text, count = str(head.program), len(want)

    def fn(input, weight, bias, *rest):
        given = list(moved)
        for at, operand in zip(wanted, rest, strict=True):
            given[at] = operand
        return torch.ops.cce_inductor.reduce_rows(
            input, weight, bias, given, text, False, dtype, 2**26, 0.0, 0
        )[:count]

    results = torch.compile(fn, fullgraph=True)(*leaves)
    pairs = [
        (result, upstream.to(DEVICE))
        for result, upstream in zip(results, upstream_of(want), strict=True)
        if upstream is not None and result.requires_grad
    ]
    gradients = [None] * len(leaves)
    if pairs:
        outputs, given = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    for ours, theirs in zip(results, want, strict=True):
        assert relative_error(ours.cpu(), theirs) < 1e-5
    for ours, theirs in zip(gradients, want_gradients, strict=True):
        if theirs.norm() > 1e-6:
            assert ours is not None
            assert relative_error(ours.cpu(), theirs) < 1e-5


def test_same_bits_twenty_times():
    inputs = problem(512, 5003, 256)
    compiled = torch.compile(loss)

    def step():
        result = compiled(*inputs)
        return result.detach(), *torch.autograd.grad(result, inputs[:2])

    first = step()
    for _ in range(19):
        assert all(a.equal(b) for a, b in zip(step(), first, strict=True))


def test_nothing_waits_for_the_host():
    inputs = problem(512, 5003, 256)
    compiled = torch.compile(loss)
    compiled(*inputs).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled(*inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graphs():
    inputs = problem(512, 5003, 256)
    compiled = torch.compile(loss, mode="reduce-overhead")
    eager = loss(*inputs)
    gradients = torch.autograd.grad(eager, inputs[:2])
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        result = compiled(*inputs)
        ours = torch.autograd.grad(result, inputs[:2])
        torch.testing.assert_close(result, eager, rtol=1e-3, atol=1e-4)
        for gradient, theirs in zip(ours, gradients, strict=True):
            assert relative_error(gradient, theirs) < 2e-2


def test_max_autotune():
    inputs = problem(512, 5003, 256)
    result = torch.compile(loss, mode="max-autotune-no-cudagraphs")(*inputs)
    torch.testing.assert_close(result, loss(*inputs), rtol=1e-3, atol=1e-4)
    result.backward()


def test_another_number_of_tokens_compiles_nothing():
    compiled = torch.compile(loss, dynamic=True)
    compiled(*problem(100, 5003, 256)).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (64, 101, 1000):
            inputs = problem(rows, 5003, 256)
            torch.testing.assert_close(compiled(*inputs), loss(*inputs), rtol=1e-3, atol=1e-4)


def test_memory():
    rows, vocabulary, hidden = 2048, 50304, 512
    inputs = problem(rows, vocabulary, hidden)
    compiled = torch.compile(loss)

    def peak():
        for tensor in inputs[:2]:
            tensor.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compiled(*inputs).backward()
        return torch.cuda.max_memory_allocated() - before

    peak()
    gradients = sum(tensor.nbytes for tensor in inputs[:2])
    logits = rows * vocabulary * 2
    assert peak() < gradients + logits
