"""DPO's losses, rewards and gradients against TRL's DPOTrainer on the same weights and pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_dpo_brute_force import agree, hugging_face, models, packed_step, pairs

from fastlm.config import DpoConfig

pytest.importorskip("trl", reason="trl, whose DPOTrainer this compares with, is not installed")


def trainer(small_tokenizer, folder, **options):
    """TRL's own trainer around the policy and its reference.

    The data set is only there because it asks for one.
    """
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(small_tokenizer), eos_token=end, pad_token=end
    )
    policy, reference = map(hugging_face, models())
    args = DPOConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        **options,
    )
    data = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    return DPOTrainer(
        model=policy, ref_model=reference, args=args, processing_class=tokenizer, train_dataset=data
    )


def batch(sequences) -> dict[str, torch.Tensor]:
    """What TRL's collator makes of the pairs.

    The chosen answers, then the rejected ones, padded on the right.
    """
    in_order = [*sequences[::2], *sequences[1::2]]
    longest = max(len(ids) for ids, _ in in_order)

    def padded(parts) -> torch.Tensor:
        return torch.tensor(
            np.stack([np.pad(p.astype(np.int64), (0, longest - len(p))) for p in parts])
        )

    return {
        "input_ids": padded(ids for ids, _ in in_order),
        "attention_mask": padded(np.ones(len(ids)) for ids, _ in in_order),
        "completion_mask": padded(counted for _, counted in in_order),
    }


@pytest.mark.parametrize("share", [True, False])
def test_sigmoid_losses_rewards_and_gradients_equal_trls(share, small_tokenizer, tmp_path):
    sequences = pairs()
    ours, our_gradients = packed_step(DpoConfig(beta=0.3), sequences, share)
    their = trainer(small_tokenizer, tmp_path, beta=0.3)
    loss = their.compute_loss(their.model, batch(sequences))
    loss.backward()
    assert ours["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    seen = their._metrics["train"]
    sides = [f"{what}/{side}" for what in ("rewards", "logps") for side in ("chosen", "rejected")]
    for name in (*sides, "rewards/margins", "rewards/accuracies"):
        assert ours[name].item() == pytest.approx(seen[name][-1], rel=1e-4, abs=1e-5), name
    agree(our_gradients, {name: p.grad for name, p in their.model.named_parameters()})


def test_ipo_is_trls_where_all_answers_have_one_token(small_tokenizer, tmp_path):
    """TRL divides by the answers' lengths, the paper's equation 17 does not.

    With one token each both are the same.
    """
    rng, sequences = np.random.default_rng(3), []
    for length in range(20, 32):
        prompt = rng.integers(0, 97, length)
        for token in rng.choice(97, 2, replace=False):
            ids = np.append(prompt, token).astype(np.int32)
            sequences.append((ids, np.arange(len(ids)) >= length))
    ours, our_gradients = packed_step(DpoConfig(beta=0.3, loss="ipo"), sequences, True)
    their = trainer(small_tokenizer, tmp_path, beta=0.3, loss_type=["ipo"])
    loss = their.compute_loss(their.model, batch(sequences))
    loss.backward()
    assert ours["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    agree(our_gradients, {name: p.grad for name, p in their.model.named_parameters()})
