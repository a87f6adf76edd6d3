"""`cce_inductor.linear_cross_entropy`, the fused loss called by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import cce_inductor

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    return value.to(dtype).requires_grad_()


def class_weight(dtype=torch.float32):
    return random(50, seed=9).detach().abs().to(dtype)


def unfused(input, linear_weight, target, *, linear_bias=None, softcap=None, **arguments):
    logits = F.linear(input, linear_weight, linear_bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target, **arguments)


def assert_equal(input, linear_weight, target, linear_bias=None, **arguments):
    """Value, shape, dtype and gradients are those of the unfused code."""
    results = []
    leaves = [t for t in (input, linear_weight, linear_bias) if t is not None]
    for fn in (cce_inductor.linear_cross_entropy, unfused):
        loss = fn(input, linear_weight, target, linear_bias=linear_bias, **arguments)
        upstream = random(max(1, loss.numel()), dtype=loss.dtype).detach()[: loss.numel()]
        results.append((loss, *torch.autograd.grad(loss, leaves, upstream.view(loss.shape))))
    tolerance = TOLERANCE[input.dtype]
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dtypes_and_reductions(reduction, dtype):
    tensors = random(6, 8, dtype=dtype), random(50, 8, dtype=dtype), TARGET
    assert_equal(*tensors, random(50, dtype=dtype), reduction=reduction)


@pytest.mark.parametrize(
    ("weighted", "label_smoothing", "softcap", "ignore_index"),
    list(itertools.product([False, True], [0.0, 0.1, 1.0], [None, 2.0, 3], [-100, 7])),
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_arguments_together(reduction, weighted, label_smoothing, softcap, ignore_index):
    assert_equal(
        random(6, 8),
        random(50, 8),
        TARGET if ignore_index == -100 else TARGET.clamp(min=0),
        random(50),
        reduction=reduction,
        weight=class_weight() if weighted else None,
        label_smoothing=label_smoothing,
        softcap=softcap,
        ignore_index=ignore_index,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_and_label_smoothing_in_every_dtype(dtype):
    assert_equal(
        random(6, 8, dtype=dtype),
        random(50, 8, dtype=dtype),
        TARGET,
        weight=class_weight(dtype),
        label_smoothing=0.1,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", [3, -100])
def test_one_row_of_one_dimension(target, reduction):
    assert_equal(random(8), random(50, 8), torch.tensor(target), random(50), reduction=reduction)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_average(rows, reduction, label_smoothing):
    """No rows, or only ignored ones: nan for mean, 0 for sum; the gradient is as without fusion."""
    target = torch.full((rows,), -100)
    arguments = {"reduction": reduction, "label_smoothing": label_smoothing}
    assert_equal(random(rows, 8), random(50, 8), target, random(50), **arguments)
    loss = cce_inductor.linear_cross_entropy(random(rows, 8), random(50, 8), target, **arguments)
    assert loss.isnan().all() if reduction == "mean" else not loss.any()


def test_class_weights_of_zero():
    weight = class_weight()
    weight[[3, 0, 49, 7]] = 0
    assert_equal(random(6, 8), random(50, 8), TARGET, weight=weight)
    weight[3] = 1
    assert_equal(random(6, 8), random(50, 8), TARGET, weight=weight, label_smoothing=0.2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["input", "weight", "bias", "target's bias"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_nan_and_infinity(place, value, label_smoothing):
    input, weight, bias = (t.detach() for t in (random(6, 8), random(50, 8), random(50)))
    if place == "input":
        input[1, 2] = value
    elif place == "weight":
        weight[11, 2] = value
    else:
        bias[7 if place == "target's bias" else 11] = value
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    target = TARGET.clamp(min=0)
    assert_equal(*leaves[:2], target, leaves[2], reduction="none", label_smoothing=label_smoothing)


def test_ignored_rows_have_no_gradient_even_where_the_weight_is_nan():
    """Unfused, the row's softmax is nan and 0 * nan as well; here the row is never computed."""
    input, weight = random(6, 8), random(50, 8)
    weight.data[11, 2] = math.nan
    cce_inductor.linear_cross_entropy(input, weight, TARGET).backward()
    assert not input.grad[3].any()
    assert input.grad[[0, 1, 2, 4, 5]].isnan().all()


def test_negative_label_smoothing_is_none():
    """PyTorch lets it through, and smooths nothing."""
    assert_equal(random(6, 8), random(50, 8), TARGET, label_smoothing=-0.1)


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this version of torch has no such function"
)
def test_same_signature_as_pytorch():
    """`torch.nn.functional.linear_cross_entropy` takes the same arguments by the same names."""
    arguments = {
        "linear_bias": random(50),
        "weight": class_weight(),
        "reduction": "sum",
        "ignore_index": 7,
        "label_smoothing": 0.1,
    }
    target = TARGET.clamp(min=0)
    got = cce_inductor.linear_cross_entropy(random(6, 8), random(50, 8), target, **arguments)
    want = F.linear_cross_entropy(random(6, 8), random(50, 8), target, **arguments)
    torch.testing.assert_close(got, want)


def error_of(fn, *args, **kwargs):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fn(*args, **kwargs)
    return caught.type, str(caught.value)


GOOD = {"input": random(6, 8), "linear_weight": random(50, 8), "target": TARGET}
BAD = {
    "hidden size": {"linear_weight": random(50, 9)},
    "hidden size of one row": {"input": random(9), "target": TARGET[0]},
    "bias of another size": {"linear_bias": random(49)},
    "bias of two dimensions": {"linear_bias": random(2, 50)},
    "bias of another dtype": {"linear_bias": random(50, dtype=torch.float64)},
    "fewer targets": {"target": TARGET[:5]},
    "more targets": {"target": torch.cat((TARGET, TARGET))},
    "target of two dimensions": {"target": TARGET[:, None]},
    "one target of no dimension": {"target": TARGET[0]},
    "one row, several targets": {"input": random(8)},
    "int32 target": {"target": TARGET.int()},
    "int16 target": {"target": TARGET.short()},
    "bool target": {"target": TARGET > 3},
    "unknown reduction": {"reduction": "median"},
    "label_smoothing above 1": {"label_smoothing": 1.5},
    "class weight of another size": {"weight": torch.ones(49)},
    "class weight of two dimensions": {"weight": torch.ones(50, 1)},
    "class weight of another dtype": {"weight": class_weight(torch.float64)},
    "class weight of integers": {"weight": torch.ones(50, dtype=torch.int64)},
    "dtypes of input and weight": {"linear_weight": random(50, 8, dtype=torch.float64)},
    "integer input": {
        "input": torch.ones(6, 8, dtype=torch.int64),
        "linear_weight": torch.ones(50, 8, dtype=torch.int64),
    },
    "target above": {"target": TARGET.where(TARGET != 49, 50)},
    "target far above": {"target": TARGET.where(TARGET != 49, 2**40)},
    "target below": {"target": TARGET.where(TARGET != 0, -1)},
    "target that another ignore_index ignored": {"ignore_index": 7},
}


@pytest.mark.parametrize("bad", BAD)
def test_errors_are_those_of_the_unfused_code(bad):
    arguments = {**GOOD, **BAD[bad]}
    want = error_of(unfused, **arguments)
    assert error_of(cce_inductor.linear_cross_entropy, **arguments) == want


def test_errors_of_what_only_the_unfused_code_can_do():
    input, weight, target = GOOD.values()
    loss = cce_inductor.linear_cross_entropy
    with pytest.raises(RuntimeError, match="expected input with dimensionality 1 or 2, got 3"):
        loss(input.view(2, 3, 8), weight, target.view(2, 3))
    with pytest.raises(NotImplementedError, match="linear_weight of shape"):
        loss(input, weight[0], target)
    for softcap in (0, -30.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite softcap greater than 0"):
            cce_inductor.linear_cross_entropy(input, weight, target, softcap=softcap)
    with pytest.raises(NotImplementedError, match="class probabilities"):
        loss(input, weight, torch.rand(6, 50))


@pytest.mark.parametrize("shape", [(), (1,), (1, 50), (6, 50), (6, 1)], ids=str)
def test_bias_that_linear_would_broadcast_is_refused_by_name(shape):
    unfused(*GOOD.values(), linear_bias=random(*shape))
    with pytest.raises(RuntimeError, match="linear_bias"):
        cce_inductor.linear_cross_entropy(*GOOD.values(), linear_bias=random(*shape))


def test_second_derivative_is_refused():
    input, weight, target = GOOD.values()
    loss = cce_inductor.linear_cross_entropy(input, weight, target)
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), input)


def test_inside_a_compiled_function():
    torch._dynamo.reset()
    compiled = torch.compile(cce_inductor.linear_cross_entropy, fullgraph=True)
    arguments = {"linear_bias": random(50), "label_smoothing": 0.1, "softcap": 5.0}
    got, want = (fn(*GOOD.values(), **arguments) for fn in (compiled, unfused))
    torch.testing.assert_close(got, want)
    leaves = [GOOD["input"], GOOD["linear_weight"], arguments["linear_bias"]]
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in (got, want)))


def test_without_gradients():
    input, weight, target = GOOD.values()
    with torch.no_grad():
        loss = cce_inductor.linear_cross_entropy(input, weight, target)
    assert not loss.requires_grad
