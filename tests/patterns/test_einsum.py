"""Projections by `torch.einsum`."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, rewritten_graph
from expecttest import assert_expected_inline

torch.manual_seed(0)
INPUT = torch.randn(2, 3, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def loss_of(project):
    """The function whose logits, in any shape, are ``project(input, weight)``."""

    def fn(input, weight, target):
        return F.cross_entropy(project(input, weight).view(-1, 50), target)

    return fn


def test_graph():
    fn = loss_of(lambda x, w: torch.einsum("bsh,vh->bsv", x, w))
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_of_a_weight_that_is_hidden_by_vocabulary():
    fn = loss_of(lambda x, w: torch.einsum("bsh,hv->bsv", x, w))
    weight = WEIGHT.detach().t().contiguous().requires_grad_()
    assert_expected_inline(
        rewritten_graph(fn, INPUT, weight, TARGET),
        """\
t = torch.t(l_weight_)
reduce = torch.ops.cce_inductor.reduce.default(l_input_, t, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


SPELLINGS = {
    "three letters": lambda x, w: torch.einsum("bsh,vh->bsv", x, w),
    "other letters": lambda x, w: torch.einsum("BTd,nd->BTn", x, w),
    "spaces": lambda x, w: torch.einsum(" b s h , v h -> b s v ", x, w),
    "the weight first": lambda x, w: torch.einsum("vh,bsh->bsv", w, x),
    "transposed": lambda x, w: torch.einsum("bsh,hv->bsv", x, w.t()),
    "the weight first, transposed": lambda x, w: torch.einsum("hv,bsh->bsv", w.t(), x),
    "a list": lambda x, w: torch.einsum("bsh,vh->bsv", [x, w]),
    "a matrix": lambda x, w: torch.einsum("th,vh->tv", x.view(-1, 8), w),
    "an ellipsis": lambda x, w: torch.einsum("...h,vh->...v", x, w),
    "an ellipsis and a letter": lambda x, w: torch.einsum("...sh,vh->...sv", x, w),
    "a letter and an ellipsis": lambda x, w: torch.einsum("b...h,vh->b...v", x, w),
    "an ellipsis, transposed": lambda x, w: torch.einsum("...h,hv->...v", x, w.t()),
    "an ellipsis for nothing": lambda x, w: torch.einsum("...bsh,vh->...bsv", x, w),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(spelling):
    assert_as_accurate_as_eager(loss_of(spelling), INPUT, WEIGHT, TARGET)


def test_one_row():
    def fn(input, weight, target):
        return F.cross_entropy(torch.einsum("h,vh->v", input, weight), target)

    assert_as_accurate_as_eager(fn, torch.randn(8, requires_grad=True), WEIGHT, torch.tensor(3))


def test_square_operands_are_told_apart():
    def fn(input, weight, target):
        return F.cross_entropy(torch.einsum("vh,th->tv", weight, input), target)

    input, weight = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    assert_as_accurate_as_eager(fn, input, weight, torch.randint(8, (8,)))


def test_square_weight_of_either_orientation():
    def fn(input, weight, target):
        straight = F.cross_entropy(torch.einsum("th,vh->tv", input, weight), target)
        return straight, F.cross_entropy(torch.einsum("th,hv->tv", input, weight), target)

    weight = torch.randn(8, 8, requires_grad=True)
    assert_as_accurate_as_eager(fn, INPUT[0].detach(), weight, TARGET[:3] % 8)


NO_PROJECTION = {
    "implicit result": "bsh,vh",
    "permuted result": "bsh,vh->sbv",
    "vocabulary not last": "bsh,vh->bvs",
    "summed rows": "bsh,vh->sv",
    "no sum": "bsh,vh->bsvh",
    "everything summed": "bsh,vh->bs",
    "a sum over rows": "bhs,vh->bsv",
    "a diagonal": "bbh,vh->bv",
    "vocabulary that is a row": "bsh,sh->bs",
    "hidden on both sides": "bsh,hh->bsh",
    "implicit ellipsis": "...h,vh",
    "an ellipsis in the weight": "bsh,...h->bs...",
}


@pytest.mark.parametrize("equation", NO_PROJECTION.values(), ids=NO_PROJECTION)
def test_no_projection(equation):
    sizes = {"b": 3, "s": 3, "h": 3, "v": 3, ".": 3}
    first, second = (
        torch.randn([sizes[letter] for letter in operand.replace("...", ".")])
        for operand in equation.split("->")[0].split(",")
    )

    def fn(input, weight, target):
        logits = torch.einsum(equation, input, weight).reshape(-1, 3)
        return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.int64))

    reason = reason_against(fn, first, second, TARGET)
    assert "which is not a known projection" in reason


def test_three_operands_are_left_alone():
    fn = loss_of(lambda x, w: torch.einsum("bsh,vh,v->bsv", x, w, torch.ones(50)))
    assert "einsum" in reason_against(fn, INPUT, WEIGHT, TARGET)


def test_subscripts_as_lists_are_left_alone():
    fn = loss_of(lambda x, w: torch.einsum(x, [0, 1, 2], w, [3, 2], [0, 1, 3]))
    assert "einsum" in reason_against(fn, INPUT, WEIGHT, TARGET)


def test_hidden_size_that_is_broadcast_is_left_alone():
    fn = loss_of(lambda x, w: torch.einsum("bsh,vh->bsv", x, w))
    assert "einsum" in reason_against(fn, INPUT, torch.randn(50, 1), TARGET)
