"""`kernels.blockwise` against `kernels.reference` in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from cce_inductor.kernels import blockwise, reference
from cce_inductor.kernels.blockwise import TILE, Head, RowGradients
from cce_inductor.kernels.modification import IDENTITY, Modification
from cce_inductor.kernels.product import operand_dtype

HIDDEN, IGNORED = 7, -100
MIB = 2**20


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def head_of(weight, bias=None, **fields):
    defaults = {
        "logit_sum_weight": None,
        "with_logit_sum": False,
        "ignore_index": IGNORED,
        "modification": IDENTITY,
        "compute_dtype": operand_dtype(weight.dtype),
        "workspace_bytes": MIB,
    }
    return Head(weight, bias, **{**defaults, **fields})


def targets(vocabulary, tokens=12):
    """Both ends of the vocabulary and of every tile, and two ignored rows."""
    edges = [
        0,
        vocabulary - 1,
        *range(TILE - 1, vocabulary - 1, TILE),
        *range(TILE, vocabulary, TILE),
    ]
    return torch.tensor(([IGNORED, *edges, IGNORED] * tokens)[:tokens])


def expected(input, target, head, upstream):
    """The reference's statistics and gradients, in float64."""
    bias = head.linear_bias
    leaves = [t.detach().double().requires_grad_() for t in (input, head.linear_weight)]
    if bias is not None:
        leaves.append(bias.detach().double().requires_grad_())
    sum_weight = head.logit_sum_weight
    # The reference modifies its logits in place.
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        statistics = reference.row_statistics(
            *leaves[:2],
            leaves[2] if bias is not None else None,
            target,
            None if sum_weight is None else sum_weight.double(),
            head.ignore_index,
            head.modification,
        )
        wanted = statistics if head.with_logit_sum else statistics[:2]
        gradients = torch.autograd.grad(wanted, leaves, upstream[: len(wanted)])
    return [s.detach() for s in wanted], gradients


def computed(input, target, head, upstream, output_mask=None):
    """The same of blockwise."""
    lse, target_logit, logit_sum, tile_lse = blockwise.row_statistics(input, target, head)
    gradients = blockwise.row_statistics_backward(
        RowGradients(*upstream),
        input,
        target,
        lse,
        tile_lse,
        head,
        output_mask or (True, True, head.linear_bias is not None),
    )
    statistics = [lse, target_logit, logit_sum] if head.with_logit_sum else [lse, target_logit]
    return statistics, [g for g in gradients if g is not None]


def upstream_of(target):
    """Gradients of the three statistics, different in every row, 0 where the row is ignored."""
    kept = target != IGNORED
    return [random(len(target), seed=seed).where(kept, 0.0) for seed in (1, 2, 3)]


def assert_agrees(input, target, head, **tolerance):
    upstream = upstream_of(target)
    got, want = (f(input, target, head, upstream) for f in (computed, expected))
    for ours, theirs in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


@pytest.mark.parametrize("workspace_bytes", [1, 5 * 8 * TILE, MIB])
@pytest.mark.parametrize("vocabulary", [1, 5, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 300])
def test_any_vocabulary_and_workspace(vocabulary, workspace_bytes):
    weight, bias = random(vocabulary, HIDDEN), random(vocabulary)
    head = head_of(weight, bias, workspace_bytes=workspace_bytes)
    assert_agrees(random(12, HIDDEN), targets(vocabulary), head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_workspace_of_one_byte_holds_one_row(dtype):
    head = head_of(random(TILE + 9, HIDDEN).to(dtype), workspace_bytes=1)
    workspace = blockwise.Workspace(head, 12, HIDDEN, torch.device("cpu"), backward=True)
    assert workspace.rows == 1
    assert list(workspace.row_blocks(2)) == [slice(0, 1), slice(1, 2)]


def test_workspace_holds_no_more_rows_than_there_are():
    head = head_of(random(5, HIDDEN), workspace_bytes=2**40)
    assert blockwise.Workspace(head, 12, HIDDEN, torch.device("cpu"), backward=False).rows == 12


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_workspace_keeps_its_bound(dtype, backward):
    cap = Modification.softcap(5.0)
    head = head_of(random(3 * TILE, HIDDEN).to(dtype), workspace_bytes=MIB, modification=cap)
    workspace = blockwise.Workspace(head, 10**6, HIDDEN, torch.device("cpu"), backward=backward)
    product = workspace.product
    buffers = (workspace._logits, workspace._derivative, workspace._operand)
    buffers += (product._rounded, product._widened)
    assert MIB / 2 < sum(b.nbytes for b in buffers if b is not None) <= MIB


@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.float64, 1e-6),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.float16, torch.float32, 1e-3),
        (torch.float64, torch.float32, 1e-5),
    ],
    ids=str,
)
@pytest.mark.parametrize("workspace_bytes", [1, MIB])
def test_dtypes(dtype, compute_dtype, tolerance, workspace_bytes):
    vocabulary = TILE + 300
    weight, bias = random(vocabulary, HIDDEN).to(dtype), random(vocabulary).to(dtype)
    input, target = random(12, HIDDEN).to(dtype), targets(vocabulary)
    head = head_of(weight, bias, compute_dtype=compute_dtype, workspace_bytes=workspace_bytes)
    upstream = upstream_of(target)
    statistics, gradients = computed(input, target, head, upstream)
    assert [s.dtype for s in statistics] == [torch.float64] * 2
    assert [g.dtype for g in gradients] == [dtype] * 3
    wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
    assert blockwise.row_statistics(input, target, head)[3].dtype == wide
    assert_agrees(input, target, head, rtol=tolerance, atol=tolerance)


def assert_statistics(input, target, head, want, **tolerance):
    statistics, _ = computed(input, target, head, upstream_of(target))
    for ours, theirs in zip(statistics, want, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_with_a_float32_bias_are_not_rounded(dtype):
    weight, input = random(TILE + 300, 64).to(dtype), random(12, 64).to(dtype)
    target = targets(TILE + 300)
    head = head_of(weight, random(TILE + 300).float())
    want, _ = expected(input, target, head, upstream_of(target))
    assert_statistics(input, target, head, want, rtol=2**-16, atol=2**-13)


def test_bfloat16_logits_are_rounded_once_after_the_bias():
    """A bias that cancels the product: rounding before it would lose what is left."""
    weight, input = random(TILE + 300, 64).bfloat16(), random(12, 64).bfloat16()
    weight[:, 0], input[:, 0] = 16, 16
    bias = torch.full((TILE + 300,), -256.0).bfloat16()
    target = targets(TILE + 300)
    logits = F.linear(input, weight, bias).double()
    kept = target != IGNORED
    target_logit = logits.gather(1, target.where(kept, 0)[:, None]).squeeze(1)
    want = [s.where(kept, 0.0) for s in (logits.logsumexp(1), target_logit)]
    assert_statistics(input, target, head_of(weight, bias), want, rtol=1e-6, atol=1e-6)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "offset": lambda t: torch.cat((t, t))[len(t) :],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    weight, input = (LAYOUTS[layout](random(n, HIDDEN).to(dtype)) for n in (TILE + 300, 12))
    bias = random(2 * (TILE + 300)).to(dtype)[::2]
    tolerance = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    assert_agrees(input, targets(TILE + 300), head_of(weight, bias), **tolerance)


MODIFICATIONS = [
    "mul 0.5",
    "div 3.0",
    "div 2.0, tanh, mul 2.0",
    "tanh",
    "mul 3.0, div 2.0, tanh, mul 4.0, tanh",
    "mul -2.0",
    "mul 0.0",
]


@pytest.mark.parametrize("workspace_bytes", [1, MIB])
@pytest.mark.parametrize("modification", MODIFICATIONS)
def test_modifications(modification, workspace_bytes):
    head = head_of(
        random(TILE + 300, HIDDEN),
        random(TILE + 300),
        modification=Modification.parse(modification),
        workspace_bytes=workspace_bytes,
    )
    assert_agrees(random(12, HIDDEN), targets(TILE + 300), head)


@pytest.mark.parametrize("modification", ["", "div 2.0, tanh, mul 2.0"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("workspace_bytes", [1, MIB])
def test_logit_sum(modification, weighted, workspace_bytes):
    head = head_of(
        random(TILE + 300, HIDDEN),
        random(TILE + 300),
        with_logit_sum=True,
        logit_sum_weight=random(TILE + 300, seed=9) if weighted else None,
        modification=Modification.parse(modification),
        workspace_bytes=workspace_bytes,
    )
    assert_agrees(random(12, HIDDEN), targets(TILE + 300), head)


def test_logit_sum_is_empty_unless_asked_for():
    head = head_of(random(5, HIDDEN))
    assert blockwise.row_statistics(random(12, HIDDEN), targets(5), head)[2].shape == (0,)


@pytest.mark.parametrize("ignored", ["none", "one", "all but one", "all"])
@pytest.mark.parametrize("with_logit_sum", [False, True])
def test_ignored_rows(ignored, with_logit_sum):
    target = torch.arange(12)
    rows = {"none": [], "one": [4], "all but one": [*range(11)], "all": [*range(12)]}[ignored]
    target[rows] = IGNORED
    head = head_of(random(TILE + 300, HIDDEN), random(TILE + 300), with_logit_sum=with_logit_sum)
    assert_agrees(random(12, HIDDEN), target, head)
    for statistic in blockwise.row_statistics(random(12, HIDDEN), target, head):
        assert not statistic.numel() or not statistic[rows].any()


@pytest.mark.parametrize("ignore_index", [0, 3, 255, -1])
def test_any_ignore_index(ignore_index):
    target = torch.tensor([0, 3, 255, 7, ignore_index])
    weight, input = random(300, HIDDEN), random(5, HIDDEN)
    upstream = [g.where(target != ignore_index, 0.0) for g in upstream_of(torch.arange(5))]
    head = head_of(weight, ignore_index=ignore_index)
    got, want = (f(input, target, head, upstream) for f in (computed, expected))
    torch.testing.assert_close(got, (want[0], list(want[1])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_ignored_rows_are_never_read(dtype):
    input, target = random(12, HIDDEN).to(dtype), targets(TILE + 300)
    head = head_of(random(TILE + 300, HIDDEN).to(dtype), random(TILE + 300).to(dtype))
    upstream = upstream_of(target)
    want = computed(input, target, head, upstream)
    poisoned = input.clone()
    poisoned[target == IGNORED] = math.nan
    upstream = [g.masked_fill(target == IGNORED, math.nan) for g in upstream]
    got = computed(poisoned, target, head, upstream)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert all(t.isfinite().all() for part in got for t in part)


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_rows(tokens):
    assert_agrees(
        random(tokens, HIDDEN),
        torch.zeros(tokens, dtype=torch.int64),
        head_of(random(5, HIDDEN), random(5)),
    )


@pytest.mark.parametrize(
    "mask", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str
)
def test_output_mask(mask):
    input, target = random(12, HIDDEN), targets(TILE + 300)
    head = head_of(random(TILE + 300, HIDDEN), random(TILE + 300))
    _, want = computed(input, target, head, upstream_of(target))
    _, got = computed(input, target, head, upstream_of(target), output_mask=mask)
    wanted = [gradient for gradient, needed in zip(want, mask, strict=True) if needed]
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_masked_vocabulary(dtype):
    """A bias of -inf: in the padding, in a whole tile, and around a target."""
    vocabulary = 3 * TILE + 300
    weight, bias = random(vocabulary, HIDDEN).to(dtype), random(vocabulary).to(dtype)
    bias[-50:] = -math.inf
    bias[TILE : 2 * TILE] = -math.inf
    bias[1:3] = -math.inf
    input, target = random(4, HIDDEN).to(dtype), torch.tensor([0, 3, 2 * TILE, IGNORED])
    head = head_of(weight, bias)
    tolerance = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    assert_agrees(input, target, head, **tolerance)
    _, _, _, tile_lse = blockwise.row_statistics(input, target, head)
    assert (tile_lse[:3, 1] == -math.inf).all()
    _, (_, d_weight, d_bias) = computed(input, target, head, upstream_of(target))
    assert not d_weight[bias == -math.inf].any()
    assert not d_bias[bias == -math.inf].any()


def test_probabilities_are_not_rounded_like_large_logits():
    """Three equal logits of 1000: float32 holds their logsumexp to 3e-5 only."""
    head = head_of(torch.zeros(3, HIDDEN), torch.full((3,), 1000.0))
    upstream = [torch.tensor([1.0]).double(), torch.tensor([-1.0]).double(), torch.zeros(0)]
    (lse, _), (_, _, d_bias) = computed(torch.ones(1, HIDDEN), torch.tensor([1]), head, upstream)
    assert lse.item() == pytest.approx(1000 + math.log(3), abs=1e-6)
    torch.testing.assert_close(d_bias, torch.tensor([1.0, -2.0, 1.0]) / 3, rtol=1e-6, atol=0)


def test_masked_target_has_an_infinite_loss():
    bias = torch.tensor([0.0, -math.inf, 0.0], dtype=torch.float64)
    head = head_of(random(3, HIDDEN), bias)
    lse, target_logit, _, _ = blockwise.row_statistics(random(1, HIDDEN), torch.tensor([1]), head)
    assert lse.isfinite().all()
    assert target_logit.item() == -math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_row(value):
    input, target = random(4, HIDDEN), torch.tensor([1, TILE, 3, TILE + 1])
    input[2, 0] = value
    head = head_of(random(TILE + 300, HIDDEN))
    (lse, _), (d_input, d_weight) = computed(input, target, head, upstream_of(target))
    (want, _), (want_d_input, _) = expected(input, target, head, upstream_of(target))
    others = [0, 1, 3]
    torch.testing.assert_close(lse[others], want[others])
    torch.testing.assert_close(d_input[others], want_d_input[others])
    assert not lse[2].isfinite()
    assert d_input[2].isnan().all()
    assert d_weight.isnan().all()


@pytest.mark.parametrize("target", [5, -1, 2**40])
def test_target_out_of_bounds(target):
    head = head_of(random(5, HIDDEN))
    with pytest.raises(IndexError, match=rf"^Target {target} is out of bounds\.$"):
        blockwise.row_statistics(random(2, HIDDEN), torch.tensor([0, target]), head)


def confident_rows(tile, dtype, gap):
    """Rows whose softmax mass is in `tile` alone: elsewhere logits are lower by `gap`."""
    vocabulary = 4 * TILE
    bias = torch.zeros(vocabulary)
    bias[:] = -gap
    bias[tile * TILE : (tile + 1) * TILE] = 0
    input = 0.1 * random(6, HIDDEN).to(dtype)
    weight = random(vocabulary, HIDDEN).to(dtype)
    target = torch.arange(6) + tile * TILE + 3
    return input, target, head_of(weight, bias.to(dtype), workspace_bytes=2**15)


def skipped_tiles(input, target, head):
    lse, _, _, tile_lse = blockwise.row_statistics(input, target, head)
    rows = blockwise.kept_rows(target, IGNORED)
    selected = (blockwise.select(t, rows) for t in (target, lse, tile_lse))
    return blockwise._massless_tiles(*selected, head)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("tile", [0, 1, 3])
def test_skipping_massless_tiles_changes_no_bit(tile, dtype, monkeypatch):
    input, target, head = confident_rows(
        tile, dtype, gap=800.0 if dtype == torch.float64 else 130.0
    )
    assert skipped_tiles(input, target, head) == [number != tile for number in range(4)]
    skipping = computed(input, target, head, upstream_of(target))
    monkeypatch.setattr(blockwise, "_massless_tiles", lambda *_: [False] * 4)
    complete = computed(input, target, head, upstream_of(target))
    torch.testing.assert_close(skipping, complete, rtol=0, atol=0)
    _, (_, d_weight, d_bias) = skipping
    assert not d_weight[skipped := slice((tile + 1) % 4 * TILE, (tile + 1) % 4 * TILE + TILE)].any()
    assert not d_bias[skipped].any()


@pytest.mark.parametrize("gap", [80.0, 97.0, 99.0, 101.0, 103.0, 103.5, 104.5, 108.0, 115.0])
def test_a_tile_is_skipped_only_if_no_bit_changes(gap, monkeypatch):
    """Around the place where float32's exp becomes zero, at -103.97; one entry has all the mass."""
    input, target, head = confident_rows(1, torch.float32, gap)
    head.linear_bias[2 * TILE : 3 * TILE] = -math.inf
    head.linear_bias[[TILE + 3, 2 * TILE + 3]] = torch.tensor([0.0, -gap])
    head.linear_bias[TILE : TILE + 3] = head.linear_bias[TILE + 4 : 2 * TILE] = -math.inf
    input, target = torch.zeros_like(input), torch.full_like(target, TILE + 3)
    assert skipped_tiles(input, target, head)[2] == (gap > 104)
    skipping = computed(input, target, head, upstream_of(target))
    assert skipping[1][2][2 * TILE + 3].item() != 0 or gap > 104
    monkeypatch.setattr(blockwise, "_massless_tiles", lambda *_: [False] * 4)
    complete = computed(input, target, head, upstream_of(target))
    torch.testing.assert_close(skipping, complete, rtol=0, atol=0)


def test_tiles_with_mass_a_target_or_a_logit_sum_are_not_skipped():
    input, target, head = confident_rows(1, torch.float32, gap=130.0)
    target[2] = 3 * TILE
    assert skipped_tiles(input, target, head) == [True, False, True, False]
    head = head_of(head.linear_weight, head.linear_bias, with_logit_sum=True)
    assert skipped_tiles(input, target, head) == [False] * 4
    input, target, head = confident_rows(1, torch.float32, gap=50.0)
    assert skipped_tiles(input, target, head) == [False] * 4


def test_one_row_with_mass_keeps_a_tile():
    input, target, head = confident_rows(1, torch.float32, gap=130.0)
    row = torch.zeros(1, HIDDEN)
    row[0, 0] = 1000.0
    head.linear_weight[2 * TILE + 5, 0] = 5.0
    target = torch.cat((target, torch.tensor([TILE])))
    assert not skipped_tiles(torch.cat((input, row)), target, head)[2]


def test_nan_keeps_every_tile():
    input, target, head = confident_rows(1, torch.float32, gap=130.0)
    input[3, 3] = math.nan
    assert skipped_tiles(input, target, head) == [False] * 4


def test_ignored_rows_keep_no_tile():
    input, target, head = confident_rows(1, torch.float32, gap=130.0)
    target[0], input[0] = IGNORED, math.nan
    assert skipped_tiles(input, target, head) == [True, False, True, True]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_same_inputs_same_bits(dtype):
    vocabulary = 2 * TILE + 300
    target = targets(vocabulary, 200)
    input = random(200, 64).to(dtype)
    head = head_of(
        random(vocabulary, 64).to(dtype), random(vocabulary).to(dtype), with_logit_sum=True
    )
    first, second = (computed(input, target, head, upstream_of(target)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_arguments_are_not_changed():
    input, target = random(12, HIDDEN), targets(TILE + 300)
    head = head_of(
        random(TILE + 300, HIDDEN), random(TILE + 300), modification=Modification.softcap(2.0)
    )
    upstream = upstream_of(target)
    arguments = [input, target, head.linear_weight, head.linear_bias, *upstream]
    before = [argument.clone() for argument in arguments]
    computed(input, target, head, upstream)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)
