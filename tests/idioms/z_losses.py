"""Penalties on the logarithm of the softmax's denominator."""

import torch
import torch.nn.functional as F

from .corpus import VOCABULARY, hidden, labels, rewritten, weight


@rewritten(hidden(), weight(), labels(ignored=-100))
def olmo(x, weight, labels):
    """OLMo: both losses summed over the tokens that count, returned apart."""
    logits = F.linear(x, weight)[..., :-1, :].contiguous().view(-1, VOCABULARY).float()
    labels = labels[..., 1:].contiguous().view(-1)
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    z_squared = logits.logsumexp(-1).pow(2)
    z_loss = 1e-4 * (z_squared * (labels != -100)).sum()
    return loss, z_loss


@rewritten(hidden(), weight(), labels(ignored=-100))
def olmo_mean(x, weight, labels):
    logits = F.linear(x, weight).view(-1, VOCABULARY).float()
    labels = labels.view(-1)
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="mean")
    z_squared = logits.logsumexp(-1).pow(2)
    counted = labels != -100
    return loss + 1e-4 * (z_squared / counted.sum()).mul(counted).sum()


@rewritten(hidden(), weight(), labels())
def palm(x, weight, labels):
    """PaLM: the square of the log-normaliser, averaged over all tokens."""
    logits = F.linear(x, weight)
    z = torch.logsumexp(logits, dim=-1)
    loss = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
    return loss + 1e-4 * (z**2).mean()


@rewritten(hidden(dtype=torch.bfloat16), weight(dtype=torch.bfloat16), labels())
def bamba(x, weight, labels):
    """The penalty is taken of the bfloat16 logits, the loss of their float32 copy."""
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits.float().view(-1, VOCABULARY), labels.view(-1))
    z_loss = logits.logsumexp(dim=-1).to(dtype=torch.float32).pow(2).mean()
    return loss + 1e-3 * z_loss


@rewritten(hidden(), weight(), labels())
def flash_attention_return_z_loss(x, weight, labels):
    """One logsumexp serves both: loss = lse - target logit + scale * lse**2."""
    logits = F.linear(x, weight).view(-1, VOCABULARY)
    lse = logits.logsumexp(-1)
    predicted = logits.gather(-1, labels.view(-1, 1)).squeeze(-1)
    z_loss = 1e-4 * lse * lse
    return (lse - predicted + z_loss).mean(), z_loss.sum()


@rewritten(hidden(), weight(), labels(ignored=-100))
def z_loss_by_hand(x, weight, labels):
    """log(sum(exp)) with the maximum taken out."""
    logits = F.linear(x, weight).float().view(-1, VOCABULARY)
    largest = logits.max(dim=-1, keepdim=True).values.detach()
    log_z = torch.log(torch.exp(logits - largest).sum(-1)) + largest.squeeze(-1)
    counted = (labels.view(-1) != -100).float()
    z_loss = (log_z.square() * counted).sum() / counted.sum()
    return F.cross_entropy(logits, labels.view(-1)) + 1e-4 * z_loss


@rewritten(hidden(), weight(), labels())
def z_as_a_metric(x, weight, labels):
    """Looked at, not trained on."""
    logits = F.linear(x, weight).view(-1, VOCABULARY)
    loss = F.cross_entropy(logits, labels.view(-1))
    with torch.no_grad():
        z = torch.logsumexp(logits.detach(), -1).mean()
    return loss, z


@rewritten(hidden(), weight(), labels())
def baichuan_max_z_loss(x, weight, labels):
    """Baichuan 2 penalises the largest logit of each row."""
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
    return loss + 2e-4 * logits.max(-1).values.square().mean()


@rewritten(hidden(), weight(), labels())
def squared_logits(x, weight, labels):
    """Weight decay on the logits themselves."""
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
    return loss + 1e-4 * logits.pow(2).mean()
