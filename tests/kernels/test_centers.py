"""Clusters of rows, and the centers that stand for them."""

import dataclasses

import pytest
import torch
from cases import case, random

from cce_inductor.kernels.blockwise.centers import Centers, value_of, vocabulary_order
from cce_inductor.kernels.blockwise.control_variate import depth_for
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.head import TILE
from cce_inductor.kernels.names import COLUMN, LOGIT, Name

TEXT = "t0 = mul.Tensor(z, r3); t1 = add.Tensor(t0, c4); t2 = mul.Tensor(t1, b6); t3 = lt.Tensor(j, r9); logsumexp(t2); sum(t3)"
VOCABULARY = 2 * TILE + 5


def centers_of(rows, depth, text=TEXT, **fields):
    input, head = case(text, VOCABULARY, rows=rows, **fields)
    kept = KeptRows(rows, head)
    return Centers(input, head, kept, depth), input, head


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 7, 8, 29])
def test_each_row_is_in_one_cluster(rows, depth):
    centers, _, _ = centers_of(rows, depth)
    assert centers.rows.shape == (2**depth, -(-rows // 2**depth))
    assert sorted(centers.rows[centers.is_own].tolist()) == list(range(rows))


def test_similar_rows_are_together():
    input, head = case(TEXT, VOCABULARY, rows=40)
    group = torch.arange(40) % 4
    corners = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 30.0], [9.0, 30.0]]).double()
    input[:, :2] += corners[group]
    centers = Centers(input, head, KeptRows(40, head), 2)
    assert all(len(set(group[rows].tolist())) == 1 for rows in centers.rows)


def test_values():
    centers, input, head = centers_of(12, 2)
    tile = slice(TILE, 2 * TILE)
    values = centers.values(tile, head.linear_weight[tile], head.linear_bias[tile])
    for number, rows in enumerate(centers.rows):
        logits = input[rows].mean(0) @ head.linear_weight[tile].T + head.linear_bias[tile]
        torch.testing.assert_close(values[LOGIT][number], logits)
        r3, b6, r9 = (values[Name(name)][number] for name in ("r3", "b6", "r9"))
        assert r3.item() == pytest.approx(head.operands[3][rows].mean().item())
        assert b6.equal(head.operands[6][rows[0], tile])
        assert r9.item() == head.operands[9][rows[0]]
    assert values[Name("c4")].equal(head.operands[4][tile].unsqueeze(0))
    assert values[COLUMN].equal(torch.arange(TILE, 2 * TILE).unsqueeze(0))
    t1 = value_of(head.program, Name("t1"), values)
    torch.testing.assert_close(t1, values[LOGIT] * values[Name("r3")] + values[Name("c4")])


def test_values_in_an_order():
    centers, input, head = centers_of(12, 1)
    order = random(VOCABULARY).argsort()
    ordered = Centers(input, dataclasses.replace(head, order=order), KeptRows(12, head), 1)
    every, tile = slice(0, VOCABULARY), slice(5, 30)
    here = order[tile]
    whole = centers.values(every, head.linear_weight, head.linear_bias)
    part = ordered.values(tile, head.linear_weight[here], head.linear_bias[here])
    for name in (LOGIT, COLUMN, Name("c4"), Name("b6")):
        torch.testing.assert_close(part[name], whole[name][:, here])


def test_order_of_the_vocabulary():
    _, input, head = centers_of(12, 0, "t0 = mul.Tensor(z, c4); logsumexp(t0)")
    mean = input.mean(0) @ head.linear_weight.T + head.linear_bias
    order = vocabulary_order(input, head, KeptRows(12, head))
    assert order.equal((mean * head.operands[4]).argsort(descending=True))
    assert vocabulary_order(input[:0], head, KeptRows(0, head)).equal(torch.arange(VOCABULARY))


def test_rows_of_a_cluster():
    assert [depth_for(rows) for rows in (0, 1, 255, 256, 512, 2048, 10**6)] == [0, 0, 0, 1, 2, 4, 4]
