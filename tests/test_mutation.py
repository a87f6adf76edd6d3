"""Which tensors a call changes in place is observed, not derived from its name."""

import operator

import pytest
import torch
import torch.nn.functional as F
from checks import MAY_CHANGE, capture, reports_of
from torch.utils.checkpoint import checkpoint

from cce_inductor.rewriting.mutation import mutated_storages, storage_of

torch.manual_seed(0)
LIBRARY = torch.library.Library("cce_inductor_mutation", "DEF")
LIBRARY.define("halve(Tensor(a!) x) -> ()")
LIBRARY.define("half(Tensor x) -> Tensor")


@torch.library.impl(LIBRARY, "halve", "CompositeExplicitAutograd")
def halve(x):
    x.mul_(0.5)


@torch.library.impl(LIBRARY, "half", "CompositeExplicitAutograd")
def half(x):
    return x * 0.5


class DoublesItsClone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone().mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def assigned(x, a, b):
    x[0] = 1


WRITES = {
    "operator called as a packet": (lambda x, a, b: torch.ops.cce_inductor_mutation.halve(x), "x"),
    "overload": (lambda x, a, b: torch.ops.cce_inductor_mutation.halve.default(x), "x"),
    "renormalized embedding": (
        lambda x, a, b: F.embedding(torch.tensor([1, 2]), x, max_norm=1.0),
        "x",
    ),
    "renormalized bag": (
        lambda x, a, b: F.embedding_bag(torch.tensor([[1, 2]]), x, max_norm=1.0),
        "x",
    ),
    "batch norm": (lambda x, a, b: F.batch_norm(x, a, b, training=True), "ab"),
    "instance norm": (lambda x, a, b: F.instance_norm(x[None], a, b), "ab"),
    "dunder method": (lambda x, a, b: x.__imul__(2), "x"),
    "operator": (lambda x, a, b: operator.itruediv(x, 2), "x"),
    "view": (lambda x, a, b: x.t()[0].neg_(), "x"),
    "detached": (lambda x, a, b: x.detach().zero_(), "x"),
    "out": (lambda x, a, b: torch.add(a.detach(), 1, out=b.detach()), "b"),
    "several tensors": (lambda x, a, b: torch._foreach_add_([a, b], 1), "ab"),
    "assignment": (assigned, "x"),
    "inplace argument": (lambda x, a, b: F.dropout(x, 0.5, inplace=True), "x"),
    "in-place argument by position": (lambda x, a, b: F.leaky_relu(x, 0.1, True), "x"),
    "functional name": (lambda x, a, b: torch.relu_(x), "x"),
    "checkpointed": (lambda x, a, b: checkpoint(lambda y: y.mul_(2), x, use_reentrant=False), "x"),
}

WRITES_NOTHING = {
    "or": lambda x, a, b: (x > 0) | (x < 1),
    "and": lambda x, a, b: operator.and_(x > 0, x < 1),
    "embedding": lambda x, a, b: F.embedding(torch.tensor([1, 2]), x),
    "batch norm in evaluation": lambda x, a, b: F.batch_norm(x, a, b),
    "functional operator": lambda x, a, b: torch.ops.cce_inductor_mutation.half(x),
    "function that changes its own clone": lambda x, a, b: DoublesItsClone.apply(x),
    "checkpointed function that changes its own clone": lambda x, a, b: checkpoint(
        lambda y: y.clone().mul_(2), x, use_reentrant=False
    ),
    "mask that depends on data": lambda x, a, b: x[x > 0],
    "not in place": lambda x, a, b: F.relu(x, False),
    "condition": lambda x, a, b: torch.cond(
        a.sum() > 0, lambda y: y.clone().mul_(2), lambda y: y + 1, (x,)
    ),
}


def written_arguments(fn):
    """Return which of the arguments "x", "a" and "b" of `fn` its graph changes."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (module,) = capture(fn, torch.randn(4, 4), torch.randn(4), torch.rand(4))
    written = {storage for node in module.graph.nodes for storage in mutated_storages(node)}
    arguments = module.graph.find_nodes(op="placeholder")
    names = [node.name.removeprefix("l_").strip("_") for node in arguments]
    return "".join(
        sorted(n for n, node in zip(names, arguments, strict=True) if storage_of(node) in written)
    )


@pytest.mark.parametrize(("fn", "written"), WRITES.values(), ids=WRITES)
def test_writes(fn, written):
    assert written_arguments(fn) == "".join(sorted(written))


@pytest.mark.parametrize("fn", WRITES_NOTHING.values(), ids=WRITES_NOTHING)
def test_writes_nothing(fn):
    assert written_arguments(fn) == ""


@torch._dynamo.allow_in_graph
def increased_if_contiguous(x):
    return x.reshape(-1).add_(1)


@torch._dynamo.allow_in_graph
def increased_if_long(x):
    return x.add_(1) if len(x) > 4 else x + 1


def test_what_a_function_writes_may_depend_on_strides_and_sizes():
    assert written_arguments(lambda x, a, b: increased_if_contiguous(x.t())) == ""
    assert written_arguments(lambda x, a, b: increased_if_contiguous(x)) == "x"
    assert written_arguments(lambda x, a, b: increased_if_long(a)) == ""
    assert written_arguments(lambda x, a, b: increased_if_long(x.view(-1))) == "x"


def test_shape_of_an_example_stays_as_it_is():
    def fn(x, a, b):
        return x.unsqueeze_(0).sum() + a.sum()

    (module,) = capture(fn, torch.randn(4, 4), torch.randn(4), torch.rand(4))
    values = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    shapes = [value.shape for value in values]
    for node in module.graph.nodes:
        mutated_storages(node)
    assert [value.shape for value in values] == shapes


def test_call_that_cannot_run_writes_all_of_its_arguments():
    (module,) = capture(lambda x, a, b: x + a, torch.randn(4), torch.randn(4), torch.randn(4))
    (add,) = module.graph.find_nodes(op="call_function", target=operator.add)

    def fails(x, a):
        raise RuntimeError("this function wants real tensors")

    add.target = fails
    assert mutated_storages(add) == {storage_of(node) for node in add.all_input_nodes}


@torch._dynamo.allow_in_graph
def doubled_for_training(x):
    return x.mul_(2) if torch.is_grad_enabled() else x * 2


def without_gradients(x, a, b):
    with torch.no_grad():
        return doubled_for_training(x)


def test_function_that_writes_where_gradients_are_enabled():
    assert written_arguments(lambda x, a, b: doubled_for_training(x)) == "x"
    assert written_arguments(without_gradients) == "x"  # asked without its place
    (module,) = capture(without_gradients, torch.randn(4, 4), torch.randn(4), torch.randn(4))
    (call,) = module.graph.find_nodes(op="call_function", target=doubled_for_training)
    assert mutated_storages(call, grad_enabled=True)
    assert not mutated_storages(call, grad_enabled=False)


INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def renormalize(weight):
    F.embedding(torch.tensor([1, 2]), weight, max_norm=0.1)


def normalize_by_batch(weight):
    F.batch_norm(torch.randn(4, 8), weight[0].detach(), weight[1].detach().abs(), training=True)


CHANGES = {
    "packet": lambda weight: torch.ops.cce_inductor_mutation.halve(weight),
    "embedding": renormalize,
    "batch norm": normalize_by_batch,
    "dunder method": lambda weight: weight.__imul__(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weight_changed_between_projection_and_loss(change):
    def fn(input, weight, target):
        weight = weight.clone()
        logits = F.linear(input, weight)
        change(weight.detach())
        return F.cross_entropy(logits, target)

    (report,) = reports_of(fn, INPUT.detach(), WEIGHT, TARGET)
    assert report.reason.endswith(f" {MAY_CHANGE}")


UNCHANGED = {
    "or": lambda target: target | 0,
    "function": lambda target: DoublesItsClone.apply(target.double()),
}


@pytest.mark.parametrize("use", UNCHANGED.values(), ids=UNCHANGED)
def test_what_changes_nothing_does_not_matter(use):
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        return F.cross_entropy(logits, target) + use(target).sum() * 0

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.rewritten


def test_loss_beside_a_function_of_its_result():
    def fn(input, weight, target):
        loss = F.cross_entropy(F.linear(input, weight), target)
        return DoublesItsClone.apply(loss)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.rewritten
