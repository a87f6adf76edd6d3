"""Scales and softcaps, each with the constants that were written."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from checks import (
    assert_as_accurate_as_eager,
    reason_against,
    rewritten_graph,
    value_and_gradients,
)
from expecttest import assert_expected_inline

from cce_inductor.kernels.program import derivative
from cce_inductor.patterns.language import capture
from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def loss_after(change):
    """The function whose logits go through `change`."""

    def fn(input, weight, target):
        return F.cross_entropy(change(F.linear(input, weight)), target)

    return fn


def to_a_power_by_statement(logits):
    logits **= 2
    return logits


IN_PLACE_BY_ANOTHER_OVERLOAD = {
    "pow_": lambda logits: logits.pow_(2),
    "ipow": to_a_power_by_statement,
    "pow_ of a tensor": lambda logits: logits.pow_(torch.tensor(2.0)),
    "float_power_": lambda logits: logits.double().float_power_(2.0),
}


@pytest.mark.parametrize(
    "change", IN_PLACE_BY_ANOTHER_OVERLOAD.values(), ids=IN_PLACE_BY_ANOTHER_OVERLOAD
)
def test_in_place_function_whose_overload_has_another_name(change):
    assert_as_accurate_as_eager(loss_after(change), INPUT, WEIGHT, TARGET)


def test_mask_in_bytes_that_wrap_around():
    def change(logits):
        return logits * (1 - 2 * (logits > 0).byte())

    reason = reason_against(loss_after(change), INPUT, WEIGHT, TARGET)
    assert reason.endswith("(aten.mul.Tensor of torch.uint8 may wrap around)")


def test_graph_of_a_scale():
    assert_expected_inline(
        rewritten_graph(loss_after(lambda logits: logits * 0.5), INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 't0 = mul.Tensor(z, 0.5); logsumexp(t0); target(t0, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_a_softcap():
    def softcap(logits):
        return 30.0 * torch.tanh(logits / 30.0)

    assert_expected_inline(
        rewritten_graph(loss_after(softcap), INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 't0 = div.Tensor(z, 30.0); t1 = tanh(t0); t2 = mul.Tensor(t1, 30.0); logsumexp(t2); target(t2, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_a_softcap_with_two_constants():
    def softcap(logits):
        return 5 * torch.tanh(logits / 2.5)

    assert_expected_inline(
        rewritten_graph(loss_after(softcap), INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 't0 = div.Tensor(z, 2.5); t1 = tanh(t0); t2 = mul.Tensor(t1, 5); logsumexp(t2); target(t2, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


SPELLINGS = {
    "x * c": lambda x: x * 0.3,
    "c * x": lambda x: 0.3 * x,
    "x.mul": lambda x: x.mul(0.3),
    "x.multiply": lambda x: x.multiply(0.3),
    "torch.mul": lambda x: torch.mul(x, 0.3),
    "torch.mul, swapped": lambda x: torch.mul(0.3, x),
    "torch.mul, keywords": lambda x: torch.mul(other=0.3, input=x),
    "torch.multiply": lambda x: torch.multiply(x, 0.3),
    "x.__mul__": lambda x: x.__mul__(0.3),
    "operator.mul": lambda x: operator.mul(0.3, x),
    "x / c": lambda x: x / 0.3,
    "x.div": lambda x: x.div(0.3),
    "x.divide": lambda x: x.divide(0.3),
    "x.true_divide": lambda x: x.true_divide(0.3),
    "torch.div": lambda x: torch.div(x, 0.3),
    "torch.div, no rounding": lambda x: torch.div(x, 0.3, rounding_mode=None),
    "torch.divide": lambda x: torch.divide(x, 0.3),
    "torch.true_divide": lambda x: torch.true_divide(x, 0.3),
    "-x": lambda x: -x,
    "x.neg": lambda x: x.neg(),
    "x.negative": lambda x: x.negative(),
    "torch.neg": lambda x: torch.neg(x),
    "x.tanh": lambda x: x.tanh(),
    "torch.tanh": lambda x: torch.tanh(x),
    "F.tanh": lambda x: F.tanh(x),
    "nn.Tanh": lambda x: torch.nn.Tanh()(x),
    "integers": lambda x: 3 * x / 2,
    "computed constant": lambda x: x * 8**-0.5 / math.log(2),
    "zero": lambda x: x * 0,
    "negative": lambda x: x * -2.0,
    "softcap": lambda x: 3.0 * torch.tanh(x / 3.0),
    "softcap, divided": lambda x: torch.tanh(x / 3.0) / 0.5,
    "softcap, multiplied": lambda x: (x * 0.25).tanh() * 4,
    "softcap of scaled logits": lambda x: torch.tanh(x * 2 / 5.0) * 5.0,
    "scaled softcap": lambda x: torch.tanh(x / 5.0) * 5.0 / 0.7,
    "two softcaps": lambda x: 2 * torch.tanh(3 * torch.tanh(x / 3) / 2),
    "different constants": lambda x: 4.0 * torch.tanh(x / 3.0),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(spelling):
    assert_as_accurate_as_eager(loss_after(spelling), INPUT, WEIGHT, TARGET)


@pytest.mark.parametrize("spelling", ["x * c", "softcap", "different constants"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_numbers_with_bias_and_class_weights(spelling, label_smoothing):
    def fn(input, weight, bias, target, class_weight):
        logits = SPELLINGS[spelling](F.linear(input, weight, bias))
        return F.cross_entropy(
            logits, target, class_weight, reduction="none", label_smoothing=label_smoothing
        )

    bias = torch.randn(50, requires_grad=True)
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, bias, TARGET, torch.rand(50) + 0.5)


@pytest.mark.parametrize("spelling", ["c * x", "x / c", "softcap"])
def test_numbers_in_bfloat16(spelling):
    input, weight = (t.detach().bfloat16().requires_grad_() for t in (INPUT, WEIGHT))
    assert_as_accurate_as_eager(loss_after(SPELLINGS[spelling]), input, weight, TARGET)


@pytest.mark.parametrize("spelling", ["c * x", "x / c", "softcap"])
def test_numbers_in_float64(spelling):
    fn = loss_after(SPELLINGS[spelling])
    input, weight = (t.detach().double().requires_grad_() for t in (INPUT, WEIGHT))
    compiled = torch.compile(fn, backend="cce_inductor_eager", options={"min_logits_bytes": 0})
    torch.testing.assert_close(
        value_and_gradients(compiled, input, weight, TARGET),
        value_and_gradients(fn, input, weight, TARGET),
        rtol=1e-13,
        atol=1e-13,
    )


def test_each_constant_of_a_softcap_counts():
    def values(inner, outer):
        fn = loss_after(lambda x: outer * torch.tanh(x / inner))
        compiled = torch.compile(fn, backend="cce_inductor_eager", options={"min_logits_bytes": 0})
        torch._dynamo.reset()
        got = compiled(INPUT, WEIGHT, TARGET)
        torch.testing.assert_close(got, fn(INPUT, WEIGHT, TARGET))
        return got.item()

    assert len({values(inner, outer) for inner in (2.0, 3.0) for outer in (2.0, 3.0)}) == 4


FUNCTIONS = {
    "c / x": lambda x: 2 / (x.abs() + 1),
    "c - x": lambda x: 2 - x,
    "x - c": lambda x: x - 2,
    "x ** c": lambda x: x**2,
    "c ** x": lambda x: 2**x,
    "x % c": lambda x: x % 2,
    "x * x": lambda x: x * x,
    "x / x": lambda x: x / (x * x + 1),
    "x * x.tanh()": lambda x: x * x.tanh(),
    "polynomial": lambda x: 1 + x + x**2 / 2,
    "torch.div, swapped": lambda x: torch.div(torch.ones(()), x.abs() + 1),
    "rounded quotient": lambda x: torch.div(x, 3, rounding_mode="floor") + x,
    "rounded quotient alone": lambda x: torch.div(x, 3, rounding_mode="floor"),
    "abs": lambda x: x.abs(),
    "acos": lambda x: torch.cos(torch.acos((x / 20).clamp(-0.9, 0.9)) + 0.5),
    "clamp": lambda x: x.clamp(-1, 1),
    "clip": lambda x: torch.clip(x, max=2),
    "erf": lambda x: x.erf(),
    "exp": lambda x: (x / 5).exp(),
    "gelu": lambda x: F.gelu(x),
    "gelu, approximate": lambda x: F.gelu(x, approximate="tanh"),
    "log1p": lambda x: x.abs().log1p(),
    "logit": lambda x: torch.logit(x.sigmoid() * 0.9 + 0.05),
    "maximum": lambda x: torch.maximum(x, x * 2),
    "minimum": lambda x: torch.minimum(x, torch.ones(6, 50)),
    "nan_to_num": lambda x: x.nan_to_num(),
    "relu": lambda x: x.relu(),
    "relu, in place": lambda x: F.relu(x, inplace=True),
    "round": lambda x: x.round() + x,
    "rsqrt": lambda x: x * torch.rsqrt(x * x + 4),
    "sigmoid": lambda x: x.sigmoid(),
    "sign": lambda x: x.sign() * x,
    "silu": lambda x: F.silu(x),
    "sin": lambda x: x.sin(),
    "softsign": lambda x: F.softsign(x),
    "threshold": lambda x: F.threshold(x, 0.1, -1),
    "elu": lambda x: F.elu(x),
    "hardsigmoid": lambda x: F.hardsigmoid(x),
    "hardtanh": lambda x: F.hardtanh(x),
    "hardshrink": lambda x: F.hardshrink(x),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "mish": lambda x: F.mish(x),
    "relu6": lambda x: F.relu6(x),
    "softplus": lambda x: F.softplus(x),
    "softshrink": lambda x: F.softshrink(x),
    "where": lambda x: torch.where(x > 0, x, x / 2),
    "where, a number": lambda x: torch.where(torch.arange(50) > 40, -5.0, x),
    "where, infinity": lambda x: torch.where(torch.arange(50) == 48, -torch.inf, x),
    "masked_fill": lambda x: x.masked_fill(torch.arange(50) == 48, -torch.inf),
    "x * mask": lambda x: x * (torch.arange(300).view(6, 50) % 3 > 0),
    "x * comparison": lambda x: x * ((x > 0) & (x < 2)),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_numbers_of_functions(function):
    assert_as_accurate_as_eager(loss_after(function), INPUT, WEIGHT, TARGET)


def test_graph_of_a_function():
    fn = loss_after(lambda x: 15 * x * torch.rsqrt(x * x + 225))
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 't0 = mul.Tensor(z, 15); t1 = mul.Tensor(z, z); t2 = add.Tensor(t1, 225); t3 = rsqrt(t2); t4 = mul.Tensor(t0, t3); logsumexp(t4); target(t4, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_a_mask():
    fn = loss_after(lambda x: x.masked_fill(torch.arange(50) > 40, -torch.inf))
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET % 40),
        """\
arange = torch.arange(50)
gt = arange > 40
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [gt, l_target_], 't0 = masked_fill.Scalar(z, c0, -inf); logsumexp(t0); target(t0, r1, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


OPERANDS = {
    "a number": (),
    "one element": (1,),
    "one element of each dimension": (1, 1),
    "one for each row": (6, 1),
    "one for each entry": (50,),
    "a row of entries": (1, 50),
}
WITH_OPERAND = {
    "x * a": lambda x, a: x * a,
    "x / a": lambda x, a: x / a,
    "a - x": lambda x, a: a - x * x,
    "x * exp(a)": lambda x, a: x * a.exp(),
    "softcap": lambda x, a: a * torch.tanh(x / a),
    "addcmul": lambda x, a: torch.addcmul(x, x, a, value=0.1),
    "maximum": lambda x, a: torch.maximum(x, a),
    "lerp": lambda x, a: torch.lerp(x, x * x, a),
    "addcdiv": lambda x, a: torch.addcdiv(x, x, a),
}


@pytest.mark.parametrize("shape", OPERANDS.values(), ids=OPERANDS)
@pytest.mark.parametrize("function", WITH_OPERAND.values(), ids=WITH_OPERAND)
def test_numbers_with_an_operand(function, shape):
    def fn(input, weight, target, operand):
        return F.cross_entropy(function(F.linear(input, weight), operand), target)

    operand = (torch.rand(shape) + 0.5).requires_grad_()
    # The gradient of one number is a sum of many that cancel.
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET, operand, slack=5)


def test_graph_with_operands():
    def fn(input, weight, target, scale, shift, temperature, noise):
        logits = (F.linear(input, weight) * scale + shift) / temperature + noise
        return F.cross_entropy(logits, target)

    operands = torch.ones(6, 1), torch.ones(50), torch.ones(()), torch.ones(6, 50)
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET, *operands),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_scale_, l_shift_, l_temperature_, l_noise_, l_target_], 't0 = mul.Tensor(z, r0); t1 = add.Tensor(t0, c1); t2 = div.Tensor(t1, s2); t3 = add.Tensor(t2, b3); logsumexp(t3); target(t3, r4, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_numbers_with_an_operand_as_large_as_the_logits():
    def fn(input, weight, target, noise):
        return F.cross_entropy(F.linear(input, weight) * noise, target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET, torch.rand(6, 50))


NO_FUNCTION = str(reasons.not_pointwise(""))
LEFT_ALONE = {
    "cat": (lambda x: torch.cat([x, x * 2]), "cat", reasons.JOINS_SEVERAL_WEIGHTS.sentence),
    "other rows": (
        lambda x: x + x[:1],
        "add",
        reasons.OTHER_ROWS_OF_SAME_LOGITS.sentence,
    ),
    "cumsum": (lambda x: x.cumsum(-1), "cumsum", None),
    "dropout": (lambda x: F.dropout(x, 0.5), "dropout", reasons.RANDOM.sentence),
    "flip": (lambda x: x.flip(-1), "flip", None),
    "layer_norm": (lambda x: F.layer_norm(x, (50,)), "layer_norm", None),
    "noise": (lambda x: x + torch.rand_like(x), "rand_like", reasons.RANDOM.sentence),
    "normalize": (lambda x: F.normalize(x, dim=-1), "normalize", None),
    "rrelu": (lambda x: F.rrelu(x, training=True), "rrelu", reasons.RANDOM.sentence),
    "sort": (lambda x: x.sort(-1).values, "sort", None),
    "x // c": (lambda x: x // 2, "floordiv", None),
}


class Tripled(torch.autograd.Function):
    """The gradient is not that of the function."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


@pytest.mark.parametrize(("change", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(change, name, why):
    def fn(input, weight, target):
        return F.cross_entropy(change(F.linear(input, weight))[:6, :50], target)

    reason = reason_against(fn, INPUT, WEIGHT, TARGET)
    assert reason.startswith(f"{reasons.USED_BY} {name} at ")
    assert f": {NO_FUNCTION if why is None else why}" in reason


def test_custom_function_is_left_alone():
    reason = reason_against(loss_after(Tripled.apply), INPUT, WEIGHT, TARGET)
    assert reason.startswith(f"{reasons.USED_BY} autograd_function_apply at ")


def test_operand_as_large_as_the_logits_with_a_gradient_is_left_alone():
    def fn(input, weight, target, noise):
        return F.cross_entropy(F.linear(input, weight) * noise, target)

    reason = reason_against(fn, INPUT, WEIGHT, TARGET, torch.rand(6, 50, requires_grad=True))
    assert reason.endswith(reasons.OPERAND_LARGE_WITH_GRADIENT.sentence)


def test_operand_that_enlarges_the_logits_is_left_alone():
    def fn(input, weight, target, noise):
        return F.cross_entropy((F.linear(input, weight) * noise)[0], target)

    reason = reason_against(fn, INPUT, WEIGHT, TARGET, torch.rand(3, 1, 1))
    assert reason.endswith(f": {reasons.BROADCAST_TO_MORE_DIMENSIONS.sentence}")


@torch.compiler.allow_in_graph
def rounded(x):
    """The gradient passes as if nothing were rounded."""
    return x + (x.round() - x).detach()


@torch.compiler.allow_in_graph
def first_entry(x):
    return x - x[:, :1]


def test_function_with_a_detach():
    assert_as_accurate_as_eager(loss_after(rounded), INPUT, WEIGHT, TARGET)


def test_function_of_a_matrix_is_left_alone():
    reason = reason_against(loss_after(first_entry), INPUT, WEIGHT, TARGET)
    assert reason.endswith(f": {reasons.not_pointwise('')}")


@pytest.mark.parametrize("error", [NameError, RuntimeError, KeyError])
@pytest.mark.parametrize(
    "place", ["tracing._is_pointwise", "tracing.needed", "derivative._differentiate"]
)
def test_an_error_of_this_package_is_no_property_of_the_function(place, error, monkeypatch):
    def typo(*_):
        raise error("a typo")

    monkeypatch.setattr(f"cce_inductor.kernels.program.{place}", typo)
    derivative._derivative_of_text.cache_clear()
    capture._trace.cache_clear()
    with pytest.raises(error, match="a typo"):
        rewritten_graph(loss_after(torch.sin), INPUT, WEIGHT, TARGET)
