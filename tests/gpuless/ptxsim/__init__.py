"""Run a compiled Triton kernel's PTX on the CPU, with the checks that a GPU does not make.

Triton's interpreter runs the Python source. This runs the machine-level program that the compiler
made of it: vector widths, shuffles, shared memory, predicates and alignment assumptions included.
It needs numpy, torch and triton (3.6 or newer); no GPU and no CUDA.

    from ptxsim import launches, simulate
    stats = simulate(kernel, grid, x, y, n, BLOCK=1024, num_warps=4, target=90)  # writes into y
    print(stats.table())
    with launches(target=90) as record:          # or: every kernel[grid](...) inside runs here
        my_package.rms_norm_forward(x, w)

Checked while it runs: every global access lies inside its tensor's storage and is aligned to its
width; shared accesses lie inside the allocation; every warp reaches every barrier; there is no race
(two warps of a block with no barrier between, or two blocks, meet at the same bytes and one of them
writes). Counted: for each tensor the requests, bytes asked for, 32-byte sectors moved (what
coalescing really costs) and distinct sectors (the least DRAM traffic); bank conflicts in shared
memory; executed warp instructions by class.

Arguments are specialised as Triton's launcher does it: pointers and integers divisible by 16 are
marked so, integers equal to 1 become constants. A tensor whose data_ptr() is not a multiple of 16
is not marked, and its simulated address keeps that misalignment.

Not modelled: tensor cores (mma, wgmma), TMA and mbarriers, time. An opcode that is not known is an
error, never a guess. A register that was never written reads as all ones, NaN in every format.
Approximate instructions (ex2, rsqrt, lg2, tanh, rcp) are computed exactly and rounded, so results
are compared with a tolerance.
"""

from ptxsim.program import SimulationError
from ptxsim.simulate import launches, run_ptx, simulate
from ptxsim.stats import Stats, Traffic

__all__ = ["SimulationError", "Stats", "Traffic", "launches", "run_ptx", "simulate"]
