"""install() and uninstall(): the pass in `torch._inductor.config.pre_grad_custom_pass`.

Inductor runs it on the graph that Dynamo captured, before autograd. Three settings change, for
every thread, and what `torch.compile` calls to compile a graph with Inductor is wrapped, so that
logits that a graph does not return can be deferred. `uninstall` puts all of it back:

- ``pre_grad_custom_pass``: this pass, which first runs the ones that were there;
- ``pre_grad_pass_timing`` (from torch 2.13): before the cache lookup, so that a compilation that
  a cache answers is reported like any other; its key is then that of the rewritten graph;
- ``torch.compiler.config.cache_key_tag``: with the fingerprint of this package appended, because
  cache keys do not see the sources of operators.

Deferred logits may outlive it: what `deferred.boundary` told Dynamo of them stays.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from cce_inductor import surprise
from cce_inductor.deferred.boundary import compile_with_deferral, deferral_for
from cce_inductor.operators.fingerprint import fingerprint, tagged
from cce_inductor.options import Options, is_in_force, options_in_force, put_in_force
from cce_inductor.reporting import reasons
from cce_inductor.reporting.log import publish
from cce_inductor.reporting.notice import speak_at_exit
from cce_inductor.reporting.reasons import Reason
from cce_inductor.rewriting.rewrite import rewrite
from cce_inductor.torch_internals.patches import set_config, wrap_inductor
from cce_inductor.torch_internals.versions import (
    may_choose_pass_timing,
    pass_list,
    passes_run_always,
)

_log = logging.getLogger(__name__)


class RewritePass(CustomGraphPass):
    """The passes that were there before, then the rewrite; only the former once uninstalled."""

    def __init__(self, options: Options, previous: Any):
        self.options: Options | None = options
        self.previous = pass_list(previous)

    def __call__(self, graph: Graph) -> None:
        for previous in self.previous:
            previous(graph)
        module = graph.owning_module
        if self.options is not None and isinstance(module, GraphModule):
            deferral = deferral_for(module)
            if deferral is not None and not passes_run_always():
                deferral.why_not = reasons.CACHE_MAY_ANSWER
            reports = rewrite(module, self.options, reason_against_inductor(), deferral)
            publish(module, reports, self.options)

    def uuid(self) -> Any | None:
        """None when a previous pass has none: then only it knows what it depends on."""
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.previous]
        if None in uuids:
            return None
        return (fingerprint(self.options) if self.options is not None else "", *uuids)

    def __deepcopy__(self, memo: dict[int, Any]) -> RewritePass:
        """Itself: threads copy option values, and `uninstall` must reach every one of them."""
        return self


def reason_against_inductor() -> Reason | None:
    """Why this compilation by Inductor cannot use the operators, None if it can."""
    from torch._inductor.virtualized import V

    if torch._inductor.config.cpp_wrapper or V.aot_compilation:
        return reasons.NO_PYTHON_IN_CPP_WRAPPER
    return None


class _Installation:
    def __init__(self, options: Options):
        inductor = torch._inductor.config
        self.rewrite_pass = RewritePass(options, inductor.pre_grad_custom_pass)
        self.user_tag: str = torch.compiler.config.cache_key_tag
        self.undo: list[Callable[[], None]] = [
            set_config(inductor, "pre_grad_custom_pass", self.rewrite_pass)
        ]
        if may_choose_pass_timing(inductor):
            self.undo.append(set_config(inductor, "pre_grad_pass_timing", "early"))
        unwrap = wrap_inductor(compile_with_deferral)
        if unwrap is None:
            _log.warning(
                "cce_inductor found no place in this version of torch to defer logits that a "
                "compiled function returns: they are stored, and their losses left alone."
            )
        else:
            self.undo.append(unwrap)
        self.undo_options: list[Callable[[], None]] = []
        self.set_options(options)

    def set_options(self, options: Options) -> None:
        self._forget_options()
        self.rewrite_pass.options = options
        put_in_force(options)
        tag = tagged(self.user_tag, options)
        self.undo_options = [
            set_config(torch.compiler.config, "cache_key_tag", tag),
            surprise.set_default(options.on_error),
        ]

    def _forget_options(self) -> None:
        for undo in self.undo_options:
            undo()

    def remove(self) -> None:
        self.rewrite_pass.options = None
        put_in_force(None)
        self._forget_options()
        if torch._inductor.config.pre_grad_custom_pass is not self.rewrite_pass:
            _log.warning(
                "torch._inductor.config.pre_grad_custom_pass was changed after "
                "cce_inductor.install(); it is put back to what it was before install()."
            )
        for undo in reversed(self.undo):
            undo()


_lock = threading.RLock()
_installation: _Installation | None = None


def install(**options: Any) -> None:
    """Makes every later `torch.compile` with Inductor rewrite its losses.

    Functions that are compiled already stay as they are. Calling it again replaces the options.
    If it is still in force when the process ends, and nothing was rewritten, a warning says so.

    Args:
        **options: see `Options`.

    Raises:
        TypeError, ValueError: an option that does not exist or has a wrong value.
    """
    global _installation
    chosen = Options.create(**options)
    with _lock:
        if _installation is None:
            _installation = _Installation(chosen)
            speak_at_exit()
        else:
            _installation.set_options(chosen)


def uninstall() -> None:
    """Puts back what `install` changed; does nothing if it was not called."""
    global _installation
    with _lock:
        if _installation is not None:
            _installation.remove()
            _installation = None


def is_installed() -> bool:
    """Whether `install` is in force."""
    return is_in_force()


@contextlib.contextmanager
def installed(**options: Any) -> Iterator[None]:
    """`install` for a with-block; afterwards things are as before, also if it was installed."""
    with _lock:
        before = options_in_force() if is_in_force() else None
    install(**options)
    try:
        yield
    finally:
        with _lock:
            if before is None:
                uninstall()
            elif _installation is not None:
                _installation.set_options(before)
