"""A head with deferred or plain logits, and functions of logits, for the tests in this folder."""

import torch
import torch.nn.functional as F

from cce_inductor.deferred.tensor import defer
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
    "the others of a target": lambda z: torch.where(
        F.one_hot(TARGET, VOCABULARY).bool(), -torch.inf, z - z.gather(-1, TARGET[..., None])
    ).logsumexp(-1),
    "unbound": lambda z: F.cross_entropy(z.unbind(0)[0], TARGET[0]),
}


def optimizer_step(head):
    with torch.no_grad():
        head.weight.add_(1e-3)
