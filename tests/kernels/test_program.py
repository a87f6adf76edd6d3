"""The text of a program, its schedule and its derivative."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.program import tracing
from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.program.schedule import Schedule, schedule
from cce_inductor.kernels.program.text import Program, Step, overload
from cce_inductor.kernels.program.tracing import NotPointwiseError, record

ROWS, COLUMNS = 3, 5
SOFTCAP = "t0 = div.Tensor(z, 30.0); t1 = tanh(t0); t2 = mul.Tensor(t1, 30.0)"


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


TEXTS = [
    "logsumexp(z)",
    "sum(j); max(z); topk(z, 7); logsumexp(z); mean(z, z)",
    "gather(z, r0); index(z, r1); target(z, r2, -100)",
    SOFTCAP + "; logsumexp(t2); target(t2, r0, -100)",
    "t0 = clamp(z, -inf, inf); t1 = where.self(b0, t0, nan); sum(t1)",
    "t0 = add.Tensor(z, -1e-300, alpha=-2); sum(t0)",
    "t0 = add.Tensor(z, c1, alpha=r0); sum(t0)",
    "t0 = div.Tensor_mode(z, 3, rounding_mode='floor'); sum(t0)",
    "t0 = gelu(z, approximate='none'); sum(t0)",
    "t0 = clamp(z, None, 1.0); t1 = threshold(t0, 0, True); sum(t1)",
    "t0 = nan_to_num(z, nan=0.0, posinf=inf, neginf=-inf); sum(t0)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trip(text):
    assert str(Program.parse(text)) == text


def test_what_is_parsed():
    parsed = Program.parse(
        "t0 = div.Tensor_mode(z, -inf, rounding_mode='floor'); target(t0, r0, 3)"
    )
    (step,), (reduction,) = parsed.steps, parsed.outputs
    assert step.name == "t0"
    assert step.target == "div.Tensor_mode"
    assert step.args == ("z", -math.inf)
    assert step.kwargs == (("rounding_mode", "floor"),)
    assert [type(a) for a in step.args] == [Name, float]
    assert not isinstance(step.kwargs[0][1], Name)
    assert (reduction.name, reduction.args) == ("target", ("t0", "r0", 3))
    assert reduction.value == "t0"


numbers = st.one_of(st.floats(), st.integers(), st.booleans(), st.none())


@given(st.lists(numbers, max_size=4), st.dictionaries(st.sampled_from("abcd"), numbers))
def test_constants_round_trip_exactly(args, kwargs):
    step = Step(Name("t0"), "add.Tensor", (Name("z"), *args), tuple(kwargs.items()))
    text = f"{step}; sum(t0)"
    (parsed,) = Program.parse(text).steps
    assert str(parsed) == str(step)
    # repr tells apart -0.0 and 0.0, True and 1, and knows nan.
    assert repr(parsed.args[1:]) == repr(tuple(args))
    assert repr(parsed.kwargs) == repr(tuple(kwargs.items()))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "t0 = tanh(z)",
        "softmax(z)",
        "logsumexp(z",
        "logsumexp",
        "sum(-z)",
        "sum(z + 1)",
        "sum(z.real)",
        "sum(*z)",
        "t0 = 3; sum(t0)",
        "t0 = t1 = tanh(z); sum(t0)",
        "t0, t1 = tanh(z); sum(t0)",
        "t0 = nothing_of_aten(z); sum(t0)",
        "t0 = div.Nothing(z, 2); sum(t0)",
        "import os; sum(z)",
        "lambda: 3",
    ],
)
def test_what_is_no_program(text):
    with pytest.raises(ValueError, match="is not a program over logits"):
        Program.parse(text)


def test_space_and_line_ends_are_free():
    assert Program.parse(" t0=tanh( z );sum(t0)\n") == Program.parse("t0 = tanh(z)\nsum(t0)")


def test_roots_and_operands():
    parsed = Program.parse(
        "t0 = mul.Tensor(z, c2); t1 = where.self(b4, t0, other=s1); sum(t0); logsumexp(t1); "
        "mean(t1, r0); gather(t0, r3)"
    )
    assert parsed.roots == ("t0", "t1", "r0")
    assert parsed.operands == {"c2": "c", "b4": "b", "s1": "s", "r0": "r"}
    assert [name.position for name in parsed.operands] == [2, 4, 1, 0]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("logsumexp(z); target(z, r0, -100)", True),
        ("sum(z); logsumexp(z); mean(z, z)", True),
        ("t0 = tanh(z); sum(z)", False),
        ("sum(c0)", False),
        ("sum(j)", False),
        ("logsumexp(z); mean(z, c0)", False),
        ("logsumexp(z); mean(z, j)", False),
    ],
)
def test_is_plain(text, plain):
    assert Program.parse(text).is_plain == plain


# Schedules


def values_for(text, z=None):
    """Inputs of every kind for the names that a program may use."""
    z = random(ROWS, COLUMNS) if z is None else z
    values = {
        "z": z,
        "j": torch.arange(z.shape[1]).unsqueeze(0),
        "r0": random(ROWS, 1, seed=1),
        "c1": random(1, COLUMNS, seed=2),
        "s2": random(seed=3),
        "b3": random(ROWS, COLUMNS, seed=4),
        "b4": random(ROWS, COLUMNS, seed=5) > 0,
        "r5": torch.tensor([[2], [0], [4]]),
    }
    return {Name(k): v for k, v in values.items()}


def evaluated(parsed, values):
    """Each root, by steps that change and drop nothing."""
    values = dict(values)
    Schedule(parsed.steps, parsed.roots).run(values, in_place=False)
    return [values[root] for root in parsed.roots]


SCHEDULES = {
    "chain": SOFTCAP + "; sum(t2)",
    "a value twice": "t0 = exp(z); t1 = mul.Tensor(t0, t0); t2 = add.Tensor(t1, t0); sum(t2)",
    "a root in between": "t0 = exp(z); t1 = neg(t0); t2 = tanh(t1); sum(t2); logsumexp(t0)",
    "the logits are a root": "t0 = exp(z); t1 = neg(t0); sum(t1); max(z)",
    "operands": "t0 = mul.Tensor(b3, c1); t1 = add.Tensor(t0, r0); t2 = neg(b3); t3 = sub.Tensor(t2, t1); sum(t3)",
    "smaller than a block": "t0 = mul.Tensor(c1, s2); t1 = exp(t0); t2 = mul.Tensor(t1, z); sum(t2); sum(t1)",
    "another dtype": "t0 = gt.Scalar(z, 0.0); t1 = mul.Tensor(t0, z); t2 = add.Tensor(j, t1); sum(t2)",
    "integers": "t0 = add.Tensor(j, 1); t1 = mul.Tensor(t0, 2); t2 = mul.Tensor(t1, z); sum(t2); sum(t1)",
    "alias": "t0 = detach(z); t1 = exp(t0); t2 = mul.Tensor(t1, z); sum(t2); sum(t0)",
    "alias of a step": "t0 = neg(z); t1 = detach(t0); t2 = exp(t0); t3 = add.Tensor(t2, t1); sum(t3)",
    "by keyword": "t0 = neg(z); t1 = add.Tensor(t0, other=t0, alpha=2); sum(t1)",
    "nobody needs it": "t0 = exp(z); t1 = neg(z); sum(t1)",
    "only numbers": "t0 = add.Tensor(1.0, 2.0); t1 = mul.Tensor(t0, z); sum(t1)",
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_writes_over_nothing_that_is_needed(name, dtype):
    parsed = Program.parse(SCHEDULES[name])
    values = {
        k: v.to(dtype) if v.is_floating_point() else v
        for k, v in values_for(SCHEDULES[name]).items()
    }
    before = {k: v.clone() for k, v in values.items()}
    want = evaluated(parsed, values)
    values["z"] = values["z"].clone()
    given_values = dict(values)
    schedule(parsed).run(values)
    for root, expected in zip(parsed.roots, want, strict=True):
        torch.testing.assert_close(values[root], expected, rtol=0, atol=0)
        if root[0] == "t" and expected.is_floating_point():
            assert values[root].dtype == dtype
    for operand in set(before) - {"z"}:
        torch.testing.assert_close(given_values[operand], before[operand], rtol=0, atol=0)


def test_schedule_keeps_what_it_must_and_drops_the_rest():
    parsed = Program.parse(
        "t0 = exp(z); t1 = sin(t0); t2 = cos(t0); t3 = mul.Tensor(t1, t2); sum(t3)"
    )
    values = values_for("")
    schedule(parsed).run(values)
    assert [v for v in values if v[0] == "t"] == ["t3"]


def test_a_chain_stays_in_one_block():
    parsed = Program.parse(SOFTCAP + "; sum(t2)")
    values = values_for("")
    memory = values["z"].data_ptr()
    schedule(parsed).run(values)
    assert values["t2"].data_ptr() == memory


@pytest.mark.parametrize(
    ("text", "peak"),
    [
        ("logsumexp(z)", 1),
        (SOFTCAP + "; sum(t2)", 1),
        (SOFTCAP + "; sum(t2); sum(z)", 2),
        ("t0 = sin(z); t1 = cos(t0); t2 = sin(t1); sum(t2)", 3),
        ("t0 = exp(z); t1 = sin(t0); t2 = cos(t0); t3 = mul.Tensor(t1, t2); sum(t3)", 3),
    ],
)
def test_peak(text, peak):
    assert schedule(Program.parse(text)).peak() == peak


@pytest.mark.parametrize("name", SCHEDULES)
def test_peak_counts_all_blocks_that_exist(name):
    """Measured by asking, before each step, how many blocks are held."""
    parsed = Program.parse(SCHEDULES[name])
    held = []

    class Values(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            blocks = {v.data_ptr() for k, v in self.items() if k[0] in "zt" and v.dim() == 2}
            held.append(len(blocks))

    schedule(parsed).run(Values(values_for("")))
    assert max(held, default=1) <= schedule(parsed).peak()


# Derivatives


def both_gradients(text):
    """Those of the program's own derivative and of autograd, by the name of what they are of."""
    parsed = Program.parse(text)
    values = values_for(text)
    roots = len(parsed.roots)
    cotangents = [random(ROWS, COLUMNS, seed=10 + n) for n in range(roots)]

    names = [Name("z"), *parsed.operands]
    leaves = {n: v.clone() for n, v in values.items()}
    floating = [n for n in names if values[n].is_floating_point()]
    for name in floating:
        leaves[name].requires_grad_()
    made = [
        (v.expand(ROWS, COLUMNS), g)
        for v, g in zip(evaluated(parsed, leaves), cotangents, strict=True)
        if v.requires_grad
    ]
    want = [None] * len(floating)
    if made:
        outputs, given_gradients = zip(*made, strict=True)
        want = torch.autograd.grad(
            outputs, [leaves[n] for n in floating], given_gradients, allow_unused=True
        )

    operands = [torch.empty(0)] * 6
    for name in parsed.operands:
        operands[name.position] = values[name]
    backward = derivative(parsed, operands)
    values["z"] = values["z"].clone()
    before = {k: v.clone() for k, v in values.items() if k != "z"}
    backward.forward.run(values)
    for name, expected in zip(backward.roots, evaluated(parsed, leaves), strict=True):
        torch.testing.assert_close(values[name], expected.detach(), equal_nan=True)
    values.update({Name(f"g{n}"): g for n, g in enumerate(cotangents)})
    backward.backward.run(values)
    for name, unchanged in before.items():
        torch.testing.assert_close(values[name], unchanged, rtol=0, atol=0)
    got = {}
    for name in floating:
        shape = leaves[name].shape
        gradient = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
        if name in backward.gradients:
            gradient = values[backward.gradients[name]].expand(ROWS, COLUMNS)
        got[name] = gradient.sum_to_size(shape)
    want = {
        n: torch.zeros_like(leaves[n]) if w is None else w
        for n, w in zip(floating, want, strict=True)
    }
    return got, want


# fmt: off
UNARY = [
    "abs", "acos", "asinh", "atan", "ceil", "cos", "cosh", "deg2rad", "elu", "erf", "erfc", "exp",
    "exp2", "expm1", "floor", "frac", "gelu", "hardsigmoid", "hardtanh", "leaky_relu",
    "lgamma", "log1p", "mish", "neg", "nan_to_num", "reciprocal", "relu", "round", "sgn", "sigmoid",
    "sign", "silu", "sin", "sinc", "sinh", "softplus", "square", "tan", "tanh", "trunc",
]
# fmt: on


@pytest.mark.parametrize("function", UNARY)
def test_gradient_of_a_function_of_one(function):
    got, want = both_gradients(f"t0 = {function}(z); logsumexp(t0)")
    torch.testing.assert_close(got, want, equal_nan=True)


GRADIENTS = {
    "softcap": SOFTCAP + "; logsumexp(t2); target(t2, r0, -100)",
    "operands": "t0 = mul.Tensor(z, c1); t1 = add.Tensor(t0, r0, alpha=0.5); t2 = div.Tensor(t1, s2); sum(t2)",
    "block": "t0 = mul.Tensor(z, b3); t1 = where.self(b4, t0, -inf); logsumexp(t1)",
    "mask": "t0 = mul.Tensor(z, b4); sum(t0)",
    "two roots": "t0 = exp(z); t1 = mul.Tensor(t0, c1); sum(t0); sum(t1); logsumexp(z)",
    "a root of another": "t0 = exp(z); t1 = tanh(t0); sum(t1); sum(t0)",
    "detached": "t0 = detach(z); t1 = exp(t0); t2 = mul.Tensor(t1, z); sum(t2)",
    "only detached": "t0 = exp(z); t1 = detach(t0); sum(t1)",
    "a detached root": "t0 = mul.Tensor(z, s2); t1 = detach(t0); t2 = sub.Tensor(t0, t1); sum(t2); sum(t1)",
    "a root of no step": "t0 = exp(z); sum(t0); sum(z); sum(c1); sum(r0)",
    "the column": "t0 = mul.Tensor(j, 0.5); t1 = mul.Tensor(t0, z); t2 = sub.Tensor(t1, r5); sum(t2)",
    "a column condition": "t0 = lt.Scalar(j, 2); t1 = where.self(t0, z, c1); logsumexp(t1)",
    "a column is the row's index": "t0 = eq.Tensor(j, r5); t1 = where.self(t0, -inf, z); logsumexp(t1)",
    "boolean root": "t0 = gt.Scalar(z, 0.0); sum(t0); sum(z)",
    "only a boolean root": "t0 = gt.Tensor(z, c1); sum(t0)",
    "boolean algebra": "t0 = gt.Scalar(z, 0.0); t1 = logical_not(t0); t2 = bitwise_and.Tensor(t0, b4); t3 = bitwise_or.Tensor(t1, t2); t4 = mul.Tensor(t3, z); sum(t4)",
    "clamp": "t0 = clamp(z, -0.5, 0.5); sum(t0)",
    "clamp above": "t0 = clamp(z, max=0.5); sum(t0)",
    "clamp by tensors": "t0 = clamp.Tensor(z, c1, r0); sum(t0)",
    "clamp_min": "t0 = clamp_min(z, 0.1); sum(t0)",
    "maximum": "t0 = maximum(z, c1); t1 = minimum(t0, r0); sum(t1)",
    "pow": "t0 = square(z); t1 = add.Tensor(t0, 1.0); t2 = pow.Tensor_Scalar(t1, 1.7); sum(t2)",
    "pow of a tensor": "t0 = exp(z); t1 = pow.Tensor_Tensor(t0, c1); sum(t1)",
    "pow of a number": "t0 = pow.Scalar(2.0, z); sum(t0)",
    "floor division": "t0 = div.Tensor_mode(z, 0.3, rounding_mode='floor'); t1 = mul.Tensor(t0, z); sum(t1)",
    "remainder": "t0 = remainder.Scalar(z, 0.7); sum(t0)",
    "lerp": "t0 = lerp.Scalar(z, c1, 0.3); t1 = lerp.Tensor(t0, r0, s2); sum(t1)",
    "addcmul": "t0 = addcmul(z, c1, r0, value=0.5); t1 = addcdiv(t0, c1, r0); sum(t1)",
    "atan2": "t0 = atan2(z, c1); t1 = hypot(t0, r0); sum(t1)",
    "logaddexp": "t0 = logaddexp(z, c1); t1 = exp(t0); t2 = xlogy.Tensor(b3, t1); sum(t2)",
    "nothing of the logits": "t0 = mul.Tensor(c1, r0); sum(t0)",
    "reversed": "t0 = rsub.Scalar(z, 1.0); t1 = reciprocal(t0); sum(t1)",
    "zero derivative": "t0 = round(z); sum(t0)",
    "zero derivative of some": "t0 = floor(z); t1 = mul.Tensor(t0, c1); sum(t1)",
    "keyword": "t0 = where.self(condition=b4, self=z, other=c1); sum(t0)",
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient(name):
    torch.testing.assert_close(*both_gradients(GRADIENTS[name]))


KINKS = {
    "abs": "t0 = abs(z); sum(t0)",
    "relu": "t0 = relu(z); sum(t0)",
    "leaky_relu": "t0 = leaky_relu(z, 0.1); sum(t0)",
    "clamp": "t0 = clamp(z, -1.0, 1.0); sum(t0)",
    "clamp_min": "t0 = clamp_min(z, 0.0); sum(t0)",
    "maximum": "t0 = maximum(z, 0.0); sum(t0)",
    "where": "t0 = gt.Scalar(z, 0.0); t1 = where.self(t0, z, 0.0); sum(t1)",
    "sqrt of abs": "t0 = abs(z); t1 = sqrt(t0); sum(t1)",
    "hardtanh": "t0 = hardtanh(z); sum(t0)",
    "masked with infinity": "t0 = ge.Scalar(z, 0.0); t1 = where.self(t0, z, -inf); sum(t1)",
    "nan_to_num": "t0 = nan_to_num(z, 0.0, 1.0, -1.0); sum(t0)",
    "pow 0": "t0 = pow.Tensor_Scalar(z, 0.0); sum(t0)",
    "xlogy": "t0 = relu(z); t1 = xlogy.Tensor(t0, t0); sum(t1)",
}


@pytest.mark.parametrize("name", KINKS)
def test_gradient_at_a_kink(name):
    parsed = Program.parse(KINKS[name])
    points = [-math.inf, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, math.inf, math.nan]
    z = torch.tensor([points], dtype=torch.float64).requires_grad_()
    (made,) = evaluated(parsed, {Name("z"): z, Name("j"): torch.arange(9)[None]})
    (want,) = torch.autograd.grad(made, z, torch.full_like(made, 2.0))
    backward = derivative(parsed, [])
    values = {Name("z"): z.detach().clone()}
    backward.forward.run(values)
    values[Name("g0")] = torch.full((1, 9), 2.0, dtype=torch.float64)
    backward.backward.run(values)
    got = values[backward.gradients["z"]] if backward.gradients else torch.zeros_like(want)
    torch.testing.assert_close(got, want, equal_nan=True)


def test_what_mixes_elements_has_no_derivative():
    with pytest.raises(NotPointwiseError):
        derivative(Program.parse("t0 = cumsum(z, 0); sum(t0)"), [])


def test_the_derivative_is_made_once():
    parsed = Program.parse(SOFTCAP + "; sum(t2)")
    assert derivative(parsed, []) is derivative(Program.parse(str(parsed)), [])
    masked = Program.parse("t0 = mul.Tensor(z, c0); sum(t0)")
    assert "c0" in derivative(masked, [torch.ones(4)]).gradients
    assert "c0" not in derivative(masked, [torch.ones(4, dtype=torch.bool)]).gradients


def test_the_derivative_can_be_made_anywhere():
    """In a kernel below autograd, without gradients, in inference mode, among fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for number, context in enumerate((torch.no_grad(), torch.inference_mode(), FakeTensorMode())):
        with context:
            parsed = Program.parse(f"t0 = mul.Tensor(z, {number}.5); t1 = exp(t0); sum(t1)")
            assert "z" in derivative(parsed, []).gradients


UNARY_STEPS = ["neg", "exp", "tanh", "sigmoid", "sin", "detach", "relu", "abs"]
BINARY_STEPS = ["add.Tensor", "sub.Tensor", "mul.Tensor", "maximum", "atan2"]
NAMES = ["z", "j", "r0", "c1", "s2", "b3", "b4", "r5"]


@st.composite
def programs(draw):
    """Steps that read any earlier value, any operand and numbers; some of them are reduced."""
    made, statements = [], []
    for number in range(draw(st.integers(1, 8))):
        # Floating values only, as not every operator takes all dtypes: the first step is one.
        blocks = ["z", *made]
        if draw(st.booleans()):
            call = f"{draw(st.sampled_from(UNARY_STEPS))}({draw(st.sampled_from(blocks))})"
        else:
            first = draw(st.sampled_from(blocks))
            second = draw(st.sampled_from([*blocks, *NAMES[2:6], "0.5", "-2.0"]))
            call = f"{draw(st.sampled_from(BINARY_STEPS))}({first}, {second})"
        statements.append(f"t{number} = {call}")
        made.append(f"t{number}")
    roots = draw(st.lists(st.sampled_from(["z", *made]), min_size=1, max_size=3, unique=True))
    return "; ".join([*statements, *(f"sum({root})" for root in roots)])


@settings(max_examples=150, deadline=None)
@given(programs())
def test_any_chain(text):
    parsed = Program.parse(text)
    assert Program.parse(str(parsed)) == parsed
    z = random(ROWS, COLUMNS).mul_(0.3)
    want = evaluated(parsed, values_for(text, z))
    values = values_for(text, z.clone())
    schedule(parsed).run(values)
    for root, expected in zip(parsed.roots, want, strict=True):
        torch.testing.assert_close(values[root], expected, rtol=0, atol=0, equal_nan=True)
    got, want = both_gradients(text)
    torch.testing.assert_close(got, want, equal_nan=True)


def test_steps_of_a_function_as_pytorch_writes_it():
    """What is recorded of ordinary code."""

    def function(x, y):
        return F.softplus(x.clone().mul_(2.0)) - y.detach()

    inputs = {Name("z"): torch.float64, Name("s0"): torch.float64}
    steps, results = record(function, inputs)
    assert [str(step) for step in steps] == [
        "t0 = mul.Tensor(z, 2.0)",
        "t1 = softplus(t0)",
        "t2 = sub.Tensor(t1, s0)",
    ]
    assert results == ["t2"]
    assert all(torch.Tag.pointwise in overload(step.target).tags for step in steps)


def written_to_its_alias(x, y):
    alias = torch.ops.aten.alias(x)
    alias.add_(y)
    return x * 2


def written_to_what_it_is_an_alias_of(x, y):
    alias = x.detach()
    x.mul_(y)
    return alias + 1


def accumulated(x, y):
    total = torch.zeros_like(x)
    total.add_(x).addcmul_(x, y)
    return total


def made_of_a_constant(x, y):
    constant = torch.tensor(3.0)
    constant.add_(1)
    return constant * y + x


def copied_over(x, y):
    result = torch.empty_like(x)
    result.copy_(y)
    y.neg_()
    return result * x


RECORDED = {
    "copied": (copied_over, "t0 = mul.Tensor(s0, z)"),
    "a comparison in place": (
        lambda x, y: x.clone().gt_(0) * y,
        "t0 = gt.Scalar(z, 0); t1 = where.Scalar(t0, 1.0, 0.0); t2 = mul.Tensor(t1, s0)",
    ),
    "an integer as a float": (
        lambda x, y: (x > y).long().double() - y,
        "t0 = gt.Tensor(z, s0); t1 = where.Scalar(t0, 1, 0); t2 = div.Tensor(t1, 1); t3 = sub.Tensor(t2, s0)",
    ),
    "a number as a mask": (
        lambda x, y: torch.where(x.bool(), x, y),
        "t0 = ne.Scalar(z, 0); t1 = where.self(t0, z, s0)",
    ),
    "in place": (lambda x, y: x.clone().mul_(2.0).add_(y), "t0 = mul.Tensor(z, 2.0); t1 = add.Tensor(t0, s0)"),
    "alias": (written_to_its_alias, "t0 = add.Tensor(z, s0); t1 = mul.Tensor(t0, 2)"),
    "what has an alias": (written_to_what_it_is_an_alias_of, "t0 = mul.Tensor(z, s0); t1 = add.Tensor(t0, 1)"),
    "one tensor twice": (lambda x, y: x.add_(x) * y, "t0 = add.Tensor(z, z); t1 = mul.Tensor(t0, s0)"),
    "accumulated": (accumulated, "t0 = add.Tensor(0.0, z); t1 = addcmul(t0, z, s0)"),
    "a constant": (made_of_a_constant, "t0 = add.Tensor(3.0, 1); t1 = mul.Tensor(t0, s0); t2 = add.Tensor(t1, z)"),
    "a number of a constant": (lambda x, y: x * torch.tensor(3.0).item(), "t0 = mul.Tensor(z, 3.0)"),
    "not needed": (lambda x, y: (x.exp() + 1, y.neg())[1], "t0 = neg(s0)"),
    "a mask": (lambda x, y: torch.where(torch.zeros_like(x, dtype=torch.bool), x, y), "t0 = where.self(False, z, s0)"),
    "filled": (lambda x, y: x.clone().fill_(2) * y, "t0 = mul.Tensor(2.0, s0)"),
    "set to 0": (lambda x, y: x.clone().zero_() - y, "t0 = sub.Tensor(0.0, s0)"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_recorded(name):
    """Whatever name a tensor has, it holds what was written last, as in eager code."""
    function, text = RECORDED[name]
    steps, (result,) = record(function, {Name("z"): torch.float64, Name("s0"): torch.float64})
    assert "; ".join(map(str, steps)) == text
    z, s0 = random(3, 4), random(3, 4, seed=1)
    values = {Name("z"): z.clone(), Name("s0"): s0.clone()}
    Schedule(tuple(steps), (result,)).run(values, in_place=False)
    expected = function(z.clone(), s0.clone())
    torch.testing.assert_close(values[result], expected)


def says_that_all_is_well(x):
    try:
        return x * x.item()
    except Exception:
        return x * 2


MIXED = {
    "sum": lambda x: x - x.sum(),
    "transposed": lambda x: x.t(),
    "reshaped": lambda x: x.reshape(()),
    "a number": lambda x: x * x.item(),
    "a condition": lambda x: x if x > 0 else -x,
    "caught": says_that_all_is_well,
    "random": lambda x: x + torch.rand_like(x),
    "random, in place": lambda x: x.clone().normal_(),
    "random, not used": lambda x: (torch.rand(()), x + 1)[1],
    "dropout": lambda x: F.dropout(x, 0.5),
    "an integer": lambda x: x.to(torch.int64) + x,
    "rounding to an integer": lambda x: x.to(torch.int64) + x,
    "a byte that may wrap around": lambda x: (1 - 2 * (x > 0).byte()) * x,
    "a negated byte": lambda x: ~(x > 0).byte() * x,
    "small integers that may wrap around": lambda x: (x > 0).to(torch.int8) * 100 * 2 * x,
    "a conversion that may wrap around": lambda x: ((x > 0) * 300).to(torch.uint8) * x,
    "several tensors in place": lambda x: torch._foreach_mul_([x.clone()], 2.0)[0],
    "bits": lambda x: x.view(torch.int64) + 1,
    "out": lambda x: torch.add(x, 1, out=torch.zeros((), dtype=torch.float64)),
    "dimensions": lambda x: x + torch.zeros(3),
    "a matrix": lambda x: x.expand(2, 2),
    "no tensor": lambda x: x.dim(),
    "of another library": lambda x: torch.ops.prims.neg(x),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_is_not_pointwise(name):
    before = torch.get_rng_state()
    with pytest.raises(NotPointwiseError):
        record(MIXED[name], {Name("z"): torch.float64})
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_of_the_function():
    """It is let out as it is: who records knows what it means."""
    with pytest.raises(IndexError):
        record(lambda x: x[0], {Name("z"): torch.float64})
    with pytest.raises(NotPointwiseError, match=r"its derivative fails: .*bitwise"):
        derivative(Program.parse("t0 = bitwise_and.Tensor(z, z); sum(t0)"), [])


@pytest.mark.parametrize("place", ["_is_pointwise", "_functional", "_constant_of"])
def test_an_error_of_the_recorder(place, monkeypatch):
    """It is no property of the function, even if the function catches it."""

    def typo(*_):
        raise RuntimeError("a typo")

    def function(x):
        try:
            return torch.ones_like(x) + x.exp()
        except RuntimeError:
            return x

    monkeypatch.setattr(tracing, place, typo)
    with pytest.raises(RuntimeError, match="a typo"):
        record(function, {Name("z"): torch.float64})


def test_detach_is_a_step_where_it_matters():
    inputs = {Name("z"): torch.float64}
    steps, _ = record(lambda x: x * x.detach(), inputs, keeps_detach=True)
    assert "; ".join(map(str, steps)) == "t0 = detach(z); t1 = mul.Tensor(z, t0)"
    steps, _ = record(lambda x: x * x.detach(), inputs)
    assert "; ".join(map(str, steps)) == "t0 = mul.Tensor(z, z)"
    for function in (lambda x: x + x.detach().mul_(2), lambda x: x.detach() + x.mul_(2)):
        with pytest.raises(NotPointwiseError, match="changes a detached tensor"):
            record(function, inputs, keeps_detach=True)
