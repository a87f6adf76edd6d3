"""The templates, executed: through `torch.compile`, forward and backward, on CPU tensors."""

import dataclasses
import functools

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import (
    IGNORED,
    STATISTICS,
    TILED_PROGRAMS,
    UNUSUAL,
    expected,
    head_of,
    operands_of,
    random,
    unusual_case,
    unusual_values,
    upstream_of,
)
from cases import wants_gradient as wants
from torch._inductor.select_algorithm import TritonTemplate
from torch._inductor.utils import run_and_get_code
from triton.runtime.errors import InterpreterError

import cce_inductor
from cce_inductor import surprise
from cce_inductor.kernels.triton import lowering, tiled
from cce_inductor.kernels.triton.configs import Config
from cce_inductor.operators import inductor
from cce_inductor.testing import relative_error

ROWS, HIDDEN, VOCABULARY = 70, 40, 300  # none a multiple of a block
CROSS_ENTROPY = "logsumexp(z); target(z, r0, -100)"
TEMPLATES = {
    name: text
    for name, text in TILED_PROGRAMS.items()
    if "topk" not in text  # It has no template.
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def case(
    text, dtype=torch.float32, rows=ROWS, vocabulary=VOCABULARY, bias=True, scale=1.0, **fields
):
    wide = [random(vocabulary, HIDDEN) * scale, random(vocabulary)]
    weight, biases = (tensor.to(dtype) for tensor in wide)
    operands = operands_of(vocabulary, rows, dtype)
    fields = {"compute_dtype": dtype, "workspace_bytes": 2**30, **fields}
    head = head_of(weight, biases if bias else None, operands, text, **fields)
    return (random(rows, HIDDEN) * scale).to(dtype), head


def compiled(input, head, upstream, **options):
    """Results and gradients of the operator, compiled by Inductor."""
    names = [i for i, wanted in enumerate(wants(head)) if wanted]
    leaves = [input, head.linear_weight, head.linear_bias, *(head.operands[i] for i in names)]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves if leaf is not None]
    count = head.program.result_count
    text = str(head.program)

    def fn(input, weight, *rest):
        bias = None
        if head.linear_bias is not None:
            bias, *rest = rest
        operands = list(head.operands)
        for i, operand in zip(names, rest, strict=True):
            operands[i] = operand
        return torch.ops.cce_inductor.reduce_rows(
            input,
            weight,
            bias,
            operands,
            text,
            head.skip_ignored,
            head.compute_dtype,
            head.workspace_bytes,
            head.sample_below,
            head.stored_tiles,
        )[:count]

    inductor.register()
    results = torch.compile(fn, fullgraph=True, **options)(*leaves)
    pairs = [
        (r, g) for r, g in zip(results, upstream, strict=True) if r.requires_grad and g is not None
    ]
    gradients = [None] * len(leaves)
    if pairs:
        outputs, given = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    gradients = [
        torch.zeros_like(leaf) if g is None else g
        for leaf, g in zip(leaves, gradients, strict=True)
    ]
    return [result.detach() for result in results], gradients


def assert_agrees(input, head, tolerance):
    want = expected(input, head)
    upstream = [
        g if g is not None or r.is_floating_point() else None
        for g, r in zip(upstream_of(want[0]), want[0], strict=True)
    ]
    got = compiled(input, head, upstream)
    for ours, theirs in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert ours.shape == theirs.shape
        if theirs.double().norm() < 1e-6:
            assert ours.double().norm() < 1e-4
        else:
            assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize("name", TEMPLATES)
def test_program(name):
    assert_agrees(*case(TEMPLATES[name]), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", [name for name in STATISTICS if name != "topk"])
def test_statistic(name):
    assert_agrees(*case(STATISTICS[name]), TOLERANCE[torch.float32])


@pytest.mark.parametrize(("name", "kind"), UNUSUAL)
def test_unusual_values(name, kind):
    values = unusual_values(VOCABULARY)[kind]
    case = unusual_case(STATISTICS[name], values, ROWS, torch.float32)
    cases.assert_agrees(compiled, *case, rtol=2e-4, atol=1e-3)


SOFTCAP, ENTROPY = TILED_PROGRAMS["softcap"], TILED_PROGRAMS["entropy"]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", [CROSS_ENTROPY, SOFTCAP, ENTROPY])
def test_dtype(text, dtype):
    assert_agrees(*case(text, dtype), TOLERANCE[dtype])


@pytest.fixture
def by_descriptor(monkeypatch):
    """As on devices with TMA: some programs take turns."""
    config = Config(64, 128, 32, 4, 3, group=8, programs=2)
    monkeypatch.setattr(lowering, "reads_by_descriptor", lambda *_: True)
    monkeypatch.setattr(lowering, "configs", lambda *_, **__: [config])


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("text", [CROSS_ENTROPY, SOFTCAP, ENTROPY])
@pytest.mark.usefixtures("by_descriptor")
def test_tensor_descriptors(text, dtype):
    assert_agrees(*case(text, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 64, 65, 130])
@pytest.mark.parametrize("vocabulary", [1, 5, 128, 129])
def test_tails_of_rows_and_vocabulary(rows, vocabulary):
    assert_agrees(*case(CROSS_ENTROPY, rows=rows, vocabulary=vocabulary), 1e-5)


def with_hidden(hidden):
    _, head = case(CROSS_ENTROPY)
    head = dataclasses.replace(head, linear_weight=random(VOCABULARY, hidden).float())
    return random(ROWS, hidden).float(), head


@pytest.mark.parametrize("hidden", [1, 31, 32, 33, 96])
def test_tail_of_hidden(hidden):
    assert_agrees(*with_hidden(hidden), 1e-5)


@pytest.mark.parametrize("hidden", [4, 36, 96])  # a descriptor's rows begin at 16 bytes
@pytest.mark.usefixtures("by_descriptor")
def test_tail_of_hidden_by_descriptor(hidden):
    assert_agrees(*with_hidden(hidden), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize(
    ("name", "scale", "shift"),
    [
        ("tiny", 1e-3, 0.0),
        ("all negative", 0.05, -40.0),
        ("peaked", 4.0, 0.0),
        ("large", 0.1, 90.0),
    ],
)
@pytest.mark.parametrize("descriptors", [False, True])
def test_logits(name, scale, shift, dtype, descriptors, request):
    """A column beyond the vocabulary that counts as 0 is seen where all logits are below 0."""
    if descriptors:
        request.getfixturevalue("by_descriptor")
    input, head = case(CROSS_ENTROPY, dtype, scale=scale)
    head.linear_bias.fill_(shift)
    want = expected(input, head)
    got = compiled(input, head, upstream_of(want[0]))
    spacing = torch.finfo(dtype).eps
    for ours, theirs in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=64 * spacing * (1 + scale**2))


@pytest.mark.parametrize("descriptors", [False, True])
def test_ignored_rows(descriptors, request):
    """Single ones, and a whole tile of them, of which nothing is read."""
    if descriptors:
        request.getfixturevalue("by_descriptor")
    input, head = case(CROSS_ENTROPY, rows=200, skip_ignored=True)
    head.operands[0][64:128] = IGNORED
    input[64:128] = torch.inf
    want = expected(torch.where(input.isfinite(), input, 0.0), head)
    results, (d_input, *_) = compiled(input, head, upstream_of(want[0]))
    ignored = head.operands[0] == IGNORED
    for ours, theirs in zip(results, want[0], strict=True):
        assert (ours[ignored] == 0).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    kept = d_input[~ignored]
    assert relative_error(kept, want[1][0][~ignored]) < 1e-5


def test_all_rows_ignored():
    input, head = case(CROSS_ENTROPY, skip_ignored=True)
    head.operands[0].fill_(IGNORED)
    want = expected(input, head)
    results, gradients = compiled(input, head, upstream_of(want[0]))
    assert all((result == 0).all() for result in results)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Several blocks also of a small vocabulary."""
    monkeypatch.setattr(tiled, "MIN_BLOCK", 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.usefixtures("narrow_blocks")
def test_backward_in_several_blocks(dtype, descriptors, request):
    if descriptors:
        request.getfixturevalue("by_descriptor")
    input, head = case(CROSS_ENTROPY, dtype, vocabulary=2500, workspace_bytes=1)
    assert_agrees(input, head, TOLERANCE[dtype])


def test_number_of_rows_is_a_symbol():
    input, head = case(CROSS_ENTROPY)
    want = expected(input, head)
    got = compiled(input, head, upstream_of(want[0]), dynamic=True)
    for ours, theirs in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        if theirs.norm() > 1e-6:
            assert relative_error(ours, theirs) < 1e-5


@pytest.mark.usefixtures("narrow_blocks")
def test_number_of_rows_depends_on_data():
    """Rows of a mask, in several blocks."""
    _, head = case(CROSS_ENTROPY, vocabulary=2500)
    weight = head.linear_weight.clone().requires_grad_()
    hidden = random(ROWS, HIDDEN).float().requires_grad_()
    kept = torch.arange(ROWS) % 3 > 0
    target = torch.arange(ROWS) * 31 % 2500

    def fn(hidden, weight, kept, target):
        return F.cross_entropy(F.linear(hidden[kept], weight), target[kept])

    options = {"min_logits_bytes": 0, "on_error": "raise"}
    capture = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with capture, cce_inductor.installed(**options):
        found = torch.compile(fn, fullgraph=True)(hidden, weight, kept, target)
        assert cce_inductor.reports()[-1].rewritten
        gradients = torch.autograd.grad(found, (hidden, weight))
    eager = fn(hidden, weight, kept, target)
    torch.testing.assert_close(found, eager)
    for ours, theirs in zip(gradients, torch.autograd.grad(eager, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_rows():
    input, head = case(CROSS_ENTROPY, rows=0)
    results, gradients = compiled(input, head, [random(0), random(0)])
    assert [result.shape for result in results] == [(0,), (0,)]
    assert all((gradient == 0).all() for gradient in gradients)


def test_strides():
    """A transposed input, a weight of every other row and column, a strided bias and index."""
    _, head = case(CROSS_ENTROPY)
    weight = random(2 * VOCABULARY, 2 * HIDDEN).float()[::2, ::2]
    bias = random(2 * VOCABULARY).float()[::2]
    operands = list(head.operands)
    operands[0] = torch.stack([operands[0], operands[0]], 1)[:, 0]
    head = dataclasses.replace(head, linear_weight=weight, linear_bias=bias, operands=operands)
    assert_agrees(random(HIDDEN, ROWS).float().t(), head, 1e-5)


@pytest.mark.parametrize("index", [VOCABULARY, -1])
def test_index_out_of_bounds(index):
    input, head = case(CROSS_ENTROPY)
    head.operands[0][3] = index
    with pytest.raises(InterpreterError, match="an index is not in the vocabulary"):
        compiled(input, head, [random(ROWS), random(ROWS)])


@pytest.mark.parametrize(
    ("weight", "compute"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.usefixtures("narrow_blocks")
def test_weight_of_another_dtype(weight, compute, descriptors, request):
    """As under autocast, in several blocks."""
    if descriptors:
        request.getfixturevalue("by_descriptor")
    input, head = case(CROSS_ENTROPY, weight, vocabulary=2500, workspace_bytes=1)
    head = dataclasses.replace(head, compute_dtype=compute)
    assert_agrees(input.float(), head, TOLERANCE[torch.bfloat16])


def test_float64_is_left_to_the_blockwise_kernels(caplog):
    input, head = case(CROSS_ENTROPY, torch.float64)
    assert_agrees(input, head, 1e-12)
    assert "there is no template for torch.float64" in caplog.text


def test_a_lowering_that_fails_is_replaced_by_the_operator(monkeypatch, caplog):
    monkeypatch.setattr(lowering, "configs", lambda *_, **__: 1 / 0)
    with surprise.on_error("warn"):
        assert_agrees(*case(SOFTCAP), 1e-5)
    assert "runs without a Triton kernel" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_decomposition_that_fails_leaves_the_operator(monkeypatch, caplog):
    monkeypatch.setattr(tiled, "compute_statistics", lambda *_: 1 / 0)
    with surprise.on_error("warn"):
        assert_agrees(*case(SOFTCAP), 1e-5)
    assert "a loss runs its blockwise kernels" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_same_bits_every_time():
    input, head = case(ENTROPY, torch.bfloat16)
    upstream = [random(ROWS), random(ROWS)]
    first, second = (compiled(input, head, upstream) for _ in range(2))
    for ours, theirs in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert ours.equal(theirs)


def test_a_model():
    """From `install` to the kernel and back."""

    def fn(input, weight, target):
        logits = torch.tanh(F.linear(input, weight).float() / 5) * 5
        return F.cross_entropy(logits.view(-1, VOCABULARY), target.view(-1))

    input = random(2, 35, HIDDEN).float().requires_grad_()
    weight = random(VOCABULARY, HIDDEN).float().requires_grad_()
    target = torch.randint(VOCABULARY, (2, 35))
    with cce_inductor.installed(min_logits_bytes=0, on_error="raise"):
        loss, (code, *_) = run_and_get_code(torch.compile(fn), input, weight, target)
        assert cce_inductor.reports()[-1].rewritten
        gradients = torch.autograd.grad(loss, (input, weight))
    assert "triton_tem_" in code
    eager = fn(input, weight, target)
    torch.testing.assert_close(loss, eager)
    expected_gradients = torch.autograd.grad(eager, (input, weight))
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


MUTATIONS = {
    "the mask of the vocabulary is dropped": ("EVEN_V)", "True)"),
    "the target's column is off by one": (
        "device.at(z, columns, index1_0)",
        "device.at(z, columns + 1, index1_0)",
    ),
    "a tile with targets is taken for one without": (
        "if device.any_in(index0, first_column, BLOCK_V)",
        "if device.any_in(index0, first_column, BLOCK_V // 2)",
    ),
    "the loop is one short": ("M, V, H,", "M, V, H - 32,"),
    "the last tile is left out": (
        "row_tiles * column_tiles, tl.num_programs(0)",
        "row_tiles * column_tiles - 1, tl.num_programs(0)",
    ),
    "the last tile of statistics is left out": (
        "row_tiles * tiles_of_statistics, tl.num_programs(0)",
        "row_tiles * tiles_of_statistics - 1, tl.num_programs(0)",
    ),
    "the last block of a tile is left out": ("BLOCKS, BLOCKS)", "BLOCKS, BLOCKS - 1)"),
    "the sum is not rescaled": (
        "device.rescaled(total_z, before_z, greatest_z)",
        "device.rescaled(total_z, before_z * 0, greatest_z * 0)",
    ),
    "the bias is read for another column": ("BIAS + ", "BIAS + 0 * "),
    "the rows of another tile are read": (
        "row_tile.to(INDEX_DTYPE) * BLOCK_M",
        "row_tile.to(INDEX_DTYPE) * BLOCK_M * 0",
    ),
    "the first column of a block is forgotten": ("tl.load(START).to(tl.int32)", "0"),
}


BY_DESCRIPTOR = {
    "a descriptor reads the rows of another tile": (
        "inputs, weights, row_tile * BLOCK_M,",
        "inputs, weights, row_tile * 0,",
    ),
    "a descriptor reads the first columns": (
        "row_tile * BLOCK_M, first_column, H",
        "row_tile * BLOCK_M, first_column * 0, H",
    ),
    "a descriptor stores to the first columns": (
        '"column_tile * BLOCK_V"), "block"',
        '"column_tile * 0"), "block"',
    ),
}


@pytest.mark.parametrize("name", [*MUTATIONS, *BY_DESCRIPTOR])
@pytest.mark.usefixtures("narrow_blocks")
def test_a_broken_kernel_is_caught(name, monkeypatch, request):
    """What the tests above assert fails for each of these."""
    if name in BY_DESCRIPTOR:
        request.getfixturevalue("by_descriptor")
    old, new = (MUTATIONS | BY_DESCRIPTOR)[name]
    changed = []

    @functools.cache
    def broken(template):
        if old in template.source:
            changed.append(template)
        source = template.source.replace(old, new)
        return original(
            dataclasses.replace(template, name=f"{template.name}_broken", source=source)
        )

    original = lowering._triton_template
    TritonTemplate.all_templates.clear()
    monkeypatch.setattr(lowering, "_triton_template", broken)
    input, head = case(CROSS_ENTROPY, vocabulary=1300, workspace_bytes=1)
    head.linear_bias.sub_(40)
    want = expected(input, head)
    got = compiled(input, head, upstream_of(want[0]))
    assert changed, "the mutation changes nothing"
    errors = [
        relative_error(ours, theirs)
        for ours, theirs in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True)
        if theirs.norm() > 1e-6
    ]
    assert max(errors) > 1e-3
