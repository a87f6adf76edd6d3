"""Indexing that selects rows."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, reports_of, rewritten_graph
from expecttest import assert_expected_inline

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


VOCABULARY = "it selects some entries of the vocabulary"
UNSUPPORTED = {
    "first entries": (lambda x, i: x[:, :, :10], VOCABULARY),
    "first entries, an ellipsis": (lambda x, i: x[..., :10], VOCABULARY),
    "all but the first": (lambda x, i: x[:, :-1, 1:], VOCABULARY),
    "all, spelled out": (lambda x, i: x[:, :, :50], VOCABULARY),
    "entries by a tensor": (lambda x, i: x[:, :, i], VOCABULARY),
    "entries by a tensor, rows by another": (lambda x, i: x[i, i, i, None], VOCABULARY),
    "entries of rows by a tensor": (lambda x, i: x[i, :, :10], VOCABULARY),
    "one entry": (lambda x, i: x[:, :, 3, None], VOCABULARY),
    "rows by a tensor after transpose": (lambda x, i: x.transpose(1, 2)[i], VOCABULARY),
    "rows by a list": (lambda x, i: x[[0, 1]], "it selects rows by a list"),
}


@pytest.mark.parametrize(("select", "why"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported(select, why):
    def fn(input, weight, index):
        logits = select(F.linear(input, weight), index)
        logits = logits.reshape(-1, logits.shape[-1])
        return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.int64))

    reason = reason_against(fn, INPUT, WEIGHT, INDEX)
    assert reason.startswith("the logits are used by getitem at ")
    assert reason.endswith(f": {why}")


def test_rows_by_a_mask_are_left_alone():
    def fn(input, weight, target, mask):
        return F.cross_entropy(F.linear(input, weight)[mask], target[mask])

    mask = TARGET >= 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        reason = reason_against(fn, INPUT, WEIGHT, TARGET, mask)
    assert reason.endswith(": it selects rows by a mask, so their number depends on the data")


def test_vocabulary_cut_by_narrow_is_left_alone():
    def fn(input, weight, target):
        return F.cross_entropy(
            F.linear(input, weight).narrow(2, 0, 50).view(-1, 50), target.view(-1)
        )

    assert reason_against(fn, INPUT, WEIGHT, TARGET).startswith("the logits are used by narrow at ")
