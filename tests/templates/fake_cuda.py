"""Inductor's code for CUDA, written on a machine that has none: nothing of it is run.

Inductor asks PyTorch about the device in a few places; they are answered for one of three kinds.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch._inductor.utils
import torch.utils._triton
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

PROCESSORS = {80: 108, 90: 132, 100: 148}
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes that one block may use at most."""


class Driver:
    """Triton's view of the device."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def fake_cuda(capability: int) -> Iterator[None]:
    """A machine with a device of compute capability 8.0, 9.0 or 10.0, given as 80, 90 or 100."""
    major, minor = divmod(capability, 10)
    properties = types.SimpleNamespace(
        name=f"sm_{capability}",
        major=major,
        minor=minor,
        multi_processor_count=PROCESSORS[capability],
        warp_size=32,
        total_memory=80 << 30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=SHARED_MEMORY[capability],
        shared_memory_per_multiprocessor=SHARED_MEMORY[capability] + 1024,
        gcnArchName="",
        L2_cache_size=50 << 20,
        is_integrated=0,
        is_multi_gpu_board=0,
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=6144,
    )

    def properties_of(*_: Any, **__: Any) -> Any:
        return properties

    def static(value: Any) -> staticmethod[..., Any]:
        return staticmethod(lambda *_, **__: value)

    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_properties", properties_of),
        (torch.cuda, "get_device_capability", lambda *_, **__: (major, minor)),
        (CudaInterface, "is_available", static(True)),
        (CudaInterface, "get_compute_capability", static(capability)),
        (CudaInterface, "get_device_properties", staticmethod(properties_of)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(properties_of)),
        (CudaInterface, "current_device", static(0)),
        (torch.utils._triton, "has_triton", lambda *_: True),
        (torch.utils._triton, "has_triton_tma_device", lambda *_: major >= 9),
        (triton.runtime.driver, "_active", Driver(capability)),
    ]
    _forget()
    with contextlib.ExitStack() as stack:
        for owner, name, value in answers:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(
            mock.patch("cce_inductor.operators.inductor.has_triton", return_value=True)
        )
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    """What Inductor remembers of a device."""
    functions = [DeviceProperties.create]
    for module in (torch.utils._triton, torch._inductor.utils):
        functions += [
            value
            for name, value in vars(module).items()
            if isinstance(value, functools._lru_cache_wrapper) and not name.startswith("__")
        ]
    for function in functions:
        getattr(function, "cache_clear", lambda: None)()


def output_code(
    function: Callable[..., Any],
    inputs: Sequence[tuple[Sequence[int], torch.dtype]],
    capability: int = 90,
    dynamic: Mapping[int, Sequence[int]] | None = None,
    **config: Any,
) -> str:
    """The Python module that Inductor writes for ``function(*inputs)``.

    Args:
        function: of tensors, without gradients.
        inputs: their shapes and dtypes.
        capability: of the device, as for `fake_cuda`.
        dynamic: for each input by position the dimensions whose sizes are symbols.
        **config: options of Inductor.
    """
    options = {"max_autotune": False, "deterministic": True, **config}
    with fake_cuda(capability), torch._inductor.config.patch(options):
        shapes = ShapeEnv()
        mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        examples: list[Any] = []
        for number, (shape, dtype) in enumerate(inputs):
            symbolic = (dynamic or {}).get(number, ())
            sizes = [
                DimDynamic.DYNAMIC if at in symbolic else DimDynamic.STATIC
                for at in range(len(shape))
            ]
            with unset_fake_temporarily():
                meta = torch.empty(shape, dtype=dtype, device="meta")
            fake = mode.from_tensor(
                meta,
                source=ConstantSource(f"input{number}"),
                symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
            )
            with mode:
                fake = torch.empty_strided(fake.shape, fake.stride(), dtype=dtype, device="cuda:0")
            examples.append(fake)
        with mode:
            table = select_decomp_table()
            module = make_fx(function, decomposition_table=table, tracing_mode="fake")(*examples)
        examples = [*_with_symbols(module, examples), *examples]
        graph = GraphLowering(module, example_inputs=examples, shape_env=shapes)
        with (
            V.set_graph_handler(graph),
            V.set_fake_mode(mode),
            tracing(TracingContext(mode)),
            DebugContext(),
        ):
            graph.run(*examples)
            code = graph.codegen()
        return str(getattr(code[0] if isinstance(code, tuple) else code, "value", code))


def _with_symbols(module: torch.fx.GraphModule, examples: Sequence[Any]) -> list[Any]:
    """Gives the graph an input for each symbolic size, first, and returns them."""
    symbols: dict[str, Any] = {}
    for example in examples:
        for size in example.shape:
            if isinstance(size, torch.SymInt):
                symbols.setdefault(str(size), size)
    first = next(iter(module.graph.nodes))
    with module.graph.inserting_before(first):
        for number, symbol in enumerate(symbols.values()):
            module.graph.placeholder(f"size{number}").meta["val"] = symbol
    module.recompile()
    return list(symbols.values())
