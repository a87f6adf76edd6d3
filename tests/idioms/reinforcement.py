"""Preferences and rewards: losses made of the log-probabilities of chosen tokens."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.torch_version import TorchVersion

from .corpus import (
    BATCH,
    HIDDEN,
    TIME,
    VOCABULARY,
    Body,
    hidden,
    labels,
    left_alone,
    mask,
    number,
    real,
    rewritten,
    weight,
)

PAIRS = (4, TIME)  # two chosen sequences, then two rejected ones
BFLOAT16 = {"dtype": torch.bfloat16}
# Dynamo of torch 2.11 breaks the graph at `torch.quantile`.
QUANTILE_GRAPHS = 2 if TorchVersion(torch.__version__) < (2, 12) else 1


def log_probability(*shape):
    """Log-probabilities that another model gave to the same tokens."""
    return lambda: -torch.rand(shape or (BATCH, TIME - 1)) * 4 - 0.5


def gathered(logits, index):
    """The log-probability of each chosen token, by log_softmax and gather."""
    return torch.gather(logits.log_softmax(-1), dim=2, index=index.unsqueeze(2)).squeeze(2)


def sequence_log_probabilities(logits, labels, average=False):
    """What DPO's reference code sums (or averages) over the labels that are not -100."""
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1, :]
    loss_mask = labels != -100
    labels[labels == -100] = 0
    per_token = gathered(logits, labels)
    total = (per_token * loss_mask).sum(-1)
    return total / loss_mask.sum(-1) if average else total


def selective_log_softmax(logits, index):
    """TRL's: a loop of logsumexp in float32, of log_softmax in bfloat16."""
    if logits.dtype in (torch.float32, torch.float64):
        selected = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
        lse = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
        return selected - lse
    per_token = []
    for row_logits, row_labels in zip(logits, index, strict=True):
        row = F.log_softmax(row_logits, dim=-1)
        per_token.append(row.gather(dim=-1, index=row_labels.unsqueeze(-1)).squeeze(-1))
    return torch.stack(per_token)


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


@rewritten(
    hidden(*PAIRS, HIDDEN),
    weight(),
    labels(*PAIRS, ignored=-100),
    number([-9.0, -8.0]),
    number([-7.0, -9.5]),
)
def dpo(x, weight, labels, reference_chosen, reference_rejected):
    """The original DPO code: one batch of pairs, clone and change of the labels."""
    log_probabilities = sequence_log_probabilities(F.linear(x, weight), labels)
    chosen, rejected = log_probabilities[:2], log_probabilities[2:]
    margin = (chosen - rejected) - (reference_chosen - reference_rejected)
    losses = -F.logsigmoid(0.1 * margin)
    return losses.mean(), 0.1 * (chosen - reference_chosen).detach()


@rewritten(
    hidden(*PAIRS, HIDDEN),
    weight(),
    labels(*PAIRS),
    mask(*PAIRS),
    number([-9.0, -8.0]),
    number([-7.0, -9.5]),
)
def dpo_trl(x, weight, ids, completion_mask, reference_chosen, reference_rejected):
    """TRL now: selective log-softmax, and the mean logit of the completions as a metric."""
    logits = F.linear(x, weight)
    labels = torch.roll(ids, shifts=-1, dims=1)
    loss_mask = torch.roll(completion_mask, shifts=-1, dims=1).bool()
    labels[~loss_mask] = 0
    per_token = selective_log_softmax(logits, labels)
    per_token[~loss_mask] = 0
    per_token = torch.roll(per_token, shifts=1, dims=1)
    chosen, rejected = per_token[:, 1:].sum(-1).chunk(2)
    margin = (chosen - rejected) - (reference_chosen - reference_rejected)
    return -F.logsigmoid(0.1 * margin).mean()


@rewritten(hidden(*PAIRS, HIDDEN), weight(), labels(*PAIRS, ignored=-100))
def dpo_with_mean_logit(x, weight, labels):
    """The mean of all the logits is logged."""
    logits = F.linear(x, weight)
    chosen, rejected = sequence_log_probabilities(logits, labels).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean(), logits[:2].detach().mean()


@rewritten(
    hidden(*PAIRS, HIDDEN),
    weight(),
    hidden(*PAIRS, HIDDEN, grad=False),
    weight(grad=False),
    labels(*PAIRS, ignored=-100),
)
def dpo_with_reference_model(x, weight, reference_x, reference_weight, labels):
    """Both models in one graph, the reference without gradients."""
    policy = sequence_log_probabilities(F.linear(x, weight), labels)
    with torch.no_grad():
        reference = sequence_log_probabilities(F.linear(reference_x, reference_weight), labels)
    ratios = policy - reference
    return -F.logsigmoid(0.1 * (ratios[:2] - ratios[2:])).mean()


@rewritten(
    hidden(*PAIRS, HIDDEN),
    weight(),
    labels(*PAIRS, ignored=-100),
    number([-2.0, -1.0]),
    number([-2.5, -3.0]),
)
def ipo(x, weight, labels, reference_chosen, reference_rejected):
    chosen, rejected = sequence_log_probabilities(F.linear(x, weight), labels, average=True).chunk(
        2
    )
    margin = (chosen - rejected) - (reference_chosen - reference_rejected)
    return (margin - 1 / (2 * 0.1)).square().mean()


@rewritten(
    hidden(*PAIRS, HIDDEN), weight(), labels(*PAIRS, ignored=-100), number([-9.0, -8.0, -7.5, -9.5])
)
def kto(x, weight, labels, reference):
    """Desirable and undesirable examples against a baseline without gradient."""
    policy = sequence_log_probabilities(F.linear(x, weight), labels)
    rewards = policy - reference
    baseline = rewards.mean().detach().clamp(min=0)
    good = 1 - F.sigmoid(0.1 * (rewards[:2] - baseline))
    bad = 1 - F.sigmoid(0.1 * (baseline - rewards[2:]))
    return torch.cat((good, 1.33 * bad), 0).nanmean()


@rewritten(hidden(*PAIRS, HIDDEN), weight(), labels(*PAIRS, ignored=-100))
def orpo(x, weight, labels):
    """Cross-entropy of the chosen, and the log-odds of average log-probabilities."""
    logits = F.linear(x, weight)
    nll = F.cross_entropy(
        logits[:2, :-1].reshape(-1, VOCABULARY), labels[:2, 1:].reshape(-1), ignore_index=-100
    )
    chosen, rejected = sequence_log_probabilities(logits, labels, average=True).chunk(2)
    log_odds = (chosen - rejected) - (
        torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected))
    )
    return nll - 0.1 * F.logsigmoid(log_odds).mean()


@rewritten(hidden(*PAIRS, HIDDEN), weight(), labels(*PAIRS, ignored=-100))
def simpo(x, weight, labels):
    chosen, rejected = sequence_log_probabilities(F.linear(x, weight), labels, average=True).chunk(
        2
    )
    return -F.logsigmoid(2.0 * (chosen - rejected - 0.7)).mean()


@rewritten(hidden(*PAIRS, HIDDEN), weight(), labels(*PAIRS, ignored=-100))
def cpo(x, weight, labels):
    """No reference model; the behaviour-cloning term comes from the same log-probabilities."""
    logits = F.linear(x, weight)
    chosen, rejected = sequence_log_probabilities(logits, labels).chunk(2)
    nll = -chosen / (labels[:2, 1:] != -100).sum(-1)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean() + nll.mean()


@rewritten(hidden(), weight(), labels())
def selective_log_softmax_float32(x, weight, ids):
    return selective_log_softmax(F.linear(x, weight)[:, :-1], ids[:, 1:])


@rewritten(hidden(**BFLOAT16), weight(**BFLOAT16), labels(), rounded=torch.bfloat16)
def selective_log_softmax_bfloat16(x, weight, ids):
    return selective_log_softmax(F.linear(x, weight)[:, :-1], ids[:, 1:])


@rewritten(hidden(), weight(), labels())
def trlx_log_probabilities(x, weight, ids):
    """trlX's logprobs_of_labels."""
    logits = F.linear(x, weight)[:, :-1, :]
    logprobs = F.log_softmax(logits, dim=-1)
    return torch.gather(logprobs, dim=-1, index=ids[:, 1:].unsqueeze(-1)).squeeze(-1)


@rewritten(hidden(), weight(), labels(), log_probability(), number([1.0, -1.0]), mask(2, 5))
def grpo(x, weight, ids, old, advantages, completion_mask):
    """TRL's GRPO with a temperature and a clipped ratio."""
    logits = F.linear(x, weight)[:, :-1, :]
    logits = logits / 0.9
    per_token = selective_log_softmax(logits, ids[:, 1:])
    ratio = torch.exp(per_token - old)
    clipped = torch.clamp(ratio, 1 - 0.2, 1 + 0.28)
    advantages = advantages.unsqueeze(1)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return ((loss * completion_mask).sum(-1) / completion_mask.sum(-1).clamp(min=1.0)).mean()


@rewritten(hidden(), weight(), labels(), log_probability(), number([1.0, -1.0]), mask(2, 5))
def grpo_on_policy_with_kl(x, weight, ids, reference, advantages, completion_mask):
    """exp(p - p.detach()), and Schulman's estimate of the divergence from a reference."""
    per_token = selective_log_softmax(F.linear(x, weight)[:, :-1, :], ids[:, 1:])
    kl = torch.exp(reference - per_token) - (reference - per_token) - 1
    loss = torch.exp(per_token - per_token.detach()) * advantages.unsqueeze(1)
    loss = -(loss - 0.04 * kl)
    return masked_mean(loss, completion_mask), masked_mean(kl, completion_mask).detach()


@rewritten(hidden(), weight(), labels(), number([1.0, -1.0]), mask(2, 5))
def grpo_with_entropy_metric(x, weight, ids, advantages, completion_mask):
    """The entropy of each row from the same logits, without gradient."""
    logits = F.linear(x, weight)[:, :-1, :]
    per_token = selective_log_softmax(logits, ids[:, 1:])
    with torch.no_grad():
        log_p = F.log_softmax(logits, dim=-1)
        entropies = -(torch.exp(log_p) * log_p).sum(-1)
    loss = -masked_mean(per_token * advantages[:, None], completion_mask)
    return loss, masked_mean(entropies, completion_mask)


@rewritten(hidden(), weight(), labels(), log_probability(), number([1.0, -1.0]), mask(2, 5))
def dr_grpo(x, weight, ids, old, advantages, completion_mask):
    """Divided by a constant length instead of the number of tokens."""
    per_token = selective_log_softmax(F.linear(x, weight)[:, :-1], ids[:, 1:])
    ratio = torch.exp(per_token - old)
    loss = -torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return (loss * completion_mask).sum() / (loss.size(0) * 8)


@rewritten(hidden(), weight(), labels(), log_probability(), number([1.0, -1.0]), mask(2, 5))
def gspo(x, weight, ids, old, advantages, completion_mask):
    """One ratio for each sequence."""
    per_token = selective_log_softmax(F.linear(x, weight)[:, :-1], ids[:, 1:])
    log_ratio = ((per_token - old) * completion_mask).sum(-1) / completion_mask.sum(-1)
    ratio = log_ratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages).mean()


@rewritten(hidden(), weight(), labels(2, 5), log_probability(), real(2, 5, grad=False), mask(2, 5))
def verl_actor_with_entropy_bonus(x, weight, responses, old, advantages, response_mask):
    """verl: entropy as logsumexp minus the expected logit, with a gradient."""
    logits = F.linear(x, weight)[:, :-1]
    logits = logits / 1.0
    log_prob = gathered(logits, responses)
    pd = torch.softmax(logits, dim=-1)
    entropy = torch.logsumexp(logits, dim=-1) - torch.sum(pd * logits, dim=-1)
    ratio = torch.exp(log_prob - old)
    losses = torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2))
    return masked_mean(losses, response_mask) - 0.01 * masked_mean(entropy, response_mask)


@rewritten(hidden(), weight(), labels(2, 5))
def verl_log_probabilities_by_cross_entropy(x, weight, responses):
    logits = F.linear(x, weight)[:, :-1].reshape(-1, VOCABULARY)
    output = -F.cross_entropy(logits, responses.reshape(-1), reduction="none")
    return output.view(*responses.shape)


@rewritten(hidden(), weight(), labels(), log_probability(), real(2, 5, grad=False), mask(2, 5))
def openrlhf_ppo(x, weight, ids, old, advantages, action_mask):
    """OpenRLHF: logits are divided by the temperature in place."""
    logits = F.linear(x, weight).to(torch.float32)[:, :-1]
    logits.div_(0.8)
    labels = ids[:, 1:]
    target = logits.gather(dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
    log_probs = target - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    ratio = (log_probs - old).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return masked_mean(loss, action_mask), ((old - log_probs) * action_mask).mean().detach()


@rewritten(
    labels(), labels(2, 6), log_probability(2, 6), real(2, 6, grad=False), real(2, 6, grad=False)
)
class PPOWithValueHead(nn.Module):
    """A policy and a value from the same hidden states."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.v_head = nn.Linear(HIDDEN, 1)

    def forward(self, ids, actions, old, advantages, returns):
        x = self.body(ids)
        log_probs = gathered(self.lm_head(x).float(), actions)
        values = self.v_head(x).squeeze(-1).float()
        ratio = torch.exp(log_probs - old)
        policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
        return policy + 0.1 * 0.5 * (values - returns).square().mean()


@rewritten(hidden(), weight(), labels(), number([1.0, -0.5]))
def reinforce(x, weight, ids, rewards):
    log_probs = gathered(F.linear(x, weight)[:, :-1], ids[:, 1:])
    return -(log_probs.sum(-1) * rewards).mean()


@left_alone(
    "used by broadcast_tensors", hidden(12, HIDDEN), weight(), labels(12), real(12, grad=False)
)
def categorical_distribution(x, weight, actions, advantages):
    """CleanRL: torch.distributions, whose constructor normalises the logits."""
    policy = torch.distributions.Categorical(logits=F.linear(x, weight), validate_args=False)
    loss = -(policy.log_prob(actions) * advantages).mean()
    return loss - 0.01 * policy.entropy().mean()


@left_alone("used by", hidden(12, HIDDEN), weight(), random=True)
def sampled_actions(x, weight):
    """The actions are drawn from the logits of this graph."""
    logits = F.linear(x, weight)
    actions = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)
    return F.cross_entropy(logits, actions)


@rewritten(
    hidden(),
    weight(),
    labels(2, 5),
    log_probability(),
    log_probability(),
    real(2, 5, grad=False),
    mask(2, 5),
)
def truncated_importance_sampling(x, weight, responses, old, rollout, advantages, response_mask):
    """The sampler's probabilities differ from the trainer's: a weight without gradient."""
    log_prob = -F.cross_entropy(
        F.linear(x, weight)[:, :-1].transpose(1, 2).float(), responses, reduction="none"
    )
    weights = torch.exp(old - rollout).clamp(max=2.0)
    ratio = torch.exp(log_prob - old)
    return -masked_mean(
        weights * torch.min(ratio, ratio.clamp(0.8, 1.2)) * advantages, response_mask
    )


@left_alone(None, labels(4, 6))
class RewardModel(nn.Module):
    """A score for each sequence: no vocabulary, and nothing to rewrite."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.score = nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, ids):
        rewards = self.score(self.body(ids))[:, -1, 0]
        return -F.logsigmoid(rewards[:2] - rewards[2:]).mean()


@rewritten(hidden(*PAIRS, HIDDEN), weight(), labels(*PAIRS, ignored=-100))
def dpo_of_two_forwards(x, weight, labels):
    """Chosen and rejected go through the head one after the other."""
    chosen = sequence_log_probabilities(F.linear(x[:2], weight), labels[:2])
    rejected = sequence_log_probabilities(F.linear(x[2:], weight), labels[2:])
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


@rewritten(hidden(), weight(), labels(), mask())
def negative_log_likelihood_with_temperature_per_call(x, weight, ids, loss_mask, temperature=0.7):
    """NeMo-RL: log-probabilities in float32 of logits cast and scaled first."""
    logits = F.linear(x, weight).to(torch.float32) / temperature
    next_tokens = ids.roll(-1, dims=1)
    log_probs = F.log_softmax(logits, dim=-1)
    token_log_probs = log_probs.gather(dim=-1, index=next_tokens.unsqueeze(-1)).squeeze(-1)
    return -(token_log_probs[:, :-1] * loss_mask[:, 1:]).sum() / loss_mask[:, 1:].sum()


@rewritten(hidden(), weight(), labels(), number([1.0, -1.0]), graphs=QUANTILE_GRAPHS)
def grpo_of_uncertain_tokens(x, weight, ids, advantages):
    """TRL's top-entropy quantile: only tokens whose entropy is high count."""
    logits = F.linear(x, weight)[:, :-1] / 0.9
    per_token = selective_log_softmax(logits, ids[:, 1:])
    with torch.no_grad():
        log_p = logits.log_softmax(-1)
        entropies = -(log_p.exp() * log_p).sum(-1)
        high = (entropies >= torch.quantile(entropies, 0.5)).float()
    return -masked_mean(per_token * advantages[:, None], high)


@rewritten(hidden(), weight(), labels(), number([1.0, -1.0]))
def entropy_by_chunks(x, weight, ids, advantages):
    """TRL's entropy_from_logits: rows are flattened and split, and a list is joined."""
    logits = F.linear(x, weight)[:, :-1]
    per_token = selective_log_softmax(logits, ids[:, 1:])
    pieces = []
    with torch.no_grad():
        for chunk in logits.reshape(-1, VOCABULARY).split(4, dim=0):
            logps = F.log_softmax(chunk, dim=-1)
            pieces.append(-(torch.exp(logps) * logps).sum(-1))
        entropies = torch.cat(pieces).reshape(per_token.shape)
    return -(per_token * advantages[:, None]).mean(), entropies
