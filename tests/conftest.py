import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

# The tensors of the tests are small: threads would spend their time waiting for each other.
torch.set_num_threads(1)
