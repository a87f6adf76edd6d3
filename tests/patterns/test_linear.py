"""``F.linear`` and `torch.nn.Linear`."""

import torch
import torch.nn.functional as F
from checks import rewritten_graph
from expecttest import assert_expected_inline

INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
BIAS = torch.randn(50, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def test_graph():
    def fn(input, weight, bias, target):
        return F.cross_entropy(F.linear(input, weight, bias), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, BIAS, TARGET),
        """\
linear_cross_entropy = torch.ops.cce_inductor.linear_cross_entropy.default(l_input_, l_weight_, l_target_, linear_bias = l_bias_)
return (linear_cross_entropy,)

""",
    )
