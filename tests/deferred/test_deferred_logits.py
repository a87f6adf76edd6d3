"""DeferredLogits in eager code: what stays deferred, what is fused, what computes, and errors."""

import copy
import gc
import io
import pickle
import re
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import cce_inductor
from cce_inductor.deferred import cost, eager
from cce_inductor.deferred.autograd import with_strides
from cce_inductor.deferred.memory import Memory
from cce_inductor.deferred.tensor import DeferredLogits, defer
from cce_inductor.recipe.stale import StaleLogitsError
from cce_inductor.testing import relative_error

BATCH, LENGTH, HIDDEN, VOCABULARY = 2, 5, 8, 50
TARGET = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


class Head:
    """Leaves, and logits that are computed from them, deferred or not."""

    def __init__(self, *, bias=False, dtype=torch.float32, requires_grad=True):
        generator = torch.Generator().manual_seed(0)

        def leaf(*shape):
            value = torch.randn(shape, generator=generator).to(dtype)
            return torch.nn.Parameter(value, requires_grad=requires_grad)

        self.leaf = leaf(BATCH, LENGTH, HIDDEN)
        self.hidden = self.leaf * 1.0  # a result, as that of a compiled function
        self.weight = leaf(VOCABULARY, HIDDEN)
        self.bias = leaf(VOCABULARY) if bias else None

    @property
    def leaves(self):
        return [self.leaf, self.weight, *([] if self.bias is None else [self.bias])]

    def deferred(self):
        return defer(self.hidden, self.weight, self.bias, self.hidden.dtype)

    def plain(self):
        return F.linear(self.hidden, self.weight, self.bias)

    def exact(self):
        exact = Head.__new__(Head)
        exact.leaf = self.leaf.detach().double().requires_grad_(self.leaf.requires_grad)
        exact.hidden = exact.leaf * 1.0
        exact.weight = self.weight.detach().double().requires_grad_(self.weight.requires_grad)
        exact.bias = None
        if self.bias is not None:
            exact.bias = self.bias.detach().double().requires_grad_(self.bias.requires_grad)
        return exact


def assert_same_gradients(head, backward):
    """Check that `head` has the gradients that `backward` gives to a head with plain logits."""
    other = Head(bias=head.bias is not None)
    backward(other)
    for mine, theirs in zip(head.leaves, other.leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def value_and_gradients(head, fn, logits):
    value = fn(logits)
    value = value if isinstance(value, torch.Tensor) else sum(v.sum() for v in value)
    weights = torch.arange(1, value.numel() + 1).view(value.shape)
    total = (value * weights).sum()
    gradients = torch.autograd.grad(total, head.leaves, retain_graph=True, allow_unused=True)
    return [value.detach(), *gradients]


def assert_as_accurate(fn, *, bias=False, dtype=torch.float32, computed=False):
    """Check that `fn` is as accurate on deferred logits as on plain ones, against float64."""
    head = Head(bias=bias, dtype=dtype)
    logits = head.deferred()
    got = value_and_gradients(head, fn, logits)
    assert logits.is_deferred != computed
    want = value_and_gradients(head, fn, head.plain())
    exact_head = head.exact()
    exact = value_and_gradients(exact_head, fn, exact_head.plain())
    for mine, theirs, reference in zip(got, want, exact, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is None:
            continue
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        slack = 2 * torch.finfo(dtype).eps
        assert relative_error(mine, reference) <= 1.5 * relative_error(theirs, reference) + slack


STAYING_DEFERRED = {
    "view": lambda z: z.view(-1, VOCABULARY),
    "reshape": lambda z: z.reshape(LENGTH, BATCH, VOCABULARY),
    "flatten": lambda z: z.flatten(0, 1),
    "rows": lambda z: z[:, :-1],
    "ellipsis": lambda z: z[..., 1:, :],
    "one row": lambda z: z[:, -1],
    "one row kept": lambda z: z[:, -1:, :],
    "contiguous rows": lambda z: z[:, :-1].contiguous(),
    "rows flattened": lambda z: z[:, :-1].reshape(-1, VOCABULARY),
    "index": lambda z: z[torch.tensor([1, 0])],
    "index of rows": lambda z: z.view(-1, VOCABULARY)[torch.tensor([3, 3, 1])],
    "mask": lambda z: z[TARGET > 20],
    "index_select": lambda z: z.index_select(1, torch.tensor([0, 2])),
    "narrow": lambda z: z.narrow(1, 1, 2),
    "transpose": lambda z: z.transpose(0, 1),
    "permute": lambda z: z.permute(1, 0, 2),
    "channels first": lambda z: z.transpose(1, 2),
    "T": lambda z: z.view(-1, VOCABULARY).T,
    "mT": lambda z: z.mT,
    "unsqueeze": lambda z: z.unsqueeze(1),
    "squeeze": lambda z: z[:1].squeeze(0),
    "split": lambda z: z.split(2, dim=1)[1],
    "chunk": lambda z: z.chunk(2, dim=1)[0],
    "unbind": lambda z: z.unbind(0)[1],
    "iteration": lambda z: next(iter(z)),
    "float": lambda z: z.float(),
    "to": lambda z: z.to(torch.float64),
    "double": lambda z: z.double(),
    "bfloat16": lambda z: z.bfloat16(),
    "same device": lambda z: z.to("cpu"),
    "detach": lambda z: z.detach(),
    "clone": lambda z: z.clone(),
    "contiguous": lambda z: z.contiguous(),
    "expand": lambda z: z[:1].expand(3, LENGTH, VOCABULARY),
    "scaled": lambda z: z / 0.7,
    "softcap": lambda z: 30 * torch.tanh(z / 30),
    "masked vocabulary": lambda z: z.masked_fill(torch.arange(VOCABULARY) > 45, -1e9),
    "row mask": lambda z: torch.where((TARGET > 20)[..., None], z, 0.0),
    "log_softmax": lambda z: z.log_softmax(-1),
    "softmax": lambda z: F.softmax(z, dim=-1, dtype=torch.float32),
    "slice of the vocabulary": lambda z: z[..., :40],
}


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


def test_targets_that_a_loss_does_not_take():
    with pytest.raises(RuntimeError, match="Int"):
        F.cross_entropy(Head().deferred().flatten(0, 1), TARGET.flatten().int())


REDUCTIONS = {
    "cross_entropy": lambda z: F.cross_entropy(z.view(-1, VOCABULARY), TARGET.view(-1)),
    "module": lambda z: torch.nn.CrossEntropyLoss()(z.transpose(1, 2), TARGET),
    "shifted": lambda z: F.cross_entropy(
        z[:, :-1].reshape(-1, VOCABULARY).float(), TARGET[:, 1:].reshape(-1)
    ),
    "shifted and contiguous": lambda z: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, VOCABULARY), TARGET[:, 1:].reshape(-1)
    ),
    "ignored": lambda z: F.cross_entropy(
        z.flatten(0, 1), TARGET.flatten().masked_fill(TARGET.flatten() > 25, -100)
    ),
    "smoothed": lambda z: F.cross_entropy(
        z.flatten(0, 1), TARGET.flatten(), label_smoothing=0.1, reduction="sum"
    ),
    "per token": lambda z: F.cross_entropy(z.flatten(0, 1), TARGET.flatten(), reduction="none"),
    "masked rows": lambda z: F.cross_entropy(z[TARGET > 20], TARGET[TARGET > 20]),
    "nll": lambda z: F.nll_loss(z.log_softmax(-1).flatten(0, 1), TARGET.flatten()),
    "log-probabilities": lambda z: z.log_softmax(-1).gather(-1, TARGET[..., None]).squeeze(-1),
    "temperature": lambda z: (z / 0.7).log_softmax(-1).gather(-1, TARGET[..., None]),
    "selective": lambda z: z.gather(-1, TARGET[..., None]).squeeze(-1) - z.logsumexp(-1),
    "label smoother": lambda z: (-z.log_softmax(-1)).sum(-1, keepdim=True),
    "logsumexp": lambda z: torch.logsumexp(z, -1),
    "z-loss": lambda z: z.logsumexp(-1).pow(2).mean(),
    "entropy": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "max": lambda z: z.max(-1).values,
    "amax": lambda z: z.amax(-1),
    "topk": lambda z: z.topk(3).values,
    "softcapped": lambda z: F.cross_entropy(
        (30 * torch.tanh(z / 30)).flatten(0, 1), TARGET.flatten()
    ),
    "kl_div": lambda z: F.kl_div(
        z.log_softmax(-1),
        torch.full((BATCH, LENGTH, VOCABULARY), 0.02, dtype=z.dtype),
        reduction="sum",
    ),
    "channels first": lambda z: F.cross_entropy(z.transpose(1, 2), TARGET),
    "mean": lambda z: z.mean(-1),
    "unbound": lambda z: F.cross_entropy(z.unbind(0)[0], TARGET[0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
def test_fused(reduce, dtype):
    assert_as_accurate(reduce, dtype=dtype)
    assert_as_accurate(reduce, dtype=dtype, bias=True)


INDICES = {
    "argmax": lambda z: z.argmax(-1),
    "torch.argmax": lambda z: torch.argmax(z.view(-1, VOCABULARY), dim=1),
    "max": lambda z: z.max(dim=-1).indices,
    "topk": lambda z: z.topk(4).indices,
    "argmin": lambda z: z.argmin(-1),
    "accuracy": lambda z: (z[:, :-1].argmax(-1) == TARGET[:, 1:]).float().mean(),
}


@pytest.mark.parametrize("reduce", INDICES.values(), ids=INDICES)
def test_indices(reduce):
    head = Head()
    logits = head.deferred()
    got = reduce(logits)
    assert type(got) is torch.Tensor
    assert logits.is_deferred
    assert torch.equal(got, reduce(head.plain()))


def test_argmax_of_logits_whose_gradient_is_observed():
    logits = Head().deferred()
    logits.register_hook(lambda gradient: None)
    assert not logits.argmax(-1).requires_grad
    assert torch.argmin(logits, -1).shape == (BATCH, LENGTH)
    assert logits.is_deferred


def test_namedtuples():
    head = Head()
    values, indices = got = head.deferred().max(-1)
    assert type(got) is torch.return_types.max
    assert type(head.deferred().topk(2)) is torch.return_types.topk
    torch.testing.assert_close(values, head.plain().max(-1).values)
    assert torch.equal(indices, head.plain().max(-1).indices)


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


def test_the_workspace_is_that_of_the_options(monkeypatch):
    seen = []
    original = eager.reduce_all
    monkeypatch.setattr(
        eager, "reduce_all", lambda graph, options: seen.append(options) or original(graph, options)
    )
    with cce_inductor.installed(workspace_bytes=12345):
        Head().deferred().logsumexp(-1)
    assert seen[0].workspace_bytes == 12345


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


def test_values_computed_under_no_grad_keep_the_gradient():
    head = Head()
    logits = head.deferred()
    with torch.no_grad():
        logits.norm()
    with torch.inference_mode():
        logits.std()
    logits.norm().backward()
    assert_same_gradients(head, lambda other: other.plain().norm().backward())


def test_plain():
    """`plain` returns a plain tensor with the same memory and gradient."""
    head = Head()
    logits = head.deferred()
    plain = logits.plain()
    assert type(plain) is torch.Tensor
    assert not logits.is_deferred
    assert plain.data_ptr() == logits.data_ptr()
    plain.norm().backward()
    assert_same_gradients(head, lambda other: other.plain().norm().backward())


def test_only_users_methods_are_public():
    public = {name for name in dir(DeferredLogits) if not name.startswith("_")}
    assert public - set(dir(torch.Tensor)) == {"is_deferred", "plain"}


def test_without_gradient():
    head = Head(requires_grad=False)
    logits = head.deferred()
    assert not logits.requires_grad
    assert logits.grad_fn is None
    loss = F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())
    assert not loss.requires_grad
    assert logits.is_deferred


def test_what_a_tensor_says_without_being_computed():
    logits = Head().deferred()
    assert isinstance(logits, torch.Tensor)
    assert torch.is_tensor(logits)
    assert logits.shape == (BATCH, LENGTH, VOCABULARY)
    assert logits.size(-1) == VOCABULARY
    assert (logits.dim(), logits.ndim, len(logits), logits.numel()) == (3, 3, BATCH, 500)
    assert (logits.dtype, logits.device, logits.layout) == (
        torch.float32,
        torch.device("cpu"),
        torch.strided,
    )
    assert logits.stride() == (LENGTH * VOCABULARY, VOCABULARY, 1)
    assert logits.is_contiguous()
    assert logits.is_floating_point()
    assert (logits.nbytes, logits.itemsize, logits.element_size()) == (2000, 4, 4)
    assert logits.requires_grad
    assert not logits.is_leaf
    assert logits.grad_fn is not None
    assert logits._version == 0
    assert logits.is_deferred
    assert (
        repr(logits)
        == str(logits)
        == f"{logits}"
        == (
            "DeferredLogits(shape=(2, 5, 50), dtype=torch.float32, device='cpu', requires_grad=True, "
            "not computed)"
        )
    )
    assert repr([logits]) == f"[{logits}]"
    assert logits.is_deferred
    logits.norm()
    assert repr(logits).startswith("tensor([[[")


def test_new_tensors_of_its_kind_do_not_compute_it():
    logits = Head().deferred()
    assert torch.zeros_like(logits).sum() == 0
    assert logits.new_empty(3).shape == (3,)
    assert logits.is_deferred


def test_strides():
    logits = Head().deferred()
    strides = (LENGTH * VOCABULARY * 2, VOCABULARY * 2, 1)
    other = with_strides(logits, strides)
    assert other.stride() == strides
    assert logits.is_deferred
    assert with_strides(logits, logits.stride()) is logits
    assert other._values().stride() == strides
    assert torch.equal(other._values(), logits._values())
    assert_as_accurate(lambda z: with_strides(z, strides).logsumexp(-1))
    assert_as_accurate(lambda z: with_strides(z, strides).cumsum(-1), computed=True)


# Changes in place


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


# Observed gradients


def test_retained_gradient():
    head = Head()
    logits = head.deferred()
    logits.retain_grad()
    F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()).backward()
    theirs = Head().plain()
    theirs.retain_grad()
    F.cross_entropy(theirs.flatten(0, 1), TARGET.flatten()).backward()
    torch.testing.assert_close(logits.grad, theirs.grad)


def test_hook():
    head = Head()
    logits = head.deferred()
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.shape) or grad * 2)
    F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()).backward()
    assert seen == [logits.shape]

    def twice(other):
        (2 * F.cross_entropy(other.plain().flatten(0, 1), TARGET.flatten())).backward()

    assert_same_gradients(head, twice)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_hooks_of_modules():
    for register in ("register_full_backward_hook", "register_backward_hook"):
        seen = []

        class Projection(torch.nn.Module):
            def forward(self, hidden, logits):
                return logits

        module, head = Projection(), Head()
        hook = lambda module, inward, outward: seen.append(outward[0].shape)  # noqa: B023, E731
        getattr(module, register)(hook)
        logits = module(head.hidden, head.deferred())
        F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()).backward()
        assert seen == [logits.shape]


def test_gradient_of_the_logits():
    head = Head()
    logits = head.deferred()
    logits.retain_grad()
    loss = F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())
    (gradient,) = torch.autograd.grad(loss, logits)
    theirs = head.plain()
    expected = torch.autograd.grad(F.cross_entropy(theirs.flatten(0, 1), TARGET.flatten()), theirs)[
        0
    ]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "ask",
    [
        lambda logits, loss: torch.autograd.grad(loss, logits),
        lambda logits, loss: torch.autograd.grad(loss, inputs=[logits], allow_unused=True),
        lambda logits, loss: logits.retain_grad(),
        lambda logits, loss: logits.register_hook(print),
    ],
)
def test_gradient_that_a_loss_has_bypassed(ask):
    logits = Head().deferred()
    loss = F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())
    with pytest.raises(RuntimeError, match=r'defer_logits="never"'):
        ask(logits, loss)


def test_a_leaf_made_of_them_gets_its_gradient():
    """Chunked losses detach the logits, compute a gradient there, and pass it on."""
    head = Head()
    logits = head.deferred()
    leaf = logits.detach().requires_grad_()
    assert leaf.is_leaf
    F.cross_entropy(leaf.flatten(0, 1), TARGET.flatten()).backward()
    logits.backward(leaf.grad)

    def whole(other):
        F.cross_entropy(other.plain().flatten(0, 1), TARGET.flatten()).backward()

    assert_same_gradients(head, whole)


def test_torch_autograd_backward():
    head = Head()
    grad = torch.ones(BATCH, LENGTH, VOCABULARY)
    torch.autograd.backward(head.deferred(), grad)
    assert_same_gradients(head, lambda other: torch.autograd.backward(other.plain(), grad))


def test_what_is_detached_halfway_stays_detached():
    def fn(z):
        with torch.no_grad():
            p = z.softmax(-1)
        return (p * z).sum(-1)

    assert_as_accurate(fn)
    assert_as_accurate(lambda z: (z.detach().softmax(-1) * z).sum(-1))

    def view_without_gradient(z):
        with torch.no_grad():
            rows = z.view(-1, VOCABULARY)
        return rows.logsumexp(-1).sum() + z.logsumexp(-1).sum()

    # Such a view is a leaf: gradients end there.
    assert_as_accurate(view_without_gradient, computed=True)

    def function_of_a_view_without_gradient(z):
        with torch.no_grad():
            rows = z.view(-1, VOCABULARY)
        return (rows * 2).logsumexp(-1).sum() + z.logsumexp(-1).sum()

    assert_as_accurate(function_of_a_view_without_gradient, computed=True)


def test_what_is_kept_is_not_given_away():
    """`dequantize` returns its argument. The result must not be the tensor that is kept."""
    logits = Head().deferred()
    kept = logits._values()
    assert logits.dequantize() is not kept
    assert not kept.requires_grad
    assert logits._values() is kept


def test_checkpoint_that_meets_a_loss_for_the_first_time():
    """A checkpoint counts the tensors that are saved for the backward."""
    head = Head()
    logits = head.deferred()

    def loss(logits):
        return F.cross_entropy(logits[1:].flatten(0, 1), TARGET[1], label_smoothing=0.123)

    checkpoint(loss, logits, use_reentrant=False).backward()
    assert logits.is_deferred
    assert_same_gradients(head, lambda other: loss(other.plain()).backward())


def test_second_derivative():
    outcomes = []
    for make in (Head.deferred, Head.plain):
        head = Head()
        logits = make(head)
        (first,) = torch.autograd.grad(
            logits.pow(3).cumsum(-1).sum(), head.weight, create_graph=True
        )
        outcomes.append(torch.autograd.grad(first.pow(2).sum(), head.leaves))
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-2)


# Autograd functions and hooks of users


class Reversed(torch.autograd.Function):
    """Gradient reversal, used in domain adaptation."""

    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, grad: -grad)


class Itself(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x)
    backward = staticmethod(lambda ctx, grad: 3 * grad)


class StraightThrough(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.round())
    backward = staticmethod(lambda ctx, grad: grad)


class Copied(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, grad: 3 * grad)


def doubled_by_module(z):
    module = torch.nn.Identity()
    module.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    return module(z)


def doubled_before_module(z):
    module = torch.nn.Identity()
    module.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))
    return module(z)


def doubled_by_node(z):
    z.grad_fn.register_prehook(lambda grads: (grads[0] * 2,))
    return z


def doubled_by_later_node(z):
    doubled = z * 1
    doubled.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * 2, *inputs[1:]))
    return doubled


OWN_GRADIENTS = {
    "reversed": Reversed.apply,
    "itself": Itself.apply,
    "copied": Copied.apply,
    "straight through": StraightThrough.apply,
    "module hook": doubled_by_module,
    "module prehook": doubled_before_module,
    "node prehook": doubled_by_node,
    "node hook": doubled_by_later_node,
    "checkpoint": lambda z: checkpoint(lambda x: x.tanh() * 2, z, use_reentrant=False),
    "reentrant checkpoint": lambda z: checkpoint(lambda x: x.tanh() * 2, z, use_reentrant=True),
}


@pytest.mark.parametrize("change", OWN_GRADIENTS.values(), ids=OWN_GRADIENTS)
def test_gradients_of_users(change):
    outcomes = []
    for make in (Head.deferred, Head.plain):
        head = Head()
        logits = make(head)
        loss = F.cross_entropy(change(logits)[:, 1:].flatten(0, 1), TARGET[:, 1:].flatten())
        (loss + F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())).backward()
        outcomes.append([leaf.grad for leaf in head.leaves])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-6)


def test_an_in_place_change_makes_a_new_gradient():
    """No loss has bypassed the gradient of the modified logits."""
    outcomes = []
    for make in (Head.deferred, Head.plain):
        head = Head()
        logits = make(head)
        loss = F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())
        logits.mul_(2)
        logits.retain_grad()
        (logits.cumsum(0).sum() + loss).backward()
        outcomes.append([logits.grad, *(leaf.grad for leaf in head.leaves)])
    torch.testing.assert_close(*outcomes)


# Shapes and memory


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


def test_masks_have_the_shape_of_rows():
    for mask in (torch.tensor([True]), torch.zeros(BATCH, LENGTH + 1, dtype=torch.bool)):
        with pytest.raises(IndexError):
            Head().deferred()[mask]
    with pytest.raises(IndexError):
        Head().deferred()[:, torch.tensor([True, False])]
    none = Head().deferred()[torch.zeros(BATCH, LENGTH, dtype=torch.bool)]
    assert none.shape == (0, VOCABULARY)
    assert none.logsumexp(-1).shape == (0,)


def test_constants_that_are_equal_but_not_the_same():
    head = Head()
    for fn in (
        lambda z: z.copysign(0.0).sum(-1),
        lambda z: z.copysign(-0.0).sum(-1),
        lambda z: ((z > 0) * 1).sum(-1),
        lambda z: ((z > 0) * 1.0).sum(-1),
        lambda z: ((z > 0) * True).amax(-1),
        lambda z: ((z > 0) * 1).amax(-1),
    ):
        torch.testing.assert_close(fn(head.deferred()), fn(head.plain()))


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


def test_inference_mode_after_training():
    head = Head()
    logits = head.deferred()
    with torch.inference_mode():
        for change in STAYING_DEFERRED.values():
            changed = change(logits)
            assert changed.is_deferred
            if changed.shape[-1] == VOCABULARY:
                assert torch.equal(changed.argmax(-1), change(head.plain()).argmax(-1))
        assert logits.is_deferred
    F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()).backward()
    assert_same_gradients(
        head,
        lambda other: F.cross_entropy(other.plain().flatten(0, 1), TARGET.flatten()).backward(),
    )


def test_metrics_after_inference_mode():
    head = Head()
    with torch.inference_mode():
        logits = defer(head.leaf * 1.0, head.weight, None, torch.float32)
    rows, expected = logits.flatten(0, 1), head.plain().flatten(0, 1)
    for name in ("cross_entropy", "entropy", "topk", "max"):
        got = REDUCTIONS[name](logits)
        assert not got.requires_grad
        torch.testing.assert_close(got, REDUCTIONS[name](head.plain()).detach())
    assert torch.equal(rows.argmax(-1), expected.argmax(-1))
    student = head.deferred().flatten(0, 1)
    total = F.cross_entropy(student + rows, TARGET.flatten())
    total.backward()
    assert_same_gradients(
        head,
        lambda other: F.cross_entropy(
            other.plain().flatten(0, 1) + expected.detach(), TARGET.flatten()
        ).backward(),
    )


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


# Tensors that logits are computed from


def optimizer_step(head):
    with torch.no_grad():
        head.weight.add_(1e-3)


CHANGES = {
    "optimizer": (optimizer_step, "the weight"),
    "data": (lambda head: head.weight.data.mul_(1.01), "the weight"),
    "kernel": (lambda head: head.weight.detach().numpy().__imul__(1.01), "the weight"),
    "bias": (lambda head: head.bias.data.add_(1), "the bias"),
    "hidden": (lambda head: head.hidden.detach().zero_(), "the hidden state"),
    "freed": (lambda head: head.weight.untyped_storage().resize_(0), "the weight"),
}


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    "look",
    [
        lambda z: z.norm(),
        lambda z: z.argmax(-1),
        lambda z: F.cross_entropy(z.flatten(0, 1), TARGET.flatten()),
        lambda z: z[:, -1].tolist(),
        lambda z: z.float().cpu(),
        lambda z: pickle.dumps(z),
    ],
    ids=["norm", "argmax", "loss", "rows", "cpu", "pickle"],
)
def test_changed_since(change, name, look):
    head = Head(bias=True)
    logits = head.deferred()
    change(head)
    with pytest.raises(StaleLogitsError) as error:
        look(logits)
    assert re.search(rf"and {name}, which they are computed from, was .* since", str(error.value))
    assert 'defer_logits="never"' in str(error.value)


def test_a_frozen_weight_that_changed():
    """Merging an adapter or averaging weights does not count a version."""
    head = Head(requires_grad=False)
    logits = head.deferred()
    head.weight.data.add_(1)
    with pytest.raises(StaleLogitsError, match="the weight"):
        logits.argmax(-1)


def test_rows_and_columns_of_data():
    weight = torch.nn.Parameter(torch.randn(4000, 24))
    for change in [(0,), (7,), (2503,), (3999,), (..., 0), (..., 11), (..., 23)]:
        for matrix in (weight, torch.nn.Parameter(weight.detach().t().clone().t())):
            logits = defer(torch.randn(3, 24), matrix, None, torch.float32)
            matrix.data[change] += 1
            with pytest.raises(StaleLogitsError, match="the weight"):
                logits.argmax(-1)


OPERAND_LOOKS = {
    "rows": lambda z: z[:, -1].sum(),
    "mask": lambda z: z[TARGET > 3].sum(),
    "argmax": lambda z: z.argmax(-1),
    "detached": lambda z: z.detach().norm(),
    "loss": lambda z: F.cross_entropy(z.flatten(0, 1), TARGET.flatten()),
}


@pytest.mark.parametrize("look", OPERAND_LOOKS.values(), ids=OPERAND_LOOKS)
@pytest.mark.parametrize("made", ["once", "with a change in place"])
def test_an_operand_with_a_gradient_that_changed(made, look):
    head = Head()
    factor = torch.full((VOCABULARY,), 2.0, requires_grad=True) * 1
    if made != "once":
        with torch.no_grad():
            factor.add_(1)
    logits, plain = head.deferred() * factor, head.plain() * factor
    torch.testing.assert_close(look(logits), look(plain))
    logits = head.deferred() * factor
    with torch.no_grad():
        factor.add_(1)
    with pytest.raises(StaleLogitsError, match=r"an operand, which .* was changed in place"):
        look(logits)


class OwnParameter(torch.nn.Parameter):
    pass


def test_a_parameter_of_somebody_elses_class():
    head = Head()
    head.weight = OwnParameter(head.weight.detach())
    logits = head.deferred()
    F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()).backward()
    assert head.weight.grad is not None
    assert logits.is_deferred
    optimizer_step(head)
    with pytest.raises(StaleLogitsError, match="the weight"):
        logits.norm()


def test_an_element_of_inference_mode_that_changed():
    """A tensor of inference mode has no version counter."""
    with torch.inference_mode():
        hidden = torch.randn(100, HIDDEN)
        logits = defer(hidden, Head().weight, None, torch.float32)
        hidden[37, 2] += 1
        with pytest.raises(StaleLogitsError, match="the hidden state"):
            logits[37].norm()


def test_gradients_are_wanted_when_the_logits_are_made():
    """``requires_grad`` of a weight may be switched after the logits were made."""
    head = Head()
    head.weight.requires_grad_(False)
    losses = []
    for logits in (head.deferred(), head.plain()):
        losses.append(F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()))
        head.weight.requires_grad_(True)
        losses.append(F.cross_entropy(logits.flatten(0, 1), TARGET.flatten(), reduction="sum"))
        losses[-1].backward(retain_graph=True)
        assert head.weight.grad is None
        head.weight.requires_grad_(False)
    torch.testing.assert_close(losses[:2], losses[2:])


def test_a_weight_that_was_replaced():
    """The old weight still exists, but a gradient would be the new one's."""
    head = Head()
    logits, expected = head.deferred(), head.plain().detach()
    head.weight.data = torch.zeros(VOCABULARY, HIDDEN)
    with pytest.raises(StaleLogitsError, match="the weight"):
        F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())
    torch.testing.assert_close(logits.detach() + 0, expected)


def test_computed_before_the_change():
    head = Head(bias=True)
    logits, expected = head.deferred(), head.plain().detach()
    logits.norm()
    optimizer_step(head)
    torch.testing.assert_close(logits.detach() + 0, expected)


def test_shape_after_the_change():
    head = Head()
    logits = head.deferred()
    optimizer_step(head)
    assert logits.view(-1, VOCABULARY).shape == (10, VOCABULARY)
    assert (logits.size(), logits.size(0)) == ((BATCH, LENGTH, VOCABULARY), BATCH)
    assert "not computed" in repr(logits)


def test_an_operand_may_change():
    """A pointwise function uses the values that its operand had when it was called."""
    head = Head()
    scale, rows = torch.full((VOCABULARY,), 2.0), torch.tensor([0, 1])
    logits = head.deferred()
    scaled, taken = logits * scale, logits[rows]
    scale.zero_()
    rows.zero_()
    torch.testing.assert_close(scaled + 0, head.plain() * 2)
    torch.testing.assert_close(taken + 0, head.plain()[:2])


def test_nan_weights_are_not_a_change():
    head = Head()
    with torch.no_grad():
        head.weight[0] = torch.nan
    assert head.deferred().isnan().any()


# Copies elsewhere


HOMES = {
    "pickle": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "deepcopy": lambda z: copy.deepcopy(z.detach()),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "array": lambda z: torch.from_numpy(__import__("numpy").asarray(z.detach())),
    "cpu": lambda z: z.cpu(),
    "dlpack": lambda z: torch.from_dlpack(z.detach()),
    "list": lambda z: torch.tensor(z.tolist()),
    "storage": lambda z: torch.tensor(list(z.contiguous().storage())).view(z.shape),
    "data": lambda z: z.data,
    "share_memory_": lambda z: z.detach().share_memory_().cpu(),
    "collate": lambda z: torch.utils.data.default_collate([z.detach()])[0],
}


@pytest.mark.parametrize("move", HOMES.values(), ids=HOMES)
@pytest.mark.parametrize("change", [lambda z: z, lambda z: z[:, 1:]], ids=["all", "rows"])
def test_other_homes(move, change):
    head = Head()
    moved = move(change(head.deferred()))
    assert type(moved) is torch.Tensor
    torch.testing.assert_close(moved.detach(), change(head.plain()).detach())


def test_function_that_bypasses_subclasses():
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(Head().deferred().detach())


def test_saved():
    head = Head()
    file = io.BytesIO()
    torch.save({"logits": head.deferred()}, file)
    file.seek(0)
    loaded = torch.load(file)["logits"]
    assert type(loaded) is torch.Tensor
    torch.testing.assert_close(loaded.detach(), head.plain().detach())


def test_deepcopy_of_a_result_is_the_same_error():
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(Head().deferred())
    with pytest.raises(RuntimeError, match="requires grad"):
        Head().deferred().numpy()


def test_pinning_is_the_same_error():
    def error(tensor):
        try:
            return type(tensor.pin_memory())
        except Exception as why:
            return type(why)

    head = Head(requires_grad=False)
    assert error(head.deferred()) == error(head.plain())


# Warnings


def warned(fn):
    cost._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fn()
    return [w for w in caught if "deferred logits are computed here" in str(w.message)]


def large():
    hidden, weight = torch.randn(1024, 4), torch.randn(5000, 4)
    return defer(hidden, weight, None, torch.float32)


def test_one_warning_for_each_place():
    def look():
        return large().norm()

    def looks():
        for _ in range(3):
            look()
        large().std()

    first, second = warned(looks)
    assert "1024x5000 float32, 19.53 MiB" in str(first.message)
    assert first.filename == second.filename == __file__
    assert first.lineno == look.__code__.co_firstlineno + 1
    assert second.lineno == looks.__code__.co_firstlineno + 3


def test_no_warning_for_what_is_cheap():
    assert not warned(lambda: large()[:3].norm())
    assert not warned(lambda: large().argmax(-1))
    assert not warned(lambda: Head().deferred().norm())


# References


def test_nothing_keeps_them_alive():
    """There are no reference cycles: the garbage collector is not needed."""
    gc.collect()
    gc.disable()
    try:
        head = Head()
        logits = head.deferred()
        derived = logits.view(-1, VOCABULARY).float()[1:] * 2
        F.cross_entropy(derived, TARGET.flatten()[1:])
        derived.norm()
        logits._values()
        alive = [weakref.ref(each) for each in (logits, derived, head.hidden)]
        alive.append(weakref.ref(logits._operation))
        del logits, derived
        head.hidden = None
        assert [each() for each in alive] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "keep",
    [lambda z: z.detach(), lambda z: z.detach()[:, -1], lambda z: z.argmax(-1)],
    ids=["all", "rows", "argmax"],
)
def test_what_is_detached_keeps_no_graph_of_autograd(keep):
    head = Head()
    activations = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True) * 1.0
    logits = defer(activations.sin(), head.weight, None, torch.float32)
    expected = keep(logits.detach().clone())
    activations = weakref.ref(activations)
    kept = keep(logits)
    del logits
    gc.collect()
    assert activations() is None
    torch.testing.assert_close(kept + 0, expected + 0)


def test_no_grad_keeps_no_graph_of_autograd():
    head = Head()
    activations = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True) * 1.0
    logits = defer(activations.sin(), head.weight, None, torch.float32)
    activations = weakref.ref(activations)
    with torch.no_grad():
        kept = logits.softmax(-1)
    del logits
    gc.collect()
    assert kept.is_deferred
    assert activations() is None


def test_no_leak_in_a_thousand_steps():
    def step():
        head = Head()
        logits = head.deferred()
        F.cross_entropy(
            logits[:, :-1].reshape(-1, VOCABULARY), TARGET[:, 1:].reshape(-1)
        ).backward()
        logits.argmax(-1)
        if step.number % 10 == 0:
            logits.norm()
        step.number += 1

    step.number = 0
    for _ in range(20):
        step()
    gc.collect()
    tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    plans = eager._reduction.cache_info().currsize
    for _ in range(1000):
        step()
    gc.collect()
    assert sum(isinstance(each, torch.Tensor) for each in gc.get_objects()) <= tensors
    assert eager._reduction.cache_info().currsize == plans


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


def test_threads_reduce():
    head = Head()
    expected = head.plain().logsumexp(-1).detach()
    results = []

    def reduce():
        for _ in range(20):
            results.append(head.deferred().logsumexp(-1).detach())

    threads = [threading.Thread(target=reduce) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for result in results:
        torch.testing.assert_close(result, expected)


# Transforms, autocast and inference mode


def test_functorch():
    head = Head()
    scale = torch.tensor(0.5)

    def gradient(logits):
        logits = logits.flatten(0, 1)
        return torch.func.grad(lambda s: F.cross_entropy(logits * s, TARGET.flatten()))(scale)

    torch.testing.assert_close(gradient(head.deferred()), gradient(head.plain()))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.vmap(lambda row: row.softmax(-1))(head.deferred()),
            torch.vmap(lambda row: row.softmax(-1))(head.plain()),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Under autocast, eager losses are computed in float32, as for plain logits."""
    head = Head(dtype=torch.float32)
    losses = []
    for logits in (defer(head.hidden, head.weight, None, dtype), None):
        with torch.autocast("cpu", dtype):
            logits = F.linear(head.hidden, head.weight) if logits is None else logits
            assert logits.dtype == dtype
            losses.append(F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()))
    mine, theirs = losses
    assert mine.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def test_inference_mode():
    with torch.inference_mode():
        head = Head(requires_grad=False)
        head.hidden = head.hidden + 0
        logits = head.deferred()
        assert logits.is_inference()
        assert torch.equal(logits.argmax(-1), head.plain().argmax(-1))
        for change in STAYING_DEFERRED.values():
            assert change(logits).is_deferred
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), TARGET[:, 1:].reshape(-1))
        assert loss.item() == pytest.approx(
            F.cross_entropy(
                head.plain()[:, :-1].reshape(-1, VOCABULARY), TARGET[:, 1:].reshape(-1)
            ).item()
        )
        assert logits.is_deferred
        torch.testing.assert_close(logits.sort(-1).values, head.plain().sort(-1).values)


@pytest.mark.parametrize(
    ("rows", "hidden", "vocabulary"), [((2,), 8, 0), ((2, 3), 8, 0), ((0,), 8, 5), ((2,), 0, 5)]
)
def test_gradients_of_sizes_of_0(rows, hidden, vocabulary):
    x = torch.randn(*rows, hidden, requires_grad=True)
    w = torch.randn(vocabulary, hidden, requires_grad=True)
    bias = torch.randn(vocabulary, requires_grad=True)
    found = [
        torch.autograd.grad(logits.exp().sum(), (x, w, bias))
        for logits in (defer(x, w, bias, torch.float32), F.linear(x, w, bias))
    ]
    torch.testing.assert_close(*found)
