"""Returned logits on a GPU: deferred as on the CPU, without synchronization with the host."""

import pytest
import torch
import torch.nn.functional as F

import cce_inductor
from cce_inductor.operators import compiled as operators
from cce_inductor.testing import relative_error

DEVICE = "cuda"
ROWS, VOCABULARY, HIDDEN = 512, 5003, 256
TOLERANCE = 2e-2  # of bfloat16


@pytest.fixture(autouse=True)
def installed():
    torch._dynamo.reset()
    with cce_inductor.installed(min_logits_bytes=0, on_error="raise", defer_logits="always"):
        yield


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids, target=None):
        logits = self.head(self.embedding(ids).tanh())
        return logits if target is None else (F.cross_entropy(logits.float(), target), logits)


def problem():
    model = Model().to(DEVICE, torch.bfloat16)
    ids = torch.arange(ROWS, device=DEVICE) * 31 % VOCABULARY
    return model, ids, ids.roll(-1)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def assert_near(ours, theirs):
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.dtype == their.dtype
        assert relative_error(mine, their) < TOLERANCE


def test_beside_a_loss():
    model, ids, target = problem()
    loss, logits = torch.compile(model)(ids, target)
    expected_loss, expected = model(ids, target)
    assert_near(gradients(model, loss), gradients(model, expected_loss))
    assert logits.is_deferred
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-4)
    assert_near([logits[:7]], [expected[:7]])
    assert logits.is_deferred
    assert_near([logits + 0], [expected])


LOSSES = {
    "cross_entropy": lambda z, target: F.cross_entropy(z.float(), target),
    "log-probabilities": lambda z, target: -z.float().log_softmax(-1).gather(-1, target[:, None]),
    "z-loss": lambda z, target: z.float().logsumexp(-1).pow(2),
    "entropy": lambda z, target: -(z.float().softmax(-1) * z.float().log_softmax(-1)).sum(-1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_eager_code(name):
    model, ids, target = problem()
    logits = torch.compile(model)(ids)
    ours = LOSSES[name](logits, target).mean()
    theirs = LOSSES[name](model(ids), target).mean()
    assert_near([ours, *gradients(model, ours)], [theirs, *gradients(model, theirs)])
    assert logits.is_deferred


def test_losses_in_eager_code_run_templates(monkeypatch):
    """They are compiled for the first length and for all others, and do not wait for the host."""
    versions = []
    original = operators._compiled
    monkeypatch.setattr(operators, "_compiled", lambda *a: versions.append(a[0]) or original(*a))
    operators._versions.cache_clear()
    weight = torch.randn(VOCABULARY, HIDDEN, device=DEVICE, requires_grad=True)
    for rows in (512, 512, 300, 700, 700):
        hidden = torch.randn(rows, HIDDEN, device=DEVICE, requires_grad=True)
        target = torch.arange(rows, device=DEVICE)
        ours = cce_inductor.linear_cross_entropy(hidden, weight, target)
        theirs = F.cross_entropy(hidden @ weight.t(), target)
        for mine, their in zip(
            (ours, *torch.autograd.grad(ours, (hidden, weight))),
            (theirs, *torch.autograd.grad(theirs, (hidden, weight))),
            strict=True,
        ):
            assert relative_error(mine, their) < 1e-3
    assert versions == 2 * ["reduce_rows", "reduce_rows_backward"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cce_inductor.linear_cross_entropy(hidden, weight, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_accuracy():
    model, ids, _ = problem()
    logits = torch.compile(model)(ids)
    ours, theirs = logits.argmax(-1), model(ids).argmax(-1)
    assert logits.is_deferred
    assert (ours == theirs).float().mean() > 0.98  # the others are ties in bfloat16


def test_a_step_does_not_wait_for_the_host():
    model, ids, target = problem()
    compiled = torch.compile(model)

    def step():
        loss, logits = compiled(ids, target)
        loss.backward()
        return logits

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.is_deferred


def test_memory():
    model, ids, target = problem()
    many = ids.repeat(8)
    compiled = torch.compile(model)

    def peak():
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, logits = compiled(many, target.repeat(8))
        loss.backward()
        assert logits.is_deferred
        return torch.cuda.max_memory_allocated() - before

    peak()
    others = sum(parameter.nbytes for parameter in model.parameters()) + 16 * many.numel() * HIDDEN
    assert peak() < others + many.numel() * VOCABULARY * 2


def test_cuda_graphs():
    model, ids, target = problem()
    expected_loss, expected = model(ids, target)
    wanted = gradients(model, expected_loss)
    compiled = torch.compile(model, mode="reduce-overhead")

    def step():
        torch.compiler.cudagraph_mark_step_begin()
        loss, logits = compiled(ids, target)
        return torch.autograd.grad(loss, list(model.parameters())), logits

    for _ in range(4):
        ours, logits = step()
        assert_near(ours, wanted)
        assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.98
        assert logits.is_deferred
    step()
    with pytest.raises(RuntimeError, match="overwritten"):
        logits.norm()


def test_changed_weight():
    model, ids, target = problem()
    loss, logits = torch.compile(model)(ids, target)
    loss.backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()
    with pytest.raises(cce_inductor.StaleLogitsError, match="the weight"):
        logits.argmax(-1)


def test_other_homes():
    model, ids, _ = problem()
    expected = model(ids).cpu()
    for move in (
        lambda z: z.cpu(),
        lambda z: z.to("cpu", non_blocking=False),
        lambda z: torch.from_dlpack(z.detach()).cpu(),
        lambda z: z.detach().clone().cpu().pin_memory(),
    ):
        moved = move(torch.compile(model)(ids))
        assert moved.device.type == "cpu"
        assert_near([moved], [expected])
