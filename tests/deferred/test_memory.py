"""Deferred logits share memory with their views, whatever is changed in place."""

import threading

import pytest
import torch
from deferred_logits import TARGET, VOCABULARY, Head

from cce_inductor.deferred.memory import Memory

IN_PLACE = {
    "div_": lambda z: z.div_(2),
    "statement": lambda z: z.__imul__(3),
    "setitem": lambda z: z.__setitem__((..., slice(40, None)), -7.0),
    "masked_fill_": lambda z: z.masked_fill_(torch.arange(VOCABULARY) > 40, -3.0),
    "of a view": lambda z: z.view(-1, VOCABULARY)[2:4].zero_(),
    "of rows": lambda z: z[:, -1].mul_(2),
    "of a diagonal": lambda z: z.diagonal(0, 1, 2).add_(1),
    "of the diagonal of a matrix": lambda z: z.flatten(0, 1).diagonal().add_(1),
    "out": lambda z: torch.mul(z.detach(), 2, out=z.detach()),
    "copy_": lambda z: z.copy_(torch.ones_like(z)),
    "scatter_": lambda z: z.scatter_(-1, TARGET[..., None], 0.5),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_changed_in_place(change):
    """Views, copies and gradients behave as for a plain tensor."""
    outcomes = []
    head = Head(bias=True)
    for logits in (head.deferred(), head.plain()):
        before = logits.clone()
        view, rows = logits.view(-1, VOCABULARY), logits[:, -1]
        half = rows.float() * 0.5
        change(logits)
        assert logits._version > 0
        values = [logits, before, view, rows, half, logits[:, 1:].logsumexp(-1)]
        total = sum((value * (number + 1)).cumsum(-1).sum() for number, value in enumerate(values))
        gradients = torch.autograd.grad(total, head.leaves, retain_graph=True)
        outcomes.append([*(value.detach() + 0 for value in values), *gradients])
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_view_that_was_looked_at_follows_the_tensor():
    logits = Head().deferred()
    rows = logits[:, -1]
    rows.norm()
    assert logits.is_deferred
    with torch.no_grad():
        logits.zero_()
    assert rows.norm() == 0
    with torch.no_grad():
        rows.fill_(1)
    assert logits.sum() == rows.numel()


RESHAPED = {
    "transpose_": lambda z: z.transpose_(0, 2),
    "swapaxes_": lambda z: z.swapaxes_(0, 1),
    "unsqueeze_": lambda z: z.unsqueeze_(0),
    "squeeze_": lambda z: z.squeeze_(),
    "resize_": lambda z: z.resize_(7, 10),
    "as_strided_": lambda z: z.as_strided_((2, 2), (1, 3)),
    "set_": lambda z: z.set_(torch.ones(3)),
    "data": lambda z: setattr(z, "data", torch.ones(z.shape)),
}


@pytest.mark.parametrize("looked", [False, True], ids=["", "looked at"])
@pytest.mark.parametrize("change", RESHAPED.values(), ids=RESHAPED)
def test_reshaped_in_place(change, looked):
    """Views that were taken earlier keep their shape and memory."""
    outcomes = []
    head = Head()
    for logits in (head.deferred().detach(), head.plain().detach()):
        rows, flat = logits[0], logits.view(-1)
        last = rows[-1]
        if looked:
            rows.norm()
        change(logits)
        flat[:3] = 9
        outcomes.append([value + 0 for value in (logits, rows, flat, last)])
        assert logits.shape == outcomes[-1][0].shape
    torch.testing.assert_close(*outcomes)


def test_data_of_another_shape_is_an_error():
    with pytest.raises(RuntimeError, match="must have the same shape"):
        Head().deferred().detach().data = torch.ones(3)


def test_a_view_without_gradient_after_a_change():
    head = Head()
    outcomes = []
    for logits in (head.deferred(), head.plain()):
        with torch.no_grad():
            rows = logits[0]
        logits.mul_(2)
        outcomes.append((rows.tolist(), rows.data_ptr() != 0, list(rows.shape)))
    assert outcomes[0][1:] == outcomes[1][1:]
    torch.testing.assert_close(torch.tensor(outcomes[0][0]), torch.tensor(outcomes[1][0]))


def test_threads_compute_once():
    head = Head()
    logits = head.deferred()
    computed = []
    original = Memory._compute

    def counted(self):
        computed.append(self)
        return original(self)

    results = []
    barrier = threading.Barrier(8)

    def look():
        barrier.wait()
        results.append(logits.norm().item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Memory, "_compute", counted)
        threads = [threading.Thread(target=look) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(computed) == 1
    assert len(set(results)) == 1
