"""The sampled gradient of `kernels.blockwise` against the exact one in float64."""

import dataclasses
import math

import pytest
import torch
from cases import (
    CROSS_ENTROPY,
    IGNORED,
    PROGRAMS,
    case,
    expected,
    gradients_of,
    random,
    upstream_of,
)

from cce_inductor.kernels import sampling, visited
from cce_inductor.kernels.blockwise import control_variate, engine, host
from cce_inductor.kernels.head import TILE, Wanted
from cce_inductor.kernels.names import OperandKind
from cce_inductor.kernels.program.text import Program
from cce_inductor.torch_internals import cuda_graphs

VOCABULARY = 9 * TILE + 300
BELOW = 0.5
DRAWS = 48
SEVERAL = 2.5
"""The mean of n draws is this many times its expected error away from the exact gradient at most.
The draws are the same in each run."""


def gradients(input, head, upstream=None, wanted=None):
    return gradients_of(
        engine.compute_statistics, engine.compute_gradients, input, head, upstream, wanted
    )


def sampled_case(text, vocabulary=VOCABULARY, scale=3.0, sample_below=BELOW, **fields):
    input, head = case(text, vocabulary, sample_below=sample_below, **fields)
    return input * scale, head


def reason_against(head, wanted=()):
    return sampling.reason_against(head.program, head.vocabulary, head.operands, "cpu", wanted)


SAMPLED = [name for name in PROGRAMS if reason_against(sampled_case(PROGRAMS[name])[1]) is None]


@pytest.fixture(autouse=True)
def small_clusters(monkeypatch):
    """12 rows are 4 clusters."""
    monkeypatch.setattr(control_variate, "ROWS_OF_CLUSTER", 3)


@pytest.fixture
def draw(monkeypatch):
    """Return a function that replaces the random numbers by those of a seed."""

    def replace(seed):
        generator = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(
            sampling,
            "offsets",
            lambda lse: torch.randint(sampling.UNIT, (len(lse),), generator=generator),
        )

    return replace


def assert_unbiased(draw, input, head, draws=DRAWS, upstream=None):
    """Assert that the mean of many draws is the exact gradient, but for the error of such a mean.

    Returns:
        The error of one draw, for each gradient, relative to its norm.
    """
    want, exact = expected(input, head, upstream)
    sums = [torch.zeros_like(each) for each in exact]
    squares = torch.zeros(len(exact), dtype=torch.float64)
    for seed in range(draws):
        draw(seed)
        results, found = gradients(input, head, upstream)
        for at, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
            sums[at] += ours.double() - theirs
            squares[at] += (ours.double() - theirs).square().sum()
    for ours, theirs in zip(results, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double())
    spread = (squares / draws).sqrt()
    for total, error, theirs in zip(sums, spread, exact, strict=True):
        slack = 1e-9 * theirs.norm()
        assert (total / draws).norm() <= SEVERAL * error / math.sqrt(draws) + slack
    return [error / theirs.norm() for error, theirs in zip(spread, exact, strict=True)]


# Unbiased


@pytest.mark.parametrize("name", SAMPLED)
def test_every_program_is_unbiased(name, draw):
    input, head = sampled_case(PROGRAMS[name])
    assert_unbiased(draw, input, head)


@pytest.mark.parametrize("rows", [2, 7, 13, 30])
@pytest.mark.parametrize("name", ["target", "entropy", "temperature of each row"])
def test_clusters_of_any_size(name, rows, draw):
    programs = {
        **PROGRAMS,
        "temperature of each row": "t0 = mul.Tensor(z, r3); logsumexp(t0); target(t0, r0, -100)",
    }
    assert_unbiased(draw, *sampled_case(programs[name], rows=rows), draws=2 * DRAWS)


def test_most_programs_are_sampled():
    assert len(SAMPLED) > 20
    assert {"target", "entropy", "softcap", "class weights", "sum and logsumexp"} < set(SAMPLED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, draw):
    input, head = sampled_case(CROSS_ENTROPY, dtype=dtype)
    _, exact = expected(input, head)
    spread = [torch.zeros_like(each) for each in exact]
    for seed in range(DRAWS):
        draw(seed)
        _, found = gradients(input, head)
        assert [each.dtype for each in found] == [dtype] * 3
        for at, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
            spread[at] += (ours.double() - theirs) / DRAWS
    rounding = 4 * torch.finfo(dtype).eps
    for mean, theirs in zip(spread, exact, strict=True):
        assert mean.norm() <= (0.1 + rounding) * theirs.norm()


def masked(input, head):
    """Some columns are -inf in every row, among them whole tiles."""
    bias = head.linear_bias.clone()
    bias[::3] = -torch.inf
    bias[2 * TILE : 5 * TILE] = -torch.inf
    target = torch.full_like(head.operands[0], 1)
    return input, dataclasses.replace(head, linear_bias=bias, operands=[target, *head.operands[1:]])


def confident(input, head):
    """Nearly all of the mass is the target's."""
    target = head.operands[0].clamp(min=0)
    weight = torch.nn.functional.normalize(head.linear_weight)
    return 500 * weight[target], dataclasses.replace(
        head, linear_weight=weight, operands=[target, *head.operands[1:]]
    )


def flat(input, head):
    return input * 1e-3, head


def ignored(input, head):
    target = head.operands[0].clone()
    target[::2] = IGNORED
    return input, dataclasses.replace(
        head, operands=[target, *head.operands[1:]], skip_ignored=True
    )


@pytest.mark.parametrize("values", [masked, flat, ignored])
def test_values_that_need_care(values, draw):
    input, head = values(*sampled_case(CROSS_ENTROPY, sample_below=0.9))
    assert_unbiased(draw, input, head)


def test_one_row(draw):
    assert_unbiased(draw, *sampled_case(CROSS_ENTROPY, rows=1), draws=4 * DRAWS)


def test_no_row_and_no_row_that_is_kept():
    input, head = sampled_case(CROSS_ENTROPY, rows=0)
    assert [each.norm() for each in gradients(input, head)[1]] == [0, 0, 0]
    input, head = sampled_case(CROSS_ENTROPY, skip_ignored=True)
    head.operands[0][:] = IGNORED
    results, found = gradients(input, head)
    assert all(result.eq(0).all() for result in results)
    assert [each.norm() for each in found] == [0, 0, 0]


def test_upstream_gradients_of_rows(draw):
    """Rows without a gradient are not computed; the others are weighted by theirs."""
    input, head = sampled_case(CROSS_ENTROPY)
    upstream = upstream_of(expected(input, head)[0])
    for each in upstream:
        each[::3] = 0.0
        each[1] *= 1000
    assert_unbiased(draw, input, head, upstream=upstream)


def in_float64(head):
    return dataclasses.replace(
        head,
        linear_weight=head.linear_weight.double(),
        linear_bias=head.linear_bias.double(),
        operands=[each.double() if each.is_floating_point() else each for each in head.operands],
        compute_dtype=torch.float64,
    )


def test_confident_rows_keep_their_precision(draw):
    """The same pairs are drawn in both dtypes, so the gradients differ by rounding alone: that of
    logits, which are computed again in products of another shape."""
    input, head = confident(*sampled_case(CROSS_ENTROPY, dtype=torch.float32))
    ones = torch.ones(len(input), dtype=torch.float64)
    (lse, target_logit), _ = expected(input, head)
    assert 1e-9 < (lse - target_logit).max() < 1e-2
    wide = in_float64(head)
    draw(0)
    _, found = gradients(input, head, [ones, -ones])
    draw(0)
    _, want = gradients(input.double(), wide, [ones, -ones])
    rounding = torch.finfo(torch.float32).eps * lse.abs().max()
    assert rounding < 0.2 * (lse - target_logit).max()
    for ours, theirs, factor in zip(found, want, (head.linear_weight, input, ones), strict=True):
        assert (ours.double() - theirs).abs().max() < rounding * factor.abs().max()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_has_the_same_gradient_as_exact(value):
    input, head = sampled_case(CROSS_ENTROPY)
    input[3, 2] = value
    exact = gradients(input, dataclasses.replace(head, sample_below=0.0))[1]
    for ours, theirs in zip(gradients(input, head)[1], exact, strict=True):
        assert ours.isnan().equal(theirs.isnan())
        assert ours.isnan().any()


# As on a device that the host runs ahead of


@pytest.mark.parametrize("name", ["target", "two targets", "entropy", "temperature of each row"])
def test_ignored_rows_have_no_gradient_whatever_their_values(name, draw, like_cuda):
    """They are not known to the host, and other rows are computed in their place."""
    programs = {
        **PROGRAMS,
        "entropy": "logsumexp(z); mean(z, z); target(z, r0, -100)",
        "temperature of each row": "t0 = mul.Tensor(z, r3); logsumexp(t0); target(t0, r0, -100)",
    }
    input, head = sampled_case(programs[name], rows=25, skip_ignored=True)
    head.operands[0][1::2] = IGNORED
    head.operands[11][3::4] = -1
    assert_unbiased(draw, input, head)

    count = head.program.result_count
    (lse, *_), exact = expected(input, head)
    ignored_rows = lse == 0
    assert 0 < ignored_rows.sum() < len(lse)
    input[ignored_rows] = math.nan
    head.operands[3][ignored_rows] = math.nan
    results, found = gradients(input, head)
    assert all(each[ignored_rows].eq(0).all() for each in results[:count])
    assert found[0][ignored_rows].eq(0).all()
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.isfinite().all()
        assert (ours - theirs).norm() < theirs.norm()


def test_no_row_that_is_kept_on_a_device(like_cuda):
    input, head = sampled_case(CROSS_ENTROPY, skip_ignored=True)
    head.operands[0][:] = IGNORED
    visited.share_visited()
    results, found = gradients(input, head)
    assert all(result.eq(0).all() for result in results)
    assert [each.norm() for each in found] == [0, 0, 0]
    assert visited.share_visited() is None
    assert [each.norm() for each in gradients(*sampled_case(CROSS_ENTROPY, rows=0))[1]] == [0, 0, 0]


def test_the_share_on_a_device_is_that_of_the_kept_rows(like_cuda, monkeypatch):
    """Of the same rows, because the hash of a row depends on its place among the computed ones."""
    input, head = sampled_case(CROSS_ENTROPY, rows=40, skip_ignored=True)
    head.operands[0][20:] = IGNORED
    shares = []
    for runs_ahead in (True, False):
        monkeypatch.setattr(host, "runs_ahead", lambda device, answer=runs_ahead: answer)
        visited.share_visited()
        gradients(input, head)
        shares.append(visited.share_visited())
    on_device, on_cpu = shares
    assert on_device == pytest.approx(on_cpu, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["target", "softcap", "entropy"])
def test_numbers_on_a_device(name, dtype, draw, like_cuda, wide_products_on_cpu):
    """Products of bfloat16 are those of the library, which are not rounded."""
    input, head = sampled_case(PROGRAMS[name], dtype=dtype)
    draw(0)
    results, found = gradients(input, head)
    assert bool(wide_products_on_cpu) == (dtype == torch.bfloat16)
    wide = in_float64(head)
    draw(0)
    want, exact = gradients(input.double(), wide)
    rounding = 16 * torch.finfo(dtype).eps
    for ours, theirs in zip((*results, *found), (*want, *exact), strict=True):
        assert (ours.double() - theirs).norm() <= rounding * theirs.norm()


def test_all_pairs_are_computed_while_a_cuda_graph_is_recorded(like_cuda, monkeypatch):
    """The forward may have been recorded or not."""
    input, head = sampled_case(CROSS_ENTROPY, skip_ignored=True)
    monkeypatch.setattr(cuda_graphs, "is_recording", lambda device: True)
    found = gradients(input, head)[1]
    for ours, theirs in zip(found, expected(input, head)[1], strict=True):
        torch.testing.assert_close(ours, theirs)


# Bounded


@pytest.mark.parametrize("scale", [1e-3, 1.0, 4.0, 20.0])
def test_work_and_weights_are_bounded(scale, monkeypatch):
    drawn = []
    sample = engine.Sample.draw
    monkeypatch.setattr(engine.Sample, "draw", lambda *args: drawn.append(sample(*args)))
    below = 1 / 4
    input, head = sampled_case(CROSS_ENTROPY, 20 * TILE, scale=scale, rows=200, sample_below=below)
    head.operands[0].random_(head.vocabulary)
    gradients(input, head)
    (pairs,) = drawn
    (mass,) = pairs.masses.values()
    torch.testing.assert_close(mass.sum(1), torch.ones(200, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (pairs.weight > 0).sum(1).max() <= 1 + 1 / below
    weighted = (pairs.weight * mass)[pairs.weight != 1]
    assert (weighted <= below * (1 + 1e-12)).all()


def test_everything_is_computed_if_sampling_would_leave_little_out():
    input, head = sampled_case(CROSS_ENTROPY, scale=1e-3, sample_below=1e-3)
    visited.share_visited()
    found = gradients(input, head)[1]
    assert visited.share_visited() == 1.0
    exact = gradients(input, dataclasses.replace(head, sample_below=0.0))[1]
    assert all(map(torch.allclose, found, exact))


def test_the_share_that_was_visited():
    visited.share_visited()
    assert visited.share_visited() is None
    input, head = sampled_case(CROSS_ENTROPY)
    gradients(input, head)
    share = visited.share_visited()
    assert 1 / 10 <= share <= (1 / BELOW + 1) / 10
    assert visited.share_visited() is None
    gradients(input, dataclasses.replace(head, sample_below=0.0))
    assert visited.share_visited() is None


def test_the_control_variate_lowers_the_error(draw, monkeypatch):
    input, head = sampled_case(CROSS_ENTROPY, scale=0.1)
    input += random(input.shape[1])  # The rows resemble each other.
    with_it = assert_unbiased(draw, input, head)
    monkeypatch.setattr(engine, "ControlVariate", lambda *args: None)
    without = assert_unbiased(draw, input, head)
    assert all(ours < 0.5 * theirs for ours, theirs in zip(with_it, without, strict=True))


# Random numbers


def test_offsets_are_uniform_and_independent():
    offsets = sampling.offsets(random(40_000) + 5).double() / sampling.UNIT
    assert offsets.min() >= 0
    assert offsets.max() < 1
    expected = (torch.arange(len(offsets)) + 0.5) / len(offsets)
    largest = (offsets.sort().values - expected).abs().max()
    assert largest < 1.63 / math.sqrt(len(offsets))  # Kolmogorov and Smirnov, at 1%
    neighbours = torch.stack([offsets[:-1], offsets[1:]]).corrcoef()[0, 1]
    assert neighbours.abs() < 3 / math.sqrt(len(offsets))


def test_offsets_are_those_of_the_data():
    lse = random(100)
    offsets = sampling.offsets(lse)
    assert sampling.offsets(lse.clone()).equal(offsets)
    assert sampling.offsets(lse[:50]).equal(offsets[:50])
    other = lse.clone()
    other[3] = lse[3].nextafter(torch.tensor(math.inf))
    assert (sampling.offsets(other) != offsets).nonzero().tolist() == [[3]]
    same = sampling.offsets(torch.zeros(100, dtype=torch.float64))
    assert len(same.unique()) == 100  # equal rows draw their own


def test_each_pair_is_drawn_with_its_chance(draw):
    generator = torch.Generator().manual_seed(0)
    chances = torch.randint(sampling.UNIT, (50, 30), generator=generator) // 3
    chances[::7, 4], chances[::5, 6] = sampling.UNIT, 0
    total = torch.zeros(50, 30, dtype=torch.float64)
    draws = 400
    for seed in range(draws):
        draw(seed)
        drawn = sampling.drawn(chances, torch.zeros(50, dtype=torch.float64))
        total += drawn
        row = chances.sum(1) / sampling.UNIT
        assert (drawn.sum(1) >= row.floor()).all()
        assert (drawn.sum(1) <= row.ceil()).all()
    chance = chances / sampling.UNIT
    error = (chance * (1 - chance) / draws).sqrt()
    assert ((total / draws - chance).abs() <= 4.5 * error).all()


def test_a_mass_of_any_size_has_a_chance():
    masses = torch.tensor([[0.0, 1e-300, 1e-9, 0.5, 1.0, math.nan]], dtype=torch.float64)
    active, held = torch.ones(1, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool)
    (chances,) = sampling.chances([masses], active, held, 0.75).tolist()
    assert chances[:2] == [0, 1]
    assert chances[2] == math.ceil(sampling.UNIT * (1e-9 / 0.75))
    assert chances[3] == math.ceil(sampling.UNIT * (0.5 / 0.75))
    assert chances[4:] == [sampling.UNIT] * 2


def test_the_same_inputs_have_the_same_bits_and_no_generator_is_used():
    input, head = sampled_case(CROSS_ENTROPY, rows=300, dtype=torch.float32)
    before = torch.get_rng_state()
    first, second = gradients(input, head)[1], gradients(input, head)[1]
    assert all(map(torch.equal, first, second))
    assert torch.get_rng_state().equal(before)
    moved = gradients(input.nextafter(input * 2), head)[1]
    assert not moved[0].allclose(first[0], rtol=1e-4)


# What is not sampled


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sum(z)", "the gradient has no softmax"),
        ("logsumexp(z); max(z)", "max depends on the order of the vocabulary"),
        ("logsumexp(z); topk(z, 2)", "topk depends on the order of the vocabulary"),
        ("logsumexp(z); logsumexp(p12)", "the loss reads the logits of several heads"),
        (
            "logsumexp(z); sum(b6); dot(b6, z)",
            "a gradient is a multiple of z, and not of a probability",
        ),
        (
            "t0 = tanh(z); logsumexp(z); sum(t0)",
            "the sum of t0 has a gradient that depends on the logits",
        ),
    ],
)
def test_reasons(text, reason):
    _, head = sampled_case(text)
    assert reason_against(head) == reason
    assert not sampling.applies(head)


def test_reasons_of_operands():
    _, head = sampled_case("t0 = mul.Tensor(z, c4); logsumexp(t0); sum(t0)")
    assert reason_against(head) is None
    (c4,) = head.program.operands
    assert reason_against(head, [c4]) == "the sum of t0 has a gradient that depends on the logits"
    _, head = sampled_case("t0 = add.Tensor(z, b6); logsumexp(t0)")
    (b6,) = head.program.operands
    assert b6.kind is OperandKind.LOGIT
    assert reason_against(head, [b6]) == "a tensor as large as the logits has a gradient"


def test_a_small_vocabulary_is_exact():
    _, head = sampled_case(CROSS_ENTROPY, vocabulary=sampling.MIN_BLOCKS * TILE - TILE)
    assert reason_against(head) == "the vocabulary has only 7 of at least 8 blocks"
    _, head = sampled_case(CROSS_ENTROPY, vocabulary=sampling.MIN_BLOCKS * TILE - TILE + 1)
    assert reason_against(head) is None


def test_other_devices_are_exact():
    program = Program.parse(CROSS_ENTROPY)
    why = sampling.reason_against(program, VOCABULARY, [], "xpu")
    assert why == "there are no sampling kernels for xpu"
    assert sampling.reason_against(program, VOCABULARY, [], "cuda") is None


@pytest.mark.parametrize("wanted_at", [4, 6])
def test_a_gradient_that_cannot_be_sampled_is_exact(wanted_at):
    """Whether an operand needs a gradient is known only in the backward."""
    text = "t0 = mul.Tensor(z, c4); t1 = add.Tensor(t0, b6); logsumexp(t1); sum(t0)"
    input, head = sampled_case(text)
    assert sampling.applies(head)
    operands = [at == wanted_at for at in range(len(head.operands))]
    wanted = Wanted(True, True, True, operands)
    exact = dataclasses.replace(head, sample_below=0.0)
    ours, theirs = (gradients(input, each, wanted=wanted)[1] for each in (head, exact))
    assert all(map(torch.allclose, ours, theirs))


def test_statistics_without_a_gradient_do_not_matter(draw):
    """Only the gradient of the logsumexp is asked for."""
    input, head = sampled_case("logsumexp(z); mean(z, z); gather(z, r1)")
    alone = dataclasses.replace(head, program=Program.parse("logsumexp(z)"))
    upstream = random(len(input))
    _, exact = expected(input, alone, [upstream])
    draw(0)
    _, (d_input, *_) = gradients(input, head, [upstream, None, None])
    assert 0 < (d_input - exact[0]).norm() < exact[0].norm()
    draw(0)
    _, (same, *_) = gradients(input, alone, [upstream])
    torch.testing.assert_close(d_input, same)


def test_hidden_state_alone(draw):
    input, head = sampled_case(CROSS_ENTROPY)
    exact = expected(input, head)[1][0]
    mean = torch.zeros_like(exact)
    for seed in range(DRAWS):
        draw(seed)
        wanted = Wanted(True, False, False, [False] * len(head.operands))
        (found,) = gradients(input, head, wanted=wanted)[1]
        mean += found / DRAWS
    assert (mean - exact).norm() < 0.15 * exact.norm()
