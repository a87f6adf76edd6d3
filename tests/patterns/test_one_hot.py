"""``one_hot(target, vocabulary)`` beside logits, and pointwise functions of it."""

import pytest
import torch
import torch.nn.functional as F
from checks import MAY_CHANGE, assert_as_accurate_as_eager, reason_against, rewritten_graph
from expecttest import assert_expected_inline

from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, 11, 7, 7])
MARGIN = torch.rand(6, requires_grad=True)


def loss_with(change):
    def fn(input, weight, target, margin):
        return F.cross_entropy(change(F.linear(input, weight), target, margin), target)

    return fn


def test_graph():
    fn = loss_with(lambda x, t, m: x - F.one_hot(t, 50).float() * m[:, None])
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET, MARGIN),
        """\
one_hot = torch._C._nn.one_hot(l_target_, 50)
getitem = l_margin_[(slice(None, None, None), None)]
unsqueeze = torch.unsqueeze(l_target_, 1)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [unsqueeze, getitem, l_target_], 't0 = eq.Tensor(j, r0); t1 = where.Scalar(t0, 1.0, 0.0); t2 = mul.Tensor(t1, r1); t3 = sub.Tensor(z, t2); logsumexp(t3); target(t3, r2, -100)', skip_ignored = True)
getitem_1 = reduce[0]
getitem_2 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_1, getitem_2, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def with_a_function(x, t, m):
    """MagFace: the target's angle grows by a margin that is learned."""
    one_hot = F.one_hot(t, x.shape[1])
    target = x.gather(1, t[:, None])
    return one_hot * (target - m[:, None].cos()) + (1 - one_hot) * x


def in_many_steps(x, t, m):
    one_hot = F.one_hot(t, 50)
    for _ in range(40):
        one_hot = one_hot * one_hot + one_hot * 0
    return x + one_hot * m[:, None]


SPELLINGS = {
    "a number": lambda x, t, m: x - 0.35 * F.one_hot(t, 50),
    "one a row": lambda x, t, m: x + F.one_hot(t, 50) * m[:, None],
    "a cast": lambda x, t, m: x - F.one_hot(t, x.shape[-1]).to(x.dtype) * m.unsqueeze(1),
    "integers": lambda x, t, m: x - (F.one_hot(t, 50) * 3 - 1) * m[:, None],
    "a mask": lambda x, t, m: torch.where(F.one_hot(t, 50).bool(), x - m[:, None], x),
    "a mask of the others": lambda x, t, m: torch.where(~F.one_hot(t, 50).bool(), x, x * m.mean()),
    "a comparison": lambda x, t, m: torch.where(F.one_hot(t, 50) == 1, m[:, None], x),
    "in place": lambda x, t, m: x.sub_(F.one_hot(t, 50) * m[:, None]),
    "without gradient": lambda x, t, m: x + (F.one_hot(t, 50) * m[:, None]).detach() - m[:, None],
    "by a learned value for each class": lambda x, t, m: x + F.one_hot(t, 50) * WEIGHT.mean(1),
    "a function": with_a_function,
    "many steps": in_many_steps,
    "an outer product": lambda x, t, m: x + m[:, None] * WEIGHT.mean(1)[None],
    "a comparison of columns": lambda x, t, m: (
        x + torch.where(torch.arange(50) > t[:, None], m[:, None], 0.0)
    ),
}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(change):
    assert_as_accurate_as_eager(loss_with(change), INPUT, WEIGHT, TARGET, MARGIN, slack=2)


@pytest.mark.parametrize("rows", [(2, 3), (6,), (1, 6)])
def test_rows_of_any_shape(rows):
    def fn(input, weight, target, margin):
        logits = F.linear(input, weight) - F.one_hot(target, 50) * margin[..., None]
        return F.cross_entropy(logits.view(-1, 50), target.view(-1))

    arguments = INPUT.detach().view(*rows, 8), TARGET.view(rows), MARGIN.detach().view(rows)
    input, target, margin = arguments
    assert_as_accurate_as_eager(
        fn, input.requires_grad_(), WEIGHT, target, margin.requires_grad_(), slack=2
    )


@pytest.mark.parametrize("wrong", [50, -1])
def test_class_out_of_bounds(wrong):
    def fn(input, weight, classes):
        return F.cross_entropy(F.linear(input, weight) - F.one_hot(classes, 50), TARGET)

    classes = TARGET.clone()
    classes[2] = wrong
    with pytest.raises(RuntimeError) as eager:
        fn(INPUT, WEIGHT, classes)
    assert rewritten_graph(fn, INPUT, WEIGHT, TARGET)
    options = {"min_logits_bytes": 0}
    with pytest.raises(RuntimeError) as ours:
        torch.compile(fn, backend="cce_inductor_eager", options=options)(INPUT, WEIGHT, classes)
    assert str(ours.value) == str(eager.value)


def changed(x, t, m):
    margins = F.one_hot(t, 50) * m[:, None]
    margins.mul_(2)
    return x + margins


def changed_before(x, t, m):
    one_hot = F.one_hot(t, 50).float()
    one_hot[:, 3] = 1
    return x + one_hot * m[:, None]


LARGE = reasons.OPERAND_LARGE_WITH_GRADIENT.sentence
LEFT_ALONE = {
    "changed in place": (changed, LARGE),
    "made of something that was changed": (changed_before, LARGE),
    "in another order": (lambda x, t, m: x + (F.one_hot(t, 50) * m[:, None]).flip(0), LARGE),
    "rolled": (lambda x, t, m: x + (F.one_hot(t, 50) * m[:, None]).roll(1), LARGE),
    "random": (lambda x, t, m: x + F.dropout(F.one_hot(t, 50) * m[:, None], 0.5), LARGE),
    "of other rows": (lambda x, t, m: x + F.one_hot(t, 50).flip(0) * m[:, None], LARGE),
    "as large itself": (lambda x, t, m: x + torch.ones(6, 50) * m[:, None], LARGE),
}


@pytest.mark.parametrize(("change", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(change, why):
    reason = reason_against(loss_with(change), INPUT, WEIGHT, TARGET, MARGIN)
    assert reason.endswith(f": {why}")


def test_transposed_is_not_the_same():
    def fn(input, other, margin):
        return F.cross_entropy(input @ other.T + (F.one_hot(INDEX, 6) * margin[:, None]).T, INDEX)

    reason = reason_against(fn, INPUT, torch.randn(6, 8), MARGIN)
    assert reason.endswith(f": {LARGE}")


INDEX = torch.tensor([3, 0, 5, 1, 1, 2])


@pytest.mark.parametrize("what", ["target", "margin"])
def test_changed_after_it_was_read(what):
    def fn(input, weight, target, margin):
        target, margin = target.clone(), margin.clone()
        margins = F.one_hot(target, 50) * margin[:, None]
        target.sub_(1).clamp_(0) if what == "target" else margin.mul_(3)
        return F.cross_entropy(F.linear(input, weight) + margins, target) + margin.sum()

    reason = reason_against(fn, INPUT, WEIGHT, TARGET, MARGIN)
    assert MAY_CHANGE in reason
