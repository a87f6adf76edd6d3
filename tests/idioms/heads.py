"""Ways to make logits."""

import torch
import torch.nn.functional as F
from torch import nn

from .corpus import (
    BATCH,
    HIDDEN,
    TIME,
    VOCABULARY,
    Body,
    bias,
    hidden,
    labels,
    left_alone,
    number,
    real,
    rewritten,
    weight,
)


def loss_of(logits, labels, **options):
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1), **options)


@rewritten(hidden(), weight(HIDDEN, VOCABULARY), bias(), labels())
def conv1d_of_transformers(x, weight, bias, labels):
    """GPT's Conv1D: addmm with a weight of [hidden, vocabulary]."""
    size = (*x.size()[:-1], VOCABULARY)
    logits = torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(size)
    return loss_of(logits, labels)


@rewritten(hidden(BATCH, HIDDEN, TIME), weight(VOCABULARY, HIDDEN, 1), bias(), labels())
def convolution_of_width_one(x, weight, bias, labels):
    """WaveNet: channels first, so classes are in dimension 1."""
    return F.cross_entropy(F.conv1d(x, weight, bias), labels)


@rewritten(labels(), labels())
class ConvolutionHead(nn.Module):
    """The same as a module on [batch, time, hidden]."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.head = nn.Conv1d(HIDDEN, VOCABULARY, 1)

    def forward(self, ids, labels):
        logits = self.head(self.body(ids).transpose(1, 2)).transpose(1, 2)
        return loss_of(logits, labels)


@rewritten(hidden(BATCH, HIDDEN, 3, 2), weight(VOCABULARY, HIDDEN, 1, 1), labels(BATCH, 3, 2))
def pixels(x, weight, labels):
    """Image tokens: a 1x1 convolution in two dimensions."""
    return F.cross_entropy(F.conv2d(x, weight), labels)


@rewritten(hidden(), weight(VOCABULARY, 12), weight(4, VOCABULARY), bias(), labels())
def mobilebert(x, embedding, dense, bias, labels):
    """The embedding is narrower than the model: it is extended by a second weight."""
    logits = x.matmul(torch.cat([embedding.t(), dense], dim=0))
    logits += bias
    return loss_of(logits, labels)


@rewritten(hidden(), weight(30, HIDDEN), weight(7, HIDDEN), labels())
def extended_vocabulary(x, old, new, labels):
    """New tokens have a weight of their own; the weights are joined."""
    return loss_of(F.linear(x, torch.cat([old, new])), labels)


@rewritten(hidden(), weight(30, HIDDEN, grad=False), weight(7, HIDDEN), labels())
def joined_logits(x, old, new, labels):
    """The same, but the logits are joined."""
    logits = torch.cat([F.linear(x, old), F.linear(x, new)], dim=-1)
    return loss_of(logits, labels)


@rewritten(hidden(), weight(VOCABULARY, 8), weight(8, HIDDEN), bias(8), bias(), labels())
def albert(x, embedding, dense, dense_bias, bias, labels):
    """A factorised embedding: down to its size, a norm, then the tied weight."""
    x = F.layer_norm(F.gelu(F.linear(x, dense, dense_bias)), (8,))
    return loss_of(F.linear(x, embedding, bias), labels)


@rewritten(labels(), labels(BATCH, 3, TIME))
class IndependentHeads(nn.Module):
    """Heads for several future tokens, each with a loss."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, VOCABULARY) for _ in range(3))

    def forward(self, ids, targets):
        x = self.body(ids)
        losses = [loss_of(head(x), targets[:, k]) for k, head in enumerate(self.heads)]
        return torch.stack(losses).mean()


@rewritten(labels(), labels(ignored=-100))
class Medusa(nn.Module):
    """A residual block before each head; later heads look further ahead and count less."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, VOCABULARY, bias=False) for _ in range(2))

    def forward(self, ids, labels):
        x = self.body(ids)
        logits = [
            head(x + F.silu(block(x))) for block, head in zip(self.blocks, self.heads, strict=True)
        ]
        stacked = torch.stack(logits, dim=0)
        loss = 0
        for i in range(2):
            shifted = stacked[i, :, : -(2 + i)].contiguous().view(-1, VOCABULARY)
            targets = labels[..., 2 + i :].contiguous().view(-1)
            loss += nn.CrossEntropyLoss()(shifted, targets) * 0.8**i
        return loss


@rewritten(labels(), labels(BATCH, 4, TIME, ignored=-100))
class MusicGen(nn.Module):
    """Four codebooks stacked in dimension 1, each with a loss that ignores padding."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.lm_heads = nn.ModuleList(nn.Linear(HIDDEN, VOCABULARY, bias=False) for _ in range(4))

    def forward(self, ids, labels):
        x = self.body(ids)
        logits = torch.stack([head(x) for head in self.lm_heads], dim=1)[:, :, -TIME:]
        labels = labels.masked_fill(labels == 3, -100)
        loss = torch.zeros([])
        for codebook in range(4):
            flat = logits[:, codebook].contiguous().view(-1, VOCABULARY)
            loss += nn.CrossEntropyLoss()(flat, labels[:, codebook].contiguous().view(-1))
        return loss / 4


@rewritten(labels(), labels(BATCH, 4, TIME))
class AudioCraft(nn.Module):
    """audiocraft: classes last, a permute, and a mask of valid codes for each codebook."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.linears = nn.ModuleList(nn.Linear(HIDDEN, VOCABULARY) for _ in range(4))

    def forward(self, ids, codes):
        x = self.body(ids)
        logits = torch.stack([linear(x) for linear in self.linears], dim=1)
        logits = logits.permute(1, 0, 2, 3)
        ce = torch.zeros([])
        for k in range(4):
            flat = logits[k].contiguous().view(-1, VOCABULARY)
            targets = codes[:, k].contiguous().view(-1)
            ce += F.cross_entropy(flat, targets)
        return ce / 4


@left_alone("made by einsum", hidden(), weight(4, VOCABULARY, HIDDEN), labels(BATCH, 4, TIME))
def heads_of_one_einsum(x, weight, codes):
    """All codebooks from one weight of three dimensions."""
    logits = torch.einsum("bth,kvh->bktv", x, weight)
    return F.cross_entropy(logits.permute(0, 3, 1, 2), codes)


@left_alone(
    "does not keep the vocabulary", hidden(), weight(3 * VOCABULARY, HIDDEN), labels(BATCH, TIME, 3)
)
def heads_of_one_linear(x, weight, codes):
    """One wide linear whose result is split into heads."""
    logits = F.linear(x, weight).view(BATCH, TIME, 3, VOCABULARY)
    return loss_of(logits, codes)


@left_alone("splits the vocabulary", hidden(), weight(2 * VOCABULARY, HIDDEN), labels(), labels())
def halves_of_one_linear(x, weight, first, second):
    """Two vocabularies side by side in one projection, as XTTS and NLU heads do."""
    a, b = F.linear(x, weight).chunk(2, dim=-1)
    return loss_of(a, first) + loss_of(b, second)


@rewritten(labels(), labels(), labels())
class DeepSeekMTP(nn.Module):
    """Multi-token prediction: the same norm, embedding and head twice."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.project = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids, next_ids, second_ids):
        h = self.body(ids)
        loss = loss_of(self.head(h).float(), next_ids)
        h = self.project(torch.cat([h, self.body(next_ids)], dim=-1))
        extra = loss_of(self.head(h).float(), second_ids)
        return loss + 0.3 * extra


@rewritten(hidden(), weight(), labels(ignored=-100))
def litgpt_chunked(x, weight, targets):
    """lit-gpt: the head runs on pieces, their losses are joined."""
    chunks = [F.linear(piece, weight) for piece in x.split(3, dim=1)]
    logit_chunks = [chunk.reshape(-1, chunk.size(-1)) for chunk in chunks]
    target_chunks = [chunk.reshape(-1) for chunk in targets.split(3, dim=1)]
    losses = [
        F.cross_entropy(a, b, ignore_index=-100, reduction="none")
        for a, b in zip(logit_chunks, target_chunks, strict=True)
    ]
    non_masked = (targets != -100).sum()
    return torch.cat(losses).sum() / non_masked.maximum(torch.ones_like(non_masked))


@rewritten(hidden(), weight(), labels(ignored=-100))
def torchtune_chunked_output(x, weight, labels):
    """torchtune: chunks of float32 logits, summed losses over the number of valid labels."""
    logits = [F.linear(chunk, weight) for chunk in x.chunk(3, dim=1)]
    labels = [chunk.reshape(-1) for chunk in labels.chunk(3, dim=1)]
    logits = [chunk.reshape(-1, chunk.size(-1)) for chunk in logits]
    total, elements = 0.0, sum((chunk != -100).sum() for chunk in labels)
    for chunk, label in zip(logits, labels, strict=True):
        total += F.cross_entropy(chunk.float(), label, ignore_index=-100, reduction="sum")
    return total / elements


@rewritten(hidden(), weight(), labels(ignored=-100))
def chunks_of_logits(x, weight, labels):
    """The head runs once; its logits are chunked before they are cast."""
    logits = F.linear(x, weight).reshape(-1, VOCABULARY)
    total = 0.0
    for chunk, label in zip(logits.chunk(4), labels.reshape(-1).chunk(4), strict=True):
        total = total + F.cross_entropy(chunk.float(), label, reduction="sum")
    return total / (labels != -100).sum()


@left_alone(
    "reduces over the rows",
    hidden(),
    weight(3 * HIDDEN, HIDDEN),
    weight(3, HIDDEN),
    weight(),
    labels(),
)
def mixture_of_softmaxes(x, project, prior, weight, labels):
    """Yang et al.: probabilities of several projections are averaged."""
    latent = torch.tanh(F.linear(x, project)).view(-1, HIDDEN)
    prior = F.linear(x, prior).view(-1, 3).softmax(-1)
    prob = F.linear(latent, weight).softmax(-1).view(-1, 3, VOCABULARY)
    prob = (prob * prior.unsqueeze(2)).sum(1)
    return F.nll_loss(torch.log(prob + 1e-8), labels.view(-1))


@rewritten(hidden(), weight(), labels())
def baichuan_norm_head(x, weight, labels):
    """The weight's rows are normalised in every step."""
    return loss_of(F.linear(x, F.normalize(weight)), labels)


@rewritten(hidden(), weight(), real(1), labels())
def cosine_head(x, weight, scale, labels):
    """Both sides are normalised; the scale is learned and multiplies the logits."""
    logits = F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1))
    return loss_of(logits * scale.exp(), labels)


@rewritten(hidden(), weight(), real(1), labels())
def cosine_head_with_scaled_input(x, weight, scale, labels):
    logits = F.linear(scale * F.normalize(x, dim=-1), F.normalize(weight, dim=-1))
    return loss_of(logits, labels)


@rewritten(hidden(), weight(), labels())
def additive_margin(x, weight, labels, scale=8.0, margin=0.35):
    """CosFace: the target's cosine loses a margin before the scale."""
    cosine = F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1)).view(-1, VOCABULARY)
    one_hot = F.one_hot(labels.view(-1), VOCABULARY).to(cosine.dtype)
    return F.cross_entropy(scale * (cosine - margin * one_hot), labels.view(-1))


@rewritten(hidden(), weight(), labels())
def angular_margin(x, weight, labels, scale=8.0, margin=0.5):
    """ArcFace: the target's angle grows, in another function than its row's others."""
    cosine = F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1)).view(-1, VOCABULARY)
    theta = torch.acos(cosine.clamp(-0.999, 0.999))
    one_hot = F.one_hot(labels.view(-1), VOCABULARY).to(cosine.dtype)
    return F.cross_entropy(scale * torch.cos(theta + margin * one_hot), labels.view(-1))


def cosine_of(x, weight):
    return F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1)).view(-1, VOCABULARY)


@rewritten(hidden(), weight(), labels())
def additive_margin_in_place(x, weight, labels, scale=8.0, margin=0.35):
    """CosFace as insightface writes it."""
    labels = labels.view(-1)
    cosine = cosine_of(x, weight)
    cosine[torch.arange(0, cosine.size(0)), labels] -= margin
    return F.cross_entropy(cosine * scale, labels)


@rewritten(hidden(), weight(), labels())
def angular_margin_by_a_mask(x, weight, labels, scale=8.0):
    """ArcFace: what the margin makes of all cosines is taken where the target is."""
    labels = labels.view(-1)
    cosine = cosine_of(x, weight)
    moved = cosine * 0.88 - (1 - cosine.pow(2)).clamp(1e-6, 1).sqrt() * 0.48
    mask = torch.zeros_like(cosine, dtype=torch.bool)
    mask.scatter_(1, labels.view(-1, 1), True)
    return F.cross_entropy(torch.where(mask, moved, cosine) * scale, labels)


@rewritten(hidden(), weight(), labels(), real(12))
def magnitude_margin(x, weight, labels, magnitude, scale=8.0):
    """MagFace: a margin for each row, which is learned."""
    labels = labels.view(-1)
    cosine = cosine_of(x, weight)
    one_hot = F.one_hot(labels, VOCABULARY)
    cosine = cosine - one_hot * magnitude.sigmoid()[:, None]
    return F.cross_entropy(cosine * scale, labels)


@rewritten(hidden(), weight(), labels())
def hard_negatives(x, weight, labels, scale=8.0):
    """CurricularFace: negatives that are larger than the target's cosine with its margin grow."""
    labels = labels.view(-1)
    cosine = cosine_of(x, weight)
    target = cosine[torch.arange(0, cosine.size(0)), labels].view(-1, 1)
    moved = target * 0.88 - (1 - target.pow(2)).clamp(1e-6, 1).sqrt() * 0.48
    final = torch.where(target > -0.88, moved, target - 0.24)
    with torch.no_grad():
        hardness = target.mean() * 0.01 + 0.2
    cosine = torch.where(cosine > moved, cosine * (hardness + cosine), cosine)
    cosine = cosine.scatter(1, labels.view(-1, 1), final)
    return F.cross_entropy(cosine * scale, labels)


@rewritten(labels(), labels())
class WeightNormalisedHead(nn.Module):
    """torch's parametrization computes the weight from direction and magnitude."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        linear = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head = nn.utils.parametrizations.weight_norm(linear)

    def forward(self, ids, labels):
        return loss_of(self.head(self.body(ids)), labels)


@rewritten(
    hidden(dtype=torch.bfloat16), weight(dtype=torch.bfloat16), labels(), rounded=torch.bfloat16
)
def head_in_float32(x, weight, labels):
    """A bfloat16 model whose head is multiplied in float32."""
    return loss_of(F.linear(x.float(), weight.float()), labels)


@rewritten(hidden(dtype=torch.bfloat16), weight(), labels(), rounded=torch.bfloat16)
def weight_cast_to_the_input(x, weight, labels):
    """Master weights in float32, cast for the product (modded-nanogpt's CastedLinear)."""
    return loss_of(F.linear(x, weight.to(x.dtype)).float(), labels)


@rewritten(hidden(), weight(), labels())
def cohere(x, weight, labels):
    return loss_of((F.linear(x, weight) * 0.0625).float(), labels)


@rewritten(hidden(), weight(), labels())
def granite(x, weight, labels):
    return loss_of((F.linear(x, weight) / 8.0).float(), labels)


@rewritten(hidden(), weight(), labels())
def mup(x, weight, labels):
    """muP: multipliers before and after the head."""
    logits = F.linear(x * (1 / 4), weight)
    return loss_of(2.0 * logits, labels)


@rewritten(hidden(), weight(), real(), labels())
def learned_temperature(x, weight, log_temperature, labels):
    """A scalar parameter divides the logits."""
    return loss_of(F.linear(x, weight) / log_temperature.exp(), labels)


@rewritten(hidden(), weight(), lambda: torch.rand(BATCH, TIME, 1) + 0.5, labels())
def temperature_of_each_row(x, weight, temperature, labels):
    """Every row has a temperature, which was given."""
    return loss_of(F.linear(x, weight) / temperature, labels)


@rewritten(hidden(), weight(), weight(1, HIDDEN), labels())
def predicted_temperature(x, weight, gate, labels):
    """Every row has a temperature, which is computed from it, with gradient."""
    temperature = F.softplus(F.linear(x, gate)) + 0.5
    return loss_of(F.linear(x, weight) / temperature, labels)


@rewritten(hidden(), weight(), bias(), labels())
def learned_scale_of_each_token(x, weight, scale, labels):
    """A vector over the vocabulary multiplies the logits, as adapters and GPTQ's scales do."""
    return loss_of(F.linear(x, weight) * scale, labels)


@rewritten(hidden(), weight(), weight(4, HIDDEN), weight(VOCABULARY, 4), labels(), stored=2)
def lora_head(x, weight, lora_a, lora_b, labels):
    """PEFT: a low-rank product is added to the logits."""
    logits = F.linear(x, weight.detach()) + F.linear(F.linear(x, lora_a), lora_b) * 2.0
    return loss_of(logits, labels)


@rewritten(hidden(), hidden(), weight(), weight(), labels(), stored=2)
def sum_of_two_heads(x, y, first, second, labels):
    """Late fusion: the logits of two towers are added."""
    return loss_of(F.linear(x, first) + F.linear(y, second), labels)


@rewritten(hidden(), weight(), lambda: torch.randn(VOCABULARY).log_softmax(0), labels())
def unigram_prior(x, weight, log_prior, labels):
    """Logit adjustment: the prior's logarithm is added as a buffer."""
    return loss_of(F.linear(x, weight) + log_prior, labels)


@left_alone("used by|row to row", hidden(), weight(), labels(), labels())
def pointer_generator(x, weight, source, labels):
    """See et al.: attention is scattered into the vocabulary's distribution."""
    vocab = F.linear(x, weight).softmax(-1)
    attention = (x @ x.mT).softmax(-1)
    index = source.unsqueeze(1).expand(-1, TIME, -1)
    mixed = (0.8 * vocab).scatter_add(-1, index, 0.2 * attention)
    return F.nll_loss(mixed.log().view(-1, VOCABULARY), labels.view(-1))


@left_alone("small", hidden(), weight(10, HIDDEN), bias(10), labels(2, high=10), smallest=1 << 24)
def vit_classifier(x, weight, bias, labels):
    """Ten classes: nothing to save."""
    return F.cross_entropy(F.linear(x[:, 0], weight, bias), labels)


@rewritten(hidden(12, HIDDEN), weight(), number([0, 5, 30]), labels(3))
def selected_positions(x, weight, index, labels):
    """Only some rows of the logits count."""
    logits = F.linear(x, weight)
    return F.cross_entropy(logits[index.clamp(max=11)], labels)


@rewritten(hidden(), weight(), labels(BATCH))
def last_token(x, weight, labels):
    """Next-word prediction at the end of the context only."""
    logits = F.linear(x, weight)
    return F.cross_entropy(logits[:, -1, :], labels)


@rewritten(hidden(), weight(), labels(BATCH, high=TIME), labels(BATCH))
def last_token_of_each_length(x, weight, last, labels):
    """HF's sequence classification: one row of each sequence, by arange and its length."""
    logits = F.linear(x, weight)
    pooled = logits[torch.arange(BATCH), last]
    return F.cross_entropy(pooled, labels)


@rewritten(hidden(), weight(), labels(BATCH, 3, high=TIME), labels(BATCH, 3))
def gathered_logits(x, weight, positions, labels):
    """Rows of the logits by gather, with an expanded index."""
    logits = F.linear(x, weight)
    index = positions.unsqueeze(-1).expand(-1, -1, VOCABULARY)
    return loss_of(logits.gather(1, index), labels)


@rewritten(hidden(), weight(), labels(3, TIME))
def one_context_for_several_continuations(x, weight, labels):
    """Logits are expanded over samples."""
    logits = F.linear(x[:1], weight).expand(3, -1, -1)
    return loss_of(logits, labels)
