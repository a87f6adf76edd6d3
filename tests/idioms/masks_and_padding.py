"""Tokens that do not count, and entries of the vocabulary that do not exist."""

import torch
import torch.nn.functional as F
from torch import nn

from .corpus import (
    BATCH,
    HIDDEN,
    TIME,
    VOCABULARY,
    hidden,
    labels,
    mask,
    number,
    real,
    rewritten,
    weight,
)

PADDED = 48


def absent():
    """Which entries of a padded vocabulary stand for no token."""
    return torch.arange(PADDED) >= VOCABULARY


@rewritten(hidden(), weight(PADDED, HIDDEN), labels())
def padded_vocabulary_set_to_minus_infinity(x, weight, labels):
    logits = F.linear(x, weight)
    logits[..., VOCABULARY:] = -float("inf")
    return F.cross_entropy(logits.view(-1, PADDED), labels.view(-1))


@rewritten(hidden(), weight(PADDED, HIDDEN), labels(), absent)
def padded_vocabulary_masked_fill(x, weight, labels, absent):
    logits = F.linear(x, weight).float().masked_fill(absent, float("-inf"))
    return F.cross_entropy(logits.view(-1, PADDED), labels.view(-1))


@rewritten(hidden(), weight(PADDED, HIDDEN), labels(), absent)
def padded_vocabulary_smallest_number(x, weight, labels, absent):
    logits = F.linear(x, weight)
    logits = logits.masked_fill(absent[None, None, :], torch.finfo(logits.dtype).min)
    return F.cross_entropy(logits.view(-1, PADDED), labels.view(-1))


@rewritten(hidden(), weight(PADDED, HIDDEN), labels(), absent)
def padded_vocabulary_where(x, weight, labels, absent):
    """EasyDeL and MaxText: a where over the vocabulary."""
    logits = F.linear(x, weight)
    logits = torch.where(absent, torch.full_like(logits, -1e10), logits)
    return F.cross_entropy(logits.view(-1, PADDED), labels.view(-1))


@rewritten(hidden(), weight(PADDED, HIDDEN), labels(), absent)
def padded_vocabulary_as_a_bias(x, weight, labels, absent):
    logits = F.linear(x, weight) + absent.float() * -1e9
    return F.cross_entropy(logits.view(-1, PADDED), labels.view(-1))


@rewritten(hidden(), weight(PADDED, HIDDEN), labels())
def padded_vocabulary_sliced_weight(x, weight, labels):
    logits = F.linear(x, weight[:VOCABULARY])
    return F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))


@rewritten(hidden(), weight(PADDED, HIDDEN), labels())
def padded_vocabulary_narrow(x, weight, labels):
    logits = F.linear(x, weight).narrow(-1, 0, VOCABULARY)
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), labels.view(-1))


@rewritten(hidden(), weight(), labels())
def one_token_forbidden(x, weight, labels):
    """The mask token may not be predicted."""
    logits = F.linear(x, weight)
    logits[:, :, 36] = -1e9
    return F.cross_entropy(logits.view(-1, VOCABULARY), labels.clamp(max=35).view(-1))


@rewritten(
    hidden(),
    weight(),
    labels(),
    lambda: torch.rand(BATCH, TIME, VOCABULARY) < 0.2,
)
def tokens_allowed_by_a_grammar(x, weight, labels, forbidden):
    """The mask is as large as the logits are."""
    logits = F.linear(x, weight)
    forbidden = forbidden.scatter(-1, labels.unsqueeze(-1), False)
    logits = logits.masked_fill(forbidden, -1e4)
    return F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))


@rewritten(hidden(), weight(), labels(), mask())
def megatron_loss_mask(x, weight, labels, loss_mask):
    losses = F.cross_entropy(
        F.linear(x, weight).float().view(-1, VOCABULARY), labels.view(-1), reduction="none"
    )
    loss_mask = loss_mask.view(-1).float()
    return torch.sum(losses.view(-1) * loss_mask) / loss_mask.sum()


@rewritten(hidden(), weight(), labels(), mask())
def verl_sft(x, weight, labels, loss_mask):
    """verl's SFT trainer: shifted logits, a module without reduction, a mask, an epsilon."""
    loss_fct = nn.CrossEntropyLoss(reduction="none")
    logits = F.linear(x, weight)
    shift_logits = logits[..., :-1, :].contiguous().view(-1, VOCABULARY)
    shift_labels = labels[..., 1:].contiguous().view(-1)
    loss = loss_fct(shift_logits, shift_labels) * loss_mask[:, :-1].reshape(-1)
    valid = torch.sum(loss_mask[:, :-1])
    return torch.sum(loss) / (valid + 1e-8)


@rewritten(hidden(), weight(), labels(), mask())
def mean_over_each_sequence(x, weight, labels, loss_mask):
    """Every sequence counts the same, whatever its length."""
    logits = F.linear(x, weight)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return ((losses * loss_mask).sum(1) / loss_mask.sum(1)).mean()


@rewritten(hidden(), weight(), labels(), number([6, 4]))
def lengths(x, weight, labels, lengths):
    inside = torch.arange(TIME)[None, :] < lengths[:, None]
    targets = labels.masked_fill(~inside, -100)
    return F.cross_entropy(F.linear(x, weight).view(-1, VOCABULARY), targets.view(-1))


@rewritten(hidden(), weight(), labels(), mask())
def completion_only(x, weight, ids, attention_mask):
    """TRL: the labels are a clone of the input, changed in place."""
    labels = ids.clone()
    labels[attention_mask == 0] = -100
    labels[:, :2] = -100
    logits = F.linear(x, weight)[:, :-1].contiguous()
    return F.cross_entropy(logits.view(-1, VOCABULARY), labels[:, 1:].reshape(-1))


@rewritten(
    hidden(1, 12, HIDDEN), weight(), labels(12), number([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6])
)
def packed_documents(x, weight, ids, position_ids):
    """Documents one after another: the first token of each is no target."""
    labels = torch.where(position_ids == 0, -100, ids)
    logits = F.linear(x, weight)[0, :-1].float()
    return F.cross_entropy(logits, labels[1:])


@rewritten(hidden(), weight(), labels(ignored=-100), lambda: torch.rand(VOCABULARY) + 0.5)
def class_weights(x, weight, labels, class_weights):
    loss_fct = nn.CrossEntropyLoss(weight=class_weights)
    return loss_fct(F.linear(x, weight).view(-1, VOCABULARY), labels.view(-1))


@rewritten(hidden(), weight(), labels(), real(BATCH, TIME, grad=False))
def weighted_tokens(x, weight, labels, token_weights):
    """A weight for each token, which sum to one."""
    logits = F.linear(x, weight)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses @ token_weights.flatten().softmax(0)


@rewritten(hidden(), weight(), lambda: torch.full((BATCH, TIME), -100))
def everything_ignored(x, weight, labels):
    """A batch without a target: the mean is not a number, and must stay so."""
    return F.cross_entropy(F.linear(x, weight).view(-1, VOCABULARY), labels.view(-1))


@rewritten(hidden(), weight(), labels(), number([1.0, 0.7]))
def speechbrain_relative_lengths(x, weight, targets, lengths):
    """Log-probabilities, classes moved to dimension 1, a mask from relative lengths."""
    log_probabilities = F.linear(x, weight).log_softmax(dim=-1).transpose(1, -1)
    loss = F.nll_loss(log_probabilities, targets.long(), reduction="none")
    inside = torch.arange(TIME)[None, :] < (lengths * TIME)[:, None]
    inside = inside.type(loss.dtype)
    return torch.sum(loss * inside) / torch.sum(inside)


@rewritten(hidden(), weight(), labels(), mask(), graphs=None)
def masked_select_of_losses(x, weight, labels, loss_mask):
    """The mask selects losses, not logits."""
    losses = F.cross_entropy(
        F.linear(x, weight).view(-1, VOCABULARY), labels.view(-1), reduction="none"
    )
    return torch.masked_select(losses, loss_mask.view(-1).bool()).mean()


@rewritten(hidden(), weight(), labels(), mask())
def where_of_losses(x, weight, labels, loss_mask):
    losses = F.cross_entropy(F.linear(x, weight).mT, labels, reduction="none")
    return torch.where(loss_mask.bool(), losses, 0.0).sum() / loss_mask.sum().clamp(min=1)
