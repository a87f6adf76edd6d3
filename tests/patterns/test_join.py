"""Logits of several projections that become one, by ``cat`` or by a sum."""

import pytest
import torch
import torch.nn.functional as F
from checks import (
    MAY_CHANGE,
    assert_as_accurate_as_eager,
    reason_against,
    reports_of,
    rewritten_graph,
)
from expecttest import assert_expected_inline

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
OTHER = torch.randn(6, 8, requires_grad=True)
NARROW = torch.randn(6, 3, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
SECOND = torch.randn(50, 8, requires_grad=True)
COLUMN = torch.randn(6, requires_grad=True)
QUEUE = torch.randn(8, 40, requires_grad=True)
ADAPTER = torch.randn(50, 3, requires_grad=True)
SCALE = torch.tensor(0.7, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def test_graph_of_chunks():
    def fn(input, weight, target):
        return F.cross_entropy(torch.cat([F.linear(c, weight) for c in input.split(2)]), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
split = l_input_.split(2)
c = split[0]
c_1 = split[1]
c_2 = split[2]
cat_1 = torch.cat((c, c_1, c_2), 0)
reduce = torch.ops.cce_inductor.reduce.default(cat_1, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem_3 = reduce[0]
getitem_4 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_3, getitem_4, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


FUNCTIONS_WITHOUT_A_DERIVATIVE_AT_0 = {
    "root": lambda z: z.abs().sqrt(),
    "logarithm": lambda z: z.abs().add(0.0).log(),
    "reciprocal": lambda z: (1 / z).clamp(-9, 9),
}


@pytest.mark.parametrize(
    "function",
    FUNCTIONS_WITHOUT_A_DERIVATIVE_AT_0.values(),
    ids=FUNCTIONS_WITHOUT_A_DERIVATIVE_AT_0,
)
def test_columns_beside_a_function_that_has_no_derivative_at_0(function):
    def fn(input, weight, column, target):
        logits = function(input @ weight.t())
        column = column[:, None]
        return F.cross_entropy(torch.cat([column, logits, column * 2], 1), target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, COLUMN, TARGET)


def test_graph_of_a_column_in_front():
    def fn(input, column, queue):
        logits = torch.cat([column[:, None], input @ queue], 1) / 0.07
        return F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))

    assert_expected_inline(
        rewritten_graph(fn, INPUT, COLUMN, QUEUE),
        """\
getitem = l_column_[(slice(None, None, None), None)]
zeros = torch.zeros(6, dtype = torch.int64)
t = torch.t(l_queue_)
new_zeros = torch_Tensor_new_zeros(t, (1, 8))
cat_1 = torch.cat((new_zeros, t), 0)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, cat_1, None, [getitem, zeros], 't0 = eq.Scalar(j, 0); t1 = where.self(t0, r0, z); t2 = div.Tensor(t1, 0.07); logsumexp(t2); target(t2, r1, -100)', skip_ignored = True)
getitem_1 = reduce[0]
getitem_2 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_1, getitem_2, None, zeros, None, 41, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_an_adapter():
    def fn(input, narrow, weight, adapter, target):
        return F.cross_entropy(F.linear(input, weight) + 2 * F.linear(narrow, adapter), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, NARROW, WEIGHT, ADAPTER, TARGET),
        """\
mul_1 = torch.mul(l_narrow_, 2)
cat = torch.cat((l_input_, mul_1), 1)
cat_1 = torch.cat((l_weight_, l_adapter_), 1)
reduce = torch.ops.cce_inductor.reduce.default(cat, cat_1, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


ROWS = {
    "chunks": lambda x, y, w: torch.cat([F.linear(c, w) for c in x.split(2)]),
    "two inputs": lambda x, y, w: torch.cat([x[:2] @ w.T, y[2:] @ w.T]),
    "negative dimension": lambda x, y, w: torch.concat([x[:2] @ w.T, y[2:] @ w.T], dim=-2),
    "capped alike": lambda x, y, w: torch.cat([(z @ w.T / 3).tanh() * 3 for z in (x[:2], y[2:])]),
    "cast and reshaped": lambda x, y, w: torch.cat(
        [F.linear(z.view(1, 3, 8), w).double().view(3, 50) for z in (x[:3], y[3:])]
    ),
    "slices of rows": lambda x, y, w: torch.cat([(x @ w.T)[1:3], (y @ w.T)[2:]]),
}


@pytest.mark.parametrize("logits", ROWS.values(), ids=ROWS)
def test_rows(logits):
    def fn(input, other, weight, target):
        return F.cross_entropy(logits(input, other, weight), target)

    assert_as_accurate_as_eager(fn, INPUT, OTHER, WEIGHT, TARGET)


def test_vocabularies():
    def fn(input, weight, second, target):
        logits = torch.cat([F.linear(input, weight), F.linear(input, second)], -1)
        return F.cross_entropy(logits, target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, SECOND, TARGET)


def similarity(first, second):
    return F.normalize(first) @ F.normalize(second).T


def by_hand(first, second):
    return (first / first.norm(dim=1, keepdim=True)) @ second.T


BESIDE = {
    "one of them": lambda x, w, v, c, q: torch.cat([x @ w.T], 1),
    "one, with a function": lambda x, w, v, c, q: torch.cat([(x @ w.T).tanh()], dim=1) * 3,
    "one, with a bias": lambda x, w, v, c, q: torch.cat((F.linear(x, w, w.mean(1)),), 0),
    "scaled together": lambda x, w, v, c, q: torch.cat([x @ w.T, x @ v.T], 1) * 20,
    "scaled alike": lambda x, w, v, c, q: torch.cat([x @ w.T * 20, x @ v.T * 20], 1),
    "scaled alike by a tensor": lambda x, w, v, c, q: torch.cat(
        [x @ w.T * SCALE, x @ v.T * SCALE], 1
    ),
    "normalised each": lambda x, w, v, c, q: torch.cat([similarity(x, w), similarity(x, v)], 1),
    "normalised by hand": lambda x, w, v, c, q: torch.cat([by_hand(x, w), by_hand(x, v)], 1),
    "a column in front": lambda x, w, v, c, q: torch.cat([c[:, None], x @ q], 1) / 0.07,
    "a column behind": lambda x, w, v, c, q: torch.cat([x @ q, c[:, None]], -1),
    "columns between": lambda x, w, v, c, q: torch.cat(
        [c[:, None], x @ w.T, c.exp()[:, None], x @ v.T], 1
    ),
    "stacked": lambda x, w, v, c, q: torch.hstack([c[:, None], x @ q]),
    "a column beside a function": lambda x, w, v, c, q: torch.cat(
        [c[:, None], (x @ q).tanh() * c[:, None]], 1
    ),
    "of three dimensions": lambda x, w, v, c, q: torch.cat(
        [c.view(2, 3, 1), x.view(2, 3, 8) @ q], -1
    ).view(6, 41),
    "in double": lambda x, w, v, c, q: torch.cat([c[:, None].double(), x @ q], 1),
    "a product of rows": lambda x, w, v, c, q: torch.cat(
        [torch.einsum("nc,nc->n", x, w[:6]).unsqueeze(-1), torch.einsum("nc,ck->nk", x, q)], 1
    ),
    "their own logsumexp": lambda x, w, v, c, q: (
        lambda z: torch.cat([z.logsumexp(1, keepdim=True) - c[:, None], z], 1)
    )(x @ q),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits", BESIDE.values(), ids=BESIDE)
def test_vocabularies_and_columns(logits, dtype):
    def fn(input, weight, second, column, queue):
        return F.cross_entropy(logits(input, weight, second, column, queue), POSITIVE)

    tensors = (INPUT, WEIGHT, SECOND, COLUMN, QUEUE)
    arguments = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    assert_as_accurate_as_eager(fn, *arguments, slack=2)


POSITIVE = torch.tensor([0, 0, 40, -100, 7, 0])


def test_column_under_autocast():
    def fn(input, column, queue):
        with torch.autocast("cpu", torch.bfloat16):
            logits = torch.cat([column[:, None], input @ queue], 1) / 0.07
        return F.cross_entropy(logits, POSITIVE)

    assert_as_accurate_as_eager(fn, INPUT, COLUMN, QUEUE, slack=2)


def test_input_that_is_changed_between():
    def fn(input, weight, second):
        input = input.clone()
        first = F.normalize(input) @ weight.T
        input.mul_(torch.arange(8.0))
        return F.cross_entropy(torch.cat([first, F.normalize(input) @ second.T], 1), POSITIVE)

    arguments = [tensor.detach() for tensor in (INPUT, WEIGHT, SECOND)]
    assert reason_against(fn, *arguments)


def test_column_that_is_changed_afterwards():
    def fn(input, column, queue):
        column = column.clone()
        logits = torch.cat([column[:, None], input @ queue], 1)
        column.mul_(2)
        return F.cross_entropy(logits, POSITIVE) + column.sum()

    reason = reason_against(fn, INPUT, COLUMN, QUEUE)
    assert MAY_CHANGE in reason


SUMS = {
    "two heads": lambda x, y, n, w, v, a, s: F.linear(x, w) + F.linear(y, v),
    "adapter": lambda x, y, n, w, v, a, s: F.linear(x, w) + F.linear(n, a),
    "scaled": lambda x, y, n, w, v, a, s: F.linear(x, w) + 0.5 * F.linear(n, a),
    "divided": lambda x, y, n, w, v, a, s: F.linear(n, a) / 3 + F.linear(x, w),
    "learned scale": lambda x, y, n, w, v, a, s: F.linear(x, w) + s * F.linear(n, a),
    "in place": lambda x, y, n, w, v, a, s: F.linear(x, w).add_(F.linear(n, a)),
    "then capped": lambda x, y, n, w, v, a, s: (F.linear(x, w) + F.linear(n, a)).tanh(),
}


@pytest.mark.parametrize("logits", SUMS.values(), ids=SUMS)
def test_sums(logits):
    def fn(input, other, narrow, weight, second, adapter, scale, target):
        return F.cross_entropy(logits(input, other, narrow, weight, second, adapter, scale), target)

    assert_as_accurate_as_eager(fn, INPUT, OTHER, NARROW, WEIGHT, SECOND, ADAPTER, SCALE, TARGET)


LEFT_ALONE = {
    "two weights": lambda x, y, w, v: torch.cat([x[:2] @ w.T, y[2:] @ v.T]),
    "two functions": lambda x, y, w, v: torch.cat([x[:2] @ w.T, (y[2:] @ w.T).tanh()]),
    "something else": lambda x, y, w, v: torch.cat([x[:2] @ w.T, torch.ones(4, 50)]),
    "two columns": lambda x, y, w, v: torch.cat([y[:, :2], x @ w.T], 1),
    "a column beside a bias": lambda x, y, w, v: torch.cat([y[:, :1], F.linear(x, w, v[:, 0])], 1),
    "a column beside a mask": lambda x, y, w, v: torch.cat(
        [y[:, :1], (x @ w.T).masked_fill(torch.arange(50) > 40, -1e9)], 1
    ),
    "a column beside a softmax": lambda x, y, w, v: torch.cat(
        [y[:, :1], (x @ w.T).log_softmax(1)], 1
    ),
    "integers": lambda x, y, w, v: torch.cat([torch.ones(6, 1, dtype=torch.int64), x @ w.T], 1),
    "several inputs": lambda x, y, w, v: torch.cat([x @ w.T, y @ v.T], 1),
    "normalised in several ways": lambda x, y, w, v: torch.cat(
        [F.normalize(x) @ w.T, F.normalize(x, p=1) @ v.T], 1
    ),
    "random inputs": lambda x, y, w, v: torch.cat([F.dropout(x) @ w.T, F.dropout(x) @ v.T], 1),
    "two scales": lambda x, y, w, v: torch.cat([x @ w.T * 20, x @ v.T * 10], 1),
}


@pytest.mark.parametrize("logits", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(logits):
    def fn(input, other, weight, second, target):
        return F.cross_entropy(logits(input, other, weight, second), target)

    assert reason_against(fn, INPUT, OTHER, WEIGHT, SECOND, TARGET)


def test_a_part_that_is_used_elsewhere_keeps_all():
    def fn(input, other, weight, target):
        first, second = input @ weight.T, other @ weight.T
        return F.cross_entropy(torch.cat([first, second]), target.repeat(2)), first.sort().values

    (report,) = reports_of(fn, INPUT, OTHER, WEIGHT, TARGET)
    assert not report.rewritten
    assert "used by sort" in report.reason
