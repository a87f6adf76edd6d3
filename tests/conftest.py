import sys
from pathlib import Path

import torch

from cce_inductor import surprise
from cce_inductor.options import Options

sys.path.insert(0, str(Path(__file__).parent))

# The tensors of the tests are small: threads would spend their time waiting for each other.
torch.set_num_threads(1)

# An unexpected exception in the package is a failing test: options that do not name `on_error` have
# "raise", and so has what runs without any.
Options.__init__.__defaults__ = tuple(
    "raise" if name == "on_error" else default
    for name, default in zip(Options.names(), Options.__init__.__defaults__, strict=True)
)
surprise.set_default("raise")
