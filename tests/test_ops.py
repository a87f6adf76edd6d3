"""The operators: schemas, meta and autograd formulas."""

import pytest
import torch
import torch.nn.functional as F
from cce_inductor.kernels.blockwise import TILE

import cce_inductor.ops  # noqa: F401  (registers the operators)

OPS = torch.ops.cce_inductor
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SOFTCAP = "div 2.0, tanh, mul 2.0"
TARGET = torch.tensor([3, -100, TILE, 0, 49])


def random(*shape, dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(sum(shape))
    value = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return value.to(dtype).requires_grad_(requires_grad)


def statistics_arguments(dtype, bias=True, sums=False, weighted=False, modification="", **kwargs):
    vocabulary = kwargs.get("vocabulary", TILE + 9)
    return (
        random(5, 8, dtype=dtype),
        random(vocabulary, 8, dtype=dtype),
        random(vocabulary, dtype=dtype) if bias else None,
        TARGET,
        random(vocabulary, dtype=dtype, requires_grad=False) if weighted else None,
        sums,
        -100,
        modification,
        kwargs.get("compute_dtype", dtype),
        kwargs.get("workspace_bytes", 2**20),
    )


STATISTICS = {
    "float64": statistics_arguments(torch.float64),
    "float32 without bias": statistics_arguments(torch.float32, bias=False),
    "bfloat16, one row at a time": statistics_arguments(torch.bfloat16, workspace_bytes=1),
    "float16, softcap": statistics_arguments(torch.float16, modification=SOFTCAP),
    "logit sum": statistics_arguments(torch.float32, sums=True),
    "weighted logit sum, softcap": statistics_arguments(
        torch.float32, sums=True, weighted=True, modification=SOFTCAP
    ),
    "computed in bfloat16": statistics_arguments(torch.float32, compute_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_opcheck_row_statistics(name):
    torch.library.opcheck(OPS.row_statistics.default, STATISTICS[name])


def backward_arguments(name, output_mask):
    """What the formula of row_statistics hands to its backward, as leaves of their own."""
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in STATISTICS[name]]
    lse, target_logit, logit_sum, tile_lse = OPS.row_statistics(*arguments)
    grads = (torch.ones_like(s).requires_grad_() for s in (lse, target_logit, logit_sum))
    tensors, rest = arguments[:5], arguments[5:]
    return (*grads, *tensors, lse, tile_lse, *rest, output_mask)


@pytest.mark.parametrize("name", STATISTICS)
def test_opcheck_row_statistics_backward(name):
    has_bias = STATISTICS[name][2] is not None
    # Its autograd formula refuses, which the checks of autograd would call a failure.
    torch.library.opcheck(
        OPS.row_statistics_backward.default,
        backward_arguments(name, [True, True, has_bias]),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("mask", [[False] * 3, [True, False, True], [False, True, False]], ids=str)
def test_gradients_not_asked_for_are_empty(mask):
    arguments = backward_arguments("float32 without bias", mask)
    arguments = (*arguments[:5], torch.zeros(TILE + 9), *arguments[6:])
    results = OPS.row_statistics_backward(*arguments)
    assert [bool(result.numel()) for result in results] == mask


COMPOSITE = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weight": {"weight": random(TILE + 9, requires_grad=False).abs()},
    "label_smoothing": {"label_smoothing": 0.1},
    "softcap": {"modification": SOFTCAP},
    "dtypes": {"compute_dtype": torch.float32, "result_dtype": torch.float32},
    "all": {
        "reduction": "none",
        "weight": random(TILE + 9, requires_grad=False).abs(),
        "label_smoothing": 0.3,
        "modification": SOFTCAP,
        "ignore_index": 0,
    },
}


@pytest.mark.parametrize("name", COMPOSITE)
def test_opcheck_linear_cross_entropy(name):
    target = TARGET.where(TARGET >= 0, 0)
    arguments = (random(5, 8), random(TILE + 9, 8), target, random(TILE + 9))
    torch.library.opcheck(OPS.linear_cross_entropy.default, arguments, COMPOSITE[name])


@pytest.mark.parametrize("vocabulary", [5, TILE + 2])
@pytest.mark.parametrize("modification", ["", SOFTCAP])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction, label_smoothing, modification, vocabulary):
    """Of the directions that fast mode draws, as the whole Jacobian of a tile takes minutes."""
    target = torch.tensor([vocabulary - 1, -100, 0])
    weight = random(vocabulary, requires_grad=False).abs()

    def loss(input, linear_weight, bias):
        return OPS.linear_cross_entropy(
            input,
            linear_weight,
            target,
            bias,
            weight=weight,
            reduction=reduction,
            label_smoothing=label_smoothing,
            modification=modification,
        )

    arguments = (random(3, 4), random(vocabulary, 4), random(vocabulary))
    assert torch.autograd.gradcheck(loss, arguments, fast_mode=vocabulary > 5)


def test_gradcheck_of_the_statistics():
    """All three at once, which no loss of this package uses together with other gradients."""

    def statistics(*tensors):
        return OPS.row_statistics(*tensors, TARGET % 5, None, True, 4, SOFTCAP, torch.float64, 1)[
            :3
        ]

    assert torch.autograd.gradcheck(statistics, (random(5, 4), random(5, 4), random(5)))


@pytest.mark.parametrize("compiler", [None, "aot_eager", "inductor"])
def test_double_backward_is_refused(compiler):
    input, weight = random(5, 8), random(60, 8)

    def loss(input, weight):
        return OPS.linear_cross_entropy(input, weight, TARGET.clamp(max=59))

    fn = torch.compile(loss, backend=compiler) if compiler else loss
    (gradient,) = torch.autograd.grad(fn(input, weight), input, create_graph=True)
    # AOTAutograd has words of its own for every compiled function.
    message = "does not currently support double backward" if compiler else "no second derivative"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(gradient.sum(), weight)


def test_penalty_on_the_gradient_inside_a_compiled_function_is_refused():
    def penalty(input, weight):
        value = OPS.linear_cross_entropy(input, weight, TARGET.clamp(max=59))
        (gradient,) = torch.autograd.grad(value, input, create_graph=True)
        return gradient.square().sum()

    with pytest.raises(RuntimeError, match="no second derivative"):
        penalty(random(5, 8), random(60, 8)).backward()


def test_the_tile_statistics_carry_no_gradient():
    results = OPS.row_statistics(*STATISTICS["float64"])
    assert [result.requires_grad for result in results] == [True, True, True, False]


def same_meta(real, fake):
    assert fake.shape == real.shape
    assert fake.dtype == real.dtype
    assert fake.stride() == real.stride()


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("vocabulary", [5, TILE, 2 * TILE + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_of_row_statistics_and_its_backward(dtype, vocabulary, sums):
    input, weight, bias, _, *rest = statistics_arguments(dtype, sums=sums, vocabulary=vocabulary)
    real_arguments = [input.detach(), weight.detach(), bias.detach(), TARGET.clamp(max=4), *rest]
    meta_arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in real_arguments]
    real, meta = (OPS.row_statistics(*a) for a in (real_arguments, meta_arguments))
    for pair in zip(real, meta, strict=True):
        same_meta(*pair)
    grads = [
        OPS.row_statistics_backward(*s[:3], *a[:5], s[0], s[3], *a[5:], [True, True, True])
        for s, a in ((real, real_arguments), (meta, meta_arguments))
    ]
    for pair in zip(*grads, strict=True):
        same_meta(*pair)


@pytest.mark.parametrize("result_dtype", [None, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_of_linear_cross_entropy(dtype, reduction, result_dtype):
    for shape in [(5, 8), (1, 5, 8), (0, 8)]:
        input = random(*shape, dtype=dtype)
        target = torch.zeros(shape[:-1], dtype=torch.int64)
        weight = random(50, 8, dtype=dtype)
        keywords = {"reduction": reduction, "result_dtype": result_dtype}
        real = OPS.linear_cross_entropy(input, weight, target, **keywords)
        meta = (t.to("meta") for t in (input, weight, target))
        same_meta(real, OPS.linear_cross_entropy(*meta, **keywords))
        assert real.dtype == (result_dtype or dtype)
        assert real.shape == (target.shape if reduction == "none" else ())


def test_gradients_only_for_what_requires_one(monkeypatch):
    masks = []
    original = OPS.row_statistics_backward
    monkeypatch.setattr(
        torch.ops.cce_inductor,
        "row_statistics_backward",
        lambda *args: masks.append(list(args[-1])) or original(*args),
    )
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        tensors = [
            random(*s, requires_grad=w)
            for s, w in zip([(5, 8), (50, 8), (50,)], wanted, strict=True)
        ]
        OPS.linear_cross_entropy(*tensors[:2], TARGET.clamp(max=49), tensors[2]).backward()
        assert [t.grad is not None for t in tensors] == wanted
    assert masks == [[True, False, False], [False, True, False], [False, False, True]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_targets_of_any_integer_type(dtype):
    target = torch.tensor([3, 0, 49, 7, 7])
    input, weight = random(5, 8), random(50, 8)
    got = OPS.linear_cross_entropy(input, weight, target.to(dtype), ignore_index=7)
    torch.testing.assert_close(got, F.cross_entropy(input @ weight.t(), target, ignore_index=7))
