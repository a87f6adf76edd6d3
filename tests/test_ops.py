"""The operators: schemas, meta and autograd formulas."""

import pytest
import torch
import torch.nn.functional as F

import cce_inductor.operators.ops  # noqa: F401  (registers the operators)
from cce_inductor.kernels.head import TILE

OPS = torch.ops.cce_inductor
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ROWS, HIDDEN, VOCABULARY = 5, 8, TILE + 9
CROSS_ENTROPY = "logsumexp(z); target(z, r0, -100)"
SOFTCAP = "t0 = div.Tensor(z, 2.0); t1 = tanh(t0); t2 = mul.Tensor(t1, 2.0)"
PROGRAMS = {
    "cross-entropy": CROSS_ENTROPY,
    "softcap": f"{SOFTCAP}; logsumexp(t2); target(t2, r0, -100); sum(t2)",
    "entropy": "logsumexp(z); mean(z, z)",
    "operands": "t0 = mul.Tensor(z, c3); t1 = add.Tensor(t0, r4); t2 = div.Tensor(t1, s5); "
    "t3 = where.self(b6, t2, -9.0); logsumexp(t3); sum(t3)",
    "indices": "gather(z, r1); index(z, r2); max(z); topk(z, 3); logsumexp(z)",
    "no logsumexp": "sum(z); max(z)",
}


def random(*shape, dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(sum(shape))
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    return value.to(dtype).requires_grad_(requires_grad)


def operands_of(vocabulary, dtype):
    at = [3, 0, vocabulary - 1, 0, 4]
    return [
        torch.tensor(at).index_fill(0, torch.tensor([1]), -100),
        torch.tensor([at, [1] * 5]).t(),
        torch.tensor(at) - vocabulary,
        random(vocabulary, dtype=dtype),
        random(ROWS, dtype=dtype),
        torch.tensor(0.7, dtype=dtype).requires_grad_(),
        random(ROWS, vocabulary) > -1,
    ]


def arguments_of(program, dtype=torch.float32, bias=True, vocabulary=VOCABULARY, **kwargs):
    # Operands that the program does not name would ask for gradients that nothing computes.
    operands = [
        o if f"{kind}{at}" in program else o.detach()
        for at, (kind, o) in enumerate(zip("rrrcrsb", operands_of(vocabulary, dtype), strict=True))
    ]
    return (
        random(ROWS, HIDDEN, dtype=dtype),
        random(vocabulary, HIDDEN, dtype=dtype),
        random(vocabulary, dtype=dtype) if bias else None,
        operands,
        program,
        kwargs.get("skip_ignored", False),
        kwargs.get("compute_dtype", dtype),
        kwargs.get("workspace_bytes", 2**20),
        0.0,
        kwargs.get("stored_tiles", 0),
    )


CASES = {
    **{name: arguments_of(program) for name, program in PROGRAMS.items()},
    "float64": arguments_of(CROSS_ENTROPY, torch.float64),
    "without bias": arguments_of(CROSS_ENTROPY, bias=False),
    "bfloat16, one row at a time": arguments_of(
        PROGRAMS["operands"], torch.bfloat16, workspace_bytes=1
    ),
    "float16": arguments_of(PROGRAMS["softcap"], torch.float16),
    "skips ignored rows": arguments_of(PROGRAMS["softcap"], skip_ignored=True),
    "stores logits": arguments_of(CROSS_ENTROPY, stored_tiles=1),
    "computed in bfloat16": arguments_of(CROSS_ENTROPY, compute_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck_reduce_rows(name):
    torch.library.opcheck(OPS.reduce_rows.default, CASES[name])


def detached(arguments):
    detach = lambda a: a.detach() if isinstance(a, torch.Tensor) else a  # noqa: E731
    return [[*map(detach, a)] if isinstance(a, list) else detach(a) for a in arguments]


def output_mask(arguments):
    input, weight, bias, operands, *_ = arguments
    return [t is not None and t.requires_grad for t in (input, weight, bias, *operands)]


def backward_arguments(arguments, mask=None):
    """What the formula of reduce_rows hands to its backward."""
    plain = detached(arguments)
    results = OPS.reduce_rows(*plain)
    grads = [torch.ones_like(r) if r.is_floating_point() else None for r in results]
    saved = ("logsumexp" in plain[4]) + (plain[-1] > 0)
    grads[len(grads) - saved :] = [None] * saved
    return (grads, results, *plain, mask or output_mask(arguments))


@pytest.mark.parametrize("name", CASES)
def test_opcheck_reduce_rows_backward(name):
    # Its autograd formula refuses, which the checks of autograd would call a failure.
    torch.library.opcheck(
        OPS.reduce_rows_backward.default,
        backward_arguments(CASES[name]),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_only_what_is_asked_for_is_returned():
    arguments = CASES["operands"]
    full = OPS.reduce_rows_backward(*backward_arguments(arguments))
    assert len(full) == 6
    for masked in range(3):
        mask = output_mask(arguments)
        mask[masked] = False
        got = OPS.reduce_rows_backward(*backward_arguments(arguments, mask))
        torch.testing.assert_close(got, full[:masked] + full[masked + 1 :], rtol=0, atol=0)
    assert OPS.reduce_rows_backward(*backward_arguments(arguments, [False] * 10)) == []


def test_gradients_only_for_what_requires_one(monkeypatch):
    masks = []
    original = OPS.reduce_rows_backward
    monkeypatch.setattr(
        torch.ops.cce_inductor,
        "reduce_rows_backward",
        lambda *args: masks.append(list(args[-1])) or original(*args),
    )
    program = "t0 = mul.Tensor(z, c0); sum(t0)"
    for number in range(4):
        wanted = [at == number for at in range(4)]
        shapes = [(5, 8), (50, 8), (50,), (50,)]
        tensors = [random(*s, requires_grad=w) for s, w in zip(shapes, wanted, strict=True)]
        (total,) = OPS.reduce(*tensors[:3], tensors[3:], program)
        total.sum().backward()
        assert [t.grad is not None for t in tensors] == wanted
        assert masks.pop() == wanted


# Fake tensors


def same_meta(real, fake):
    assert fake.shape == real.shape
    assert fake.dtype == real.dtype
    assert fake.stride() == real.stride()


def on_meta(arguments):
    move = lambda a: a.to("meta") if isinstance(a, torch.Tensor) else a  # noqa: E731
    return [[*map(move, a)] if isinstance(a, list) else move(a) for a in arguments]


@pytest.mark.parametrize("vocabulary", [5, TILE, 2 * TILE + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_meta(name, dtype, vocabulary):
    arguments = arguments_of(PROGRAMS[name], dtype, vocabulary=vocabulary)
    real = OPS.reduce_rows(*detached(arguments))
    for pair in zip(real, OPS.reduce_rows(*on_meta(detached(arguments))), strict=True):
        same_meta(*pair)
    backward = backward_arguments(arguments)
    real = OPS.reduce_rows_backward(*backward)
    for pair in zip(real, OPS.reduce_rows_backward(*on_meta(backward)), strict=True):
        same_meta(*pair)


def test_symbolic_sizes():
    """Rows, vocabulary and k that are not known."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = lambda *shape, dtype=torch.float32: mode.from_tensor(  # noqa: E731
        torch.zeros(shape, dtype=dtype), static_shapes=False
    )
    input, weight = fake(6, 8), fake(3000, 8)
    target, index = fake(6, dtype=torch.int64), fake(6, 3, dtype=torch.int64)
    program = "logsumexp(z); target(z, r0, -100); gather(z, r1); topk(z, 2)"
    with mode:
        results = OPS.reduce_rows(
            input, weight, None, [target, index], program, False, torch.float32, 2**20, 0.0, 0
        )
    lse, _, gathered, top, where, tiles = results
    assert str(lse.shape[0]) == str(input.shape[0])
    assert [str(s) for s in gathered.shape] == [str(s) for s in index.shape]
    assert top.shape[1] == where.shape[1] == 2
    assert tiles.shape[1] == -(-weight.shape[0] // TILE)
    assert not isinstance(tiles.shape[1], int)


# Autograd


def reduced(arguments):
    """The floating results that have gradients."""
    results = OPS.reduce_rows(*arguments)
    if "logsumexp" in arguments[4]:
        results = results[:-1]
    return tuple(r for r in results if r.is_floating_point())


@pytest.mark.parametrize("vocabulary", [6, TILE + 2])
@pytest.mark.parametrize("name", PROGRAMS)
def test_gradcheck(name, vocabulary):
    """Of the directions that fast mode draws, as the whole Jacobian of a tile takes minutes."""
    input, weight, bias, operands, *rest = arguments_of(
        PROGRAMS[name], torch.float64, vocabulary=vocabulary, workspace_bytes=1
    )
    differentiated = [at for at, operand in enumerate(operands) if operand.requires_grad]

    def results(input, weight, bias, *given):
        filled = list(operands)
        for at, operand in zip(differentiated, given, strict=True):
            filled[at] = operand
        return reduced((input, weight, bias, filled, *rest))

    leaves = (input, weight, bias, *(operands[at] for at in differentiated))
    assert torch.autograd.gradcheck(results, leaves, fast_mode=vocabulary > 6)


def double_backward(fn):
    input, weight = random(5, 8), random(60, 8)
    (gradient,) = torch.autograd.grad(fn(input, weight), input, create_graph=True)
    torch.autograd.grad(gradient.sum(), weight)


def entropy(input, weight):
    lse, mean = OPS.reduce(input, weight, None, [], "logsumexp(z); mean(z, z)")
    return (lse - mean).sum()


@pytest.mark.parametrize("compiler", [None, "aot_eager", "inductor"])
def test_double_backward_is_refused(compiler):
    fn = torch.compile(entropy, backend=compiler) if compiler else entropy
    # AOTAutograd has words of its own for every compiled function.
    message = "does not currently support double backward" if compiler else "no second derivative"
    with pytest.raises(RuntimeError, match=message):
        double_backward(fn)


def test_integer_results_carry_no_gradient():
    results = OPS.reduce_rows(*arguments_of("max(z); topk(z, 2)"))
    assert [r.requires_grad for r in results] == [True, False, True, False]


# Composites


def losses(input, weight, bias, target, class_weight=None, reduction="mean", smoothing=0.0, **kw):
    statements = CROSS_ENTROPY.replace("-100", str(kw.get("ignore_index", -100)))
    operands = [target]
    if smoothing:
        statements += "; sum(z)"
        if class_weight is not None:
            operands.append(class_weight)
            statements = "t0 = mul.Tensor(z, c1); " + statements.replace("sum(z)", "sum(t0)")
    lse, at_target, *total = OPS.reduce(input, weight, bias, operands, statements, True)
    return OPS.cross_entropy(
        lse,
        at_target,
        total[0] if total else None,
        target,
        class_weight,
        weight.shape[0],
        reduction,
        kw.get("ignore_index", -100),
        smoothing,
        kw.get("result_dtype", input.dtype),
    )


@pytest.mark.parametrize("shape", [(6,), (2, 3), (0,), (1, 0, 2), ()])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(weighted, smoothing, reduction, shape):
    target = torch.full(shape, 49)
    target.view(-1)[1::2] = 7
    input, weight, bias = random(*shape, 8), random(50, 8), random(50)
    class_weight = random(50, requires_grad=False).abs() if weighted else None
    arguments = {"reduction": reduction, "ignore_index": 7}
    got = losses(input, weight, bias, target, class_weight, smoothing=smoothing, **arguments)
    want = F.cross_entropy(
        F.linear(input, weight, bias).view(-1, 50),
        target.view(-1),
        class_weight,
        label_smoothing=smoothing,
        **arguments,
    )
    want = want.view(target.shape) if reduction == "none" else want
    torch.testing.assert_close(got, want, equal_nan=True)
    leaves = [input, weight, bias]
    torch.testing.assert_close(
        *(torch.autograd.grad(loss.sum(), leaves) for loss in (got, want)), equal_nan=True
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_cross_entropy(reduction, smoothing):
    target = torch.tensor([4, -100, 0])
    weight = random(5, requires_grad=False).abs()

    def loss(*tensors):
        return losses(*tensors, target, weight, reduction, smoothing)

    assert torch.autograd.gradcheck(loss, (random(3, 4), random(5, 4), random(5)))


def test_opcheck_of_the_composites():
    arguments = [random(2, 3, 8), random(50, 8), None, [torch.zeros(2, 3, dtype=torch.int64)]]
    torch.library.opcheck(OPS.reduce.default, (*arguments, CROSS_ENTROPY))
    lse, at_target = random(5, 1), random(1, 5)
    target = torch.tensor([3, -100, 4, 0, 49])
    torch.library.opcheck(
        OPS.cross_entropy.default,
        (lse, at_target, None, target, None, 50, "mean", -100, 0.0, torch.float32),
    )
    torch.library.opcheck(OPS.expand_rows.default, (random(1), target[:, None], 1, 3))


@pytest.mark.parametrize("leading", [(6,), (2, 3), (), (2, 0)])
def test_reduce_of_any_number_of_dimensions(leading):
    """Operands as they broadcast against the logits, results with the vocabulary kept."""
    rows = leading.numel() if isinstance(leading, torch.Size) else torch.Size(leading).numel()
    program = (
        "t0 = mul.Tensor(z, r0); t1 = add.Tensor(t0, c1); t2 = mul.Tensor(t1, s2); "
        "t3 = add.Tensor(t2, b3); t4 = add.Tensor(t3, r4); logsumexp(t4); gather(t4, r5); "
        "index(t4, r6); max(t4)"
    )
    input, weight = random(*leading, 8), random(50, 8)
    row = random(*leading, 1)
    one = random(*[1] * len(leading), 1)  # one value for all rows
    operands = [
        row,
        random(*[1] * len(leading), 50),
        random(*[1] * len(leading), 1).detach(),
        random(*leading, 50).detach(),
        one,
        torch.arange(rows * 2).view(*leading, 2) % 50,
        torch.arange(rows).view(leading) - 7,
    ]
    got = OPS.reduce(input, weight, None, operands, program)
    z = F.linear(input, weight) * row + operands[1]
    z = z * operands[2] + operands[3] + one
    index = operands[6].unsqueeze(-1) % 50
    want = [z.logsumexp(-1, True), z.gather(-1, operands[5]), z.gather(-1, index), *z.max(-1, True)]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    leaves = [input, weight, row, operands[1], one]
    torch.testing.assert_close(
        *(torch.autograd.grad(sum(r.sum() for r in rs[:4]), leaves) for rs in (got, want))
    )


def test_expand_rows():
    operand, rows = random(4, 1, 1), torch.zeros(4, 6, 1)
    expanded = OPS.expand_rows(operand, rows, 2, 50)
    assert expanded.shape == (4, 6, 50)
    torch.testing.assert_close(expanded, operand.expand(4, 6, 50))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_autocast_changes_nothing(compute_dtype):
    """The dtype of the products is an argument."""
    tensors = random(5, 8, dtype=torch.float32), random(60, 8, dtype=torch.float32)

    def run():
        results = OPS.reduce(*tensors, None, [], "logsumexp(z); mean(z, z)", False, compute_dtype)
        return [*results, *torch.autograd.grad(sum(r.sum() for r in results), tensors)]

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# Compilation


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor(dynamic):
    torch._dynamo.reset()

    def fn(input, weight, bias, target):
        loss = losses(input, weight, bias, target, smoothing=0.1)
        lse, mean, top, _ = OPS.reduce(input, weight, bias, [], "logsumexp(z); mean(z, z); max(z)")
        return loss + (lse - mean).mean() + top.square().mean()

    compiled = torch.compile(fn, dynamic=dynamic, fullgraph=True)
    for rows, vocabulary in [(5, 60), (9, TILE + 3)]:
        leaves = random(rows, 8), random(vocabulary, 8), random(vocabulary)
        target = torch.arange(rows)
        target[2] = -100
        got, want = (f(*leaves, target) for f in (compiled, fn))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(v, leaves) for v in (got, want)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_targets_of_any_integer_type(dtype):
    target = torch.tensor([3, 0, 49, 7, 7])
    input, weight = random(5, 8), random(300, 8)
    got = losses(input, weight, None, target.to(dtype), ignore_index=7)
    torch.testing.assert_close(got, F.cross_entropy(input @ weight.t(), target, ignore_index=7))
