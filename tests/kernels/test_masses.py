"""What the mass of a tile says about its part of the gradient."""

import math

import pytest
import torch
from cases import CROSS_ENTROPY, IGNORED, head_of

from cce_inductor.kernels.blockwise import engine
from cce_inductor.kernels.blockwise.masses import LIGHT, Masses
from cce_inductor.kernels.head import TILE, Wanted
from cce_inductor.kernels.statistics.indexed import NOWHERE

TILES, HIDDEN, ROWS = 40, 48, 96
LN2 = math.log(2)


def heavy_pairs(log_mass, index=None, weight=None):
    """Return what `Masses.heavy_pairs` does for rows without an index, and a centered weight."""
    log_mass = torch.as_tensor(log_mass, dtype=torch.float64)
    index = torch.full((len(log_mass), 1), NOWHERE) if index is None else torch.tensor(index)
    weight = torch.eye(8) - 1 / 8 if weight is None else weight
    return Masses(log_mass, index, torch.float32, TILE).heavy_pairs(weight)


def test_a_pair_is_heavy_from_its_share_of_what_the_row_has_beside_its_indices():
    even = [-math.log(TILES)] * TILES
    peaked = [-50.0] * TILES
    peaked[7] = 0.0
    confident = [-30.0 - math.log(TILES)] * TILES
    confident[3], confident[9] = 0.0, -30.0
    heavy = heavy_pairs([even, peaked, confident], [[5 * TILE], [NOWHERE], [3 * TILE + 1]])
    assert [row.nonzero().flatten().tolist() for row in heavy] == [[5], [7], [3, 9]]


def test_light_pairs_have_little_together():
    generator = torch.Generator().manual_seed(0)
    log_mass = (4 * torch.randn(200, TILES, generator=generator)).double().log_softmax(1)
    heavy = heavy_pairs(log_mass)
    light = log_mass.exp().masked_fill(heavy, 0.0)
    assert light.max() <= LIGHT
    assert light.square().sum(1).max() <= LIGHT


def test_all_are_heavy_if_most_are():
    assert heavy_pairs([[-LN2, -LN2], [-LN2, -LN2]]) is None
    assert heavy_pairs([[math.nan] * TILES] * 4) is None


def test_nan_is_heavy():
    rows = [[-math.log(TILES)] * TILES] * 3
    rows[1] = [math.nan] * TILES
    assert heavy_pairs(rows).sum(1).tolist() == [0, TILES, 0]


def test_all_are_heavy_without_an_index():
    even = torch.full((3, TILES), -math.log(TILES), dtype=torch.float64)
    assert Masses(even, None, torch.float32, TILE).heavy_pairs(torch.eye(8)) is None


def test_more_are_heavy_if_the_rows_of_the_weight_are_similar():
    even = [[-math.log(TILES)] * TILES]
    assert not heavy_pairs(even).any()
    for weight in (torch.ones(8, 8) + 0.1 * torch.eye(8), torch.zeros(8, 8), torch.eye(8) / 0):
        assert heavy_pairs(even, weight=weight) is None


def random_head(kind, dtype=torch.bfloat16):
    """A head and its input.

    Args:
        kind: of the rows: ``even``, their logits have a standard deviation of 1; ``peaked``, of 8;
            ``confident``, the target has nearly all of the mass; ``wrong``, another entry has;
            ``similar``, the rows of the weight have a large part in common.
    """
    generator = torch.Generator().manual_seed(0)
    scale = 8 if kind == "peaked" else 1
    input = scale * torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(TILES * TILE, HIDDEN, generator=generator) / HIDDEN**0.5
    target = torch.randint(TILES * TILE, (ROWS,), generator=generator)
    if kind == "similar":
        common = torch.nn.functional.normalize(torch.randn(HIDDEN, generator=generator), dim=0)
        input -= input @ common[:, None] * common
        weight += 8 * common
    likely = {"confident": target, "wrong": target.roll(1)}.get(kind)
    if likely is not None:
        weight[likely] *= 4
        input = 20 * torch.nn.functional.normalize(weight[likely], dim=1)
    target[::7] = IGNORED
    return input.to(dtype), head_of(weight.to(dtype), None, [target], CROSS_ENTROPY)


def gradients(input, head, upstream):
    results = engine.compute_statistics(input, head)
    wanted = Wanted(True, True, False, [False])
    return engine.compute_gradients(upstream, results, input, head, wanted).computed()


def stored_gradients(input, head, upstream, dtype):
    """Return those of stored logits, of which everything is computed in a dtype."""
    leaves = [
        each.detach().to(dtype, copy=True).requires_grad_() for each in (input, head.linear_weight)
    ]
    logits = leaves[0] @ leaves[1].T
    target = head.operands[0]
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    at_target = logits.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    (logits.logsumexp(1) * upstream[0] + at_target * upstream[1]).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("kind", ["even", "peaked", "confident", "wrong", "similar"])
def test_rounding_light_pairs_costs_no_precision(kind, monkeypatch):
    """Compared with bfloat16 logits that are stored. If all pairs were rounded, it would cost
    precision in the kinds where little else is rounded."""
    input, head = random_head(kind)
    row = torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64)
    row[head.operands[0] == IGNORED] = 0.0
    upstream = [row, -row]
    exact = stored_gradients(input, head, upstream, torch.float64)

    def errors(found):
        pairs = zip(found, exact, strict=True)
        return [float((ours.double() - want).norm() / want.norm()) for ours, want in pairs]

    ours = errors(gradients(input, head, upstream))
    stored = errors(stored_gradients(input, head, upstream, torch.bfloat16))
    assert all(a <= 1.05 * b for a, b in zip(ours, stored, strict=True)), (ours, stored)
    with monkeypatch.context() as patch:
        nothing = torch.zeros(ROWS, TILES, dtype=torch.bool)
        patch.setattr(Masses, "heavy_pairs", lambda self, _: nothing[: len(self.log_mass)])
        rounded = errors(gradients(input, head, upstream))
    assert (rounded[0] > 1.1 * ours[0]) == (kind in ("even", "wrong", "similar"))


def test_heavy_pairs_are_few():
    """The time that rounding saves is that of the others."""
    input, head = random_head("even")
    seen = []
    original = Masses.heavy_pairs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Masses, "heavy_pairs", lambda *args: seen.append(original(*args)) or seen[-1])
        gradients(input, head, [torch.ones(ROWS), -torch.ones(ROWS)])
    assert torch.equal(seen[0].sum(1), (head.operands[0] != IGNORED).long())
