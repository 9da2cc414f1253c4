"""The command line: one table of commands, and one function that runs any of them.

The table names classes and functions instead of importing them, so that help comes at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NamedTuple

from fastlm import __version__
from fastlm.errors import UserError, check, nearest

HELP = ("-h", "--help")


class Command(NamedTuple):
    """A command: its options, what it runs, and what its help says."""

    config: str  # a class of fastlm.config
    function: str  # module:function, called with the configuration; returns the exit code
    help: str
    example: str = ""
    argument: str = ""  # field that words without dashes set; "..." where there may be several
    rest: str = ""  # field that takes everything behind the argument as it is
    required: tuple[str, ...] = ()  # fields that must be given
    large_blocks: bool = False  # on a CPU the C library keeps the memory of freed tensors


COMMANDS = {
    "pretrain": Command(
        "PretrainConfig",
        "fastlm.train.pretrain:pretrain",
        "train a model from scratch on text",
        example="fastlm pretrain --compile --data FILE.txt",
        large_blocks=True,
    ),
    "sft": Command(
        "SftConfig",
        "fastlm.train.sft:sft",
        "teach a model to answer: supervised fine-tuning on instructions",
        example="fastlm sft runs/pretrain-demo --data FILE.jsonl",
        argument="model",
        required=("model", "data"),
        large_blocks=True,
    ),
    "dpo": Command(
        "DpoConfig",
        "fastlm.train.dpo:dpo",
        "teach a model which of two answers is preferred: DPO, IPO, SimPO",
        example="fastlm dpo runs/sft-demo --data FILE.jsonl",
        argument="model",
        required=("model", "data"),
        large_blocks=True,
    ),
    "pipeline": Command(
        "PipelineConfig",
        "fastlm.train.pipeline:pipeline",
        "pretrain, SFT, DPO and their evaluation, in one resumable run",
        example="fastlm pipeline demo",
        argument="recipe",
        large_blocks=True,
    ),
    "eval": Command(
        "EvalConfig",
        "fastlm.evaluation.evaluate:evaluate",
        "perplexity of models on a text, by every protocol",
        example="fastlm eval runs/pretrain-demo --data FILE.txt",
        argument="models...",
        required=("models",),
        large_blocks=True,
    ),
    "report": Command(
        "ReportConfig",
        "fastlm.report.command:report",
        "runs as one page: curves, samples and figures, for a browser",
        example="fastlm report runs/pretrain-demo",
        argument="runs...",
        required=("runs",),
    ),
    "watch": Command(
        "WatchConfig",
        "fastlm.report.watch:watch",
        "follow runs in a browser while they train",
        example="fastlm watch runs/pretrain-demo",
        argument="runs...",
        required=("runs",),
    ),
    "lm-eval": Command(
        "LmEvalConfig",
        "fastlm.evaluation.lm_eval_model:run_lm_eval",
        "lm-eval's tasks with a model; its own options follow",
        example="fastlm lm-eval runs/sft-demo --tasks TASK,...",
        argument="model",
        rest="arguments",
        required=("model",),
        large_blocks=True,
    ),
    "generate": Command(
        "GenerateConfig",
        "fastlm.inference.text:write",
        "continue a prompt with a trained model",
        example="fastlm generate runs/pretrain-demo --prompt TEXT",
        argument="model",
        required=("model",),
        large_blocks=True,
    ),
    "chat": Command(
        "ChatConfig",
        "fastlm.inference.chat:chat",
        "talk to a model in the terminal",
        example="fastlm chat runs/sft-demo",
        argument="model",
        required=("model",),
        large_blocks=True,
    ),
    "export": Command(
        "ExportConfig",
        "fastlm.interop.exporting:export_run",
        "write a model as a Hugging Face folder",
        example="fastlm export runs/pretrain-demo --to DIR",
        argument="model",
        required=("model", "to"),
    ),
    "import": Command(
        "ImportConfig",
        "fastlm.interop.importing:import_folder",
        "make a Hugging Face folder of the Llama family a run",
        example="fastlm import DIR --to runs/NAME",
        argument="model",
        required=("model", "to"),
    ),
    "data prepare": Command(
        "DataPrepareConfig",
        "fastlm.data.prepare_and_inspect:prepare",
        "tokenise text into a folder, to train from it later",
        example="fastlm data prepare FILE.jsonl --out DIR",
        argument="sources...",
        required=("sources", "out"),
    ),
    "data inspect": Command(
        "DataInspectConfig",
        "fastlm.data.prepare_and_inspect:inspect",
        "show what a prepared folder holds, and check every hash",
        example="fastlm data inspect DIR",
        argument="folder",
        required=("folder",),
    ),
    "plan": Command(
        "PlanConfig",
        "fastlm.plan.command:plan",
        "memory, time, failures and energy of a training run, reckoned",
        example="fastlm plan modern-253m --gpus 1,8,64 --gpu h100",
        argument="model",
    ),
    "kernels": Command(
        "KernelsConfig",
        "fastlm.kernel_report:report",
        "registers, traffic and projected time of every Triton kernel",
        example="fastlm kernels --targets sm_90",
    ),
    "doctor": Command(
        "DoctorConfig",
        "fastlm.doctor:doctor",
        "show what runs on this machine, for every operation, and why",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    words = sys.argv[1:] if argv is None else argv
    try:
        return run(words)
    except UserError as e:
        print(f"fastlm: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("fastlm: interrupted", file=sys.stderr)
        return 130


def run(words: list[str]) -> int:
    """Run the command that the words name; returns its exit code."""
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in HELP:
        print(f"usage: fastlm COMMAND [options]\n\n{overview(COMMANDS)}\n")
        print("fastlm COMMAND --help shows a command's options.", end=" ")
        print("Start with: fastlm pretrain --compile")
        return 0
    if words[0] == "--version":
        print(versions())
        return 0
    members = {name: c for name, c in COMMANDS.items() if name.startswith(f"{words[0]} ")}
    if members and words[1:2] and words[1] in HELP:
        print(f"usage: fastlm {words[0]} COMMAND [options]\n\n{overview(members)}")
        return 0
    name, argv = find(words, members)
    command = COMMANDS[name]
    if set(HELP) & set(argv[:1] if command.rest else argv):
        print(help_page(name), end="")
        return 0
    config = configuration(name, argv)
    module, _, function = command.function.partition(":")
    start = getattr(importlib.import_module(module), function)
    if command.large_blocks:
        from fastlm.kernels.native import keep_large_blocks

        keep_large_blocks()
    return start(config)


def find(words: list[str], members: dict[str, Command]) -> tuple[str, list[str]]:
    """The command that the words begin with, and the words behind it.

    members: the commands of two words of which the first is the first word given.
    """
    if members:
        name = " ".join(words[:2])
        seconds = [full.split()[1] for full in members]
        got = f"got {words[1]!r}; " if words[1:] else ""
        expected = f"{words[0]} is followed by {' or '.join(seconds)}"
        check(name in members, f"{expected}; {got}see fastlm {words[0]} --help")
        return name, words[2:]
    known = [*COMMANDS, "help", "--help", "--version"]
    check(words[0] in COMMANDS, f"unknown command {words[0]!r}; {nearest(words[0], known)}")
    return words[0], words[1:]


def configuration(name: str, argv: list[str]) -> Any:
    """What the words behind a command ask for; UserError where they cannot be understood."""
    from fastlm import config
    from fastlm.config.command_line import parse

    command = COMMANDS[name]
    cls = getattr(config, command.config)
    parsed = parse(cls, argv, command.argument, command.rest)
    missing = [field for field in command.required if not getattr(parsed, field)]
    if missing:
        from fastlm.config.help import meanings

        field = missing[0]
        word = field.upper() if field == command.argument.rstrip(".") else f"--{field}"
        way = f"{meanings(cls)[field]}; for example: {command.example}"
        raise UserError(f"{name} needs {word}: {way}")
    return parsed


def overview(commands: dict[str, Command]) -> str:
    """The commands with what they do."""
    column = max(map(len, commands)) + 2
    return "\n".join(f"  {name:{column}}{c.help}" for name, c in commands.items())


def help_page(name: str) -> str:
    from fastlm import config
    from fastlm.config.help import page

    command = COMMANDS[name]
    cls = getattr(config, command.config)
    return page(cls, name, command.argument, command.rest, command.example)


def versions() -> str:
    """The versions that matter where something goes wrong."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"Python {sys.version.split()[0]}"]
    for package in ("torch", "triton"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return f"fastlm {__version__} ({', '.join(found)})"
