"""Graphs in which a careless rewrite would change a number: they are left alone, or still right."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, capture, reason_against, value_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cce_inductor
from cce_inductor.options import Options
from cce_inductor.rewrite import rewrite

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
BIAS = torch.randn(50, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def compiled(fn, **compile_args):
    torch._dynamo.reset()
    cce_inductor.clear_reports()
    options = {"min_logits_bytes": 0, "on_error": "raise"}
    return torch.compile(fn, backend="cce_inductor_eager", options=options, **compile_args)


def same_as_eager(fn, *args, **compile_args):
    """The reports of the compiled `fn`, whose results and gradients must be those of eager."""
    expected = value_and_gradients(fn, *args)
    got = value_and_gradients(compiled(fn, **compile_args), *args)
    torch.testing.assert_close(got, expected, equal_nan=True)
    return cce_inductor.reports()


def reason_with_same_numbers(fn, *args):
    """Why the one loss is left alone, both in a real compilation and for `reason_against`."""
    (report,) = same_as_eager(fn, *args)
    assert report.reason == reason_against(fn, *args)
    return report.reason


def assert_rewritten_with_same_numbers(fn, *args, **compile_args):
    reports = same_as_eager(fn, *args, **compile_args)
    assert reports
    assert all(report.rewritten for report in reports), "\n".join(map(str, reports))


def set_to_minus_infinity(x):
    x[..., 40:] = -torch.inf


def add_by_statement(x):
    x += 1


def divide_by_statement(x):
    x /= 3


def zero_one_row(x):
    x[0] = 0


IN_PLACE = {
    "setitem": set_to_minus_infinity,
    "iadd": add_by_statement,
    "itruediv": divide_by_statement,
    "add_": lambda x: x.add_(torch.arange(x.shape[-1])),
    "clamp_": lambda x: x.clamp_(-0.1, 0.1),
    "copy_": lambda x: x.copy_(torch.ones(x.shape)),
    "div_": lambda x: x.div_(3),
    "masked_fill_": lambda x: x.masked_fill_(torch.arange(x.shape[-1]) % 2 == 0, -1.0),
    "mul_": lambda x: x.mul_(3),
    "relu": lambda x: F.relu(x, inplace=True),
    "relu_": lambda x: torch.relu_(x),
    "tanh_": lambda x: x.tanh_(),
    "zero_": lambda x: x.zero_(),
}
in_place = pytest.mark.parametrize(("name", "change"), IN_PLACE.items(), ids=IN_PLACE)

ALIASES = {
    "view": lambda x: x.view(-1, x.shape[-1]),
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "contiguous": lambda x: x.contiguous(),
    "getitem": lambda x: x[:],
    "unsqueeze": lambda x: x.unsqueeze(0),
    "flatten": lambda x: x.flatten(0),
    "squeeze": lambda x: x.squeeze(0),
    "transpose": lambda x: x.transpose(0, 1),
    "detach": lambda x: x.detach(),
    "narrow": lambda x: x.narrow(0, 0, 3),
    "T": lambda x: x.T,
}
aliases = pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)


@in_place
def test_logits_changed_in_place(name, change):
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        change(logits)
        return F.cross_entropy(logits, target)

    reason = reason_with_same_numbers(fn, INPUT, WEIGHT, TARGET)
    assert reason.startswith(f"the logits are used by {name} at ")


@aliases
def test_alias_of_logits_changed_in_place(alias):
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        alias(logits).mul_(3)
        return F.cross_entropy(logits, target)

    assert "the logits are used by " in reason_with_same_numbers(fn, INPUT, WEIGHT, TARGET)


@aliases
def test_logits_changed_in_place_after_their_alias_was_made(alias):
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        other = alias(logits)
        logits.mul_(3)
        return F.cross_entropy(logits, target) + other.sum()

    assert "the logits are used by " in reason_with_same_numbers(fn, INPUT, WEIGHT, TARGET)


@in_place
def test_logits_changed_in_place_between_two_losses(name, change):
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        first = F.cross_entropy(logits.float(), target)
        change(logits)
        return first, F.cross_entropy(logits.view(-1, 50), target)

    reports = same_as_eager(fn, INPUT, WEIGHT, TARGET)
    assert [report.rewritten for report in reports] == [False, False]


def test_logits_changed_in_place_after_the_loss():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        loss = F.cross_entropy(logits, target)
        logits[..., 40:] = 0
        return loss

    reason = reason_with_same_numbers(fn, INPUT, WEIGHT, TARGET)
    assert reason.startswith("the logits are used by setitem at ")


@pytest.mark.parametrize(
    "change",
    [
        lambda loss, aux: loss.__iadd__(aux),
        lambda loss, aux: loss.mul_(2).add_(aux),
        lambda loss, aux: loss.detach().zero_(),
        lambda loss, aux: loss.copy_(aux),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_changed_in_place(change, reduction):
    def fn(input, weight, target):
        loss = F.cross_entropy(F.linear(input, weight), target, reduction=reduction)
        change(loss, weight.square().mean())
        return loss

    assert_rewritten_with_same_numbers(fn, INPUT, WEIGHT, TARGET)


def test_loss_of_one_row_changed_in_place():
    def fn(input, weight, target):
        loss = F.cross_entropy(F.linear(input, weight), target, reduction="none")
        loss[1] = 0
        loss += 1
        return loss

    assert_rewritten_with_same_numbers(fn, INPUT, WEIGHT, TARGET)


CHANGES_BETWEEN = {
    "mul_": lambda x: x.mul_(2),
    "add_": lambda x: x.add_(1),
    "iadd": add_by_statement,
    "setitem": zero_one_row,
    "relu": lambda x: F.relu(x, inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1, True),
    "zero_": lambda x: x.view(-1)[:4].zero_(),
    "neg_": lambda x: torch.neg_(x.t()),
    "copy_": lambda x: x.detach().copy_(torch.ones_like(x)),
    "fill_": lambda x: x[..., 1].fill_(3),
    "index_add_": lambda x: x.index_add_(0, torch.tensor([1]), torch.ones_like(x[:1])),
    "trunc": lambda x: torch.trunc(x.detach(), out=x.detach()),
}
between = pytest.mark.parametrize(("name", "change"), CHANGES_BETWEEN.items(), ids=CHANGES_BETWEEN)


@between
def test_weight_changed_between_projection_and_loss(name, change):
    def fn(input, weight, target):
        weight = weight.clone()
        logits = F.linear(input, weight)
        change(weight)
        return F.cross_entropy(logits, target)

    reason = reason_with_same_numbers(fn, INPUT.detach(), WEIGHT, TARGET)
    assert reason.startswith(f"cross_entropy cannot be rewritten: {name} at ")
    assert reason.endswith(" may change what the projection read")


@between
def test_input_changed_between_projection_and_loss(name, change):
    def fn(input, weight, target):
        input = input.clone()
        logits = F.linear(input, weight)
        change(input)
        return F.cross_entropy(logits, target)

    reason = reason_with_same_numbers(fn, INPUT, WEIGHT.detach(), TARGET)
    assert reason.startswith(f"cross_entropy cannot be rewritten: {name} at ")
    assert reason.endswith(" may change what the projection read")


@between
def test_bias_changed_between_projection_and_loss(name, change):
    def fn(input, weight, bias, target):
        bias = bias.clone()
        logits = F.linear(input, weight, bias)
        change(bias)
        return F.cross_entropy(logits, target)

    reason = reason_with_same_numbers(fn, INPUT, WEIGHT, BIAS, TARGET)
    assert reason.startswith(f"cross_entropy cannot be rewritten: {name} at ")
    assert reason.endswith(" may change what the projection read")


def test_added_bias_changed_before_the_loss():
    def fn(input, weight, bias, target):
        bias = bias.clone()
        logits = F.linear(input, weight) + bias
        bias.mul_(2)
        return F.cross_entropy(logits, target)

    reason = reason_with_same_numbers(fn, INPUT, WEIGHT, BIAS, TARGET)
    assert reason.endswith(" may change what the projection read")


def test_transposed_weight_changed_between_projection_and_loss():
    def fn(input, weight, target):
        weight = weight.clone()
        logits = input @ weight.t()
        weight.mul_(2)
        return F.cross_entropy(logits, target)

    reason = reason_with_same_numbers(fn, INPUT.detach(), WEIGHT, TARGET)
    assert reason.endswith(" may change what the projection read")


def test_index_of_rows_changed_before_the_loss():
    def fn(input, weight, target, index):
        index = index.clone()
        logits = F.linear(input, weight)[index]
        index.add_(1)
        return F.cross_entropy(logits, target[:2])

    index = torch.tensor([1, 3])
    reason = reason_with_same_numbers(fn, INPUT.detach(), WEIGHT.detach(), TARGET, index)
    assert reason.endswith(" may change what the projection read")


def test_input_changed_through_another_argument():
    def fn(input, weight, target, alias):
        logits = F.linear(input, weight)
        alias.mul_(2)
        return F.cross_entropy(logits, target)

    def arguments():
        input = torch.arange(48.0).view(6, 8) / 48
        return input, WEIGHT.detach(), TARGET, input.view(-1)

    expected = fn(*arguments())
    assert compiled(fn)(*arguments()).item() == pytest.approx(expected.item())
    (report,) = cce_inductor.reports()
    assert report.reason.endswith(" may change what the projection read")


def test_input_changed_in_a_checkpointed_function():
    def zero(x):
        x.zero_()
        return x.sum()

    def fn(input, weight, target):
        input = input.clone()
        logits = F.linear(input, weight)
        zeros = checkpoint(zero, input, use_reentrant=False)
        return F.cross_entropy(logits, target) + zeros

    expected = value_and_gradients(fn, INPUT, WEIGHT.detach(), TARGET)
    got = value_and_gradients(compiled(fn), INPUT, WEIGHT.detach(), TARGET)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("changed", ["input", "weight", "bias"])
def test_operand_changed_after_the_loss(changed):
    def fn(input, weight, bias, target):
        operands = {"input": input, "weight": weight, "bias": bias}
        operands[changed] = operands[changed].clone()
        loss = F.cross_entropy(F.linear(**operands), target)
        operands[changed].mul_(2)
        return loss

    frozen = {"input": "weight", "weight": "input", "bias": None}[changed]
    operands = {"input": INPUT, "weight": WEIGHT, "bias": BIAS}
    if frozen is not None:  # otherwise eager needs what is changed for the gradient of the other
        operands[frozen] = operands[frozen].detach()
    same_as_eager(fn, *operands.values(), TARGET)


def test_unrelated_changes_do_not_matter():
    def fn(input, weight, bias, target):
        input = input.clone().mul_(2)
        steps, hidden = torch.zeros(()), input * 2
        logits = F.linear(input, weight, bias)
        steps += 1
        hidden.mul_(2)
        hidden[0] = 0
        F.relu(hidden, inplace=True)
        loss = F.cross_entropy(logits, target)
        steps.add_(1)
        return loss, hidden.sum(), steps

    assert_rewritten_with_same_numbers(fn, INPUT, WEIGHT, BIAS, TARGET)


def test_target_changed_between_projection_and_loss():
    def fn(input, weight, target):
        target = target.clone()
        logits = F.linear(input, weight)
        target[target == 7] = -100
        target.masked_fill_(target == 3, 4)
        return F.cross_entropy(logits, target)

    assert_rewritten_with_same_numbers(fn, INPUT, WEIGHT, TARGET)


def test_changes_without_users_survive_the_rewrite():
    def fn(input, weight, target, count):
        input = input * 1
        input[0] = 0
        loss = F.cross_entropy(F.linear(input, weight), target)
        count.add_(1)
        return loss

    count = torch.zeros(())
    assert compiled(fn)(INPUT, WEIGHT, TARGET, count).item() == pytest.approx(
        fn(INPUT, WEIGHT, TARGET, torch.zeros(())).item()
    )
    assert count == 1
    assert cce_inductor.reports()[0].rewritten


def test_detached_logits():
    def fn(input, weight, target):
        logits = F.linear(input, weight).detach()
        return F.cross_entropy(logits, target) + input.sum() + weight.sum()

    reason = reason_with_same_numbers(fn, INPUT, WEIGHT, TARGET)
    assert reason.startswith("the logits are used by detach at ")


def test_detached_input_is_a_frozen_input():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input.detach(), weight), target) + input.sum()

    assert_rewritten_with_same_numbers(fn, INPUT, WEIGHT, TARGET)


def projection_without_gradient(input, weight, bias, target):
    with torch.no_grad():
        logits = F.linear(input, weight, bias)
    return F.cross_entropy(logits * 2, target)


def scale_without_gradient(input, weight, bias, target):
    logits = F.linear(input, weight, bias)
    with torch.no_grad():
        logits = logits * 2
    return F.cross_entropy(logits, target)


def scale_without_gradient_after_another_block(input, weight, bias, target):
    with torch.no_grad():
        norm = weight.norm()
    logits = F.linear(input, weight, bias)
    with torch.no_grad():
        logits = logits * 2
    return F.cross_entropy(logits, target) / norm


def loss_without_gradient(input, weight, bias, target):
    logits = F.linear(input, weight, bias)
    with torch.no_grad():
        return F.cross_entropy(logits * 2, target)


def reenabled_gradient(input, weight, bias, target):
    with torch.no_grad():
        logits = F.linear(input, weight, bias)
        with torch.enable_grad():
            return F.cross_entropy(logits, target)


def frozen_bias_added_without_gradient(input, weight, bias, target):
    with torch.no_grad():
        norm = weight.norm()
    logits = F.linear(input.detach(), weight.detach())
    with torch.no_grad():
        logits = logits + bias
    return F.cross_entropy(logits, target) / norm


def projection_and_loss_without_gradient(input, weight, bias, target):
    with torch.no_grad():
        norm = weight.norm()
        logits = F.linear(input, weight)
        loss = F.cross_entropy(logits, target)
    return loss / norm


CUT = [
    projection_without_gradient,
    scale_without_gradient,
    scale_without_gradient_after_another_block,
    loss_without_gradient,
    reenabled_gradient,
    frozen_bias_added_without_gradient,
    projection_and_loss_without_gradient,
]


@pytest.mark.parametrize("cut", CUT)
def test_gradient_cut_by_no_grad(cut):
    def fn(input, weight, bias, target):
        return cut(input, weight, bias, target) + input.sum() + weight.sum() + bias.sum()

    same_as_eager(fn, INPUT, WEIGHT, BIAS, TARGET)


@pytest.mark.parametrize("cut", CUT[:5])
def test_gradient_cut_by_no_grad_is_left_alone(cut):
    reason = reason_against(cut, INPUT, WEIGHT, BIAS, TARGET)
    assert "gradient" in reason


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_rewritten(mode):
    def fn(input, weight, bias, target):
        return F.cross_entropy(F.linear(input, weight, bias) * 2, target)

    with mode():
        expected = fn(INPUT, WEIGHT, BIAS, TARGET)
        got = compiled(fn)(INPUT, WEIGHT, BIAS, TARGET)
    torch.testing.assert_close(got, expected)
    assert not got.requires_grad
    (report,) = cce_inductor.reports()
    assert report.rewritten


def test_no_grad_inside_the_function():
    def fn(input, weight, target):
        with torch.no_grad():
            loss = F.cross_entropy(F.linear(input, weight), target)
        return loss + input.sum() + weight.sum()

    assert_rewritten_with_same_numbers(fn, INPUT, WEIGHT, TARGET)


def test_one_function_with_and_without_gradient():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight), target)

    both = compiled(fn)
    with torch.no_grad():
        assert not both(INPUT, WEIGHT, TARGET).requires_grad
    torch.testing.assert_close(
        value_and_gradients(both, INPUT, WEIGHT, TARGET),
        value_and_gradients(fn, INPUT, WEIGHT, TARGET),
    )


def test_tied_weight():
    def fn(tokens, weight, target):
        return F.cross_entropy(F.linear(F.embedding(tokens, weight).tanh(), weight), target)

    assert_as_accurate_as_eager(fn, torch.tensor([1, 5, 3, 1, 0, 49]), WEIGHT, TARGET)


class OutputMasks(TorchDispatchMode):
    """Records which gradients `row_statistics_backward` is asked for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.cce_inductor.row_statistics_backward.default:
            self.seen.append(list(args[-1]))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "wanted",
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True)],
)
def test_only_gradients_that_are_asked_for_are_computed(wanted):
    def fn(input, weight, bias, target):
        return F.cross_entropy(F.linear(input, weight, bias), target)

    operands = [
        tensor.detach().clone().requires_grad_(needed)
        for tensor, needed in zip((INPUT, WEIGHT, BIAS), wanted, strict=True)
    ]
    loss = compiled(fn)(*operands, TARGET)
    with OutputMasks() as masks:
        loss.backward()
    assert masks.seen == [list(wanted)]
    assert [operand.grad is not None for operand in operands] == list(wanted)
    assert_rewritten_with_same_numbers(fn, *operands, TARGET)


def test_nothing_requires_a_gradient():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight), target)

    assert_rewritten_with_same_numbers(fn, INPUT.detach(), WEIGHT.detach(), TARGET)


EXACT = [t.detach().bfloat16().float().requires_grad_() for t in (INPUT, WEIGHT, BIAS)]
"""Operands that autocast does not round, so that what is left is the error of the function."""


def bfloat16_autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def head(input, weight, bias, target):
    return F.cross_entropy(F.linear(input, weight, bias), target)


def head_with_float(input, weight, bias, target):
    return F.cross_entropy(F.linear(input, weight, bias).float(), target)


def head_with_added_bias(input, weight, bias, target):
    return F.cross_entropy(F.linear(input, weight) + bias, target)


def head_with_smoothing(input, weight, bias, target):
    logits = F.linear(input, weight, bias)
    return F.cross_entropy(logits / 3, target, label_smoothing=0.1)


HEADS = [head, head_with_float, head_with_added_bias, head_with_smoothing]


@pytest.mark.parametrize("fn", HEADS)
def test_autocast_outside(fn):
    with bfloat16_autocast():
        assert_as_accurate_as_eager(fn, *EXACT, TARGET)


@pytest.mark.parametrize("loss", HEADS)
def test_autocast_inside(loss):
    def fn(input, weight, bias, target):
        with bfloat16_autocast():
            return loss(input, weight, bias, target)

    assert_as_accurate_as_eager(fn, *EXACT, TARGET)


@pytest.mark.parametrize("loss", HEADS)
def test_autocast_disabled_inside(loss):
    def fn(input, weight, bias, target):
        with bfloat16_autocast(enabled=False):
            return loss(input, weight, bias, target)

    with bfloat16_autocast():
        assert_as_accurate_as_eager(fn, *EXACT, TARGET)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_autocast_of_the_projection_alone(label_smoothing):
    def fn(input, weight, target):
        with bfloat16_autocast():
            logits = F.linear(input, weight)
        return F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)

    assert_as_accurate_as_eager(fn, *EXACT[:2], TARGET)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_autocast_of_the_loss_alone(label_smoothing):
    def fn(input, weight, target, class_weight):
        logits = F.linear(input, weight)
        with bfloat16_autocast():
            return F.cross_entropy(logits, target, class_weight, label_smoothing=label_smoothing)

    assert_as_accurate_as_eager(fn, *EXACT[:2], TARGET, torch.rand(50) + 0.5)


@pytest.mark.parametrize("fn", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_of_low_precision(fn, dtype):
    operands = [t.detach().to(dtype).requires_grad_() for t in (INPUT, WEIGHT, BIAS)]
    assert_as_accurate_as_eager(fn, *operands, TARGET)


class SoftcappedHead(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 50)
        self.scale, self.cap = 2.0, 3.0

    def forward(self, input, target):
        logits = self.linear(input) / self.scale
        logits = self.cap * torch.tanh(logits / self.cap)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.view(-1))


@pytest.mark.parametrize("dynamic", [True, None])
def test_changing_token_counts_recompile_once_at_most(dynamic):
    module = SoftcappedHead()
    fn = compiled(module, dynamic=dynamic)
    for tokens in (6, 9, 4, 17):
        input = torch.randn(2, tokens, 8, requires_grad=True)
        target = torch.randint(50, (2, tokens))
        torch.testing.assert_close(
            value_and_gradients(fn, input, target), value_and_gradients(module, input, target)
        )
    reports = cce_inductor.reports()
    assert all(report.rewritten for report in reports)
    assert len(reports) == (1 if dynamic else 2)


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_changed_constants_of_a_softcap(dynamic):
    module = SoftcappedHead()
    fn = compiled(module, dynamic=dynamic)
    for scale, cap in [(2.0, 3.0), (2.0, 5.0), (1.0, 5.0), (2.0, 3.0), (0.5, 30.0)]:
        module.scale, module.cap = scale, cap
        torch.testing.assert_close(
            value_and_gradients(fn, INPUT, TARGET), value_and_gradients(module, INPUT, TARGET)
        )
    assert all(report.rewritten for report in cce_inductor.reports())


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_softcap_as_an_argument(dynamic):
    linear = torch.nn.Linear(8, 50)

    def module(input, target, cap):
        return F.cross_entropy(torch.tanh(linear(input) / cap) * cap, target)

    fn = compiled(module, dynamic=dynamic)
    for cap in (3.0, 5, 5.0, 30):
        torch.testing.assert_close(
            value_and_gradients(fn, INPUT, TARGET, cap),
            value_and_gradients(module, INPUT, TARGET, cap),
        )
    assert all(report.rewritten for report in cce_inductor.reports())


def test_two_heads():
    def fn(input, weight, other_weight, target):
        first = F.cross_entropy(F.linear(input, weight), target)
        second = F.cross_entropy(F.linear(input, other_weight)[:-1] * 2, target[1:])
        return first + 0.3 * second

    other_weight = torch.randn(60, 8, requires_grad=True)
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, other_weight, TARGET)
    assert len(cce_inductor.reports()) == 2


def test_one_of_two_heads_is_left_alone():
    def fn(input, weight, other_weight, target):
        first = F.cross_entropy(F.linear(input, weight), target)
        second = F.cross_entropy(F.linear(input, other_weight).sigmoid(), target)
        return first, second

    other_weight = torch.randn(60, 8, requires_grad=True)
    reports = same_as_eager(fn, INPUT, WEIGHT, other_weight, TARGET)
    assert [report.rewritten for report in reports] == [True, False]


def test_two_losses_of_one_projection():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        now = F.cross_entropy(logits, target)
        next = F.cross_entropy(logits[:-1].float() / 2, target[1:], reduction="sum")
        return now, next

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)
    assert len(cce_inductor.reports()) == 2


def test_two_losses_of_one_projection_one_unsupported():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        soft = F.cross_entropy(logits, F.one_hot(target.clamp(min=0), 50).float())
        return F.cross_entropy(logits, target), soft

    reports = same_as_eager(fn, INPUT, WEIGHT, TARGET)
    reasons = {report.reason for report in reports}
    assert reasons == {"cross_entropy cannot be rewritten: its targets are class probabilities"}


def test_returned_logits():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        return F.cross_entropy(logits.float(), target), logits

    assert reason_with_same_numbers(fn, INPUT, WEIGHT, TARGET) == (
        "the logits are returned by the compiled function, so they must be stored"
    )


def test_returned_view_of_logits():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        return F.cross_entropy(logits, target), logits[:2].float()

    assert reason_with_same_numbers(fn, INPUT, WEIGHT, TARGET) == (
        "the logits are returned by the compiled function, so they must be stored"
    )


def test_accuracy_computed_beside_the_loss():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        accuracy = (logits.argmax(-1) == target).float().mean()
        return F.cross_entropy(logits, target) + 0 * accuracy

    reason = reason_with_same_numbers(fn, INPUT, WEIGHT, TARGET)
    assert reason.startswith("the logits are used by argmax at ")


def test_logits_that_change_another_tensor():
    def fn(input, weight, target, buffer):
        logits = F.linear(input, weight)
        buffer.copy_(logits.detach())
        return F.cross_entropy(logits, target)

    reason = reason_with_same_numbers(fn, INPUT, WEIGHT, TARGET, torch.zeros(6, 50))
    assert reason.startswith("the logits are used by detach at ")


def test_checkpointed_head():
    def fn(input, weight, target):
        return checkpoint(
            lambda x: F.cross_entropy(F.linear(x, weight), target), input * 2, use_reentrant=False
        )

    assert_rewritten_with_same_numbers(fn, INPUT, WEIGHT, TARGET)
    (module,) = capture(fn, INPUT, WEIGHT, TARGET)
    (report,) = rewrite(module, Options(min_logits_bytes=0, on_error="raise"))
    assert report.rewritten
    assert "linear_cross_entropy" not in module.code
    assert any(
        "linear_cross_entropy" in child.code
        for child in module.children()
        if isinstance(child, torch.fx.GraphModule)
    )


def test_checkpointed_projection_alone():
    def fn(input, weight, target):
        logits = checkpoint(F.linear, input * 2, weight, use_reentrant=False)
        return F.cross_entropy(logits, target)

    (report,) = same_as_eager(fn, INPUT, WEIGHT, TARGET)
    assert not report.rewritten


def test_head_under_a_condition():
    def fn(input, weight, target):
        def doubled(x, w, t):
            return F.cross_entropy(F.linear(x, w) * 2, t)

        def plain(x, w, t):
            return F.cross_entropy(F.linear(x, w), t)

        return torch.cond(input.sum() > 0, doubled, plain, (input, weight, target))

    for sign in (1, -1):
        input = (sign * INPUT.abs()).detach()
        with torch.no_grad():
            expected = fn(input, WEIGHT, TARGET)
            torch.testing.assert_close(compiled(fn)(input, WEIGHT, TARGET), expected)


def test_grad_transform():
    def fn(input, weight, target):
        def loss(w):
            return F.cross_entropy(F.linear(input, w), target)

        return torch.func.grad(loss)(weight)

    got = compiled(fn)(INPUT.detach(), WEIGHT.detach(), TARGET)
    torch.testing.assert_close(got, fn(INPUT.detach(), WEIGHT.detach(), TARGET))
    assert not any(report.rewritten for report in cce_inductor.reports())


def test_vmap_transform():
    def fn(input, weight, target):
        def loss(x, t):
            return F.cross_entropy(F.linear(x, weight), t)

        return torch.func.vmap(loss)(input, target)

    reports = same_as_eager(fn, INPUT, WEIGHT, TARGET.clamp(min=0))
    assert not any(report.rewritten for report in reports)


@pytest.mark.parametrize("wrong", [57, 50, -1, -101])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_target_out_of_range(wrong, reduction, label_smoothing):
    def fn(input, weight, target):
        return F.cross_entropy(
            F.linear(input, weight), target, reduction=reduction, label_smoothing=label_smoothing
        )

    target = torch.tensor([3, 0, wrong, -100, 7, 7])
    for run in (fn, compiled(fn)):
        with pytest.raises(IndexError, match=rf"^Target {wrong} is out of bounds\.$"):
            run(INPUT, WEIGHT, target)
    assert cce_inductor.reports()[0].rewritten


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_every_row_ignored(reduction, label_smoothing):
    def fn(input, weight, target):
        return F.cross_entropy(
            F.linear(input, weight), target, reduction=reduction, label_smoothing=label_smoothing
        )

    target = torch.full((6,), -100)
    assert_rewritten_with_same_numbers(fn, INPUT, WEIGHT, target)
    assert fn(INPUT, WEIGHT, target).isnan().all() == (reduction == "mean")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_rows(reduction):
    def fn(input, weight, target):
        logits = F.linear(input, weight).view(-1, 50)
        return F.cross_entropy(logits, target.view(-1), reduction=reduction)

    input, target = torch.zeros(0, 8, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    assert_rewritten_with_same_numbers(fn, input, WEIGHT, target)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("ignored", [True, False])
def test_row_that_is_not_finite(value, ignored):
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight), target, reduction="none")

    row = 3 if ignored else 2
    input = INPUT.detach().clone()
    input[row, 0] = value
    expected = fn(input, WEIGHT, TARGET)
    got = compiled(fn)(input, WEIGHT, TARGET)
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert cce_inductor.reports()[0].rewritten


def test_entries_masked_by_an_infinite_bias():
    def fn(input, weight, mask, target):
        return F.cross_entropy(F.linear(input, weight) + mask, target)

    mask = torch.zeros(50).masked_fill(torch.arange(50) % 5 == 4, -torch.inf)
    assert_rewritten_with_same_numbers(fn, INPUT, WEIGHT, mask, TARGET.where(TARGET != 49, 48))
