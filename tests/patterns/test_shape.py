"""Views, flattenings, transpositions: other shapes of the same rows."""

import re

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, reports_of, rewritten_graph
from expecttest import assert_expected_inline

from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(2, 3, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([[3, 0, 49], [-100, 7, 7]])


def loss_after(change):
    """The function whose logits, [2, 3, 50], go through `change`."""

    def fn(input, weight, target):
        logits = change(F.linear(input, weight))
        return F.cross_entropy(logits, target.view(-1), reduction="none")

    return fn


def loss_of_classes_in_dimension_1_after(change):
    """The function whose logits, [2, 3, 50], go through `change` and become [2, 50, 3]."""

    def fn(input, weight, target):
        return F.cross_entropy(change(F.linear(input, weight)), target, reduction="none")

    return fn


def test_graph_of_view():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), target.view(-1))

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
view_1 = l_target_.view(-1)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [view_1], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, view_1, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_transpose():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).transpose(1, 2), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
permute = torch.permute(l_input_, (0, 2, 1))
movedim = torch.movedim(permute, 1, -1)
reduce = torch.ops.cce_inductor.reduce.default(movedim, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


SPELLINGS = {
    "view": lambda x: x.view(-1, 50),
    "view, -1 for the vocabulary": lambda x: x.view(6, -1),
    "view, a tuple": lambda x: x.view((6, 50)),
    "view, a size": lambda x: x.view(torch.Size((6, 50))),
    "view, computed": lambda x: x.view(x.shape[0] * x.shape[1], x.shape[-1]),
    "reshape": lambda x: x.reshape(-1, 50),
    "reshape, a list": lambda x: x.reshape([-1, 50]),
    "torch.reshape": lambda x: torch.reshape(x, (-1, 50)),
    "two views": lambda x: x.view(3, 2, 50).view(6, 50),
    "flatten": lambda x: x.flatten(0, 1),
    "flatten, from the end": lambda x: x.flatten(0, -2),
    "flatten, keywords": lambda x: x.flatten(end_dim=1),
    "torch.flatten": lambda x: torch.flatten(x, 0, 1),
    "flatten of one dimension": lambda x: x.flatten(2, 2).flatten(-3, -2),
    "unsqueeze, flatten": lambda x: x.unsqueeze(0).flatten(0, 2),
    "unsqueeze, squeeze": lambda x: x.view(6, 50).unsqueeze(1).squeeze(1),
    "unsqueeze at the end": lambda x: x.view(6, 50).unsqueeze(-1).squeeze(-1),
    "squeeze of nothing": lambda x: x.squeeze(0).view(6, 50),
    "torch.squeeze": lambda x: torch.squeeze(torch.unsqueeze(x.view(6, 50), dim=0), dim=0),
    "there and back": lambda x: x.transpose(1, 2).transpose(2, 1).reshape(6, 50),
    "contiguous": lambda x: x.transpose(0, 0).contiguous().view(6, 50),
    "view_as": lambda x: x.view_as(torch.empty(6, 50)),
    "reshape_as": lambda x: x.reshape_as(torch.empty(6, 50)),
    "unflatten": lambda x: x.unflatten(0, (1, 2)).flatten(0, 2),
    "torch.unflatten": lambda x: torch.unflatten(x.view(6, 50), 0, (2, 3)).view(6, 50),
    "squeeze of all": lambda x: x.view(1, 6, 1, 50).squeeze(),
    "squeeze of two": lambda x: x.view(1, 6, 1, 50).squeeze((0, 2)),
    "squeeze of the vocabulary's dimension": lambda x: x.squeeze(-1).view(6, 50),
    "t": lambda x: x.view(6, 50).t().t(),
    "torch.t": lambda x: torch.t(x.view(6, 50)).t(),
    "T": lambda x: x.view(6, 50).T.T,
    "mT": lambda x: x.mT.mT.view(6, 50),
    "adjoint": lambda x: x.adjoint().mT.view(6, 50),
    "torch.adjoint": lambda x: torch.adjoint(x).mT.view(6, 50),
    "expand": lambda x: x.view(6, 1, 50).expand(6, 4, 50)[:, 3],
    "expand, -1": lambda x: x.view(6, 1, 50).expand(-1, 4, -1)[:, 1],
    "torch.broadcast_to": lambda x: torch.broadcast_to(x, (2, 2, 3, 50))[1].flatten(0, 1),
    "broadcast_to": lambda x: x.broadcast_to(2, 2, 3, 50)[0].flatten(0, 1),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(spelling):
    assert_as_accurate_as_eager(loss_after(spelling), INPUT, WEIGHT, TARGET)


CLASS_DIMENSION_1 = {
    "transpose": lambda x: x.transpose(1, 2),
    "transpose, from the end": lambda x: x.transpose(-1, -2),
    "transpose, keywords": lambda x: x.transpose(dim1=1, dim0=2),
    "torch.transpose": lambda x: torch.transpose(x, 1, 2),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "torch.swapaxes": lambda x: torch.swapaxes(x, 1, 2),
    "swapdims": lambda x: x.swapdims(1, 2),
    "torch.swapdims": lambda x: torch.swapdims(x, 1, 2),
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim(2, 1),
    "torch.movedim": lambda x: torch.movedim(x, -1, 1),
    "moveaxis": lambda x: x.moveaxis(1, 2),
    "torch.moveaxis": lambda x: torch.moveaxis(x, 1, -1),
    "permute": lambda x: x.permute(0, 2, 1),
    "permute, a tuple": lambda x: x.permute((0, -1, 1)),
    "torch.permute": lambda x: torch.permute(x, (0, 2, 1)),
    "permute twice": lambda x: x.permute(2, 0, 1).permute(1, 0, 2),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "scaled": lambda x: (x / 2).transpose(1, 2) * 3,
    "unsqueezed": lambda x: x.transpose(1, 2).unsqueeze(1).squeeze(1),
    "flattened rows": lambda x: x.transpose(1, 2).unsqueeze(2).flatten(2, 3),
}


@pytest.mark.parametrize("spelling", CLASS_DIMENSION_1.values(), ids=CLASS_DIMENSION_1)
def test_numbers_with_class_dimension_1(spelling):
    fn = loss_of_classes_in_dimension_1_after(spelling)
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


def test_rows_in_another_order():
    def fn(input, weight, target):
        logits = F.linear(input, weight).transpose(0, 1).reshape(-1, 50)
        return F.cross_entropy(logits, target.T.reshape(-1), reduction="none")

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


def test_rows_of_a_transposed_weight():
    def fn(input, weight, target):
        return F.cross_entropy((input @ weight).view(-1, 50), target.view(-1))

    assert_as_accurate_as_eager(fn, INPUT, torch.randn(8, 50, requires_grad=True), TARGET)


def test_one_row_unsqueezed():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).unsqueeze(0), target)

    input = torch.randn(8, requires_grad=True)
    assert_as_accurate_as_eager(fn, input, WEIGHT, torch.tensor([3]))


def test_one_row_squeezed():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).squeeze(0), target)

    input = torch.randn(1, 8, requires_grad=True)
    assert_as_accurate_as_eager(fn, input, WEIGHT, torch.tensor(3))


@pytest.mark.parametrize(
    "less",
    [
        lambda z: z - z.amax(1, keepdim=True),
        lambda z: z - z.logsumexp(1)[:, None],
        lambda z: z - z.diagonal()[:, None],
        lambda z: z * z.detach().amax(1, keepdim=True),
    ],
)
@pytest.mark.parametrize("change", [lambda z: z.squeeze(0), lambda z: z.view(-1)])
def test_one_row_squeezed_after_a_number_of_the_row(change, less):
    def fn(input, weight):
        logits = change(less(F.linear(input, weight)))
        return logits.logsumexp(-1) - logits.topk(2)[0].sum(-1) + F.log_softmax(logits, -1).mean()

    assert_as_accurate_as_eager(fn, torch.randn(1, 8, requires_grad=True), WEIGHT)


def test_as_many_tokens_as_vocabulary_entries():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).view(50, 50).flatten(0, 0), target)

    input = torch.randn(50, 8, requires_grad=True)
    assert_as_accurate_as_eager(fn, input, WEIGHT, torch.randint(50, (50,)))


@pytest.mark.parametrize("spelling", ["view", "view, computed", "reshape", "flatten", "two views"])
def test_dynamic_sizes(spelling):
    head = torch.nn.Linear(8, 50)

    def fn(input, target):
        return F.cross_entropy(SPELLINGS[spelling](head(input)), target.view(-1))

    (report,) = reports_of(fn, INPUT, TARGET, dynamic=True)
    assert report.rewritten


LEFT_ALONE = {
    "vocabulary folded": (
        lambda x: x.view(-1, 25),
        "view",
        reasons.VOCABULARY_NOT_KEPT_LAST.sentence,
    ),
    "everything in one dimension": (
        lambda x: x.reshape(-1).view(6, 50),
        "reshape",
        reasons.VOCABULARY_NOT_KEPT_LAST.sentence,
    ),
    "vocabulary split": (
        lambda x: x.view(2, 3, 5, 10).view(6, 50),
        "view",
        reasons.VOCABULARY_NOT_KEPT_LAST.sentence,
    ),
    "bits": (
        lambda x: x.view(torch.int32).view(torch.float32).view(6, 50),
        "view",
        reasons.REINTERPRETS_BITS.sentence,
    ),
    "view of transposed logits": (
        lambda x: x.transpose(1, 2).reshape(6, 50),
        "reshape",
        reasons.RESHAPES_VOCABULARY_NOT_LAST.sentence,
    ),
    "vocabulary flattened": (
        lambda x: x.flatten().view(6, 50),
        "flatten",
        reasons.FLATTENS_VOCABULARY.sentence,
    ),
    "vocabulary flattened with a row": (
        lambda x: x.flatten(1).view(6, 50),
        "flatten",
        reasons.FLATTENS_VOCABULARY.sentence,
    ),
    "a new dimension flattened into it": (
        lambda x: x.unsqueeze(-1).flatten(2, 3).view(6, 50),
        "flatten",
        reasons.FLATTENS_VOCABULARY.sentence,
    ),
    "vocabulary split by unflatten": (
        lambda x: x.unflatten(2, (5, 10)).view(6, 50),
        "unflatten",
        reasons.SPLITS_VOCABULARY.sentence,
    ),
    "several dimensions moved": (
        lambda x: x.movedim((0, 1), (1, 0)).reshape(6, 50),
        "movedim",
        reasons.MOVES_SEVERAL_DIMENSIONS.sentence,
    ),
    "repeat": (lambda x: x.repeat(1, 1, 1).view(6, 50), "repeat", None),
    "flip": (lambda x: x.flip(-1).view(6, 50), "flip", None),
    "roll": (lambda x: x.roll(1, 0).view(6, 50), "roll", None),
    "roll over the vocabulary": (lambda x: x.roll(1, -1).view(6, 50), "roll", None),
    "sort": (lambda x: x.sort(-1).values.view(6, 50), "sort", None),
}


@pytest.mark.parametrize(("change", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(change, name, why):
    def fn(input, weight):
        logits = change(F.linear(input, weight))
        return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.int64))

    reason = reason_against(fn, INPUT, WEIGHT)
    assert reason.startswith(f"{reasons.USED_BY} {name} at ")
    assert reason.endswith(f": {why}") if why else f": {reasons.not_pointwise('')}" in reason


def test_another_attribute_is_left_alone():
    def fn(input, weight):
        logits = F.linear(input, weight).view(6, 50).H.H
        return F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))

    # From 2.15 the graph has a method, `matrix_H`.
    why = f"{reasons.reads_attribute('H')}|{reasons.MOVES_ELEMENTS.sentence}"
    reason = rf"used by (H|matrix_H) at .*: ({why})$"
    assert re.search(reason, reason_against(fn, INPUT, WEIGHT))


def test_vocabulary_of_one_entry_squeezed():
    def fn(input, weight):
        return F.cross_entropy(F.linear(input, weight).squeeze(-1), torch.zeros(2).long())

    reason = reason_against(fn, INPUT, WEIGHT[:1])
    assert reason.endswith(f": {reasons.SQUEEZES_VOCABULARY.sentence}")


def test_tokens_as_classes_are_left_alone():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight), target)

    assert reason_against(fn, INPUT, WEIGHT, torch.randint(3, (2, 50))) == (
        f"cross_entropy cannot be rewritten: {reasons.CLASS_DIMENSION_NOT_VOCABULARY.sentence}"
    )
