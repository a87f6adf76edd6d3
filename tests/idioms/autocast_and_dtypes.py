"""The same loss in other dtypes, and in autocast."""

import torch
import torch.nn.functional as F
from torch import nn

from .corpus import HIDDEN, VOCABULARY, Body, bias, hidden, labels, left_alone, rewritten, weight

BFLOAT16 = {"dtype": torch.bfloat16}


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def loss_of(logits, labels, **options):
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), **options)


@rewritten(labels(), labels(), around=autocast, rounded=torch.bfloat16)
class AutocastOutside(nn.Module):
    """The training loop's autocast is around the compiled model."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids, labels):
        return loss_of(self.head(self.body(ids)), labels)


@rewritten(hidden(), weight(), bias(), labels(), rounded=torch.bfloat16)
def autocast_inside(x, weight, bias, labels):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = F.linear(x, weight, bias)
        return loss_of(logits, labels)


@rewritten(hidden(), weight(), labels(), rounded=torch.bfloat16)
def loss_outside_of_autocast(x, weight, labels):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = F.linear(x, weight)
    return loss_of(logits.float(), labels)


@rewritten(hidden(), weight(), labels(), around=autocast, rounded=torch.bfloat16)
def autocast_disabled_around_the_loss(x, weight, labels):
    logits = F.linear(x, weight)
    with torch.autocast("cpu", enabled=False):
        return loss_of(logits.float(), labels)


@rewritten(hidden(), weight(), labels(), around=autocast, rounded=torch.bfloat16)
def head_without_autocast(x, weight, labels):
    """Everything in autocast but the head, which is float32."""
    with torch.autocast("cpu", enabled=False):
        return loss_of(F.linear(x.float(), weight.float()), labels)


@rewritten(hidden(), weight(), labels(), around=autocast, rounded=torch.bfloat16)
def log_softmax_in_autocast(x, weight, labels):
    """autocast runs log_softmax in float32 by itself."""
    log_probs = F.log_softmax(F.linear(x, weight), dim=-1)
    return -log_probs.gather(-1, labels.unsqueeze(-1)).mean()


@rewritten(hidden(**BFLOAT16), weight(**BFLOAT16), labels())
def bfloat16_loss(x, weight, labels):
    """Nothing is cast: the loss is bfloat16, too."""
    return loss_of(F.linear(x, weight), labels)


@rewritten(hidden(**BFLOAT16), weight(**BFLOAT16), labels())
def bfloat16_and_float(x, weight, labels):
    return loss_of(F.linear(x, weight).float(), labels)


@rewritten(hidden(**BFLOAT16), weight(**BFLOAT16), labels())
def losses_cast_afterwards(x, weight, labels):
    return loss_of(F.linear(x, weight), labels, reduction="none").float().mean()


@rewritten(hidden(**BFLOAT16), weight(**BFLOAT16), labels())
def log_softmax_with_dtype(x, weight, labels):
    logits = F.linear(x, weight)
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    return F.nll_loss(log_probs.view(-1, VOCABULARY), labels.view(-1))


@rewritten(hidden(**BFLOAT16), weight(**BFLOAT16), labels())
def bfloat16_log_softmax(x, weight, labels):
    """The log-probabilities are rounded to bfloat16 before they are gathered."""
    log_probs = F.linear(x, weight).log_softmax(-1)
    return -log_probs.gather(-1, labels.unsqueeze(-1)).float().mean()


@rewritten(hidden(**BFLOAT16), weight(**BFLOAT16), labels())
def bfloat16_logsumexp(x, weight, labels):
    logits = F.linear(x, weight)
    target = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (torch.logsumexp(logits, -1) - target).float().mean()


@rewritten(hidden(dtype=torch.float16), weight(dtype=torch.float16), labels())
def float16_and_float(x, weight, labels):
    return loss_of(F.linear(x, weight).float(), labels)


@rewritten(hidden(dtype=torch.float64), weight(dtype=torch.float64), labels())
def float64(x, weight, labels):
    return loss_of(F.linear(x, weight), labels)


@rewritten(hidden(), weight(), labels())
def float32_summed_in_float64(x, weight, labels):
    logits = F.linear(x, weight).double()
    return loss_of(logits, labels).float()


@left_alone("used by|cast", hidden(), weight(), labels())
def rounded_to_float8(x, weight, labels):
    """Simulated quantisation of the logits: rounding without a gradient of its own."""
    logits = F.linear(x, weight)
    rounded = logits + (logits.to(torch.float8_e4m3fn).to(torch.float32) - logits).detach()
    return loss_of(rounded, labels)
