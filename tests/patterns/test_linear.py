"""``F.linear`` and `torch.nn.Linear`."""

import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, reports_of, rewritten_graph
from expecttest import assert_expected_inline

INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
BIAS = torch.randn(50, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def loss(input, weight, bias, target):
    return F.cross_entropy(F.linear(input, weight, bias), target)


def test_graph():
    assert_expected_inline(
        rewritten_graph(loss, INPUT, WEIGHT, BIAS, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, l_bias_, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_numbers():
    assert_as_accurate_as_eager(loss, INPUT, WEIGHT, BIAS, TARGET)


def test_module_without_bias():
    head = torch.nn.Linear(8, 50, bias=False)
    criterion = torch.nn.CrossEntropyLoss()

    assert_expected_inline(
        rewritten_graph(lambda input, target: criterion(head(input), target), INPUT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_head_parameters_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_keywords():
    def fn(input, weight, bias, target):
        return F.cross_entropy(target=target, input=F.linear(bias=bias, weight=weight, input=input))

    (report,) = reports_of(fn, INPUT, WEIGHT, BIAS, TARGET)
    assert report.rewritten


def test_bilinear_is_no_projection():
    def fn(input, weight, target):
        return F.cross_entropy(F.bilinear(input, input, weight), target)

    weight = torch.randn(50, 8, 8, requires_grad=True)
    assert reason_against(fn, INPUT, weight, TARGET).startswith("its input is made by bilinear")
