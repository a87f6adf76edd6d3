"""Where the host waits for a device in a sampled gradient: once, in the backward."""

import contextlib
import dataclasses

import pytest
import torch
from cases import CROSS_ENTROPY, PROGRAMS, case, gradients_of, random, wants_gradient
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cce_inductor.kernels import sampling, visited
from cce_inductor.kernels.blockwise import control_variate, engine
from cce_inductor.kernels.head import TILE
from cce_inductor.torch_internals import cuda_graphs, onednn, wide_products

VOCABULARY, BELOW, ROWS = 9 * TILE + 300, 0.5, 24


def head_and_input(text, **fields):
    input, head = case(text, VOCABULARY, ROWS, sample_below=BELOW, **fields)
    return input * 3.0, head


def is_sampled(text):
    _, head = head_and_input(text)
    asked = wants_gradient(head)
    wanted = [name for name in head.program.operands if asked[name.position]]
    why_not = sampling.reason_against(head.program, VOCABULARY, head.operands, "cuda", wanted)
    return why_not is None


SAMPLED = [name for name, text in PROGRAMS.items() if is_sampled(text)]


class Operators(TorchDispatchMode):
    """Records the operators that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(func, args, kwargs):
            self.found.append(str(func))
        return func(*args, **kwargs)


def waits(func, args, kwargs):
    if func is torch.ops.aten._to_copy.default:
        moves = args[0].device.type != torch.device(kwargs.get("device") or args[0].device).type
        return moves and not kwargs.get("non_blocking")
    if func.namespace == "aten" and func._schema.name.startswith("aten::index"):
        # A mask is converted to indices first.
        indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)
    if torch.Tag.data_dependent_output in func.tags:
        return True
    return torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None


class Lists(TorchFunctionMode):
    """Records the methods that read tensors of the CPU without an operator."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def waiting():
    """Yield a list of what made the host wait, which is complete at the end."""
    found = []
    with Lists() as lists, Operators() as operators:
        yield found
    found += [*lists.found, *operators.found]


@pytest.fixture(autouse=True)
def small_clusters(monkeypatch):
    """24 rows are 4 clusters."""
    monkeypatch.setattr(control_variate, "ROWS_OF_CLUSTER", 6)
    visited.share_visited()


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: bool(x.sum()), "aten._local_scalar_dense.default"),
        (lambda x: x.sum().item(), "aten._local_scalar_dense.default"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.nonzero(), "aten.nonzero.default"),
        (lambda x: x[x > 0], "aten.index.Tensor"),
        (lambda x: x.clone().__setitem__(x > 0, x[:1]), "aten.index_put_.default"),
        (lambda x: x.masked_select(x > 0), "aten.masked_select.default"),
        (lambda x: x.repeat_interleave(torch.ones(6).long()), "aten.repeat_interleave.Tensor"),
        (lambda x: x.unique(), "aten._unique2.default"),
        (lambda x: x.equal(x), "aten.equal.default"),
        (lambda x: x.to("meta"), "aten._to_copy.default"),
    ],
)
def test_waits_are_seen(function, operator):
    with waiting() as found:
        function(random(6))
    assert operator in found


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[x.argsort()],
        lambda x: x.clone().__setitem__(x.argsort(), x),
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: x.where(x > 0, 0.0),
        lambda x: (x > 0).nonzero_static(size=3),
        lambda x: x.split([2, 4]),
        lambda x: x.to(torch.float32),
        lambda x: x.to("meta", non_blocking=True),
    ],
)
def test_nothing_else_is_seen(function):
    with waiting() as found:
        function(random(6))
    assert found == []


def waits_of(input, head):
    """Return what made the host wait in the forward, and in the backward."""
    found = []

    def recorded(function):
        def call(*args):
            with waiting() as here:
                result = function(*args)
            found.append(here)
            return result

        return call

    gradients_of(
        recorded(engine.compute_statistics), recorded(engine.compute_gradients), input, head
    )
    return found


@pytest.mark.parametrize("skips", [True, False], ids=["skips ignored rows", "skips none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SAMPLED)
def test_the_host_waits_once_in_the_backward(name, dtype, skips, like_cuda):
    input, head = head_and_input(PROGRAMS[name], dtype=dtype)
    skips = skips and any(each.ignores for each in head.program.indexed)
    forward, backward = waits_of(input, dataclasses.replace(head, skip_ignored=skips))
    assert forward == []
    assert backward == ["tolist"]
    assert 0 < visited.share_visited() < 0.75


def test_the_host_does_not_wait_again_if_everything_is_computed(like_cuda):
    input, head = head_and_input(CROSS_ENTROPY, skip_ignored=True)
    forward, backward = waits_of(input * 1e-3, dataclasses.replace(head, sample_below=1e-3))
    assert (forward, backward) == ([], ["tolist"])
    assert visited.share_visited() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_does_not_wait_while_a_cuda_graph_is_recorded(dtype, like_cuda, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "is_recording", lambda device: True)
    forward, backward = waits_of(*head_and_input(CROSS_ENTROPY, skip_ignored=True, dtype=dtype))
    assert (forward, backward) == ([], [])


# Tensors of the device "meta" have no values: what reads one raises an error, and so does what
# mixes them with tensors of the CPU.


@pytest.fixture
def meta(monkeypatch):
    """Return a function that moves an input and a head to the device, and a list of what the host
    has asked for there. It is told that three rows of each tile are computed."""
    monkeypatch.setattr(sampling, "DEVICES", {"meta"})
    is_narrow = lambda dtype, device: dtype in (torch.bfloat16, torch.float16)  # noqa: E731
    monkeypatch.setattr(wide_products, "applies", is_narrow)
    asked = []

    def tolist(tensor):
        asked.append(tensor)
        return [0.0, float(ROWS), *(3.0 for _ in range(len(tensor) - 2))]

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def move(input, head):
        bias = head.linear_bias
        head = dataclasses.replace(
            head,
            linear_weight=head.linear_weight.to("meta"),
            linear_bias=None if bias is None else bias.to("meta"),
            # Scalars may be on the CPU. The gradient of such a scalar is, too: the host waits for it.
            operands=[
                each.to("meta") if each.dim() or has_gradient else each
                for each, has_gradient in zip(head.operands, wants_gradient(head), strict=True)
            ],
        )
        return input.to("meta"), head

    return move, asked


@pytest.mark.parametrize("skips", [True, False], ids=["skips ignored rows", "skips none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SAMPLED)
def test_everything_is_on_the_device(name, dtype, skips, meta):
    move, asked = meta
    input, head = move(*head_and_input(PROGRAMS[name], dtype=dtype))
    assert not onednn.applies(dtype, input.device)
    skips = skips and any(each.ignores for each in head.program.indexed)
    head = dataclasses.replace(head, skip_ignored=skips)

    def on_device(grads, *others):
        moved = [None if each is None else each.to("meta") for each in grads]
        with Operators() as operators:
            computed = engine.compute_gradients(moved, *others)
        assert operators.found == []
        return computed

    def statistics(*arguments):
        with Operators() as operators:
            computed = engine.compute_statistics(*arguments)
        assert operators.found == []
        return computed

    results, gradients = gradients_of(statistics, on_device, input, head)
    assert len(asked) == 1
    assert all(each.device.type == "meta" for each in results)
    leaves = [input, head.linear_weight, head.linear_bias]
    asked_for = zip(head.operands, wants_gradient(head), strict=True)
    leaves += [operand for operand, has_gradient in asked_for if has_gradient]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)
        assert gradient.device == leaf.device
