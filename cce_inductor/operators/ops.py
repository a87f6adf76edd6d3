"""The operators `torch.ops.cce_inductor.*`, with their fake implementations and autograd formulas.

- `reduce_rows`: the statistics of each row of logits that a program names
- `reduce_rows_backward`: their gradients, from logits that are computed again
- `reduce_rows_with_gradients`: both, if the upstream gradients are known beforehand

Rewritten graphs call composite operators, which consist of these two and of small operations on one
number per row; the compiler and autograd see only those:

- `reduce`: `reduce_rows` for any number of dimensions
- `cross_entropy`: the loss from each row's `logsumexp` and target logit
- `expand_rows`: an operand, expanded to the size of the rows
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise import engine
from cce_inductor.kernels.blockwise.with_gradients import compute_with_gradients
from cce_inductor.kernels.head import Head, Wanted
from cce_inductor.kernels.names import LOGIT, NAMESPACE, OperandKind
from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.saved import saved_tensors
from cce_inductor.kernels.stored import with_stored_tiles
from cce_inductor.operators import inductor
from cce_inductor.operators.compiled import run_compiled
from cce_inductor.operators.fingerprint import tagged
from cce_inductor.options import DEFAULT_WORKSPACE_BYTES
from cce_inductor.torch_internals import cuda_graphs
from cce_inductor.torch_internals.patches import set_config


def _without_autocast(input: Tensor) -> torch.autocast:
    """Disable autocast: the kernels choose every dtype themselves."""
    return torch.autocast(input.device.type, enabled=False)


@torch.library.custom_op(
    f"{NAMESPACE}::reduce_rows",
    mutates_args=(),
    schema=f"(Tensor input, {Head.SCHEMA}) -> Tensor[]",
)
def reduce_rows(input: Tensor, *head: Any) -> list[Tensor]:
    """See `kernels.blockwise.engine.compute_statistics`; `head` are the arguments of `Head.of`."""
    parsed = Head.of(*head)
    with _without_autocast(input):
        results = run_compiled("reduce_rows", input, parsed, (input, *head))
        return engine.compute_statistics(input, parsed) if results is None else results


@reduce_rows.register_fake
def _(input: Tensor, *arguments: Any) -> list[Tensor]:
    head = Head.of(*arguments)
    saved = saved_tensors(head, input.shape[0])
    return [
        *_new_statistics(input, head),
        *(input.new_empty(shape, dtype=dtype) for shape, dtype in saved),
    ]


def _new_statistics(input: Tensor, head: Head) -> list[Tensor]:
    """Return new tensors for the statistics."""
    return [
        input.new_empty(shape, dtype=dtype)
        for statistic in head.program.statistics
        for shape, dtype in zip(
            statistic.result_shapes(input.shape[0], head.operands),
            statistic.result_dtypes,
            strict=True,
        )
    ]


@torch.library.custom_op(
    f"{NAMESPACE}::reduce_rows_backward",
    mutates_args=(),
    schema="(Tensor?[] grads, Tensor[] results, "
    f"Tensor input, {Head.SCHEMA}, bool[] output_mask) -> Tensor[]",
)
def reduce_rows_backward(
    grads: Sequence[Tensor | None], results: Sequence[Tensor], input: Tensor, *arguments: Any
) -> list[Tensor]:
    """See `kernels.blockwise.engine.compute_gradients`.

    The last argument, `output_mask`, selects among input, weight, bias and each operand; only the
    selected gradients are returned.
    """
    head, wanted = Head.of(*arguments[:-1]), Wanted.of(arguments[-1])
    with _without_autocast(input):
        every = (grads, results, input, *arguments)
        gradients = run_compiled("reduce_rows_backward", input, head, every)
        if gradients is None:
            gradients = engine.compute_gradients(grads, results, input, head, wanted).computed()
        return gradients


@reduce_rows_backward.register_fake
def _(
    grads: Sequence[Tensor | None], results: Sequence[Tensor], input: Tensor, *arguments: Any
) -> list[Tensor]:
    head, output_mask = Head.of(*arguments[:-1]), arguments[-1]
    return _new_gradients(input, head, output_mask)


def _new_gradients(input: Tensor, head: Head, output_mask: Sequence[bool]) -> list[Tensor]:
    """Return new tensors for the gradients that a mask selects."""
    primals = (input, head.linear_weight, head.linear_bias, *head.operands)
    return [
        primal.new_empty(primal.shape)
        for primal, wanted in zip(primals, output_mask, strict=True)
        if wanted and primal is not None
    ]


@torch.library.custom_op(
    f"{NAMESPACE}::reduce_rows_with_gradients",
    mutates_args=(),
    schema=f"(Tensor?[] grads, Tensor input, {Head.SCHEMA}, bool[] output_mask) -> Tensor[]",
)
def reduce_rows_with_gradients(
    grads: Sequence[Tensor | None], input: Tensor, *arguments: Any
) -> list[Tensor]:
    """See `kernels.blockwise.with_gradients.compute_with_gradients`.

    The statistics are followed by the gradients that the last argument selects, as in
    `reduce_rows_backward`. `operators.with_loss` writes it into graphs that have a backward, so it
    needs no formula for autograd.
    """
    head, wanted = Head.of(*arguments[:-1]), Wanted.of(arguments[-1])
    with _without_autocast(input):
        statistics, gradients = compute_with_gradients(grads, input, head, wanted)
        return [*statistics, *gradients.computed()]


@reduce_rows_with_gradients.register_fake
def _(grads: Sequence[Tensor | None], input: Tensor, *arguments: Any) -> list[Tensor]:
    head, output_mask = Head.of(*arguments[:-1]), arguments[-1]
    return [*_new_statistics(input, head), *_new_gradients(input, head, output_mask)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, linear_weight, linear_bias, operands, *constants = inputs
    ctx.set_materialize_grads(False)
    ctx.constants = constants
    ctx.results = len(output)
    ctx.save_for_backward(input, linear_weight, linear_bias, *output, *operands)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    input, linear_weight, linear_bias, *rest = ctx.saved_tensors
    results, operands = rest[: ctx.results], rest[ctx.results :]
    need_input, need_weight, need_bias, need_operands, *_ = ctx.needs_input_grad
    if not isinstance(need_operands, (list, tuple)):
        need_operands = [need_operands] * len(operands)
    program = Program.parse(ctx.constants[0])
    reached = program.reached([grad is not None for grad in grads])
    if not program.is_plain:
        reached &= derivative(program, operands).connected
    through_logit = LOGIT in reached
    positions = {at for name in reached if name.kind is not None for at in name.positions}
    output_mask = [need and through_logit for need in (need_input, need_weight, need_bias)]
    output_mask += [need and at in positions for at, need in enumerate(need_operands)]
    if not any(output_mask):
        return None, None, None, [None] * len(operands), *(None for _ in ctx.constants)
    computed = iter(
        torch.ops.cce_inductor.reduce_rows_backward(
            list(grads),
            results,
            input,
            linear_weight,
            linear_bias,
            operands,
            *ctx.constants,
            output_mask,
        )
    )
    gradients = [next(computed) if wanted else None for wanted in output_mask]
    return *gradients[:3], gradients[3:], *(None for _ in ctx.constants)


reduce_rows.register_autograd(_backward, setup_context=_save_for_backward)


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "cce_inductor: the fused linear cross-entropy has no second derivative; compute the "
        "logits and torch.nn.functional.cross_entropy without cce_inductor for a double backward"
    )


reduce_rows_backward.register_autograd(_refuse_double_backward)


def _reduce(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: str,
    skip_ignored: bool = False,
    compute_dtype: torch.dtype | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    sample_below: float = 0.0,
) -> list[Tensor]:
    inductor.prepare(input)
    parsed = Program.parse(program)
    rows, vocabulary = input.shape[:-1], linear_weight.shape[0]
    count = math.prod(rows)
    flat = list(operands)
    for name, kind in parsed.operands.items():
        flat[name.position] = _flat(operands[name.position], kind, rows, vocabulary)
    for statistic in parsed.indexed:
        index = statistic.index_of(operands)
        shape = (count,) if statistic.is_flat else (count, index.shape[-1])
        flat[statistic.index.position] = index.reshape(shape)
    is_in_graph = cuda_graphs.will_record(input.device) or cuda_graphs.is_recording(input.device)
    samples = isinstance(vocabulary, int) and not is_in_graph
    head = Head(
        linear_weight,
        linear_bias,
        flat,
        parsed,
        skip_ignored,
        compute_dtype or input.dtype,
        workspace_bytes,
        sample_below if samples else 0.0,
    )
    tensors = [each for each in (input, linear_weight, linear_bias, *flat) if each is not None]
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        head = with_stored_tiles(head, count)
    results = torch.ops.cce_inductor.reduce_rows(
        input.reshape(count, input.shape[-1]),
        linear_weight,
        linear_bias,
        flat,
        program,
        skip_ignored,
        head.compute_dtype,
        head.workspace_bytes,
        head.sample_below,
        head.stored_tiles,
    )
    results = results[: parsed.result_count]
    return [r.reshape(*rows, r.shape[1] if r.dim() == 2 else 1) for r in results]


def _flat(operand: Tensor, kind: OperandKind, rows: Sequence[int], vocabulary: int) -> Tensor:
    """Return an operand with one dimension for all rows; for a product, this is its input."""
    if kind.is_product:
        return operand.reshape(math.prod(rows), operand.shape[-1])
    if kind is OperandKind.SCALAR:
        return operand.reshape(())
    if kind is OperandKind.COLUMN:
        return operand.reshape(-1)
    count, width = math.prod(rows), vocabulary if kind is OperandKind.LOGIT else 1
    if operand.numel() != count * width:
        operand = operand.expand(*rows, width)
    return operand.reshape((count, width) if kind is OperandKind.LOGIT else (count,))


def _expand_rows(operand: Tensor, rows: Tensor, dim: int, width: int) -> Tensor:
    sizes = list(rows.shape)
    sizes[dim] = width
    return operand.expand(sizes)


def _cross_entropy(
    lse: Tensor | None,
    target_logit: Tensor,
    logit_sum: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    vocabulary: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    result_dtype: torch.dtype,
) -> Tensor:
    """Return the loss; without `lse`, `target_logit` is a log-probability."""
    rows = target.reshape(-1)
    kept = rows != ignore_index
    loss = -target_logit.reshape(-1)
    if lse is not None:
        loss = lse.reshape(-1) + loss
    if weight is None:
        total_weight, row_weight = vocabulary, kept
    else:
        class_weight = weight.to(torch.float64)
        total_weight = class_weight.sum()
        row_weight = class_weight[rows.masked_fill(~kept, 0)].masked_fill(~kept, 0.0)
        loss = loss * row_weight
    if logit_sum is not None:
        assert lse is not None, "smoothing needs the logsumexp"
        smooth = (lse.reshape(-1) * total_weight - logit_sum.reshape(-1)) / vocabulary
        loss = loss * (1.0 - label_smoothing) + smooth * label_smoothing
    loss = loss.masked_fill(~kept, 0.0)
    if reduction == "none":
        return loss.reshape(target.shape).to(result_dtype)
    loss = loss.sum()
    if reduction == "mean":
        loss = loss / row_weight.sum()
    return loss.to(result_dtype)


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _schema, _implementation in {
    "reduce(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor[] operands, "
    "str program, bool skip_ignored=False, ScalarType? compute_dtype=None, "
    f"int workspace_bytes={DEFAULT_WORKSPACE_BYTES}, float sample_below=0.0) -> Tensor[]": _reduce,
    "cross_entropy(Tensor? lse, Tensor target_logit, Tensor? logit_sum, Tensor target, "
    "Tensor? weight, SymInt vocabulary, str reduction, int ignore_index, float label_smoothing, "
    "ScalarType result_dtype) -> Tensor": _cross_entropy,
    "expand_rows(Tensor operand, Tensor rows, int dim, SymInt width) -> Tensor": _expand_rows,
}.items():
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_schema.split("(")[0], _implementation, "CompositeImplicitAutograd")

# The keys of compile caches do not depend on the schemas and formulas above. The tag makes them
# depend on the sources, even if a function that calls the operators is compiled without `install`.
set_config(torch.compiler.config, "cache_key_tag", tagged(torch.compiler.config.cache_key_tag))
