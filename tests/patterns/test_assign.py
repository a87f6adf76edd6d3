"""``logits[..., n:] = -inf``: entries of the vocabulary that get another value, in place."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, loss_after, reason_against, rewritten_graph
from expecttest import assert_expected_inline

torch.manual_seed(0)
INPUT = torch.randn(2, 3, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def assigned(index, value):
    """What assigns a value to an index, and returns the changed logits."""

    def change(logits):
        logits[index] = value
        return logits

    return change


def test_graph():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        logits[..., 40:] = -torch.inf
        return F.cross_entropy(logits.view(-1, 50), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET % 40),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 't0 = ge.Scalar(j, 40); t1 = where.ScalarSelf(t0, -inf, z); logsumexp(t1); target(t1, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_entries_by_a_tensor():
    def fn(input, weight, target, entries):
        logits = F.linear(input, weight)
        logits[..., entries] = -5.0
        return F.cross_entropy(logits.view(-1, 50), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET, torch.tensor([1, -4])),
        """\
arange = torch.arange(50, device = device(type='cpu'))
remainder = torch.remainder(l_entries_, 50)
isin = torch.isin(arange, remainder)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [isin, l_target_], 't0 = ne.Scalar(c0, 0); t1 = where.ScalarSelf(t0, -5.0, z); logsumexp(t1); target(t1, r1, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def through_a_view(logits):
    logits.view(-1, 50)[:, 40:] = -1
    return logits


def then_a_view(logits):
    view = logits.view(-1, 50)
    logits[..., 40:] = -1
    return view * 2


def of_a_copy(logits):
    changed = logits.clone()
    changed[..., 3] = 1.5
    return changed + logits


def of_transposed_logits(logits):
    logits = logits.mT
    logits[:, 40:] = -3.0
    return logits.mT


def by_a_mask(logits):
    logits[..., torch.arange(50) % 3 == 1] = -4.0
    return logits


def by_a_comparison(logits):
    logits[logits > 1] = 0.25
    return logits


SPELLINGS = {
    "the last": assigned((..., slice(40, None)), -5.0),
    "the first": assigned((slice(None), slice(None), slice(None, 3)), -5.0),
    "a range, an integer": assigned((..., slice(40, -5)), -7),
    "one": assigned((..., 11), -1e9),
    "one from the end": assigned((..., -2), 2.0),
    "a list": assigned((..., [1, 2, -3]), 0.5),
    "an empty list": assigned((..., []), 0.5),
    "an empty range": assigned((..., slice(60, None)), 0.5),
    "a number in a tensor": assigned((..., slice(40, None)), torch.tensor(2.0)),
    "entries by a tensor": assigned((..., torch.tensor([1, -4])), 2.0),
    "twice": lambda x: assigned((..., 3), 1.0)(assigned((..., slice(2, 5)), -1.0)(x)),
    "then scaled": lambda x: assigned((..., slice(40, None)), -5.0)(x / 2) * 3,
    "through a view": through_a_view,
    "read as a view made before": then_a_view,
    "of a copy": of_a_copy,
    "of transposed logits": of_transposed_logits,
    "by a mask": by_a_mask,
    "by a comparison": by_a_comparison,
}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(change):
    assert_as_accurate_as_eager(loss_after(change), INPUT, WEIGHT, TARGET)


def test_one_value_of_everything_has_no_gradient():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        logits[:] = 0.5
        return F.cross_entropy(logits.view(-1, 50), target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


ROWS = "it assigns to some of the rows"
LEFT_ALONE = {
    "every other entry": (
        assigned((..., slice(None, None, 2)), 0.0),
        "setitem",
        "it assigns to every other entry",
    ),
    "a row": (assigned((0,), 0.0), "setitem", ROWS),
    "the last rows": (assigned((slice(None), -1), 0.0), "setitem", ROWS),
    "an entry of a row": (
        assigned((0, slice(None), 3), 0.0),
        "setitem",
        "it assigns to entries that rows and vocabulary are indexed for together",
    ),
    "rows by a mask": (
        assigned(torch.ones(2, 3, dtype=torch.bool), 0.0),
        "setitem",
        ROWS,
    ),
    "a new dimension": (
        assigned((None, ..., slice(40, None)), 0.0),
        "setitem",
        "it assigns by an index that is not known",
    ),
    "several values": (
        assigned((..., slice(40, None)), torch.ones(10)),
        "setitem",
        "it assigns a tensor",
    ),
    "a row by another operation": (
        lambda x: (x[0].mul_(2), x)[1],
        "mul_",
        "it changes a part of the logits in place",
    ),
}


@pytest.mark.parametrize(("change", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(change, name, why):
    reason = reason_against(loss_after(change), INPUT, WEIGHT, TARGET)
    assert reason.startswith(f"the logits are used by {name} at ")
    assert reason.endswith(f": {why}")
