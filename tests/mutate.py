"""Does a test fail when a kernel is wrong? Plants one fault at a time in a copy of the project and
runs the kernel tests there.

    python tests/mutate.py [--only NAME] [--jobs 2]

Each fault is one textual change of one kernel file, which must match exactly once. A fault that no
test notices survives; the run fails when more than one in 20 does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RMS, ROPE, SWI, CE, UPD = (
    f"triton/{name}" for name in ("rms_norm", "rope", "swiglu", "cross_entropy", "updates")
)
HEAD, LIN, NORM, LINEAR, EMB = (
    "head_chunks",
    "linear_cross_entropy",
    "rms_norm",
    "linear",
    "embedding",
)

# (file, fault, the code, what it becomes)
FAULTS = [
    (RMS, "eps dropped", "* (1.0 / D) + EPS)", "* (1.0 / D))"),
    (RMS, "mean over the padded width", "tl.sum(v * v, 1) * (1.0 / D)", "tl.sum(v * v, 1) * (1.0 / BLOCK)"),
    (RMS, "weight forgotten in the backward", "        g = g * w\n", ""),
    (RMS, "no projection", "g = (g - xhat * c) * r", "g = g * r"),
    (RMS, "rstd forgotten in dx", "g = (g - xhat * c) * r", "g = g - xhat * c"),
    (RMS, "the sum's gradient dropped", "        if HAS_SUM:\n            g += tl", "        if False:\n            g += tl"),
    (RMS, "dw of x instead of x normalised", "dw += tl.sum(g * xhat, 0)[None, :]", "dw += tl.sum(g * v, 0)[None, :]"),
    (RMS, "last partial sum skipped", "range(0, PARTIALS, ROWS)", "range(0, PARTIALS - 1, ROWS)"),
    (RMS, "last tile skipped", "range(p, tl.cdiv(M, ROWS), PARTIALS)", "range(p, M // ROWS, PARTIALS)"),
    (RMS, "sum not rounded before the norm", "        v = rounded.to(tl.float32)\n", ""),
    (RMS, "upstream stride taken for x's", "g = tl.load(dy + row * DY_STRIDE", "g = tl.load(dy + row * X_STRIDE"),
    (RMS, "row mask off by one", "    mask = (row < M) & (j < D)\n    v =", "    mask = (row < M - 1) & (j < D)\n    v ="),
    (RMS, "rows counted in 32 bits", "i = tl.program_id(0).to(tl.int64) * ROWS", "i = tl.program_id(0) * ROWS"),
    (ROPE, "wrong sign of sin", "(q1 * c - q2 * s)", "(q1 * c + q2 * s)"),
    (ROPE, "k rotated the other way", "(k2 * c + k1 * s)", "(k2 * c - k1 * s)"),
    (ROPE, "backward not inverse", "    if INVERSE:\n        s = -s\n", ""),
    (ROPE, "positions ignored", "HAS_POSITIONS:\n        at = tl", "False:\n        at = tl"),
    (ROPE, "positions not bounded above", " & (everywhere < N_POSITIONS)", ""),
    (ROPE, "batch stride forgotten", "q + b * q_batch + t * q_token", "q + t * q_token"),
    (ROPE, "k's heads counted as q's", "g * K_HEAD + j", "g * Q_HEAD + j + (H - HKV)"),
    (SWI, "gate and up exchanged", "silu = gate * (1.0 / (1.0 + tl.exp(-gate)))", "silu = up * (1.0 / (1.0 + tl.exp(-up)))"),
    (SWI, "derivative of the sigmoid dropped", "(sigmoid + silu * (1.0 - sigmoid))", "sigmoid"),
    (SWI, "sign in the derivative", "silu * (1.0 - sigmoid))", "silu * (1.0 + sigmoid))"),
    (SWI, "d up without the gate", "(g * silu).to(dgate_up", "(g * sigmoid).to(dgate_up"),
    (SWI, "column mask off by one", "to(tl.float32)\n    # rounded", "to(tl.float32) * (j < F - 1)\n    # rounded"),
    (CE, "rows counted in 32 bits", "    i = tl.program_id(0).to(tl.int64)\n", "    i = tl.program_id(0)\n"),
    (CE, "label gradient missing", "g - upstream * (1.0 - SMOOTHING), g)", "g, g)"),
    (CE, "smoothing forgotten at the label", "g - upstream * (1.0 - SMOOTHING), g)", "g - upstream, g)"),
    (CE, "z-loss always on", "scale = upstream * (1.0 + 2.0 * Z_LOSS * lse)", "scale = upstream * (1.0 + 2e-3 * lse)"),
    (CE, "z-loss not in the gradient", "scale = upstream * (1.0 + 2.0 * Z_LOSS * lse)", "scale = upstream + 0.0 * lse"),
    (CE, "edges not in the sum", "+ tl.sum(tl.exp2(edges * LOG2E - pivot), 0)", ""),
    (CE, "last block skipped", "for k in range(0, bulk, LOSS_STEPS", "for k in range(0, bulk - COLUMNS, LOSS_STEPS"),
    (CE, "last block's gradient skipped", "for k in range(0, bulk, GRAD_STEPS", "for k in range(0, bulk - COLUMNS, GRAD_STEPS"),
    (CE, "running maximum not rescaled", "            s = s * tl.exp2(m - pivot)\n", ""),
    (CE, "padding columns counted", "read = tl.where(counted, VOCAB, 0)", "read = tl.where(counted, WIDTH, 0)"),
    (CE, "ignored rows counted", "counted = target != IGNORE", "counted = target != IGNORE - 1"),
    (CE, "target not bounded above", "valid = (target >= 0) & (target < VOCAB)", "valid = target >= 0"),
    (CE, "soft cap's slope dropped", "        g *= 1.0 - capped * capped\n", "        g *= 1.0\n"),
    (CE, "soft cap not on the target", "        picked = SOFTCAP", "        unused = SOFTCAP"),
    (CE, "upstream gradient ignored", "    if HAS_DLOSS:\n", "    if False:\n"),
    (CE, "minus infinity taken for a pivot", 'pivot = tl.where(larger == float("-inf"), 0.0, larger)', "pivot = larger"),
    (HEAD, "16-bit accumulator", "total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)",
     "total.copy_((total * beta).to(a.dtype) + a @ b)"),
    (HEAD, "weight gradient of the last chunk alone", "first=at.start == 0", "first=True"),
    (HEAD, "last chunk skipped", "for start in range(0, n, size))", "for start in range(0, max(n - size, 1), size))"),
    (LIN, "upstream scales dh only", "(dw * dloss)", "(dw * 1)"),
    (NORM, "the sum's gradient dropped in autograd", "*ctx.saved_tensors, dsum)", "*ctx.saved_tensors, None)"),
    (LINEAR, "gradient of another product", "(dz @ w, gate_up, y is None)", "(dz @ w, -gate_up, y is None)"),
    (EMB, "a tied table's rows forgotten", ".index_add_(0, ids.flatten(), dy.flatten(0, -2))", ""),
    (UPD, "last element skipped", "return t, element, element < size", "return t, element, element < size - 1"),
    (UPD, "a step to leave out taken", "        size = tl.where(tl.load(skip) == 0.0, size, 0)\n", "        size = size\n"),
    (UPD, "last partial sum skipped", "mask=i < count", "mask=i < count - 1"),
    (UPD, "factor not bounded", "tl.where(factor > 1.0, 1.0, factor) * unit", "factor * unit"),
    (UPD, "scale left in the factor", "tl.where(factor > 1.0, 1.0, factor) * unit", "tl.where(factor > 1.0, 1.0, factor)"),
    (UPD, "infinity not found", 'tl.where(norm < float("inf"), 0.0, 1.0)', "0.0"),
    (UPD, "no Nesterov", "u = (g + momentum * (m - g))", "u = m"),
    (UPD, "momentum of what is not clipped", "        g *= tl.load(factor)\n    average = tensor_at(averages, t, ALIGNED) + i\n"
     "    m = tl.load(average, mask=touched, other=0.0)\n    m += (1.0 - momentum)",
     "        g *= 1.0\n    average = tensor_at(averages, t, ALIGNED) + i\n"
     "    m = tl.load(average, mask=touched, other=0.0)\n    m += (1.0 - momentum)"),
    (UPD, "norm of another matrix", "first = tl.program_id(0) - tl.load(", "first = 0 * tl.load("),
    (UPD, "norm of zero not bounded", "tl.where(norm > 1e-7, norm, 1e-7)", "norm"),
    (UPD, "no weight decay", "kept * p - (lr * tl", "p - (lr * tl"),
    (UPD, "one scale for all", "(lr * tl.load(scales + t))", "(lr * tl.load(scales))"),
    (UPD, "one rate for all", "lr = share * tl.load(rates + 2 * t)", "lr = share * tl.load(rates)"),
    (UPD, "second moment not corrected", " / tl.sqrt(one_minus_exp(step * log_beta2))", ""),
    (UPD, "corrections in fp32's rounding", "tl.where(y > -0.5, -y * series, 1.0 - tl.exp(y))", "1.0 - tl.exp(y)"),
]  # fmt: skip
TESTS = {HEAD: LIN, LINEAR: "registration"}  # of the others: the test of their name

# pytest on the copy: an editable installation's finder, which comes before the folder one is in,
# would give the project itself
RUN = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
import os, fastlm, pytest
the_copy = os.path.samefile(os.path.dirname(fastlm.__file__), "fastlm")
sys.exit(pytest.main(sys.argv[1:]) if the_copy else 3)
"""


def survives(fault: tuple[str, str, str, str]) -> bool:
    """Whether the tests of the file still pass with the fault in it."""
    file, name, code, wrong = fault
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("fastlm", "kernels", "tests", "conftest.py", "pyproject.toml"):
            source, target = ROOT / part, copy / part
            if source.is_dir():
                shutil.copytree(
                    source,
                    target,
                    symlinks=True,
                    ignore=shutil.ignore_patterns("__pycache__", "*.so"),
                )
            else:
                shutil.copy(source, target)
        (copy / "train").mkdir()
        path = copy / "kernels" / f"{file}.py"
        text = path.read_text()
        assert text.count(code) == 1, (
            f"{file}, {name}: the code is there {text.count(code)} times, expected once"
        )
        path.write_text(text.replace(code, wrong))
        own = TESTS.get(file, file.removeprefix("triton/"))
        tests = [f"tests/kernels/test_{name}.py" for name in ("large", own)]
        command = [sys.executable, "-c", RUN, "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, check=False
        )
        # 1: tests failed; below 0: the interpreter crashed, on an access out of bounds
        assert done.returncode <= 1, f"{file}, {name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    print(f"{'SURVIVES' if done.returncode == 0 else 'killed'}: {file}: {name}", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name or file contains this")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    chosen = [f for f in FAULTS if args.only in f"{f[0]} {f[1]}"]
    with ThreadPoolExecutor(args.jobs) as pool:
        survivors = sum(pool.map(survives, chosen))
    print(f"{len(chosen) - survivors} of {len(chosen)} faults killed")
    sys.exit(survivors * 20 > len(chosen))


if __name__ == "__main__":
    main()
