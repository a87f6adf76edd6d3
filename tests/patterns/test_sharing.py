"""One operator for several consumers: what is made for one must be right for the others."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reports_of

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
OTHER = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(11, 8, requires_grad=True)
BIAS = torch.randn(11, requires_grad=True)
TARGET = torch.tensor([3, 0, 10, 1, 7, 7])


def entropy_without_gradient(x, y, w, b, t):
    log_p = F.log_softmax((x @ w.T).view(-1, 11), -1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return F.nll_loss(log_p, t), entropy


def transposed(x, y, w, b, t):
    log_p = F.log_softmax((x @ w.T).T, 0)
    with torch.no_grad():
        most = log_p.amax(0)
    return F.nll_loss(log_p.T, t), most


def joined(x, y, w, b, t):
    z = torch.cat([x @ w.T, y @ w.T])
    with torch.no_grad():
        metric = F.cross_entropy(z[1:], t.repeat(2)[1:])
    return F.cross_entropy(z, t.repeat(2)), metric


def joined_with_a_scale(x, y, w, b, t):
    z = torch.cat([x @ w.T, y @ w.T])
    with torch.no_grad():
        scale = t.repeat(2) * 2.0
        metric = F.cross_entropy(z * scale[:, None], t.repeat(2))
        part = F.cross_entropy(z[1:], t.repeat(2)[1:])
    return F.cross_entropy(z[1:], t.repeat(2)[1:]), metric, part


def bias_without_gradient(x, y, w, b, t):
    z = x @ w.T
    with torch.no_grad():
        metric = F.cross_entropy(z + b * 2, t)
    return F.cross_entropy(z, t), metric


CASES = [entropy_without_gradient, transposed, joined, joined_with_a_scale, bias_without_gradient]


@pytest.mark.parametrize("fn", CASES)
@pytest.mark.parametrize("backend", ["cce_inductor_eager", "cce_inductor"])
def test_metrics_without_gradient_before_the_loss(fn, backend):
    arguments = (INPUT, OTHER, WEIGHT, BIAS, TARGET)
    assert_as_accurate_as_eager(fn, *arguments, backend=backend, slack=4)


def in_inference_mode(x, y, w, b, t):
    z = x @ w.T
    with torch.inference_mode():
        most = z.argmax(-1)
    return F.cross_entropy(z, t) + 0 * most.sum()


def added_to_a_buffer(x, y, w, b, t):
    z, total = x @ w.T, torch.zeros(6, 11)
    total.add_(z.detach())
    return F.cross_entropy(z, t) + total.abs().sum()


def masks_a_buffer(x, y, w, b, t):
    z, total = x @ w.T, torch.zeros(6, 11)
    total.masked_fill_(z > 0, 1.0)
    return F.cross_entropy(z, t) + total.sum()


def repeated_weight(x, y, w, b, t):
    many = w.T.repeat(2, 1, 1)
    with torch.no_grad():
        many[1] *= 2
    return F.cross_entropy(torch.bmm(x.view(2, 3, 8), many).view(-1, 11), t)


def stack_changed_in_place(x, y, w, b, t):
    z = torch.stack([x @ w.T, y @ w.T])
    z.mul_(2)
    return F.cross_entropy(z[0], t) + F.cross_entropy(z[1], t)


ALONE = [
    in_inference_mode,
    added_to_a_buffer,
    masks_a_buffer,
    repeated_weight,
    stack_changed_in_place,
]


@pytest.mark.parametrize("fn", ALONE)
def test_left_alone_with_the_same_numbers(fn):
    arguments = (INPUT, OTHER, WEIGHT, BIAS, TARGET)
    found = reports_of(fn, *arguments)
    assert found
    assert not any(report.rewritten for report in found), "\n".join(map(str, found))
    compiled = torch.compile(fn, backend="cce_inductor_eager", options={"min_logits_bytes": 0})
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(*arguments), fn(*arguments))


@pytest.mark.parametrize("sign", [0.0, -0.0])
def test_equal_constants_are_not_the_same(sign):
    def fn(x, y, w, b, t):
        return F.cross_entropy(torch.copysign(x @ w.T, sign), t)

    assert_as_accurate_as_eager(fn, INPUT, OTHER, WEIGHT, BIAS, TARGET)


@pytest.mark.parametrize("one", [1, True])
def test_a_truth_value_is_not_a_number(one):
    def fn(x, y, w, b, t):
        z = x @ w.T
        return F.cross_entropy(z * ((z > 0) + one), t)

    assert_as_accurate_as_eager(fn, INPUT, OTHER, WEIGHT, BIAS, TARGET)
