"""Lowerings by which Inductor compiles the operators of `specification` to Triton templates."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.kernel.flex.common import (
    build_subgraph_module_buffer,
    create_placeholder,
    freeze_irnodes,
    maybe_realize,
)
from torch._inductor.lowering import (
    empty_strided,
    fallback_handler,
    make_pointwise,
    register_lowering,
)
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.virtualized import V, ops
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from cce_inductor.kernels.names import COLUMN, LOGIT, Name
from cce_inductor.kernels.program.text import Program, overload
from cce_inductor.kernels.triton import specification
from cce_inductor.kernels.triton.configs import Config, Kind, configs, reads_by_descriptor
from cce_inductor.kernels.triton.source import (
    Template,
    gradient_template,
    grid,
    roots_of,
    statistics_template,
)
from cce_inductor.kernels.triton.tiled import DEVICES
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.versions import selected, size_hints, triton_template

_OPS = torch.ops.cce_inductor


def _precision(dtype: torch.dtype) -> str:
    """Return the precision of a product of `dtype`, as it is set for PyTorch's own products.

    The older setting, ``allow_tf32``, is not read: that raises an error once the newer one has been
    used.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "'tf32'" if tf32 else "'ieee'"


def _triton_template(template: Template) -> Any:
    return triton_template(template.name, SymbolicGridFn(grid), template.source)


class _Kernel:
    """One call of a template.

    Args:
        kind: what the template computes, for the choice of configurations.
        call: the arguments of the operator, as IR.
        program: what is computed.
        width: the total number of columns.
    """

    def __init__(
        self,
        kind: Kind,
        call: specification.StatisticsCall | specification.GradientCall,
        program: Program,
        width: Any,
    ):
        self.kind, self.program, self.dtype = kind, program, call.input.get_dtype()
        self.device = call.input.get_device()
        self.inputs = list(realize_inputs(call.input, call.linear_weight))
        self.by_descriptor = reads_by_descriptor(self.inputs, self.device)
        self.has_bias = call.linear_bias is not None
        if self.has_bias:
            self.inputs.append(realize_inputs(call.linear_bias))
        self.rows, self.hidden = call.input.get_size()
        self.width = width
        self.captured = maybe_realize([call.operands[name.position] for name in program.operands])
        freeze_irnodes(self.captured)
        self.subgraphs = [self._subgraph(root) for root in roots_of(program)]

    def _subgraph(self, root: Name) -> Any:
        """Return the IR of a value, as a function of a logit, its row and its column."""
        names = tuple(self.program.operands)
        dtypes = tuple(operand.get_dtype() for operand in self.captured)
        placeholders = [
            create_placeholder(name, dtype, self.device)
            for name, dtype in (
                ("z", torch.float32),
                ("row", torch.int32),
                ("column", torch.int32),
            )
        ]
        function = _scalar_function(str(self.program), root, names, dtypes)
        # A TensorBox tells an operator that an operand is a tensor and not a number.
        operands = [ir.TensorBox.create(operand) for operand in self.captured]
        built = build_subgraph_module_buffer([*placeholders, *operands], function)
        buffer = built[0] if isinstance(built, (list, tuple)) else built
        freeze_irnodes(buffer)
        return buffer

    def __call__(
        self,
        template: Template,
        more_inputs: Sequence[Any],
        outputs: Sequence[ir.FixedLayout],
        results: int,
        constants: Callable[[Config], dict[str, Any]],
        **options: Any,
    ) -> list[Any]:
        """Return the template's results. Inductor stores the first one.

        Args:
            template: the template to call.
            more_inputs: the inputs after input, weight and bias.
            outputs: the layouts of the results, in the template's order.
            results: as for `configs`.
            constants: returns the template's constants for a configuration.
            **options: options of Inductor's `maybe_append_choice`.
        """
        layout, *others = outputs
        written = [
            empty_strided(other.size, other.stride, dtype=other.dtype, device=self.device)
            for other in others
        ]
        more_inputs = [realize_inputs(each) for each in more_inputs]
        inputs = [*self.inputs, *more_inputs, *written]
        kernel = _triton_template(template)
        choices: list[Any] = []
        error: NotImplementedError | None = None
        for config in self._configs(results):
            why = kernel.maybe_append_choice(
                choices,
                input_nodes=inputs,
                layout=layout,
                mutated_inputs=written,
                call_sizes=[self.rows, self.width],
                subgraphs=self.subgraphs or None,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                BLOCK_M=config.block_m,
                BLOCK_V=config.block_v,
                BLOCK_H=config.block_h,
                GROUP=config.group,
                PROGRAMS=config.programs,
                EVEN_H=V.graph.sizevars.statically_known_multiple_of(self.hidden, config.block_h),
                PRECISION=_precision(self.dtype),
                **constants(config),
                **options,
            )
            error = error or why
        if not choices and error is not None:
            raise error
        first = len(self.inputs)
        chosen = autotune_select_algorithm(
            template.name,
            choices,
            [*inputs, *self.captured],
            layout,
            # The autotuner's random numbers would be out of bounds as the first column of a block.
            input_gen_fns={first + at: _zeros for at in range(len(more_inputs))},
        )
        result = selected(chosen)
        if self.subgraphs:
            result.data.data.subgraph_inps = list(self.captured)
            result.data.data.subgraph_outs = list(self.subgraphs)
        V.graph.no_fuse_buffer_names.add(result.get_name())
        return [result, *written]

    def _configs(self, results: int) -> list[Config]:
        every = configs(
            self.kind,
            self.dtype,
            self.device,
            by_descriptor=self.by_descriptor,
            steps=len(self.program.steps),
            results=results,
        )
        config = torch._inductor.config
        tuned = config.max_autotune or config.max_autotune_gemm
        return every if tuned and not config.deterministic else every[:1]


def _contiguous(device: torch.device, shape: Sequence[Any], dtype: torch.dtype) -> ir.FixedLayout:
    strides = ir.FlexibleLayout.contiguous_strides(list(shape))
    return ir.FixedLayout(device, dtype, list(shape), strides)


def _zeros(node: Any) -> torch.Tensor:
    size = size_hints(node.get_size())
    return torch.zeros(size, dtype=node.get_dtype(), device=node.get_device())


@functools.lru_cache(maxsize=1024)
def _scalar_function(
    program: str, root: Name, names: tuple[Name, ...], dtypes: tuple[torch.dtype, ...]
) -> GraphModule:
    """Return the graph that computes a value of the program from tensors without dimensions.

    Its arguments are the logit, its row, its column, and the whole operands: the graph reads their
    value at that row and column.
    """

    def function(z: Any, row: Any, column: Any, *operands: Any) -> Any:
        values: dict[Any, Any] = {LOGIT: z, COLUMN: column}
        for name, operand in zip(names, operands, strict=True):
            kind = name.kind
            assert kind is not None
            places = [row] * kind.varies_over_rows + [column] * kind.varies_over_columns
            if places:
                operand = torch.ops.aten.index.Tensor(operand, places)
            values[name] = operand.float() if operand.is_floating_point() else operand
        for step in Program.parse(program).steps:
            args, kwargs = step.arguments(values, torch.float32)
            operator = _OPS.multiply_add if step.target == "addcmul" else overload(step.target)
            result = operator(*args, **kwargs)
            values[step.name] = result.float() if result.is_floating_point() else result
        return values[root].to(torch.float32)

    examples = [torch.zeros((), dtype=d) for d in (torch.float32, torch.int32, torch.int32)]
    examples += [
        torch.zeros([1] * (name.kind.rank if name.kind else 0), dtype=dtype)
        for name, dtype in zip(names, dtypes, strict=True)
    ]
    # A new thread has the dispatcher's default state: no modes, no autocast.
    with ThreadPoolExecutor(max_workers=1) as thread:
        table = select_decomp_table()
        traced = make_fx(function, decomposition_table=table, tracing_mode="fake")
        graph: GraphModule = thread.submit(traced, *examples).result()
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _tile_statistics(*arguments: Any) -> list[Any]:
    call = specification.StatisticsCall(*arguments)
    program = Program.parse(call.program)
    vocabulary = int(call.linear_weight.get_size()[0])
    kernel = _Kernel(Kind.STATISTICS, call, program, vocabulary)
    widths = tuple(int(index.get_size()[1]) for index in call.indices)
    template = statistics_template(
        program, widths, kernel.has_bias, call.skip_ignored, kernel.by_descriptor
    )
    stored = specification.stored_by_statistics(program, widths, kernel.rows, vocabulary, call.tile)
    layouts = [_contiguous(kernel.device, each.shape, each.dtype) for each in stored]
    # Inductor stores the first tensor of tiles; the template stores the others.
    first = next(at for at, each in enumerate(stored) if each.is_of_tiles)
    ordered = [layouts[first], *layouts[:first], *layouts[first + 1 :]]

    def constants(config: Config) -> dict[str, Any]:
        return {
            "BLOCKS": call.tile // config.block_v,
            "EVEN_V": vocabulary % config.block_v == 0,
        }

    results = sum(1 if each.is_of_tiles else int(each.shape[1]) for each in stored)
    primary, *others = kernel(template, call.indices, ordered, results, constants)
    return [*others[:first], primary, *others[first:]]


def _logit_gradient(*arguments: Any) -> list[Any]:
    call = specification.GradientCall(*arguments)
    program, width = Program.parse(call.program), call.width
    kernel = _Kernel(Kind.GRADIENT, call, program, width)
    # Inductor stores two-dimensional tiles through a descriptor, not those of a single column.
    stores_by_descriptor = kernel.by_descriptor and width > 1
    template = gradient_template(
        program,
        kernel.has_bias,
        kernel.by_descriptor,
        stores_by_descriptor,
        weight_is_block=call.linear_weight.get_size()[0] == width,
    )
    indices = program.blocks[0].indices
    inputs = [call.start, *(call.operands[name.position] for name in indices)]
    layouts = [
        ir.FixedLayout(
            kernel.device, dtype, [kernel.rows, width], [specification.row_stride(width, dtype), 1]
        )
        for dtype in specification.block_dtypes(program, kernel.dtype)
    ]
    with _after(call.after):
        return kernel(
            template,
            inputs,
            layouts,
            len(layouts),
            lambda _: {"WIDTH": width},
            tma_store=stores_by_descriptor,
        )


def _weight_block(weight: Any, start: int, width: int, dtype: torch.dtype, after: Any) -> Any:
    with _after(after):
        fallback = fallback_handler(_OPS.weight_block.default, add_to_fallback_set=False)
        return fallback(weight, start, width, dtype, [])


@contextlib.contextmanager
def _after(tensors: Sequence[Any]) -> Iterator[None]:
    """Make everything that is lowered inside the with-block run after the tensors are computed.

    Otherwise the scheduler could compute all blocks of the vocabulary first, and store them.
    """
    names = set()
    for tensor in tensors:
        tensor.realize()
        writers = (
            operation
            for operation in reversed(V.graph.operations)
            if tensor.get_name() in operation.get_mutation_names()
        )
        last = next(writers, None)
        names.update(
            [tensor.get_name()]
            if last is None
            else [output.get_name() for output in last.get_outputs()]
        )
    count = len(V.graph.operations)
    yield
    for operation in V.graph.operations[count:]:
        V.graph.additional_buffer_deps[operation.get_operation_name()].update(names)


def _add_product(total: Any, a: Any, b: Any) -> Any:
    """Add the product in the memory of `total`, if nothing else reads `total` later."""
    node = V.graph.current_node
    source = node.args[0]
    if (
        total is None
        or source.target is not _OPS.add_product.default
        or any(user > node for user in source.users)
    ):
        return fallback_handler(_OPS.add_product.default, add_to_fallback_set=False)(total, a, b)
    ir.FallbackKernel.create(_OPS.add_product_.default, total, a, b)
    return total


def _or_fallback(operator: Any, lowering: Callable[..., Any]) -> Callable[..., Any]:
    """Fall back to the operator itself, which is slower, on devices without templates and where the
    lowering raises."""
    fallback = fallback_handler(operator, add_to_fallback_set=False)

    def lowered(*args: Any) -> Any:
        device = next(arg.get_device() for arg in args if arg is not None)
        if device.type not in DEVICES:
            return fallback(*args)
        try:
            return lowering(*args)
        except Exception:
            surprised(f"{operator} runs without a Triton kernel, which costs time")
            return fallback(*args)

    return lowered


@functools.cache
def register() -> None:
    """Make Inductor use the templates."""
    for operator, lowering in (
        (_OPS.tile_statistics.default, _tile_statistics),
        (_OPS.logit_gradient.default, _logit_gradient),
        (_OPS.weight_block.default, _weight_block),
        (_OPS.add_product.default, _add_product),
    ):
        register_lowering(operator, type_promotion_kind=None)(_or_fallback(operator, lowering))
    fused = make_pointwise(lambda addend, a, b: ops.fma(a, b, addend))
    register_lowering(_OPS.multiply_add.default, type_promotion_kind=None)(fused)
    # Inductor makes no fallback for an operator with a decomposition, even if that declines.
    for whole in (_OPS.reduce_rows.default, _OPS.reduce_rows_backward.default):
        fallback = fallback_handler(whole, add_to_fallback_set=False)
        register_lowering(whole, type_promotion_kind=None)(fallback)
