"""The pass causes no additional compilations, whatever changes from call to call."""

import pytest
import torch
import torch.nn.functional as F

import cce_inductor
from cce_inductor.backends import cce_inductor_eager
from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT, WEIGHT = torch.randn(6, 8), torch.randn(50, 8)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])
FLOATS = (0.5, 0.7, 1.5, 2.0, 3.0)
INTEGERS = (2, 3, 4, 5)


def of_logits(use, numbers=FLOATS, target=TARGET):
    """Return a function of logits and a number, and the arguments of its calls."""
    return (
        lambda input, weight, target, number: use(F.linear(input, weight), target, number),
        [(INPUT, WEIGHT, target, number) for number in numbers],
    )


class Schedule(torch.nn.Module):
    temperature = 1.0

    def forward(self, input, weight, target):
        return F.cross_entropy(F.linear(input, weight) / self.temperature, target)


SCHEDULE = Schedule()


def attribute(input, weight, target, number):
    SCHEDULE.temperature = number
    return SCHEDULE(input, weight, target)


def assigned(logits, target, number):
    logits[..., -1] = -number
    return F.cross_entropy(logits, target)


def assigned_range(logits, target, number):
    logits[..., number:] = -5.0
    return F.cross_entropy(logits, target)


def changed_in_place(logits, target, number):
    logits *= number
    return F.cross_entropy(logits, target)


def distillation(logits, target, number):
    teacher = (logits.detach() * 2).div(number).softmax(-1)
    return F.kl_div((logits / number).log_softmax(-1), teacher, reduction="batchmean") * number**2


def focal(logits, target, number):
    chosen = logits.log_softmax(-1).gather(1, target.clamp(min=0)[:, None])
    return (-((1 - chosen.exp()) ** number) * chosen).mean()


def batches(use):
    """Return a function of two batches of embeddings, and batches of several sizes."""
    return use, [(torch.randn(n, 8), torch.randn(n, 8)) for n in (12, 14, 16, 18)]


def symmetric(first, second):
    logits, target = first @ second.t(), torch.arange(first.shape[0])
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)


def without_diagonal(first, second):
    logits = first @ second.t()
    logits.fill_diagonal_(-1e4)
    return logits.logsumexp(1).mean() - (first * second).sum(1).mean()


def margin_on_the_diagonal(first, second):
    logits = first @ second.t()
    logits.diagonal().sub_(0.2)
    return (logits.logsumexp(1) - logits.diagonal()).mean()


def momentum_contrast(query, key, queue, temperature):
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.t()], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(query.shape[0], dtype=torch.int64))


def hard_negatives(query, key, negatives):
    logits = torch.cat([query @ key.t(), query @ negatives.t()], 1) * 20
    return F.cross_entropy(logits, torch.arange(query.shape[0]))


def adapter(input, weight, target, scale):
    first, second = weight[:4], weight[:, :4]
    logits = F.linear(input, weight) + F.linear(F.linear(input, first), second) * scale
    return F.cross_entropy(logits, target)


def additive_angular_margin(input, weight, target, margin):
    cosine = F.normalize(input) @ F.normalize(weight).t()
    shifted = torch.cos(torch.acos(cosine.clamp(-0.99, 0.99)) + margin)
    chosen = torch.zeros_like(cosine).scatter_(1, target[:, None], 1.0)
    return F.cross_entropy(30 * (chosen * shifted + (1 - chosen) * cosine), target)


def negatives(count):
    return torch.randn(count, 8)


def margin_in_zeros(first, second):
    logits, target = first @ second.t(), torch.arange(first.shape[0])
    margin = torch.zeros(logits.size()).scatter_(1, target[:, None], 0.2)
    return F.cross_entropy((logits - margin) * 20, target)


def without_padding(first, second):
    logits = first @ second.t()
    padding = (torch.arange(logits.shape[1]) > 10)[None].expand_as(logits)
    return F.cross_entropy(logits.masked_fill(padding, -1e4), torch.arange(first.shape[0]) % 10)


def scattered_diagonal(first, second):
    logits = first @ second.t()
    logits = logits.diagonal_scatter(logits.diagonal() - 0.3)
    return F.cross_entropy(logits * 20, torch.arange(first.shape[0]))


REWRITTEN = {
    # Dynamo fixes a dimension by a guard, but the graph still has it as a symbolic number.
    "dimension": of_logits(
        lambda z, t, n: -z.log_softmax(n).gather(n, t.clamp(min=0)[:, None]).mean(), (1, -1)
    ),
    "dimension of the weight": (
        lambda x, w, t, n: F.cross_entropy(x @ w.transpose(0, n), t),
        [(INPUT, WEIGHT, TARGET, number) for number in (1, -1)],
    ),
    "dimension in a tuple": of_logits(
        lambda z, t, n: F.cross_entropy(z.view(2, 3, 50).permute((0, 1, n)).flatten(0, 1), t),
        (2, -1),
    ),
    "momentum contrast, temperature": (
        momentum_contrast,
        [(INPUT, INPUT.flip(0), WEIGHT, number) for number in FLOATS],
    ),
    "momentum contrast, batch": (
        momentum_contrast,
        [(negatives(n), negatives(n), WEIGHT, 0.5) for n in (6, 8, 9)],
    ),
    "hard negatives, batch": (
        hard_negatives,
        [(negatives(n), negatives(n), negatives(2 * n)) for n in (6, 8, 9)],
    ),
    "scale of an adapter": (adapter, [(INPUT, WEIGHT, TARGET, number) for number in FLOATS]),
    "angular margin": (
        additive_angular_margin,
        [(INPUT, WEIGHT, TARGET.clamp(min=0), number) for number in FLOATS],
    ),
    "divided": of_logits(lambda z, y, t: F.cross_entropy(z / t, y)),
    "scaled loss": of_logits(lambda z, y, t: F.cross_entropy(z / t, y) * t**2),
    "softcap": of_logits(lambda z, y, t: F.cross_entropy(t * torch.tanh(z / t), y)),
    "two bounds": of_logits(lambda z, y, t: F.cross_entropy(torch.clamp(z, -t, t), y)),
    "one bound": of_logits(lambda z, y, t: F.cross_entropy(z.clamp(max=t), y)),
    "a bound and a constant": of_logits(lambda z, y, t: F.cross_entropy(z.clamp(-3, t), y)),
    "integer factor": of_logits(lambda z, y, n: F.cross_entropy(z * n, y), INTEGERS),
    "integer divisor": of_logits(lambda z, y, n: F.cross_entropy(z / n, y), INTEGERS),
    "power": of_logits(lambda z, y, t: F.cross_entropy(z.abs() ** t, y)),
    "attribute": (attribute, of_logits(None)[1]),
    "in place": of_logits(changed_in_place),
    "masked fill": of_logits(
        lambda z, y, t: F.cross_entropy(z.masked_fill(torch.arange(50) % 3 == 2, -t), y)
    ),
    "masked fill in place": of_logits(
        lambda z, y, t: F.cross_entropy(z.masked_fill_(torch.arange(50) % 3 == 2, -t), y)
    ),
    "where": of_logits(
        lambda z, y, t: F.cross_entropy(torch.where(torch.arange(50) % 3 == 2, -t, z), y)
    ),
    "assignment": of_logits(assigned, target=TARGET.clamp(max=48)),
    "assigned range": of_logits(
        assigned_range, (20, 30, -8, 45), torch.tensor([3, 0, 9, -100, 7, 7])
    ),
    "end of a slice": of_logits(
        lambda z, y, n: F.cross_entropy(z[:, :n], y), (20, 30, 40, 45), TARGET.clamp(max=10)
    ),
    "start of a slice": of_logits(lambda z, y, n: z[..., n:].logsumexp(1).mean(), (20, 30, 40, 45)),
    "label smoothing": of_logits(
        lambda z, y, t: F.cross_entropy(z, y, label_smoothing=t), (0.1, 0.2, 0.3)
    ),
    "ignored class": of_logits(
        lambda z, y, n: F.cross_entropy(z, y, ignore_index=n), (3, 0, 7, 49), TARGET.clamp(min=0)
    ),
    "function of a number": of_logits(lambda z, y, t: F.cross_entropy(z / (t**0.5 + 1), y)),
    "one-hot margin": of_logits(
        lambda z, y, t: F.cross_entropy(z - t * F.one_hot(y.clamp(min=0), 50), y)
    ),
    "half precision": of_logits(lambda z, y, t: F.cross_entropy(z.bfloat16() / t, y)),
    "double precision": of_logits(lambda z, y, t: F.cross_entropy(z.double() / t, y)),
    "z-loss": of_logits(
        lambda z, y, t: F.cross_entropy(z, y) + t * z.logsumexp(-1).square().mean()
    ),
    "focal": of_logits(focal),
    "distillation": of_logits(distillation),
    "rows": (
        lambda input, weight, target: F.cross_entropy(F.linear(input, weight), target),
        [(torch.randn(n, 8), WEIGHT, torch.arange(n)) for n in (12, 14, 16)],
    ),
    "batch": batches(lambda a, b: F.cross_entropy(a @ b.t(), torch.arange(a.shape[0]))),
    "symmetric": batches(symmetric),
    "diagonal": batches(lambda a, b: ((a @ b.t()).logsumexp(1) - (a @ b.t()).diagonal()).mean()),
    "filled diagonal": batches(without_diagonal),
    "changed diagonal": batches(margin_on_the_diagonal),
    "diagonal by diag": batches(
        lambda a, b: ((a @ b.t() / 0.1).logsumexp(1) - (a @ b.t() / 0.1).diag()).mean()
    ),
    "all sizes": batches(margin_in_zeros),
    "first class": batches(
        lambda a, b: F.cross_entropy(a @ b.t(), (a @ b.t()).new_zeros(len(a), dtype=torch.long))
    ),
    "expanded mask": batches(without_padding),
    "shape of another": (
        lambda input, weight, target, other: F.cross_entropy(
            F.linear(input, weight).view(other.size()) + other / 50, target
        ),
        [
            (torch.randn(n, 8), WEIGHT, torch.arange(n), torch.arange(n * 50).view(n, 50))
            for n in (12, 14, 16)
        ],
    ),
}

LEFT_ALONE = {
    "slope": of_logits(lambda z, y, t: F.cross_entropy(F.leaky_relu(z, t), y)),
    "hardtanh": of_logits(lambda z, y, t: F.cross_entropy(F.hardtanh(z, -t, t), y)),
    "alpha": of_logits(
        lambda z, y, t: F.cross_entropy(torch.add(z, torch.arange(50) / 50, alpha=t), y)
    ),
    "greatest": of_logits(lambda z, y, k: z.logsumexp(1).sum() - z.topk(k)[0].sum(), INTEGERS),
}


def count(fn, calls, backend, **compile_args):
    """Return the number of compiled graphs, and the results and gradients of all calls."""
    compiled = []

    def counting(module, example_inputs):
        compiled.append(module)
        return backend(module, example_inputs)

    torch._dynamo.reset()
    compiled_fn = torch.compile(fn, backend=counting, **compile_args)
    found = []
    for arguments in calls:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]
        leaves = {id(tensor): tensor.clone().requires_grad_() for tensor in tensors}
        result = compiled_fn(*[leaves.get(id(a), a) for a in arguments])
        found.append([result.detach(), *torch.autograd.grad(result, list(leaves.values()))])
    return len(compiled), found


def plain(module, example_inputs):
    return module.forward


def rewriting(module, example_inputs):
    options = {"min_logits_bytes": 0, "on_error": "raise"}
    return cce_inductor_eager(module, example_inputs, options=options)


def assert_no_more_compilations(fn, calls, **compile_args):
    expected, numbers = count(fn, calls, plain, **compile_args)
    cce_inductor.clear_reports()
    graphs, found = count(fn, calls, rewriting, **compile_args)
    assert graphs == expected
    for each, wanted in zip(found, numbers, strict=True):
        coarse = any(w.dtype == torch.bfloat16 for w in wanted)
        torch.testing.assert_close(
            each, wanted, rtol=0.02 if coarse else 1e-4, atol=0.02 if coarse else 1e-5
        )
    reports = cce_inductor.reports()
    assert len(reports) >= graphs  # every graph has a loss
    return reports


@pytest.mark.parametrize(("fn", "calls"), REWRITTEN.values(), ids=REWRITTEN)
def test_rewritten(fn, calls):
    reports = assert_no_more_compilations(fn, calls)
    assert all(report.rewritten for report in reports), "\n".join(map(str, reports))


DYNAMIC = ("divided", "softcap", "integer factor", "ignored class", "batch", "changed diagonal")


@pytest.mark.parametrize(("fn", "calls"), [REWRITTEN[n] for n in DYNAMIC], ids=DYNAMIC)
def test_rewritten_with_dynamic_shapes(fn, calls):
    reports = assert_no_more_compilations(fn, calls, dynamic=True)
    assert all(report.rewritten for report in reports), "\n".join(map(str, reports))


def diagonal_of_a_rectangle(first, second):
    logits = first @ second.t()
    return logits.logsumexp(1).sum() - logits.diagonal().sum()


def gathered_from_some_rows(first, second):
    logits = first @ second.t()
    target = torch.arange(second.shape[0] - first.shape[0])
    return logits.logsumexp(1).sum() - logits.gather(1, target[:, None]).sum()


@pytest.mark.parametrize("fn", [diagonal_of_a_rectangle, gathered_from_some_rows])
@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_that_are_not_always_different(fn, dynamic):
    sizes = ((12, 18), (14, 21), (16, 32), (18, 29))
    if fn is diagonal_of_a_rectangle:
        sizes = ((12, 18), (14, 21), (16, 16), (18, 14))
    calls = [(torch.randn(rows, 8), torch.randn(columns, 8)) for rows, columns in sizes]
    assert_no_more_compilations(fn, calls, dynamic=dynamic)


@pytest.mark.parametrize(("fn", "calls"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(fn, calls):
    """Graph 1 is compiled for the first number, graph 2 for all others."""
    left = [r for r in assert_no_more_compilations(fn, calls) if not r.rewritten]
    assert left
    for report in left:
        assert report.reason.endswith(f": {reasons.NUMBER_MAY_DIFFER.sentence}")


def test_loss_of_what_a_reduction_was_put_into_is_reported():
    """The loss is reported even if the number of classes may differ in the next call."""
    reports = assert_no_more_compilations(*batches(scattered_diagonal))
    assert len(reports) == 2
    assert all("diagonal_scatter" in report.reason for report in reports)


def test_inductor_compiles_a_schedule_twice():
    fn, calls = REWRITTEN["softcap"]
    with cce_inductor.installed(min_logits_bytes=0, on_error="raise"):
        from torch._inductor.compile_fx import compile_fx

        graphs, found = count(fn, calls, compile_fx)
    assert graphs == 2
    _, expected = count(fn, calls, plain)
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-4, atol=1e-5)


def test_full_graph_with_more_numbers_than_the_recompile_limit():
    fn, _ = REWRITTEN["divided"]
    options = {"min_logits_bytes": 0, "on_error": "raise"}
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="cce_inductor_eager", options=options)
    for step in range(20):
        temperature = 1.0 + step / 10
        result = compiled(INPUT, WEIGHT, TARGET, temperature)
        torch.testing.assert_close(result, fn(INPUT, WEIGHT, TARGET, temperature))
