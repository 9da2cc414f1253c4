"""Read by pytest before any test.

Without a GPU, Triton's kernels run in its interpreter (decided when it is imported).
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
