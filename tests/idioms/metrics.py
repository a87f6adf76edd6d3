"""Numbers that are logged next to the loss: one for each row, from the same logits."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .corpus import VOCABULARY, hidden, labels, left_alone, rewritten, weight


def loss_of(logits, labels):
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


@rewritten(hidden(), weight(), labels(ignored=-100))
def argmax_accuracy(x, weight, labels):
    logits = F.linear(x, weight)
    loss = loss_of(logits, labels)
    counted = labels != -100
    correct = (logits.argmax(-1) == labels) & counted
    return loss, correct.sum() / counted.sum()


@rewritten(hidden(), weight(), labels())
def argmax_without_gradient(x, weight, labels):
    logits = F.linear(x, weight)
    loss = loss_of(logits, labels)
    with torch.no_grad():
        predictions = torch.argmax(logits.detach(), dim=-1)
        accuracy = predictions.eq(labels).float().mean()
    return loss, accuracy


@rewritten(hidden(), weight(), labels())
def predicted_tokens(x, weight, labels):
    """HF's preprocess_logits_for_metrics: the predictions are returned, not the logits."""
    logits = F.linear(x, weight).float()
    return loss_of(logits, labels), logits.argmax(dim=-1)


@rewritten(hidden(), weight(), labels())
def maximum_and_its_index(x, weight, labels):
    logits = F.linear(x, weight).view(-1, VOCABULARY)
    best, predicted = torch.max(logits, 1)
    return (
        F.cross_entropy(logits, labels.view(-1)),
        (predicted == labels.view(-1)).sum(),
        best.detach(),
    )


@rewritten(hidden(), weight(), labels())
def accuracy_of_log_probabilities(x, weight, labels):
    """fairseq: both from the log-probabilities."""
    lprobs = F.log_softmax(F.linear(x, weight), -1).view(-1, VOCABULARY)
    loss = F.nll_loss(lprobs, labels.view(-1), reduction="sum")
    correct = torch.sum(lprobs.argmax(1).eq(labels.view(-1)))
    return loss, correct


@rewritten(hidden(), weight(), labels())
def top_5_accuracy(x, weight, labels):
    logits = F.linear(x, weight)
    top = logits.topk(5, dim=-1).indices
    return loss_of(logits, labels), (top == labels.unsqueeze(-1)).any(-1).float().mean()


@rewritten(hidden(), weight(), labels())
def top_5_tokens(x, weight, labels):
    """The most likely tokens and their probabilities are returned."""
    logits = F.linear(x, weight)
    best = torch.topk(logits.detach().softmax(-1), 5, dim=-1)
    return loss_of(logits, labels), best.values, best.indices


@rewritten(hidden(), weight(), labels())
def perplexity(x, weight, labels):
    loss = loss_of(F.linear(x, weight), labels)
    return loss, torch.exp(loss.detach()), loss.detach() / math.log(2)


@rewritten(hidden(), weight(), labels())
def entropy(x, weight, labels):
    logits = F.linear(x, weight)
    with torch.no_grad():
        p = F.softmax(logits, dim=-1)
        entropy = -(p * torch.log(p + 1e-9)).sum(-1).mean()
    return loss_of(logits, labels), entropy


@rewritten(hidden(), weight(), labels())
def entropy_of_special(x, weight, labels):
    logits = F.linear(x, weight)
    entropy = torch.special.entr(logits.detach().softmax(-1)).sum(-1)
    return loss_of(logits, labels), entropy.mean()


@rewritten(hidden(), weight(), labels())
def largest_probability(x, weight, labels):
    logits = F.linear(x, weight)
    confidence = logits.detach().softmax(dim=-1).max(dim=-1).values
    return loss_of(logits, labels), confidence.mean()


@rewritten(hidden(), weight(), labels())
def token_log_probabilities(x, weight, labels):
    """The log-probability of each label is returned beside the mean loss."""
    logits = F.linear(x, weight)
    loss = loss_of(logits, labels)
    logprobs = logits.detach().log_softmax(-1)
    return loss, logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@rewritten(hidden(), weight(), labels())
def rank_of_the_target(x, weight, labels):
    """How many tokens are more likely than the right one."""
    logits = F.linear(x, weight)
    target = logits.gather(-1, labels.unsqueeze(-1))
    rank = (logits > target).sum(-1)
    return loss_of(logits, labels), (1.0 / (rank + 1)).mean()


@left_alone("used by", hidden(), weight(), labels())
def statistics_of_logits(x, weight, labels):
    """Mean, deviation and largest magnitude of all logits."""
    logits = F.linear(x, weight)
    seen = logits.detach()
    return loss_of(logits, labels), seen.mean(), seen.std(), seen.abs().max()


@rewritten(hidden(), weight(), labels())
def losses_and_their_mean(x, weight, labels):
    """One pass for the loss of each token, another for the mean."""
    logits = F.linear(x, weight).view(-1, VOCABULARY)
    each = F.cross_entropy(logits.detach(), labels.view(-1), reduction="none")
    return nn.CrossEntropyLoss()(logits, labels.view(-1)), each.view_as(labels)


@rewritten(hidden(), weight(), labels())
def evaluation_per_sequence(x, weight, labels):
    """lm-evaluation-harness: log-likelihood of a continuation, and whether it is the greedy one."""
    logits = F.log_softmax(F.linear(x, weight), dim=-1)[:, 2:]
    tokens = labels[:, 2:]
    greedy = logits.argmax(dim=-1)
    exact = (greedy == tokens).all(-1)
    picked = torch.gather(logits, 2, tokens.unsqueeze(-1)).squeeze(-1)
    return picked.sum(-1), exact


@left_alone("used by", hidden(), weight(), labels(), random=True)
def sample_beside_the_loss(x, weight, labels):
    """Only the last row is needed to draw from."""
    logits = F.linear(x, weight)
    drawn = torch.multinomial(logits[:, -1].detach().softmax(-1), 1)
    return loss_of(logits, labels), drawn


@rewritten(hidden(), weight(), labels())
def last_logits_returned(x, weight, labels):
    """A view of the logits is returned, deferred, where it would keep all of them alive."""
    logits = F.linear(x, weight)
    return loss_of(logits, labels), logits[:, -1]


@rewritten(hidden(), weight(), labels())
def probabilities_returned(x, weight, labels):
    logits = F.linear(x, weight)
    return loss_of(logits, labels), logits.softmax(-1)
