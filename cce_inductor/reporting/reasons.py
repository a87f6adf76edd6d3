"""Every reason why a loss is left alone or logits are stored, with its advice.

A reason is a value. A rule raises one of the constants below in an `UnsupportedError`, and the walk
wraps it in a second reason that names the node, ``used_by(node, cause)`` for example. Code compares
reasons with ``is`` or ``==``, and never looks at their words.

The subject of the sentences that rules raise, "it", is the operation that the wrapping reason
names: "the logits are used by dropout at train.py:10: it is random".
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from cce_inductor.options import Options
from cce_inductor.reporting.location import location, operation
from cce_inductor.reporting.sizes import format_bytes


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a loss is left alone, or why logits are stored.

    ``str(reason)`` is the whole sentence of the report, with the place and the cause. A report puts
    it after "because", so sentence and advice begin in lower case and end without a full stop.

    Attributes:
        sentence: what is wrong; ``{at}`` stands where the place belongs.
        advice: what the user can change; None if there is no advice, or if `cause` has it.
        place: ``file.py:line`` of the operation that the sentence names, None if unknown.
        cause: the reason that this one adds a place to, None if it stands alone.
    """

    sentence: str
    advice: str | None = None
    place: str | None = None
    cause: Reason | None = None

    def __str__(self) -> str:
        text = self.sentence.replace("{at}", f" at {self.place}" if self.place else "")
        return text if self.cause is None else f"{text}: {self.cause}"

    def advice_for(self, options: Options, logits_bytes: int | None) -> str | None:
        """What the user can change so that the loss is rewritten.

        Args:
            options: the options in force.
            logits_bytes: the size of the logits, None if it is known only at run time.
        """
        if self.advice is None and self.cause is not None:
            return self.cause.advice_for(options, logits_bytes)
        return self.advice


# Reasons that name one operation of the graph


USED_BY = "the logits are used by"
"""What comes before the name of the operation in the reasons that `used_by` makes."""


def used_by(node: Node, cause: Reason | None = None) -> Reason:
    """The logits are used by an operation that cannot be followed.

    The causes that rules raise share this sentence, so each cause has its own advice.
    """
    return _of(node, f"{USED_BY} {operation(node)}{{at}}", cause)


def used_with_other_logits(node: Node) -> Reason:
    """The operation reads these logits together with those of another projection, as a tensor."""
    return _of(node, f"{USED_BY} {operation(node)}{{at}} with other logits")


def changed_through_view(node: Node) -> Reason:
    """The operation changes the memory of the logits by way of a tensor that is not followed."""
    return _of(node, f"{operation(node)}{{at}} changes logits in place through a view of them")


def loss_unsupported(node: Node, cause: Reason) -> Reason:
    """The loss itself has a form that cannot be rewritten."""
    return Reason(f"{operation(node)} cannot be rewritten", place=location(node), cause=cause)


def may_change_operand(node: Node) -> Reason:
    """The operation changes a tensor between the projection that reads it and the loss."""
    return _of(
        node,
        f"{operation(node)}{{at}} may change what the projection read",
        advice="change that tensor before the projection, after the backward, or in a copy of it",
    )


def projection_unsupported(node: Node, cause: Reason) -> Reason:
    """The operation is a projection in a form that cannot be followed."""
    return _of(node, f"{operation(node)}{{at}} is not a known projection", cause)


def projection_not_followed(node: Node, cause: Reason) -> Reason:
    """The operation is a projection in a region in which nothing is rewritten."""
    return _of(node, f"{operation(node)}{{at}} cannot be followed", cause)


def _of(
    node: Node, sentence: str, cause: Reason | None = None, *, advice: str | None = None
) -> Reason:
    return Reason(sentence, advice, location(node), cause)


# Regions in which nothing is rewritten

INSIDE_TRANSFORM = Reason(
    "it is inside a torch.func transform", "compile the loss outside of the transform"
)
INSIDE_INFERENCE_MODE = Reason(
    "it is inside inference mode", "use torch.no_grad() instead of inference mode"
)


def takes_derivatives(node: Node) -> Reason:
    """The graph contains a call of `torch.autograd.grad` or of ``backward()``."""
    return _of(
        node,
        "the graph takes derivatives itself{at}",
        advice="let the compiled function return the loss, and take its derivatives outside of it",
    )


# Where the input of a loss comes from, if it is no projection of the graph


@dataclasses.dataclass(frozen=True)
class LogitsFromOutside(Reason):
    """The logits are an input of the graph; the advice depends on their size and the options."""

    def advice_for(self, options: Options, logits_bytes: int | None) -> str | None:
        together = (
            "compute the logits and the loss in one compiled function, without a graph break "
            "between them"
        )
        if logits_bytes is not None and logits_bytes < options.min_logits_bytes:
            return f"{together}, and lower min_logits_bytes: the logits are smaller than that"
        uncompiled = "if the head is not compiled, cce_inductor.defer(head) defers its logits"
        if options.defer_logits == "always":
            return (
                f"{together}; {uncompiled}; if it is compiled, the logits could not be deferred, "
                "and the report of its function says why"
            )
        if options.defer_logits == "auto":
            return (
                f"{together}; {uncompiled}; if it is compiled and the logits require no gradient, "
                'defer_logits="always" defers them'
            )
        return (
            f'{together}; or, if a compiled function returns them, pass defer_logits="auto" '
            "(this does not help where FSDP frees the weight of the head after its forward)"
        )


def from_outside(placeholder: Node) -> LogitsFromOutside:
    return LogitsFromOutside(
        f"its logits come into this graph from outside, as {placeholder.name!r}, so their "
        "projection is not in it"
    )


def from_parameter(placeholder: Node) -> Reason:
    return Reason(
        f"its input is taken from the parameter {placeholder.name!r}, and is not a projection"
    )


FROM_CALLING_GRAPH = Reason(
    "its logits come into a function that the graph calls (an autograd.Function, for example), "
    "and are not followed into it"
)
FROM_NO_TENSOR = Reason("its input is not computed from any tensor")


def made_by(node: Node) -> Reason:
    return _of(
        node, f"its input is made by {operation(node)}{{at}}, which is not a known projection"
    )


def taken_for_router(classes: int | None, hidden: int) -> Reason:
    """A softmax without a named loss, over few classes: it may route tokens to experts."""
    return Reason(
        f"a hand-written softmax over {classes} classes, which are no more than the {hidden} "
        "hidden units, is taken for that of a router, not for a loss",
        "call the loss by its name: F.cross_entropy(...) or F.nll_loss(F.log_softmax(...))",
    )


# Kernels and compilation


def no_kernel(device: str) -> Reason:
    return Reason(f"there is no kernel for the device {device!r}")


def too_small(logits_bytes: int, minimum: int) -> Reason:
    return Reason(
        f"the logits are small ({format_bytes(logits_bytes)}, and min_logits_bytes is "
        f"{format_bytes(minimum)})",
        "pass min_logits_bytes=0 to rewrite small losses as well",
    )


def derivative_not_pointwise(detail: str) -> Reason:
    return Reason(f"the function of the logits has a derivative that is not pointwise ({detail})")


def pass_failed(error: Exception) -> Reason:
    return Reason(f"the pass failed with {type(error).__name__}: {error}")


NO_PYTHON_IN_CPP_WRAPPER = Reason(
    "the operator is written in Python, and Inductor's C++ wrapper cannot call it",
    "compile with Inductor's option cpp_wrapper=False",
)

# Logits that the compiled function returns

_STORED = "the logits are returned by the compiled function, so they must be stored"
_RETURN_LOSS_ONLY = (
    "return only the loss from the compiled function, as a training step needs no logits"
)
RETURNED = Reason(_STORED, _RETURN_LOSS_ONLY)
RETURNED_WITHOUT_DEFERRAL = Reason(
    f'{_STORED}, as defer_logits is "never"',
    'pass defer_logits="auto": the logits are then computed only if they are used',
)


def not_deferred(cause: Reason) -> Reason:
    return Reason(f"{_STORED}, and cannot be deferred", _RETURN_LOSS_ONLY, cause=cause)


SEVERAL_LOGITS_RETURNED = Reason("the function returns a tuple or a stack of logits")
COMBINED_WITH_LARGE = Reason("they were combined with a tensor that is as large as the logits")
COMBINED_WITH_REDUCTION = Reason("they were combined with a value that is computed from them")
STRIDES_UNKNOWN = Reason("their strides are not known before the function runs")
FSDP_FREES_WEIGHT = Reason(
    "FSDP frees the weight after the forward of its module (reshard_after_forward)"
)
MEMORY_SHARED = Reason("another result or argument shares their memory")
FUNCTION_IS_SAVED = Reason(
    "the compiled function is saved, and loaded without what computes the logits"
)
CACHE_MAY_ANSWER = Reason("pre_grad_pass_timing lets a cache answer in the place of the pass")


def not_floating(dtype: torch.dtype) -> Reason:
    return Reason(f"they are {dtype}")


# What the operation is

WITHOUT_RULE = Reason("it has no rule")
LOSS_WITHOUT_RULE = Reason("there is no rule for this loss")
NOT_FOLLOWED = Reason("the graph that it calls is not followed")
RANDOM = Reason(
    "it is random", "draw the random numbers before the projection, or evaluate with dropout off"
)


def not_pointwise(detail: str) -> Reason:
    """The pass cannot write the operation as a function of one element.

    This is the reason for reductions and sorts, for functions of lists, and for functions with
    several results, if they have no rule.

    Args:
        detail: the operator, or what prevents it; empty if there is nothing to add.
    """
    return Reason("it is not a pointwise function" + (f" ({detail})" if detail else ""))


def unknown_call(error: TypeError) -> Reason:
    return Reason(f"its arguments do not match a known signature ({error})")


# Its arguments

NUMBER_MAY_DIFFER = Reason("it takes a number that may differ in the next call")
VOCABULARY_MAY_DIFFER = Reason("its vocabulary may have another size in the next call")
NUMBER_EXPECTED = Reason("it has an operand that is a tensor, not a number")
DIMENSION_NOT_CONSTANT = Reason("its dimension is not a constant")
LOGITS_NOT_FIRST = Reason("the logits are not its first operand")
NOT_THE_LOSS_INPUT = Reason("it is not the input of the loss")
TENSOR_INSTEAD_OF_DIMENSION = Reason("it compares logits with another tensor")
OPERAND_NOT_BROADCAST = Reason("it has an operand that does not broadcast to the logits")
BROADCAST_TO_MORE_DIMENSIONS = Reason("it broadcasts the logits to more dimensions")
BROADCAST_TO_LARGER_SHAPE = Reason("it broadcasts the logits to a larger shape")
OPERAND_SIZE_UNKNOWN = Reason("it has an operand whose size is not known")
OPERAND_LARGE_WITH_GRADIENT = Reason(
    "it combines the logits with a tensor that is as large as they are and requires a gradient",
    "detach that tensor, if the loss need not train what computes it",
)
OTHER_ROWS_OF_SAME_LOGITS = Reason("it combines logits with other rows of the same logits")
TUPLE_OF_LOGITS = Reason("it combines logits with a tuple of logits")
VIEW_WITH_OTHER_LOGITS = Reason("it combines a view of the logits with other logits")


def not_a_tensor(argument: object) -> Reason:
    return Reason(f"{argument} is not a tensor")


# Why a tensor as large as the logits cannot be computed block by block from smaller ones. These are
# internal: no report shows them.

NOTHING_MAKES_IT = Reason("no operation makes it")
MADE_OF_LARGE = Reason("it is made of a tensor that is as large")
CONSTANT = Reason("it is a constant")
CLASSES_ARE_NOT_VOCABULARY = Reason("its classes are not the vocabulary")

# The projection

WEIGHT_SIZE_DEPENDS_ON_DATA = Reason("its weight has a size that depends on data")


def wrapped_operand(value: torch.Tensor) -> Reason:
    return Reason(f"its operand is a {type(value).__name__}")


# Shape, dtype and device

MOVES_ELEMENTS = Reason("it moves the elements of the logits")
MOVES_TO_ANOTHER_DEVICE = Reason("it moves the logits to another device")
REINTERPRETS_BITS = Reason("it reinterprets the bits of the logits as another dtype")
RESULT_MAY_SHARE_MEMORY = Reason("its result may share memory with its argument")
READS_VOCABULARY_SIZE = Reason("it reads the size of the vocabulary")
DYNAMIC_SHAPE_OF_TENSOR = Reason("it takes a dynamic shape from another tensor")
RESHAPES_VOCABULARY_NOT_LAST = Reason(
    "it reshapes logits whose last dimension is not the vocabulary"
)
VOCABULARY_NOT_KEPT_LAST = Reason("it does not keep the vocabulary as the last dimension")
FLATTENS_VOCABULARY = Reason("it flattens the vocabulary into the rows")
SPLITS_VOCABULARY = Reason("it splits the vocabulary")
SQUEEZES_VOCABULARY = Reason("it squeezes the vocabulary")
SQUEEZES_UNKNOWN_SIZE = Reason("it squeezes a dimension whose size is not known")
MOVES_SEVERAL_DIMENSIONS = Reason("it moves several dimensions")
REPEATS_ROWS = Reason("it repeats the logits")


def casts_to(dtype: torch.dtype) -> Reason:
    return Reason(f"it casts the logits to {dtype}")


def moves_between(before: torch.device, after: torch.device) -> Reason:
    return Reason(f"it moves the logits from {before} to {after}")


def reads_attribute(name: object) -> Reason:
    return Reason(f"it reads the attribute {name} of the logits")


# Entries of the vocabulary and rows

SELECTS_ONE_ENTRY = Reason("it selects one entry of the vocabulary")
SELECTS_SOME_ENTRIES = Reason("it selects some entries of the vocabulary")
SELECTS_ENTRIES_OF_SOFTMAX = Reason("it selects some entries of a softmax over the vocabulary")
SELECTS_ENTRIES_AFTER_MASK = Reason(
    "it selects some entries of the vocabulary after a mask or bias"
)
SELECTS_ROWS_BY_LIST = Reason("it selects rows with a Python list")
SELECTS_SEVERAL_PARTS = Reason("it takes several parts of a split")
SPLITS_DYNAMIC_ROWS = Reason("it splits a number of rows that may differ in the next call")
INDEX_IS_BROADCAST = Reason("its index is broadcast")
INDEX_WITHOUT_ROWS = Reason("its index does not have one row for each row of the logits")
INDEX_MAY_DIFFER_IN_VOCABULARY = Reason(
    "it gathers rows by an index that may vary along the vocabulary"
)
TAKES_FROM_ALL = Reason("it takes entries from the flattened logits")
NOT_THE_DIAGONAL_OF_A_MATRIX = Reason("it is not the main diagonal of a matrix")
DIAGONAL_WITHOUT_SOME_ROWS = Reason("it may have no entry in some of the rows")

# Reductions and losses

REDUCES_ROWS = Reason("it reduces over the rows, not over the vocabulary")
REDUCES_ROWS_AND_VOCABULARY = Reason("it reduces over rows and vocabulary")
TAKES_THE_SMALLEST = Reason("it takes the smallest entries")
NOT_A_PRODUCT_OF_SAME_SHAPE = Reason(
    "it is not a product of the logits with a tensor of their shape"
)
NOT_A_SUM_OVER_VOCABULARY = Reason("it does not sum over the vocabulary alone")
CLASS_DIMENSION_NOT_VOCABULARY = Reason("its class dimension is not the vocabulary")
BATCH_DIMENSION_IS_VOCABULARY = Reason("its batch dimension is the vocabulary")
CLASS_WEIGHTS_WITH_GRADIENT = Reason("its class weights require a gradient", "pass weight.detach()")
TARGETS_ARE_LOGITS = Reason("its targets are logits")
TARGETS_ON_ANOTHER_DEVICE = Reason(
    "its targets are on another device", "move the targets to the logits' device before the loss"
)


def topk_out_of_range(limit: int) -> Reason:
    return Reason(f"it takes no entry, or more than {limit}")


# Several projections

JOINS_SEVERAL_FORMS = Reason("it joins logits whose vocabulary dimensions or dtypes differ")
JOINS_WITH_SOMETHING_ELSE = Reason("it joins logits with a tensor that holds no logits")
JOINS_SEVERAL_WEIGHTS = Reason("it joins rows of logits with different weights or functions")
JOINS_SEVERAL_INPUTS = Reason(
    "it joins vocabularies of logits with different inputs or functions, or with a bias"
)
JOINS_AFTER_FUNCTION_OF_PLACE = Reason(
    "it joins logits after a function of their position in the vocabulary"
)
JOINS_AFTER_DYNAMIC_VOCABULARY = Reason(
    "it joins a column after a vocabulary that may have another size in the next call"
)
JOINS_WITH_NO_COLUMN = Reason("it joins logits with a tensor that is not a column")
JOINS_WITH_INTEGERS = Reason("it joins logits with a column that is not floating point")
STACKS_SEVERAL_SHAPES = Reason("it stacks logits of different shapes")
STACK_WITH_TENSOR = Reason("it combines the logits of several projections with a tensor")
MIXES_PROJECTIONS = Reason("it mixes the logits of several projections")
ADDS_DIMENSIONS_TO_STACK = Reason("it adds dimensions to the logits of several projections")
TAKES_SEVERAL_PROJECTIONS = Reason("it takes several projections of a stack")

# Changes in place

CHANGES_SEVERAL_LOGITS = Reason("it changes several tensors of logits in place")
CHANGES_ANOTHER_TENSOR = Reason("it changes another tensor in place")
REDUCES_AND_CHANGES = Reason("it both reduces the logits and changes them in place")
HIDDEN_FROM_GRADIENT = Reason("it changes the logits in place while gradients are disabled")
ALSO_READ_AS_VIEW = Reason("it changes logits in place that are also read through a view")
CHANGES_PART = Reason("it changes a part of the logits in place")
CHANGES_UNKNOWN_ENTRIES = Reason("it changes a view of the logits whose entries are not known")
ASSIGNS_SOME_ROWS = Reason("it assigns to some of the rows")
ASSIGNS_EVERY_OTHER_ENTRY = Reason("it assigns to a range with a step")
ASSIGNS_BY_UNKNOWN_INDEX = Reason("it assigns with an index of an unknown form")
ASSIGNS_BY_ROW_AND_CLASS = Reason("it assigns to entries that are indexed by row and by class")
ASSIGNS_VOCABULARY_NOT_LAST = Reason(
    "it assigns to logits whose last dimension is not the vocabulary"
)
ASSIGNS_TENSOR = Reason("it assigns a tensor that is not a scalar")
FILLS_DIAGONAL_OF_NO_MATRIX = Reason("it fills the diagonal of a tensor that is not a matrix")
SCATTER_REDUCES = Reason("it scatters with a reduction")
SCATTERS_OVER_ROWS = Reason("it scatters along the rows, not along the vocabulary")
SCATTERS_SEVERAL_ENTRIES = Reason("it scatters to several entries of a row")
SCATTERS_NO_VALUE_PER_ROW = Reason("it scatters a tensor that does not have one value for each row")
