"""A student and a teacher, who is given as probabilities, as logits, or as a head of its own."""

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
    left_alone,
    mask,
    probabilities,
    real,
    rewritten,
    weight,
)

WIDER = 24


def teacher_logits():
    return torch.randn(BATCH, TIME, VOCABULARY)


@rewritten(hidden(), weight(), teacher_logits)
def forward_kl(x, weight, teacher_logits):
    student = F.log_softmax(F.linear(x, weight), dim=-1)
    teacher = F.softmax(teacher_logits, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean")


@rewritten(hidden(), weight(), teacher_logits, labels())
def hinton(x, weight, teacher_logits, labels, temperature=2.0, alpha=0.5):
    """Soft loss at a temperature, times its square, beside the hard loss."""
    logits = F.linear(x, weight)
    soft = F.kl_div(
        F.log_softmax(logits / temperature, dim=-1),
        F.softmax(teacher_logits / temperature, dim=-1),
        reduction="batchmean",
    ) * (temperature**2)
    hard = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
    return alpha * soft + (1 - alpha) * hard


@rewritten(hidden(), weight(), probabilities())
def soft_targets_of_cross_entropy(x, weight, teacher):
    logits = F.linear(x, weight).view(-1, VOCABULARY)
    return F.cross_entropy(logits, teacher.view(-1, VOCABULARY))


@rewritten(hidden(), weight(), probabilities(), mask())
def soft_cross_entropy_by_hand(x, weight, teacher, loss_mask):
    """MiniLLM's forward loss: the teacher's probabilities times log-probabilities, masked."""
    logprobs = F.log_softmax(F.linear(x, weight), dim=-1, dtype=torch.float32)
    losses = torch.sum(teacher * logprobs, dim=-1).view(-1)
    return -torch.sum(losses * loss_mask.view(-1)) / torch.sum(loss_mask.view(-1))


@rewritten(hidden(), weight(), lambda: teacher_logits().log_softmax(-1))
def kl_with_log_target(x, weight, teacher):
    student = F.log_softmax(F.linear(x, weight).float(), dim=-1)
    losses = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return losses.mean()


@rewritten(hidden(), weight(), teacher_logits, mask())
def reverse_kl(x, weight, teacher_logits, loss_mask):
    """The student's own probabilities weigh the difference."""
    logits = F.linear(x, weight)
    student = F.softmax(logits, dim=-1, dtype=torch.float32)
    student_log = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    teacher_log = F.log_softmax(teacher_logits, dim=-1, dtype=torch.float32)
    losses = (student * (student_log - teacher_log)).sum(-1)
    return (losses * loss_mask).sum() / loss_mask.sum()


@rewritten(hidden(), weight(), teacher_logits, labels(ignored=-100))
def generalized_jsd(x, weight, teacher_logits, labels, beta=0.5, temperature=0.9):
    """TRL's GKD: two divergences from the logarithm of the mixture."""
    student = F.log_softmax(F.linear(x, weight) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    weights = torch.tensor(beta, dtype=student.dtype)
    mixture = torch.logsumexp(
        torch.stack([student + torch.log1p(-weights), teacher + torch.log(weights)]), dim=0
    )
    of_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    of_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    jsd = weights * of_teacher + (1 - weights) * of_student
    counted = labels != -100
    return (jsd.sum(-1) * counted).sum() / counted.sum()


@rewritten(
    hidden(),
    weight(),
    hidden(BATCH, TIME, WIDER, grad=False),
    weight(VOCABULARY, WIDER, grad=False),
    labels(ignored=-100),
)
def generalized_jsd_of_two_heads(x, weight, teacher_x, teacher_weight, labels):
    """TRL's GKD in one graph with both heads."""
    with torch.no_grad():
        teacher_logits = F.linear(teacher_x, teacher_weight)
    return generalized_jsd(x, weight, teacher_logits, labels, beta=0.3)


@rewritten(hidden(), weight(), teacher_logits, mask())
def skewed_kl(x, weight, teacher_logits, loss_mask, alpha=0.1):
    """DistiLLM: divergence of the teacher from a mixture with the student."""
    teacher = F.softmax(teacher_logits, dim=-1, dtype=torch.float32)
    student = F.softmax(F.linear(x, weight), dim=-1, dtype=torch.float32)
    mixed = torch.log(alpha * teacher + (1 - alpha) * student)
    losses = torch.sum(teacher * mixed, dim=-1)
    return -(losses * loss_mask).sum() / loss_mask.sum()


@rewritten(hidden(), weight(), hidden(grad=False), weight(grad=False))
def teacher_head_in_the_graph(x, weight, teacher_x, teacher_weight):
    """Neither the student's nor the teacher's logits need to be stored."""
    with torch.no_grad():
        teacher = F.softmax(F.linear(teacher_x, teacher_weight), dim=-1)
    student = F.log_softmax(F.linear(x, weight), dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean")


@rewritten(
    hidden(),
    weight(),
    hidden(BATCH, TIME, WIDER, grad=False),
    weight(VOCABULARY, WIDER, grad=False),
    labels(),
)
def wider_teacher_at_a_temperature(x, weight, teacher_x, teacher_weight, labels, temperature=2.0):
    """A teacher of another width, beside the hard loss."""
    logits = F.linear(x, weight)
    with torch.no_grad():
        teacher_logits = F.linear(teacher_x, teacher_weight)
    kd = (
        F.kl_div(
            F.log_softmax(logits / temperature, dim=-1),
            F.softmax(teacher_logits / temperature, dim=-1),
            reduction="none",
        )
        .sum(-1)
        .mean()
        * temperature**2
    )
    return kd + F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@rewritten(hidden(), weight(), hidden(grad=False), weight(grad=False))
def reverse_kl_to_a_reference_head(x, weight, reference_x, reference_weight):
    """The exact divergence from a frozen policy, over the whole vocabulary."""
    with torch.no_grad():
        reference = F.linear(reference_x, reference_weight).log_softmax(-1)
    policy = F.linear(x, weight).log_softmax(-1)
    return (policy.exp() * (policy - reference)).sum(-1).mean()


@rewritten(
    hidden(),
    weight(),
    lambda: torch.rand(BATCH, TIME, VOCABULARY).argsort(-1)[..., :4],
    lambda: torch.randn(BATCH, TIME, 4).log_softmax(-1),
)
def top_k_of_a_stored_teacher(x, weight, indices, teacher_logprobs):
    """The teacher's best tokens and their log-probabilities were saved beforehand."""
    student = F.log_softmax(F.linear(x, weight), dim=-1)
    chosen = student.gather(-1, indices)
    teacher = teacher_logprobs.exp()
    return (teacher * (teacher_logprobs - chosen)).sum(-1).mean()


@left_alone(
    None,
    hidden(),
    weight(),
    lambda: torch.rand(BATCH, TIME, VOCABULARY).argsort(-1)[..., :4],
    real(BATCH, TIME, 4, grad=False),
)
def top_k_renormalised(x, weight, indices, teacher_logits):
    """Both are normalised over the teacher's best tokens alone: no softmax over the vocabulary."""
    chosen = torch.gather(F.linear(x, weight), -1, indices)
    student = chosen.float().log_softmax(-1)
    teacher = teacher_logits.softmax(-1)
    return F.kl_div(student, teacher, reduction="none").sum(-1).mean()


@rewritten(hidden(), weight(), teacher_logits)
def top_k_of_given_logits(x, weight, teacher_logits):
    values, indices = torch.topk(teacher_logits, k=5, dim=-1)
    student = F.log_softmax(F.linear(x, weight), dim=-1).gather(-1, indices)
    return -(values.softmax(-1) * student).sum(-1).mean()


@rewritten(hidden(), weight(), hidden(grad=False), weight(grad=False))
def top_k_of_a_teacher_head(x, weight, teacher_x, teacher_weight):
    with torch.no_grad():
        values, indices = F.linear(teacher_x, teacher_weight).topk(5, dim=-1)
    student = F.log_softmax(F.linear(x, weight), dim=-1).gather(-1, indices)
    return -(values.softmax(-1) * student).sum(-1).mean()


@rewritten(hidden(), weight(), teacher_logits, labels(), hidden(grad=False))
def distilbert(x, weight, teacher_logits, labels, teacher_x, temperature=2.0):
    """Three losses: soft targets, masked language modelling, cosine of the hidden states."""
    logits = F.linear(x, weight)
    ce = torch.nn.KLDivLoss(reduction="batchmean")(
        F.log_softmax(logits.view(-1, VOCABULARY) / temperature, dim=-1),
        F.softmax(teacher_logits.view(-1, VOCABULARY) / temperature, dim=-1),
    ) * (temperature**2)
    mlm = torch.nn.CrossEntropyLoss(ignore_index=-100)(
        logits.view(-1, logits.size(-1)), labels.view(-1)
    )
    same = torch.ones(BATCH * TIME)
    cosine = F.cosine_embedding_loss(x.view(-1, HIDDEN), teacher_x.view(-1, HIDDEN), same)
    return 5.0 * ce + 2.0 * mlm + cosine


@rewritten(hidden(), weight(), lambda: torch.randn(BATCH, TIME, VOCABULARY + 3))
def distillkit_padded_vocabulary(x, weight, teacher_logits, temperature=2.0):
    """The teacher has more tokens than the student, whose logits are padded with zeros."""
    logits = F.linear(x, weight)
    teacher_logits = teacher_logits[..., : logits.size(-1)]
    loss = F.kl_div(
        F.log_softmax(logits / temperature, dim=-1),
        F.softmax(teacher_logits / temperature, dim=-1),
        reduction="batchmean",
    )
    return loss * (temperature**2) / TIME


@left_alone("used by", hidden(), weight(), teacher_logits, labels())
def mean_squared_error_of_logits(x, weight, teacher_logits, labels):
    """No softmax in it."""
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss + F.mse_loss(logits, teacher_logits)


@rewritten(hidden(), weight(), teacher_logits)
def total_variation(x, weight, teacher_logits):
    student = F.softmax(F.linear(x, weight), dim=-1)
    teacher = F.softmax(teacher_logits, dim=-1)
    return 0.5 * (student - teacher).abs().sum(-1).mean()


@rewritten(hidden(), weight(), hidden(grad=False), weight(grad=False), mask())
def eagle(x, weight, target_x, target_weight, loss_mask):
    """EAGLE: the draft model follows the target's distribution and its hidden states."""
    with torch.no_grad():
        target_p = nn.Softmax(dim=2)(F.linear(target_x, target_weight)).detach()
    out_logp = nn.LogSoftmax(dim=2)(F.linear(x, weight))
    plogp = target_p * out_logp
    mask = loss_mask[:, :, None]
    ploss = -torch.sum(torch.sum(mask * plogp, 2)) / (mask.sum() + 1e-5)
    vloss = F.smooth_l1_loss(x, target_x, reduction="none")
    vloss = torch.sum(torch.mean(mask * vloss, 2)) / (mask.sum() + 1e-5)
    return vloss + 0.1 * ploss


@rewritten(hidden(), hidden(), weight(), labels())
def r_drop(x, y, weight, labels):
    """Two passes with different dropout, and the divergence between them in both directions."""
    p, q = F.linear(x, weight).log_softmax(-1), F.linear(y, weight).log_softmax(-1)
    kl = F.kl_div(p, q.exp(), reduction="sum") + F.kl_div(q, p.exp(), reduction="sum")
    nll = F.nll_loss(p.flatten(0, 1), labels.flatten()) + F.nll_loss(
        q.flatten(0, 1), labels.flatten()
    )
    return nll + 0.5 * kl / labels.numel()


@rewritten(hidden(), weight(), hidden(grad=False), weight(grad=False), labels(), mask())
def hard_labels_of_a_teacher_head(x, weight, teacher_x, teacher_weight, labels, loss_mask):
    """The teacher's most likely token is the target where the mask says so."""
    with torch.no_grad():
        best = F.linear(teacher_x, teacher_weight).argmax(-1)
    targets = torch.where(loss_mask.bool(), best, labels)
    return F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten())
