"""Losses without cross_entropy: from exponentials, one-hots, gathers and logarithms."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .corpus import (
    BATCH,
    HIDDEN,
    TIME,
    VOCABULARY,
    bias,
    hidden,
    labels,
    left_alone,
    mask,
    number,
    rewritten,
    weight,
)


@rewritten(hidden(6, 2, HIDDEN), weight(), labels(), mask())
def megatron(x, weight, labels, loss_mask):
    """Sequence first, one rank of vocabulary-parallel cross-entropy, nothing in place."""
    logits = torch.matmul(x, weight.t()).float()
    labels = labels.transpose(0, 1).contiguous()
    largest = torch.max(logits, dim=-1)[0]
    logits = logits - largest.unsqueeze(dim=-1)
    target_mask = (labels < 0) | (labels >= VOCABULARY)
    masked_target = labels.clone()
    masked_target[target_mask] = 0
    flat = logits.view(-1, VOCABULARY)
    rows = torch.arange(start=0, end=flat.size(0))
    predicted = flat[rows, masked_target.view(-1)].clone().contiguous().view_as(labels)
    predicted = predicted.masked_fill(target_mask, 0.0)
    losses = torch.log(logits.exp().sum(dim=-1)) - predicted
    losses = losses.transpose(0, 1).contiguous()
    return (losses * loss_mask).sum() / loss_mask.sum()


@rewritten(hidden(), weight(), labels())
def t5x_one_hot(x, weight, targets):
    """T5X: log-normaliser, one-hot targets, a z-loss from the same log-normaliser."""
    logits = F.linear(x, weight).float()
    soft_targets = F.one_hot(targets, VOCABULARY).float()
    log_z = torch.logsumexp(logits, -1, keepdim=True)
    log_softmax = logits - log_z
    loss = -torch.sum(soft_targets * log_softmax, dim=-1)
    z_loss = 1e-4 * torch.square(log_z.squeeze(-1))
    return (loss + z_loss).sum(), z_loss.sum()


@rewritten(hidden(), weight(), labels())
def optax_integer_labels(x, weight, labels):
    """Optax: the maximum without gradient is taken out, then log-sum-exp minus the label's."""
    logits = x @ weight.T
    logits = logits - torch.amax(logits, dim=-1, keepdim=True).detach()
    label_logits = torch.take_along_dim(logits, labels[..., None], dim=-1)[..., 0]
    log_normalizers = torch.log(torch.sum(torch.exp(logits), dim=-1))
    return (log_normalizers - label_logits).mean()


@rewritten(hidden(), weight(), labels())
def one_hot_and_log_softmax(x, weight, labels):
    log_probs = F.log_softmax(F.linear(x, weight), dim=-1)
    one_hot = F.one_hot(labels, num_classes=VOCABULARY)
    return -(one_hot * log_probs).sum(dim=-1).mean()


@rewritten(hidden(), weight(), labels())
def one_hot_by_einsum(x, weight, labels):
    log_probs = torch.einsum("bth,vh->btv", x, weight).log_softmax(-1)
    one_hot = F.one_hot(labels, VOCABULARY).to(log_probs.dtype)
    return -torch.einsum("btv,btv->bt", one_hot, log_probs).mean()


@rewritten(hidden(), weight(), labels())
def one_hot_by_scatter(x, weight, labels):
    log_probs = F.linear(x, weight).log_softmax(-1)
    one_hot = torch.zeros_like(log_probs).scatter_(-1, labels.unsqueeze(-1), 1.0)
    return -(one_hot * log_probs).sum() / labels.numel()


@rewritten(hidden(), weight(), labels())
def one_hot_by_comparison(x, weight, labels):
    """MaxText-like: iota == label, then a where."""
    logits = F.linear(x, weight)
    hit = torch.arange(VOCABULARY) == labels[..., None]
    picked = torch.where(hit, logits, 0.0).sum(-1)
    return (logits.logsumexp(-1) - picked).mean()


@rewritten(hidden(), weight(), labels(ignored=-100))
def nll_loss(x, weight, labels):
    log_probs = F.log_softmax(F.linear(x, weight), dim=-1)
    return F.nll_loss(log_probs.view(-1, VOCABULARY), labels.view(-1), ignore_index=-100)


@rewritten(hidden(), weight(), bias(), labels())
def log_softmax_module(x, weight, bias, labels):
    """LogSoftmax and NLLLoss over classes in dimension 1."""
    logits = F.linear(x, weight, bias).transpose(1, 2)
    return nn.NLLLoss(reduction="sum")(nn.LogSoftmax(dim=1)(logits), labels) / labels.numel()


@rewritten(hidden(12, HIDDEN), weight(), labels(12))
def indexed_rows(x, weight, labels):
    """makemore: log-probabilities indexed by arange and targets."""
    logprobs = (x @ weight.T).log_softmax(1)
    return -logprobs[torch.arange(12), labels].mean()


@rewritten(hidden(12, HIDDEN), weight(), labels(12))
def indexed_rows_by_range(x, weight, labels):
    logprobs = F.log_softmax(x @ weight.T, dim=1)
    return -logprobs[range(12), labels].mean()


@rewritten(hidden(12, HIDDEN), weight(), bias(), labels(12))
def makemore_from_counts(x, weight, bias, labels):
    """Karpathy's lecture: maximum out, exponentials as counts, probabilities, logarithm."""
    logits = x @ weight.T + bias
    logit_maxes = logits.max(1, keepdim=True).values
    norm_logits = logits - logit_maxes
    counts = norm_logits.exp()
    counts_sum = counts.sum(1, keepdim=True)
    probs = counts * counts_sum**-1
    logprobs = probs.log()
    return -logprobs[range(12), labels].mean()


@rewritten(hidden(), weight(), labels())
def softmax_then_log(x, weight, labels):
    probs = F.softmax(F.linear(x, weight), dim=-1)
    return -torch.log(probs.gather(-1, labels.unsqueeze(-1))).mean()


@rewritten(hidden(), weight(), labels())
def softmax_with_epsilon(x, weight, labels):
    probs = torch.softmax(F.linear(x, weight), dim=-1)
    log_probs = torch.log(probs + 1e-8)
    return -log_probs.gather(-1, labels[..., None]).squeeze(-1).mean()


@rewritten(hidden(), weight(), labels())
def logsumexp_minus_target(x, weight, labels):
    logits = F.linear(x, weight).float()
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    target = logits.gather(-1, labels.unsqueeze(-1))
    return (lse - target).mean()


@rewritten(hidden(), weight(), labels())
def target_logit_from_the_weight(x, weight, labels):
    """The target's logit is a product of its own: only logsumexp needs the vocabulary."""
    target = (x * weight[labels]).sum(-1)
    return (F.linear(x, weight).logsumexp(-1) - target).mean()


@rewritten(hidden(), weight(), labels())
def stable_with_amax(x, weight, labels):
    logits = F.linear(x, weight)
    m = logits.amax(-1, keepdim=True)
    lse = m + (logits - m).exp().sum(-1, keepdim=True).log()
    return -(logits - lse).gather(-1, labels[..., None]).mean()


@rewritten(hidden(), weight(), labels())
def focal_of_cross_entropy(x, weight, labels, gamma=2.0):
    """The probability is recovered from the loss."""
    ce = F.cross_entropy(F.linear(x, weight).flatten(0, 1), labels.flatten(), reduction="none")
    pt = torch.exp(-ce)
    return ((1 - pt) ** gamma * ce).mean()


@rewritten(hidden(), weight(), labels())
def focal_of_log_softmax(x, weight, labels, gamma=2.0):
    logp = F.log_softmax(F.linear(x, weight), dim=-1)
    logpt = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    pt = logpt.detach().exp()
    return (-((1 - pt) ** gamma) * logpt).mean()


@rewritten(hidden(), weight(), labels())
def poly1(x, weight, labels, epsilon=1.0):
    """PolyLoss: one-hot times softmax beside cross-entropy."""
    logits = F.linear(x, weight).view(-1, VOCABULARY)
    labels = labels.view(-1)
    one_hot = F.one_hot(labels, num_classes=VOCABULARY).to(logits.dtype)
    pt = torch.sum(one_hot * F.softmax(logits, dim=-1), dim=-1)
    ce = F.cross_entropy(logits, labels, reduction="none")
    return (ce + epsilon * (1 - pt)).mean()


@rewritten(hidden(), weight(), labels())
def generalized_cross_entropy(x, weight, labels, q=0.7):
    """GCE for noisy labels: (1 - p**q) / q."""
    p = F.softmax(F.linear(x, weight), dim=-1).gather(-1, labels[..., None]).squeeze(-1)
    return ((1 - p**q) / q).mean()


@rewritten(hidden(), weight(), labels(), labels(), mask())
def unlikelihood_of_one_token(x, weight, labels, negatives, penalised):
    """Dialogue unlikelihood: a wrong token for each position."""
    logp = F.log_softmax(F.linear(x, weight), dim=-1)
    likely = F.nll_loss(logp.view(-1, VOCABULARY), labels.view(-1))
    p = logp.gather(-1, negatives.unsqueeze(-1)).squeeze(-1).exp()
    unlikely = -torch.log(torch.clamp(1.0 - p, min=1e-5))
    return likely + (unlikely * penalised).sum() / penalised.sum()


@rewritten(hidden(), weight(), labels())
def unlikelihood_of_previous_tokens(x, weight, labels):
    """Welleck et al.: every token so far is a negative candidate, written as a distribution."""
    lprobs = F.log_softmax(F.linear(x, weight), dim=-1)
    mle = F.nll_loss(lprobs.view(-1, VOCABULARY), labels.view(-1))
    with torch.no_grad():
        candidates = labels.unsqueeze(1).expand(BATCH, TIME, TIME)
        earlier = torch.ones(TIME, TIME, dtype=torch.bool).tril(-1)
        same = candidates == labels.unsqueeze(-1)
        valid = (earlier & ~same).to(lprobs.dtype)
    p = lprobs.gather(-1, candidates).exp()
    unlikely = -torch.log(torch.clamp(1 - p, min=1e-5)) * valid
    return mle + unlikely.sum() / (BATCH * TIME)


@rewritten(hidden(), weight(), labels())
def confidence_penalty(x, weight, labels):
    """Pereyra et al.: the entropy, with gradient, is subtracted."""
    logits = F.linear(x, weight)
    log_p = F.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    nll = F.nll_loss(log_p.view(-1, VOCABULARY), labels.view(-1))
    return nll - 0.1 * entropy


@rewritten(hidden(), weight(), labels(), lambda: torch.randperm(VOCABULARY)[:8])
def sampled_softmax(x, weight, labels, negatives):
    """A few negatives after the product with each token's own weight."""
    positive = (x * weight[labels]).sum(-1, keepdim=True)
    negative = F.linear(x, weight[negatives])
    logits = torch.cat([positive, negative], dim=-1)
    return F.cross_entropy(logits.view(-1, 9), torch.zeros(BATCH * TIME, dtype=torch.int64))


@left_alone(None, hidden(), weight(), labels())
def sigmoid_of_every_token(x, weight, labels):
    """A bag of words: no softmax."""
    logits = F.linear(x, weight)
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, VOCABULARY).float())


@left_alone(
    None, hidden(TIME, BATCH, HIDDEN), weight(), labels(2, 2), number([6, 5]), number([2, 1])
)
def ctc(x, weight, targets, input_lengths, target_lengths):
    """Speech: the whole [time, vocabulary] lattice is read."""
    log_probs = F.linear(x, weight).log_softmax(-1)
    targets = targets.clamp(min=1)
    return F.ctc_loss(log_probs, targets, input_lengths, target_lengths)


@left_alone(None, hidden(12, HIDDEN), weight(), labels(12))
def hinge(x, weight, labels):
    return F.multi_margin_loss(F.linear(x, weight), labels)


@rewritten(hidden(), weight(), labels())
def nucleus_filtered(x, weight, labels):
    """Only the most likely tokens stay: the sorted logits decide."""
    logits = F.linear(x, weight)
    smallest = logits.topk(30, dim=-1).values[..., -1:]
    logits = logits.masked_fill(logits < smallest, -20.0)
    return F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))


@left_alone("used by dropout", hidden(), weight(), labels(), random=True)
def dropout_of_logits(x, weight, labels):
    logits = F.dropout(F.linear(x, weight), 0.2, training=True)
    return F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))


@left_alone("used by", hidden(), weight(), labels(), random=True)
def gumbel_noise(x, weight, labels):
    logits = F.linear(x, weight)
    noise = -torch.log(-torch.log(torch.rand_like(logits) + 1e-9) + 1e-9)
    return F.cross_entropy((logits + noise).view(-1, VOCABULARY), labels.view(-1))


@rewritten(hidden(), weight(), labels(), mask())
def gpt_neox(x, weight, labels, loss_mask):
    """Softmax over float32 logits by hand, masked in a flat view."""
    logits = F.linear(x, weight).float()
    logits = logits - logits.max(dim=-1, keepdim=True)[0]
    sum_exp = torch.exp(logits).sum(dim=-1)
    predicted = torch.gather(logits, -1, labels[:, :, None]).squeeze(2)
    losses = torch.log(sum_exp) - predicted
    flat = loss_mask.view(-1)
    return torch.sum(losses.view(-1) * flat) / flat.sum()


@rewritten(hidden(), weight(), labels())
def bits_per_character(x, weight, labels):
    log2_probs = F.linear(x, weight).log_softmax(-1) / math.log(2)
    return -log2_probs.gather(-1, labels[..., None]).mean()


@rewritten(hidden(), weight(), labels())
def negative_log_likelihood_of_logaddexp(x, weight, labels):
    """-log p as softplus of the log-odds."""
    logits = F.linear(x, weight)
    log_p = logits.log_softmax(-1).gather(-1, labels[..., None])
    log_not_p = torch.log1p(-log_p.exp())
    return F.softplus(log_not_p - log_p).mean()
