"""Cut Cross-Entropy for `torch.compile`: linear -> cross_entropy without storing the logits.

    import cce_inductor
    cce_inductor.install()      # before torch.compile; the model stays as it is

See `install`, `explain`, `reports`, `linear_cross_entropy` and `share_visited`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cce_inductor.deferred.tensor import DeferredLogits
    from cce_inductor.explanation import Explanation, explain
    from cce_inductor.functional import linear_cross_entropy
    from cce_inductor.heads import defer, undefer
    from cce_inductor.installation import install, installed, is_installed, uninstall
    from cce_inductor.kernels.visited import share_visited
    from cce_inductor.options import Options
    from cce_inductor.recipe.stale import StaleLogitsError
    from cce_inductor.reporting.log import clear_reports, reports
    from cce_inductor.reporting.report import LossReport

__version__ = "0.1.0"


# Imported on first use: the compiler's modules take a second that `import torch` does not.
_HOME = {
    "DeferredLogits": "deferred.tensor",
    "Explanation": "explanation",
    "LossReport": "reporting.report",
    "Options": "options",
    "StaleLogitsError": "recipe.stale",
    "clear_reports": "reporting.log",
    "defer": "heads",
    "explain": "explanation",
    "install": "installation",
    "installed": "installation",
    "is_installed": "installation",
    "linear_cross_entropy": "functional",
    "reports": "reporting.log",
    "share_visited": "kernels.visited",
    "undefer": "heads",
    "uninstall": "installation",
}

__all__ = [
    "DeferredLogits",
    "Explanation",
    "LossReport",
    "Options",
    "StaleLogitsError",
    "clear_reports",
    "defer",
    "explain",
    "install",
    "installed",
    "is_installed",
    "linear_cross_entropy",
    "reports",
    "share_visited",
    "undefer",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOME[name]}", __name__)
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
