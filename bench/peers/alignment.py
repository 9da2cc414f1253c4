"""SFT and DPO by fastlm and by TRL, one run a process.

    python -m bench.peers.alignment NAME MODEL DATA full|small

The last line printed is JSON: units per second of each step after the first (real tokens for SFT,
pairs for DPO, the reference's pass included) and the peak memory of the process. fastlm runs
through its stage functions and is read from metrics.jsonl; TRL runs through its trainers with its
own defaults: SFT packed (best fit decreasing), DPO with a second model as the reference, called in
every step; but fp32 for both, as bf16 is slower on most CPUs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from fastlm.runtime import process_peak_gib

LENGTH = {"full": 512, "small": 64}
STEPS = {"full": {"ours": 6, "trl": 3}, "small": {"ours": 2, "trl": 2}}
ROWS = 4  # a step of SFT; for DPO 4 pairs, or one row of ours, which holds about as many
ALPACA = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request.\n\n"
)


def make_model(to: Path, size: str) -> Path:
    """A random model of 16M parameters with GPT-2's tokenizer as a Hugging Face folder."""
    import torch

    from fastlm.config import ModelConfig
    from fastlm.interop.exporting import write_folder
    from fastlm.model import build
    from fastlm.tokenizer import gpt2_json

    dim, layers, heads, ffn = (256, 4, 4, 704) if size == "full" else (32, 1, 2, 64)
    shape = ModelConfig(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        ffn_dim=ffn,
        max_seq_len=LENGTH[size],
    )
    write_folder(build(shape, 0, torch.device("cpu")), {"tokenizer.json": gpt2_json()}, 50256, to)
    return to


def ours(stage: str, model: Path, data: Path, size: str, folder: Path) -> list[float]:
    from fastlm.config import DpoConfig, SftConfig
    from fastlm.kernels.native import keep_large_blocks
    from fastlm.train import dpo, sft

    keep_large_blocks()  # as the command line does
    options = {
        "model": str(model),
        "data": str(data),
        "out": str(folder / "run"),
        "cache": str(folder / "cache"),
        "device": "cpu",
        "steps": STEPS[size]["ours"],
        "max_len": LENGTH[size],
        "held_out": 0.0,
        "bad_rows": "skip",
        "validate_every": 0,
        "checkpoint_every": 0,
    }
    reference_seconds, plain = [], dpo.reference_logprobs

    def timed(*arguments):
        start = time.perf_counter()
        found = plain(*arguments)
        reference_seconds.append(time.perf_counter() - start)
        return found

    with mock.patch.object(dpo, "reference_logprobs", timed):
        code = (
            sft.sft(SftConfig(**options, batch_rows=ROWS))
            if stage == "sft"
            else dpo.dpo(DpoConfig(**options, batch_rows=1))
        )
    assert code == 0
    rows = [
        json.loads(line)
        for line in (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    steps = [row for row in rows if "seconds" in row]
    if stage == "sft":
        return [row["tokens_per_s"] for row in steps[1:]]
    for_a_pair = sum(reference_seconds) / sum(row["pairs"] for row in steps)
    return [row["pairs"] / (row["seconds"] + row["pairs"] * for_a_pair) for row in steps[1:]]


def trl(stage: str, model: Path, data: Path, size: str, folder: Path) -> list[float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Seconds of each step, and the real tokens seen after it."""

        def __init__(self):
            self.seconds, self.tokens, self.start = [], [0.0], 0.0

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.start)

        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                self.tokens.append(float(logs["num_tokens"]))

    clock, end = Clock(), "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), eos_token=end, pad_token=end
    )
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lines = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    options = {
        "output_dir": str(folder / "trl"),
        "max_steps": STEPS[size]["trl"],
        "max_length": LENGTH[size],
        "logging_steps": 1,
        "per_device_train_batch_size": ROWS,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    common = {"processing_class": tokenizer, "callbacks": [clock]}
    if stage == "sft":
        examples = Dataset.from_list([alpaca(line) for line in lines if line["output"]])
        trainer = SFTTrainer(
            model=policy, args=SFTConfig(**options, packing=True), train_dataset=examples, **common
        )
        trainer.train()
        tokens = [
            after - before for before, after in zip(clock.tokens, clock.tokens[1:], strict=False)
        ]
        return [n / seconds for n, seconds in zip(tokens[1:], clock.seconds[1:], strict=True)]
    pairs = [{key: line[key] for key in ("prompt", "chosen", "rejected")} for line in lines]
    pairs = Dataset.from_list([pair for pair in pairs if all(pair.values())])
    DPOTrainer(model=policy, args=DPOConfig(**options), train_dataset=pairs, **common).train()
    return [ROWS / seconds for seconds in clock.seconds[1:]]


def alpaca(line: dict[str, str]) -> dict[str, str]:
    """The prompt and completion that fastlm's template gives."""
    more = ", paired with an input that provides further context" if line["input"] else ""
    given = f"### Input:\n{line['input']}\n\n" if line["input"] else ""
    prompt = (
        f"{ALPACA.format(more)}### Instruction:\n{line['instruction']}\n\n{given}### Response:\n"
    )
    return {"prompt": prompt, "completion": line["output"]}


def turn(name: str, model: Path, data: Path, size: str) -> dict:
    """name: "ours sft", "ours dpo", "trl sft" or "trl dpo".

    Rates of the steps after the first, and the peak memory.
    """
    who, stage = name.split()
    with tempfile.TemporaryDirectory() as folder:
        rates = {"ours": ours, "trl": trl}[who](stage, model, data, size, Path(folder))
    return {"per_second": rates, "peak_gib": process_peak_gib()}


if __name__ == "__main__":
    print(
        json.dumps(turn(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])), flush=True
    )
