"""The command line: one function per subcommand; each imports its stage inside, so that help comes at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from fastlm import __version__
from fastlm.errors import UserError


def pretrain(argv: list[str]) -> int:
    """train a model from scratch on text"""
    from fastlm.config import PretrainConfig
    from fastlm.options import parse

    config = parse(PretrainConfig, argv, "fastlm pretrain")
    from fastlm.kernels.cpu import keep_large_blocks
    from fastlm.train.pretrain import pretrain as run

    keep_large_blocks()
    return run(config)


def sft(argv: list[str]) -> int:
    """teach a model to answer: supervised fine-tuning on instructions"""
    from fastlm.config import SftConfig
    from fastlm.options import parse

    config = parse(SftConfig, argv, "fastlm sft MODEL", positional="model")
    from fastlm.kernels.cpu import keep_large_blocks
    from fastlm.train.sft import sft as run

    keep_large_blocks()
    return run(config)


def dpo(argv: list[str]) -> int:
    """teach a model which of two answers is preferred: DPO, IPO, SimPO"""
    from fastlm.config import DpoConfig
    from fastlm.options import parse

    config = parse(DpoConfig, argv, "fastlm dpo MODEL", positional="model")
    from fastlm.kernels.cpu import keep_large_blocks
    from fastlm.train.dpo import dpo as run

    keep_large_blocks()
    return run(config)


def pipeline(argv: list[str]) -> int:
    """pretrain, SFT, DPO and their evaluation, in one resumable run"""
    from fastlm.commands import PipelineConfig
    from fastlm.options import parse

    config = parse(PipelineConfig, argv, "fastlm pipeline RECIPE", positional="recipe")
    from fastlm.kernels.cpu import keep_large_blocks
    from fastlm.train.pipeline import pipeline as run

    keep_large_blocks()
    return run(config)


def generate(argv: list[str]) -> int:
    """continue a prompt with a trained model"""
    from fastlm.commands import GenerateConfig
    from fastlm.options import parse

    config = parse(GenerateConfig, argv, "fastlm generate RUN", positional="model")
    if not config.model:
        raise UserError("which model? give a run folder: fastlm generate runs/pretrain-demo --prompt TEXT")
    from fastlm.generate import write
    from fastlm.kernels.cpu import keep_large_blocks

    keep_large_blocks()
    return write(config)


def chat(argv: list[str]) -> int:
    """talk to a model in the terminal"""
    from fastlm.commands import ChatConfig
    from fastlm.options import parse

    config = parse(ChatConfig, argv, "fastlm chat MODEL", positional="model")
    if not config.model:
        raise UserError("which model? give a run or a Hugging Face folder: fastlm chat runs/sft-demo")
    from fastlm.chat import chat as run
    from fastlm.kernels.cpu import keep_large_blocks

    keep_large_blocks()
    return run(config)


def export(argv: list[str]) -> int:
    """write a model as a Hugging Face folder"""
    from fastlm.commands import ExportConfig
    from fastlm.options import parse

    config = parse(ExportConfig, argv, "fastlm export RUN", positional="model")
    if not config.model:
        raise UserError("which model? give a run folder: fastlm export runs/pretrain-demo --to DIR")
    from fastlm.exchange import export_run

    return export_run(config)


def import_(argv: list[str]) -> int:
    """make a Hugging Face folder of the Llama family a run"""
    from fastlm.commands import ImportConfig
    from fastlm.options import parse

    config = parse(ImportConfig, argv, "fastlm import DIR", positional="model")
    if not config.model:
        raise UserError("which model? give a Hugging Face folder: fastlm import DIR --to runs/NAME")
    from fastlm.exchange import import_folder

    return import_folder(config)


def data(argv: list[str]) -> int:
    """prepare text for training (data prepare), or look into what was prepared (data inspect)"""
    from fastlm.data.commands import main as run

    return run(argv)


def evaluate(argv: list[str]) -> int:
    """perplexity of models on a text, by every protocol"""
    from fastlm.commands import EvalConfig
    from fastlm.options import parse

    config = parse(EvalConfig, argv, "fastlm eval MODEL...", positional="models")
    if not config.models:
        raise UserError("which models? give run folders: fastlm eval runs/pretrain-demo --data FILE.txt")
    from fastlm.evaluation.evaluate import evaluate as run
    from fastlm.kernels.cpu import keep_large_blocks

    keep_large_blocks()
    return run(config)


def lm_eval(argv: list[str]) -> int:
    """lm-eval's tasks with a model; its own options follow"""
    if not argv or argv[0].startswith("-"):
        raise UserError("which model? give a run or a Hugging Face folder: fastlm lm-eval runs/sft-demo --tasks TASK,...")
    from fastlm.harness import lm_eval_command
    from fastlm.kernels.cpu import keep_large_blocks

    keep_large_blocks()
    return lm_eval_command(argv[0], argv[1:])


def kernels(argv: list[str]) -> int:
    """registers, traffic and projected time of every Triton kernel, without a GPU"""
    import json

    from fastlm.commands import KernelsConfig
    from fastlm.options import parse

    config = parse(KernelsConfig, argv, "fastlm kernels")
    from fastlm.kernels import report

    try:
        found = report.collect(config.targets.split(",") if config.targets else None, config.against or None)
    except ValueError as e:
        raise UserError(str(e)) from None
    print(json.dumps(found, indent=1) if config.json else report.table(found))
    return 0


def bench(argv: list[str]) -> int:
    """tables and charts from the benchmarks' results (bench report)"""
    from pathlib import Path

    from fastlm.bench_report import write
    from fastlm.commands import BenchConfig
    from fastlm.options import parse

    if argv[:1] != ["report"] and "--help" not in argv:
        raise UserError("fastlm bench has one command: fastlm bench report; to measure, run pytest bench/ --benchmark")
    config = parse(BenchConfig, argv[1:], "fastlm bench report")
    written = write(Path(config.results), Path(config.out))
    print(f"{written[0]} and {len(written) - 1} charts")
    return 0


def doctor(argv: list[str]) -> int:
    """show what runs on this machine, for every operation, and why"""
    if argv:
        raise UserError(f"fastlm doctor takes no arguments; got {' '.join(argv)}")
    from fastlm.doctor import print_report

    return print_report()


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": pretrain,
    "sft": sft,
    "dpo": dpo,
    "pipeline": pipeline,
    "eval": evaluate,
    "lm-eval": lm_eval,
    "generate": generate,
    "chat": chat,
    "export": export,
    "import": import_,
    "data": data,
    "kernels": kernels,
    "bench": bench,
    "doctor": doctor,
}

USAGE = "usage: fastlm COMMAND [options]\n\n" + "\n".join(
    f"  {name:10} {function.__doc__}" for name, function in COMMANDS.items()
)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; a user's mistake is one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\nfastlm COMMAND --help shows a command's options. Start with: fastlm pretrain --compile")
        return 0
    if argv[0] == "--version":
        print(f"fastlm {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            from fastlm.options import nearest

            raise UserError(f"unknown command {argv[0]!r}; {nearest(argv[0], COMMANDS)}")
        return COMMANDS[argv[0]](argv[1:])
    except UserError as e:
        print(f"fastlm: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("fastlm: interrupted", file=sys.stderr)
        return 130
