"""The method with a sampled gradient, which several benchmarks measure; see docs/sampling.md."""

from __future__ import annotations

import argparse
from fractions import Fraction

SAMPLED = "cce_inductor_sampled"
RECOMMENDED = Fraction(1, 32)  # of `sample_below`


def add_sample_below(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--sample-below``."""
    parser.add_argument(
        "--sample-below",
        type=lambda text: float(Fraction(text)),
        default=float(RECOMMENDED),
        help=f"of {SAMPLED}; may be a fraction like 1/64",
    )
