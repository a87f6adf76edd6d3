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

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def loss_after(change):
    """The function whose logits go through `change`."""

    def fn(input, weight, target):
        return F.cross_entropy(change(F.linear(input, weight)), target)

    return fn


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


UNSUPPORTED = {
    "c / x": (lambda x: 2 / x, "truediv", "the logits are not its first operand"),
    "torch.div, swapped": (
        lambda x: torch.div(torch.ones(()), x),
        "div",
        "the logits are not its first operand",
    ),
    "rounded quotient": (
        lambda x: torch.div(x, 3, rounding_mode="floor"),
        "div",
        "it rounds the quotient",
    ),
    "x * tensor": (
        lambda x: x * torch.ones(50),
        "mul",
        "it has an operand that is a tensor, not a number",
    ),
    "x * tensor of no dimension": (
        lambda x: x * torch.tensor(2.0),
        "mul",
        "it has an operand that is a tensor, not a number",
    ),
    "x / tensor": (
        lambda x: x / torch.full((6, 1), 2.0),
        "truediv",
        "it has an operand that is a tensor, not a number",
    ),
    "x * x": (lambda x: x * x, "mul", "it has an operand that is a tensor, not a number"),
    "x / x": (lambda x: x / x, "truediv", "it has an operand that is a tensor, not a number"),
    "x * x.tanh()": (lambda x: x * x.tanh(), "mul", "it combines logits with logits"),
    "x // c": (lambda x: x // 2, "floordiv", None),
    "x % c": (lambda x: x % 2, "mod", None),
    "x ** c": (lambda x: x**2, "pow", None),
    "x - c": (lambda x: x - 2, "sub", None),
    "abs": (lambda x: x.abs(), "abs", None),
    "clamp": (lambda x: x.clamp(-1, 1), "clamp", None),
    "dropout": (lambda x: F.dropout(x, 0.5), "dropout", None),
    "log_softmax": (lambda x: F.log_softmax(x, -1), "log_softmax", None),
    "softmax": (lambda x: torch.softmax(x, -1), "softmax", None),
    "sigmoid": (lambda x: x.sigmoid(), "sigmoid", None),
    "layer_norm": (lambda x: F.layer_norm(x, (50,)), "layer_norm", None),
    "masked_fill": (
        lambda x: x.masked_fill(torch.arange(50) > 40, -torch.inf),
        "masked_fill",
        None,
    ),
    "where": (lambda x: torch.where(torch.arange(50) > 40, -torch.inf, x), "where", None),
    "cat": (lambda x: torch.cat([x, x[:, :10]], 1), "cat", None),
}


@pytest.mark.parametrize(("change", "name", "why"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported(change, name, why):
    reason = reason_against(loss_after(change), INPUT, WEIGHT, TARGET)
    assert reason.startswith(f"the logits are used by {name} at ")
    assert reason.endswith(
        f": {why}" if why else "test_pointwise.py" + reason[reason.rindex(":") :]
    )


def test_scale_that_is_learned_is_left_alone():
    def fn(input, weight, target, scale):
        return F.cross_entropy(F.linear(input, weight) * scale.exp(), target)

    scale = torch.zeros((), requires_grad=True)
    reason = reason_against(fn, INPUT, WEIGHT, TARGET, scale)
    assert reason.endswith(": it has an operand that is a tensor, not a number")
