"""Logits and losses that are changed in place."""

import torch
import torch.nn.functional as F

from .corpus import (
    BATCH,
    TIME,
    VOCABULARY,
    bias,
    hidden,
    labels,
    left_alone,
    mask,
    rewritten,
    weight,
)


def loss_of(logits, labels, **options):
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), **options)


@rewritten(hidden(), weight(), labels())
def softcap_in_place(x, weight, labels):
    logits = F.linear(x, weight)
    logits = logits.div_(30.0).tanh_() * 30.0
    return loss_of(logits.float(), labels)


@rewritten(hidden(), weight(), labels())
@torch.no_grad()
def softcap_in_place_without_gradient(x, weight, labels):
    """Evaluation: with gradients, eager refuses to change the result of tanh."""
    logits = F.linear(x, weight)
    logits = logits.div_(30.0).tanh_().mul_(30.0)
    return loss_of(logits.float(), labels)


@rewritten(hidden(), weight(), labels())
def softcap_by_statements(x, weight, labels):
    logits = F.linear(x, weight)
    logits /= 15.0
    torch.tanh_(logits)
    return loss_of(15.0 * logits, labels)


@rewritten(hidden(), weight(), labels())
def temperature_by_div_(x, weight, labels):
    """TRL and OpenRLHF: a statement whose result nobody reads."""
    logits = F.linear(x, weight)
    logits.div_(0.7)
    return loss_of(logits, labels)


@rewritten(hidden(), weight(), bias(), labels())
def bias_by_iadd(x, weight, bias, labels):
    logits = F.linear(x, weight)
    logits += bias
    return loss_of(logits, labels)


@rewritten(hidden(), weight(), labels(), mask())
def megatron_in_place(x, weight, labels, loss_mask):
    """The maximum is subtracted from the logits, and exp written into them."""
    logits = torch.matmul(x, weight.t()).float()
    largest = torch.max(logits, dim=-1)[0].detach()
    logits -= largest.unsqueeze(dim=-1)
    predicted = torch.gather(logits, -1, labels.unsqueeze(-1)).squeeze(-1)
    exp_logits = torch.exp(logits)
    losses = torch.log(exp_logits.sum(-1)) - predicted
    return (losses * loss_mask).sum() / loss_mask.sum()


@rewritten(hidden(), weight(), labels())
def clamp_in_place(x, weight, labels):
    logits = F.linear(x, weight)
    logits.clamp_(-4.0, 4.0)
    return loss_of(logits, labels)


@rewritten(hidden(), weight(), labels())
def several_tokens_forbidden(x, weight, labels):
    """Special tokens by a list of indices."""
    logits = F.linear(x, weight)
    logits[..., [33, 35]] = float("-inf")
    return loss_of(logits, labels.clamp(max=32))


@left_alone("used by", hidden(), weight(), labels(), mask())
def rows_set_to_zero(x, weight, labels, loss_mask):
    """Padding rows become constants."""
    logits = F.linear(x, weight)
    logits[loss_mask == 0] = 0.0
    return loss_of(logits, labels)


@left_alone("used by", hidden(), weight(), labels(), random=True)
def noise_in_place(x, weight, labels):
    logits = F.linear(x, weight)
    logits.add_(torch.randn_like(logits))
    return loss_of(logits, labels)


@left_alone(".", hidden(), weight(), labels())
def preallocated_logits(x, weight, labels):
    """Chunks of logits are written into one large buffer."""
    logits = torch.empty(BATCH, TIME, VOCABULARY)
    for start in range(0, TIME, 3):
        logits[:, start : start + 3] = F.linear(x[:, start : start + 3], weight)
    return loss_of(logits, labels)


@rewritten(hidden(), weight(), labels())
def changed_after_the_loss(x, weight, labels):
    """The mean loss is reported before the logits become something else in the same memory."""
    logits = F.linear(x, weight)
    with torch.no_grad():
        before = loss_of(logits, labels)
    after = loss_of(logits.mul_(0.5).sin_(), labels)
    return after, before


@rewritten(hidden(), weight(), labels(), mask())
def loss_changed_in_place(x, weight, labels, loss_mask):
    losses = loss_of(F.linear(x, weight), labels, reduction="none")
    losses *= loss_mask.view(-1)
    losses[0] = 0.0
    return losses.sum().div_(loss_mask.sum())


@rewritten(hidden(), weight(), labels())
def labels_changed_in_place(x, weight, labels):
    labels = labels.clone()
    logits = F.linear(x, weight)
    labels[labels == 3] = -100
    labels[:, -1].fill_(-100)
    return loss_of(logits, labels)


@rewritten(hidden(), weight(), labels())
def total_in_place(x, weight, labels):
    """A running total of two losses of the same logits."""
    logits = F.linear(x, weight)
    total = torch.zeros(())
    total += loss_of(logits, labels)
    total += 0.5 * loss_of(logits, labels.flip(0))
    return total
