"""The gradient of deferred logits: where it stays deferred, and its values where it does not."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from deferred_logits import (
    REDUCTIONS,
    STAYING_DEFERRED,
    TARGET,
    VOCABULARY,
    Head,
    assert_same_gradients,
)
from torch.utils.checkpoint import checkpoint

import cce_inductor
from cce_inductor.deferred import connection
from cce_inductor.deferred.tensor import DeferredGradient, defer


def loss_of(logits):
    return F.cross_entropy(logits.flatten(0, 1), TARGET.flatten())


def assert_same(backward):
    """Check that `backward` gives deferred and plain logits the same gradients."""
    head = Head()
    backward(head.deferred())
    assert_same_gradients(head, lambda other: backward(other.plain()))


WITH_GRADIENT = {name: fn for name, fn in STAYING_DEFERRED.items() if name != "detach"} | {
    "bounds": lambda z: z.clamp(-1, 1.5),
    "lower bound": lambda z: z.clamp_min(-0.5),
    "difference": lambda z: 0.5 - z,
    "twice": lambda z: z * z.sigmoid(),
    "condition": lambda z: torch.where(z > 0.5, z, 0.5 * z),
    "tensor split": lambda z: z.tensor_split(2, dim=1)[1],
    "mask of the vocabulary": lambda z: z.masked_fill(
        torch.arange(VOCABULARY) > 45, torch.tensor(-torch.inf)
    ),
    "module": lambda z: torch.nn.Identity()(z),
}
COMPUTED = ("expand", "tensor split", "T", "mT", "channels first")
"""The gradient is a sum, zeros are joined with it, or the loss is not over the vocabulary."""


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_way_to_the_projection(name, computed):
    fn = WITH_GRADIENT[name]
    head = Head()
    logits = head.deferred()
    fn(logits).float().logsumexp(-1).sum().backward()
    if name not in COMPUTED:
        assert not computed
        assert logits.is_deferred
    loose = 3e-2 if name == "bfloat16" else 1e-5
    other = Head()
    fn(other.plain()).float().logsumexp(-1).sum().backward()
    for mine, theirs in zip(head.leaves, other.leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=loose, atol=loose)


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
def test_losses(reduce, computed):
    assert_same(lambda logits: reduce(logits).sum().backward())
    assert not computed


LOOKING = {
    "norm": lambda gradient: gradient.norm(),
    "finite": lambda gradient: gradient.isfinite().all(),
    "one number": lambda gradient: gradient[0, 0, 0].item(),
    "numpy": lambda gradient: gradient.numpy().sum(),
    "text": lambda gradient: repr(gradient),
}
CHANGING = {
    "twice": lambda gradient: 2 * gradient,
    "sign": lambda gradient: -gradient,
    "in place": lambda gradient: gradient.mul_(3),
    "a part in place": lambda gradient: (gradient[0].zero_(), None)[1],
    "through a view": lambda gradient: (gradient.view(-1)[:7].fill_(1.0), None)[1],
    "clipped": lambda gradient: gradient.clamp(-1e-3, 1e-3),
    "normalized": lambda gradient: gradient / gradient.norm(),
    "views": lambda gradient: gradient.view(-1).view(gradient.shape),
    "other values": lambda gradient: torch.ones(gradient.shape),
}
HARMLESS = {
    "nothing": lambda gradient: None,
    "itself": lambda gradient: gradient,
    "clone": lambda gradient: gradient.clone(),
    "detached": lambda gradient: gradient.detach(),
    "shape": lambda gradient: (gradient.shape, None)[1],
}
HOOKS = {**LOOKING, **CHANGING, **HARMLESS}


@pytest.mark.parametrize("before", [True, False], ids=["before the loss", "after it"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks(name, before, computed):
    def backward(logits):
        hook = HOOKS[name]
        if name in LOOKING:
            hook = lambda gradient: (LOOKING[name](gradient), None)[1]  # noqa: E731
        if before:
            logits.register_hook(hook)
        loss = loss_of(logits.float())
        if not before:
            logits.register_hook(hook)
        loss.backward()

    assert_same(backward)
    if name in HARMLESS:
        assert not computed


def test_the_gradient_is_like_the_logits():
    seen = []
    logits = Head(dtype=torch.bfloat16).deferred()
    logits.register_hook(seen.append)
    loss_of(logits.float()).backward()
    (gradient,) = seen
    assert type(gradient) is DeferredGradient
    assert gradient.is_deferred
    assert (gradient.shape, gradient.dtype, gradient.device) == (
        (logits.shape, torch.bfloat16, logits.device)
    )
    assert "DeferredGradient(shape=(2, 5, 50), dtype=torch.bfloat16" in repr(gradient)
    assert "not computed" in repr(gradient)


@pytest.mark.parametrize("after", [True, False])
def test_retained_gradient(after, computed):
    outcomes = []
    for make in (Head.deferred, Head.plain):
        head = Head()
        logits = make(head)
        loss = loss_of(logits) if after else None
        logits.retain_grad()
        loss_of(logits).backward() if loss is None else loss.backward()
        assert len(computed) == 0
        outcomes.append([*(leaf.grad for leaf in head.leaves), logits.grad])
    mine, theirs = outcomes
    assert mine[-1].is_deferred
    torch.testing.assert_close([*mine[:-1], mine[-1].plain()], theirs)


def test_gradient_that_is_asked_for(computed):
    head = Head()
    logits = head.deferred()
    loss = loss_of(logits)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    loss.backward(inputs=[logits])
    assert gradient.is_deferred
    assert logits.grad.is_deferred
    other = Head().plain()
    (expected,) = torch.autograd.grad(loss_of(other), other)
    torch.testing.assert_close(gradient.plain(), expected)
    torch.testing.assert_close(logits.grad.plain(), expected)
    assert all(leaf.grad is None for leaf in head.leaves)
    assert len(computed) == 2


def test_gradient_that_is_passed_on(computed):
    def backward(logits):
        (gradient,) = torch.autograd.grad(loss_of(logits), logits)
        logits.backward(gradient)

    assert_same(backward)
    assert not computed


def test_gradient_of_other_logits():
    """A gradient that is passed to logits which it is not the gradient of."""

    def backward(logits):
        other = logits * 3
        (gradient,) = torch.autograd.grad(loss_of(other), other)
        logits.backward(gradient)

    assert_same(backward)


def test_scale_that_autograd_does_not_know():
    """A function that divides by one number and lets the gradient through by another."""

    class Scaled(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x, a, b: ctx.save_for_backward(b) or x / a)
        backward = staticmethod(lambda ctx, grad: (grad / ctx.saved_tensors[0], None, None))

    two, three = torch.tensor(2.0), torch.tensor(3.0)
    assert_same(lambda logits: loss_of(Scaled.apply(logits, two, three)).backward())
    assert_same(lambda logits: loss_of(Scaled.apply(logits, two, two)).backward())


SEVERAL = {
    "added": lambda z: (loss_of(z) + z.logsumexp(-1).pow(2).mean()).backward(),
    "of different values": lambda z: (loss_of(z) + loss_of(z.float() / 0.7)).backward(),
    "chunks": lambda z: sum(
        F.cross_entropy(part.flatten(0, 1), target.flatten())
        for part, target in zip(z.chunk(3, dim=1), TARGET.chunk(3, dim=1), strict=True)
    ).backward(),
    "rows": lambda z: sum(
        F.cross_entropy(row, target) for row, target in zip(z, TARGET, strict=True)
    ).backward(),
    "one after another": lambda z: [
        loss_of(z).backward(retain_graph=True),
        z.logsumexp(-1).sum().backward(),
    ],
    "twice": lambda z: [
        (loss := loss_of(z)).backward(retain_graph=True),
        loss.backward(),
    ],
    "of a part": lambda z: F.cross_entropy(
        z.split([2, 3], dim=1)[0].flatten(0, 1), TARGET[:, :2].flatten()
    ).backward(),
}


@pytest.mark.parametrize("backward", SEVERAL.values(), ids=SEVERAL)
def test_several_losses(backward, computed):
    assert_same(backward)
    assert not computed


def test_hook_on_one_of_several_ways(computed):
    def backward(logits):
        part = logits[:1]
        part.register_hook(lambda gradient: gradient * 2)
        (F.cross_entropy(part.flatten(0, 1), TARGET[0]) + loss_of(logits)).backward()

    assert_same(backward)
    assert len(computed) == 2  # their gradients of the weight have been added up


def test_loss_beside_values():
    assert_same(lambda logits: (loss_of(logits) + logits.cumsum(0).pow(2).mean()).backward())


@pytest.mark.parametrize("dims", [(), (VOCABULARY,), (5, 1)], ids=str)
def test_trained_operand(dims, computed):
    """A temperature, a bias and a scale of rows that are applied outside of the graph."""
    outcomes = []
    for make in (Head.deferred, Head.plain):
        head = Head()
        scale = torch.full(dims, 1.5, requires_grad=True)
        loss_of(make(head) * scale - scale).backward()
        outcomes.append([scale.grad, *(leaf.grad for leaf in head.leaves)])
    torch.testing.assert_close(*outcomes)
    assert type(outcomes[0][0]) is torch.Tensor
    assert not computed


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_head_and_loss(reentrant, computed):
    outcomes = []
    for make in (Head.deferred, Head.plain):
        head = Head()

        def run(hidden, head=head, make=make):
            head.hidden = hidden
            return loss_of(torch.tanh(make(head)))

        checkpoint(run, head.hidden, use_reentrant=reentrant).backward()
        outcomes.append([leaf.grad for leaf in head.leaves])
    torch.testing.assert_close(*outcomes)


def test_saved_tensors_on_the_cpu(computed):
    def backward(logits):
        with torch.autograd.graph.save_on_cpu():
            loss_of(logits.float()).backward()

    assert_same(backward)
    assert not computed


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode():
    def backward(logits):
        with torch.autograd.detect_anomaly():
            loss_of(logits.double()).backward()

    assert_same(backward)


@pytest.mark.parametrize("scale", [None, 2])
@pytest.mark.parametrize("of_weight", [True, False], ids=["weight", "logits"])
def test_second_derivative_is_an_error(scale, of_weight):
    head = Head()
    logits = head.deferred()
    if scale is not None:
        logits.register_hook(lambda gradient: gradient * scale)
    wanted = head.weight if of_weight else logits
    (gradient,) = torch.autograd.grad(loss_of(logits), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.pow(2).sum().backward()


def test_second_backward_is_an_error():
    for wanted in ((), (0,)):
        head = Head()
        logits = head.deferred()
        loss = loss_of(logits)
        loss.backward(inputs=[logits] if wanted else None)
        with pytest.raises(RuntimeError, match="a second time"):
            loss.backward()


@pytest.mark.parametrize("known", [True, False])
def test_compiled_backward(known):
    def backward(logits):
        logits.register_hook(lambda gradient: gradient * 2)
        with torch._dynamo.config.patch(compiled_autograd=known):
            loss = loss_of(logits) + loss_of(logits / 2)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()

    if known:
        assert_same(backward)
    else:
        with pytest.raises(RuntimeError, match="compiled_autograd = True"):
            backward(Head().deferred())


def test_gradients_of_the_weight_do_not_pile_up():
    """Those of several losses are added as they come. Only their sum waits for the projection."""
    head = Head()
    logits = head.deferred().flatten(0, 1)
    parts = zip(logits.chunk(10), TARGET.flatten().chunk(10), strict=True)
    losses = [F.cross_entropy(part, target) for part, target in parts]
    gc.collect()

    def alive():
        tensors = (each for each in gc.get_objects() if isinstance(each, torch.Tensor))
        return sum(each.shape == head.weight.shape for each in tensors)

    before, found = alive(), []
    head.hidden.register_hook(lambda gradient: found.append(alive() - before))
    logits.register_hook(lambda gradient: found.append(alive() - before))
    sum(losses).backward()
    assert len(found) == 2
    assert max(found) <= 2


def test_chunks_reach_their_projections_one_after_another():
    """Each chunk of the hidden state has a projection of its own, which autograd recorded before
    the losses. The gradients of its weight must not wait until all losses have theirs."""
    head = Head()
    chunks = head.hidden.flatten(0, 1).chunk(5)
    logits = [defer(chunk, head.weight, None, torch.float32) for chunk in chunks]
    targets = TARGET.flatten().chunk(5)
    losses = [F.cross_entropy(z.float(), t) for z, t in zip(logits, targets, strict=True)]
    order = []
    for number, (each, loss) in enumerate(zip(logits, losses, strict=True)):
        loss.register_hook(lambda _, number=number: order.append(f"loss {number}"))
        each.register_hook(lambda _, number=number: order.append(f"projection {number}"))
    sum(losses).backward()
    names = ("loss", "projection")
    assert order == [f"{name} {number}" for number in range(5)[::-1] for name in names]
    other = Head()
    loss = F.cross_entropy(other.plain().flatten(0, 1), TARGET.flatten(), reduction="sum") / 2
    loss.backward()
    torch.testing.assert_close(head.weight.grad, other.weight.grad)


def test_what_a_loss_counts_is_not_counted_twice():
    """The gradient of the logits is computed by a second call of a compiled loss."""

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, logits):
            self.count += 1
            return loss_of(logits) * self.count.clone()

    torch._dynamo.reset()
    options = {"min_logits_bytes": 0, "on_error": "raise"}

    def backward(logits):
        module = Counting()
        logits.register_hook(lambda gradient: gradient * 2)
        code = torch.compile(module, backend="cce_inductor_eager", options=options)
        code(logits).backward()
        assert module.count == 1

    assert_same(backward)


def test_random_numbers_are_drawn_once():
    """A loss that draws random numbers is not compiled, so that no second call draws others."""
    torch._dynamo.reset()

    def noisy(logits):
        return loss_of(logits + torch.rand(logits.shape[-1]))

    options = {"min_logits_bytes": 0, "on_error": "raise"}
    code = torch.compile(noisy, backend="cce_inductor_eager", options=options)

    def backward(logits):
        torch.manual_seed(0)
        logits.register_hook(lambda gradient: gradient * 2)
        (code if hasattr(logits, "is_deferred") else noisy)(logits).backward()

    assert_same(backward)


def outcomes(program):
    """Return what a program finds with deferred and with plain logits, with gradients of leaves."""
    found = []
    for make in (Head.deferred, Head.plain):
        head = Head()
        values = program(make(head), head)
        values = [v.plain() if isinstance(v, DeferredGradient) else v for v in values]
        found.append([*(v.detach() for v in values), *(leaf.grad for leaf in head.leaves)])
    return found


def gradient_of(loss, logits, **arguments):
    return torch.autograd.grad(loss, logits, **arguments)[0]


def changed_after_a_copy(z, head):
    gradient = gradient_of(loss_of(z), z)
    copy = gradient.clone()
    gradient.mul_(3)
    return [copy, gradient]


def changed_after_use(z, head):
    gradient = gradient_of(loss_of(z), z)
    scaled = gradient / gradient.norm()
    gradient.zero_()
    z.backward(scaled)
    return []


def changed_one_of_two(z, head):
    other = z * 2
    other.retain_grad()
    z.retain_grad()
    loss_of(other).backward()
    torch.nn.utils.clip_grad_norm_([other], 0.01, foreach=False)
    return [z.grad, other.grad]


def changed_view(z, head):
    rows = z.view(-1, VOCABULARY)
    rows.retain_grad()
    z.retain_grad()
    F.cross_entropy(rows, TARGET.flatten()).backward()
    rows.grad.mul_(2)
    return [z.grad]


def target_changed_later(z, head):
    target = TARGET.flatten().clone()
    z.retain_grad()
    F.cross_entropy(z.flatten(0, 1), target).backward()
    target.zero_()
    return [z.grad]


def upstream_changed_later(z, head):
    upstream = torch.ones(TARGET.numel())
    z.retain_grad()
    F.cross_entropy(z.flatten(0, 1), TARGET.flatten(), reduction="none").backward(upstream)
    upstream.zero_()
    return [z.grad]


def node_of_the_loss(z, head):
    loss = loss_of(z)
    loss.grad_fn.register_prehook(lambda gradients: (gradients[0] * 3,))
    z.register_hook(lambda gradient: gradient * 2)
    loss.backward()
    return []


def buffer_of_a_hook(z, head):
    buffer, seen = torch.ones(z.shape), []
    z.register_hook(lambda gradient: seen.append(gradient * buffer))
    loss_of(z).backward()
    buffer[0, 0, 1:9] = 5
    return seen


def counter_of_a_hook(z, head):
    count = torch.zeros(())

    def hook(gradient):
        count.add_(1)
        return gradient * count

    one, other = z.float() * 1.0, z * 2
    one.register_hook(hook)
    other.register_hook(hook)
    (loss_of(one) + loss_of(other)).backward()
    return []


def noise_of_a_hook(z, head):
    noise, generator = torch.empty(z.shape), torch.Generator().manual_seed(0)
    hook = lambda gradient: gradient + noise.normal_(generator=generator)  # noqa: E731
    one, other = z.float() * 1.0, z * 2
    one.register_hook(hook)
    other.register_hook(hook)
    (loss_of(one) + loss_of(other)).backward()
    return []


def weight_gradient_changed(z, head):
    gradient = gradient_of(loss_of(z), z)
    first = gradient_of(z, head.weight, grad_outputs=gradient, retain_graph=True)
    first.mul_(2)
    return [first, gradient_of(z, head.weight, grad_outputs=gradient)]


def operand_gradient_changed(z, head):
    bias = torch.zeros(VOCABULARY, requires_grad=True)
    biased = z + bias
    biased.register_hook(lambda gradient: (gradient.sum((0, 1), keepdim=True).zero_(), None)[1])
    loss_of(biased).backward()
    return [bias.grad]


class Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x / scale

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.scale, None


def operand_of_a_function_changed(z, head):
    scale = torch.full((VOCABULARY,), 2.0)
    loss = loss_of(Divided.apply(z, scale))
    scale.fill_(3.0)
    loss.backward()
    return []


def zeros_of_a_hook(z, head):
    def hook(gradient):
        zeros = gradient.new_zeros(gradient.shape)
        view = zeros.view(-1, VOCABULARY)
        zeros.norm()
        zeros.index_add_(0, torch.arange(2), gradient)
        return (view * 2).view(gradient.shape)

    z.register_hook(hook)
    loss_of(z).backward()
    return []


def straight_through(z, head):
    y = z - z.detach() * 0.5
    y.register_hook(lambda gradient: gradient * 2)
    y.logsumexp(-1).sum().backward()
    return []


def transposed(z, head):
    z.register_hook(lambda gradient: gradient.contiguous().view(-1).view(gradient.shape) * 2)
    (loss_of(z) + z.transpose(0, 1).logsumexp(-1).sum()).backward()
    return []


def foreach(z, head):
    z.retain_grad()
    loss_of(z).backward()
    torch._foreach_mul_([z.grad], 2)
    return [z.grad]


def by_keyword(z, head):
    parts = [*torch.chunk(input=z, chunks=2, dim=1), *torch.unbind(input=z)]
    clamped = torch.clamp(input=z, min=-1)
    (sum(part.logsumexp(-1).sum() for part in parts) + clamped.logsumexp(-1).sum()).backward()
    return []


def without_saved_hooks(z, head):
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        z.mul(1.2345).logsumexp(-1).sum().backward()
    return []


PROGRAMS = [
    changed_after_a_copy,
    changed_after_use,
    changed_one_of_two,
    changed_view,
    target_changed_later,
    upstream_changed_later,
    node_of_the_loss,
    buffer_of_a_hook,
    counter_of_a_hook,
    noise_of_a_hook,
    weight_gradient_changed,
    operand_gradient_changed,
    operand_of_a_function_changed,
    zeros_of_a_hook,
    straight_through,
    transposed,
    foreach,
    by_keyword,
    without_saved_hooks,
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program):
    torch.testing.assert_close(*outcomes(program))


@pytest.mark.parametrize("is_small", [True, False])
def test_parameter_of_the_loss_that_changed(is_small, monkeypatch):
    """A small one is kept as it was. With a large one, there would be numbers of another."""
    if not is_small:
        monkeypatch.setattr(connection, "_SMALL", 1)
    torch._dynamo.reset()
    scale = torch.nn.Parameter(torch.full((VOCABULARY,), 2.0))
    options = {"min_logits_bytes": 0, "on_error": "raise"}

    def scaled(z):
        return loss_of(z * scale)

    code = torch.compile(scaled, backend="cce_inductor_eager", options=options)
    plain = Head().plain()
    (expected,) = torch.autograd.grad(scaled(plain), plain)
    logits = Head().deferred()
    logits.retain_grad()
    code(logits).backward()
    with torch.no_grad():
        scale.mul_(3)
    if is_small:
        torch.testing.assert_close(logits.grad.plain(), expected)
    else:
        with pytest.raises(cce_inductor.StaleLogitsError, match="an argument of the loss"):
            logits.grad.norm()


def test_compiled_results_that_share_memory():
    torch._dynamo.reset()

    def losses(z):
        each = F.cross_entropy(z.flatten(0, 1), TARGET.flatten(), reduction="none")
        return each, each.view(2, 5)

    options = {"min_logits_bytes": 0, "on_error": "raise"}
    code = torch.compile(losses, backend="cce_inductor_eager", options=options)

    def backward(logits):
        one, other = (code if hasattr(logits, "is_deferred") else losses)(logits)
        logits.register_hook(lambda gradient: gradient * 2)
        (one.sum() + 2 * other.sum()).backward()

    assert_same(backward)


def alive(*shapes):
    tensors = (each for each in gc.get_objects() if isinstance(each, torch.Tensor))
    return sum(tuple(each.shape) in shapes for each in tensors)


def test_backwards_leave_nothing_to_the_collector():
    """On a GPU, tensors that wait for Python's garbage collector are memory that is missing."""
    head = Head()

    def step():
        head.hidden = head.leaf * 1.0
        logits = head.deferred()
        (loss_of(logits) + loss_of(logits.float() / 2)).backward()
        for leaf in head.leaves:
            leaf.grad = None

    step()
    gc.collect()
    gc.disable()
    try:
        before = alive(tuple(head.weight.shape), tuple(head.leaf.shape))
        for _ in range(5):
            step()
        assert alive(tuple(head.weight.shape), tuple(head.leaf.shape)) <= before
    finally:
        gc.enable()


def test_a_loss_keeps_no_hidden_state():
    """Losses are kept in lists after their backward."""
    head = Head()
    loss = loss_of(head.deferred())
    hidden = weakref.ref(head.hidden)
    loss.backward()
    head.hidden = None
    assert hidden() is None
    assert loss.isfinite()


def test_gradient_that_was_read_keeps_only_its_values():
    head = Head()
    logits = head.deferred()
    (gradient,) = torch.autograd.grad(loss_of(logits), logits)
    gradient.norm()
    hidden = weakref.ref(head.hidden)
    head.hidden = logits = None
    gc.collect()
    assert hidden() is None
    assert gradient.isfinite().all()


def test_mixed_precision_operands(computed):
    """A temperature and a bias in float32, with logits in bfloat16."""
    found = []
    for make in (Head.deferred, Head.plain):
        head = Head(dtype=torch.bfloat16)
        scale = torch.full((), 1.5, requires_grad=True)
        bias = torch.zeros(VOCABULARY, requires_grad=True)
        loss_of(make(head) / scale + bias).backward()
        found.append([scale.grad, bias.grad])
    torch.testing.assert_close(*found, rtol=3e-2, atol=3e-3)
    assert not computed
