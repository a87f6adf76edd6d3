"""`kernels.tiled` with its operators as ordinary tensor code, against `kernels.reference`."""

import dataclasses
import functools

import pytest
import torch
from cases import (
    CROSS_ENTROPY,
    PROGRAMS_OF_SEVERAL_HEADS,
    TILED_PROGRAMS,
    assert_agrees,
    case,
    gradients_of,
    head_of,
    random,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from cce_inductor.kernels.blockwise import engine
from cce_inductor.kernels.head import TILE as BLOCKWISE_TILE
from cce_inductor.kernels.head import Wanted
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.triton import tiled

TILE = 128
TILED = {
    name: text
    for name, text in TILED_PROGRAMS.items()
    if "topk" not in text  # It has no template.
}
WITHOUT_TEMPLATE = {
    "topk(z, 4); logsumexp(z)": "topk has no template",
    "target(z, r0, -100)": "nothing is reduced over the vocabulary",
}


def computed(input, head, upstream=None, wanted=None):
    reduce = functools.partial(tiled.compute_statistics, tile=TILE)
    return gradients_of(reduce, tiled.compute_gradients, input, head, upstream, wanted)


@pytest.mark.parametrize("vocabulary", [5, TILE, 2 * BLOCKWISE_TILE + 300])
@pytest.mark.parametrize("name", TILED)
def test_any_program(name, vocabulary, monkeypatch):
    monkeypatch.setattr(tiled, "MIN_BLOCK", BLOCKWISE_TILE)
    input, head = case(TILED[name], vocabulary, dtype=torch.float32, workspace_bytes=1)
    assert tiled.reason_against(head) is None
    assert_agrees(computed, input, head, rtol=2e-4, atol=1e-3)


@pytest.mark.parametrize(("text", "why"), WITHOUT_TEMPLATE.items())
def test_programs_without_a_template(text, why):
    _, head = case(text, dtype=torch.float32)
    assert tiled.reason_against(head) == why


def test_no_template_for_float64():
    _, head = case(CROSS_ENTROPY)
    assert tiled.reason_against(head) == "there is no template for torch.float64"


@pytest.mark.parametrize("name", PROGRAMS_OF_SEVERAL_HEADS)
def test_several_heads_are_refused(name):
    _, head = case(PROGRAMS_OF_SEVERAL_HEADS[name], dtype=torch.float32)
    assert tiled.reason_against(head) == "there is no template for the logits of several heads"


def test_no_template_for_a_vocabulary_that_changes_its_size():
    _, head = case(CROSS_ENTROPY, dtype=torch.float32)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    symbolic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    weight = mode.from_tensor(head.linear_weight, symbolic_context=symbolic)
    head = dataclasses.replace(head, linear_weight=weight)
    why = "there is no template for a vocabulary whose size changes"
    assert tiled.reason_against(head) == why


def test_no_template_for_many_indices():
    _, head = case("logsumexp(z); gather(z, r1)", dtype=torch.float32)
    head.operands[1] = head.operands[1].repeat(1, 6)
    assert tiled.reason_against(head) == "the template gathers at most 16 indices a row"


def test_rows_without_a_target_are_zero_and_have_no_gradient():
    input, head = case(CROSS_ENTROPY, dtype=torch.float32, skip_ignored=True)
    ignored = head.operands[0] == -100
    input[ignored] *= 1e3
    results = tiled.compute_statistics(input, head, tile=TILE)
    assert all((result[ignored] == 0).all() for result in results)
    _, (d_input, *_) = computed(input, head)
    assert (d_input[ignored] == 0).all()


@pytest.mark.parametrize("index", [300, -1])
def test_index_out_of_bounds(index):
    input, head = case(CROSS_ENTROPY, vocabulary=300, dtype=torch.float32)
    head.operands[0][3] = index
    with pytest.raises(RuntimeError, match="an index is not in the vocabulary"):
        tiled.compute_statistics(input, head)


def test_all_logits_minus_infinity():
    input, head = case("t0 = add.Tensor(z, c4); logsumexp(t0); mean(t0, c4)", dtype=torch.float32)
    head.operands[4] = torch.full_like(head.operands[4], -torch.inf)
    lse, _, _ = tiled.compute_statistics(input, head, tile=TILE)
    assert (lse == -torch.inf).all()
    assert engine.compute_statistics(input, head)[0].equal(lse)


def test_gradient_of_a_float32_weight_under_bfloat16_is_not_rounded_to_it():
    head = head_of(
        random(300, 7).float(),
        None,
        [torch.arange(12)],
        CROSS_ENTROPY,
        compute_dtype=torch.bfloat16,
    )
    _, (_, d_weight) = computed(random(12, 7).bfloat16(), head)
    assert d_weight.dtype == torch.float32
    assert not d_weight.bfloat16().float().equal(d_weight)


def test_blocks_fit_the_workspace_but_are_not_narrow():
    _, head = case(CROSS_ENTROPY, vocabulary=90000, dtype=torch.float32, workspace_bytes=2**24)
    assert tiled._block_width(100, 90000, head, 1) == 40960
    assert tiled._block_width(100, 90000, head, 3) == 13312
    assert tiled._block_width(2, 90000, head, 1) == 90000
    assert tiled._block_width(10**6, 90000, head, 1) == tiled.MIN_BLOCK


def test_statistics_are_wide_where_there_are_many():
    assert tiled._statistics_width(8192, 128256) == 1024
    assert tiled._statistics_width(2048, 32768) == 512
    assert tiled._statistics_width(100, 128256) == 256


def test_a_weight_is_cast_block_by_block(monkeypatch):
    """And only after everything has been made of the block before."""
    monkeypatch.setattr(tiled, "MIN_BLOCK", BLOCKWISE_TILE)
    input, head = case(CROSS_ENTROPY, vocabulary=2500, dtype=torch.float32, workspace_bytes=1)
    head = dataclasses.replace(head, compute_dtype=torch.bfloat16)
    calls = []
    original = tiled.weight_block

    def spy(weight, start, width, dtype, after):
        calls.append((start, width, len(after)))
        return original(weight, start, width, dtype, after)

    monkeypatch.setattr(tiled, "weight_block", spy)
    computed(input, head)
    assert calls == [(0, 1024, 0), (1024, 1024, 3), (2048, 452, 3)]


def test_gradient_is_one_program():
    input, head = case(CROSS_ENTROPY, vocabulary=300, dtype=torch.float32)
    results = tiled.compute_statistics(input, head, tile=TILE)
    seen = []
    original = tiled.logit_gradient

    def spy(*args):
        seen.append(args[4])
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "logit_gradient", spy)
        wanted = Wanted(True, False, False, [False] * len(head.operands))
        grads = [torch.ones(12), torch.ones(12), None]
        tiled.compute_gradients(grads, results, input, head, wanted)
    (text,) = seen
    assert text == (
        "t0 = sub.Tensor(z, r17); t1 = addcmul(r18, t0, 1.4426950216293335); t2 = exp2(t1); "
        "t3 = mul.Tensor(t2, r19); t4 = eq.Tensor(j, r20); t5 = addcmul(r21, t2, r19); "
        "t6 = where.self(t4, t5, t3); block(t3, t6, r20)"
    )
    assert Program.parse(text)
