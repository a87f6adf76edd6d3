"""The statistics of a row of logits: one class in one file for each.

To add a statistic, add a file with a subclass of `base.Statistic`. Then add a program that uses it
to `STATISTICS` in `tests/cases.py`, with which all kernels are tested. Every file here is imported.
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_file.name)
