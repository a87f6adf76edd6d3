"""A workspace that exceeds the default holds logits from the forward to the backward."""

import pytest
import torch
import torch.nn.functional as F

import cce_inductor
from cce_inductor.kernels.head import TILE
from cce_inductor.options import DEFAULT_WORKSPACE_BYTES

TOKENS, HIDDEN, VOCABULARY = 64, 16, 4 * TILE
TILE_BYTES = TOKENS * TILE * 4


def loss(input, weight, target):
    """The gradient depends on the logsumexps, so it cannot be computed with the loss."""
    return F.cross_entropy(F.linear(input, weight), target, reduction="none").square().mean()


def tensors(tokens=TOKENS):
    torch.manual_seed(0)
    input = torch.randn(tokens, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    return input, weight, torch.randint(VOCABULARY, (tokens,))


def compiled(fn, tiles):
    options = {"min_logits_bytes": 0, "workspace_bytes": room_for(tiles)}
    return torch.compile(fn, backend="cce_inductor", options=options, fullgraph=True)


def room_for(tiles):
    return DEFAULT_WORKSPACE_BYTES + int(tiles * TILE_BYTES)


def gradients(fn, input, weight, target):
    result = fn(input, weight, target)
    return [result.detach(), *torch.autograd.grad(result, (input, weight))]


@pytest.fixture
def stored():
    """The number of tiles that each forward stores."""
    seen = []
    compute = torch.ops.cce_inductor.reduce_rows

    class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is compute.default:
                seen.append(args[-1])
            return func(*args, **(kwargs or {}))

    with Recorded():
        yield seen


@pytest.mark.parametrize(("tiles", "expected"), [(0, 0), (0.9, 0), (2.5, 2), (9, 4)])
def test_the_workspace_decides_and_the_report_says_so(tiles, expected):
    torch._dynamo.reset()
    exact = gradients(loss, *tensors())
    found = gradients(compiled(loss, tiles), *tensors())
    for ours, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, wanted)
    report = cce_inductor.reports()[-1]
    assert report.stored_bytes == expected * TILE_BYTES
    assert report.bytes_saved == (4 - expected) * TILE_BYTES
    assert ("still stored" in str(report)) == (expected > 0)


def test_shifted_rows_are_counted():
    def shifted(input, weight, target):
        rows = F.cross_entropy(F.linear(input, weight)[:-1], target[1:], reduction="none")
        return rows.square().mean()

    torch._dynamo.reset()
    compiled(shifted, 1)(*tensors())
    assert cce_inductor.reports()[-1].stored_bytes == (TOKENS - 1) * TILE * 4


def test_nothing_is_stored_without_a_gradient(stored):
    input, weight, target = tensors()
    reduce = lambda: torch.ops.cce_inductor.reduce(  # noqa: E731
        input, weight, None, [target], "logsumexp(z)", workspace_bytes=room_for(2)
    )
    reduce()
    with torch.no_grad():
        reduce()
    input, weight = input.detach(), weight.detach()
    reduce()
    assert stored == [2, 0, 0]


def test_nothing_is_stored_if_the_number_of_tokens_changes():
    torch._dynamo.reset()
    fn = torch.compile(
        loss,
        backend="cce_inductor",
        options={"min_logits_bytes": 0, "workspace_bytes": room_for(2)},
        dynamic=True,
    )
    exact = gradients(loss, *tensors(30))
    for ours, wanted in zip(gradients(fn, *tensors(30)), exact, strict=True):
        torch.testing.assert_close(ours, wanted)
    assert cce_inductor.reports()[-1].stored_bytes == 0
