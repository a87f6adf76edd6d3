"""The templates, executed: through `torch.compile`, forward and backward, on CPU tensors."""

import pytest
import torch
import torch.nn.functional as F
from cases import IGNORED, PROGRAMS, expected, head_of, operands_of, random, upstream_of
from cases import wants_gradient as wants
from cce_inductor.kernels import device, tiled
from cce_inductor.testing import relative_error

import cce_inductor

ROWS, HIDDEN, VOCABULARY = 70, 40, 300  # none a multiple of a block
CROSS_ENTROPY = "logsumexp(z); target(z, r0, -100)"
TEMPLATES = {
    name: text
    for name, text in PROGRAMS.items()
    if "topk" not in text and not text.startswith(("target", "max(z)"))
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def case(
    text, dtype=torch.float32, rows=ROWS, vocabulary=VOCABULARY, bias=True, scale=1.0, **fields
):
    wide = [random(vocabulary, HIDDEN) * scale, random(vocabulary)]
    weight, biases = (tensor.to(dtype) for tensor in wide)
    operands = [
        operand.to(dtype) if operand.is_floating_point() else operand
        for operand in operands_of(vocabulary, rows)
    ]
    fields = {"compute_dtype": dtype, "workspace_bytes": 2**30, **fields}
    head = head_of(weight, biases if bias else None, operands, text, **fields)
    return (random(rows, HIDDEN) * scale).to(dtype), head


def compiled(input, head, upstream):
    """Results and gradients of the operator, compiled by Inductor."""
    names = [i for i, wanted in enumerate(wants(head)) if wanted]
    leaves = [input, head.linear_weight, head.linear_bias, *(head.operands[i] for i in names)]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves if leaf is not None]
    count = sum(reduction.outputs for reduction in head.program.reductions)

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
            str(head.program),
            head.skip_ignored,
            head.compute_dtype,
            head.workspace_bytes,
        )[:count]

    tiled.DEVICES.clear()
    tiled.DEVICES.add("cpu")
    from cce_inductor import tiling

    tiling._register()
    results = torch.compile(fn, fullgraph=True)(*leaves)
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


SOFTCAP = PROGRAMS["softcap"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", [CROSS_ENTROPY, SOFTCAP, PROGRAMS["entropy"]])
def test_dtype(text, dtype):
    assert_agrees(*case(text, dtype), TOLERANCE[dtype])
