"""What `make rehearse` runs, as data: commands and what must hold of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One command and what must hold of it.

    command: its first word says what runs: `fastlm` a command of the program, `torchrun` one as the
    only process of torchrun (grouped.py), `peer` a training
    step of another implementation (peers.py), `check` a file of tests, `program` a program of this
    folder, `python` Python itself, `gpu` a part of `make gpu`.
    {root}, {work}, {runs} and {data} are folders. trains: it has training steps, of which none but
    the first may compile anything, and none but the first two wait for the device: the second may
    record CUDA graphs. launches: at most so many kernels a step, matmuls and attention aside.
    graphs: so many CUDA graphs a step. writes: it writes text, so that from the third on a token is
    one graph and one wait for its number. says: what its output must hold. given: its input.
    needs: a package without which the case is left out. measured: a row of the table, nothing
    asserted. device: what the stand-in is.
    """

    name: str
    command: str
    trains: bool = False
    launches: int = 0
    graphs: int = 0
    writes: bool = False
    says: str = ""
    given: str = ""
    needs: str = ""
    measured: bool = False
    device: str = "h100"


SHORT = "--validate-every 0 --checkpoint-every 0"
ROWS = f"fastlm pretrain --shortlist 0 --steps 12 --validation-tokens 8000 {SHORT}"
PACKED = f"--max-len 256 --steps 50 {SHORT} --data python-functions"
SFT = f"fastlm sft {{runs}}/rows --batch-rows 4 {PACKED}"
DPO = f"fastlm dpo {{runs}}/sft --batch-rows 1 {PACKED}"
FULL = (
    "fastlm pretrain --recipe modern-253m --data python-stdlib --steps 4 "
    f"--validation-tokens 2000 {SHORT}"
)
ORDERED = "--deterministic --steps 6"
EVAL = "--data python-stdlib --max-documents 3"
SHORT_PIPELINE = "--pretrain.steps 4 --sft.steps 4 --dpo.steps 4"


def eager_and_compiled(
    name: str, command: str, folder: str, launches: int = 0, graphs: int = 2
) -> list[Case]:
    """A training case both ways; the eager run stays in {runs}/folder, for others to go on from.

    graphs: of the compiled case, a forward and a backward pass for each micro-batch.
    """
    eager = f"{command} --no-compile --out {{runs}}/{folder}"
    compiled = f"{command} --compile --out {{runs}}/{folder}-compiled"
    return [
        Case(f"{name}, eager", eager, trains=True),
        Case(f"{name}, compiled", compiled, trains=True, launches=launches, graphs=graphs),
    ]


MACHINE = [
    Case("doctor", "fastlm doctor", says="H100"),
    Case("kernels", "fastlm kernels --targets sm_90", says="rms_norm"),
]

DATA = [
    Case("data prepare", "fastlm data prepare python-stdlib --out {data}/stdlib", says="documents"),
    Case("data inspect", "fastlm data inspect {data}/stdlib", says="every size and sha256"),
]

PRETRAIN = [
    *eager_and_compiled("pretrain, rows", ROWS, "rows"),
    *eager_and_compiled("pretrain, Muon", f"{ROWS} --optim.name muon", "muon"),
    *eager_and_compiled("pretrain, shortlist", f"{ROWS} --shortlist 3072", "shortlist"),
    *eager_and_compiled(
        "pretrain, isolated documents", f"{ROWS} --isolate-documents --steps 50", "isolated"
    ),
    *eager_and_compiled(
        "pretrain, checkpointed", f"{ROWS} --checkpoint-activations", "checkpointed"
    ),
    *eager_and_compiled(
        "pretrain, accumulated", f"{ROWS} --micro-batch-rows 1", "accumulated", graphs=8
    ),
    *eager_and_compiled("pretrain, deterministic", f"{ROWS} {ORDERED}", "ordered"),
    Case(
        "pretrain, prepared data",
        f"{ROWS} --data {{data}}/stdlib --out {{runs}}/prepared",
        trains=True,
    ),
    Case(
        "pretrain, validating and saving",
        f"{ROWS} --compile --validate-every 4 --checkpoint-every 4 --out {{runs}}/validating",
        says="validation",
    ),
    Case("pretrain, resumed", "fastlm pretrain --resume {runs}/rows --steps 16", trains=True),
    Case(
        "pretrain on an A100, compiled",
        f"{ROWS} --compile --out {{runs}}/a100",
        trains=True,
        graphs=2,
        device="a100",
    ),
    Case(
        "pretrain on a T4, fp16, compiled",
        f"{ROWS} --compile --out {{runs}}/t4",
        trains=True,
        graphs=2,
        device="t4",
    ),
    Case(
        "pretrain on a T4, isolated documents, eager",
        f"{ROWS} --isolate-documents --out {{runs}}/t4-isolated",
        trains=True,
        device="t4",
    ),
]

TUNING = [
    *eager_and_compiled("SFT", SFT, "sft"),
    *eager_and_compiled("SFT, checkpointed", f"{SFT} --checkpoint-activations", "sft-checkpointed"),
    *eager_and_compiled(
        "SFT, accumulated", f"{SFT} --micro-batch-rows 1", "sft-accumulated", graphs=8
    ),
    *eager_and_compiled("SFT, deterministic", f"{SFT} {ORDERED}", "sft-ordered"),
    Case("SFT, resumed", "fastlm sft --resume {runs}/sft --steps 56", trains=True),
    *eager_and_compiled("DPO", DPO, "dpo"),
    *eager_and_compiled("DPO, deterministic", f"{DPO} {ORDERED}", "dpo-ordered"),
    *eager_and_compiled("DPO, prompts apart", f"{DPO} --no-share-prompt", "dpo-apart"),
    *eager_and_compiled("SimPO", f"{DPO} --loss simpo --beta 2", "simpo"),
    Case("DPO, resumed", "fastlm dpo --resume {runs}/dpo --steps 56", trains=True),
]

GROUPED = [
    Case(
        f"{stage}, torchrun, {way}, {kind}",
        f"{command.replace('fastlm', 'torchrun', 1)} --parallel {way} --{option} --steps 6 "
        f"--out {{runs}}/{stage}-{way}-{kind}",
        trains=True,
    )
    for way in ("ddp", "fsdp", "hsdp")
    for stage, command in (("pretrain", f"{ROWS} --optim.name muon"), ("DPO", DPO))
    for kind, option in (("eager", "no-compile"), ("compiled", "compile"))
]

USE = [
    Case("eval", f"fastlm eval {{runs}}/rows {{runs}}/sft {EVAL}", says="window"),
    Case("eval, compiled", f"fastlm eval {{runs}}/rows {EVAL} --compile", says="window"),
    Case("eval, TF32", f"fastlm eval {{runs}}/rows {EVAL} --tf32", says="matmuls in TF32"),
    Case(
        "generate",
        "fastlm generate {runs}/rows --prompt def --tokens 24",
        writes=True,
        says="def",
    ),
    Case(
        "generate, several",
        "fastlm generate {runs}/rows --prompt a --prompt b --stop xyz --json",
        writes=True,
        says='"prompt": "b"',
    ),
    Case(
        "generate, top-k",
        "fastlm generate {runs}/rows --top-k 5 --tokens 8 --repetition-penalty 1.2",
        writes=True,
    ),
    Case(
        "fastlm.load",
        """python -c "import fastlm; print(fastlm.load('{runs}/rows').generate('def'))" """,
    ),
    Case(
        "report",
        "fastlm report {runs}/rows {runs}/sft {runs}/dpo --out {work}/report.html",
        says="report.md",
    ),
    Case("chat", "fastlm chat {runs}/sft --tokens 12", given="What is a list?\nA tuple?\n\n"),
    Case("export", "fastlm export {runs}/sft --to {work}/exported"),
    Case("import", "fastlm import {work}/exported --to {runs}/imported"),
    Case("eval of a folder", f"fastlm eval {{work}}/exported {EVAL}", says="window"),
    Case("generate, imported", "fastlm generate {runs}/imported --prompt def", says="def"),
    Case(
        "pipeline",
        f"fastlm pipeline demo --out {{runs}}/pipeline {SHORT_PIPELINE}",
        says="prefers chosen",
    ),
    Case(
        "lm-eval",
        "fastlm lm-eval {runs}/sft --tasks lambada_openai --limit 2",
        needs="lm_eval",
    ),
    Case(
        "benchmarks' page",
        "python -m bench.scripts.write_page --results {root}/bench/results --out {work}/page.md",
        says="charts",
    ),
]

FULL_SIZE = [
    *eager_and_compiled("modern-253m, 32 x 1024", FULL, "full", launches=230, graphs=0),
    Case(
        "modern-253m, AdamW, compiled",
        f"{FULL} --optim.name adamw --out {{runs}}/full-adamw",
        trains=True,
    ),
    Case(
        "modern-253m, isolated documents, compiled",
        f"{FULL} --isolate-documents --out {{runs}}/full-isolated",
        trains=True,
    ),
    Case(
        "modern-253m, checkpointed, compiled",
        f"{FULL} --checkpoint-activations --out {{runs}}/full-checkpointed",
        trains=True,
    ),
    Case("the same in plain PyTorch, AdamW, compiled", "peer plain", measured=True),
    Case(
        "Hugging Face's Llama of that shape, AdamW, compiled",
        "peer huggingface",
        needs="transformers",
        measured=True,
    ),
]

CHECKS = [
    Case("the stand-in", "check check_fakegpu.py"),
    Case("what attention asks for", "program attention.py"),
    Case("documents of all lengths", "program recompiles.py"),
    Case("GPU programs, traced on cuda", "check check_gpucompile.py"),
    Case("GPU programs, executed", "check check_gpurun.py"),
    Case("PTX of this Triton, executed", "check check_ptxsim.py"),
    Case("memory as planned", "check check_plan.py"),
    Case("our kernels' PTX, executed", "check ../kernels/compiled/check_ptx.py"),
    Case("our compiled step, executed", "check ../kernels/compiled/check_step.py"),
]

MAKE_GPU = [
    Case(f"make gpu, {part}", f"gpu {part}")
    for part in ("gate", "train", "kernels", "tuning", "tests")
]

# Two chains that run side by side: a case may need what an earlier one of its own chain has made.
CHAINS = [
    [*MACHINE, *DATA, *PRETRAIN, *TUNING, *GROUPED, *USE],
    [*FULL_SIZE, *CHECKS, *MAKE_GPU],
]
