"""What stands around the loss: checkpoints, modes, dynamic shapes, modules, own functions."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint

from .corpus import HIDDEN, VOCABULARY, Body, hidden, labels, left_alone, mask, rewritten, weight


def loss_of(logits, labels, **options):
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1), **options)


@rewritten(hidden(), weight(), labels())
def checkpointed_head_and_loss(x, weight, labels):
    def head(x, weight, labels):
        return loss_of(F.linear(x, weight).float(), labels)

    return checkpoint.checkpoint(head, x, weight, labels, use_reentrant=False)


@rewritten(hidden(), weight(), labels())
def checkpointed_chunks(x, weight, labels):
    """ArcticTraining and others: a loop of checkpointed pieces."""

    def piece(x, labels):
        return loss_of(F.linear(x, weight).float(), labels, reduction="sum")

    total = 0.0
    for rows, targets in zip(x.split(2, 1), labels.split(2, 1), strict=True):
        total = total + checkpoint.checkpoint(piece, rows, targets, use_reentrant=False)
    return total / labels.numel()


@rewritten(hidden(), weight(), labels())
def checkpointed_log_probabilities(x, weight, ids):
    """Log-probabilities of tokens, by hand, in a checkpoint."""

    def log_probabilities(x, weight, ids):
        logits = F.linear(x, weight).float()
        return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)

    return -checkpoint.checkpoint(log_probabilities, x, weight, ids, use_reentrant=False).mean()


@left_alone("made by tag_activation_checkpoint", hidden(), weight(), labels())
def checkpointed_head_alone(x, weight, labels):
    """The logits leave the checkpoint, and the loss is outside."""
    logits = checkpoint.checkpoint(F.linear, x, weight, use_reentrant=False)
    return loss_of(logits, labels)


@rewritten(hidden(), weight(), labels(ignored=-100))
@torch.no_grad()
def evaluation(x, weight, labels):
    losses = loss_of(F.linear(x, weight).float(), labels, reduction="none")
    return losses.sum(), (labels != -100).sum()


@rewritten(hidden(), weight(), labels())
def evaluation_by_hand(x, weight, ids):
    with torch.no_grad():
        logits = F.linear(x, weight)[:, :-1]
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return log_probs.sum(-1), log_probs.mean(-1).neg().exp()


class Model(nn.Module):
    """Its parameters have static sizes, whatever is dynamic."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)


@rewritten(labels(), labels(ignored=-100), dynamic=True)
class DynamicShapes(Model):
    def forward(self, ids, labels):
        logits = self.head(self.body(ids))[..., :-1, :].contiguous()
        return loss_of(logits.float(), labels[..., 1:])


@rewritten(labels(), labels(), dynamic=True)
class DynamicSoftcap(Model):
    """The cap's constants are symbols."""

    def forward(self, ids, labels):
        logits = 30.0 * torch.tanh(self.head(self.body(ids)) / 30.0)
        return loss_of(logits, labels)


@rewritten(labels(), mask(), dynamic=True)
class DynamicLogProbabilities(Model):
    def forward(self, ids, loss_mask):
        logits = self.head(self.body(ids))
        batch, time, _ = logits.shape
        log_probs = torch.gather(logits.log_softmax(-1), 2, ids.unsqueeze(2)).squeeze(2)
        return -(log_probs * loss_mask).sum() / (batch * time)


@rewritten(labels(), labels(), dynamic=True)
class DynamicOneHot(Model):
    def forward(self, ids, targets):
        logits = self.head(self.body(ids))
        one_hot = F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
        return -(one_hot * F.log_softmax(logits, -1)).sum(-1).mean()


@rewritten(labels(), labels(), dynamic=True)
class DynamicZLoss(Model):
    def forward(self, ids, targets):
        logits = self.head(self.body(ids)).float()
        z_loss = 1e-2 * logits.logsumexp(-1).square().sum() / targets.numel()
        return loss_of(logits, targets) + z_loss


@rewritten(hidden(), weight(), labels(), dynamic=True)
def dynamic_vocabulary(x, weight, labels):
    """A weight that is no parameter has a dynamic size, too."""
    return loss_of(F.linear(x, weight), labels)


@rewritten(labels(), labels(ignored=-100))
class LossModule(nn.Module):
    """The loss is a module of its own; the result a tuple with a dictionary in it."""

    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.ce = nn.CrossEntropyLoss(ignore_index=-100)

        def forward(self, logits, targets):
            return self.ce(logits.transpose(1, 2), targets)

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.criterion = self.Criterion()

    def forward(self, ids, labels):
        loss = self.criterion(self.head(self.body(ids)), labels)
        return loss, {"perplexity": loss.detach().exp(), "tokens": (labels != -100).sum()}


@rewritten(hidden(), weight(), labels(), mask())
def branches_of_the_configuration(x, weight, labels, loss_mask, reduction="none", z=1e-4):
    """Options decide in Python; the graph holds one branch."""
    logits = F.linear(x, weight).float()
    loss = loss_of(logits, labels, reduction=reduction)
    if reduction == "none":
        loss = (loss * loss_mask.reshape(-1)).sum() / loss_mask.sum()
    if z is not None:
        loss = loss + z * logits.logsumexp(-1).pow(2).mean()
    return loss


@rewritten(hidden(), weight(), labels(), labels())
def two_microbatches(x, weight, first, second):
    """Two losses of two projections with the same weight."""
    return (loss_of(F.linear(x, weight), first) + loss_of(F.linear(x.flip(1), weight), second)) / 2


@rewritten(hidden(grad=False), weight(), labels())
def only_the_head_is_trained(x, weight, labels):
    return loss_of(F.linear(x, weight), labels)


@rewritten(hidden(), weight(grad=False), labels())
def frozen_head(x, weight, labels):
    return loss_of(F.linear(x, weight), labels)


class ChunkedLoss(torch.autograd.Function):
    """A loss that computes its gradient in the forward, piece by piece, as Liger's does."""

    @staticmethod
    def forward(ctx, x, weight, labels):
        rows = x.view(-1, x.shape[-1])
        total = rows.new_zeros(())
        grad_rows, grad_weight = torch.zeros_like(rows), torch.zeros_like(weight)
        for start in range(0, rows.shape[0], 4):
            piece, target = rows[start : start + 4], labels.view(-1)[start : start + 4]
            log_probs = F.log_softmax(piece @ weight.t(), -1)
            total = total - log_probs.gather(-1, target[:, None]).sum()
            grad = log_probs.exp() - F.one_hot(target, weight.shape[0])
            grad_rows[start : start + 4] = grad @ weight
            grad_weight += grad.t() @ piece
        ctx.save_for_backward(grad_rows.view_as(x), grad_weight)
        return total / rows.shape[0]

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        count = grad_x.numel() // grad_x.shape[-1]
        return grad * grad_x / count, grad * grad_weight / count, None


@left_alone(None, hidden(), weight(), labels())
def own_chunked_function(x, weight, labels):
    """Someone has done it by hand already."""
    return ChunkedLoss.apply(x, weight, labels)


class OwnCrossEntropy(torch.autograd.Function):
    """Cross-entropy with a backward of its own, as Megatron's and T5X's are."""

    @staticmethod
    def forward(ctx, logits, labels):
        lse = logits.logsumexp(-1)
        ctx.save_for_backward(logits, labels, lse)
        return lse - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        logits, labels, lse = ctx.saved_tensors
        probabilities = (logits - lse.unsqueeze(-1)).exp()
        probabilities = probabilities - F.one_hot(labels, logits.shape[-1])
        return probabilities * grad.unsqueeze(-1), None


@left_alone(None, hidden(), weight(), labels())
def own_cross_entropy_function(x, weight, labels):
    """Its backward is code that nobody can look into."""
    return OwnCrossEntropy.apply(F.linear(x, weight), labels).mean()


@rewritten(hidden(), weight(), labels(), graphs=None)
def loss_outside_of_the_graph(x, weight, labels):
    """A graph break, by a print say, between projection and loss."""
    logits = F.linear(x, weight)
    torch._dynamo.graph_break()
    return loss_of(logits, labels)


@rewritten(hidden(), weight(), labels())
def straight_through(x, weight, labels):
    """The straight-through trick: logits detached in one path, kept in the other."""
    logits = F.linear(x, weight)
    loss = loss_of(logits, labels)
    return loss + (logits - logits.detach()).sum() + logits.detach().sin().sum()


@rewritten(hidden(), weight(), labels())
def stop_gradient_to_the_head(x, weight, labels):
    """A loss of detached logits beside their sum."""
    logits = F.linear(x, weight)
    return loss_of(logits.detach(), labels) + logits.sigmoid().mean()


@rewritten(hidden(), weight(), labels())
def closure(x, weight, labels):
    """The head is a closure that is called later."""

    def head(rows):
        return F.linear(rows, weight)

    def criterion(make, rows, targets):
        return loss_of(make(rows), targets)

    return criterion(head, x, labels)


@rewritten(hidden(), weight(), labels())
def loss_in_a_loop_over_sequences(x, weight, labels):
    """One sequence at a time, of logits made at once."""
    logits = F.linear(x, weight)
    losses = [F.cross_entropy(row, target) for row, target in zip(logits, labels, strict=True)]
    return torch.stack(losses).mean()


@left_alone("torch.func transform", hidden(), weight(), labels())
def vectorised_over_sequences(x, weight, labels):
    """torch.func.vmap of the loss of one sequence."""
    logits = F.linear(x, weight)
    return torch.func.vmap(F.cross_entropy)(logits, labels).mean()


@rewritten(labels(), labels())
class LayerSkip(Model):
    """Early exit: the same head after every layer, later layers count more."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))

    def forward(self, ids, targets):
        x, loss = self.body(ids), 0.0
        for depth, layer in enumerate(self.layers):
            x = x + F.gelu(layer(x))
            loss = loss + (depth + 1) / 3 * loss_of(self.head(x).float(), targets)
        return loss
