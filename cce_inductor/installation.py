"""install() and uninstall(): the pass in `torch._inductor.config.pre_grad_custom_pass`.

Inductor runs the pass on the graph that Dynamo captured, before autograd. `install` changes four
settings for every thread:

- ``pre_grad_custom_pass`` becomes this pass, which first runs the passes that were there.
- ``joint_custom_pre_pass`` becomes that of `operators.with_loss`, likewise.
- ``pre_grad_pass_timing`` (from torch 2.13) becomes "early", before the cache lookup. A compilation
  that a cache answers is then reported like any other, and its key is that of the rewritten graph.
- ``torch.compiler.config.cache_key_tag`` gets a fingerprint of the options appended. That of
  the sources was appended when `operators.ops` was imported.

It also wraps the function with which `torch.compile` calls Inductor, so that a graph need not
return its logits. `uninstall` restores all of this. What `deferred.boundary` registered with Dynamo
stays, because deferred logits may still be alive.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from cce_inductor import surprise
from cce_inductor.deferred.boundary import compile_with_deferral, deferral_for
from cce_inductor.heads import defer_all
from cce_inductor.operators.fingerprint import fingerprint, tagged
from cce_inductor.operators.with_loss import WithLossPass
from cce_inductor.options import Options, is_in_force, options_in_force, put_in_force
from cce_inductor.reporting import reasons
from cce_inductor.reporting.log import publish
from cce_inductor.reporting.notice import warn_at_exit
from cce_inductor.reporting.reasons import Reason
from cce_inductor.rewriting.rewrite import rewrite
from cce_inductor.torch_internals.passes import AddedPass
from cce_inductor.torch_internals.patches import set_config, wrap_inductor
from cce_inductor.torch_internals.versions import may_choose_pass_timing, passes_run_always

_log = logging.getLogger(__name__)


class RewritePass(AddedPass):
    """Runs the rewrite while `install` is in force."""

    def __init__(self, options: Options, previous: Any):
        super().__init__(previous)
        self.options: Options | None = options

    def run(self, graph: Graph) -> None:
        module = graph.owning_module
        if self.options is not None and isinstance(module, GraphModule):
            deferral = deferral_for(module)
            if deferral is not None and not passes_run_always():
                deferral.why_not = reasons.CACHE_MAY_ANSWER
            reports = rewrite(module, self.options, reason_against_inductor(), deferral)
            publish(module, reports, self.options)

    def key(self) -> str:
        return fingerprint(self.options) if self.options is not None else ""


def reason_against_inductor() -> Reason | None:
    """Return why this compilation by Inductor cannot use the operators, None if it can."""
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
            set_config(inductor, "pre_grad_custom_pass", self.rewrite_pass),
            set_config(
                inductor, "joint_custom_pre_pass", WithLossPass(inductor.joint_custom_pre_pass)
            ),
        ]
        if may_choose_pass_timing(inductor):
            self.undo.append(set_config(inductor, "pre_grad_pass_timing", "early"))
        unwrap = wrap_inductor(compile_with_deferral)
        if unwrap is None:
            _log.warning(
                "cce_inductor cannot defer the logits that a compiled function returns in this "
                "version of torch: they are stored, and their losses are left alone."
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
        if options.eager_heads:
            self.undo_options.append(defer_all())

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
                "cce_inductor.install(); it is restored to its value before install()."
            )
        for undo in reversed(self.undo):
            undo()


_lock = threading.RLock()
_installation: _Installation | None = None


def install(**options: Any) -> None:
    """Make every later compilation of `torch.compile` with Inductor rewrite its losses.

    Functions that are already compiled stay as they are. A second call replaces the options. If
    nothing was rewritten by the end of the process, a warning says so.

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
            warn_at_exit()
        else:
            _installation.set_options(chosen)


def uninstall() -> None:
    """Restore what `install` changed. Does nothing if it was not called."""
    global _installation
    with _lock:
        if _installation is not None:
            _installation.remove()
            _installation = None


def is_installed() -> bool:
    """Return whether `install` is in force."""
    return is_in_force()


@contextlib.contextmanager
def installed(**options: Any) -> Iterator[None]:
    """Install for a with-block. Afterwards the installation is as it was before."""
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
