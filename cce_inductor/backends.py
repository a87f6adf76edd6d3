"""Dynamo backends, for ``torch.compile(model, backend="cce_inductor")`` without `install`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from cce_inductor.deferred.boundary import compile_with_deferral, deferral_for
from cce_inductor.installation import reason_against_inductor
from cce_inductor.operators.fingerprint import tagged
from cce_inductor.operators.with_loss import WithLossPass
from cce_inductor.options import Options
from cce_inductor.reporting.log import publish
from cce_inductor.rewriting.rewrite import rewrite
from cce_inductor.surprise import on_error


def _split(options: dict[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Split options into those of this package and those of Inductor."""
    given = dict(options or {})
    ours = {name: given.pop(name) for name in Options.names() if name in given}
    return Options.create(**ours), given


def cce_inductor(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite the losses of a graph, then compile it with Inductor.

    Args:
        module: the graph that Dynamo captured. It is changed in place.
        example_inputs: its inputs.
        mode: as for `torch.compile` with Inductor.
        options: options of `Options` and of Inductor.

    Raises:
        TypeError, ValueError: an option with a wrong value.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    ours, inductor_options = _split(options)
    patches = {**(list_mode_options(mode) if mode else {}), **inductor_options}
    before = patches.get("joint_custom_pre_pass", torch._inductor.config.joint_custom_pre_pass)
    if not isinstance(before, WithLossPass):
        patches["joint_custom_pre_pass"] = WithLossPass(before)
    # Inductor compiles the backward when it first runs, and the key must be right then, too.
    keyed = _with_cache_key(compile_fx_inner, ours)
    compile_keyed = _with_cache_key(compile_fx, ours)

    def compiler(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with torch._inductor.config.patch(patches):
            publish(
                module, rewrite(module, ours, reason_against_inductor(), deferral_for(module)), ours
            )
        return compile_keyed(module, example_inputs, inner_compile=keyed, config_patches=patches)

    with on_error(ours.on_error):
        return compile_with_deferral(compiler, module, example_inputs)


def _with_cache_key(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Return `function` with this package's fingerprint in the compiler's cache keys.

    The option `on_error` is in force while it runs.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        tag = tagged(torch.compiler.config.cache_key_tag, options)
        with torch.compiler.config.patch(cache_key_tag=tag), on_error(options.on_error):
            return function(*args, **kwargs)

    return wrapped


def cce_inductor_eager(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite the losses of a graph, then run it without compiling it, for tests and debugging.

    Args:
        module: the graph that Dynamo captured. It is changed in place.
        example_inputs: not used.
        options: options of `Options`.

    Raises:
        TypeError, ValueError: an option that does not exist or has a wrong value.
    """
    ours, unknown = _split(options)
    Options.create(**unknown)

    def compiler(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        publish(module, rewrite(module, ours, deferral=deferral_for(module)), ours)
        return module.forward

    with on_error(ours.on_error):
        return compile_with_deferral(compiler, module, example_inputs)
