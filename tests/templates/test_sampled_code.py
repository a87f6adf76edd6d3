"""A sampled gradient on CUDA: Inductor's code, written on a machine without a GPU, calls the
operators, and no template."""

import logging

import pytest
import torch
from fake_cuda import fake_cuda, output_code
from resources import PROGRAMS
from torch._subclasses.fake_tensor import FakeTensorMode

from cce_inductor.kernels.head import TILE, Head
from cce_inductor.operators import inductor
from cce_inductor.operators.compiled import run_compiled

CROSS_ENTROPY = PROGRAMS["cross-entropy"]
ROWS, HIDDEN, VOCABULARY, BELOW = 512, 256, 16 * TILE, 1 / 32
INPUTS = [
    ((ROWS, HIDDEN), torch.bfloat16),
    ((VOCABULARY, HIDDEN), torch.bfloat16),
    ((ROWS,), torch.int64),
]


def arguments(weight, target, sample_below):
    return weight, None, [target], CROSS_ENTROPY, True, torch.bfloat16, 2**26, sample_below, 0


def step(sample_below):
    """Return a function that computes the statistics and gradients."""

    def both(input, weight, target):
        every = arguments(weight, target, sample_below)
        results = torch.ops.cce_inductor.reduce_rows(input, *every)
        grads = [torch.ones_like(results[0]), -torch.ones_like(results[1])]
        grads += [None] * (len(results) - len(grads))
        gradients = torch.ops.cce_inductor.reduce_rows_backward(
            grads, results, input, *every, [True, True, False, False]
        )
        return [*results, *gradients]

    return both


@pytest.fixture(autouse=True)
def with_templates():
    inductor.register()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_calls_the_operators(dynamic, caplog):
    symbolic = {0: [0], 2: [0]} if dynamic else None
    with caplog.at_level(logging.WARNING, "cce_inductor"):
        code = output_code(step(BELOW), INPUTS, dynamic=symbolic)
    assert "torch.ops.cce_inductor.reduce_rows.default(" in code
    assert "torch.ops.cce_inductor.reduce_rows_backward.default(" in code
    assert "triton_tem_" not in code
    assert caplog.text == ""  # It was asked for.


def test_an_exact_gradient_has_templates():
    code = output_code(step(0.0), INPUTS)
    assert "torch.ops.cce_inductor.reduce_rows" not in code
    assert "triton_tem_" in code


def test_a_gradient_that_cannot_be_sampled_has_templates():
    """The vocabulary is too small."""
    inputs = [INPUTS[0], ((4 * TILE, HIDDEN), torch.bfloat16), INPUTS[2]]
    code = output_code(step(BELOW), inputs)
    assert "torch.ops.cce_inductor.reduce_rows" not in code
    assert "triton_tem_" in code


@pytest.mark.parametrize(("sample_below", "has_templates"), [(0.0, True), (BELOW, False)])
def test_eager_code(sample_below, has_templates):
    with fake_cuda(90), FakeTensorMode():
        input, weight, target = (
            torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in INPUTS
        )
        every = arguments(weight, target, sample_below)
        head = Head.of(*every)
        assert inductor.has_templates(input, head) == has_templates
        if not has_templates:
            assert run_compiled("reduce_rows", input, head, (input, *every)) is None


def test_saved_tensors_are_on_the_device():
    with FakeTensorMode():
        input, weight, target = (
            torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in INPUTS
        )
        every = arguments(weight, target, BELOW)
        *_, of_tiles, order = torch.ops.cce_inductor.reduce_rows(input, *every)
    assert (of_tiles.shape, of_tiles.dtype) == ((ROWS, VOCABULARY // TILE), torch.float32)
    assert (order.shape, order.dtype) == ((VOCABULARY,), torch.int64)
    assert of_tiles.device == order.device == input.device
