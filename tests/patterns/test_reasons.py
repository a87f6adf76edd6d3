"""What is said about a loss that is left alone, and where it says that it stands."""

import inspect
import re
from pathlib import Path

import expecttest
import pytest
import torch
import torch.nn.functional as F
from checks import capture, reason_against, reports_of

import cce_inductor
from cce_inductor.options import Options
from cce_inductor.reporting import reasons
from cce_inductor.reporting.reasons import Reason
from cce_inductor.rewriting.rewrite import rewrite
from cce_inductor.testing import assert_matches_eager

ROOT = Path(__file__).parents[2]
torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])


def place(fn, text):
    """``file.py:line`` of the one line of `fn` that contains `text`."""
    lines, first = inspect.getsourcelines(fn)
    (line,) = [first + number for number, line in enumerate(lines) if text in line]
    return f"{__file__}:{line}"


def plain(input, weight, target):
    logits = F.linear(input, weight)
    loss = F.cross_entropy(logits.float(), target)
    return loss


def test_report_of_a_rewritten_loss():
    (report,) = reports_of(plain, INPUT, WEIGHT, TARGET)
    assert report.rewritten
    assert report.reason is None
    assert report.location == place(plain, "cross_entropy")
    assert report.loss == "linear > float > cross_entropy"
    assert report.logits_shape == (6, 50)
    assert report.logits_dtype == torch.float32
    assert report.bytes_saved == 6 * 50 * 4


def test_small_logits():
    (module,) = capture(plain, INPUT, WEIGHT, TARGET)
    (report,) = rewrite(module, Options(min_logits_bytes=2048))
    assert report.reason == "the logits are small (1.172 KiB, and min_logits_bytes is 2 KiB)"
    assert report.location == place(plain, "cross_entropy")
    assert not report.rewritten
    assert report.bytes_saved == 0


@pytest.mark.parametrize("smallest", [1199, 1200])
def test_logits_that_are_just_large_enough(smallest):
    (module,) = capture(plain, INPUT, WEIGHT, TARGET)
    (report,) = rewrite(module, Options(min_logits_bytes=smallest))
    assert report.rewritten


def test_logits_that_are_just_too_small():
    (module,) = capture(plain, INPUT, WEIGHT, TARGET)
    (report,) = rewrite(module, Options(min_logits_bytes=1201))
    assert report.reason.startswith("the logits are small (1.172 KiB, ")


def test_default_options_leave_small_logits_alone():
    torch._dynamo.reset()
    cce_inductor.clear_reports()
    torch.compile(plain, backend="cce_inductor_eager")(INPUT, WEIGHT, TARGET)
    (report,) = cce_inductor.reports()
    assert report.reason == "the logits are small (1.172 KiB, and min_logits_bytes is 16 MiB)"


def test_logits_used_by_an_operation():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        ranked = logits.argsort(-1)
        return F.cross_entropy(logits, target), ranked

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        f"{reasons.USED_BY} argsort at {place(fn, 'argsort')}: "
        f"{reasons.not_pointwise('aten.sort.default')}"
    )
    assert report.location == place(fn, "cross_entropy")
    assert report.loss == "linear > cross_entropy"
    assert report.logits_shape == (6, 50)


def test_logits_used_by_an_operation_in_an_unsupported_form():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        logits = logits[:, ::2]
        return F.cross_entropy(logits, target.clamp(max=24))

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        f"{reasons.USED_BY} getitem at {place(fn, '::2')}: {reasons.SELECTS_SOME_ENTRIES}"
    )


def test_first_of_two_uses_is_named():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        first = logits.prod(-1)
        second = logits.amin(-1)
        return F.cross_entropy(logits, target), first, second

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        f"{reasons.USED_BY} prod at {place(fn, 'prod')}: "
        f"{reasons.not_pointwise('aten.prod.dim_int')}"
    )


def test_a_loss_of_logits_joined_with_their_own_entries_does_not_vanish():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        index = target.clamp(min=0)[:, None]
        others = logits.scatter(1, index, -1e9)
        return F.cross_entropy(torch.cat([logits.gather(1, index), others], 1), target * 0)

    assert f"{reasons.USED_BY} cat" in reason_against(fn, INPUT, WEIGHT, TARGET)


def test_use_after_the_loss_is_named():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        loss = F.cross_entropy(logits, target)
        return loss, logits.amin(-1)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        f"{reasons.USED_BY} amin at {place(fn, 'amin')}: "
        f"{reasons.not_pointwise('aten.amin.default')}"
    )


def test_operation_between_is_named_and_not_what_follows_it():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        logits = logits.cumsum(-1)
        logits = logits.exp().view(-1, 50)
        return F.cross_entropy(logits, target)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        f"{reasons.USED_BY} cumsum at {place(fn, 'cumsum')}: "
        f"{reasons.not_pointwise('aten.cumsum.default')}"
    )


def test_operation_of_a_module_is_located_in_the_user_code():
    activation = torch.nn.Dropout()

    def fn(input, weight, target):
        logits = activation(F.linear(input, weight))
        return torch.nn.CrossEntropyLoss()(logits, target)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        f"{reasons.USED_BY} dropout at {place(fn, 'activation(')}: {reasons.RANDOM.sentence}"
    )
    assert report.location == place(fn, "CrossEntropyLoss")


def test_returned_logits():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        loss = F.cross_entropy(logits.view(-1, 50), target)
        return loss, logits

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == reasons.RETURNED.sentence
    assert report.location == place(fn, "cross_entropy")


def test_loss_in_another_graph():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        torch._dynamo.graph_break()
        return F.cross_entropy(logits.float().view(-1, 50), target)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert not report.rewritten
    assert report.reason.startswith("its logits come into this graph from outside")
    assert report.location == place(fn, "cross_entropy")
    assert report.logits_shape is None
    assert report.logits_dtype is None


def test_logits_given_to_the_function():
    def fn(logits, target):
        return F.cross_entropy(logits, target)

    (report,) = reports_of(fn, torch.randn(6, 50), TARGET)
    assert report.reason.startswith("its logits come into this graph from outside")


def test_logits_given_to_the_function_and_scaled():
    def fn(logits, target):
        return F.cross_entropy((logits / 2).view(-1, 50), target)

    (report,) = reports_of(fn, torch.randn(6, 50), TARGET)
    assert report.reason.startswith("its logits come into this graph from outside")


def test_unknown_projection():
    def fn(input, weight, target):
        logits = F.conv1d(input.T[None], weight[..., None], padding=1)
        return F.cross_entropy(logits[0, :, 1:-1].T, target)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert not report.rewritten
    assert "which is not a known projection" in report.reason


def test_class_probabilities_with_a_gradient():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        return F.cross_entropy(logits, target)

    (report,) = reports_of(fn, INPUT, WEIGHT, torch.rand(6, 50, requires_grad=True))
    assert report.reason == (
        "cross_entropy cannot be rewritten: " + reasons.OPERAND_LARGE_WITH_GRADIENT.sentence
    )
    assert report.location == place(fn, "cross_entropy")


def test_operand_that_changed():
    def fn(input, weight, target):
        weight = weight.clone()
        logits = F.linear(input, weight)
        weight[0] = 0
        return F.cross_entropy(logits, target)

    (report,) = reports_of(fn, INPUT.detach(), WEIGHT, TARGET)
    assert report.reason == (
        f"cross_entropy cannot be rewritten: setitem at {place(fn, 'weight[0]')} "
        "may change what the projection read"
    )


def test_other_loss_of_the_same_projection():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        first = F.cross_entropy(logits, target)
        return first + F.cross_entropy(logits.cumsum(-1), target)

    for report in reports_of(fn, INPUT, WEIGHT, TARGET):
        assert not report.rewritten
        assert "used by cumsum at " in report.reason


def test_constants_are_shown():
    def fn(input, weight, target):
        logits = 30.0 * torch.tanh(F.linear(input, weight) / 30.0)
        return F.cross_entropy(logits[:-1].view(-1, 50), target[1:], reduction="sum")

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.rewritten
    assert report.loss == (
        "linear > truediv(30.0) > tanh > mul(30.0) > getitem(:-1) > view(-1, 50) > "
        "cross_entropy(reduction='sum')"
    )


def test_text():
    (report,) = reports_of(plain, INPUT, WEIGHT, TARGET)
    assert str(report) == (
        "rewritten: linear > float > cross_entropy\n"
        f"  at {place(plain, 'cross_entropy')}\n"
        "  logits: 6x50 float32\n"
        "  not stored any more: 1.172 KiB"
    )


def test_text_of_a_loss_that_is_left_alone():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        return F.cross_entropy(logits, target), logits

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert str(report) == (
        "left alone: linear > cross_entropy\n"
        f"  at {place(fn, 'cross_entropy')}\n"
        "  logits: 6x50 float32\n"
        f"  because {reasons.RETURNED.sentence}\n"
        f"  to change that: {reasons.RETURNED.advice}"
    )


def test_an_escape_earlier_in_the_model_is_not_the_reason():
    def fn(input, hidden_weight, weight, target):
        hidden = F.linear(input, hidden_weight).cumsum(-1)
        return F.cross_entropy(F.bilinear(hidden, hidden, weight), target)

    hidden_weight, weight = torch.randn(9, 8), torch.randn(50, 9, 9)
    reason = reason_against(fn, torch.randn(6, 8), hidden_weight, weight, torch.randint(50, (6,)))
    assert reason.startswith("its input is made by bilinear at ")


RANDOM = {
    "noise": lambda z: z + torch.randn_like(z),
    "rand_like": lambda z: torch.where(torch.rand_like(z) < 0.1, 0.0, z),
    "Gumbel noise": lambda z: z - torch.empty_like(z).exponential_().log(),
    "gumbel_softmax": lambda z: F.gumbel_softmax(z).log(),
    "normal_": lambda z: z + torch.zeros_like(z).normal_(),
    "bernoulli": lambda z: z * torch.bernoulli(torch.full_like(z, 0.9)),
    "alpha_dropout": lambda z: F.alpha_dropout(z, training=True),
    "rrelu": lambda z: F.rrelu(z, training=True),
    "dropout": lambda z: F.dropout(z),
}


@pytest.mark.parametrize("change", RANDOM.values(), ids=RANDOM)
def test_what_is_random_is_called_so(change):
    def fn(input, weight, target):
        return F.cross_entropy(change(F.linear(input, weight)), target)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason.endswith(f": {reasons.RANDOM.sentence}"), report.reason
    assert report.advice == reasons.RANDOM.advice


def sampled(input, weight, target):
    logits = F.linear(input, weight)
    return F.cross_entropy(logits, torch.multinomial(logits.softmax(-1), 1)[:, 0])


def test_sampling_is_random():
    (report,) = reports_of(sampled, INPUT, WEIGHT, TARGET)
    where = place(sampled, "multi")
    assert report.reason.endswith(f"used by multinomial at {where}: {reasons.RANDOM.sentence}")


def test_a_random_function_that_draws_nothing():
    def fn(input, weight, target):
        logits = F.alpha_dropout(F.dropout(F.linear(input, weight), 0.0), training=False)
        return F.cross_entropy(logits, target)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.rewritten


def gradient_of_a_transform(input, weight, target):
    return torch.func.grad(lambda x: F.cross_entropy(F.linear(x, weight), target))(input)


def in_inference_mode(input, weight, target):
    with torch.inference_mode():
        return F.cross_entropy(F.linear(input, weight), target)


def derivative_in_the_graph(input, weight, target):
    loss = F.cross_entropy(F.linear(input.exp(), weight), target)
    return torch.autograd.grad(loss, input)


def backward_in_the_graph(input, weight, target):
    loss = F.cross_entropy(F.linear(input, weight), target)
    loss.backward()
    return loss.detach()


INSIDE = {
    gradient_of_a_transform: (
        f"linear at {{linear}} cannot be followed: {reasons.INSIDE_TRANSFORM.sentence}",
        reasons.INSIDE_TRANSFORM.advice,
    ),
    in_inference_mode: (
        f"linear at {{linear}} cannot be followed: {reasons.INSIDE_INFERENCE_MODE.sentence}",
        reasons.INSIDE_INFERENCE_MODE.advice,
    ),
    derivative_in_the_graph: (
        "linear at {linear} cannot be followed: the graph takes derivatives itself at {grad}",
        "let the compiled function return the loss, and take its derivatives outside of it",
    ),
    backward_in_the_graph: (
        "linear at {linear} cannot be followed: the graph takes derivatives itself at {backward}",
        "let the compiled function return the loss, and take its derivatives outside of it",
    ),
}


@pytest.mark.parametrize("fn", INSIDE)
def test_each_place_in_which_nothing_is_rewritten_is_named(fn):
    setting = "trace_autograd_ops"
    patch = {setting: True} if hasattr(torch._dynamo.config, setting) else {}
    with torch._dynamo.config.patch(patch):
        reports = reports_of(fn, INPUT, WEIGHT, TARGET)
    if not patch and "the_graph" in fn.__name__:
        assert reports[0].rewritten  # in this version of torch the graph ends before
        return
    reason, advice = INSIDE[fn]
    (report,) = reports
    words = {w: place(fn, t) for w, t in PLACES.items() if t in inspect.getsource(fn)}
    assert report.reason == reason.format(**words)
    assert report.advice == advice


PLACES = {"linear": "F.linear", "grad": "autograd.grad", "backward": ".backward()"}


def entry_of_each_row(z, y):
    z[torch.arange(6), y] = 0.5


def first_entry(z, y):
    z[0, 0] = 0.5


def some_rows(z, y):
    z[:3] = 0.5


@pytest.mark.parametrize(
    ("assign", "which"),
    [
        (first_entry, reasons.ASSIGNS_BY_ROW_AND_CLASS),
        (some_rows, reasons.ASSIGNS_SOME_ROWS),
    ],
)
def test_which_entries_an_assignment_chooses(assign, which):
    def fn(input, weight, target):
        logits = F.linear(input, weight).clone()
        assign(logits, target)
        return F.cross_entropy(logits, target)

    reason = reason_against(fn, INPUT, WEIGHT, TARGET)
    assert reason.endswith(f": {which.sentence}")


def test_one_entry_of_every_row_is_not_some_of_the_rows():
    def fn(input, weight, target):
        logits = F.linear(input, weight).clone()
        entry_of_each_row(logits, target)
        return F.cross_entropy(logits, target)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET.clamp(min=0))
    assert report.rewritten or report.reason.endswith(reasons.ASSIGNS_BY_ROW_AND_CLASS.sentence)


def mask_by_scatter(z, y):
    return torch.zeros_like(z, dtype=torch.bool).scatter_(1, y[:, None], True)


def mask_by_scatter_of_a_number(z, y):
    return torch.zeros_like(z, dtype=torch.bool).scatter(1, y[:, None], 1)


def mask_by_assignment(z, y):
    mask = torch.zeros_like(z, dtype=torch.bool)
    mask[:, 3] = 1
    return mask


def mask_of_nothing(z, y):
    return torch.zeros_like(z, dtype=torch.bool)


def mask_of_everything(z, y):
    return torch.ones_like(z, dtype=torch.bool)


@pytest.mark.parametrize(
    "make",
    [
        mask_by_scatter,
        mask_by_scatter_of_a_number,
        mask_by_assignment,
        mask_of_nothing,
        mask_of_everything,
    ],
)
def test_a_mask_that_is_made_like_the_logits(make):
    """It is a mask, in what is computed and in what is said of it."""

    def fn(input, weight, target):
        logits = F.linear(input, weight)
        return F.cross_entropy(torch.where(make(logits, target), logits - 0.3, logits), target)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET.clamp(min=0))
    assert report.rewritten or report.reason.endswith(
        ": it changes a mask of the logits, or integers made of them"
    )
    if report.rewritten:
        assert_matches_eager(fn, INPUT, WEIGHT, TARGET.clamp(min=0))


def test_a_table_of_logits_is_no_graph_break():
    """The logits of a bigram model are its parameter."""
    table = torch.nn.Parameter(torch.randn(50, 50))

    def fn(tokens, target):
        return F.cross_entropy(table[tokens], target)

    (report,) = reports_of(fn, TARGET.clamp(min=0), TARGET)
    assert re.fullmatch(
        r"its input is taken from the parameter '\w*table\w*', and is not a projection",
        report.reason,
    )
    assert report.advice is None


def test_an_index_is_not_said_to_be_broadcast():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        seen = torch.zeros_like(logits).index_fill(1, target.clamp(min=0), 1).bool()
        return F.cross_entropy(torch.where(seen, logits / 1.2, logits), target)

    reason = reason_against(fn, INPUT, WEIGHT, TARGET)
    assert reason.endswith(f": {reasons.OPERAND_NOT_BROADCAST.sentence}")


def test_a_reason_is_a_value():
    cause = Reason("it is late", "come sooner", place="b.py:2")
    reason = Reason("the train{at} was missed", place="a.py:1", cause=cause)
    assert str(reason) == "the train at a.py:1 was missed: it is late"
    assert reason.cause is cause
    assert reason == Reason("the train{at} was missed", place="a.py:1", cause=cause)
    assert reason != Reason("the train{at} was missed", place="a.py:2", cause=cause)
    assert str(Reason("the train{at} was missed")) == "the train was missed"


def test_advice_is_that_of_the_reason_or_of_its_cause():
    options = Options()
    cause = Reason("it is late", "come sooner")
    assert Reason("the train was missed", cause=cause).advice_for(options, 0) == "come sooner"
    own = Reason("the train was missed", "take a bus", cause=cause)
    assert own.advice_for(options, 0) == "take a bus"
    assert Reason("the train was missed").advice_for(options, 0) is None


def test_every_reason_is_used():
    sources = [
        file.read_text()
        for folder in ("cce_inductor", "patterns")
        for file in (ROOT / folder).rglob("*.py")
    ]
    defined = {
        name
        for name, value in vars(reasons).items()
        if name[0] != "_" and getattr(value, "__module__", "") == reasons.__name__
    }
    used = {name for source in sources for name in re.findall(r"\breasons\.(\w+)", source)}
    assert defined - used <= {"Reason", "LogitsFromOutside"}


class TestSentences(expecttest.TestCase):
    """The one test of the words: other tests compare with the constants."""

    def test_of_constants(self):
        constants = {k: v for k, v in vars(reasons).items() if isinstance(v, Reason)}
        self.assertExpectedInline(
            listed(constants),
            """\
INSIDE_TRANSFORM: it is inside a torch.func transform
    advice: compile the loss outside of the transform
INSIDE_INFERENCE_MODE: it is inside inference mode
    advice: use torch.no_grad() instead of inference mode
FROM_CALLING_GRAPH: its logits come into a function that the graph calls (an autograd.Function, for example), and are not followed into it
FROM_NO_TENSOR: its input is not computed from any tensor
NO_PYTHON_IN_CPP_WRAPPER: the operator is written in Python, and Inductor's C++ wrapper cannot call it
    advice: compile with Inductor's option cpp_wrapper=False
RETURNED: the logits are returned by the compiled function, so they must be stored
    advice: return only the loss from the compiled function, as a training step needs no logits
RETURNED_WITHOUT_DEFERRAL: the logits are returned by the compiled function, so they must be stored, as defer_logits is "never"
    advice: pass defer_logits="auto": the logits are then computed only if they are used
SEVERAL_LOGITS_RETURNED: the function returns a tuple or a stack of logits
COMBINED_WITH_LARGE: they were combined with a tensor that is as large as the logits
COMBINED_WITH_REDUCTION: they were combined with a value that is computed from them
STRIDES_UNKNOWN: their strides are not known before the function runs
FSDP_FREES_WEIGHT: FSDP frees the weight after the forward of its module (reshard_after_forward)
MEMORY_SHARED: another result or argument shares their memory
FUNCTION_IS_SAVED: the compiled function is saved, and loaded without what computes the logits
CACHE_MAY_ANSWER: pre_grad_pass_timing lets a cache answer in the place of the pass
WITHOUT_RULE: it has no rule
LOSS_WITHOUT_RULE: there is no rule for this loss
NOT_FOLLOWED: the graph that it calls is not followed
RANDOM: it is random
    advice: draw the random numbers before the projection, or evaluate with dropout off
NUMBER_MAY_DIFFER: it takes a number that may differ in the next call
VOCABULARY_MAY_DIFFER: its vocabulary may have another size in the next call
NUMBER_EXPECTED: it has an operand that is a tensor, not a number
DIMENSION_NOT_CONSTANT: its dimension is not a constant
LOGITS_NOT_FIRST: the logits are not its first operand
NOT_THE_LOSS_INPUT: it is not the input of the loss
TENSOR_INSTEAD_OF_DIMENSION: it compares logits with another tensor
OPERAND_NOT_BROADCAST: it has an operand that does not broadcast to the logits
BROADCAST_TO_MORE_DIMENSIONS: it broadcasts the logits to more dimensions
BROADCAST_TO_LARGER_SHAPE: it broadcasts the logits to a larger shape
OPERAND_SIZE_UNKNOWN: it has an operand whose size is not known
OPERAND_LARGE_WITH_GRADIENT: it combines the logits with a tensor that is as large as they are and requires a gradient
    advice: detach that tensor, if the loss need not train what computes it
OTHER_ROWS_OF_SAME_LOGITS: it combines logits with other rows of the same logits
TUPLE_OF_LOGITS: it combines logits with a tuple of logits
VIEW_WITH_OTHER_LOGITS: it combines a view of the logits with other logits
NOTHING_MAKES_IT: no operation makes it
MADE_OF_LARGE: it is made of a tensor that is as large
CONSTANT: it is a constant
CLASSES_ARE_NOT_VOCABULARY: its classes are not the vocabulary
WEIGHT_SIZE_DEPENDS_ON_DATA: its weight has a size that depends on data
MOVES_ELEMENTS: it moves the elements of the logits
MOVES_TO_ANOTHER_DEVICE: it moves the logits to another device
REINTERPRETS_BITS: it reinterprets the bits of the logits as another dtype
RESULT_MAY_SHARE_MEMORY: its result may share memory with its argument
READS_VOCABULARY_SIZE: it reads the size of the vocabulary
DYNAMIC_SHAPE_OF_TENSOR: it takes a dynamic shape from another tensor
RESHAPES_VOCABULARY_NOT_LAST: it reshapes logits whose last dimension is not the vocabulary
VOCABULARY_NOT_KEPT_LAST: it does not keep the vocabulary as the last dimension
FLATTENS_VOCABULARY: it flattens the vocabulary into the rows
SPLITS_VOCABULARY: it splits the vocabulary
SQUEEZES_VOCABULARY: it squeezes the vocabulary
SQUEEZES_UNKNOWN_SIZE: it squeezes a dimension whose size is not known
MOVES_SEVERAL_DIMENSIONS: it moves several dimensions
REPEATS_ROWS: it repeats the logits
SELECTS_ONE_ENTRY: it selects one entry of the vocabulary
SELECTS_SOME_ENTRIES: it selects some entries of the vocabulary
SELECTS_ENTRIES_OF_SOFTMAX: it selects some entries of a softmax over the vocabulary
SELECTS_ENTRIES_AFTER_MASK: it selects some entries of the vocabulary after a mask or bias
SELECTS_ROWS_BY_LIST: it selects rows with a Python list
SELECTS_SEVERAL_PARTS: it takes several parts of a split
SPLITS_DYNAMIC_ROWS: it splits a number of rows that may differ in the next call
INDEX_IS_BROADCAST: its index is broadcast
INDEX_WITHOUT_ROWS: its index does not have one row for each row of the logits
INDEX_MAY_DIFFER_IN_VOCABULARY: it gathers rows by an index that may vary along the vocabulary
TAKES_FROM_ALL: it takes entries from the flattened logits
NOT_THE_DIAGONAL_OF_A_MATRIX: it is not the main diagonal of a matrix
DIAGONAL_WITHOUT_SOME_ROWS: it may have no entry in some of the rows
REDUCES_ROWS: it reduces over the rows, not over the vocabulary
REDUCES_ROWS_AND_VOCABULARY: it reduces over rows and vocabulary
TAKES_THE_SMALLEST: it takes the smallest entries
NOT_A_PRODUCT_OF_SAME_SHAPE: it is not a product of the logits with a tensor of their shape
NOT_A_SUM_OVER_VOCABULARY: it does not sum over the vocabulary alone
CLASS_DIMENSION_NOT_VOCABULARY: its class dimension is not the vocabulary
BATCH_DIMENSION_IS_VOCABULARY: its batch dimension is the vocabulary
CLASS_WEIGHTS_WITH_GRADIENT: its class weights require a gradient
    advice: pass weight.detach()
TARGETS_ARE_LOGITS: its targets are logits
TARGETS_ON_ANOTHER_DEVICE: its targets are on another device
    advice: move the targets to the logits' device before the loss
JOINS_SEVERAL_FORMS: it joins logits whose vocabulary dimensions or dtypes differ
JOINS_WITH_SOMETHING_ELSE: it joins logits with a tensor that holds no logits
JOINS_SEVERAL_WEIGHTS: it joins rows of logits with different weights or functions
JOINS_SEVERAL_INPUTS: it joins vocabularies of logits with different inputs or functions, or with a bias
JOINS_AFTER_FUNCTION_OF_PLACE: it joins logits after a function of their position in the vocabulary
JOINS_AFTER_DYNAMIC_VOCABULARY: it joins a column after a vocabulary that may have another size in the next call
JOINS_WITH_NO_COLUMN: it joins logits with a tensor that is not a column
JOINS_WITH_INTEGERS: it joins logits with a column that is not floating point
STACKS_SEVERAL_SHAPES: it stacks logits of different shapes
STACK_WITH_TENSOR: it combines the logits of several projections with a tensor
MIXES_PROJECTIONS: it mixes the logits of several projections
ADDS_DIMENSIONS_TO_STACK: it adds dimensions to the logits of several projections
TAKES_SEVERAL_PROJECTIONS: it takes several projections of a stack
CHANGES_SEVERAL_LOGITS: it changes several tensors of logits in place
CHANGES_ANOTHER_TENSOR: it changes another tensor in place
REDUCES_AND_CHANGES: it both reduces the logits and changes them in place
HIDDEN_FROM_GRADIENT: it changes the logits in place while gradients are disabled
ALSO_READ_AS_VIEW: it changes logits in place that are also read through a view
CHANGES_PART: it changes a part of the logits in place
CHANGES_UNKNOWN_ENTRIES: it changes a view of the logits whose entries are not known
ASSIGNS_SOME_ROWS: it assigns to some of the rows
ASSIGNS_EVERY_OTHER_ENTRY: it assigns to a range with a step
ASSIGNS_BY_UNKNOWN_INDEX: it assigns with an index of an unknown form
ASSIGNS_BY_ROW_AND_CLASS: it assigns to entries that are indexed by row and by class
ASSIGNS_VOCABULARY_NOT_LAST: it assigns to logits whose last dimension is not the vocabulary
ASSIGNS_TENSOR: it assigns a tensor that is not a scalar
FILLS_DIAGONAL_OF_NO_MATRIX: it fills the diagonal of a tensor that is not a matrix
SCATTER_REDUCES: it scatters with a reduction
SCATTERS_OVER_ROWS: it scatters along the rows, not along the vocabulary
SCATTERS_SEVERAL_ENTRIES: it scatters to several entries of a row
SCATTERS_NO_VALUE_PER_ROW: it scatters a tensor that does not have one value for each row
""",
        )

    def test_of_functions(self):
        graph = torch.fx.Graph()
        argument = graph.placeholder("logits")
        node = graph.call_method("view", (argument, -1))
        node.meta["stack_trace"] = '  File "train.py", line 10, in step\n'
        cause = Reason("CAUSE")
        float16 = torch.empty(2, dtype=torch.float16)
        made = [
            reasons.used_by(node, cause),
            reasons.used_with_other_logits(node),
            reasons.changed_through_view(node),
            reasons.loss_unsupported(node, cause),
            reasons.may_change_operand(node),
            reasons.projection_unsupported(node, cause),
            reasons.projection_not_followed(node, cause),
            reasons.takes_derivatives(node),
            reasons.from_outside(argument),
            reasons.from_parameter(argument),
            reasons.made_by(node),
            reasons.taken_for_router(64, 4096),
            reasons.no_kernel("meta"),
            reasons.too_small(2**10, 2**24),
            reasons.derivative_not_pointwise("aten.sort.default"),
            reasons.pass_failed(KeyError("name")),
            reasons.not_deferred(cause),
            reasons.not_floating(torch.bool),
            reasons.not_pointwise(""),
            reasons.not_pointwise("aten.sort.default"),
            reasons.unknown_call(TypeError("missing a required argument: 'dim'")),
            reasons.not_a_tensor(3),
            reasons.wrapped_operand(float16),
            reasons.casts_to(torch.int64),
            reasons.moves_between(torch.device("cpu"), torch.device("meta")),
            reasons.reads_attribute("H"),
            reasons.topk_out_of_range(16),
        ]
        self.assertExpectedInline(
            listed(dict(enumerate(made))),
            """\
the logits are used by view at train.py:10: CAUSE
the logits are used by view at train.py:10 with other logits
view at train.py:10 changes logits in place through a view of them
view cannot be rewritten: CAUSE
view at train.py:10 may change what the projection read
    advice: change that tensor before the projection, after the backward, or in a copy of it
view at train.py:10 is not a known projection: CAUSE
view at train.py:10 cannot be followed: CAUSE
the graph takes derivatives itself at train.py:10
    advice: let the compiled function return the loss, and take its derivatives outside of it
its logits come into this graph from outside, as 'logits', so their projection is not in it
    advice: compute the logits and the loss in one compiled function, without a graph break between them; if the head is not compiled, cce_inductor.defer(head) defers its logits; if it is compiled and the logits require no gradient, defer_logits="always" defers them
its input is taken from the parameter 'logits', and is not a projection
its input is made by view at train.py:10, which is not a known projection
a hand-written softmax over 64 classes, which are no more than the 4096 hidden units, is taken for that of a router, not for a loss
    advice: call the loss by its name: F.cross_entropy(...) or F.nll_loss(F.log_softmax(...))
there is no kernel for the device 'meta'
the logits are small (1 KiB, and min_logits_bytes is 16 MiB)
    advice: pass min_logits_bytes=0 to rewrite small losses as well
the function of the logits has a derivative that is not pointwise (aten.sort.default)
the pass failed with KeyError: 'name'
the logits are returned by the compiled function, so they must be stored, and cannot be deferred: CAUSE
    advice: return only the loss from the compiled function, as a training step needs no logits
they are torch.bool
it is not a pointwise function
it is not a pointwise function (aten.sort.default)
its arguments do not match a known signature (missing a required argument: 'dim')
3 is not a tensor
its operand is a Tensor
it casts the logits to torch.int64
it moves the logits from cpu to meta
it reads the attribute H of the logits
it takes no entry, or more than 16
""",
        )


def listed(chosen):
    """Each reason with its advice."""
    lines = []
    for name, reason in chosen.items():
        lines.append(f"{name}: {reason}" if isinstance(name, str) else str(reason))
        advice = reason.advice_for(Options(), 2**30)
        lines += [] if advice is None else [f"    advice: {advice}"]
    return "\n".join(lines) + "\n"
