"""The statistics of a row of logits: one class in one file for each.

To add a statistic, add a file with a subclass of `base.Statistic`, and its example to
`tests/kernels/test_statistics.py`. A file is found by being here.
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_file.name)
