"""Matrix products, with the weight or its transpose."""

import operator

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, reports_of, rewritten_graph
from expecttest import assert_expected_inline

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
BIAS = torch.randn(50, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def loss_of(project):
    """The function whose logits are ``project(input, weight, bias)``."""

    def fn(input, weight, bias, target):
        return F.cross_entropy(project(input, weight, bias), target)

    return fn


def test_graph_of_a_transposed_weight():
    fn = loss_of(lambda x, w, b: x @ w.T)
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, BIAS, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_a_weight_that_is_hidden_by_vocabulary():
    fn = loss_of(lambda x, w, b: x @ w)
    weight = WEIGHT.detach().t().contiguous().requires_grad_()
    assert_expected_inline(
        rewritten_graph(fn, INPUT, weight, BIAS, TARGET),
        """\
t = torch.t(l_weight_)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, t, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_addmm():
    fn = loss_of(lambda x, w, b: torch.addmm(b, x, w.t()))
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, BIAS, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, l_bias_, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_a_transposed_weight_with_other_uses():
    def fn(input, weight, target):
        transposed = weight.t()
        return F.cross_entropy(input @ transposed, target) + transposed.square().sum()

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
transposed = l_weight_.t()
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
square = transposed.square()
sum_1 = square.sum()
add = cross_entropy_1 + sum_1
return (add,)
""",
    )


SPELLINGS = {
    "@": lambda x, w, b: x @ w.T,
    "matmul": lambda x, w, b: x.matmul(w.T),
    "torch.matmul": lambda x, w, b: torch.matmul(x, w.T),
    "torch.matmul, keywords": lambda x, w, b: torch.matmul(other=w.T, input=x),
    "operator.matmul": lambda x, w, b: operator.matmul(x, w.T),
    "__matmul__": lambda x, w, b: x.__matmul__(w.T),
    "mm": lambda x, w, b: x.mm(w.T),
    "torch.mm": lambda x, w, b: torch.mm(x, w.T),
    "addmm": lambda x, w, b: b.addmm(x, w.T),
    "torch.addmm": lambda x, w, b: torch.addmm(b, x, w.T),
    "torch.addmm, ones": lambda x, w, b: torch.addmm(b, x, w.T, beta=1, alpha=1),
    "torch.addmm, keywords": lambda x, w, b: torch.addmm(mat2=w.T, mat1=x, input=b),
    "t": lambda x, w, b: x @ w.t(),
    "torch.t": lambda x, w, b: x @ torch.t(w),
    "mT": lambda x, w, b: x @ w.mT,
    "transpose": lambda x, w, b: x @ w.transpose(0, 1),
    "transpose, from the end": lambda x, w, b: x @ w.transpose(-1, -2),
    "torch.transpose": lambda x, w, b: x @ torch.transpose(w, 1, 0),
    "transpose, keywords": lambda x, w, b: x @ w.transpose(dim0=0, dim1=1),
    "swapaxes": lambda x, w, b: x @ w.swapaxes(0, 1),
    "permute": lambda x, w, b: x @ w.permute(1, 0),
    "permute, a tuple": lambda x, w, b: x @ w.permute((1, 0)),
    "torch.permute": lambda x, w, b: x @ torch.permute(w, (1, 0)),
    "adjoint": lambda x, w, b: x @ w.adjoint(),
    "three times": lambda x, w, b: x @ w.t().t().t(),
    "contiguous": lambda x, w, b: x @ w.t().contiguous(),
    "not a transpose": lambda x, w, b: x @ w.permute(0, 1).transpose(0, 0).t(),
    "linear": lambda x, w, b: F.linear(x, w.t().t()),
    "expression": lambda x, w, b: x @ (w * 2).t(),
    "bmm": lambda x, w, b: x[None].bmm(w.T[None])[0],
    "torch.bmm": lambda x, w, b: torch.bmm(x[None], w.T[None])[0],
    "torch.bmm, expand": lambda x, w, b: torch.bmm(x.view(2, 3, 8), w.t().expand(2, -1, -1)).view(
        6, 50
    ),
    "torch.bmm, unsqueeze, expand": lambda x, w, b: torch.bmm(
        x.view(2, 3, 8), w.T.unsqueeze(0).expand(2, 8, 50)
    ).view(6, 50),
    "torch.bmm, torch.unsqueeze": lambda x, w, b: torch.bmm(x[None], torch.unsqueeze(w.T, 0))[0],
    "torch.bmm, torch.broadcast_to": lambda x, w, b: torch.bmm(
        x.view(2, 3, 8), torch.broadcast_to(w.T, (2, 8, 50))
    ).view(6, 50),
    "torch.bmm, expand_as": lambda x, w, b: torch.bmm(
        x.view(2, 3, 8), w.T.expand_as(torch.empty(2, 8, 50))
    ).view(6, 50),
    "torch.baddbmm": lambda x, w, b: torch.baddbmm(b, x[None], w.T[None])[0],
    "baddbmm": lambda x, w, b: b.baddbmm(x[None], w.T[None])[0],
    "@, a batch of equal weights": lambda x, w, b: (x[None] @ w.T[None])[0],
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(spelling):
    assert_as_accurate_as_eager(loss_of(spelling), INPUT, WEIGHT, BIAS, TARGET)


@pytest.mark.parametrize(
    "project",
    [
        lambda x, w, b: x @ w,
        lambda x, w, b: torch.addmm(b, x, w),
        lambda x, w, b: F.linear(x, w.T, b),
        lambda x, w, b: x @ w.t().t() + b,
    ],
)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_weight_that_is_hidden_by_vocabulary(project, label_smoothing):
    def fn(input, weight, bias, target):
        return F.cross_entropy(
            project(input, weight, bias), target, label_smoothing=label_smoothing
        )

    weight = torch.randn(8, 50, requires_grad=True)
    assert_as_accurate_as_eager(fn, INPUT, weight, BIAS, TARGET)


def test_batch():
    def fn(input, weight, target):
        return F.cross_entropy((input @ weight.T).view(-1, 50), target)

    input = torch.randn(2, 3, 8, requires_grad=True)
    assert_as_accurate_as_eager(fn, input, WEIGHT, TARGET)


def test_one_row():
    def fn(input, weight, target):
        return F.cross_entropy(input @ weight.T, target)

    assert_as_accurate_as_eager(fn, torch.randn(8, requires_grad=True), WEIGHT, torch.tensor(3))


def test_square_weight():
    def fn(input, weight, target):
        return F.cross_entropy(input @ weight, target)

    weight = torch.randn(8, 8, requires_grad=True)
    assert_as_accurate_as_eager(fn, INPUT, weight, TARGET % 8)


def test_dynamic_sizes():
    weight = torch.nn.Parameter(torch.randn(8, 50))

    def fn(input, target):
        return F.cross_entropy(input @ weight, target)

    (report,) = reports_of(fn, INPUT, TARGET, dynamic=True)
    assert report.rewritten


NO_PROJECTION = {
    "addmm with beta": lambda x, w, b: torch.addmm(b, x, w.T, beta=2),
    "addmm with alpha": lambda x, w, b: torch.addmm(b, x, w.T, alpha=0.5),
    "addmm with no bias left": lambda x, w, b: torch.addmm(b, x, w.T, beta=0),
    "addmm with a matrix": lambda x, w, b: torch.addmm(b.expand(6, 50), x, w.T),
    "addmm with a column": lambda x, w, b: torch.addmm(b[:6, None], x, w.T),
    "addmm with one element": lambda x, w, b: torch.addmm(b[:1], x, w.T),
    "linear with one element": lambda x, w, b: F.linear(x, w, b[:1]),
    "baddbmm with beta": lambda x, w, b: torch.baddbmm(b, x[None], w.T[None], beta=2)[0],
    "bmm with two weights": lambda x, w, b: torch.bmm(
        x.view(2, 3, 8), torch.stack([w.T, w.T])
    ).view(6, 50),
    "batch of inputs": lambda x, w, b: (w @ x.view(2, 3, 8).mT).mT.reshape(6, 50),
    "__rmatmul__": lambda x, w, b: w.T.__rmatmul__(x),
    "mv": lambda x, w, b: torch.mv(w, x[0]).expand(6, 50),
    "cdist": lambda x, w, b: torch.cdist(x, w),
}


@pytest.mark.parametrize("project", NO_PROJECTION.values(), ids=NO_PROJECTION)
def test_no_projection(project):
    reason = reason_against(loss_of(project), INPUT, WEIGHT, BIAS, TARGET)
    assert "not a known projection" in reason


def test_graph_of_bmm():
    fn = loss_of(lambda x, w, b: torch.bmm(x.view(2, 3, 8), w.T.expand(2, -1, -1)).view(6, 50))
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, BIAS, TARGET),
        """\
view = l_input_.view(2, 3, 8)
reduce = torch.ops.cce_inductor.reduce.default(view, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_weight_times_input():
    def fn(input, weight, target):
        return F.cross_entropy((weight @ input.t()).t(), target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


def test_vector_of_logits_is_left_alone():
    def fn(input, weight, target):
        return F.cross_entropy(weight @ input, target)

    reason = reason_against(fn, INPUT[0].detach(), WEIGHT, torch.tensor(3))
    assert reason.endswith("which is not a known projection")


def test_product_of_two_vectors_beside_a_loss():
    """Its result, a single number, has no vocabulary; the rule refuses only the argument `out`."""

    def fn(input, weight, target):
        square = torch.matmul(input[0].detach(), input[0].detach(), out=torch.empty(()))
        return F.cross_entropy(F.linear(input, weight), target) + square

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.rewritten
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)
