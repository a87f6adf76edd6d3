"""``python -m cce_inductor patterns``."""

import subprocess
import sys

from cce_inductor.__main__ import listing, spelled
from cce_inductor.patterns.language.tables import TABLES


def test_every_rule_is_listed_with_its_spellings():
    lines = "\n".join(listing())
    joined = " ".join(lines.split())
    for table in TABLES:
        for spelling, _ in table.items():
            assert spelled(spelling) in joined


def test_spellings():
    text = "\n".join(listing())
    assert "torch.nn.functional.cross_entropy" in text
    assert ".masked" not in text  # pointwise functions need no rule
    assert "torch.special.log_softmax" in text
    assert "torch.nn.functional.multi_margin_loss" in text  # has no rule
    assert "reductions/logsumexp.py: ``torch.logsumexp`` over the vocabulary" in text


def test_command():
    command = [sys.executable, "-m", "cce_inductor", "patterns"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "\n".join(listing()).strip()


def test_unknown_command():
    command = [sys.executable, "-m", "cce_inductor", "pattern"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
