"""Inside the process that `fakegpu` starts: runs a module or script, then prints the counts.

Nothing is computed, so all that comes from the device is zero or left over: cuDNN is not there
(SDPA takes its other backends), and sampled token ids are not ids, so tiktoken shows numbers.
"""

import atexit
import ctypes
import runpy
import sys

import torch

NAMES = (
    "stream syncs",
    "event syncs",
    "device syncs",
    "copies to the host",
    "copies to the device",
    "copies on the device",
    "ATen launches",
    "Triton launches",
    "memsets",
    "GEMMs",
    "graph launches",
    "allocations",
)


def counts() -> dict[str, int]:
    """What has been asked of the GPU so far; torch.fakegpu_counts() in the program under test."""
    found = (ctypes.c_long * 16)()
    library.fakegpu_counts(found)
    return dict(zip(NAMES, found, strict=False))


library = ctypes.CDLL(None)
torch.fakegpu_counts = counts
torch.backends.cuda.enable_cudnn_sdp(False)
try:
    import tiktoken
except ImportError:
    pass
else:
    tiktoken.Encoding.decode = lambda self, ids, **options: " ".join(map(str, ids))
atexit.register(lambda: print("fakegpu:", counts(), file=sys.stderr))

sys.argv = sys.argv[1:]
if sys.argv[:1] == ["-m"]:
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
