"""A step of DPO, packed and with shared prompts, against one sequence at a time through Hugging
Face's Llama, full logits.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastlm.config import DpoConfig, ModelConfig
from fastlm.data.examples.packing import lay_out, pack
from fastlm.interop.config_json import config_json
from fastlm.interop.weights import hugging_face_weights
from fastlm.model import build
from fastlm.train import loop
from fastlm.train.dpo import sums

CPU = torch.device("cpu")
SHAPE = ModelConfig(
    vocab_size=97, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=64
)
VARIANTS = [
    DpoConfig(beta=0.3),
    DpoConfig(beta=0.3, label_smoothing=0.2),
    DpoConfig(beta=0.2, loss="ipo"),
    DpoConfig(beta=2.0, loss="length-normalised"),
    DpoConfig(beta=2.0, loss="simpo", margin=0.4),
]


def models():
    """A policy and the reference that it has moved away from, so that rewards are not zero."""
    policy = build(SHAPE, 0, CPU)
    reference = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return policy, reference


def pairs(n: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    """Chosen, rejected, chosen, ....

    Prompts of 1 to 9 ids, answers of 1 to 12, which may begin alike.
    """
    rng, found = np.random.default_rng(0), []
    for number in range(n):
        prompt, alike = (
            rng.integers(0, 97, 1 + int(rng.integers(9))),
            rng.integers(0, 97, number % 2),
        )
        for _ in range(2):
            ids = np.concatenate(
                [prompt, alike, rng.integers(0, 97, 1 + int(rng.integers(12)))]
            ).astype(np.int32)
            found.append((ids, np.arange(len(ids)) >= len(prompt)))
    return found


def hugging_face(model):
    """The same weights in transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(
        LlamaConfig(**config_json(model.config, 0), attn_implementation="eager")
    )
    weights = hugging_face_weights(model)
    missing = theirs.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    return theirs.train()


def gradients(model) -> dict[str, torch.Tensor]:
    """Our gradients under Hugging Face's names."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for (_, p), (_, q) in zip(holder.named_parameters(), model.named_parameters(), strict=True):
            p.copy_(q.grad)
    return hugging_face_weights(holder)


def packed_step(
    cfg: DpoConfig, sequences, share: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Means and gradients of one step as the stage takes it, in two micro-batches of rows of 64."""
    policy, reference = models()
    rows = pack(sequences, 64, group=2, share=share)
    numbers = list(range(len(rows)))
    assert len(rows) > 1
    assert rows.shared.any() == share
    batches = [lay_out(rows, part) for part in (numbers[:1], numbers[1:])]

    def loss(batch):
        with torch.no_grad():
            start = reference.logprobs(batch.x, batch.y, **batch.layout())
        return sums(cfg, batch, policy.logprobs(batch.x, batch.y, **batch.layout()), start)

    means = loop.accumulate(loss, [(b,) for b in batches], len(sequences) // 2)
    return means, gradients(policy)


def answer_logp(model, ids: np.ndarray, counted: np.ndarray) -> torch.Tensor:
    """log p of the counted ids, each after all before it: one sequence, every logit."""
    x = torch.from_numpy(ids.astype(np.int64))
    logps = model(x[None]).logits[0].log_softmax(-1)
    return sum(logps[t - 1, x[t]] for t in range(1, len(x)) if counted[t])


def brute_force(cfg: DpoConfig, sequences) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    policy, reference = map(hugging_face, models())
    losses, rewards = [], []
    for chosen, rejected in zip(sequences[::2], sequences[1::2], strict=True):
        gain = []
        for sequence in (chosen, rejected):
            logp, tokens = answer_logp(policy, *sequence), int(sequence[1].sum())
            if cfg.loss != "simpo":
                with torch.no_grad():
                    start = answer_logp(reference, *sequence)
                logp = logp - start
            gain.append(logp / tokens if cfg.loss in ("simpo", "length-normalised") else logp)
        m = cfg.beta * (gain[0] - gain[1])
        if cfg.loss == "ipo":
            losses.append((gain[0] - gain[1] - 1 / (2 * cfg.beta)) ** 2)
        elif cfg.loss == "simpo":
            losses.append(F.softplus(cfg.margin - m))
        else:
            losses.append(
                (1 - cfg.label_smoothing) * F.softplus(-m) + cfg.label_smoothing * F.softplus(m)
            )
        rewards.append([cfg.beta * g.item() for g in gain])
    loss = sum(losses) / len(losses)
    loss.backward()
    means = np.mean(rewards, 0)
    figures = {
        "loss": loss.item(),
        "rewards/chosen": means[0],
        "rewards/rejected": means[1],
        "rewards/margins": means[0] - means[1],
        "rewards/accuracies": np.mean([a > b for a, b in rewards]),
    }
    return figures, {name: p.grad for name, p in policy.named_parameters()}


def agree(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    """Equal gradients: the error of each is small beside its own size."""
    assert set(ours) - set(theirs) <= {"lm_head.weight"}
    assert len(theirs) > 10
    for name, their in theirs.items():
        assert float(their.norm()) > 0, name
        assert float((ours[name] - their).norm() / their.norm()) < tolerance, name


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "cfg", VARIANTS, ids=["sigmoid", "smoothed", "ipo", "length-normalised", "simpo"]
)
def test_losses_rewards_and_gradients_equal_one_sequence_at_a_time(cfg, share):
    pytest.importorskip("transformers")
    sequences = pairs()
    ours, our_gradients = packed_step(cfg, sequences, share)
    theirs, their_gradients = brute_force(cfg, sequences)
    assert abs(theirs["rewards/margins"]) > 0.01  # the models differ: this tests something
    for name, value in theirs.items():
        assert ours[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
    agree(our_gradients, their_gradients)
