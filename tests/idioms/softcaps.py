"""Logits that are bounded before the loss."""

import torch
import torch.nn.functional as F
from torch import nn

from .corpus import (
    HIDDEN,
    VOCABULARY,
    Body,
    bias,
    hidden,
    labels,
    rewritten,
    weight,
)


def cross_entropy(logits, targets, **options):
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), **options)


@rewritten(hidden(), weight(), labels())
def gemma2(x, weight, labels):
    logits = F.linear(x, weight)
    logits = logits / 30.0
    logits = torch.tanh(logits)
    logits = logits * 30.0
    return cross_entropy(logits.float(), labels)


@rewritten(hidden(), weight(48, HIDDEN), labels(ignored=-1))
def nanochat(x, weight, targets):
    """The vocabulary is padded: sliced, cast, and capped at 15."""
    softcap = 15
    logits = F.linear(x, weight)
    logits = logits[..., :VOCABULARY]
    logits = logits.float()
    logits = softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits, targets, ignore_index=-1, reduction="mean")


@rewritten(hidden(), weight(48, HIDDEN), labels())
def xlstm(x, weight, labels):
    """Capped in float32 first, sliced afterwards."""
    logits = F.linear(x, weight).float()
    logits = 30.0 * torch.tanh(logits / 30.0)
    logits = logits[..., :VOCABULARY]
    return cross_entropy(logits.contiguous().float(), labels)


@rewritten(hidden(1, 12, HIDDEN), weight(), labels(12))
def modded_nanogpt_sigmoid(x, weight, targets):
    logits = F.linear(x, weight).float()
    logits = 30 * torch.sigmoid(logits / 7.5)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets, reduction="sum")


@rewritten(hidden(1, 12, HIDDEN), weight(), labels(12))
def modded_nanogpt_shifted_sigmoid(x, weight, targets):
    logits = F.linear(x, weight)
    logits = 23 * torch.sigmoid((logits + 5) / 7.5)
    return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets)


@rewritten(hidden(1, 12, HIDDEN), weight(), labels(12))
def modded_nanogpt_sigmoid_of_scaled(x, weight, targets):
    """The scale depends on the width."""
    logits = F.linear(x, weight).float()
    logits = 30 * torch.sigmoid(logits / (7.5 * x.size(-1) ** 0.5))
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets)


@rewritten(hidden(1, 12, HIDDEN), weight(), labels(12))
def modded_nanogpt_rsqrt(x, weight, targets):
    logits = F.linear(x, weight).float()
    logits = 15 * logits * torch.rsqrt(logits.square() + 225)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets)


@rewritten(labels(), labels())
class CapOfTheConfiguration(nn.Module):
    """A cap that may be None, in a function beside the model."""

    def __init__(self, cap=20.0):
        super().__init__()
        self.body = Body()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.cap = cap

    def soft_cap(self, x):
        return x if self.cap is None else x.div(self.cap).tanh().mul(self.cap)

    def forward(self, ids, labels):
        return cross_entropy(self.soft_cap(self.lm_head(self.body(ids))), labels)


@rewritten(hidden(), weight(), labels())
def cap_in_a_buffer(x, weight, labels):
    """A cap that is a tensor of one number."""
    cap = torch.tensor(20.0)
    logits = F.linear(x, weight)
    return cross_entropy(cap * torch.tanh(logits / cap), labels)


@rewritten(hidden(), weight(), bias(), labels())
def cap_after_scale_and_bias(x, weight, bias, labels):
    logits = F.linear(x, weight, bias) * 0.25
    return cross_entropy(10 * F.tanh(logits / 10), labels)


@rewritten(hidden(), weight(), labels())
def clamped(x, weight, labels):
    """A hard cap: no gradient beyond it."""
    logits = torch.clamp(F.linear(x, weight), min=-3.0, max=3.0)
    return cross_entropy(logits, labels)


@rewritten(hidden(), weight(), labels())
def cap_and_z_loss(x, weight, labels):
    logits = 15 * torch.tanh(F.linear(x, weight).float() / 15)
    lse = torch.logsumexp(logits, dim=-1)
    return cross_entropy(logits, labels) + 1e-2 * lse.square().mean()


@rewritten(hidden(), weight(), labels())
def softsign_cap(x, weight, labels):
    logits = F.linear(x, weight)
    return cross_entropy(logits / (1 + logits.abs() / 20), labels)


@rewritten(hidden(dtype=torch.bfloat16), weight(dtype=torch.bfloat16), labels())
def cap_in_bfloat16(x, weight, labels):
    """Gemma 2 as it is trained: the cap is applied to bfloat16 logits."""
    logits = F.linear(x, weight)
    logits = torch.tanh(logits / 30.0) * 30.0
    return cross_entropy(logits.float(), labels)
