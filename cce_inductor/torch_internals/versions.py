"""Differences between the supported versions of torch (2.11 to 2.15), by feature.

No function compares version numbers. Each looks for what it needs.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import torch


def pass_list(value: Any) -> list[Any]:
    """Return the passes in a custom-pass option: none, one, or (from 2.13) several."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def may_choose_pass_timing(inductor_config: ModuleType) -> bool:
    """Whether ``pre_grad_pass_timing`` (from 2.13) exists and the user has not set it.

    It says whether custom pre-grad passes run before or after the cache lookup. Before 2.13 they
    always run.
    """
    return getattr(inductor_config, "pre_grad_pass_timing", None) == "default"


def modification_takes(argument: str) -> bool:
    """Whether a Triton template's ``modification`` has an argument.

    ``input_shapes`` and ``input_dtypes`` came with 2.13.
    """
    from torch._inductor.select_algorithm import TritonTemplateKernel

    return argument in inspect.signature(TritonTemplateKernel.modification).parameters


def triton_template(name: str, grid: Any, source: str) -> Any:
    """Return a `TritonTemplate` that does not change its inputs' layout (an option from 2.12).

    Inductor keeps every template for good and allows no two of one name, so a template that exists
    is returned again.
    """
    from torch._inductor.select_algorithm import TritonTemplate

    if name in TritonTemplate.all_templates:
        return TritonTemplate.all_templates[name]
    options = {}
    if "always_freeze_layout" in inspect.signature(TritonTemplate.__init__).parameters:
        options["always_freeze_layout"] = True
    return TritonTemplate(name=name, grid=grid, source=source, **options)


def selected(result: Any) -> Any:
    """Return the node from the result of `autotune_select_algorithm`, a tuple from 2.12."""
    return result[0] if isinstance(result, tuple) else result


def size_hints(sizes: Any) -> list[int]:
    """Return numbers for the sizes of a tensor in Inductor's IR (renamed in 2.12)."""
    from torch._inductor.virtualized import V

    sizevars = V.graph.sizevars
    hints = getattr(sizevars, "optimization_hints", None) or sizevars.size_hints
    return list(hints(sizes))


def saves_compiled() -> bool:
    """Whether the function that a backend returns is saved, for another process to load."""
    import torch._functorch.config as functorch_config

    return bool(
        getattr(torch._dynamo.config, "caching_precompile", False)
        or getattr(functorch_config, "bundled_autograd_cache", False)
    )


def passes_run_always() -> bool:
    """Whether custom pre-grad passes run even if a cache has the compiled graph.

    From 2.13, ``pre_grad_pass_timing`` can prevent it.
    """
    import torch._inductor.codecache

    timing = getattr(torch._inductor.codecache, "resolve_pre_grad_pass_timing", None)
    return timing is None or timing() == "early"


def backward_takes_memory() -> bool:
    """Whether a compiled backward may write its results into tensors that the forward saved.

    A graph whose backward is asked for with ``retain_graph=True`` keeps them and makes copies.
    """
    import torch._functorch.config as functorch_config

    return bool(functorch_config.donated_buffer)
