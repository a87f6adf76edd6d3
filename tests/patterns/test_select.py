"""Indexing that selects rows."""

import pytest
import torch
import torch.nn.functional as F
from checks import (
    assert_as_accurate_as_eager,
    assert_used_by,
    capture,
    reason_against,
    reports_of,
    rewritten_graph,
)
from expecttest import assert_expected_inline

from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(3, 4, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([[3, 0, 49, 1], [-100, 7, 7, 2], [5, -100, 4, 6]])
INDEX = torch.tensor([2, 0, -1])


def loss_after(select):
    """The function whose logits and targets go through `select`, which leaves the last dimension."""

    def fn(input, weight, target, index):
        logits = select(F.linear(input, weight), index)
        rows = select(target[..., None].expand(*target.shape, 50), index)[..., 0]
        return F.cross_entropy(logits.reshape(-1, 50), rows.reshape(-1), reduction="none")

    return fn


def test_graph_of_shifted_logits():
    def fn(input, weight, target):
        logits = F.linear(input, weight)[..., :-1, :].contiguous()
        return F.cross_entropy(logits.view(-1, 50), target[..., 1:].reshape(-1))

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
getitem_1 = l_target_[(Ellipsis, slice(1, None, None))]
reshape = getitem_1.reshape(-1)
getitem_2 = l_input_[(slice(None, None, None), slice(None, -1, None), slice(None, None, None))]
reduce = torch.ops.cce_inductor.reduce.default(getitem_2, l_weight_, None, [reshape], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem_3 = reduce[0]
getitem_4 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_3, getitem_4, None, reshape, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_gathered_rows():
    def fn(input, weight, target, index):
        return F.cross_entropy(F.linear(input, weight)[:, index].transpose(1, 2), target[:, index])

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET, INDEX),
        """\
getitem_1 = l_target_[(slice(None, None, None), l_index_)]
getitem_2 = l_input_[(slice(None, None, None), l_index_)]
permute = torch.permute(getitem_2, (0, 2, 1))
movedim = torch.movedim(permute, 1, -1)
reduce = torch.ops.cce_inductor.reduce.default(movedim, l_weight_, None, [getitem_1], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem_3 = reduce[0]
getitem_4 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_3, getitem_4, None, getitem_1, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


SPELLINGS = {
    "all but the last": lambda x, i: x[:, :-1],
    "all but the last, all dimensions": lambda x, i: x[:, :-1, :],
    "all but the last, an ellipsis": lambda x, i: x[..., :-1, :],
    "the last": lambda x, i: x[:, -1],
    "the last, all dimensions": lambda x, i: x[:, -1, :],
    "the last, kept": lambda x, i: x[:, -1:, :],
    "every other": lambda x, i: x[:, ::2],
    "one sequence": lambda x, i: x[1],
    "some sequences": lambda x, i: x[1:],
    "both": lambda x, i: x[1:, 1:3],
    "one row": lambda x, i: x[1, 2],
    "everything": lambda x, i: x[:],
    "an ellipsis": lambda x, i: x[...],
    "an ellipsis at the end": lambda x, i: x[1:, ...],
    "an ellipsis for nothing": lambda x, i: x[:, 1:, ..., :],
    "a new dimension": lambda x, i: x[:, None, 1:],
    "a new dimension in front": lambda x, i: x[None],
    "a new dimension and a row": lambda x, i: x[1, None, 2],
    "twice": lambda x, i: x[:, :-1][1:],
    "then a view": lambda x, i: x[:, 1:].reshape(-1, 50),
    "of a view": lambda x, i: x.view(-1, 50)[2:7],
    "by a tensor": lambda x, i: x[i],
    "by a tensor, second": lambda x, i: x[:, i],
    "by a tensor, all dimensions": lambda x, i: x[:, i, :],
    "by a tensor, an ellipsis": lambda x, i: x[..., i, :],
    "by two tensors": lambda x, i: x[i, i],
    "by a tensor and an integer": lambda x, i: x[i, 1],
    "by a tensor and a slice": lambda x, i: x[i, 1:],
    "by a tensor and a new dimension": lambda x, i: x[i, None],
    "by a matrix": lambda x, i: x[i.view(3, 1), i.view(1, 3)],
    "by int32": lambda x, i: x[i.int()],
    "by a range": lambda x, i: x[torch.arange(3), i],
    "by two tensors apart": lambda x, i: x.unsqueeze(1)[i, :, i],
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(spelling):
    assert_as_accurate_as_eager(loss_after(spelling), INPUT, WEIGHT, TARGET, INDEX)


def test_one_row_of_a_matrix():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight)[2], target[2])

    assert_as_accurate_as_eager(fn, INPUT[0].detach().requires_grad_(), WEIGHT, TARGET[0])


def test_rows_of_transposed_logits():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).transpose(1, 2)[1:, :, :-1], target[1:, 1:])

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


def test_rows_of_scaled_logits():
    def fn(input, weight, target):
        logits = (F.linear(input, weight) / 2)[:, :-1].float() * 3
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


def test_no_rows():
    def fn(input, weight, target):
        logits = F.linear(input, weight)[:, 4:]
        return F.cross_entropy(logits.reshape(-1, 50), target[:, 4:].reshape(-1), reduction="sum")

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


def test_length_that_is_symbolic():
    head = torch.nn.Linear(8, 50)

    def fn(input, target, length):
        logits = head(input)[:, -length:]
        return F.cross_entropy(logits.transpose(1, 2), target[:, -length:])

    (report,) = reports_of(fn, INPUT, TARGET, 3, dynamic=True)
    assert report.rewritten
    compiled = torch.compile(
        fn, backend="cce_inductor_eager", dynamic=True, options={"min_logits_bytes": 0}
    )
    for length in (3, 2, 4):
        torch.testing.assert_close(compiled(INPUT, TARGET, length), fn(INPUT, TARGET, length))


def loss_of_first_classes_after(select):
    """The function whose logits go through `select`, whatever remains of the vocabulary."""

    def fn(input, weight, index):
        logits = select(F.linear(input, weight), index)
        logits = logits.reshape(-1, logits.shape[-1])
        target = torch.arange(logits.shape[0]) % logits.shape[1]
        return F.cross_entropy(logits, target, reduction="none")

    return fn


OTHER_WAYS = {
    "narrow": lambda x, i: x.narrow(1, 0, 2),
    "torch.narrow": lambda x, i: torch.narrow(x, 0, 1, 1),
    "select": lambda x, i: x.select(1, -1),
    "torch.select": lambda x, i: torch.select(x, 0, 1),
    "index_select": lambda x, i: x.index_select(0, i.remainder(3)),
    "torch.index_select": lambda x, i: torch.index_select(x, 1, i.abs()),
    "split": lambda x, i: x.split(2, 1)[0],
    "split, the rest": lambda x, i: x.split(3, dim=1)[1],
    "torch.split": lambda x, i: torch.split(x, [1, 3], 1)[1],
    "chunk": lambda x, i: x.chunk(2, 1)[1],
    "torch.chunk": lambda x, i: torch.chunk(x, 3, dim=0)[-1],
    "tensor_split": lambda x, i: x.tensor_split(2, 1)[0],
    "torch.tensor_split": lambda x, i: torch.tensor_split(x, [1], 1)[1],
    "unbind": lambda x, i: x.unbind(1)[0],
    "torch.unbind": lambda x, i: torch.unbind(x, -2)[2],
}


@pytest.mark.parametrize("select", OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_numbers_of_other_ways(select):
    assert_as_accurate_as_eager(loss_of_first_classes_after(select), INPUT, WEIGHT, INDEX)


RANGES = {
    "the first": lambda x, i: x[:, :, :10],
    "the first, an ellipsis": lambda x, i: x[..., :10],
    "all but the first": lambda x, i: x[:, :-1, 1:],
    "the last": lambda x, i: x[..., -10:],
    "all, spelled out": lambda x, i: x[:, :, :50],
    "one": lambda x, i: x[..., 3:4],
    "a range of a range": lambda x, i: x[..., 5:40][..., 3:],
    "of scaled logits": lambda x, i: (x * 2).tanh()[..., 5:],
    "of biased logits": lambda x, i: (x + torch.linspace(0, 1, 50))[..., 5:],
    "of logits scaled by row": lambda x, i: (x * torch.linspace(0, 1, 4)[:, None])[..., 5:],
    "narrow": lambda x, i: x.narrow(2, 5, 20),
    "narrow to everything": lambda x, i: x.narrow(-1, 0, 50),
}


@pytest.mark.parametrize("select", RANGES.values(), ids=RANGES)
def test_numbers_of_a_range_of_the_vocabulary(select):
    assert_as_accurate_as_eager(loss_of_first_classes_after(select), INPUT, WEIGHT, INDEX)


def test_numbers_of_a_range_of_a_projection_with_bias():
    def fn(input, weight, bias, target):
        logits = F.linear(input, weight, bias)[..., :45].reshape(-1, 45)
        return F.cross_entropy(logits, target.view(-1).clamp(max=44))

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, torch.randn(50, requires_grad=True), TARGET)


def test_graph_of_a_range_of_the_vocabulary():
    def fn(input, weight, bias, target):
        return F.cross_entropy(F.linear(input, weight, bias)[..., :45].view(-1, 45), target)

    target = TARGET.view(-1).clamp(max=44)
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, torch.randn(50), target),
        """\
getitem_1 = l_weight_[slice(0, 45, None)]
getitem_2 = l_bias_[slice(0, 45, None)]
reduce = torch.ops.cce_inductor.reduce.default(l_input_, getitem_1, getitem_2, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem_3 = reduce[0]
getitem_4 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_3, getitem_4, None, l_target_, None, 45, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_two_parts():
    def fn(input, weight, target):
        first, second = F.linear(input, weight).split(2, 1)
        return F.cross_entropy(first.mT, target[:, :2]) + F.cross_entropy(second.mT, target[:, 2:])

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
getitem_2 = l_target_[(slice(None, None, None), slice(None, 2, None))]
narrow = torch.narrow(l_input_, 1, 0, 2)
permute = torch.permute(narrow, (0, 2, 1))
movedim = torch.movedim(permute, 1, -1)
reduce = torch.ops.cce_inductor.reduce.default(movedim, l_weight_, None, [getitem_2], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem_4 = reduce[0]
getitem_5 = reduce[1]
cross_entropy_2 = torch.ops.cce_inductor.cross_entropy.default(getitem_4, getitem_5, None, getitem_2, None, 50, 'mean', -100, 0.0, torch.float32)
getitem_3 = l_target_[(slice(None, None, None), slice(2, None, None))]
narrow_1 = torch.narrow(l_input_, 1, 2, 2)
permute_1 = torch.permute(narrow_1, (0, 2, 1))
movedim_1 = torch.movedim(permute_1, 1, -1)
reduce_1 = torch.ops.cce_inductor.reduce.default(movedim_1, l_weight_, None, [getitem_3], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem_6 = reduce_1[0]
getitem_7 = reduce_1[1]
cross_entropy_3 = torch.ops.cce_inductor.cross_entropy.default(getitem_6, getitem_7, None, getitem_3, None, 50, 'mean', -100, 0.0, torch.float32)
add = cross_entropy_2 + cross_entropy_3
return (add,)
""",
    )


VOCABULARY = reasons.SELECTS_SOME_ENTRIES.sentence
LEFT_ALONE = {
    "every other entry": (lambda x, i: x[..., ::2], "getitem", VOCABULARY),
    "entries by a tensor": (lambda x, i: x[:, :, i], "getitem", VOCABULARY),
    "entries by a tensor, rows by another": (
        lambda x, i: x[i, i, i, None],
        "getitem",
        VOCABULARY,
    ),
    "entries of rows by a tensor": (lambda x, i: x[i, :, :10], "getitem", VOCABULARY),
    "one entry": (
        lambda x, i: x[:, :, 3, None],
        "getitem",
        reasons.SELECTS_ONE_ENTRY.sentence,
    ),
    "one entry, select": (
        lambda x, i: x.select(2, 3)[..., None],
        "select",
        reasons.SELECTS_ONE_ENTRY.sentence,
    ),
    "index_select": (lambda x, i: x.index_select(2, i), "index_select", VOCABULARY),
    "split": (lambda x, i: x.split(25, -1)[0], "split", reasons.SPLITS_VOCABULARY.sentence),
    "unbind": (
        lambda x, i: x.unbind(-1)[0][..., None],
        "unbind",
        reasons.SPLITS_VOCABULARY.sentence,
    ),
    "a part of a softmax": (
        lambda x, i: x.softmax(-1)[..., 5:],
        "getitem",
        reasons.SELECTS_ENTRIES_OF_SOFTMAX.sentence,
    ),
    "a part of scaled entries": (
        lambda x, i: (x * torch.arange(50))[..., 5:],
        "getitem",
        reasons.SELECTS_ENTRIES_AFTER_MASK.sentence,
    ),
    "rows by a tensor after transpose": (
        lambda x, i: x.transpose(1, 2)[i],
        "getitem",
        VOCABULARY,
    ),
    "rows by a list": (lambda x, i: x[[0, 1]], "getitem", reasons.SELECTS_ROWS_BY_LIST.sentence),
}


@pytest.mark.parametrize(("select", "name", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(select, name, why):
    assert_used_by(
        reason_against(loss_of_first_classes_after(select), INPUT, WEIGHT, INDEX.abs()), name, why
    )


MASKS = {
    "of rows before the projection": lambda x, w, m: F.linear(x[m], w) * 2,
    "nonzero": lambda x, w, m: F.linear(x, w).view(-1, 50)[m.view(-1).nonzero()[:, 0]],
    "of logits": lambda x, w, m: F.linear(x, w)[m],
}


@pytest.mark.parametrize("logits", MASKS.values(), ids=MASKS)
def test_rows_by_a_mask(logits):
    def fn(input, weight, target):
        mask = target >= 0
        return F.cross_entropy(logits(input, weight, mask), target[mask])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        if not any("cross_entropy" in module.code for module in capture(fn, INPUT, WEIGHT, TARGET)):
            pytest.skip("this version of Dynamo leaves the loss out of the graph")
        assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)
