"""Compiles the kernels in Inductor's output code for a device that is not there.

The kernels go through Inductor's own `CachingAutotuner`, so that Triton gets exactly the options
that it gets on a machine with the device: a kernel compiled with others is another kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from fake_cuda import fake_cuda
from sass import MachineCode
from torch._inductor.runtime import triton_helpers

_KERNEL = re.compile(
    r"^(\w+) = async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.S | re.M
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel needs, and which instructions it uses.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread that did not fit them.
        shared: bytes of shared memory.
        tensor_cores: the instruction that multiplies.
        tma_loads, tma_stores: whether it copies through tensor descriptors.
        diagnostics: what the assembler remarks on, such as serialized products (``C7510``).
        code: for the machine.
    """

    registers: int
    spilled: int
    shared: int
    tensor_cores: str
    tma_loads: bool
    tma_stores: bool
    diagnostics: tuple[str, ...]
    code: MachineCode


def templates_in(code: str) -> dict[str, str]:
    """The sources of the kernels that come from templates, by name."""
    return {name: source for _, name, source in _KERNEL.findall(code) if "_tem_" in name}


def compile_templates(code: str, capability: int) -> dict[str, Compiled]:
    """Every template's kernel in an output code."""
    return {name: _compile(name, source, capability) for name, source in templates_in(code).items()}


class _CompiledError(Exception):
    """Ends Inductor's compilation before it asks the device to load the kernel."""

    def __init__(self, kernel: Any):
        super().__init__()
        self.kernel = kernel


def _compile(name: str, source: str, capability: int) -> Compiled:
    def compile_and_stop(*arguments: Any, **options: Any) -> Any:
        raise _CompiledError(original(*arguments, **options))

    original = triton.compile
    said = io.StringIO()
    with (
        fake_cuda(capability),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
        mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True),
        mock.patch.object(triton.knobs.compilation, "always_compile", True),
        contextlib.redirect_stdout(said),
    ):
        tuner = getattr(_module_of(source), name)
        (config,) = tuner.configs
        with mock.patch.object(triton, "compile", compile_and_stop):
            try:
                with mock.patch("torch._inductor.runtime.triton_heuristics.log"):
                    tuner._precompile_config(config)
            except _CompiledError as done:
                kernel = done.kernel
    return _read(kernel, said.getvalue())


def _module_of(source: str) -> Any:
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(source)
    path = Path(file.name)
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # Triton reads the text of the function when it compiles it.
        for value in vars(module).values():
            _ = getattr(getattr(value, "fn", None), "src", None)
        return module
    finally:
        path.unlink()


def _read(kernel: Any, said: str) -> Compiled:
    def number(pattern: str) -> int:
        match = re.search(pattern, said)
        assert match is not None, said
        return int(match.group(1))

    ptx = kernel.asm["ptx"]
    instructions = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
    return Compiled(
        registers=number(r"Used (\d+) registers"),
        spilled=number(r"(\d+) bytes spill stores"),
        shared=int(kernel.metadata.shared),
        tensor_cores=next((each for each in instructions if each in ptx), "none"),
        tma_loads="cp.async.bulk.tensor.2d.shared" in ptx,
        tma_stores="cp.async.bulk.tensor.2d.global" in ptx,
        diagnostics=tuple(sorted(set(re.findall(r"\(C7\d+\)[^\n]*", said)))),
        code=MachineCode.read(kernel.asm["cubin"]),
    )
