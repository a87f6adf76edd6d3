"""Logits that the forward stores for the backward."""

import dataclasses

import pytest
import torch
from cases import CROSS_ENTROPY, HIDDEN, MIB, PROGRAMS, assert_agrees, case, gradients_of

from cce_inductor.kernels.blockwise import engine
from cce_inductor.kernels.blockwise.product import WideProduct
from cce_inductor.kernels.head import TILE
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.stored import stored_bytes, stored_dtype, with_stored_tiles
from cce_inductor.options import DEFAULT_WORKSPACE_BYTES

WITH_SOFTMAX = [name for name, text in PROGRAMS.items() if "logsumexp" in text]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROOM = DEFAULT_WORKSPACE_BYTES + 10 * MIB


def computed(input, head, upstream=None, wanted=None):
    return gradients_of(
        engine.compute_statistics, engine.compute_gradients, input, head, upstream, wanted
    )


@pytest.mark.parametrize("stored_tiles", [1, 2])
@pytest.mark.parametrize("name", WITH_SOFTMAX)
def test_every_program(name, stored_tiles):
    assert_agrees(computed, *case(PROGRAMS[name], stored_tiles=stored_tiles))


@pytest.mark.parametrize("bias", [None, torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_same_bits(dtype, bias):
    """The logits are stored as they were, whatever they were rounded to."""
    input, head = case(CROSS_ENTROPY, 3 * TILE + 5, dtype=dtype, bias=bias is not None)
    if bias is not None:
        head = dataclasses.replace(head, linear_bias=head.linear_bias.to(bias))
    _, expected = computed(input, head)
    _, found = computed(input, dataclasses.replace(head, stored_tiles=2))
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("stored_tiles", [0, 1, 4])
def test_stored_logits_are_not_computed_again(stored_tiles, monkeypatch):
    input, head = case(CROSS_ENTROPY, 3 * TILE + 5, workspace_bytes=2**30)
    products = []
    rounded = WideProduct.rounded

    def counted(product, a, b, *args):
        products.append((len(a), b.shape[1]))
        return rounded(product, a, b, *args)

    monkeypatch.setattr(WideProduct, "rounded", counted)
    head = dataclasses.replace(head, stored_tiles=stored_tiles)
    computed(input, head)
    assert len(products) == 4 + 4 - stored_tiles


def test_ignored_rows_are_not_stored():
    input, head = case(CROSS_ENTROPY, 2 * TILE, skip_ignored=True, stored_tiles=2)
    assert_agrees(computed, input, head)
    *_, stored = engine.compute_statistics(input, head)
    assert stored.shape == (2, len(input), TILE)


def test_the_backward_does_not_change_what_is_stored():
    """A graph that is retained has its backward twice."""
    input, head = case(CROSS_ENTROPY, stored_tiles=2)
    results = engine.compute_statistics(input, head)
    before = results[-1].clone()
    upstream = [torch.ones_like(results[0]), -torch.ones_like(results[1]), *[None] * 2]
    wanted = engine.Wanted(True, True, True, [False] * len(head.operands))
    first = engine.compute_gradients(upstream, results, input, head, wanted)
    second = engine.compute_gradients(upstream, results, input, head, wanted)
    assert torch.equal(results[-1][:, :, :300], before[:, :, :300])
    assert torch.equal(first.linear_weight, second.linear_weight)


def test_the_workspace_is_divided():
    _, head = case(CROSS_ENTROPY, 100 * TILE, dtype=torch.float32, workspace_bytes=ROOM)
    divided = with_stored_tiles(head, rows=1024)
    assert divided.stored_tiles == 2  # 4 MiB each
    assert divided.workspace_bytes == ROOM - stored_bytes(divided, 1024) == ROOM - 8 * MIB
    assert with_stored_tiles(head, rows=1).stored_tiles == 100


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"workspace_bytes": DEFAULT_WORKSPACE_BYTES}, 64),
        ({"workspace_bytes": 1}, 64),
        ({"sample_below": 0.1}, 64),
        ({"program": Program.parse("max(z)")}, 64),
        ({"linear_weight": torch.empty(100 * TILE, HIDDEN, device="meta")}, 64),
        ({}, 0),
        ({}, 10**6),
        ({}, "any"),
    ],
)
def test_no_logits_are_stored(fields, rows):
    _, head = case(CROSS_ENTROPY, 100 * TILE, dtype=torch.float32, workspace_bytes=ROOM)
    assert with_stored_tiles(head, 64).stored_tiles > 0
    other = dataclasses.replace(head, **fields)
    assert with_stored_tiles(other, rows) == other


@pytest.mark.parametrize(
    ("compute", "bias", "stored"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, None, torch.float64),
    ],
)
def test_the_dtype_holds_every_bit(compute, bias, stored):
    _, head = case(CROSS_ENTROPY, dtype=compute, bias=bias is not None)
    if bias is not None:
        head = dataclasses.replace(head, linear_bias=head.linear_bias.to(bias))
    assert stored_dtype(head) == stored
