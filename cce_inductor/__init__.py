"""Cut Cross-Entropy for `torch.compile`: linear -> cross_entropy without storing the logits.

    import cce_inductor
    cce_inductor.install()      # before torch.compile; the model stays as it is

See `install`, `explain`, `reports` and `linear_cross_entropy`.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deferred.stale import StaleLogitsError
    from .deferred.tensor import DeferredLogits
    from .explanation import Explanation, explain
    from .functional import linear_cross_entropy
    from .hook import install, installed, is_installed, uninstall
    from .options import Options
    from .report import LossReport, clear_reports, reports

__version__ = "0.1.0"


class _BesideThisFolder:
    """Finds `cce_inductor.kernels` and `cce_inductor.patterns` in a clone, where their folders lie
    beside this one. (To add the clone to ``__path__`` would make this package its own child.)"""

    root = Path(__file__).parents[1]

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, folder = name.rpartition(".")
        if package != __name__ or folder not in ("kernels", "patterns"):
            return None
        return spec_from_file_location(name, cls.root / folder / "__init__.py")


if not (Path(__file__).parent / "kernels").is_dir():
    sys.meta_path.append(_BesideThisFolder)

# Imported on first use: the compiler's modules take a second that `import torch` does not.
_HOME = {
    "DeferredLogits": "deferred.tensor",
    "Explanation": "explanation",
    "LossReport": "report",
    "Options": "options",
    "StaleLogitsError": "deferred.stale",
    "clear_reports": "report",
    "explain": "explanation",
    "install": "hook",
    "installed": "hook",
    "is_installed": "hook",
    "linear_cross_entropy": "functional",
    "reports": "report",
    "uninstall": "hook",
}

__all__ = [
    "DeferredLogits",
    "Explanation",
    "LossReport",
    "Options",
    "StaleLogitsError",
    "clear_reports",
    "explain",
    "install",
    "installed",
    "is_installed",
    "linear_cross_entropy",
    "reports",
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
