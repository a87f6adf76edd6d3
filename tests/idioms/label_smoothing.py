"""Targets that give every other token a little."""

import torch
import torch.nn.functional as F
from torch import nn

from .corpus import VOCABULARY, hidden, labels, rewritten, weight


@rewritten(hidden(), weight(), labels(ignored=-100))
def smoothing_of_pytorch(x, weight, labels):
    logits = F.linear(x, weight).view(-1, VOCABULARY)
    return F.cross_entropy(logits, labels.view(-1), label_smoothing=0.1)


@rewritten(hidden(), weight(), labels(ignored=-100), lambda: torch.rand(VOCABULARY) + 0.5)
def smoothing_with_class_weights(x, weight, labels, class_weights):
    loss_fct = nn.CrossEntropyLoss(class_weights, label_smoothing=0.1)
    return loss_fct(F.linear(x, weight).view(-1, VOCABULARY), labels.view(-1))


@rewritten(hidden(), weight(), labels())
def smoothing_under_a_softcap(x, weight, labels):
    logits = 5 * torch.tanh(F.linear(x, weight) / 5)
    return F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), label_smoothing=0.1)


@rewritten(hidden(), weight(), labels(ignored=-100))
def huggingface_label_smoother(x, weight, labels, epsilon=0.1):
    """The Trainer's: negated log-probabilities, padding filled with zeros in place."""
    logits = F.linear(x, weight)[..., :-1, :].contiguous()
    labels = labels[..., 1:].contiguous()
    log_probs = -F.log_softmax(logits, dim=-1)
    labels = labels.unsqueeze(-1)
    padding_mask = labels.eq(-100)
    labels = torch.clamp(labels, min=0)
    nll_loss = log_probs.gather(dim=-1, index=labels)
    smoothed_loss = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll_loss.masked_fill_(padding_mask, 0.0)
    smoothed_loss.masked_fill_(padding_mask, 0.0)
    active = padding_mask.numel() - padding_mask.long().sum()
    nll = nll_loss.sum() / active
    smoothed = smoothed_loss.sum() / (active * log_probs.shape[-1])
    return (1 - epsilon) * nll + epsilon * smoothed


@rewritten(hidden(), weight(), labels(ignored=1))
def fairseq_label_smoothed(x, weight, target, epsilon=0.1):
    lprobs = F.log_softmax(F.linear(x, weight).float(), dim=-1)
    lprobs, target = lprobs.view(-1, lprobs.size(-1)), target.view(-1, 1)
    nll_loss = -lprobs.gather(dim=-1, index=target)
    smooth_loss = -lprobs.sum(dim=-1, keepdim=True)
    pad_mask = target.eq(1)
    nll_loss.masked_fill_(pad_mask, 0.0)
    smooth_loss.masked_fill_(pad_mask, 0.0)
    nll_loss, smooth_loss = nll_loss.sum(), smooth_loss.sum()
    eps_i = epsilon / (lprobs.size(-1) - 1)
    return (1.0 - epsilon - eps_i) * nll_loss + eps_i * smooth_loss, nll_loss


@rewritten(hidden(), weight(), labels())
def annotated_transformer(x, weight, target, smoothing=0.1, padding_idx=0):
    """A smoothed distribution is written out, and a summed divergence taken."""
    x = F.log_softmax(F.linear(x, weight), dim=-1).view(-1, VOCABULARY)
    target = target.view(-1)
    true_dist = torch.full_like(x, smoothing / (VOCABULARY - 2))
    true_dist = true_dist.scatter(1, target.unsqueeze(1), 1 - smoothing)
    true_dist[:, padding_idx] = 0
    true_dist = true_dist.masked_fill((target == padding_idx).unsqueeze(1), 0.0)
    return F.kl_div(x, true_dist.detach(), reduction="sum") / target.numel()


@rewritten(hidden(), weight(), labels(ignored=-1))
def espnet_label_smoothing(x, weight, target, smoothing=0.1):
    """ESPnet's LabelSmoothingLoss: KLDivLoss without reduction, filled with zeros."""
    x = F.linear(x, weight).view(-1, VOCABULARY)
    target = target.view(-1)
    with torch.no_grad():
        true_dist = torch.zeros_like(x)
        true_dist.fill_(smoothing / (VOCABULARY - 1))
        ignore = target == -1
        total = target.numel() - ignore.sum()
        target = target.masked_fill(ignore, 0)
        true_dist.scatter_(1, target.unsqueeze(1), 1 - smoothing)
    kl = nn.KLDivLoss(reduction="none")(torch.log_softmax(x, dim=1), true_dist)
    return kl.masked_fill(ignore.unsqueeze(1), 0).sum() / total


@rewritten(hidden(), weight(), labels())
def timm_label_smoothing(x, weight, target, smoothing=0.1):
    logprobs = F.log_softmax(F.linear(x, weight).flatten(0, 1), dim=-1)
    nll_loss = -logprobs.gather(dim=-1, index=target.flatten().unsqueeze(1)).squeeze(1)
    smooth_loss = -logprobs.mean(dim=-1)
    return ((1 - smoothing) * nll_loss + smoothing * smooth_loss).mean()


@rewritten(hidden(), weight(), labels())
def megatron_label_smoothing(x, weight, target, label_smoothing=0.1):
    """Smoothing spread over the others, from the mean of all log-probabilities."""
    logits = F.linear(x, weight).float()
    logits = logits - logits.max(dim=-1)[0].unsqueeze(-1)
    predicted = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    exp_logits = logits.exp()
    sum_exp = exp_logits.sum(-1)
    loss = sum_exp.log() - predicted
    smoothing = label_smoothing * VOCABULARY / (VOCABULARY - 1)
    log_probs = torch.log(exp_logits.div(sum_exp.unsqueeze(-1)))
    return ((1.0 - smoothing) * loss - smoothing * log_probs.mean(dim=-1)).mean()


@rewritten(hidden(), weight(), labels())
def t5x_label_smoothing(x, weight, targets, smoothing=0.1):
    """Soft targets by on and off values, and a constant that makes the best loss zero."""
    logits = F.linear(x, weight).float()
    confidence = 1.0 - smoothing
    low = (1.0 - confidence) / (VOCABULARY - 1)
    constant = -(
        confidence * torch.log(torch.tensor(confidence))
        + (VOCABULARY - 1) * low * torch.log(torch.tensor(low + 1e-20))
    )
    soft = F.one_hot(targets, VOCABULARY) * (confidence - low) + low
    loss = -(soft * F.log_softmax(logits, dim=-1)).sum(-1)
    return (loss - constant).mean()


@rewritten(hidden(), weight(), labels())
def smoothed_probabilities_as_targets(x, weight, labels, epsilon=0.1):
    soft = F.one_hot(labels.view(-1), VOCABULARY).float() * (1 - epsilon) + epsilon / VOCABULARY
    return F.cross_entropy(F.linear(x, weight).view(-1, VOCABULARY), soft)


@rewritten(hidden(), weight(), labels())
def smoothing_from_mean_logit(x, weight, labels, epsilon=0.1):
    """logsumexp minus a blend of the target's logit and the mean logit."""
    logits = F.linear(x, weight)
    lse = torch.logsumexp(logits, -1)
    target = logits.gather(-1, labels[..., None])[..., 0]
    return (lse - (1 - epsilon) * target - epsilon * logits.mean(-1)).mean()
