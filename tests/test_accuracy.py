"""The numerics contract: the fused loss is never less accurate than the graph it replaces."""

import contextlib
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F

import cce_inductor
from cce_inductor.kernels.head import TILE

TOKENS, HIDDEN, VOCABULARY = 96, 32, 2 * TILE + 300
SEEDS = 8
RESULTS = ("loss", "input", "weight", "bias")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A head with its inputs in float32; some rows are ignored."""

    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    target: torch.Tensor


def random_problem(seed, scale=1.0, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    target = torch.randint(vocabulary, (TOKENS,), generator=generator)
    target[::7] = -100
    weight = draw(vocabulary, HIDDEN) / math.sqrt(HIDDEN)
    return Problem(draw(TOKENS, HIDDEN), weight * scale, draw(vocabulary) * 0.1 * scale, target)


def peaked_problem(seed):
    """Large logits: rows with losses from 1 to 1e-7, and a few confident mistakes."""
    problem = random_problem(seed)
    generator = torch.Generator().manual_seed(seed)
    factor = torch.empty(TOKENS, 1).uniform_(10, 25, generator=generator)
    aimed_at = problem.target.clamp(min=0)
    aimed_at[1::20] = (aimed_at[1::20] + TILE) % VOCABULARY
    weight = F.normalize(problem.weight)
    input = weight[aimed_at] * factor + 0.2 * problem.input
    return dataclasses.replace(problem, input=input, weight=weight)


def far_problem(seed):
    """All logits are large, but their differences are small."""
    problem = random_problem(seed)
    return dataclasses.replace(problem, bias=problem.bias + 200)


def confident_problem(seed, confidence=(22, 40)):
    """Every row is right: the loss, and 1 minus the probability, are at most 1e-4."""
    problem = random_problem(seed)
    generator = torch.Generator().manual_seed(seed)
    factor = torch.empty(TOKENS, 1).uniform_(*confidence, generator=generator)
    weight = F.normalize(problem.weight)
    input = weight[problem.target.clamp(min=0)] * factor
    return dataclasses.replace(problem, input=input, weight=weight)


def certain_problem(seed):
    """The loss is as small as the rounding of a float32 probability near 1."""
    return confident_problem(seed, confidence=(40, 60))


@pytest.fixture(scope="session")
def trained_problem():
    """The head of a bigram model after training on a Markov source with Zipfian words."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / (torch.arange(VOCABULARY) + 3.0)
    words = lambda n: torch.multinomial(frequency, n, True, generator=generator)  # noqa: E731
    successors = words(4 * VOCABULARY).view(VOCABULARY, 4)

    def sample(n):
        """Sample words, each followed by one of its four successors or sometimes by any word."""
        word = words(n)
        choice = torch.multinomial(torch.tensor([8.0, 4, 2, 1, 3]), n, True, generator=generator)
        return word, torch.cat((successors[word], words(n)[:, None]), 1)[torch.arange(n), choice]

    embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.02).requires_grad_()
    bias = torch.zeros(VOCABULARY, requires_grad=True)
    optimizer = torch.optim.Adam((embedding, weight, bias), lr=0.03)
    losses = []
    for _ in range(150):
        word, following = sample(384)
        hidden = F.rms_norm(F.embedding(word, embedding), (HIDDEN,))
        loss = F.cross_entropy(F.linear(hidden, weight, bias), following)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]

    def problem(seed):
        generator.manual_seed(seed)
        word, following = sample(TOKENS)
        following[::7] = -100
        hidden = F.rms_norm(F.embedding(word, embedding), (HIDDEN,))
        return Problem(hidden.detach(), weight.detach(), bias.detach(), following)

    return problem


PROBLEMS = {
    "random": random_problem,
    "peaked": peaked_problem,
    "confident": confident_problem,
    "certain": certain_problem,
    "tiny": functools.partial(random_problem, scale=1e-3),
    "far from zero": far_problem,
}


@pytest.fixture(params=[*PROBLEMS, "trained"])
def problem(request):
    """A function of the seed."""
    return PROBLEMS.get(request.param) or request.getfixturevalue("trained_problem")


def upcast(logits):
    """``.float()`` that leaves the float64 reference alone."""
    return logits if logits.dtype == torch.float64 else logits.float()


def averaged(rows, target, reduction):
    """Return the mean over the rows that are not ignored, or the value of each row."""
    kept = target != -100
    rows = rows.where(kept, 0.0)
    return rows.sum() / kept.sum() if reduction == "mean" else rows


def cross_entropy(logits, target, reduction):
    return F.cross_entropy(logits, target, reduction=reduction)


def log_softmax_and_gather(logits, target, reduction):
    log_probabilities = F.log_softmax(logits, -1)
    found = log_probabilities.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return averaged(-found, target, reduction)


def z_loss(logits, target, reduction):
    lse = torch.logsumexp(logits, -1)
    rows = F.cross_entropy(logits, target, reduction="none") + 1e-2 * lse.square()
    return averaged(rows, target, reduction)


def entropy(logits, target, reduction):
    log_probabilities = F.log_softmax(logits, -1)
    return averaged(-(log_probabilities.exp() * log_probabilities).sum(-1), target, reduction)


def label_smoothing(logits, target, reduction):
    log_probabilities = F.log_softmax(logits, -1)
    found = log_probabilities.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return averaged(-0.9 * found - 0.1 * log_probabilities.mean(-1), target, reduction)


def kl_from_frequency(logits, target, reduction):
    """From fixed probabilities: those of the vocabulary's Zipfian frequency."""
    frequency = 1 / (torch.arange(logits.shape[-1]) + 3.0).to(logits.dtype)
    fixed = (frequency / frequency.sum()).expand(logits.shape)
    rows = F.kl_div(F.log_softmax(logits, -1), fixed, reduction="none").sum(-1)
    return averaged(rows, target, reduction)


def collision_entropy(logits, target, reduction):
    """It needs the logsumexp first, and then a second pass over the logits."""
    rows = -torch.softmax(logits, -1).square().sum(-1).log()
    return averaged(rows, target, reduction)


def kl_of_temperatures(logits, target, reduction):
    """Both softmaxes have a gradient."""
    colder = F.log_softmax(1.1 * logits, -1)
    rows = (colder.exp() * (colder - F.log_softmax(logits, -1))).sum(-1)
    return averaged(rows, target, reduction)


@dataclasses.dataclass(frozen=True, eq=False)
class Spelling:
    """A head as models write it; what replaces it is what the package makes of it."""

    logits: object = lambda logits: logits
    loss: object = cross_entropy
    context: object = contextlib.nullcontext
    options: dict = dataclasses.field(default_factory=dict)
    seeds: int = SEEDS

    def unfused(self, input, weight, bias, target, reduction):
        with self.context():
            return self.loss(self.logits(F.linear(input, weight, bias)), target, reduction)

    def exact(self, input, weight, bias, target, reduction):
        logits = self.logits(F.linear(input, weight, bias)).double()
        return self.loss(logits, target, reduction)

    def fused(self, *args):
        return compiled(self, args[0].dtype, args[-1])(*args)


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation(Spelling):
    """From a model much like the student, with stored probabilities, which are float32 in the
    exact loss, too: the loss is small, its terms are not. Its error is a matter of chance, and is
    measured more often."""

    seeds: int = 32

    def unfused(self, input, weight, bias, target, reduction):
        teacher = F.linear(1.5 * input.float(), weight.float(), bias.float()).detach()
        teacher = teacher.roll(0, -1)  # has no rule: its result is stored
        logits = self.logits(F.linear(input, weight, bias))
        probabilities = torch.softmax(teacher, -1).to(logits.dtype)
        return self.loss(logits, probabilities, target, reduction)

    def exact(self, input, weight, bias, target, reduction):
        return self.unfused(input, weight, bias, target, reduction)


@dataclasses.dataclass(frozen=True, eq=False)
class TwoHeads(Spelling):
    """From a model much like the student, whose head is in the graph, too."""

    # The gradient of the bias is a small difference of sums, whose error differs most by chance.
    seeds: int = 24

    def unfused(self, input, weight, bias, target, reduction):
        with torch.no_grad():
            teacher = self.logits(F.linear(1.5 * input, weight, bias))
        logits = self.logits(F.linear(input, weight, bias))
        return self.loss(logits, teacher, target, reduction)

    def exact(self, input, weight, bias, target, reduction):
        teacher = F.linear(1.5 * input, weight, bias).detach()
        return self.loss(F.linear(input, weight, bias), teacher, target, reduction)


def forward_kl(logits, teacher, target, reduction):
    return distilled(logits, teacher.softmax(-1), target, reduction)


def reverse_kl(logits, teacher, target, reduction):
    student, teacher = logits.log_softmax(-1), teacher.log_softmax(-1)
    return averaged((student.exp() * (student - teacher)).sum(-1), target, reduction)


def jensen_shannon(logits, teacher, target, reduction):
    student, teacher = logits.log_softmax(-1), teacher.log_softmax(-1)
    mixture = torch.stack([student + math.log(0.7), teacher + math.log(0.3)]).logsumexp(0)
    divergences = [
        F.kl_div(mixture, each, reduction="none", log_target=True) for each in (teacher, student)
    ]
    rows = (0.3 * divergences[0] + 0.7 * divergences[1]).sum(-1)
    return averaged(rows, target, reduction)


def distilled(logits, teacher, target, reduction):
    rows = F.kl_div(F.log_softmax(logits, -1), teacher, reduction="none").sum(-1)
    return averaged(rows, target, reduction)


def soft_labels(logits, teacher, target, reduction):
    return averaged(F.cross_entropy(logits, teacher, reduction="none"), target, reduction)


@functools.cache
def compiled(spelling, dtype, reduction):
    """Compile with the pass alone; nothing else is changed."""
    options = {"min_logits_bytes": 0, "on_error": "raise", **spelling.options}
    fn = torch.compile(
        lambda *args: spelling.unfused(*args),
        backend="cce_inductor_eager",
        options=options,
        fullgraph=True,
        dynamic=False,
    )
    reports = []

    def run(*args):
        cce_inductor.clear_reports()
        with torch._dynamo.config.patch(recompile_limit=10**4, accumulated_recompile_limit=10**5):
            result = fn(*args)
        reports.extend(cce_inductor.reports())
        assert reports
        assert all(report.rewritten for report in reports)
        return result

    return run


SPELLINGS = {
    "plain": Spelling(),
    "float": Spelling(upcast),
    "softcap": Spelling(lambda logits: upcast(torch.tanh(logits / 30.0) * 30.0)),
    "blocked": Spelling(upcast, options={"workspace_bytes": 2**17}),
    "log_softmax": Spelling(loss=log_softmax_and_gather),
    "z-loss": Spelling(upcast, z_loss),
    "entropy": Spelling(upcast, entropy),
    "label smoothing": Spelling(upcast, label_smoothing),
    "kl_div": Spelling(upcast, kl_from_frequency),
    "distillation": Distillation(upcast, distilled),
    "soft labels": Distillation(upcast, soft_labels),
    "forward kl of two heads": TwoHeads(upcast, forward_kl),
    "reverse kl of two heads": TwoHeads(upcast, reverse_kl),
    "kl of temperatures": Spelling(upcast, kl_of_temperatures),
}
TWO_PASSES = {
    "collision entropy": Spelling(upcast, collision_entropy),
    "jensen-shannon of two heads": TwoHeads(upcast, jensen_shannon),
}
AUTOCAST = Spelling(context=lambda: torch.autocast("cpu", torch.bfloat16))


def loss_and_gradients(loss, problem, dtype, reduction, exact=False, only_loss=False):
    """Return loss and gradients, in `RESULTS` order, for inputs rounded to `dtype`."""
    leaves = [t.to(dtype) for t in (problem.input, problem.weight, problem.bias)]
    leaves = [t.detach().to(torch.float64 if exact else dtype, copy=True) for t in leaves]
    leaves = [t.requires_grad_() for t in leaves]
    result = loss(*leaves, problem.target, reduction)
    if only_loss:
        return [result.detach()]
    # Rows with distinct weights: an error in one must not be hidden by another.
    rows = torch.linspace(0.5, 1.5, result.numel()).view(result.shape).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, rows)]


def errors(losses, exact, problem, dtype, reduction, seeds=SEEDS):
    """The error of each of `RESULTS`, for each loss: relative, in the norm over all elements and
    seeds."""
    squared = torch.zeros(len(losses), len(RESULTS), dtype=torch.float64)
    size = torch.zeros(len(RESULTS), dtype=torch.float64)
    # A mean is one number for each seed, which a loss gets right by chance more often.
    times = 4 if reduction == "mean" else 1
    for seed in range(times * seeds):
        given = problem(seed), dtype, reduction
        only_loss = seed >= seeds
        want = loss_and_gradients(exact, *given, exact=True, only_loss=only_loss)
        size[: len(want)] += torch.stack([theirs.square().sum() for theirs in want])
        for row, loss in zip(squared, losses, strict=True):
            got = loss_and_gradients(loss, *given, only_loss=only_loss)
            for at, (ours, theirs) in enumerate(zip(got, want, strict=True)):
                assert ours.isfinite().all()
                row[at] += (ours.double() - theirs).square().sum()
    return (squared / size).sqrt()


def assert_contract(spelling, problem, dtype, reduction, result_dtype, of=RESULTS):
    """Rounding is random, so errors of the same size differ by chance: a tenth, and one unit in the
    last place of the result, are allowed on top of the unfused graph's error."""
    losses = spelling.fused, spelling.unfused
    ours, theirs = errors(losses, spelling.exact, problem, dtype, reduction, spelling.seeds)
    ulp = torch.tensor([torch.finfo(d).eps for d in (result_dtype, dtype, dtype, dtype)])
    worse = {
        name: f"{our:.2e} fused, {their:.2e} unfused"
        for name, our, their, unit in zip(RESULTS, ours, theirs, ulp, strict=True)
        if name in of and not our <= 1.1 * their + unit
    }
    assert not worse


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_no_less_accurate_than_unfused(dtype, spelling, reduction, problem):
    result_dtype = dtype if spelling in ("plain", "log_softmax") else torch.float32
    assert_contract(SPELLINGS[spelling], problem, dtype, reduction, result_dtype)


@pytest.mark.parametrize("spelling", TWO_PASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_loss_of_two_passes(dtype, spelling, problem):
    """Gradients are rounded twice; see the limits in the README."""
    assert_contract(TWO_PASSES[spelling], problem, dtype, "none", torch.float32, of=["loss"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_less_accurate_than_autocast(reduction, problem):
    def representable(seed):
        """In bfloat16: both graphs round the operands alike, which would hide what they do next."""
        tensors = dataclasses.asdict(problem(seed))
        return Problem(
            **{k: t.bfloat16().float() if t.is_floating_point() else t for k, t in tensors.items()}
        )

    assert_contract(AUTOCAST, representable, torch.float32, reduction, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["random", "peaked", "tiny", "trained"])
def test_float64_agrees_to_1e_12(name, reduction, request):
    """Without confident rows, for which the unfused float64 graph is not exact to 1e-12 either."""
    problem = PROBLEMS.get(name) or request.getfixturevalue("trained_problem")
    plain = SPELLINGS["plain"]
    (found,) = errors([plain.fused], plain.exact, problem, torch.float64, reduction)
    assert found.max() < 1e-12


def test_float16_gradients_of_many_tiles_below_its_normal_range():
    """Each tile adds to the gradient of the input values below the normal range of float16."""
    problem = functools.partial(random_problem, scale=1e-3, vocabulary=8 * TILE)
    assert_contract(SPELLINGS["float"], problem, torch.float16, "mean", torch.float32)


def test_float16_gradient_of_two_tiles_that_cancel():
    """The parts of the gradient of the input overflow float16; their sum does not."""
    weight = torch.zeros(2 * TILE, 8, dtype=torch.float16)
    weight[0], weight[TILE] = 400, 404
    input = torch.ones(1, 8, dtype=torch.float16, requires_grad=True)
    target = torch.tensor([0])
    unfused = F.cross_entropy(F.linear(input, weight).float(), target)
    (want,) = torch.autograd.grad(256 * unfused, input)
    zero = torch.zeros(2 * TILE, dtype=torch.float16)
    fused = SPELLINGS["float"].fused(input, weight, zero, target, "mean")
    (got,) = torch.autograd.grad(256 * fused, input)
    assert want.isfinite().all()
    torch.testing.assert_close(got, want)
