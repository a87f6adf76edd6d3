"""NumPy's names of arguments, which PyTorch takes beside its own."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate_as_eager, beside_a_loss, reports_of, rewritten_graph

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, 1, 7, 7])


def test_graph_is_that_of_other_names():
    named = beside_a_loss(lambda z, t: torch.sum(x=z, axis=-1, keepdims=True))
    other = beside_a_loss(lambda z, t: torch.sum(input=z, dim=-1, keepdim=True))
    graphs = [rewritten_graph(fn, INPUT, WEIGHT, TARGET) for fn in (named, other)]
    assert "sum(z)" in graphs[0]
    assert graphs[0] == graphs[1]


REDUCTIONS = {
    "sum": lambda z, t: torch.sum(z, axis=-1, keepdims=True),
    "sum, a method": lambda z, t: z.sum(axis=1),
    "sum of all": lambda z, t: z.sum(axis=(0, 1), keepdims=True),
    "mean": lambda z, t: torch.mean(a=z, axis=1),
    "mean, a method": lambda z, t: z.mean(axis=(1,), keepdims=True),
    "logsumexp": lambda z, t: z.logsumexp(axis=1),
    "torch.logsumexp": lambda z, t: torch.logsumexp(x=z, axis=-1, keepdims=True),
    "special.logsumexp": lambda z, t: torch.special.logsumexp(z, axis=-1, keepdims=True),
    "argmax": lambda z, t: torch.argmax(z, axis=1),
    "argmax, a method": lambda z, t: z.argmax(axis=-1, keepdims=True),
    "argmin": lambda z, t: torch.argmin(x=z, axis=1, keepdims=True),
    "max": lambda z, t: torch.max(z, axis=1, keepdims=True).values,
    "max, a method": lambda z, t: z.max(axis=1)[0],
    "amax": lambda z, t: torch.amax(z, axis=1),
    "amax, a method": lambda z, t: z.amax(axis=-1, keepdims=True),
    "topk": lambda z, t: z.topk(3, axis=1).values,
    "gather": lambda z, t: torch.gather(z, axis=1, index=t[:, None]),
    "gather, a method": lambda z, t: z.gather(axis=-1, index=t[:, None]),
    "take_along_dim": lambda z, t: torch.take_along_dim(z, t[:, None], axis=1),
    "take_along_dim, a method": lambda z, t: z.take_along_dim(t[:, None], axis=-1),
    "log_softmax": lambda z, t: torch.log_softmax(z, axis=1).gather(1, t[:, None]),
    "log_softmax, a method": lambda z, t: z.log_softmax(axis=-1).sum(-1),
    "special.log_softmax": lambda z, t: torch.special.log_softmax(z, axis=-1).sum(-1),
    "softmax": lambda z, t: torch.softmax(x=z, axis=1).amax(1),
    "softmax, a method": lambda z, t: z.softmax(axis=-1).square().sum(-1),
    "maximum under the exponential": lambda z, t: (
        (z - z.max(axis=1, keepdims=True)[0]).exp().sum(axis=1).log()
    ),
}


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
def test_reductions(reduce):
    assert_as_accurate_as_eager(beside_a_loss(reduce), INPUT, WEIGHT, TARGET, slack=2)


TRANSFORMS = {
    "scatter": lambda z: z.scatter(axis=1, index=TARGET[:, None], value=-3.0),
    "squeeze": lambda z: z[None].squeeze(axis=0),
    "unsqueeze": lambda z: torch.unsqueeze(z, axis=1)[:, 0],
    "chunk": lambda z: torch.cat(z.chunk(3, axis=0), axis=0),
    "concat": lambda z: torch.concat([z[:2], z[2:]], axis=0),
    "narrow": lambda z: torch.narrow(z, axis=0, start=0, length=6),
    "unbind": lambda z: z[None].unbind(axis=0)[0],
    "select": lambda z: z[None].select(axis=0, index=0),
    "index_select": lambda z: z.index_select(axis=0, index=torch.arange(6)),
    "stack": lambda z: torch.stack([z, z * 2], axis=1)[:, 0],
    "add": lambda z: torch.add(x1=z, x2=WEIGHT.mean(1)),
    "add to another": lambda z: torch.add(WEIGHT.mean(1), x2=z),
    "multiply": lambda z: torch.mul(x=z, x2=torch.tensor(0.5)),
}


@pytest.mark.parametrize("change", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(change):
    def fn(input, weight, target):
        logits = change(F.linear(input, weight))
        return F.cross_entropy(logits, target[: logits.shape[0]])

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


PROJECTIONS = {
    "linear": lambda x, w: F.linear(x=x, weight=w),
    "matmul": lambda x, w: torch.matmul(x1=x, x2=w.t()),
    "matmul, a method": lambda x, w: x.matmul(x2=w.t()),
}


@pytest.mark.parametrize("project", PROJECTIONS.values(), ids=PROJECTIONS)
def test_projections(project):
    def fn(input, weight, target):
        return F.cross_entropy(project(input, weight), target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET)


LEFT_ALONE = {
    "no rule": lambda z, t: z.cumsum(axis=1),
    "another tensor": lambda z, t: torch.max(z, x2=torch.zeros(6, 50)).sum(),
}


@pytest.mark.parametrize("reduce", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(reduce):
    reports = reports_of(beside_a_loss(reduce), INPUT, WEIGHT, TARGET)
    assert reports
    assert not any(report.rewritten for report in reports)
