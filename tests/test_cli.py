"""The command line: help at once, mistakes named, nothing heavy imported before it is needed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fastlm import __version__, config
from fastlm.cli import COMMANDS, main
from fastlm.config.command_line import flags


def last_line(code: str) -> str:
    """The last line that the code prints in a Python of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command_with_its_purpose(argv, capsys):
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert any(name in line and command.help in line for line in lines)
    assert max(map(len, lines)) <= 100


def test_help_of_a_group_lists_its_commands(capsys):
    assert main(["data", "--help"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert (command.help in text) == name.startswith("data ")


def test_every_command_names_a_class_a_function_and_fields_that_exist():
    for name, command in COMMANDS.items():
        cls = getattr(config, command.config)
        module, function = command.function.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name
        known = flags(cls)
        for field in (command.argument.rstrip("."), command.rest, *command.required):
            assert not field or f"--{field}" in known, (name, field)


def test_help_of_any_command_imports_neither_torch_nor_a_stage():
    code = (
        "import sys; from fastlm.cli import COMMANDS, main\n"
        "codes = [main([*name.split(), '--help']) for name in COMMANDS]\n"
        "heavy = [m for m in sys.modules if m in ('torch', 'numpy', 'rich', 'fastlm.train')]\n"
        "print(set(codes), heavy)"
    )
    assert last_line(code) == "{0} []"


def test_help_of_fastlm_imports_no_configuration():
    code = (
        "import sys; from fastlm.cli import main; main(['--help'])\n"
        "print([m for m in sys.modules if m in ('torch', 'dataclasses', 'fastlm.config')])"
    )
    assert last_line(code) == "[]"


def test_a_mistake_in_the_words_is_found_before_torch_is_imported():
    code = (
        "import sys; from fastlm.cli import main\n"
        "codes = [main(['sft', 'runs/x']), main(['export', 'r', '--dtype', 'f']), main(['x'])]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    assert last_line(code) == "[2, 2, 2] False"


def test_version_names_what_an_error_report_needs(capsys):
    assert main(["--version"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"fastlm {__version__} (Python {sys.version_info.major}.")
    assert f"torch {version('torch')}" in text
    assert text.count("\n") == 1


def test_version_imports_no_torch():
    code = "import sys; from fastlm.cli import main; main(['--version']); print(*sys.modules)"
    assert "torch" not in last_line(code).split()


# The words of a command, and what its one line must say: what is wrong, what was got, what is
# expected. {full} is a folder with a file in it, {text} a text file, {new} a folder not there.
MISTAKES = [
    ("pretrian", "unknown command 'pretrian'; did you mean pretrain?"),
    ("help pretrian", "unknown command 'pretrian'; did you mean pretrain?"),
    ("prepare", "unknown command 'prepare'; did you mean data prepare?"),
    ("--verion", "unknown command '--verion'; did you mean --version?"),
    ("pretrain --step 1", "unknown option --step; did you mean --steps?"),
    ("pretrain --xyzzy 1", "unknown option --xyzzy; see --help"),
    ("pretrain --optim.lrr 1", "unknown option --optim.lrr; did you mean --optim.lr?"),
    ("pretrain --model.no-qk-norm", "did you mean --no-model.qk-norm?"),
    ("pretrain --steps ten", "--steps is 'ten'; it must be an integer"),
    ("pretrain --steps 1.5", "--steps is '1.5'; it must be an integer"),
    ("pretrain --steps", "--steps needs a value: an integer"),
    ("pretrain --attention", "--attention needs a value: one of auto, "),
    ("pretrain --out --compile", "--out needs a value: a text; --compile is an option, so write"),
    ("pretrain --compile=false", "--compile takes no value; write --compile or --no-compile"),
    ("pretrain --optim.lr nan", "--optim.lr is nan; it must be finite"),
    ("pretrain --optim.lr -1", "optim.lr is -1.0; it must be positive"),
    ("pretrain --optim.beta1 1", "optim.beta1 is 1.0; it must lie in [0, 1)"),
    ("pretrain --optim.name adam", "--optim.name is 'adam'; did you mean adamw?"),
    ("pretrain --steps 0", "steps is 0; it must be a positive integer"),
    ("pretrain --batch-rows 0", "batch_rows is 0; it must be a positive integer"),
    ("pretrain --seed 9223372036854775808", "it must lie between -2^63 and 2^63"),
    ("pretrain --seed -1", "seed is -1; it must not be negative"),
    ("pretrain --micro-batch-rows 3 --batch-rows 8", "does not divide batch_rows 8; choose it"),
    ("pretrain --preset modern-253", "unknown preset 'modern-253'; did you mean modern-253m?"),
    ("pretrain --recipe dmo", "unknown recipe 'dmo'; did you mean demo?"),
    ("pretrain --recipe no/such.toml", "could not read no/such.toml: No such file or directory;"),
    ("pretrain --bad-rows perhaps", "--bad-rows is 'perhaps'; choose among fail, skip"),
    ("pretrain --init bigrm", "--init is 'bigrm'; did you mean bigram?"),
    ("pretrain --model.n-heads 7", "which does not divide model.dim 192; choose n_heads among"),
    ("pretrain --model.n-kv-heads 2", "does not divide model.n_heads 3; choose n_kv_heads among"),
    ("pretrain --seq-len 100000", "model.max_seq_len is 256; shorten seq_len or pass --model."),
    ("pretrain --device gpu", "device is 'gpu'; choose among auto, cpu, cuda"),
    ("pretrain --data no/such.txt", "'no/such.txt': no such file or folder; expected a path"),
    ("pretrain --tokenizer no/such.json", "'no/such.json': no such file; expected \"gpt2\""),
    ("pretrain --out {full}", "{full} is not empty: it may hold another run; choose another --out"),
    ("pretrain --resume no/such/run", "no/such/run is not a run folder: it holds no config.toml"),
    ("pretrain fast", "unexpected argument 'fast'; options are written --name value"),
    ("pretrain -x", "unexpected argument '-x'; options are written --name value"),
    ("sft", "sft needs MODEL: Run, checkpoint or Hugging Face folder to start from; for example:"),
    ("sft runs/x", "sft needs --data: Examples: a .jsonl, .json or .parquet file or folder"),
    ("sft a b --data f", "unexpected argument 'b'; the model is 'a' already"),
    ("sft a --model b --data f", "--model is given twice, and as 'a'; give it once"),
    ("sft no/such/run --data f", "no/such/run does not exist; give a run folder"),
    ("sft runs/x --data f --epochs 0", "epochs is 0.0; it must be positive"),
    ("sft runs/x --data f --held-out 1", "held_out is 1.0; it must lie in [0, 1)"),
    ("sft runs/x --data f --row-len 1 --max-len 2", "row_len is 1, shorter than max_len 2;"),
    ("sft runs/x --data f --recipe alpca", "unknown recipe 'alpca'; did you mean alpaca?"),
    ("dpo", "dpo needs MODEL: Run, checkpoint or Hugging Face folder to start from"),
    ("dpo runs/x --data f --beta 0", "beta is 0.0; it must be positive"),
    ("dpo runs/x --data f --loss sigmod", "unknown loss 'sigmod'; did you mean sigmoid?"),
    ("dpo runs/x --data f --label-smoothing .5", "label_smoothing is 0.5; it must lie in [0, 0.5)"),
    ("dpo runs/x --data f --label-smoothing .1 --loss ipo", "and length-normalised, not ipo"),
    ("pipeline dmo", "unknown recipe 'dmo'; did you mean demo?"),
    ("pipeline demo demo", "unexpected argument 'demo'; the recipe is 'demo' already"),
    ("pipeline --pretrain.stps 3", "option --pretrain.stps; did you mean --pretrain.steps?"),
    ("pipeline --pretrain.model.dim x", "--pretrain.model.dim is 'x'; it must be an integer"),
    ("pipeline --dpo.beta 0", "dpo.beta is 0.0; it must be positive"),
    ("pipeline --dpo.optim.lr 0", "dpo.optim.lr is 0.0; it must be positive"),
    ("pipeline --pretrain.seed -1", "pretrain.seed is -1; it must not be negative"),
    ("pipeline demo --out {full}", "{full} is not empty; choose another --out"),
    ("eval", "eval needs MODELS: Run folders, checkpoint folders or Hugging Face folders"),
    ("eval no/such/run --data {text}", "no/such/run does not exist; give a run folder"),
    ("eval runs/x --protocols windw", "unknown protocol 'windw'; did you mean window?"),
    ("eval runs/x --data {text}", "runs/x does not exist; give a run folder"),
    ("eval runs/x --batch-tokens -1", "batch_tokens is -1; it must not be negative"),
    ("lm-eval", "lm-eval needs MODEL: Run folder, checkpoint folder or Hugging Face folder"),
    ("lm-eval --tasks x", "lm-eval needs MODEL: Run folder, checkpoint folder or Hugging Face"),
    ("generate", "generate needs MODEL: Run folder, checkpoint folder or Hugging Face folder"),
    ("generate no/such/run", "no/such/run does not exist; give a run folder"),
    ("generate runs/x --temperature -1", "temperature is -1.0; it must not be negative"),
    ("generate runs/x --top-p 0", "top_p is 0.0; it must lie in (0, 1]"),
    ("generate runs/x --tokens 0", "tokens is 0; it must be a positive integer"),
    ("generate runs/x --prompt", "--prompt needs a value: a text"),
    ("chat", "chat needs MODEL: Run folder, checkpoint folder or Hugging Face folder"),
    ("chat no/such/run", "no/such/run does not exist; give a run folder"),
    ("chat runs/x --repetition-penalty 0", "repetition_penalty is 0.0; it must be positive"),
    ("export", "export needs MODEL: Run folder or checkpoint folder"),
    ("export runs/x", "export needs --to: The new folder; for example: fastlm export"),
    ("export no/such/run --to {new}", "no/such/run does not exist; give a run folder"),
    ("export runs/x --to {new} --dtype half", "--dtype is 'half'; choose among bfloat16, float32"),
    ("import", "import needs MODEL: The Hugging Face folder; for example: fastlm import"),
    ("import {full} --to {new}", "{full} holds no config.json; give a Hugging Face model folder"),
    ("data", "data is followed by prepare or inspect; see fastlm data --help"),
    ("data prepair", "data is followed by prepare or inspect; got 'prepair'"),
    ("data prepare", "data prepare needs SOURCES: python-stdlib, a file or folder"),
    ("data prepare {text}", "data prepare needs --out: Folder to write"),
    ("data prepare {text} --out {full}", "{full}: holds other files; name an empty or new folder"),
    ("data prepare {text} --out {new} --workers -1", "workers is -1; it must not be negative"),
    ("data prepare {text} --out {new} --dedup no", "--dedup is 'no'; did you mean none?"),
    ("data prepare no/such.txt --out {new}", "'no/such.txt': no such file or folder; expected"),
    ("data inspect", "data inspect needs FOLDER: A folder that fastlm data prepare wrote"),
    ("data inspect a b", "unexpected argument 'b'; the folder is 'a' already"),
    ("data inspect a --documents -1", "documents is -1; it must not be negative"),
    ("data inspect {full}", "{full}: no manifest.json; expected a folder written by"),
    ("plan --gpu h10", "unknown GPU 'h10'; choose among a100, h100, h200, b200"),
    ("plan modern-253", "unknown recipe or preset 'modern-253'; did you mean modern-253m?"),
    ("kernels --targets sm_91", "no target 'sm_91'; expected some of sm_80"),
    ("kernels --against ligr", "--against is 'ligr'; did you mean liger?"),
    ("kernels sm_90", "unexpected argument 'sm_90'; options are written --name value"),
    ("report", "report needs RUNS: Folders of runs, or of a pipeline"),
    ("report no/such/run", "no/such/run does not exist; give the folder of a run or of a pipeline"),
    ("report {full}", "{full} holds no metrics.jsonl; give the folder of a run or of a pipeline"),
    ("report runs/x --out page.txt", "--out is page.txt, expected a name that ends with .html"),
    ("watch", "watch needs RUNS: Folders of runs, or of a pipeline"),
    ("watch no/such/run", "no/such/run does not exist; give the folder of a run or of a pipeline"),
    ("watch runs/x --port 70000", "port is 70000; it must lie in [0, 65535]"),
    ("doctor me", "unexpected argument 'me'; it takes no arguments"),
    ("doctor --json", "unknown option --json; see --help"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("mistakes")
    (root / "full").mkdir()
    (root / "full" / "notes").write_text("mine")
    (root / "text.txt").write_text("A line of text.\n" * 50)
    found = {"full": root / "full", "text": root / "text.txt", "new": root / "new"}
    return {name: str(path) for name, path in found.items()}


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_it_and_exit_code_2(line, words, places, capsys):
    before = {path: path.read_bytes() for path in Path(places["full"]).iterdir()}
    assert main([word.format(**places) for word in line.split()]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("fastlm: ")
    assert words.format(**places) in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert {path: path.read_bytes() for path in Path(places["full"]).iterdir()} == before
    assert not Path(places["new"]).exists()


def test_every_command_has_a_mistake_in_the_table():
    lines = [line for line, _ in MISTAKES]
    for name in COMMANDS:
        assert any(f"{line} ".startswith(f"{name} ") for line in lines), name


def test_doctor_names_a_choice_and_a_reason_for_every_operation(capsys):
    from fastlm import kernels

    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    operations = ("attention", "tokenizer gpt2", "flash-attn", "xformers", "matmul rate")
    for op in (*kernels.__all__, *operations):
        assert op in text
    assert "SHA-256 verified" in text


def test_a_reader_that_has_seen_enough_ends_the_output_quietly():
    code = "import sys; from fastlm.cli import main; sys.exit(main(['sft', '--help']))"
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stdout is not None
        child.stdout.close()  # as head does
        _, error = child.communicate()
    assert child.returncode == 141
    assert error == ""
