"""Statistics and gradients that are computed together."""

import dataclasses

import pytest
import torch
from cases import CROSS_ENTROPY, PROGRAMS, case, expected, head_of, upstream_of

from cce_inductor.kernels.blockwise.product import WideProduct
from cce_inductor.kernels.blockwise.with_gradients import (
    LEAST_ROWS,
    compute_with_gradients,
    rows_at_once,
)
from cce_inductor.kernels.blockwise.workspace import ROWS_IN_CACHE
from cce_inductor.kernels.head import TILE, Wanted
from cce_inductor.kernels.program.text import Program

ROWS, VOCABULARY = 2 * LEAST_ROWS + 44, TILE + 300
WORKSPACE = LEAST_ROWS * 2 * TILE * 8


def has_softmax(text):
    program = Program.parse(text.format(k=4))
    return bool(program.normalizers) and not program.products


def wanted(head, **fields):
    every = Wanted(True, True, head.linear_bias is not None, [False] * len(head.operands))
    return dataclasses.replace(every, **fields)


@pytest.mark.parametrize("name", [name for name, text in PROGRAMS.items() if has_softmax(text)])
def test_every_program(name):
    """The rows are computed in three parts, the last of which is smaller."""
    input, head = case(PROGRAMS[name], VOCABULARY, ROWS, workspace_bytes=WORKSPACE)
    assert rows_at_once(head) == LEAST_ROWS
    results, gradients = expected(input, head)
    upstream = upstream_of(results)
    found, made = compute_with_gradients(upstream, input, head, wanted(head))
    mine = (*found, made.input, made.linear_weight, made.linear_bias)
    for ours, theirs in zip(mine, (*results, *gradients), strict=False):
        torch.testing.assert_close(ours.double(), theirs.double(), equal_nan=True)


@pytest.mark.parametrize("rows", [0, 1, LEAST_ROWS, LEAST_ROWS + 1])
@pytest.mark.parametrize("skip_ignored", [False, True])
def test_any_number_of_rows(rows, skip_ignored):
    input, head = case(
        CROSS_ENTROPY, VOCABULARY, rows, workspace_bytes=WORKSPACE, skip_ignored=skip_ignored
    )
    results, gradients = expected(input, head)
    found, made = compute_with_gradients(upstream_of(results), input, head, wanted(head))
    for ours, theirs in zip(
        (*found, made.input, made.linear_weight), (*results, *gradients[:2]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_parts_without_a_row_that_is_kept():
    input, head = case(
        CROSS_ENTROPY, VOCABULARY, ROWS, workspace_bytes=WORKSPACE, skip_ignored=True
    )
    head.operands[0][: LEAST_ROWS + 5] = -100
    results, gradients = expected(input, head)
    _, made = compute_with_gradients(upstream_of(results), input, head, wanted(head))
    torch.testing.assert_close(made.linear_weight, gradients[1])
    assert not made.input[: LEAST_ROWS + 5].any()


@pytest.mark.parametrize("without", ["input", "linear_weight", "linear_bias"])
def test_only_what_is_asked_for(without):
    input, head = case(CROSS_ENTROPY, VOCABULARY, ROWS, workspace_bytes=WORKSPACE)
    results, gradients = expected(input, head)
    asked = wanted(head, **{without: False})
    _, made = compute_with_gradients(upstream_of(results), input, head, asked)
    for name, theirs in zip(("input", "linear_weight", "linear_bias"), gradients, strict=False):
        ours = getattr(made, name)
        if name == without:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs)


def test_three_products(monkeypatch):
    products = []
    for name in ("rounded", "__call__"):
        original = getattr(WideProduct, name)

        def counted(product, *args, name=name, original=original, **kwargs):
            products.append(name)
            return original(product, *args, **kwargs)

        monkeypatch.setattr(WideProduct, name, counted)
    input, head = case(CROSS_ENTROPY, 16 * TILE, ROWS, workspace_bytes=8 * WORKSPACE)
    results, _ = expected(input, head)
    compute_with_gradients(upstream_of(results), input, head, wanted(head))
    parts, tiles = 3, 4
    assert (products.count("rounded"), products.count("__call__")) == (
        parts * tiles,
        2 * parts * tiles,
    )


@pytest.mark.parametrize(
    ("workspace", "rows"),
    [
        (1, 0),
        (WORKSPACE - 1, 0),
        (WORKSPACE, LEAST_ROWS),
        (2 * WORKSPACE, 2 * LEAST_ROWS),
        (100 * WORKSPACE, ROWS_IN_CACHE),
    ],
)
def test_the_workspace_has_room_for_the_logits_of_rows(workspace, rows):
    weight = torch.empty(VOCABULARY, 8, dtype=torch.float64)
    head = head_of(weight, None, [], "logsumexp(z)", workspace_bytes=workspace)
    assert rows_at_once(head) == rows
