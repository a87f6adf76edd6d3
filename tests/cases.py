"""Programs over logits with random tensors, and their expected results and gradients."""

from __future__ import annotations

import torch

from cce_inductor.kernels import reference
from cce_inductor.kernels.blockwise.product import operand_dtype
from cce_inductor.kernels.head import TILE, Head, Wanted
from cce_inductor.kernels.names import OperandKind
from cce_inductor.kernels.program.text import Program

HIDDEN, ROWS, IGNORED = 7, 12, -100
MIB = 2**20
CROSS_ENTROPY = "logsumexp(z); target(z, r0, -100)"


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def spread(vocabulary, rows=ROWS):
    """Return class indices at both ends of the vocabulary and of each tile."""
    edges = [0, vocabulary - 1, *range(TILE - 1, vocabulary, TILE), *range(TILE, vocabulary, TILE)]
    return torch.tensor((edges * rows)[:rows], dtype=torch.int64)


def operands_of(vocabulary, rows=ROWS, dtype=torch.float64):
    """Return operands of every kind; the comments show their names in programs.

    `dtype` is that of the operands that are not indices or masks.
    """
    index = spread(vocabulary, rows)
    target = index.clone()
    target[::5] = IGNORED
    operands = [
        target,  # r0
        torch.stack([index, index.flip(0), index], 1),  # r1, with the same index twice
        torch.where(torch.arange(rows) % 2 == 0, index, index - vocabulary),  # r2
        random(rows, seed=3),  # r3
        random(vocabulary, seed=4),  # c4
        random(seed=5).abs() + 0.5,  # s5
        random(rows, vocabulary, seed=6),  # b6
        random(rows, vocabulary, seed=7) > -1,  # b7
        random(vocabulary, seed=8) > 0,  # c8
        torch.arange(rows) % 3,  # r9
        torch.tensor(3),  # s10
        torch.where(torch.arange(rows) % 3 == 0, -1, index.flip(0)),  # r11
        *(random(rows, HIDDEN, seed=12), random(vocabulary, HIDDEN, seed=13)),  # p12
        random(rows, HIDDEN + 4, seed=14),  # q14
        *(random(vocabulary, HIDDEN + 4, seed=15), random(vocabulary, seed=16)),
    ]
    return [each.to(dtype) if each.is_floating_point() else each for each in operands]


TILED_PROGRAMS = {
    "logsumexp": "logsumexp(z)",
    "sum": "sum(z)",
    "sum and logsumexp": "logsumexp(z); sum(z)",
    "target": CROSS_ENTROPY,
    "two targets": "logsumexp(z); target(z, r0, -100); target(z, r11, -1)",
    "gather": "logsumexp(z); gather(z, r1)",
    "index": "index(z, r2); logsumexp(z)",
    "gather and index and target": "gather(z, r1); index(z, r2); target(z, r0, -100); logsumexp(z)",
    "max": "max(z)",
    "max and logsumexp": "max(z); logsumexp(z); target(z, r0, -100)",
    "topk": "topk(z, {k})",
    "topk and gather": "topk(z, {k}); gather(z, r1); logsumexp(z)",
    "entropy": "logsumexp(z); mean(z, z)",
    "mean alone has a gradient": "logsumexp(z); mean(z, c4)",
    "mean of the column": "logsumexp(z); mean(z, j)",
    "mean of a mask": "logsumexp(z); mean(z, c8)",
    "means": "logsumexp(z); mean(z, z); mean(z, c4); mean(z, r3); mean(z, b6); target(z, r0, -100)",
    "mean of a step": "t0 = tanh(z); logsumexp(z); mean(z, t0)",
    "mean under a step": "t0 = mul.Tensor(z, s5); logsumexp(t0); mean(t0, z); logsumexp(z)",
    "kl of two softmaxes": "t0 = add.Tensor(z, b6); logsumexp(t0); logsumexp(z); mean(t0, z); mean(t0, t0); mean(z, t0)",
    "dot": "logsumexp(z); sum(c4); dot(c4, z)",
    "dots": "t0 = lt.Scalar(j, 3); sum(b6); sum(z); sum(c8); sum(r3); dot(b6, z); dot(z, z); dot(c8, z); dot(z, t0); dot(r3, z); logsumexp(z); target(z, r0, -100)",
    "dots of steps": "t0 = tanh(z); t1 = exp(t0); sum(t0); sum(t1); dot(t1, t0); dot(t0, t1); logsumexp(z); mean(z, t1); max(z)",
    "softcap": "t0 = div.Tensor(z, 2.0); t1 = tanh(t0); t2 = mul.Tensor(t1, 2.0); logsumexp(t2); target(t2, r0, -100)",
    "softcap and the logits": "t0 = div.Tensor(z, 2.0); t1 = tanh(t0); logsumexp(t1); logsumexp(z); gather(z, r1); gather(t1, r1)",
    "class weights": "t0 = mul.Tensor(z, c4); sum(t0); logsumexp(z); target(z, r0, -100)",
    "temperature of a row": "t0 = div.Tensor(z, s5); t1 = mul.Tensor(t0, r3); logsumexp(t1); sum(t1); max(t1)",
    "bias of a block": "t0 = add.Tensor(z, b6); logsumexp(t0); target(t0, r0, -100)",
    "mask of a block": "t0 = where.self(b7, z, -1000.0); logsumexp(t0); sum(t0)",
    "mask of columns": "t0 = where.self(c8, z, c4); logsumexp(t0); target(t0, r0, -100); topk(t0, {k})",
    "integer operands": "t0 = eq.Tensor(j, r9); t1 = where.self(t0, -5.0, z); t2 = mul.Tensor(t1, s10); logsumexp(t2); gather(t2, r1)",
    "window of columns": "t0 = lt.Scalar(j, 3); t1 = mul.Tensor(t0, z); sum(t1); sum(t0)",
    "count": "t0 = gt.Tensor(z, r3); sum(t0); logsumexp(z)",
    "detached": "t0 = detach(z); logsumexp(t0); t1 = mul.Tensor(t0, z); sum(t1); target(z, r0, -100)",
    "no logits": "t0 = mul.Tensor(c4, r3); logsumexp(t0); sum(z)",
    "an operand": "sum(c4); max(r3); logsumexp(c4); mean(c4, z)",
    "softmax to a power": "t0 = sub.Tensor(z, r3); t1 = exp(t0); t2 = pow.Tensor_Scalar(t1, 1.5); sum(t2); sum(t1); max(t1)",
    "squares": "t0 = mul.Tensor(z, z); sum(t0); sum(z); t1 = abs(z); sum(t1)",
    "everything of one value": "t0 = mul.Tensor(z, c4); logsumexp(t0); sum(t0); mean(t0, t0); mean(t0, z); gather(t0, r1); index(t0, r2); target(t0, r0, -100); max(t0); topk(t0, {k})",
    "function of one entry": "t0 = eq.Tensor(j, r9); t1 = where.ScalarOther(t0, z, 0.5); t2 = mul.Tensor(t1, t1); t3 = tanh(t2); t4 = where.self(t0, t3, z); logsumexp(t4); target(t4, r0, -100)",
    "range that changes": "t0 = ge.Tensor(j, s10); t1 = where.self(t0, s5, z); t2 = clamp.Tensor(t1, -2.0, s5); logsumexp(t2); sum(t2)",
    "power that changes": "t0 = abs(z); t1 = add.Tensor(t0, 1.0); t2 = pow.Tensor_Tensor(t1, s5); logsumexp(t2); target(t2, r0, -100)",
    "mask as numbers": "t0 = gt.Tensor(z, r3); t1 = where.Scalar(t0, 1, 0); t2 = div.Tensor(t1, 1); t3 = mul.Tensor(t2, z); t4 = where.ScalarSelf(t0, 2.0, t3); logsumexp(t4); sum(t3)",
    "the same twice": "logsumexp(z); logsumexp(z); sum(z); sum(z); mean(z, z); mean(z, z)",
}


PROGRAMS_AT_INDICES = {
    "target alone": "target(z, r0, -100)",
    "the same target twice": "target(z, r0, -100); index(z, r2); target(z, r0, -100)",
}
PROGRAMS_OF_SEVERAL_HEADS = {
    "logits of another head": "logsumexp(z); logsumexp(p12); mean(p12, p12); mean(p12, z); target(z, r0, -100)",
    "function of two heads": "t0 = sub.Tensor(z, r3); t1 = tanh(t0); t2 = sub.Tensor(p12, z); t3 = mul.Tensor(t1, t2); sum(t3); logsumexp(z)",
    "mixture of three heads": "t0 = logaddexp(z, p12); t1 = mul.Tensor(t0, q14); logsumexp(t1); sum(q14); gather(t0, r1)",
    "another head alone": "t0 = tanh(q14); logsumexp(t0); max(q14)",
    "detached head": "t0 = detach(p12); t1 = mul.Tensor(z, t0); sum(t1); logsumexp(z)",
}
"""There is no Triton template for either kind."""

PROGRAMS = {**TILED_PROGRAMS, **PROGRAMS_AT_INDICES, **PROGRAMS_OF_SEVERAL_HEADS}


STATISTICS = {
    "logsumexp": "logsumexp(z)",
    "sum": "sum(z)",
    "mean": "logsumexp(z); mean(z, c4)",
    "dot": "sum(c4); dot(c4, z); logsumexp(z)",
    "max": "max(z); logsumexp(z)",
    "topk": "topk(z, {k})",
    "gather": "gather(z, r1); logsumexp(z)",
    "index": "index(z, r2); logsumexp(z)",
    "target": "target(z, r0, -100); logsumexp(z)",
}
"""A program for each statistic. The Triton templates need at least one that is not a gather. The
programs above combine statistics; a new one need not be added there."""


def unusual_values(vocabulary):
    """Return logits of one row that need care: equal ones, and those that are not finite."""
    masked = random(vocabulary)
    masked[1::3] = -torch.inf
    kinds = {"ties": random(vocabulary).round(), "masked": masked}
    for kind, infinity in (("nan after infinity", torch.inf), ("nan after -infinity", -torch.inf)):
        kinds[kind] = random(vocabulary)
        kinds[kind][3 % vocabulary :: 7] = infinity
        kinds[kind][4 % vocabulary :: 5] = torch.nan
    return kinds


# PyTorch's topk does not say which of several equal values comes first.
UNUSUAL = [(name, kind) for name in STATISTICS if name != "topk" for kind in unusual_values(1)]
"""Each statistic with each kind of unusual values."""


def unusual_case(text, values, rows=ROWS, dtype=torch.float64, **fields):
    """Return an input and a head whose rows of logits all have the same values."""
    (vocabulary,) = values.shape
    weight, operands = torch.zeros(vocabulary, HIDDEN), operands_of(vocabulary, rows, dtype)
    head = head_of(weight.to(dtype), values.to(dtype), operands, text, **fields)
    return random(rows, HIDDEN).to(dtype), head


def head_of(weight, bias, operands, text, **fields):
    vocabulary = weight.shape[0]
    defaults = {
        "skip_ignored": False,
        "compute_dtype": operand_dtype(weight.dtype),
        "workspace_bytes": MIB,
    }
    program = Program.parse(text.format(k=min(4, vocabulary)))
    return Head(weight, bias, operands, program, **{**defaults, **fields})


def case(text, vocabulary=TILE + 300, rows=ROWS, dtype=torch.float64, bias=True, **fields):
    """Return a random input and a head for a program."""
    weight, biases = random(vocabulary, HIDDEN).to(dtype), random(vocabulary).to(dtype)
    operands = operands_of(vocabulary, rows, dtype)
    head = head_of(weight, biases if bias else None, operands, text, **fields)
    return random(rows, HIDDEN).to(dtype), head


def wants_gradient(head):
    """Return for each operand whether its gradient is compared: those read, except blocks."""
    names = {at: name for name in head.program.operands for at in name.positions}
    return [
        at in names and names[at].kind is not OperandKind.LOGIT and operand.is_floating_point()
        for at, operand in enumerate(head.operands)
    ]


def upstream_of(results):
    """Return upstream gradients whose entries all differ."""
    return [
        random(*r.shape, seed=n) if r.is_floating_point() else None for n, r in enumerate(results)
    ]


def expected(input, head, upstream=None):
    """Return results and gradients of the reference, in float64."""
    wide = lambda t: t.detach().double() if t.is_floating_point() else t  # noqa: E731
    bias = head.linear_bias
    tensors = [wide(input), wide(head.linear_weight), *([] if bias is None else [wide(bias)])]
    operands = [wide(operand) for operand in head.operands]
    wanted = wants_gradient(head)
    leaves = [*tensors, *(o for o, want in zip(operands, wanted, strict=True) if want)]
    for leaf in leaves:
        leaf.requires_grad_()
    results = reference.compute_statistics(
        leaves[0], leaves[1], None if bias is None else leaves[2], operands, head.program
    )
    if head.skip_ignored:
        keep = kept_rows(head)
        shape = lambda r: keep.view(-1, *[1] * (r.dim() - 1))  # noqa: E731
        results = [r.where(shape(r), torch.zeros((), dtype=r.dtype)) for r in results]
    upstream = upstream or upstream_of(results)
    outputs = [(r, g) for r, g in zip(results, upstream, strict=True) if r.requires_grad]
    gradients = [None] * len(leaves)
    if outputs:
        values, given = zip(*outputs, strict=True)
        gradients = torch.autograd.grad(values, leaves, given, allow_unused=True)
    gradients = [
        torch.zeros_like(leaf) if g is None else g
        for leaf, g in zip(leaves, gradients, strict=True)
    ]
    return [result.detach() for result in results], gradients


def kept_rows(head):
    """Return a mask of the rows with a class index that is not ignored."""
    targets = [each.args for each in head.program.statistics if each.name == "target"]
    return torch.stack(
        [head.operands[int(name[1:])] != ignored for _, name, ignored in targets]
    ).any(0)


def gradients_of(reduce, reduce_backward, input, head, upstream=None, wanted=None):
    """Return the results, and the gradients of input, weight, bias and operands."""
    results = reduce(input, head)
    count = head.program.result_count
    with_tiles = len(results) > count
    upstream = upstream or upstream_of(results[:count])
    wanted = wanted or Wanted(True, True, head.linear_bias is not None, wants_gradient(head))
    upstream = [*upstream, None] if with_tiles else upstream
    found = reduce_backward(upstream, results, input, head, wanted)
    gradients = [found.input, found.linear_weight, found.linear_bias, *found.operands]
    return results[:count], [g for g in gradients if g is not None]


def assert_agrees(computed, input, head, **tolerance):
    """Assert that `computed` returns the results and gradients of the float64 reference."""
    want = expected(input, head)
    # A count or a maximum of integers has no gradient, though all results are float64.
    upstream = [
        g if g is not None or r.is_floating_point() else None
        for g, r in zip(upstream_of(want[0]), want[0], strict=True)
    ]
    got = computed(input, head, upstream)
    for ours, theirs in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(
            ours.double(), theirs.double(), **{"equal_nan": True, **tolerance}
        )
    for ours, theirs in zip(got[0], want[0], strict=True):
        assert ours.shape == theirs.shape
