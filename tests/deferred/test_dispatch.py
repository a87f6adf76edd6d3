"""ATen operators on deferred logits: which results stay deferred, and what computes the values."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from deferred_logits import (
    BATCH,
    LENGTH,
    STAYING_DEFERRED,
    TARGET,
    VOCABULARY,
    Head,
    assert_as_accurate,
)

from cce_inductor.deferred.tensor import DeferredLogits


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("change", STAYING_DEFERRED.values(), ids=STAYING_DEFERRED)
def test_stays_deferred(change, bias):
    """The result is deferred, and its shape, values and gradients are right."""
    head = Head(bias=bias)
    logits = head.deferred()
    changed, plain = change(logits), change(head.plain())
    assert isinstance(changed, DeferredLogits)
    assert logits.is_deferred
    assert changed.is_deferred
    assert (changed.shape, changed.dtype) == (plain.shape, plain.dtype)
    assert changed.stride() == plain.stride()
    assert changed.requires_grad == plain.requires_grad
    assert changed.storage_offset() == plain.storage_offset()
    numbers = changed._values()
    assert type(numbers) is torch.Tensor
    assert numbers.stride() == plain.stride()
    torch.testing.assert_close(numbers, plain.detach(), rtol=1e-5, atol=1e-5)
    if changed.requires_grad:
        assert_as_accurate(lambda z: change(z).double().pow(2).cumsum(0), bias=bias, computed=None)


ROWS_ONLY = ["rows", "one row", "index of rows", "mask", "narrow", "rows flattened"]


@pytest.mark.parametrize("name", ROWS_ONLY)
def test_few_rows_are_computed_alone(name):
    logits = Head().deferred()
    changed = STAYING_DEFERRED[name](logits)
    changed._values()
    assert logits.is_deferred


TAKEN = {
    "cpu": lambda z: z.cpu(),
    "detached": lambda z: z.detach().cpu(),
    "float": lambda z: z.float().cpu(),
    "to": lambda z: z.to("cpu", torch.float64).cpu(),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "tolist": lambda z: torch.tensor(z.tolist()),
    "item": lambda z: torch.tensor(z[0, 3].item()),
    "pickle": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "deepcopy": lambda z: copy.deepcopy(z.detach()),
    "sorted probabilities": lambda z: z.softmax(-1).sort(-1).values,
    "sampled": lambda z: (torch.manual_seed(0), torch.multinomial(z.softmax(-1), 2))[1],
    "sampled warmly": lambda z: (
        torch.manual_seed(0),
        torch.multinomial((z / 0.7).softmax(-1), 2),
    )[1],
    "finite": lambda z: z.isfinite().all(),
}


@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("no_grad", [False, True], ids=["", "no_grad"])
def test_few_rows_are_taken_alone(take, no_grad):
    with torch.set_grad_enabled(not no_grad):
        logits = Head().deferred()
        taken = take(logits[:, -1])
        expected = take(Head().plain()[:, -1])
        torch.testing.assert_close(taken, expected, rtol=1e-5, atol=1e-5)
    assert logits.is_deferred


def test_few_rows_that_were_taken_are_a_copy():
    logits = Head().deferred().detach()
    rows = logits[0]
    rows.numpy()[:] = 0
    expected = Head().plain()[0].detach()
    torch.testing.assert_close(rows + 0, expected, rtol=1e-5, atol=1e-5)
    rows.zero_()
    assert logits[0].eq(0).all()


def test_wrong_indices_are_an_error_at_once():
    logits = Head().deferred()
    for take in (
        lambda z: z[torch.tensor([2])],
        lambda z: z.index_select(1, torch.tensor([7])),
        lambda z: F.cross_entropy(z.flatten(0, 1), TARGET.flatten() + VOCABULARY),
    ):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            take(logits)
    assert logits.is_deferred
    with pytest.raises(NotImplementedError, match="bitwise_not"):
        logits.bitwise_not()
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        logits.view(7, -1)


COMPUTED = {
    "norm": lambda z: z.norm(),
    "sort": lambda z: z.sort(-1).values,
    "cumsum": lambda z: z.cumsum(-1),
    "std": lambda z: z.std(-1),
    "matmul": lambda z: z @ torch.ones(VOCABULARY, 3, dtype=z.dtype),
    "einsum": lambda z: torch.einsum("blv,bwv->blw", z, z),
    "cat": lambda z: torch.cat([z, z]),
    "stack": lambda z: torch.stack([z, z]),
    "entries": lambda z: z[..., 3] * 2,
    "columns": lambda z: z[:, :, torch.tensor([1, 2])],
    "dropout": lambda z: (torch.manual_seed(0), F.dropout(z, 0.5))[1],
    "noise": lambda z: (torch.manual_seed(0), F.rrelu(z, training=True))[1],
    "diagonal": lambda z: z.diagonal(0, 1, 2),
    "roll": lambda z: z.roll(1, 0),
    "as large": lambda z: (z + torch.ones(BATCH, LENGTH, VOCABULARY, dtype=z.dtype)).cumsum(0),
}


@pytest.mark.parametrize("fn", COMPUTED.values(), ids=COMPUTED)
def test_anything_else_computes(fn):
    assert_as_accurate(fn, bias=True, computed=True)


@pytest.mark.parametrize("kept", [True, False])
def test_long_chains(kept):
    head = Head()
    chain, plain = head.deferred(), head.plain()
    alive = []
    for _ in range(400):
        chain, plain = chain * 1.001, plain * 1.001
        if kept:
            alive.append(chain)
    assert chain.is_deferred
    torch.testing.assert_close(chain + 0, plain)


def test_averages_keep_few_hidden_states():
    heads = [Head() for _ in range(30)]
    for head in heads[1:]:
        head.weight = heads[0].weight
    total = 0
    for head in heads:
        total = total + head.deferred() / 30
    assert not getattr(total, "is_deferred", False)
    with torch.no_grad():
        torch.testing.assert_close(total + 0, Head().plain().detach())
        few = Head().deferred() + Head().deferred()
    assert few.is_deferred


def test_computed_once():
    head = Head()
    logits = head.deferred()
    logits.sort(-1)
    first = logits._values()
    logits.cumsum(0)
    (logits * 2).norm()
    assert logits._values() is first
    assert not logits.is_deferred


def test_new_tensors_of_its_kind_do_not_compute_it():
    logits = Head().deferred()
    assert torch.zeros_like(logits).sum() == 0
    assert logits.new_empty(3).shape == (3,)
    assert logits.is_deferred


def test_what_is_kept_is_not_given_away():
    """`dequantize` returns its argument. The result must not be the tensor that is kept."""
    logits = Head().deferred()
    kept = logits._values()
    assert logits.dequantize() is not kept
    assert not kept.requires_grad
    assert logits._values() is kept


def test_masks_have_the_shape_of_rows():
    for mask in (torch.tensor([True]), torch.zeros(BATCH, LENGTH + 1, dtype=torch.bool)):
        with pytest.raises(IndexError):
            Head().deferred()[mask]
    with pytest.raises(IndexError):
        Head().deferred()[:, torch.tensor([True, False])]
    none = Head().deferred()[torch.zeros(BATCH, LENGTH, dtype=torch.bool)]
    assert none.shape == (0, VOCABULARY)
    assert none.logsumexp(-1).shape == (0,)


def test_results_that_are_deferred():
    """``out=`` of a function with several results."""
    head = Head(requires_grad=False)
    outcomes = []
    for logits in (head.deferred()[..., 0].contiguous(), head.plain()[..., 0].contiguous()):
        index = torch.empty(BATCH, LENGTH, dtype=torch.int64)
        values, _ = torch.max(head.plain(), -1, out=(logits, index))
        assert values is logits
        outcomes.append([logits + 0, index])
    torch.testing.assert_close(*outcomes)
