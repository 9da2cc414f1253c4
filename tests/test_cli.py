"""The command line: help at once, unknown words named, and nothing heavy imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastlm.cli import COMMANDS, main


def test_help_lists_every_command_with_its_purpose(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for name, function in COMMANDS.items():
        assert name in text
        assert function.__doc__ in text


def test_help_imports_neither_torch_nor_a_stage():
    code = (
        "import sys; from fastlm.cli import main; main(['--help']); print([m for m in sys.modules if m in ('torch', 'tyro')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["pretrian"], "unknown command 'pretrian'; did you mean pretrain?"),
        (["doctor", "me"], "fastlm doctor takes no arguments; got me"),
        (["generate"], "which model? give a run folder"),
        (["generate", "no/such/run"], "no/such/run does not exist"),
        (["generate", "no/such/run", "--temperature", "-1"], "temperature is -1.0; it must not be negative"),
        (["generate", "no/such/run", "--top-p", "0"], "top_p is 0.0; it must lie in (0, 1]"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err == f"fastlm: {words}\n" or words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_version_is_the_package_version(capsys):
    from fastlm import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastlm {__version__}\n"


def test_doctor_names_a_choice_and_a_reason_for_every_operation(capsys):
    from fastlm import kernels

    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for op in (*kernels.__all__, "attention", "tokenizer gpt2", "flash-attn", "xformers", "matmul rate"):
        assert op in text
    assert "SHA-256 verified" in text


def test_kernels_refuses_what_it_does_not_know(capsys):
    assert main(["kernels", "--targets", "sm_91"]) == 2
    assert "no target 'sm_91'" in capsys.readouterr().err
    assert main(["kernels", "--against", "ligr"]) == 2
    assert "did you mean liger" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_the_output_quietly():
    command = [sys.executable, "-c", "import sys; from fastlm.cli import main; sys.exit(main(['sft', '--help']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.close()  # as head does
        _, error = child.communicate()
    assert child.returncode == 141
    assert error == ""
