"""Views of logits are followed in both directions: written through, and read after a write."""

import pytest
import torch
import torch.nn.functional as F
from checks import MAY_CHANGE, reports_of, rewritten_graph, value_and_gradients
from expecttest import assert_expected_inline

import cce_inductor
from cce_inductor.reporting import reasons

SIZE = 12
torch.manual_seed(0)
QUERY = torch.randn(SIZE, 8, dtype=torch.float64, requires_grad=True)
KEY = torch.randn(SIZE, 8, dtype=torch.float64, requires_grad=True)
MARGIN = torch.linspace(0.1, 0.9, SIZE, dtype=torch.float64, requires_grad=True)


def loss(logits):
    return F.cross_entropy(logits * 2, torch.arange(SIZE))


def of_matrix(use):
    """A function of a square matrix of logits, and of a margin for each row."""
    return lambda query, key, margin: use(query @ key.t(), margin)


def diagonal_then(change):
    def use(logits, margin):
        change(logits.diagonal(), margin)
        return loss(logits)

    return of_matrix(use)


def subtract_by_statement(diagonal, margin):
    diagonal -= margin


def assign_all(diagonal, margin):
    diagonal[:] = -1.0


def assign_margin(diagonal, margin):
    diagonal[...] = margin


WRITTEN_THROUGH = {
    "sub_": diagonal_then(lambda d, margin: d.sub_(0.2)),
    "isub of a tensor": diagonal_then(subtract_by_statement),
    "isub of what has no gradient": diagonal_then(lambda d, margin: d.sub_(margin.detach())),
    "imul method": diagonal_then(lambda d, margin: d.__imul__(2)),
    "setitem": diagonal_then(assign_all),
    "setitem of a tensor": diagonal_then(assign_margin),
    "copy_": diagonal_then(lambda d, margin: d.copy_(margin)),
    "copy_ of what has no gradient": diagonal_then(lambda d, margin: d.copy_(margin.detach())),
    "copy_ of itself": diagonal_then(lambda d, margin: d.copy_(d * margin.detach())),
    "copy_ of logits": of_matrix(lambda z, margin: (z.copy_(z * 2), loss(z))[1]),
    "copy_ of a value of each row": of_matrix(
        lambda z, margin: (z[:, 8:].copy_(margin[:, None]), loss(z))[1]
    ),
    "fill_": diagonal_then(lambda d, margin: d.fill_(-1e4)),
    "twice": diagonal_then(lambda d, margin: d.mul_(2).sub_(margin)),
    "by itself": diagonal_then(lambda d, margin: d.sub_(d * 0.5)),
    "function": of_matrix(lambda z, margin: (torch.diagonal(z).mul_(2), loss(z))[1]),
    "keyword": of_matrix(lambda z, margin: (torch.diagonal(input=z).mul_(2), loss(z))[1]),
    "of the transpose": of_matrix(lambda z, margin: (z.t().diagonal().sub_(margin), loss(z))[1]),
    "of moved dimensions": of_matrix(
        lambda z, margin: (z.movedim(0, 1).diagonal(0, -1, -2).sub_(0.2), loss(z))[1]
    ),
    "fill_diagonal_": of_matrix(lambda z, margin: (z.fill_diagonal_(-5.0), loss(z))[1]),
    "range": of_matrix(lambda z, margin: (z[:, 8:].mul_(3), loss(z))[1]),
    "filled range": of_matrix(lambda z, margin: (z[:, 8:].fill_(-4.0), z.logsumexp(1).sum())[1]),
    "narrow": of_matrix(lambda z, margin: (z.narrow(1, 3, 4).tanh_(), loss(z))[1]),
    "range of a range": of_matrix(lambda z, margin: (z[:, 2:][:, 3:5].mul_(3), loss(z))[1]),
    "expanded": of_matrix(lambda z, margin: (z.expand(1, SIZE, SIZE)[0].div_(3), loss(z))[1]),
}


def read_after(use):
    def of_logits(logits, margin):
        diagonal = logits.diagonal()
        return use(logits, diagonal, margin)

    return of_matrix(of_logits)


def divide(z, diagonal, margin):
    z.div_(0.07)
    return (z.logsumexp(1) - diagonal).mean()


def read_twice(z, diagonal, margin):
    first = diagonal * 2
    z.mul_(2)
    second = diagonal.sum()
    z.mul_(3)
    return first.sum() + second + (diagonal * margin).sum() + loss(z)


def written_and_read(z, diagonal, margin):
    changed = diagonal.mul_(2)
    z.sub_(1)
    return loss(z) + changed.mean() + diagonal.square().sum()


def two_views(z, diagonal, margin):
    other = z.diagonal()
    diagonal.sub_(margin)
    return loss(z) + (other * margin).sum()


def exponential(z, diagonal, margin):
    z.exp_()
    return (z.sum(1).log() - diagonal.log()).mean()


def part_read(z, diagonal, margin):
    part = z[:, 8:]
    z.mul_(margin[:, None])
    return loss(z) + part.logsumexp(1).sum()


def rows_read(z, diagonal, margin):
    part = z[:-1]
    z.sub_(margin[:, None])
    return loss(z) + part.logsumexp(1).sum()


READ_AFTER = {
    function.__name__: read_after(function)
    for function in (
        divide,
        read_twice,
        written_and_read,
        two_views,
        exponential,
        part_read,
        rows_read,
    )
}
FOLLOWED = WRITTEN_THROUGH | READ_AFTER


@pytest.mark.parametrize("fn", FOLLOWED.values(), ids=FOLLOWED)
def test_followed(fn):
    expected = value_and_gradients(fn, QUERY, KEY, MARGIN)
    reports = assert_same_numbers(fn, expected)
    assert reports
    assert all(report.rewritten for report in reports), "\n".join(map(str, reports))


def assert_same_numbers(fn, expected, args=(QUERY, KEY, MARGIN)):
    torch._dynamo.reset()
    cce_inductor.clear_reports()
    options = {"min_logits_bytes": 0, "on_error": "raise"}
    compiled = torch.compile(fn, backend="cce_inductor_eager", options=options)
    got = value_and_gradients(compiled, *args)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    return cce_inductor.reports()


def test_value_that_was_gathered_before_a_change_is_not_a_view():
    target = torch.arange(SIZE).flip(0)

    def fn(query, key, margin):
        logits = query @ key.t()
        chosen = logits.gather(1, target[:, None])[:, 0]
        logits = logits.div_(0.07)
        return (logits.logsumexp(1) - chosen).mean()

    def without_views(query, key, margin):  # eager autograd refuses the change in place
        logits = query @ key.t()
        return ((logits / 0.07).logsumexp(1) - logits.gather(1, target[:, None])[:, 0]).mean()

    reports = assert_same_numbers(fn, value_and_gradients(without_views, QUERY, KEY, MARGIN))
    assert all(report.rewritten for report in reports)


def view_of_a_view(z, diagonal, margin):
    other = diagonal.view(-1)
    z.mul_(2)
    return loss(z) + other.sum()


def by_another_view(z, diagonal, margin):
    z.as_strided((SIZE,), (SIZE + 1,)).sub_(0.4)
    return loss(z) + diagonal.sum()


def sub_matrix(z, diagonal, margin):
    z[:6, :6].diagonal().sub_(1)
    return loss(z)


def hidden_from_the_gradient(z, diagonal, margin):
    with torch.no_grad():
        diagonal.sub_(0.5)
    return loss(z)


def through_detach(z, diagonal, margin):
    z.detach().diagonal().mul_(0.5)
    return loss(z)


def some_entries(z, diagonal, margin):
    diagonal[2:] = -1.0
    return loss(z)


def one_entry_of_every_row(z, diagonal, margin):
    z.select(1, 3).sub_(1)
    return loss(z)


def some_rows(z, diagonal, margin):
    z[:6].mul_(2)
    return loss(z) + diagonal.sum()


CHANGED_BY_A_VIEW_OF_A_VIEW = {
    "a part": lambda z, diagonal, margin: diagonal[2:].mul_(2),
    "all of it": lambda z, diagonal, margin: diagonal[:].mul_(2),
    "as a matrix": lambda z, diagonal, margin: diagonal.view(3, 4)[1].fill_(-3.0),
    "with a dimension more": lambda z, diagonal, margin: diagonal.unsqueeze(1).sub_(0.3),
    "detached": lambda z, diagonal, margin: diagonal.detach().sub_(0.3),
    "data": lambda z, diagonal, margin: diagonal.data.sub_(0.3),
    "a list": lambda z, diagonal, margin: torch._foreach_mul_([diagonal[:]], 2.0),
}


@pytest.mark.parametrize(
    "change", CHANGED_BY_A_VIEW_OF_A_VIEW.values(), ids=CHANGED_BY_A_VIEW_OF_A_VIEW
)
def test_left_alone_where_a_view_of_a_view_is_changed(change):
    fn = read_after(lambda z, diagonal, margin: (change(z, diagonal, margin), loss(z))[1])
    reports = assert_same_numbers(fn, value_and_gradients(fn, QUERY, KEY, MARGIN))
    assert reports
    for report in reports:
        assert not report.rewritten
        assert report.reason.endswith(" changes logits in place through a view of them")


@pytest.mark.parametrize("turned", [False, True])
def test_diagonal_of_a_range_that_does_not_begin_with_the_vocabulary(turned):
    def fn(query, key, margin):
        logits = query @ torch.cat([key, key.flip(0)]).t()
        part = logits[:, 5 : 5 + SIZE]
        (part.t() if turned else part).diagonal().sub_(margin)
        return loss(logits)

    assert_same_numbers(fn, value_and_gradients(fn, QUERY, KEY, MARGIN))


def in_a_list(z, diagonal, margin):
    torch._foreach_mul_([z], 2)
    return loss(z)


def in_a_list_with_another(z, diagonal, margin):
    torch._foreach_add_([z, margin.clone()], 1.0)
    return loss(z)


def view_in_a_list(z, diagonal, margin):
    torch._foreach_neg_([diagonal])
    return loss(z)


NOT_FOLLOWED = {
    in_a_list: str(reasons.not_pointwise("aten._foreach_mul_.Scalar")),
    in_a_list_with_another: reasons.CHANGES_ANOTHER_TENSOR.sentence,
    view_in_a_list: str(reasons.not_pointwise("aten._foreach_neg_.default")),
    view_of_a_view: reasons.ALSO_READ_AS_VIEW.sentence,
    by_another_view: str(reasons.not_pointwise("aten.as_strided.default")),
    sub_matrix: reasons.CHANGES_PART.sentence,
    hidden_from_the_gradient: reasons.HIDDEN_FROM_GRADIENT.sentence,
    through_detach: reasons.ALSO_READ_AS_VIEW.sentence,
    some_entries: reasons.ASSIGNS_SOME_ROWS.sentence,
    one_entry_of_every_row: reasons.SELECTS_ONE_ENTRY.sentence,
    some_rows: reasons.CHANGES_PART.sentence,
}


@pytest.mark.parametrize("use", NOT_FOLLOWED, ids=lambda use: use.__name__)
def test_left_alone(use):
    fn = read_after(use)
    reports = assert_same_numbers(fn, value_and_gradients(fn, QUERY, KEY, MARGIN))
    assert reports
    for report in reports:
        assert not report.rewritten
        assert report.reason.endswith(f": {NOT_FOLLOWED[use]}")


def root_of_the_diagonal(query, key, margin):
    logits = query @ query.t()
    logits.diagonal().sqrt_()
    return loss(logits)


def root_of_a_range(query, key, margin):
    signs = torch.where(torch.arange(SIZE) < 4, -1.0, 1.0)
    logits = query.exp() @ (key.exp() * signs[:, None]).t()
    logits[:, 4:].sqrt_()
    return loss(logits / 9)


@pytest.mark.parametrize("fn", [root_of_the_diagonal, root_of_a_range])
def test_function_that_has_no_derivative_at_the_other_entries(fn):
    reports = assert_same_numbers(fn, value_and_gradients(fn, QUERY, KEY, MARGIN))
    assert all(report.rewritten for report in reports)


def test_margin_that_is_changed_after_it_was_subtracted():
    def fn(query, key, margin):
        margin = margin.clone()
        logits = query @ key.t()
        logits.diagonal().sub_(margin)
        margin.zero_()
        return loss(logits)

    (report,) = assert_same_numbers(fn, value_and_gradients(fn, QUERY, KEY, MARGIN))
    assert report.reason.endswith(f" {MAY_CHANGE}")


def test_graph_of_a_change_through_the_diagonal():
    assert_expected_inline(
        rewritten_graph(WRITTEN_THROUGH["isub of a tensor"], QUERY, KEY, MARGIN),
        """\
arange = torch.arange(12)
arange_1 = torch.arange(12, device = device(type='cpu'))
unsqueeze = torch.unsqueeze(arange_1, 1)
unsqueeze_1 = torch.unsqueeze(l_margin_, 1)
reduce = torch.ops.cce_inductor.reduce.default(l_query_, l_key_, None, [unsqueeze, unsqueeze_1, arange], 't0 = eq.Tensor(j, r0); t1 = sub.Tensor(z, r1); t2 = where.self(t0, t1, z); t3 = mul.Tensor(t2, 2); logsumexp(t3); target(t3, r2, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, arange, None, 12, 'mean', -100, 0.0, torch.float64)
return (cross_entropy_1,)
""",
    )


def test_graph_of_a_diagonal_read_before_and_after_a_change():
    assert_expected_inline(
        rewritten_graph(READ_AFTER["read_twice"], QUERY, KEY, MARGIN),
        """\
arange_1 = torch.arange(12, device = device(type='cpu'))
arange_2 = torch.arange(12, device = device(type='cpu'))
arange_3 = torch.arange(12, device = device(type='cpu'))
reduce = torch.ops.cce_inductor.reduce.default(l_query_, l_key_, None, [arange_1, arange_2, arange_3], 't0 = mul.Tensor(z, 2); t1 = mul.Tensor(t0, 3); t2 = mul.Tensor(t1, 2); index(z, r0); index(t0, r1); index(t1, r2); logsumexp(t2)')
getitem = reduce[0]
squeeze = torch.squeeze(getitem, 1)
clone = torch.clone(squeeze)
first = clone * 2
getitem_1 = reduce[1]
squeeze_1 = torch.squeeze(getitem_1, 1)
clone_1 = torch.clone(squeeze_1)
second = clone_1.sum()
getitem_2 = reduce[2]
squeeze_2 = torch.squeeze(getitem_2, 1)
clone_2 = torch.clone(squeeze_2)
sum_2 = first.sum()
add = sum_2 + second
mul_1 = clone_2 * l_margin_
sum_3 = mul_1.sum()
add_1 = add + sum_3
arange = torch.arange(12)
getitem_3 = reduce[3]
reduce_1 = torch.ops.cce_inductor.reduce.default(l_query_, l_key_, None, [arange], 't0 = mul.Tensor(z, 2); t1 = mul.Tensor(t0, 3); t2 = mul.Tensor(t1, 2); target(t2, r0, -100)', skip_ignored = True)
getitem_4 = reduce_1[0]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_3, getitem_4, None, arange, None, 12, 'mean', -100, 0.0, torch.float64)
add_2 = add_1 + cross_entropy_1
return (add_2,)
""",
    )


def test_graph_of_a_changed_range():
    assert_expected_inline(
        rewritten_graph(WRITTEN_THROUGH["range of a range"], QUERY, KEY, MARGIN),
        """\
arange = torch.arange(12)
reduce = torch.ops.cce_inductor.reduce.default(l_query_, l_key_, None, [arange], 't0 = ge.Scalar(j, 5); t1 = lt.Scalar(j, 7); t2 = logical_and(t0, t1); t3 = mul.Tensor(z, 3); t4 = where.self(t2, t3, z); t5 = mul.Tensor(t4, 2); logsumexp(t5); target(t5, r0, -100)', skip_ignored = True)
getitem_2 = reduce[0]
getitem_3 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_2, getitem_3, None, arange, None, 12, 'mean', -100, 0.0, torch.float64)
return (cross_entropy_1,)
""",
    )


def test_no_report_of_a_view_that_is_only_changed():
    (report,) = reports_of(WRITTEN_THROUGH["sub_"], QUERY, KEY, MARGIN)
    assert report.loss == "matmul > sub_(0.2) > mul(2) > cross_entropy"


def test_change_of_logits_without_rows():
    def fn(weight, query):
        logits = weight @ query.t()  # [vocabulary, rows], and there are no rows
        chosen = logits.t().log_softmax(-1).sum()
        logits.mul_(2)
        return chosen + logits.sum()

    empty = torch.empty(0, 8, dtype=torch.float64, requires_grad=True)
    assert_same_numbers(fn, value_and_gradients(fn, KEY, empty), (KEY, empty))
