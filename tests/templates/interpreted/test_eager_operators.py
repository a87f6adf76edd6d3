"""The operators in eager code on a device with templates: compiled once, for every length."""

import pytest
import torch
import torch.nn.functional as F
from cases import TILED_PROGRAMS, expected, upstream_of
from test_interpreted import CROSS_ENTROPY, TOLERANCE, case

import cce_inductor
from cce_inductor import surprise
from cce_inductor.deferred.tensor import defer
from cce_inductor.kernels.triton import tiled
from cce_inductor.kernels.triton.gradient import UntiledError
from cce_inductor.operators import compiled, inductor
from cce_inductor.testing import relative_error


@pytest.fixture
def compilations(monkeypatch):
    """The operators that are compiled, each with the number of rows."""
    seen = []
    original = compiled._compiled

    def spied(operator, arguments, numbers, environment):
        seen.append((operator, *(n if isinstance(n, int) else "any" for n in numbers)))
        return original(operator, arguments, numbers, environment)

    monkeypatch.setattr(compiled, "_compiled", spied)
    compiled._versions.cache_clear()
    return seen


def reduce_rows(input, head):
    return torch.ops.cce_inductor.reduce_rows(
        input,
        head.linear_weight,
        head.linear_bias,
        list(head.operands),
        str(head.program),
        head.skip_ignored,
        head.compute_dtype,
        head.workspace_bytes,
        head.sample_below,
        head.stored_tiles,
    )


def assert_right(input, head, tolerance):
    """Assert that the operator's results and gradients are those of the specification."""
    results, gradients = expected(input, head)
    leaves = [input, head.linear_weight, head.linear_bias]
    for leaf in leaves:
        leaf.requires_grad_()
    ours = reduce_rows(input, head)[: len(results)]
    pairs = [(r, g) for r, g in zip(ours, upstream_of(results), strict=True) if r.requires_grad]
    outputs, upstream = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, leaves, upstream)
    for mine, theirs in zip((*ours, *found), (*results, *gradients[:3]), strict=True):
        assert relative_error(mine, theirs) < tolerance


def assert_near(results, expected):
    """Assert that the results are as expected. Those after them are for the backward."""
    for mine, theirs in zip(results, expected, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_length(dtype, compilations):
    for rows in (70, 70, 33, 50, 50):
        assert_right(*case(CROSS_ENTROPY, dtype, rows=rows), TOLERANCE[dtype])
    assert compilations == [
        ("reduce_rows", 70),
        ("reduce_rows_backward", 70),
        ("reduce_rows", "any"),
        ("reduce_rows_backward", "any"),
    ]


def test_a_hidden_state_that_is_stored_by_columns(compilations):
    for rows in (70, 33, 50):
        input, head = case(CROSS_ENTROPY, rows=rows)
        assert_near(reduce_rows(input.t().contiguous().t(), head), expected(input, head)[0])
    assert compilations == [("reduce_rows", 70), ("reduce_rows", "any")]


@pytest.mark.parametrize("rows", [0, 1, 40, 300])
def test_numbers_of_rows_that_are_not_symbolic(rows, compilations):
    """40 and 300 are sizes of the weight as well."""
    for count in (50, rows):
        input, head = case(CROSS_ENTROPY, rows=count)
        results = reduce_rows(input, head)
        assert_near(results, expected(input, head)[0])
    assert compilations == [("reduce_rows", 50), *([("reduce_rows",)] if rows else [])]


def test_program_without_template(compilations):
    assert_right(*case(TILED_PROGRAMS["topk and gather"]), 1e-5)
    assert compilations == []


def test_gradient_without_template(compilations, monkeypatch, caplog):
    def refuse(*arguments):
        raise UntiledError("this test refuses it")

    monkeypatch.setattr(tiled, "compute_gradients", refuse)
    for _ in range(2):
        assert_right(*case(CROSS_ENTROPY), 1e-5)
    assert compilations == [("reduce_rows", 70), ("reduce_rows_backward", 70)]
    assert caplog.text.count("this test refuses it") == 1


def test_compilation_that_fails(monkeypatch, caplog):
    compiled._versions.cache_clear()
    monkeypatch.setattr(inductor, "register", lambda: 1 / 0)
    with surprise.on_error("warn"):
        assert_right(*case(CROSS_ENTROPY), 1e-5)
    assert "an operator runs its blockwise kernels" in caplog.text


def test_inference_mode(compilations):
    with torch.inference_mode():
        input, head = case(CROSS_ENTROPY)
        ours = reduce_rows(input, head)
    assert_near(ours, expected(input.clone(), head)[0])
    assert len(compilations) == 1


def test_losses_of_deferred_logits(compilations):
    weight = torch.randn(300, 40, requires_grad=True)
    for length in (35, 20, 11, 12):
        hidden = torch.randn(2, length, 40, requires_grad=True)
        target = torch.arange(2 * length).reshape(2, length) * 31 % 300
        found = []
        for logits in (defer(hidden, weight, None, torch.float32), F.linear(hidden, weight)):
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
            first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
            again = torch.autograd.grad(loss, (hidden, weight))
            assert all(map(torch.equal, first, again))
            found.append((loss.detach(), *first))
        torch.testing.assert_close(*found)
    assert compilations == [
        ("reduce_rows", 68),
        ("reduce_rows_backward", 68),
        ("reduce_rows", "any"),
        ("reduce_rows_backward", "any"),
    ]


def test_function_in_eager_code(compilations):
    hidden, weight = torch.randn(70, 40, requires_grad=True), torch.randn(300, 40)
    target = torch.arange(70)
    loss = cce_inductor.linear_cross_entropy(hidden, weight, target)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, weight), target))
    assert compilations == [("reduce_rows", 70), ("reduce_rows_backward", 70)]
