"""Casts of the logits."""

import pytest
import torch
import torch.nn.functional as F
from checks import (
    assert_as_accurate_as_eager,
    assert_used_by,
    capture,
    reason_against,
    rewritten_graph,
)
from expecttest import assert_expected_inline

from cce_inductor.options import Options
from cce_inductor.reporting import reasons
from cce_inductor.rewriting.rewrite import rewrite

torch.manual_seed(0)
INPUT = torch.randn(6, 8).bfloat16().requires_grad_()
WEIGHT = torch.randn(50, 8).bfloat16().requires_grad_()
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def loss_after(cast):
    """The function whose logits go through `cast`, unless they are float64 as in a reference."""

    def fn(input, weight, target):
        logits = F.linear(input, weight)
        if logits.dtype != torch.float64:
            logits = cast(logits)
        return F.cross_entropy(logits, target)

    return fn


def test_graph():
    assert_expected_inline(
        rewritten_graph(loss_after(lambda x: x.float()), INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_a_cast_that_does_nothing():
    input, weight = (t.detach().float().requires_grad_() for t in (INPUT, WEIGHT))
    assert_expected_inline(
        rewritten_graph(loss_after(lambda x: x.float()), input, weight, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_float64():
    assert_expected_inline(
        rewritten_graph(loss_after(lambda x: x.double()), INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True, compute_dtype = torch.float64)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float64)
return (cross_entropy_1,)
""",
    )


SPELLINGS = {
    "nothing": lambda x: x,
    "float": lambda x: x.float(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
    "to": lambda x: x.to(torch.float32),
    "to, keyword": lambda x: x.to(dtype=torch.float32),
    "to, all arguments": lambda x: x.to("cpu", torch.float32, non_blocking=False, copy=True),
    "to a device": lambda x: x.to("cpu"),
    "to another tensor's": lambda x: x.to(torch.zeros(())),
    "type": lambda x: x.type(torch.float32),
    "type by name": lambda x: x.type("torch.FloatTensor"),
    "type_as": lambda x: x.type_as(torch.zeros(())),
    "there and back": lambda x: x.float().bfloat16(),
    "then scaled": lambda x: x.float() / 3,
    "scaled, then cast": lambda x: (x / 3).float(),
    "between scales": lambda x: 3 * torch.tanh((x / 3).float()),
    "of a view": lambda x: x.view(2, 3, 50).float().view(6, 50),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(spelling):
    assert_as_accurate_as_eager(loss_after(spelling), INPUT, WEIGHT, TARGET)


@pytest.mark.parametrize("spelling", ["half", "bfloat16", "double", "there and back"])
def test_numbers_of_float32_logits(spelling):
    input, weight = (t.detach().float().requires_grad_() for t in (INPUT, WEIGHT))
    assert_as_accurate_as_eager(loss_after(SPELLINGS[spelling]), input, weight, TARGET)


def test_cast_of_the_operands():
    def fn(input, weight, target):
        dtype = torch.promote_types(input.dtype, torch.float32)
        return F.cross_entropy(F.linear(input.to(dtype), weight.to(dtype)), target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


TRUTH = {
    "bool": lambda x: x * (x > 0.5).bool(),
    "bool, then float": lambda x: x * (x > 0.5).float(),
    "bool, then bfloat16": lambda x: x * (x > 0.5).bfloat16(),
    "bool, then to": lambda x: x * (x > 0.5).to(x.dtype),
    "bool of numbers": lambda x: x * (x * (x > 0.5)).bool(),
    "bool, then int": lambda x: x * (x > 0.5).int(),
    "bool, then long": lambda x: x * (x > 0.5).long(),
    "round": lambda x: x.round() + x,
}


@pytest.mark.parametrize("cast", TRUTH.values(), ids=TRUTH)
def test_numbers_of_comparisons(cast):
    input, weight = (t.detach().float().requires_grad_() for t in (INPUT, WEIGHT))
    assert_as_accurate_as_eager(loss_after(cast), input, weight, TARGET)


def test_graph_of_a_comparison():
    input, weight = (t.detach().float().requires_grad_() for t in (INPUT, WEIGHT))
    fn = loss_after(lambda x: x * (x > 0.5).float())
    assert_expected_inline(
        rewritten_graph(fn, input, weight, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 't0 = gt.Scalar(z, 0.5); t1 = detach(t0); t2 = where.Scalar(t1, 1.0, 0.0); t3 = mul.Tensor(z, t2); logsumexp(t3); target(t3, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


@pytest.mark.parametrize("cast", [lambda x: x.bool().float(), lambda x: x.bool().int().float()])
def test_truth_values_alone_have_no_gradient(cast):
    def fn(input, weight, target):
        return F.cross_entropy(cast(F.linear(input, weight)), target)

    (module,) = capture(fn, INPUT, WEIGHT, TARGET)
    (report,) = rewrite(module, Options(min_logits_bytes=0, on_error="raise"))
    assert report.rewritten
    (loss,) = module(*(INPUT, WEIGHT, TARGET))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, fn(INPUT, WEIGHT, TARGET))


LEFT_ALONE = {
    "to integers": (
        lambda x: x.to(torch.int64).float(),
        "to",
        str(reasons.casts_to(torch.int64)),
    ),
    "type of integers": (
        lambda x: x.type(torch.int32).float(),
        "type",
        str(reasons.casts_to(torch.int32)),
    ),
    "to eight bits": (
        lambda x: x.to(torch.float8_e4m3fn).float(),
        "to",
        str(reasons.casts_to(torch.float8_e4m3fn)),
    ),
    "to complex": (
        lambda x: x.to(torch.complex64).real,
        "to",
        str(reasons.casts_to(torch.complex64)),
    ),
    "long": (lambda x: x.long().float(), "long", str(reasons.casts_to(torch.int64))),
    "int": (lambda x: x.int().float(), "int", str(reasons.casts_to(torch.int32))),
    "bits": (
        lambda x: x.view(torch.int16).float(),
        "view",
        reasons.REINTERPRETS_BITS.sentence,
    ),
}


@pytest.mark.parametrize(("cast", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(cast, name, why):
    assert_used_by(reason_against(loss_after(cast), INPUT, WEIGHT, TARGET), name, why)


def test_dtype_of_the_logits_given_to_another_tensor():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        return F.cross_entropy(logits, target) + target.sum().type_as(logits)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


def test_another_device_is_left_alone():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).to("meta"), target.to("meta"))

    assert reason_against(fn, INPUT, WEIGHT, TARGET).endswith(
        ": it moves the logits from cpu to meta"
    )
