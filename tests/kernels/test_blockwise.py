"""`kernels.blockwise` against `kernels.reference` in float64."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CROSS_ENTROPY,
    HIDDEN,
    IGNORED,
    MIB,
    PROGRAMS,
    ROWS,
    case,
    expected,
    gradients_of,
    head_of,
    kept_rows,
    operands_of,
    random,
    spread,
    upstream_of,
    wants_gradient,
)
from cases import assert_agrees as assert_agrees_with
from torch.utils._python_dispatch import TorchDispatchMode

from cce_inductor.kernels.blockwise import engine
from cce_inductor.kernels.blockwise.masses import Masses
from cce_inductor.kernels.blockwise.workspace import row_blocks
from cce_inductor.kernels.head import TILE, Wanted, tile_count
from cce_inductor.kernels.program.text import Program

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 5, TILE - 1, TILE, TILE + 1, 2 * TILE + TILE // 2]


def computed(input, head, upstream=None, wanted=None):
    return gradients_of(
        engine.compute_statistics, engine.compute_gradients, input, head, upstream, wanted
    )


def assert_agrees(input, head, **tolerance):
    assert_agrees_with(computed, input, head, **tolerance)


@pytest.mark.parametrize("workspace_bytes", [1, 5 * 8 * TILE, MIB])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_any_program_vocabulary_and_workspace(name, vocabulary, workspace_bytes):
    assert_agrees(*case(PROGRAMS[name], vocabulary, workspace_bytes=workspace_bytes))


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_hardly_any_rows(name, rows):
    assert_agrees(*case(PROGRAMS[name], rows=rows))


def without_ties(text):
    """Rounded logits tie, and what is a function of their order then may be another."""
    return "topk" not in text and "max" not in text and "gt." not in text


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("workspace_bytes", [1, MIB])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in PROGRAMS if without_ties(PROGRAMS[name])])
def test_dtypes(name, dtype, workspace_bytes):
    input, head = case(PROGRAMS[name], dtype=dtype, workspace_bytes=workspace_bytes)
    want, got = expected(input, head), computed(input, head)
    assert {r.dtype for r in got[0]} == {torch.float64}
    assert {g.dtype for g in got[1]} == {dtype}
    for ours, theirs in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        error = (ours.double() - theirs).norm()
        assert error <= TOLERANCE[dtype] * max(theirs.double().norm(), 1e-3)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "tolerance"),
    [
        (torch.float32, torch.float64, 1e-6),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.float32, torch.bfloat16, 2e-2),
        (torch.float64, torch.float32, 1e-5),
    ],
    ids=str,
)
def test_compute_dtype(dtype, compute_dtype, tolerance):
    text = PROGRAMS["softcap"] + "; mean(t2, c4)"
    input, head = case(text, dtype=dtype, compute_dtype=compute_dtype)
    assert_agrees(input, head, rtol=tolerance, atol=tolerance)
    wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
    assert engine.compute_statistics(input, head)[-1].dtype == wide


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_with_a_float32_bias_are_not_rounded(dtype):
    input, head = case(CROSS_ENTROPY, dtype=dtype)
    head = head_of(head.linear_weight, random(TILE + 300).float(), head.operands, CROSS_ENTROPY)
    for ours, theirs in zip(computed(input, head)[0], expected(input, head)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-16, atol=2**-13)


def test_bfloat16_logits_are_rounded_once_after_the_bias():
    """A bias that cancels the product: rounding before it would lose what is left."""
    weight, input = random(TILE + 300, 64).bfloat16(), random(ROWS, 64).bfloat16()
    weight[:, 0], input[:, 0] = 16, 16
    bias = torch.full((TILE + 300,), -256.0).bfloat16()
    head = head_of(weight, bias, [spread(TILE + 300)], CROSS_ENTROPY)
    logits = F.linear(input, weight, bias).double()
    want = [logits.logsumexp(1), logits.gather(1, head.operands[0][:, None]).squeeze(1)]
    torch.testing.assert_close(
        engine.compute_statistics(input, head)[:2], want, rtol=1e-6, atol=1e-6
    )


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "offset": lambda t: torch.cat((t, t))[len(t) :],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    text = "t0 = mul.Tensor(z, c4); t1 = add.Tensor(t0, b6); t2 = mul.Tensor(t1, r3); logsumexp(t2); gather(t2, r1); target(z, r0, -100)"
    input, head = case(text, dtype=dtype)
    strided = [LAYOUTS[layout](t) if t.dim() else t for t in head.operands]
    head = head_of(
        LAYOUTS[layout](head.linear_weight), LAYOUTS[layout](head.linear_bias), strided, text
    )
    tolerance = {} if dtype == torch.float64 else {"rtol": 5e-2, "atol": 0.2}
    assert_agrees(LAYOUTS[layout](input), head, **tolerance)


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in ("an operand", "no logits")])
def test_arguments_are_not_changed(name):
    input, head = case(PROGRAMS[name])
    arguments = [input, head.linear_weight, head.linear_bias, *head.operands]
    before = [argument.clone() for argument in arguments]
    computed(input, head)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["everything of one value", "means", "softcap and the logits"])
def test_same_inputs_same_bits(name, dtype):
    input, head = case(PROGRAMS[name], 2 * TILE + 300, rows=200, dtype=dtype)
    first, second = computed(input, head), computed(input, head)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# Ignored rows and indices


IGNORED_ROWS = {"none": [], "one": [4], "all but one": [*range(11)], "all": [*range(ROWS)]}


@pytest.mark.parametrize("skip_ignored", [False, True])
@pytest.mark.parametrize("ignored", IGNORED_ROWS)
@pytest.mark.parametrize(
    "name", ["target", "means", "softcap", "class weights", "max and logsumexp"]
)
def test_ignored_rows(name, ignored, skip_ignored):
    input, head = case(PROGRAMS[name], skip_ignored=skip_ignored, workspace_bytes=5 * 8 * TILE)
    head.operands[0][:] = torch.arange(ROWS)
    head.operands[0][rows := IGNORED_ROWS[ignored]] = IGNORED
    assert_agrees(input, head)
    results, (d_input, *_) = computed(input, head)
    if skip_ignored:
        assert not any(result[rows].any() for result in results)
        assert not d_input[rows].any()
    elif rows:
        assert results[0][rows].any()


def test_a_row_that_one_of_two_targets_keeps():
    text = PROGRAMS["two targets"]
    input, head = case(text, skip_ignored=True)
    ignored = (head.operands[0] == IGNORED) & (head.operands[11] == -1)
    assert ignored.any()
    assert (kept_rows(head) == ~ignored).all()
    assert_agrees(input, head)


@pytest.mark.parametrize("ignore_index", [0, 3, 255, -1])
@pytest.mark.parametrize("skip_ignored", [False, True])
def test_any_ignore_index(ignore_index, skip_ignored):
    text = f"logsumexp(z); target(z, r0, {ignore_index})"
    target = torch.tensor([0, 3, 255, 7, ignore_index])
    head = head_of(random(300, HIDDEN), None, [target], text, skip_ignored=skip_ignored)
    assert_agrees(random(5, HIDDEN), head)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["target", "softcap", "class weights", "bias of a block"])
def test_skipped_rows_are_never_read(name, dtype):
    input, head = case(PROGRAMS[name], dtype=dtype, skip_ignored=True)
    upstream = upstream_of(engine.compute_statistics(input, head)[: len(head.program.statistics)])
    want = computed(input, head, upstream)
    ignored = head.operands[0] == IGNORED
    poisoned = input.masked_fill(ignored[:, None], math.nan)
    head.operands[6][ignored] = math.nan
    upstream = [g.masked_fill(ignored, math.nan) for g in upstream]
    got = computed(poisoned, head, upstream)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert all(t.isfinite().all() for part in got for t in part)


OUT_OF_BOUNDS = [5, 6, -1, -6, 2**40, -(2**40)]


def error_of(fn, *args):
    with pytest.raises((IndexError, RuntimeError)) as caught:
        fn(*args)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("index", OUT_OF_BOUNDS)
def test_target_out_of_bounds_is_the_error_of_cross_entropy(index):
    head = head_of(random(5, HIDDEN), None, [torch.tensor([0, index])], CROSS_ENTROPY)
    want = error_of(F.cross_entropy, random(2, 5), head.operands[0])
    assert error_of(engine.compute_statistics, random(2, HIDDEN), head) == want


@pytest.mark.parametrize("index", OUT_OF_BOUNDS)
def test_gather_out_of_bounds_is_the_error_of_gather(index):
    indices = torch.tensor([[0, 1], [index, 4]])
    head = head_of(random(5, HIDDEN), None, [indices], "gather(z, r0)")
    want = error_of(torch.gather, random(2, 5), 1, indices)
    assert error_of(engine.compute_statistics, random(2, HIDDEN), head) == want


@pytest.mark.parametrize("index", [i for i in OUT_OF_BOUNDS if not -5 <= i < 5])
def test_index_out_of_bounds_is_the_error_of_indexing(index):
    indices = torch.tensor([0, index])
    head = head_of(random(5, HIDDEN), None, [indices], "index(z, r0)")
    want = error_of(lambda: random(2, 5)[torch.arange(2), indices])
    assert error_of(engine.compute_statistics, random(2, HIDDEN), head) == want


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("vocabulary", [50, 300, TILE + 300])
def test_indices_of_any_integer_type(vocabulary, dtype):
    input, head = case("logsumexp(z); target(z, r0, -100); gather(z, r1); index(z, r2)", vocabulary)
    indices = [operand.clamp(0, 49) for operand in head.operands[:3]]
    want = head_of(head.linear_weight, None, indices, str(head.program))
    got = head_of(head.linear_weight, None, [i.to(dtype) for i in indices], str(head.program))
    torch.testing.assert_close(computed(input, got), computed(input, want), rtol=0, atol=0)


# What is asked for


def test_only_the_gradients_that_are_asked_for():
    text = "t0 = mul.Tensor(z, c4); t1 = add.Tensor(t0, r3); t2 = mul.Tensor(t1, s5); logsumexp(t2); target(t2, r0, -100)"
    input, head = case(text, workspace_bytes=5 * 8 * TILE)
    _, want = computed(input, head)
    assert len(want) == 6
    for number in range(2**6):
        mask = [bool(number >> bit & 1) for bit in range(6)]
        operands = [False] * 3 + mask[3:] + [False] * (len(head.operands) - 6)
        _, got = computed(input, head, wanted=Wanted(*mask[:3], operands))
        wanted = [gradient for gradient, asked in zip(want, mask, strict=True) if asked]
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")
        self.count += func._schema.name in names
        return func(*args, **(kwargs or {}))


def products(input, head, wanted):
    """How many the backward makes for each tile, beside those for the logits."""
    results = engine.compute_statistics(input, head)
    with Products() as products:
        engine.compute_gradients([*upstream_of(results[:2]), None], results, input, head, wanted)
    return products.count / tile_count(len(head.linear_weight)) - 1


@pytest.mark.parametrize("name", ["target", "softcap"])
def test_nothing_is_multiplied_for_a_gradient_that_is_not_asked_for(name):
    input, head = case(PROGRAMS[name])
    none = [False] * len(head.operands)
    assert products(input, head, Wanted(True, True, True, none)) == 2
    assert products(input, head, Wanted(True, False, True, none)) == 1
    assert products(input, head, Wanted(False, True, False, none)) == 1
    assert products(input, head, Wanted(False, False, True, none)) == 0


@pytest.mark.parametrize("text", ["target(z, r0, -100)", "gather(z, r1); index(z, r2)"])
def test_logits_at_indices_alone_are_gathered(text):
    """Nothing is as large as the logits or as a tile."""
    input, head = case(text, 8 * TILE)
    wanted = Wanted(True, True, True, [False] * len(head.operands))
    with Products() as products:
        results = engine.compute_statistics(input, head)
        engine.compute_gradients(upstream_of(results), results, input, head, wanted)
    assert products.count == 0


def test_gathered_logits_have_the_same_bits_with_several_threads():
    """Sums into the same rows of the weight's gradient must not race."""
    input, head = case("target(z, r0, -100)", vocabulary=TILE, rows=4096, dtype=torch.float32)
    head.operands[0][:] = torch.arange(4096) % 7
    wanted = Wanted(True, True, True, [False] * len(head.operands))
    results = engine.compute_statistics(input, head)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, *others = (
            engine.compute_gradients(upstream_of(results), results, input, head, wanted)
            for _ in range(8)
        )
    finally:
        torch.set_num_threads(threads)
    for other in others:
        torch.testing.assert_close(other.computed(), first.computed(), rtol=0, atol=0)


def test_many_indices_are_not_gathered():
    """Rows of the weight would be read more often than in a product."""
    input, head = case("gather(z, r1)", vocabulary=23)
    with Products() as products:
        engine.compute_statistics(input, head)
    assert products.count == 1


def test_the_logits_of_a_head_without_a_gradient_are_not_computed_again():
    input, head = case("logsumexp(p12); max(q14); logsumexp(z)")
    results = engine.compute_statistics(input, head)
    wanted = Wanted(True, True, True, [False] * len(head.operands))
    with Products() as products:
        upstream = [None, None, None, random(ROWS, seed=1), None]
        engine.compute_gradients(upstream, results, input, head, wanted)
    assert products.count == 3 * tile_count(head.vocabulary)


@pytest.mark.parametrize(
    "name", ["everything of one value", "means", "topk and gather", "two targets"]
)
def test_results_without_a_gradient(name):
    """Each result alone has one; together they have the sum."""
    input, head = case(PROGRAMS[name])
    results, together = computed(input, head)
    upstream = upstream_of(results)
    sums = [torch.zeros_like(g) for g in together]
    for number in range(len(results)):
        alone = [g if n == number else None for n, g in enumerate(upstream)]
        if alone[number] is not None:
            sums = [s + g for s, g in zip(sums, computed(input, head, alone)[1], strict=True)]
    torch.testing.assert_close(sums, together)


# Values at the edge


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["target", "softcap", "mean alone has a gradient", "max and logsumexp"]
)
def test_masked_vocabulary(name, dtype):
    """A bias of -inf: in the padding, in a whole tile, and around a target."""
    input, head = case(PROGRAMS[name], 3 * TILE + 300, rows=4, dtype=dtype)
    bias = head.linear_bias
    bias[-50:] = bias[TILE : 2 * TILE] = bias[1:3] = -math.inf
    head.operands[0][:] = torch.tensor([0, 3, 2 * TILE, IGNORED])
    tolerance = {} if dtype == torch.float64 else {"rtol": 4e-2, "atol": 4e-2}
    assert_agrees(input, head, **tolerance)
    if name == "target":
        assert (engine.compute_statistics(input, head)[-1][:, 1] == -math.inf).all()
        _, (_, d_weight, d_bias) = computed(input, head)
        assert not d_weight[bias == -math.inf].any()
        assert not d_bias[bias == -math.inf].any()


@pytest.mark.parametrize(
    "text", ["logsumexp(z)", "sum(z)", "max(z)", "topk(z, 3)", "logsumexp(z); mean(z, c4)"]
)
def test_rows_of_minus_infinity(text):
    """The results, and which gradients are finite."""
    input, head = case(text, TILE + 300, rows=3, bias=False)
    input, head.linear_weight[:, 0] = input.abs(), -1.0
    input[1, 0] = math.inf
    results = engine.compute_statistics(input, head)
    want, (d_input, _, *_) = expected(input, head)
    floating = [(r, w) for r, w in zip(results, want, strict=False) if w.is_floating_point()]
    for ours, theirs in floating:
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    _, (ours, *_) = computed(input, head)
    torch.testing.assert_close(ours[[0, 2]], d_input[[0, 2]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["target", "softcap", "means", "topk and gather", "max"])
def test_nan_and_infinity_stay_in_their_row(name, value):
    input, head = case(PROGRAMS[name], rows=4)
    input[2, 0] = value
    results, (d_input, *_) = computed(input, head)
    want, (want_d_input, *_) = expected(input, head)
    others = [0, 1, 3]
    for ours, theirs in zip(results, want, strict=True):
        torch.testing.assert_close(ours[others].double(), theirs[others].double())
    torch.testing.assert_close(d_input[others], want_d_input[others])
    for ours, theirs in zip(results, want, strict=True):
        # torch.logsumexp says inf, where log_softmax says nan; ours says nan.
        assert torch.equal(ours[2].isfinite(), theirs[2].isfinite())


def test_infinite_logits():
    """One entry is infinite, in the first tile or a later one."""
    for at in (3, TILE + 5):
        for value in (math.inf, math.nan):
            head = head_of(
                random(TILE + 300, HIDDEN),
                random(TILE + 300),
                [],
                "logsumexp(z); sum(z); max(z); topk(z, 3)",
            )
            head.linear_bias[at] = value
            input = random(3, HIDDEN)
            got, want = computed(input, head)[0], expected(input, head)[0]
            assert got[0].isnan().all()
            for ours, theirs in zip(got[1:], want[1:], strict=True):
                torch.testing.assert_close(ours.double(), theirs.double(), equal_nan=True)


def test_masked_target_has_an_infinite_loss():
    bias = torch.tensor([0.0, -math.inf, 0.0], dtype=torch.float64)
    head = head_of(random(3, HIDDEN), bias, [torch.tensor([1])], CROSS_ENTROPY)
    lse, target_logit, _ = engine.compute_statistics(random(1, HIDDEN), head)
    assert lse.isfinite().all()
    assert target_logit.item() == -math.inf
    assert_agrees(random(1, HIDDEN), head)


TIES = {
    "in a tile": [3, 5, 700],
    "in two tiles": [TILE + 5, 2 * TILE + 1],
    "around the edge": [TILE - 1, TILE],
    "everywhere": [*range(2 * TILE + 300)],
}


@pytest.mark.parametrize("workspace_bytes", [1, MIB])
@pytest.mark.parametrize("ties", TIES)
def test_the_first_of_equal_maxima(ties, workspace_bytes):
    """Of the index too, and the gradient goes there."""
    vocabulary = 2 * TILE + 300
    weight, bias = torch.zeros(vocabulary, HIDDEN).double(), torch.zeros(vocabulary).double()
    bias[TIES[ties]] = 1.0
    head = head_of(weight, bias, [], "max(z)", workspace_bytes=workspace_bytes)
    (value, index), (_, _, d_bias) = computed(random(5, HIDDEN), head)
    assert (value == 1).all()
    assert (index == TIES[ties][0]).all()
    assert d_bias.nonzero().flatten().tolist() == [TIES[ties][0]]
    assert_agrees(random(5, HIDDEN), head)


def test_first_nan_is_the_maximum():
    bias = random(2 * TILE + 300)
    bias[TILE + 7] = bias[TILE + 9] = bias[2 * TILE] = math.nan
    bias[5] = math.inf
    head = head_of(torch.zeros(len(bias), HIDDEN).double(), bias, [], "max(z)")
    value, index = engine.compute_statistics(random(2, HIDDEN), head)
    assert value.isnan().all()
    assert (index == TILE + 7).all()


def test_topk_of_ties_are_different_entries():
    vocabulary = 2 * TILE + 300
    bias = torch.zeros(vocabulary).double()
    head = head_of(torch.zeros(vocabulary, HIDDEN).double(), bias, [], "topk(z, 6)")
    value, index = engine.compute_statistics(random(5, HIDDEN), head)
    assert not value.any()
    assert all(len(set(row)) == 6 for row in index.tolist())


@pytest.mark.parametrize("k", [1, 2, 300, TILE])
def test_any_k(k):
    assert_agrees(*case(f"topk(z, {k}); logsumexp(z)", 2 * TILE + 3, rows=2))


def test_probabilities_are_not_rounded_like_large_logits():
    """Three equal logits of 1000: float32 holds their logsumexp to 3e-5 only."""
    head = head_of(
        torch.zeros(3, HIDDEN), torch.full((3,), 1000.0), [torch.tensor([1])], CROSS_ENTROPY
    )
    upstream = [torch.tensor([1.0]).double(), torch.tensor([-1.0]).double()]
    (lse, _), (_, _, d_bias) = computed(torch.ones(1, HIDDEN), head, upstream)
    assert lse.item() == pytest.approx(1000 + math.log(3), abs=1e-6)
    torch.testing.assert_close(d_bias, torch.tensor([1.0, -2.0, 1.0]) / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gap", [5.0, 10.0, 14.0])
def test_entropy_of_confident_rows(gap):
    """lse - mean, both near 1000, to the size of the entropy, though the logits are float32."""
    bias = torch.full((2 * TILE,), 1000.0 - gap)
    bias[TILE + 3] = 1000.0
    head = head_of(torch.zeros(2 * TILE, HIDDEN), bias, [], "logsumexp(z); mean(z, z)")
    lse, mean, _ = engine.compute_statistics(torch.zeros(1, HIDDEN), head)
    log_probability = bias.double().log_softmax(0)
    entropy = -(log_probability.exp() * log_probability).sum()
    torch.testing.assert_close((lse - mean).squeeze(), entropy, rtol=1e-5, atol=0)


def test_logits_beyond_the_range_of_exp():
    """Each tile has another greatest logit."""
    for order in (1, -1):
        bias = (
            torch.linspace(-1e4, 1e4, 3 * TILE).double()[::order].clone()
            if order == 1
            else torch.linspace(1e4, -1e4, 3 * TILE).double()
        )
        head = head_of(
            random(3 * TILE, HIDDEN),
            bias,
            operands_of(3 * TILE),
            "logsumexp(z); mean(z, c4); mean(z, z)",
        )
        assert_agrees(random(ROWS, HIDDEN), head)


# Tiles without mass


def confident_rows(tile, dtype, gap, text=CROSS_ENTROPY, **fields):
    """Rows whose softmax mass is in `tile` alone: elsewhere logits are lower by `gap`."""
    bias = torch.full((4 * TILE,), -gap)
    bias[tile * TILE : (tile + 1) * TILE] = 0
    input = 0.1 * random(6, HIDDEN).to(dtype)
    weight = random(4 * TILE, HIDDEN).to(dtype)
    target = torch.arange(6) + tile * TILE + 3
    fields = {"workspace_bytes": 2**15, "skip_ignored": True, **fields}
    return input, head_of(weight, bias.to(dtype), [target], text, **fields)


def skipped_tiles(input, head, monkeypatch):
    """What the backward skips."""
    seen = []
    original = engine._every_row
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_every_row", lambda *args: seen.append(original(*args)) or seen[-1])
        computed(input, head)
    return [not list(seen[0].blocks(number, ROWS)) for number in range(4)]


def computed_without_skipping(input, head, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Masses, "massless_tiles", lambda _: ())
        return computed(input, head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [0, 1, 3])
def test_skipping_massless_tiles_changes_no_bit(tile, dtype, monkeypatch):
    input, head = confident_rows(tile, dtype, gap=800.0 if dtype == torch.float64 else 130.0)
    assert skipped_tiles(input, head, monkeypatch) == [number != tile for number in range(4)]
    skipping = computed(input, head)
    complete = computed_without_skipping(input, head, monkeypatch)
    torch.testing.assert_close(skipping, complete, rtol=0, atol=0)
    _, (_, d_weight, d_bias) = skipping
    skipped = slice((tile + 1) % 4 * TILE, (tile + 1) % 4 * TILE + TILE)
    assert not d_weight[skipped].any()
    assert not d_bias[skipped].any()


@pytest.mark.parametrize("gap", [80.0, 97.0, 99.0, 101.0, 103.0, 103.5, 104.5, 108.0, 115.0])
def test_a_tile_is_skipped_only_if_no_bit_changes(gap, monkeypatch):
    """Around the place where float32's exp becomes zero, at -103.97; one entry has all the mass."""
    input, head = confident_rows(1, torch.float32, gap)
    head.linear_bias[2 * TILE : 3 * TILE] = -math.inf
    head.linear_bias[[TILE + 3, 2 * TILE + 3]] = torch.tensor([0.0, -gap])
    head.linear_bias[TILE : TILE + 3] = head.linear_bias[TILE + 4 : 2 * TILE] = -math.inf
    input = torch.zeros_like(input)
    head.operands[0][:] = TILE + 3
    assert skipped_tiles(input, head, monkeypatch)[2] == (gap > 104)
    skipping = computed(input, head)
    assert skipping[1][2][2 * TILE + 3].item() != 0 or gap > 104
    complete = computed_without_skipping(input, head, monkeypatch)
    torch.testing.assert_close(skipping, complete, rtol=0, atol=0)


@pytest.mark.parametrize(
    "text",
    [
        CROSS_ENTROPY + "; sum(z)",
        CROSS_ENTROPY + "; mean(z, z)",
        "sum(z); target(z, r0, -100)",
        "t0 = mul.Tensor(z, 1.0); logsumexp(t0); target(z, r0, -100)",
    ],
)
def test_tiles_are_not_skipped_for_other_reductions(text, monkeypatch):
    input, head = confident_rows(1, torch.float32, 130.0, text)
    assert skipped_tiles(input, head, monkeypatch) == [False] * 4


def test_normalizer_of_another_head_skips_nothing(monkeypatch):
    """The mass of each tile is known of the first logsumexp alone, which has no gradient here."""
    input, head = confident_rows(1, torch.float32, 130.0, "logsumexp(p1); logsumexp(z)")
    head.linear_bias.zero_()  # every tile has mass, but not for the other head
    other = torch.full((4 * TILE, 1), -200.0)
    other[TILE : 2 * TILE] = 0.0
    head.operands[1:] = [torch.ones(6, 1), other]
    wanted = Wanted(True, True, True, [False] * 3)
    upstream = [None, random(6, seed=1), None]
    results = engine.compute_statistics(input, head)
    found = engine.compute_gradients(upstream, results, input, head, wanted).computed()
    alone = dataclasses.replace(head, program=Program.parse("logsumexp(z)"))
    results = engine.compute_statistics(input, alone)
    want = engine.compute_gradients(upstream[1:], results, input, alone, wanted).computed()
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", [CROSS_ENTROPY + "; max(z)", CROSS_ENTROPY + "; topk(z, 2)"])
def test_tiles_with_an_index_are_not_skipped(text, monkeypatch):
    input, head = confident_rows(1, torch.float32, gap=130.0, text=text)
    head.operands[0][2] = 3 * TILE
    assert skipped_tiles(input, head, monkeypatch) == [True, False, True, False]
    head.linear_bias[5] = 1e3
    assert not skipped_tiles(input, head, monkeypatch)[0]


def test_tiles_with_mass_are_not_skipped(monkeypatch):
    assert skipped_tiles(*confident_rows(1, torch.float32, gap=50.0), monkeypatch) == [False] * 4
    input, head = confident_rows(1, torch.float32, gap=130.0)
    input[4, 0], head.linear_weight[2 * TILE + 5, 0] = 1000.0, 5.0
    assert not skipped_tiles(input, head, monkeypatch)[2]


def test_nan_keeps_every_tile(monkeypatch):
    input, head = confident_rows(1, torch.float32, gap=130.0)
    input[3, 3] = math.nan
    assert skipped_tiles(input, head, monkeypatch) == [False] * 4


def test_ignored_rows_keep_no_tile(monkeypatch):
    input, head = confident_rows(1, torch.float32, gap=130.0)
    head.operands[0][0], input[0] = IGNORED, math.nan
    assert skipped_tiles(input, head, monkeypatch) == [True, False, True, True]
    head.operands[0][:] = IGNORED
    assert skipped_tiles(input, head, monkeypatch) == [True] * 4


@pytest.mark.parametrize("sample_below", [0.0, 0.2])
@pytest.mark.parametrize("name", ["max and logsumexp", "means", "softcap", "topk and gather"])
def test_lanes_change_nothing(name, sample_below):
    input, head = case(PROGRAMS[name], 20 * TILE, sample_below=sample_below)
    alone = computed(input, head)
    torch.set_num_threads(3)
    try:
        together = computed(input, head)
    finally:
        torch.set_num_threads(1)
    for results in zip(alone, together, strict=True):
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_first_of_equal_maxima_in_distant_tiles():
    weight, bias = torch.zeros(20 * TILE, HIDDEN), torch.zeros(20 * TILE)
    bias[[TILE + 3, 12 * TILE, 19 * TILE]] = 1.0
    head = head_of(weight, bias, [], "max(z)", workspace_bytes=MIB)
    assert engine.compute_statistics(torch.zeros(2, HIDDEN), head)[1].tolist() == [TILE + 3] * 2


# The workspace


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_workspace_of_one_byte_holds_one_row(dtype):
    input, head = case(CROSS_ENTROPY, dtype=dtype, workspace_bytes=1)
    rows = engine.block_rows(head, list(head.factors(input).values()), ROWS, 1, backward=True)
    assert rows == (1, 1)
    assert list(row_blocks(2, rows.block)) == [slice(0, 1), slice(1, 2)]


def test_workspace_holds_no_more_rows_than_there_are():
    input, head = case(CROSS_ENTROPY, workspace_bytes=2**40)
    every = list(head.factors(input).values())
    assert engine.block_rows(head, every, 12, 1, backward=False) == (12, 12)
    assert engine.block_rows(head, every, 12, 1, backward=True) == (12, 12)


@pytest.mark.parametrize(("dtype", "product"), [(torch.float32, 512), (torch.bfloat16, 20 * 512)])
def test_blocks_stay_in_the_cache_and_narrow_products_take_many(dtype, product):
    input, head = case(CROSS_ENTROPY, dtype=dtype, workspace_bytes=64 * MIB)
    every = list(head.factors(input).values())
    assert engine.block_rows(head, every, 10_000, 1, backward=True) == (512, product)


@pytest.mark.parametrize("workspace_bytes", [2**14, 2**15, 2**16, 2**18])
def test_products_of_several_blocks(workspace_bytes):
    """The last product may have fewer rows than the others, and the last block as well."""
    input, head = case(
        CROSS_ENTROPY, rows=50, dtype=torch.bfloat16, workspace_bytes=workspace_bytes
    )
    block, product = engine.block_rows(
        head, list(head.factors(input).values()), 50, 1, backward=True
    )
    assert (1 < block < product < 50) == (workspace_bytes == 2**15)
    want, got = expected(input, head), computed(input, head)
    for ours, theirs in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        error = (ours.double() - theirs).norm()
        assert error <= TOLERANCE[torch.bfloat16] * theirs.double().norm()


@pytest.mark.parametrize("narrow", ["first", "others"])
def test_heads_of_different_dtypes(narrow):
    """Of one, the gradients of several blocks make one product; of the other, those of each block."""
    input, head = case(PROGRAMS["mixture of three heads"], rows=50, workspace_bytes=320_000)
    others = {position for name in head.program.products for position in name.positions}
    dtypes = [torch.bfloat16, torch.float32]
    first, other = dtypes if narrow == "first" else dtypes[::-1]
    operands = [
        operand.to(other if position in others else first)
        if operand.is_floating_point()
        else operand
        for position, operand in enumerate(head.operands)
    ]
    bias = None if head.linear_bias is None else head.linear_bias.to(first)
    head = dataclasses.replace(
        head,
        linear_weight=head.linear_weight.to(first),
        linear_bias=bias,
        operands=operands,
        compute_dtype=first,
    )
    input = input.to(first)
    block, product = engine.block_rows(
        head, list(head.factors(input).values()), len(input), 1, backward=True
    )
    assert block < product
    want, got = expected(input, head), computed(input, head)
    for ours, theirs in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        error = (ours.double() - theirs).norm()
        assert error <= TOLERANCE[torch.bfloat16] * theirs.double().norm()


def test_workspace_holds_the_blocks_of_all_heads():
    fields = {"workspace_bytes": 2**18, "dtype": torch.bfloat16}
    one, several = (
        engine.block_rows(head, list(head.factors(input).values()), 10**6, 1, backward=True)
        for input, head in (
            case("t0 = exp(z); sum(t0); sum(z)", **fields),
            case("t0 = logaddexp(z, p12); sum(t0); sum(z)", **fields),
        )
    )
    assert several < one


def peak_bytes(fn):
    """The most bytes that `fn` holds at a time, of what it allocates."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        fn()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        most = max(most, held)
    return most


def test_the_measure_of_memory():
    def three_at_a_time():
        a = torch.empty(MIB)
        b = a + 1
        del a
        return (b * 2).sum()

    torch.empty(1)
    assert 8 * MIB <= peak_bytes(three_at_a_time) < 8.1 * MIB


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", [n for n in PROGRAMS if "b6" not in PROGRAMS[n] and "b7" not in PROGRAMS[n]]
)
def test_memory_stays_within_the_workspace(name, dtype, backward):
    """Beside the workspace: what is as long as the rows or as the vocabulary, and one tile's
    weight gradient."""
    rows, workspace_bytes = 256, MIB // 2
    input, head = case(
        PROGRAMS[name], 2 * TILE, rows=8, dtype=dtype, workspace_bytes=workspace_bytes
    )
    operands = operands_of(8, rows)  # rows of operands are long, their blocks are not needed
    operands = [
        o if o.dim() and len(o) == rows else mine
        for o, mine in zip(operands, head.operands, strict=True)
    ]
    operands = [o.to(dtype) if o.is_floating_point() else o for o in operands]
    head = head_of(
        head.linear_weight,
        head.linear_bias,
        operands,
        PROGRAMS[name],
        workspace_bytes=workspace_bytes,
    )
    input = random(rows, HIDDEN).to(dtype)
    results = engine.compute_statistics(input, head)
    count = head.program.result_count
    upstream = upstream_of(results[:count]) + [None] * (len(results) - count)
    wanted = Wanted(True, True, True, wants_gradient(head))
    if backward:
        engine.compute_gradients(upstream, results, input, head, wanted)  # makes the derivative
        peak = peak_bytes(lambda: engine.compute_gradients(upstream, results, input, head, wanted))
    else:
        peak = peak_bytes(lambda: engine.compute_statistics(input, head))
    columns = sum(result.numel() for result in results) // rows
    row_values = 8 * rows * (12 * columns + 4 * HIDDEN)
    assert peak <= workspace_bytes + row_values + 8 * 2 * TILE * (HIDDEN + 8)


def test_the_gradient_of_the_input_takes_two_sums():
    """That of a group of tiles, and that of all."""
    rows, hidden = 256, 1024
    head = head_of(random(2 * TILE, hidden), None, [], "logsumexp(z)", workspace_bytes=1)
    input = random(rows, hidden)
    results = engine.compute_statistics(input, head)
    upstream = [random(rows), None]
    wanted = Wanted(True, False, False, [])
    peak = peak_bytes(lambda: engine.compute_gradients(upstream, results, input, head, wanted))
    assert peak < 2.2 * input.numel() * input.itemsize
