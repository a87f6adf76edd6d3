"""A pytest plugin that runs every n-th test and writes the outcome of each.

The environment variable DEALT is ``number/of/descriptor``: the number of this process, how many
processes there are, and the file descriptor to which it writes a line of JSON for each planned test
and for each outcome.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

FIRST_CHARACTERS = 400


class Dealt:
    def __init__(self, text: str) -> None:
        self.number, self.of, self.descriptor = map(int, text.split("/"))

    def write(self, **line: Any) -> None:
        # A single short write is atomic, so the lines of several processes do not mix.
        os.write(self.descriptor, (json.dumps(line) + "\n").encode()[:4096])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        every, items[:] = list(items), items[self.number :: self.of]
        config.hook.pytest_deselected(items=[item for item in every if item not in items])
        for item in items:
            self.write(test=item.nodeid, outcome="planned")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        why = ""
        if not report.passed:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", None)
            why = str(message or report.longrepr)[:FIRST_CHARACTERS]
        self.write(
            test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), why=why
        )

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            why = str(report.longrepr)[-FIRST_CHARACTERS:]
            self.write(test=report.nodeid, outcome="not collected", seconds=0.0, why=why)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Dealt(os.environ["DEALT"]))
