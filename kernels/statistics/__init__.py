"""The statistics of a row of logits: one class in one file for each.

To add a statistic, add a file with a subclass of `base.Statistic`, and a program that uses it to
`STATISTICS` in `tests/cases.py`, which all kernels are tested with. Every file here is imported.
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_file.name)
