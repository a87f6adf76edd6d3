import sys
from pathlib import Path

import torch

from cce_inductor import surprise
from cce_inductor.options import Options

sys.path.insert(0, str(Path(__file__).parent))

# With small tensors, threads would mostly wait for each other.
torch.set_num_threads(1)

# An unexpected exception in the package fails the test: `on_error` defaults to "raise", with and
# without options.
Options.__init__.__defaults__ = tuple(
    "raise" if name == "on_error" else default
    for name, default in zip(Options.names(), Options.__init__.__defaults__, strict=True)
)
surprise.set_default("raise")
