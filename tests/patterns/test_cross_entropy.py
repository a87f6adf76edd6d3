"""`F.cross_entropy` and `nn.CrossEntropyLoss`, with every argument they have."""

import pytest
import torch
import torch.nn.functional as F
from checks import (
    assert_as_accurate_as_eager,
    reason_against,
    reports_of,
    rewritten_graph,
    value_and_gradients,
)
from expecttest import assert_expected_inline

from cce_inductor.reporting import reasons

torch.manual_seed(0)
INPUT = torch.randn(6, 8, requires_grad=True)
WEIGHT = torch.randn(50, 8, requires_grad=True)
TARGET = torch.tensor([3, 0, 49, -100, 7, 7])
CLASS_WEIGHT = torch.rand(50) + 0.5


def test_graph():
    def fn(input, weight, target):
        return F.cross_entropy(input @ weight.T, target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_with_every_argument():
    def fn(input, weight, target, class_weight):
        return F.cross_entropy(
            F.linear(input, weight),
            target,
            weight=class_weight,
            ignore_index=7,
            reduction="sum",
            label_smoothing=0.1,
        )

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET.abs() % 50, CLASS_WEIGHT),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_, l_class_weight_], 't0 = mul.Tensor(z, c1); logsumexp(z); target(z, r0, 7); sum(t0)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
getitem_2 = reduce[2]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, getitem_2, l_target_, l_class_weight_, 50, 'sum', 7, 0.1, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_graph_with_class_dimension_1():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).transpose(1, 2), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT.view(2, 3, 8), WEIGHT, TARGET.view(2, 3)),
        """\
permute = torch.permute(l_input_, (0, 2, 1))
movedim = torch.movedim(permute, 1, -1)
reduce = torch.ops.cce_inductor.reduce.default(movedim, l_weight_, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_arguments(reduction, label_smoothing, ignore_index, weighted):
    def fn(input, weight, target, class_weight):
        return F.cross_entropy(
            F.linear(input, weight),
            target,
            weight=class_weight if weighted else None,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    target = TARGET if ignore_index == -100 else TARGET.where(TARGET >= 0, 1)
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, target, CLASS_WEIGHT)


SPELLINGS = {
    "all positional": lambda x, t, w: F.cross_entropy(x, t, w, None, 7, None, "sum", 0.1),
    "all keywords": lambda x, t, w: F.cross_entropy(
        label_smoothing=0.1, reduction="sum", ignore_index=7, weight=w, target=t, input=x
    ),
    "an integer label_smoothing": lambda x, t, w: F.cross_entropy(x, t, label_smoothing=0),
    "nothing but label_smoothing": lambda x, t, w: F.cross_entropy(x, t, w, label_smoothing=1.0),
    "size_average": lambda x, t, w: F.cross_entropy(x, t, size_average=True),
    "no size_average": lambda x, t, w: F.cross_entropy(x, t, size_average=False),
    "no reduce": lambda x, t, w: F.cross_entropy(x, t, reduce=False),
    "no size_average, no reduce": lambda x, t, w: F.cross_entropy(x, t, None, False, -100, False),
    "reduce against reduction": lambda x, t, w: F.cross_entropy(x, t, reduce=True, reduction="sum"),
    "module": lambda x, t, w: torch.nn.CrossEntropyLoss()(x, t),
    "module with arguments": lambda x, t, w: torch.nn.CrossEntropyLoss(
        w, ignore_index=7, reduction="none", label_smoothing=0.1
    )(x, t),
    "module with size_average": lambda x, t, w: torch.nn.CrossEntropyLoss(size_average=False)(x, t),
    "targets reshaped": lambda x, t, w: F.cross_entropy(x, t.view(2, 3).reshape(-1)),
    "targets masked": lambda x, t, w: F.cross_entropy(x, t.masked_fill(t == 7, -100)),
    "targets cast": lambda x, t, w: F.cross_entropy(x, t.int().long()),
    "the loss cast": lambda x, t, w: F.cross_entropy(x, t).bfloat16(),
    "the loss scaled": lambda x, t, w: 0.5 * F.cross_entropy(x, t, reduction="sum") / 6,
    "the loss masked": lambda x, t, w: F.cross_entropy(x, t, reduction="none") * (t != 7),
    "the loss reshaped": lambda x, t, w: F.cross_entropy(x, t, reduction="none").view(2, 3),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_spelling(spelling):
    def fn(input, weight, target, class_weight):
        return spelling(F.linear(input, weight), target, class_weight)

    target = TARGET.where(TARGET >= 0, 7)
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, target, CLASS_WEIGHT)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_row_without_batch(reduction, label_smoothing):
    def fn(input, weight, target, class_weight):
        return F.cross_entropy(
            F.linear(input, weight),
            target,
            class_weight,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    input = torch.randn(8, requires_grad=True)
    assert_as_accurate_as_eager(fn, input, WEIGHT, torch.tensor(3), CLASS_WEIGHT)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_class_dimension_1(reduction, label_smoothing):
    def fn(input, weight, target, class_weight):
        logits = F.linear(input, weight).transpose(1, 2)
        return F.cross_entropy(
            logits, target, class_weight, reduction=reduction, label_smoothing=label_smoothing
        )

    input = torch.randn(2, 3, 8, requires_grad=True)
    assert_as_accurate_as_eager(fn, input, WEIGHT, TARGET.view(2, 3), CLASS_WEIGHT)


def test_class_dimension_1_of_images():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).permute(0, 3, 1, 2), target)

    input = torch.randn(2, 3, 4, 8, requires_grad=True)
    assert_as_accurate_as_eager(fn, input, WEIGHT, torch.randint(50, (2, 3, 4)))


def test_ignore_index_that_is_symbolic():
    head = torch.nn.Linear(8, 50)

    def fn(input, target, ignore_index):
        return F.cross_entropy(head(input), target, ignore_index=ignore_index)

    compiled = torch.compile(
        fn, backend="cce_inductor_eager", dynamic=True, options={"min_logits_bytes": 0}
    )
    target = TARGET.abs() % 50
    (report,) = reports_of(fn, INPUT, target, 7, dynamic=True)
    assert report.rewritten
    for ignore_index in (7, 3, -100):
        torch.testing.assert_close(
            value_and_gradients(compiled, INPUT, target, ignore_index),
            value_and_gradients(fn, INPUT, target, ignore_index),
        )


def test_label_smoothing_that_changes():
    head = torch.nn.Linear(8, 50)

    def fn(input, target, label_smoothing):
        return F.cross_entropy(head(input), target, label_smoothing=label_smoothing)

    compiled = torch.compile(
        fn, backend="cce_inductor_eager", dynamic=True, options={"min_logits_bytes": 0}
    )
    (report,) = reports_of(fn, INPUT, TARGET, 0.1, dynamic=True)
    assert report.rewritten
    for label_smoothing in (0.1, 0.3, 0.0):
        torch.testing.assert_close(
            value_and_gradients(compiled, INPUT, TARGET, label_smoothing),
            value_and_gradients(fn, INPUT, TARGET, label_smoothing),
        )


def test_result_is_bfloat16_for_bfloat16_logits():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight), target)

    input, weight = (t.detach().bfloat16().requires_grad_() for t in (INPUT, WEIGHT))
    assert_as_accurate_as_eager(fn, input, weight, TARGET)


PROBABILITIES = torch.randn(6, 50).softmax(1)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_class_probabilities(reduction, label_smoothing, weighted):
    def fn(input, weight, target, class_weight):
        return F.cross_entropy(
            F.linear(input, weight),
            target,
            class_weight if weighted else None,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, PROBABILITIES, CLASS_WEIGHT)


def test_graph_of_class_probabilities():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight), target, label_smoothing=0.1)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, PROBABILITIES),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 't0 = mul.Tensor(b0, 0.9); t1 = add.Tensor(t0, 0.002); sum(t1); dot(t1, z); logsumexp(z)')
getitem = reduce[1]
getitem_1 = reduce[0]
getitem_2 = reduce[2]
mul = getitem_1 * getitem_2
sub = torch.ops.aten.sub.Tensor(getitem, mul)
neg = torch.neg(sub)
mean = torch.mean(neg)
to = mean.to(torch.float32)
return (to,)
""",
    )


def test_class_probabilities_with_class_dimension_1():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).mT, target.view(2, 3, 50).mT)

    assert_as_accurate_as_eager(fn, INPUT.view(2, 3, 8), WEIGHT, PROBABILITIES)


@pytest.mark.parametrize("weighted", [False, True])
def test_class_probabilities_of_a_transposed_matrix(weighted):
    """Whose rows have the classes, as the logits of contrastive learning are read once."""
    class_weight = torch.rand(6) + 0.5 if weighted else None
    target = torch.rand(50, 6).softmax(1)

    def fn(input, weight):
        return F.cross_entropy(
            (input @ weight.T).T, target, weight=class_weight, label_smoothing=0.1
        )

    assert all(report.rewritten for report in reports_of(fn, INPUT, WEIGHT))
    assert_as_accurate_as_eager(fn, INPUT, WEIGHT)


def test_class_probabilities_of_one_row():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input[0], weight), target[0])

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, PROBABILITIES)


MADE_OF_LOGITS = {
    "the logits": lambda x: x,
    "their softmax": lambda x: (x / 2).softmax(-1),
    "their softmax, detached": lambda x: x.softmax(-1).detach(),
}


@pytest.mark.parametrize("made", MADE_OF_LOGITS.values(), ids=MADE_OF_LOGITS)
def test_probabilities_made_of_the_logits(made):
    def fn(input, weight):
        logits = F.linear(input, weight)
        return F.cross_entropy(logits, made(logits))

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, slack=3)


def test_probabilities_of_a_teacher():
    def fn(input, weight, other):
        with torch.no_grad():
            target = F.linear(input, other).softmax(-1)
        return F.cross_entropy(F.linear(input, weight), target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, torch.randn(50, 8))


def test_probabilities_with_a_gradient_are_left_alone():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight), target)

    target = PROBABILITIES.clone().requires_grad_()
    assert reason_against(fn, INPUT, WEIGHT, target) == (
        "cross_entropy cannot be rewritten: " + reasons.OPERAND_LARGE_WITH_GRADIENT.sentence
    )


def test_logits_as_targets_of_another_loss_are_left_alone():
    def fn(input, weight, student):
        return F.cross_entropy(student, F.linear(input, weight))

    reason = reason_against(fn, INPUT, WEIGHT, torch.randn(6, 50))
    assert reason.startswith("its logits come into this graph from outside")


def test_class_weights_with_a_gradient_are_left_alone():
    def fn(input, weight, target, class_weight):
        return F.cross_entropy(F.linear(input, weight), target, class_weight)

    class_weight = CLASS_WEIGHT.clone().requires_grad_()
    with torch.no_grad():  # anywhere else cross_entropy refuses them
        assert reason_against(fn, INPUT, WEIGHT, TARGET, class_weight) == (
            f"cross_entropy cannot be rewritten: {reasons.CLASS_WEIGHTS_WITH_GRADIENT.sentence}"
        )


def test_another_class_dimension_is_left_alone():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight), target)

    target = torch.randint(50, (50, 50))
    assert reason_against(fn, torch.randn(50, 50, 8), WEIGHT, target) == (
        f"cross_entropy cannot be rewritten: {reasons.CLASS_DIMENSION_NOT_VOCABULARY.sentence}"
    )


def test_softmax_over_the_tokens():
    def fn(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).transpose(0, 1), target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, torch.randint(6, (50,)))


def test_softmax_over_the_tokens_of_a_head_with_bias_is_left_alone():
    def fn(input, weight, bias, target):
        return F.cross_entropy(F.linear(input, weight, bias).transpose(0, 1), target)

    bias = torch.zeros(50)
    assert reason_against(fn, INPUT, WEIGHT, bias, torch.randint(6, (50,))) == (
        f"cross_entropy cannot be rewritten: {reasons.CLASS_DIMENSION_NOT_VOCABULARY.sentence}"
    )


SOFTMAX_BETWEEN = {
    "nll_loss": lambda x, t: F.nll_loss(F.softmax(x, 1), t),
    "cross_entropy": lambda x, t: F.cross_entropy(F.softmax(x, 1), t),
}


@pytest.mark.parametrize("loss", SOFTMAX_BETWEEN.values(), ids=SOFTMAX_BETWEEN)
def test_softmax_between(loss):
    def fn(input, weight, target):
        return loss(F.linear(input, weight), target)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET, slack=5)


NLL = {
    "mean": lambda x, t, w: F.nll_loss(x.log_softmax(1), t),
    "sum": lambda x, t, w: F.nll_loss(x.log_softmax(1), t, reduction="sum"),
    "none": lambda x, t, w: F.nll_loss(x.log_softmax(1), t, reduction="none"),
    "weights": lambda x, t, w: F.nll_loss(x.log_softmax(1), t, w),
    "ignore_index": lambda x, t, w: F.nll_loss(x.log_softmax(1), t, ignore_index=7),
    "size_average": lambda x, t, w: F.nll_loss(x.log_softmax(1), t, size_average=False),
    "module": lambda x, t, w: torch.nn.NLLLoss(w)(torch.nn.LogSoftmax(-1)(x), t),
    "of no log_softmax": lambda x, t, w: F.nll_loss(x, t, w),
    "class dimension 1": lambda x, t, w: F.nll_loss(
        x.view(2, 3, 50).mT.log_softmax(1), t.view(2, 3)
    ),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("loss", NLL.values(), ids=NLL)
def test_nll_loss(loss):
    def fn(input, weight, target, class_weight):
        return loss(F.linear(input, weight), target.clamp(min=0), class_weight)

    assert_as_accurate_as_eager(fn, INPUT, WEIGHT, TARGET, CLASS_WEIGHT)


def test_graph_of_nll_loss():
    def fn(input, weight, target):
        return F.nll_loss(F.linear(input, weight).log_softmax(-1), target)

    assert_expected_inline(
        rewritten_graph(fn, INPUT, WEIGHT, TARGET),
        """\
reduce = torch.ops.cce_inductor.reduce.default(l_input_, l_weight_, None, [l_target_], 'target(z, r0, -100); logsumexp(z)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
sub = torch.ops.aten.sub.Tensor(getitem, getitem_1)
cross_entropy = torch.ops.cce_inductor.cross_entropy.default(None, sub, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy,)
""",
    )


def test_other_loss_is_left_alone():
    def fn(input, weight, target):
        logits = F.linear(input, weight)
        return F.multi_margin_loss(logits, target) + F.cross_entropy(logits, target)

    margin, cross_entropy = reports_of(fn, INPUT, WEIGHT, TARGET.abs() % 50)
    assert margin.loss == "linear > multi_margin_loss"
    assert cross_entropy.reason.startswith(f"{reasons.USED_BY} multi_margin_loss at ")
