"""Which code makes a call: what a call means can depend on that.

PyTorch has no interface for these questions, so each is answered from evidence: a frame of the
stack, the name of an autograd node, the text of an error. The module is in this package
because packages above and below the pass use it (`deferred`, `recipe.sharded`, `reporting`), and
because the evidence is private to PyTorch.

| question | evidence, the same in torch 2.11 to 2.15 |
|---|---|
| `in_torch` | the file is below the folder of `torch` |
| `users_frame` | the innermost frame outside of `torch` and of this package |
| `is_torch_asking` | the innermost frame outside of this package is in `torch` |
| `is_autograd_asking` | that frame is in ``torch.autograd``, or the thread is autograd's |
| `is_compiler_asking` | that frame is in a folder of the compiler, or an expression it evaluates |
| `is_tracing_transform` | functorch has an interpreter on its stack |
| `is_about_memory` | the text of the error |
| `guarded_dictionaries` | the frame of ``OutputGraph.call_user_compiler``, and its guards |
| `is_whole_graph` | DistributedDataParallel's optimizer is off, and Dynamo has marked the module |
| `ends_in_break` | Dynamo's mark on the module |
| `frees_after_forward` | the frame of ``FullyShardedDataParallel.forward`` (FSDP1) |

`tests/deferred/test_callers.py` has a test for each.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_AUTOGRAD = f"{_TORCH}autograd{os.sep}"
_PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"
_COMPILER = (
    *(
        f"{_TORCH}{folder}{os.sep}"
        for folder in ("_dynamo", "_functorch", "_inductor", "_subclasses", "fx")
    ),
    f"{_TORCH}_guards.py",
)
_DISABLE = f"{_TORCH}_dynamo{os.sep}eval_frame.py"
"""``torch._dynamo.disable`` puts a frame of this file around what it decorates."""


def in_torch(file: str) -> bool:
    """Whether a file is part of PyTorch."""
    return file.startswith(_TORCH)


def users_frame() -> FrameType:
    """Return the innermost frame that is neither in PyTorch nor in this package."""
    return _innermost(lambda frame: not _file(frame).startswith((_TORCH, _PACKAGE)))


def is_torch_asking() -> bool:
    """Whether a function of PyTorch has called this package, rather than the user's code."""
    return in_torch(_file(_asking_frame()))


def is_autograd_asking() -> bool:
    """Whether a node of a backward has called this package, rather than a hook."""
    return _file(_asking_frame()).startswith((_AUTOGRAD, _DISABLE))


def is_compiler_asking() -> bool:
    """Whether PyTorch's compiler has called this package.

    The compiler looks at tensors to describe them. It neither changes them nor registers hooks
    on them.
    """
    frame = _asking_frame()
    if _is_expression(frame.f_code) and frame.f_back is not None:
        # Dynamo evaluates the name of an input, "L['logits'].data". The code of `python -c` and of
        # `exec` has the same file name; there Dynamo is not the caller.
        frame = frame.f_back
    return _file(frame).startswith(_COMPILER)


def is_tracing_transform() -> bool:
    """Whether a transform of `torch.func` (grad, vmap) is in progress."""
    return torch._C._functorch.peek_interpreter_stack() is not None


_ABOUT_MEMORY = (
    "its data is not allocated yet",
    "Cannot copy out of meta tensor",
    "Cannot access data pointer",
    "Attempted to access the data pointer on an invalid python storage",
)


def is_about_memory(error: Exception) -> bool:
    """Whether a function of PyTorch failed because it read the memory of a tensor that has none."""
    return any(text in str(error) for text in _ABOUT_MEMORY)


def guarded_dictionaries() -> Iterator[dict[Any, Any]]:
    """Yield the dictionaries that Dynamo guards in the function that it is about to compile."""
    from torch._dynamo.output_graph import OutputGraph

    code = inspect.unwrap(OutputGraph.call_user_compiler).__code__
    graph = next((frame.f_locals["self"] for frame in _frames() if frame.f_code is code), None)
    if graph is None:
        return
    scope = {"L": graph.local_scope, "G": graph.global_scope}
    for guard in list(graph.guards):
        try:
            value = eval(guard.name, scope)
        except Exception:  # some names need Dynamo's own functions
            continue
        if isinstance(value, dict):
            yield value


def is_whole_graph(module: torch.fx.GraphModule) -> bool:
    """Whether a graph is all that Dynamo captured.

    Under DistributedDataParallel, Dynamo splits it into parts, which receive each other's results
    without guards on them.
    """
    context = torch._guards.TracingContext.try_get()
    return getattr(context, "ddp_optimizer_ctx", None) is None and hasattr(
        module, "compile_subgraph_reason"
    )


def ends_in_break(module: torch.fx.GraphModule) -> bool:
    """Whether a graph break follows a graph, rather than the end of the user's function."""
    reason = getattr(module, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def frees_after_forward(flat_parameter: Any) -> bool:
    """Whether FSDP1 frees a parameter after the forward of its unit.

    Only the unit knows. The only reference to it is in the frame of its running forward.

    Args:
        flat_parameter: the gathered parameter that the unit's parameters are views of.

    Returns:
        True also if the unit is not found.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._flat_param import RESHARD_AFTER_FORWARD_HANDLE_STRATEGIES

    for frame in _frames():
        if frame.f_code is FullyShardedDataParallel.forward.__code__:
            unit = frame.f_locals["self"]
            if unit._handle is not None and unit._handle.flat_param is flat_parameter:
                strategy = unit._handle._sharding_strategy
                return not unit._is_root and strategy in RESHARD_AFTER_FORWARD_HANDLE_STRATEGIES
    return True


def _asking_frame() -> FrameType:
    return _innermost(
        lambda frame: not _file(frame).startswith(_PACKAGE) and _file(frame) != _DISABLE
    )


def _innermost(wanted: Callable[[FrameType], bool]) -> FrameType:
    """Return the innermost wanted frame, the outermost one if there is none."""
    frame = sys._getframe()
    for frame in _frames():
        if wanted(frame):
            break
    return frame


def _frames() -> Iterator[FrameType]:
    """Yield the frames of the stack, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename


def _is_expression(code: CodeType) -> bool:
    """Whether a string is being evaluated: by `eval`, `exec` or ``python -c``."""
    return (code.co_filename, code.co_name) == ("<string>", "<module>")
