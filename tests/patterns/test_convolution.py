"""Convolutions over single positions."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, reason_against, rewritten_graph
from expecttest import assert_expected_inline

torch.manual_seed(0)
INPUT = torch.randn(2, 8, 3, requires_grad=True)
WEIGHT = torch.randn(50, 8, 1, requires_grad=True)
BIAS = torch.randn(50, requires_grad=True)
TARGET = torch.tensor([[3, 0, 49], [-100, 7, 7]])


def loss_of(project):
    """The function whose logits, [2, 50, 3], are ``project(input, weight, bias)``."""

    def fn(input, weight, bias, target):
        return F.cross_entropy(project(input, weight, bias), target)

    return fn


def test_graph():
    fn = loss_of(F.conv1d)
    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, BIAS, TARGET),
        """\
movedim = torch.movedim(l_input_, 1, -1)
reshape = torch.reshape(l_weight_, (50, 8))
reduce = torch.ops.cce_inductor.reduce.default(movedim, reshape, l_bias_, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


SPELLINGS = {
    "a bias": lambda x, w, b: F.conv1d(x, w, b),
    "no bias": lambda x, w, b: F.conv1d(x, w),
    "every argument": lambda x, w, b: F.conv1d(x, w, b, 1, 0, 1, 1),
    "tuples": lambda x, w, b: F.conv1d(x, w, b, (1,), (0,), (1,)),
    "valid": lambda x, w, b: F.conv1d(x, w, b, padding="valid"),
    "same": lambda x, w, b: F.conv1d(x, w, b, padding="same"),
    "a dilation of one position": lambda x, w, b: F.conv1d(x, w, b, dilation=2),
    "capped": lambda x, w, b: 3 * torch.tanh(F.conv1d(x, w, b) / 3),
    "vocabulary last": lambda x, w, b: F.conv1d(x, w, b).mT.log_softmax(-1).mT,
    "conv2d": lambda x, w, b: F.conv2d(x[..., None], w[..., None], b)[..., 0],
    "conv3d": lambda x, w, b: F.conv3d(
        x[..., None, None], w[..., None, None], b, (1, 1, 1), (0, 0, 0)
    )[..., 0, 0],
}


@pytest.mark.parametrize("project", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(project):
    assert_as_accurate_as_eager(loss_of(project), INPUT, WEIGHT, BIAS, TARGET)


def test_module():
    head = torch.nn.Conv2d(8, 50, 1)
    input, target = torch.randn(2, 8, 3, 4, requires_grad=True), torch.randint(50, (2, 3, 4))
    assert_as_accurate_as_eager(lambda x, t: F.cross_entropy(head(x), t), input, target)


NO_PROJECTION = {
    "a stride": lambda x, w, b: F.conv1d(x, w, b, stride=3).expand(2, 50, 3),
    "padding": lambda x, w, b: F.conv1d(x, w, b, padding=1)[..., 1:-1],
    "groups": lambda x, w, b: F.conv1d(x[:, :2], w[:, :1], b, groups=2),
    "several positions": lambda x, w, b: F.conv1d(x, w.expand(50, 8, 3), b, padding="same"),
    "one sequence": lambda x, w, b: F.conv1d(x[0], w, b).expand(2, 50, 3),
    "transposed": lambda x, w, b: F.conv_transpose1d(x, w.transpose(0, 1), b),
}


@pytest.mark.parametrize("project", NO_PROJECTION.values(), ids=NO_PROJECTION)
def test_no_projection(project):
    reason = reason_against(loss_of(project), INPUT, WEIGHT, BIAS, TARGET)
    assert reason.endswith("which is not a known projection")
