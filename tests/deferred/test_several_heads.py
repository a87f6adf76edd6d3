"""Functions of the deferred logits of several heads, in eager code."""

import pytest
import torch
import torch.nn.functional as F
from deferred_logits import TARGET, VOCABULARY, Head

from cce_inductor.deferred.tensor import defer


class Heads:
    """A student and a teacher of another width, with logits that are deferred or not."""

    def __init__(self, *, trains_teacher=False):
        self.student = Head()
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(*TARGET.shape, 6, generator=generator)
        self.weight = torch.randn(VOCABULARY, 6, generator=generator)
        for leaf in (self.hidden, self.weight):
            leaf.requires_grad_(trains_teacher)

    @property
    def leaves(self):
        leaves = [*self.student.leaves, self.hidden, self.weight]
        return [leaf for leaf in leaves if leaf.requires_grad]

    def deferred(self):
        teacher = defer(self.hidden, self.weight, None, torch.float32)
        return self.student.deferred(), teacher

    def plain(self):
        return self.student.plain(), F.linear(self.hidden, self.weight)


def generalized_jsd(student, teacher, beta=0.3, reduce=torch.logsumexp):
    """TRL's GKD."""
    student, teacher = (F.log_softmax(each / 0.9, dim=-1) for each in (student, teacher))
    weights = torch.tensor(beta)
    mixture = reduce(
        torch.stack([student + torch.log1p(-weights), teacher + torch.log(weights)]), dim=0
    )
    of_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    of_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    jsd = weights * of_teacher + (1 - weights) * of_student
    return jsd[TARGET > 10].sum() / (TARGET > 10).sum()


def forward_kl(student, teacher):
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


def reverse_kl(student, teacher):
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1).mean()


def of_stack(reduce, dim=0):
    """Return the cross-entropy of a reduction of both heads' stacked logits."""

    def loss(student, teacher):
        logits = reduce(torch.stack([student, teacher], dim=dim))
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), TARGET.flatten())

    return loss


LOSSES = {
    "forward kl": forward_kl,
    "reverse kl": reverse_kl,
    "both": lambda s, t: forward_kl(s, t) + forward_kl(t, s),
    "jsd": generalized_jsd,
    "jsd by a method": lambda s, t: generalized_jsd(s, t, reduce=torch.Tensor.logsumexp),
    "contrasted": lambda s, t: F.cross_entropy((s - 0.5 * t).flatten(0, 1), TARGET.flatten()),
    "shifted": lambda s, t: reverse_kl(s[:, :-1], t[:, 1:]),
    "beside a loss": lambda s, t: (
        forward_kl(s, t) + F.cross_entropy(s.flatten(0, 1), TARGET.flatten())
    ),
    "sum": of_stack(lambda z: z.sum(0)),
    "mean": of_stack(lambda z: torch.mean(z, dim=(0,))),
    "mean of the last but one": of_stack(lambda z: z.mean(-2), dim=2),
    "sum that keeps the dimension": of_stack(lambda z: torch.sum(z, 0, keepdim=True)),
}


@pytest.mark.parametrize("trains_teacher", [False, True])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_neither_is_computed(loss, trains_teacher, computed):
    heads = Heads(trains_teacher=trains_teacher)
    deferred = heads.deferred()
    value = loss(*deferred)
    got = torch.autograd.grad(value, heads.leaves)
    assert all(logits.is_deferred for logits in deferred)
    assert not computed
    heads = Heads(trains_teacher=trains_teacher)
    plain = loss(*heads.plain())
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-6)
    want = torch.autograd.grad(plain, heads.leaves)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


STACKS = {
    "taken": lambda z: z[1],
    "sum over rows": lambda z: z.sum(1),
    "sum over both": lambda z: z.sum((0, 1)),
    "sum of all": lambda z: z.sum(),
    "sum in another dtype": lambda z: z.sum(0, dtype=torch.float64),
    "greatest": lambda z: z.amax(0),
    "greatest with its index": lambda z: z.max(0).values,
    "sum after a change": lambda z: z.mul_(2).sum(0),
    "sum of a view": lambda z: z.transpose(0, 1).sum(0),
    "sum of a function": lambda z: z.tanh().sum(0),
    "numpy": lambda z: z * float(z.detach().numpy().mean()),
}


@pytest.mark.parametrize("function", STACKS.values(), ids=STACKS)
def test_other_functions_of_a_stack(function):
    def run(heads, logits):
        result = function(torch.stack(logits))
        weights = torch.arange(1.0, result.numel() + 1).view(result.shape)
        return [result, *torch.autograd.grad((result * weights).sum(), heads.leaves)]

    deferred, plain = Heads(trains_teacher=True), Heads(trains_teacher=True)
    for got, want in zip(
        run(deferred, deferred.deferred()), run(plain, plain.plain()), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-3)


def test_a_part_that_changes_before_the_reduction():
    heads = Heads()
    student, teacher = heads.deferred()
    stack = torch.stack([student, teacher])
    teacher.zero_()
    got = stack.sum(0)
    student, teacher = heads.plain()
    torch.testing.assert_close(got, student + teacher)


def test_stack_without_a_gradient_is_computed():
    """People collect logits in evaluation, and may read them after the weight has changed."""
    with torch.no_grad():
        stack = torch.stack(Heads().deferred())
    assert type(stack) is torch.Tensor


# A teacher whose logits are stored


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_student_is_not_computed(loss, computed):
    heads = Heads()
    (student, _), (_, teacher) = heads.deferred(), heads.plain()
    value = loss(student, teacher)
    value.backward()
    assert student.is_deferred
    assert not computed
    other = Heads()
    plain = loss(*other.plain())
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-6)
    plain.backward()
    for leaf, expected in zip(heads.leaves, other.leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=2e-5, atol=1e-6)


def test_teacher_that_changes_after_it_was_read():
    hidden, weight = torch.randn(2, 7, 8), torch.randn(VOCABULARY, 8, requires_grad=True)
    teacher = torch.randn(2, 7, VOCABULARY)
    want = (hidden @ weight.T - teacher).logsumexp(-1).sum()
    difference = defer(hidden, weight, None, torch.float32) - teacher
    teacher.zero_()
    got = difference.logsumexp(-1).sum()
    assert difference.is_deferred
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(each, weight)[0] for each in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_stack_whose_gradient_somebody_sees():
    """The reduction must not bypass the stack's own place in the autograd graph."""

    def run(heads, logits):
        stack = torch.stack(logits)
        stack.register_hook(lambda gradient: gradient * 2)
        stack.logsumexp(0).sum().backward()
        return [leaf.grad for leaf in heads.leaves]

    def retained(heads, logits):
        stack = torch.stack(logits)
        stack.retain_grad()
        stack.logsumexp(0).sum().backward()
        return [stack.grad, *(leaf.grad for leaf in heads.leaves)]

    def detached(heads, logits):
        stack = torch.stack(logits)
        stack.detach_()
        return [stack.sum(0)]

    for act in (run, retained, detached):
        deferred, plain = Heads(trains_teacher=True), Heads(trains_teacher=True)
        got, want = act(deferred, deferred.deferred()), act(plain, plain.plain())
        for one, other in zip(got, want, strict=True):
            assert one.requires_grad == other.requires_grad
            torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [4, -5])
def test_reduction_over_a_dimension_that_a_stack_has_not(dim):
    with pytest.raises(IndexError):
        torch.stack(Heads().deferred()).sum(dim)


def test_mean_of_great_float16_values():
    hidden = torch.full((1, 2, 1), 60000.0, dtype=torch.float16)
    weight = torch.ones(3, 1, dtype=torch.float16, requires_grad=True)
    logits = defer(hidden, weight, None, torch.float16)
    assert torch.stack([logits, logits]).mean(0).plain().isfinite().all()


def test_difference_that_needs_no_gradient_is_computed():
    """Without a gradient, the result may be all that a person keeps."""
    with torch.no_grad():
        difference = Heads().deferred()[0] - torch.ones(*TARGET.shape, VOCABULARY)
    assert type(difference) is torch.Tensor
