"""The losses of language models, as their own code bases write them."""

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
    mask,
    number,
    real,
    rewritten,
    weight,
)


@rewritten(labels(), labels(ignored=-1))
class NanoGPT(nn.Module):
    """nanoGPT in training, with its tied embedding; the loss alone is returned."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.body.embedding.weight = self.lm_head.weight

    def forward(self, ids, targets):
        logits = self.lm_head(self.body(ids))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


@rewritten(labels(), labels())
class NanoGPTWithLogits(nn.Module):
    """nanoGPT returns the logits beside the loss: deferred."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids, targets):
        logits = self.lm_head(self.body(ids))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


@rewritten(hidden(), weight(), labels(ignored=-100))
def huggingface_causal(x, weight, labels):
    """ForCausalLMLoss of transformers: labels are shifted, not logits."""
    logits = F.linear(x, weight).float()
    labels = F.pad(labels, (0, 1), value=-100)
    shifted = labels[..., 1:].contiguous().view(-1).to(logits.device)
    return F.cross_entropy(logits.view(-1, VOCABULARY), shifted, ignore_index=-100)


@rewritten(hidden(), weight(), labels(ignored=-100), number([9]))
def huggingface_num_items_in_batch(x, weight, labels, num_items):
    """Gradient accumulation in transformers: a sum, divided by what the whole batch holds."""
    logits = F.linear(x, weight).float()
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    loss = F.cross_entropy(logits.view(-1, VOCABULARY), shifted, ignore_index=-100, reduction="sum")
    return loss / num_items.to(loss.device)


@rewritten(hidden(), weight(), labels(ignored=-100))
def huggingface_shifted_logits(x, weight, labels):
    """Older transformers: the logits are shifted and copied."""
    logits = F.linear(x, weight)
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    loss_fct = nn.CrossEntropyLoss()
    return loss_fct(shift_logits.view(-1, VOCABULARY), shift_labels.view(-1))


@rewritten(hidden(), weight(), labels())
def torchtitan(x, weight, labels):
    pred = F.linear(x, weight)
    return F.cross_entropy(pred.flatten(0, 1).float(), labels.flatten(0, 1))


@rewritten(hidden(), weight(), labels(ignored=-100))
def torchtitan_sum_over_tokens(x, weight, labels):
    """Newer torchtitan: a sum, over the number of valid tokens of the global batch."""
    pred = F.linear(x, weight)
    valid = (labels != -100).sum()
    loss = F.cross_entropy(
        pred.flatten(0, 1).float(), labels.flatten(0, 1), reduction="sum", ignore_index=-100
    )
    return loss / valid


@rewritten(hidden(), weight(), labels(ignored=0))
def llama_reference(x, weight, tokens):
    """Meta's llama scores a prompt: negative cross-entropy with classes in dimension 1."""
    logits = F.linear(x, weight).float()
    return -F.cross_entropy(
        input=logits.transpose(1, 2), target=tokens, reduction="none", ignore_index=0
    )


@rewritten(labels(), labels(), dtype=torch.bfloat16)
class Mamba(nn.Module):
    """A bfloat16 model whose logits are cast to float32 twice."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids, labels):
        logits = self.lm_head(self.body(ids).to(self.lm_head.weight.dtype)).float()
        labels = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
        return F.cross_entropy(logits.float().view(-1, VOCABULARY), labels)


class L2Wrap(torch.autograd.Function):
    """Pulls the largest logit of each row towards zero, in the backward only."""

    @staticmethod
    def forward(ctx, loss, logits):
        ctx.save_for_backward(logits)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        factor = 1e-4 / (logits.shape[0] * logits.shape[1])
        largest, where = torch.max(logits, -1, keepdim=True)
        return grad, torch.zeros_like(logits).scatter_(-1, where, largest * factor)


@left_alone("used by|autograd", hidden(), weight(), labels())
def rwkv_l2_wrap(x, weight, targets):
    """RWKV: the logits are kept for a backward of its own."""
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
    return L2Wrap.apply(loss, logits)


@rewritten(labels(), labels(2, 3, high=6), labels(2, 3), mask(2, 3))
class BertPretraining(nn.Module):
    """BERT's own pre-training: gathered masked positions, a transform, one-hot targets."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.output_bias = nn.Parameter(torch.randn(VOCABULARY))

    def forward(self, ids, positions, label_ids, label_weights):
        sequence = self.body(ids)
        index = positions.unsqueeze(-1).expand(-1, -1, sequence.size(-1))
        x = torch.gather(sequence, 1, index).reshape(-1, sequence.size(-1))
        x = self.norm(F.gelu(self.dense(x)))
        logits = torch.matmul(x, self.body.embedding.weight.t()) + self.output_bias
        log_probs = F.log_softmax(logits, dim=-1)
        one_hot = F.one_hot(label_ids.view(-1), VOCABULARY).to(log_probs.dtype)
        per_example = -(log_probs * one_hot).sum(-1)
        weights = label_weights.view(-1)
        return (weights * per_example).sum() / (weights.sum() + 1e-5)


@rewritten(labels(), labels(ignored=-100), labels(2, high=2))
class BertForPreTraining(nn.Module):
    """Masked language modelling plus next-sentence prediction."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.decoder = nn.Linear(HIDDEN, VOCABULARY)
        self.seq_relationship = nn.Linear(HIDDEN, 2)

    def forward(self, ids, labels, next_sentence):
        sequence = self.body(ids)
        scores = self.decoder(sequence)
        relation = self.seq_relationship(torch.tanh(sequence[:, 0]))
        loss_fct = nn.CrossEntropyLoss()
        masked = loss_fct(scores.view(-1, VOCABULARY), labels.view(-1))
        return masked + loss_fct(relation.view(-1, 2), next_sentence.view(-1))


@rewritten(labels(), labels(ignored=-100))
class RobertaHead(nn.Module):
    """dense, gelu, norm, and a decoder whose bias is a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.layer_norm = nn.LayerNorm(HIDDEN)
        self.decoder = nn.Linear(HIDDEN, VOCABULARY)
        self.bias = nn.Parameter(torch.randn(VOCABULARY))
        self.decoder.bias = self.bias

    def forward(self, ids, labels):
        x = self.layer_norm(F.gelu(self.dense(self.body(ids))))
        scores = self.decoder(x)
        return nn.CrossEntropyLoss()(scores.view(-1, VOCABULARY), labels.view(-1))


@rewritten(hidden(), weight(), bias(), labels(ignored=-100), graphs=None)
def modernbert_sparse_prediction(x, weight, bias, labels):
    """Only the masked positions are projected: a graph break before the projection."""
    labels = labels.view(-1)
    masked = labels != -100
    x = x.view(labels.shape[0], -1)[masked]
    labels = labels[masked]
    return F.cross_entropy(F.linear(x, weight, bias).float(), labels)


@rewritten(hidden(), weight(), labels(ignored=-100), graphs=None)
def masked_positions_after_the_head(x, weight, labels):
    """Logits are selected by a mask: a graph break between projection and loss."""
    logits = F.linear(x, weight)
    masked = labels != -100
    return F.cross_entropy(logits[masked], labels[masked])


@left_alone("used by", labels(), labels(ignored=-100), random=True)
class Electra(nn.Module):
    """The generator's loss, and samples from the same logits for the discriminator."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.generator = nn.Linear(HIDDEN, VOCABULARY)
        self.discriminator = nn.Linear(HIDDEN, 1)

    def forward(self, ids, labels):
        logits = self.generator(self.body(ids))
        mlm = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
        with torch.no_grad():
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            sampled = (logits - torch.log(-torch.log(uniform))).argmax(-1)
        replaced = (sampled != ids).float()
        scores = self.discriminator(self.body(sampled)).squeeze(-1)
        return mlm + 50 * F.binary_cross_entropy_with_logits(scores, replaced)


@rewritten(hidden(), weight(), labels(ignored=-100))
def t5(x, shared, labels):
    """T5 with a tied embedding scales the hidden states."""
    x = x * (HIDDEN**-0.5)
    lm_logits = F.linear(x, shared)
    loss_fct = nn.CrossEntropyLoss(ignore_index=-100)
    return loss_fct(lm_logits.view(-1, lm_logits.size(-1)), labels.view(-1))


@rewritten(hidden(), weight(), real(1, VOCABULARY, grad=False), labels())
def bart(x, weight, final_logits_bias, labels):
    """A bias of [1, vocabulary] that is a buffer."""
    logits = F.linear(x, weight)
    logits = logits + final_logits_bias.to(logits.device)
    return nn.CrossEntropyLoss()(logits.view(-1, VOCABULARY), labels.view(-1))


@rewritten(hidden(), weight(), labels())
def llm_foundry(x, weight, labels):
    """MosaicML: labels are rolled, and the last one set in place."""
    logits = F.linear(x, weight)
    targets = torch.roll(labels, shifts=-1)
    targets[:, -1] = -100
    losses = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction="none")
    return losses.sum() / (targets != -100).sum()


@rewritten(hidden(2, 2, 6, HIDDEN), weight(), labels(2, 6, ignored=-100))
def prophetnet(x, weight, labels):
    """Two n-gram streams at once, in four dimensions, as log-probabilities in float32."""
    logits = F.linear(x, weight)
    expanded = labels.new_zeros(2, labels.size(0), labels.size(1)).fill_(-100)
    for i in range(2):
        expanded[i, :, :] = labels
    logits = logits.transpose(0, 1).contiguous()
    lprobs = F.log_softmax(logits.view(-1, logits.size(-1)), dim=-1, dtype=torch.float32)
    return F.nll_loss(lprobs, expanded.view(-1), reduction="mean")


@rewritten(hidden(), weight(), bias(), labels())
def perceiver(x, embedding, bias, labels):
    """The decoder multiplies rows by the embedding, between two reshapes."""
    batch, time, size = x.shape
    output = torch.matmul(x.reshape([-1, size]), embedding.transpose(0, 1)) + bias
    logits = output.reshape([batch, time, -1])
    return nn.CrossEntropyLoss()(logits.view(-1, VOCABULARY), labels.view(-1))


@rewritten(hidden(), weight(), labels(ignored=1))
def fairseq_cross_entropy(x, weight, target):
    """fairseq: normalized log-probabilities of the model, then a summed nll_loss."""
    net_output = F.linear(x, weight)
    lprobs = F.log_softmax(net_output, dim=-1, dtype=torch.float32)
    lprobs = lprobs.view(-1, lprobs.size(-1))
    return F.nll_loss(lprobs, target.view(-1), ignore_index=1, reduction="sum")


@rewritten(hidden(6, 2, HIDDEN), weight(), bias(), labels(12))
def word_language_model(x, weight, bias, targets):
    """PyTorch's own example: LogSoftmax in the model, NLLLoss outside."""
    decoded = F.linear(x, weight, bias).view(-1, VOCABULARY)
    return nn.NLLLoss()(F.log_softmax(decoded, dim=1), targets)


@rewritten(hidden(), weight(), labels(ignored=-100))
def whisper(x, token_embedding, tokens):
    """Logits by @ with the embedding in the input's dtype, then float."""
    logits = (x @ torch.transpose(token_embedding.to(x.dtype), 0, 1)).float()
    return F.cross_entropy(logits.transpose(1, 2), tokens)


@rewritten(hidden(), weight(), labels())
def shifted_hidden_states(x, weight, ids):
    """The hidden states are shifted before the head."""
    logits = F.linear(x[:, :-1], weight)
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))


@rewritten(labels(), labels(2, 3, 6, ignored=-100))
class Moshi(nn.Module):
    """A linear for each codebook, stacked; the loss is averaged over codebooks."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.linears = nn.ModuleList(nn.Linear(HIDDEN, VOCABULARY, bias=False) for _ in range(3))

    def forward(self, ids, codes):
        x = self.body(ids)
        logits = torch.stack([linear(x) for linear in self.linears], dim=1)
        loss = 0
        for k in range(codes.shape[1]):
            loss = loss + F.cross_entropy(
                logits[:, k].reshape(-1, VOCABULARY).float(), codes[:, k].reshape(-1)
            )
        return loss / codes.shape[1]


@rewritten(hidden(), weight(), bias(), hidden(), weight(), labels(), labels())
def xtts(text, text_weight, text_bias, mel, mel_weight, text_targets, mel_targets):
    """XTTS and Tortoise: two heads, classes in dimension 1, a weighted sum of two losses."""
    text_logits = F.linear(text, text_weight, text_bias).permute(0, 2, 1)
    mel_logits = F.linear(mel, mel_weight).permute(0, 2, 1)
    loss_text = F.cross_entropy(text_logits, text_targets.long(), ignore_index=-1)
    loss_mel = F.cross_entropy(mel_logits, mel_targets.long(), ignore_index=-1)
    return 0.01 * loss_text.mean() + loss_mel.mean()


@rewritten(hidden(), weight(), labels(ignored=-100))
def mixtral_auxiliary_loss(x, weight, labels):
    """A router's loss is added to the loss in place."""
    logits = F.linear(x, weight).float()
    loss = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
    loss += 0.02 * x.square().mean()
    return loss


@rewritten(hidden(), weight(), labels())
def llama_factory_dft(x, weight, labels):
    """Dynamic fine-tuning: each token's loss times its probability, without gradient."""
    shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    logits = F.linear(x, weight).float().view(-1, VOCABULARY)
    per_token = F.cross_entropy(logits, shift_labels, ignore_index=-100, reduction="none")
    valid = shift_labels != -100
    weighted = per_token * torch.exp(-per_token.detach()) * valid
    return weighted.sum() / valid.sum().clamp(min=1)


@rewritten(hidden(), weight(), labels(), real(BATCH, TIME, grad=False))
def rho_1(x, weight, labels, reference_losses):
    """Only the tokens that a reference model finds easier are trained on."""
    losses = F.cross_entropy(F.linear(x, weight).mT.contiguous(), labels, reduction="none")
    excess = (losses - reference_losses).detach().view(-1)
    chosen = excess.topk(5).indices
    return losses.view(-1)[chosen].mean()


@left_alone("one entry", hidden(), weight(), labels(), mask(), real(BATCH, 1, grad=False))
def masked_diffusion(x, weight, tokens, masked, noise):
    """MDLM: the mask token is impossible; log-probabilities weighted by the noise schedule."""
    logits = F.linear(x, weight)
    logits[:, :, VOCABULARY - 1] += -1e6
    logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    tokens = tokens.clamp(max=VOCABULARY - 2)
    log_p = torch.gather(logits, -1, tokens[:, :, None]).squeeze(-1)
    return -(log_p * masked / (noise.sigmoid() + 0.1)).sum() / masked.sum()


@rewritten(hidden(), weight(), labels(), labels(), number(0.3))
def mixed_targets(x, weight, first, second, share):
    """Mixup: two targets for the same logits."""
    logits = F.linear(x, weight).view(-1, VOCABULARY)
    criterion = nn.CrossEntropyLoss()
    mixed = share * criterion(logits, first.view(-1))
    return mixed + (1 - share) * criterion(logits, second.view(-1))


@rewritten(hidden(BATCH, TIME, 3, HIDDEN), weight(), labels(BATCH, TIME, 3))
def meta_multi_token(x, weight, targets):
    """Several future tokens from stacked trunks through one unembedding, in four dimensions."""
    logits = F.linear(x, weight)
    losses = [
        F.cross_entropy(logits[:, :, k].reshape(-1, VOCABULARY), targets[:, :, k].reshape(-1))
        for k in range(3)
    ]
    return sum(losses)
