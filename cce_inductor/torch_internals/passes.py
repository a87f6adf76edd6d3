"""Passes that are added to those in an option of Inductor."""

from __future__ import annotations

import abc
from typing import Any, Self

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from cce_inductor.torch_internals.versions import pass_list


class AddedPass(CustomGraphPass):
    """Runs the passes that were there before, then its own.

    Args:
        previous: the value of the option that the pass replaces: None, a pass or several.
    """

    def __init__(self, previous: Any):
        self.previous = pass_list(previous)

    def __call__(self, graph: Graph) -> None:
        for previous in self.previous:
            previous(graph)
        self.run(graph)

    @abc.abstractmethod
    def run(self, graph: Graph) -> None:
        """Run the pass itself."""

    @abc.abstractmethod
    def key(self) -> str:
        """Return what the pass itself adds to the keys of caches."""

    def uuid(self) -> Any | None:
        """Return a cache key, None if a previous pass has none: what it depends on is unknown."""
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.previous]
        return None if None in uuids else (self.key(), *uuids)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the pass itself: threads copy options, and `uninstall` must reach every copy."""
        return self
