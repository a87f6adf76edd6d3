"""Compiles the kernels in Inductor's output code for a device that is not there."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import tempfile
import types
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

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
        tma: whether it copies through tensor descriptors.
    """

    registers: int
    spilled: int
    shared: int
    tensor_cores: str
    tma: bool


def templates_in(code: str) -> dict[str, str]:
    """The sources of the kernels that come from templates, by name."""
    return {name: source for _, name, source in _KERNEL.findall(code) if "_tem_" in name}


def compile_templates(code: str, capability: int) -> dict[str, Compiled]:
    """Every template's kernel in an output code."""
    return {name: _compile(name, source, capability) for name, source in templates_in(code).items()}


class _Heuristics:
    """Stands for Inductor's: keeps the function and what is said of it."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **options: (
            lambda function: types.SimpleNamespace(function=function, options=options)
        )


def _compile(name: str, source: str, capability: int) -> Compiled:
    kernel = getattr(_module_of(source), name)
    options = kernel.options
    meta = options["triton_meta"]
    signature = dict(meta["signature"])
    names = list(signature)
    constants = {}
    for argument, value in meta["constants"].items():
        constants[(names.index(argument),)] = value
        signature[argument] = "constexpr"
    compiled = triton.compile(
        ASTSource(
            kernel.function,
            signature=signature,
            constexprs=constants,
            attrs=meta["configs"][0],
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": options["num_warps"], "num_stages": options["num_stages"]},
    )
    return _read(compiled, capability)


def _module_of(source: str) -> Any:
    source = source.replace("triton_helpers, triton_heuristics", "triton_helpers")
    source = source.replace("triton_helpers.set_driver_to_gpu()", "")
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(source)
    path = Path(file.name)
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.__dict__["triton_heuristics"] = _Heuristics()
        spec.loader.exec_module(module)
        # Triton reads the text of the function when it compiles it.
        for value in vars(module).values():
            if isinstance(value, types.SimpleNamespace):
                _ = value.function.src
        return module
    finally:
        path.unlink()


def _read(compiled: Any, capability: int) -> Compiled:
    ptx = compiled.asm["ptx"]
    found = re.search(r"^\.target\s+(\w+)", ptx, re.M)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        said = subprocess.run(
            [
                get_ptxas(capability).path,
                "-v",
                f"--gpu-name={found.group(1)}",
                str(path),
                "-o",
                str(path.with_suffix(".cubin")),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr

    def number(pattern: str) -> int:
        match = re.search(pattern, said)
        assert match is not None, said
        return int(match.group(1))

    instructions = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
    return Compiled(
        registers=number(r"Used (\d+) registers"),
        spilled=number(r"(\d+) bytes spill stores"),
        shared=int(compiled.metadata.shared),
        tensor_cores=next((each for each in instructions if each in ptx), "none"),
        tma="cp.async.bulk.tensor" in ptx,
    )
