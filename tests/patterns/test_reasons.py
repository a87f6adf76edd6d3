"""What is said about a loss that is left alone, and where it says that it stands."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from checks import capture, reason_against, reports_of

import cce_inductor
from cce_inductor.options import Options
from cce_inductor.rewriting.rewrite import rewrite
from cce_inductor.testing import assert_matches_eager

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
        f"the logits are used by argsort at {place(fn, 'argsort')}: "
        "it is not a pointwise function (aten.sort.default)"
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
        f"the logits are used by getitem at {place(fn, '::2')}: "
        "it selects some entries of the vocabulary"
    )


def test_first_of_two_uses_is_named():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        first = logits.prod(-1)
        second = logits.amin(-1)
        return F.cross_entropy(logits, target), first, second

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        f"the logits are used by prod at {place(fn, 'prod')}: "
        "it is not a pointwise function (aten.prod.dim_int)"
    )


def test_a_loss_of_logits_joined_with_their_own_entries_does_not_vanish():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        index = target.clamp(min=0)[:, None]
        others = logits.scatter(1, index, -1e9)
        return F.cross_entropy(torch.cat([logits.gather(1, index), others], 1), target * 0)

    assert "the logits are used by cat" in reason_against(fn, INPUT, WEIGHT, TARGET)


def test_use_after_the_loss_is_named():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        loss = F.cross_entropy(logits, target)
        return loss, logits.amin(-1)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        f"the logits are used by amin at {place(fn, 'amin')}: "
        "it is not a pointwise function (aten.amin.default)"
    )


def test_operation_between_is_named_and_not_what_follows_it():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        logits = logits.cumsum(-1)
        logits = logits.exp().view(-1, 50)
        return F.cross_entropy(logits, target)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        f"the logits are used by cumsum at {place(fn, 'cumsum')}: "
        "it is not a pointwise function (aten.cumsum.default)"
    )


def test_operation_of_a_module_is_located_in_the_user_code():
    activation = torch.nn.Dropout()

    def fn(input, weight, target):
        logits = activation(F.linear(input, weight))
        return torch.nn.CrossEntropyLoss()(logits, target)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        f"the logits are used by dropout at {place(fn, 'activation(')}: it is random"
    )
    assert report.location == place(fn, "CrossEntropyLoss")


def test_returned_logits():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        loss = F.cross_entropy(logits.view(-1, 50), target)
        return loss, logits

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET)
    assert report.reason == (
        "the logits are returned by the compiled function, so they must be stored"
    )
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
    assert "no projection" in report.reason


def test_class_probabilities_with_a_gradient():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        return F.cross_entropy(logits, target)

    (report,) = reports_of(fn, INPUT, WEIGHT, torch.rand(6, 50, requires_grad=True))
    assert report.reason == (
        "cross_entropy cannot be rewritten: "
        "what it combines them with is as large as the logits and requires a gradient"
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
        "  because the logits are returned by the compiled function, so they must be stored\n"
        "  to change that: return only the loss from the compiled function, as a training step "
        "needs no logits"
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
    assert report.reason.endswith(": it is random"), report.reason
    assert report.advice.startswith("draw the random numbers before the projection")


def sampled(input, weight, target):
    logits = F.linear(input, weight)
    return F.cross_entropy(logits, torch.multinomial(logits.softmax(-1), 1)[:, 0])


def test_sampling_is_random():
    (report,) = reports_of(sampled, INPUT, WEIGHT, TARGET)
    assert report.reason.endswith(f"used by multinomial at {place(sampled, 'multi')}: it is random")


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
        "linear at {linear} cannot be followed: it is inside a torch.func transform",
        "compile the loss outside of the transform",
    ),
    in_inference_mode: (
        "linear at {linear} cannot be followed: it is inside inference mode",
        "use torch.no_grad() in the place of inference mode",
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
        (first_entry, "entries that an index names by row and by class"),
        (some_rows, "some of the rows"),
    ],
)
def test_which_entries_an_assignment_chooses(assign, which):
    def fn(input, weight, target):
        logits = F.linear(input, weight).clone()
        assign(logits, target)
        return F.cross_entropy(logits, target)

    reason = reason_against(fn, INPUT, WEIGHT, TARGET)
    assert reason.endswith(f": it assigns to {which}")


def test_one_entry_of_every_row_is_not_some_of_the_rows():
    def fn(input, weight, target):
        logits = F.linear(input, weight).clone()
        entry_of_each_row(logits, target)
        return F.cross_entropy(logits, target)

    (report,) = reports_of(fn, INPUT, WEIGHT, TARGET.clamp(min=0))
    assert report.rewritten or report.reason.endswith(
        "it assigns to entries that an index names by row and by class"
    )


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
        r"its input is taken from the parameter '\w*table\w*', and is no projection", report.reason
    )
    assert report.advice is None


def test_an_index_is_not_said_to_be_broadcast():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        seen = torch.zeros_like(logits).index_fill(1, target.clamp(min=0), 1).bool()
        return F.cross_entropy(torch.where(seen, logits / 1.2, logits), target)

    reason = reason_against(fn, INPUT, WEIGHT, TARGET)
    assert reason.endswith(": it has an operand that does not broadcast to the logits")
