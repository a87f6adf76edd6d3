"""`contiguous`, `clone`, `detach`, a dropout that does nothing."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, rewritten_graph
from expecttest import assert_expected_inline

from cce_inductor.options import Options
from cce_inductor.reporting import reasons
from cce_inductor.rewriting.rewrite import rewrite

torch.manual_seed(0)
INPUT = torch.randn(2, 3, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def loss_after(copy):
    """The function whose logits go through `copy`."""

    def fn(input, weight, target):
        return F.cross_entropy(copy(F.linear(input, weight)).view(-1, 50), target)

    return fn


def test_graph():
    assert_expected_inline(
        rewritten_graph(loss_after(lambda x: x.contiguous().clone()), INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


SPELLINGS = {
    "contiguous": lambda x: x.contiguous(),
    "contiguous, its format": lambda x: x.contiguous(memory_format=torch.contiguous_format),
    "clone": lambda x: x.clone(),
    "clone, its format": lambda x: x.clone(memory_format=torch.preserve_format),
    "torch.clone": lambda x: torch.clone(x),
    "torch.clone, keyword": lambda x: torch.clone(input=x),
    "cpu": lambda x: x.cpu(),
    "requires_grad_": lambda x: x.requires_grad_(),
    "positive": lambda x: +x,
    "Identity": lambda x: torch.nn.Identity()(x),
    "dropout, not training": lambda x: F.dropout(x, 0.5, training=False),
    "dropout, not training, in place": lambda x: F.dropout(x, 0.5, False, True),
    "dropout of nothing": lambda x: F.dropout(x, 0.0),
    "torch.dropout, not training": lambda x: torch.dropout(x, 0.5, False),
    "Dropout, not training": lambda x: torch.nn.Dropout(0.5).eval()(x),
    "half of it detached": lambda x: x + x.detach() / 2,
    "torch.detach of a half": lambda x: torch.detach(x) / 2 + x,
    "twice": lambda x: x.clone().contiguous().clone(),
    "copy_": lambda x: torch.zeros_like(x).copy_(x),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(spelling):
    assert_as_accurate_as_eager(loss_after(spelling), INPUT, WEIGHT, TARGET)


def test_zeroed_clone():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        other = logits.clone()
        other.zero_()
        return F.cross_entropy(logits.view(-1, 50), target) + other.sum()

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


def test_graph_of_a_detached_half():
    fn = loss_after(lambda x: x + x.detach() / 2)
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 't0 = detach(z); t1 = div.Tensor(t0, 2); t2 = add.Tensor(z, t1); logsumexp(t2); target(t2, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


@pytest.mark.parametrize("detach", [lambda x: x.detach(), torch.detach, lambda x: x.data])
@pytest.mark.parametrize("scale", [1, 2])
def test_detached_logits(detach, scale):
    def fn(input, weight, target):
        loss = F.cross_entropy((detach(F.linear(input, weight)) * scale).view(-1, 50), target)
        return loss, loss + weight.sum()

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


LEFT_ALONE = {
    "repeat": (lambda x: x.repeat(1, 1, 1), "repeat"),
    "dropout": (lambda x: F.dropout(x, 0.5), "dropout"),
    "torch.dropout": (lambda x: torch.dropout(x, 0.5, True), "dropout"),
    "Dropout": (lambda x: torch.nn.Dropout(0.5)(x), "dropout"),
}


@pytest.mark.parametrize(("copy", "name"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(copy, name):
    reason = reason_against(loss_after(copy), INPUT, WEIGHT, TARGET)
    assert reason.startswith(f"{reasons.USED_BY} {name} at ")
    assert name != "dropout" or reason.endswith(f": {reasons.RANDOM.sentence}")


def test_another_device_is_left_alone():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).cpu(), target)

    def backend(module, example_inputs):
        graphs.append(module)
        return lambda *args: (torch.zeros(()),)  # a meta tensor cannot be copied

    graphs = []
    input, weight = INPUT.detach().view(6, 8).to("meta"), WEIGHT.detach().to("meta")
    torch.compile(fn, backend=backend)(input, weight, TARGET)
    (report,) = rewrite(graphs[0], Options(min_logits_bytes=0, on_error="raise"))
    assert report.reason.endswith(f": {reasons.MOVES_TO_ANOTHER_DEVICE.sentence}")


def without_gradients(function, *args):
    with torch.no_grad():
        return function(*args)


def written(tensor, write):
    """`tensor`, after a tensor with a gradient was written into it."""
    write(tensor)
    return tensor


BEFORE_THE_WRITE = {
    "detach": lambda x, w: F.linear(x, w).detach(),
    "data": lambda x, w: F.linear(x, w).data,
    "no_grad": lambda x, w: without_gradients(F.linear, x, w),
    "a copy": lambda x, w: F.linear(x, w).detach().clone(),
    "a function": lambda x, w: F.linear(x, w).detach() * 2,
    "a function in no_grad": lambda x, w: without_gradients(torch.mul, F.linear(x, w), 2),
    "detached twice": lambda x, w: written(F.linear(x, w).detach(), lambda z: z.mul_(2)).detach(),
    "with a gradient": F.linear,
}
WRITES = {
    "mul_": lambda z, c: z.mul_(c),
    "div_ of a view": lambda z, c: z.view(-1, 50).div_(c + 1),
    "copy_": lambda z, c: z.copy_(c),
    "masked_fill_ and sub_": lambda z, c: z.masked_fill_(z > 1, -1.0).sub_(c),
}


@pytest.mark.parametrize("before", BEFORE_THE_WRITE.values(), ids=BEFORE_THE_WRITE)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_had_no_gradient_when_it_was_made(before, write):
    """Its example has one at the end of the graph, since one was written into it."""

    def fn(input, weight, factor, target):
        logits = written(before(input, weight), lambda z: write(z, factor))
        return F.cross_entropy(logits.view(-1, 50), target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, torch.rand(50, requires_grad=True), TARGET)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, w, t: F.cross_entropy(F.linear(x, w).view(-1, 50), t).detach(),
        lambda x, w, t: without_gradients(F.cross_entropy, F.linear(x, w).view(-1, 50), t),
    ],
    ids=["detach", "no_grad"],
)
def test_a_loss_had_no_gradient_when_it_was_made(loss):
    def fn(input, weight, factor, target):
        return loss(input, weight, target).mul_(factor)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, torch.tensor(2.0, requires_grad=True), TARGET)


def loss_of(logits, target):
    return F.cross_entropy(logits.view(-1, 50), target)


def detached_after_the_loss(input, weight, target):
    logits = F.linear(input, weight)
    loss = loss_of(logits, target)
    logits.detach_()
    return loss + loss_of(logits * 2, target)


def detached_before_the_loss(input, weight, target):
    logits = F.linear(input, weight) * input.sum()
    logits.detach_()
    return loss_of(logits, target) * weight.sum()


def detached_loss(input, weight, target):
    loss = loss_of(F.linear(input, weight), target)
    twice = loss * 2
    loss.detach_()
    return twice + loss


@pytest.mark.parametrize("fn", [detached_after_the_loss, detached_before_the_loss, detached_loss])
def test_detached_in_place(fn):
    """The example of what had a gradient has none at the end of the graph."""
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)
