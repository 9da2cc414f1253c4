"""The model against Hugging Face's Llama and Qwen3, and counts against arithmetic done by hand."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastlm.config import PRESETS, ModelConfig
from fastlm.errors import UserError
from fastlm.model import (
    Transformer,
    build,
    count_parameters,
    initialise,
    keep_what_fits,
    training_flops_per_token,
)

CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab_size=501, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, max_seq_len=64
)
SHAPES = {
    "multi-head": replace(SMALL, n_kv_heads=4),
    "grouped-query": SMALL,
    "multi-query, untied": replace(SMALL, n_kv_heads=1, tie_embeddings=False),
    "odd vocabulary and theta": replace(SMALL, vocab_size=77, rope_theta=500.0, norm_eps=1e-3),
    "qk-norm": replace(SMALL, qk_norm=True),
}


def randomised(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose every weight matters (the real initialisation starts with zeros)."""
    model = build(config, seed, CPU)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator)
                * (0.3 if p.dim() == 1 else p.shape[-1] ** -0.5)
            )
            if p.dim() == 1:
                p += 1
            if name in ("embedding", "head"):
                p[config.vocab_size :] = 0
    return model


def batch(config: ModelConfig, rows: int = 3, length: int = 17) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100
    return tokens[:, :-1], targets


def hugging_face(model: Transformer):
    """The same weights in transformers' own classes."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    shape = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "attention_bias": False,
    }
    kind = ("Qwen3Config", "Qwen3ForCausalLM") if c.qk_norm else ("LlamaConfig", "LlamaForCausalLM")
    theirs = getattr(transformers, kind[1])(getattr(transformers, kind[0])(**shape))
    theirs.load_state_dict(as_hugging_face(model), strict=not c.tie_embeddings)
    theirs.tie_weights()
    return theirs.eval()


def as_hugging_face(model: Transformer, gradients: bool = False) -> dict[str, Tensor]:
    """Parameters (or their gradients) under Hugging Face's names."""
    c = model.config
    mine = {n: (p.grad if gradients else p.detach()) for n, p in model.named_parameters()}
    out = {
        "model.embed_tokens.weight": mine["embedding"][: c.vocab_size],
        "model.norm.weight": mine["norm.weight"],
    }
    if not c.tie_embeddings:
        out["lm_head.weight"] = mine["head"][: c.vocab_size]
    heads = [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim]
    for i in range(c.n_layers):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = mine[a + "qkv.weight"].split(heads)
        gate, up = mine[a + "gate_up.weight"].chunk(2)
        out |= {
            b + "self_attn.q_proj.weight": q,
            b + "self_attn.k_proj.weight": k,
            b + "self_attn.v_proj.weight": v,
            b + "self_attn.o_proj.weight": mine[a + "out.weight"],
            b + "mlp.gate_proj.weight": gate,
            b + "mlp.up_proj.weight": up,
            b + "mlp.down_proj.weight": mine[a + "down.weight"],
            b + "input_layernorm.weight": mine[a + "attention_norm.weight"],
            b + "post_attention_layernorm.weight": mine[a + "ffn_norm.weight"],
        }
        if c.qk_norm:
            out |= {
                b + "self_attn.q_norm.weight": mine[a + "q_norm.weight"],
                b + "self_attn.k_norm.weight": mine[a + "k_norm.weight"],
            }
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_logits_loss_and_gradients_equal_hugging_face(name):
    model = randomised(SHAPES[name])
    theirs = hugging_face(model)
    tokens, targets = batch(model.config)
    expected = theirs(tokens).logits
    torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-5, atol=1e-5)
    expected_loss = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    loss = model.loss(tokens, targets)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    loss.backward()
    expected_loss.backward()
    mine, reference = as_hugging_face(model, gradients=True), dict(theirs.named_parameters())
    for key, grad in mine.items():
        error = (grad - reference[key].grad).norm() / reference[key].grad.norm()
        assert error < 1e-5, (key, error)


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_count_is_that_of_hugging_face(name):
    model = build(SHAPES[name], 0, CPU)
    assert count_parameters(SHAPES[name]) == sum(
        p.numel() for p in hugging_face(model).parameters()
    )


def test_modern_253m_has_252_8_million_parameters():
    by_hand = 50257 * 1024 + 12 * (4 * 1024**2 + 3 * 1024 * 4096 + 2 * 1024) + 1024
    assert count_parameters(PRESETS["modern-253m"]) == by_hand
    assert round(by_hand / 1e6, 1) == 252.8


def test_modern_253m_takes_1_592_gigaflop_per_token():
    weights = 12 * (4 * 1024**2 + 3 * 1024 * 4096) + 50257 * 1024
    attention = (
        12 * 3 * 2 * 2 * (1024 // 2) * 1024
    )  # layers, forward + backward, products, mul + add, mean span, width
    assert training_flops_per_token(PRESETS["modern-253m"], 1024) == 6 * weights + attention
    assert round((6 * weights + attention) / 1e9, 3) == 1.592


def test_matmul_flops_equal_those_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    import fastlm.kernels.audit.flops  # noqa: F401

    config = replace(SMALL, vocab_size=512)  # no padding
    model, (tokens, _) = randomised(config), batch(config, rows=1, length=64)
    with FlopCounterMode(display=False) as counter:
        model.logits(tokens).sum().backward()
    seen = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = (
        config.n_layers * 6 * 64 * config.n_heads * config.head_dim
    )  # PyTorch does not count the CPU's operator
    assert sum(n for op, n in seen.items() if "attention" not in op) == 64 * (
        training_flops_per_token(config, 64) - attention
    )


def test_padding_rows_are_invisible_and_stay_zero():
    model = randomised(replace(SMALL, vocab_size=65))
    assert model.embedding.shape[0] == 128
    tokens, targets = batch(model.config)
    assert model.logits(tokens).shape[-1] == 65
    model.loss(tokens, targets).backward()
    assert model.embedding.grad[65:].abs().max() == 0
    before = model.loss(tokens, targets)
    with torch.no_grad():
        model.embedding[65:] = 100.0
    assert model.loss(tokens, targets).item() == before.item()


def test_a_fresh_model_predicts_close_to_uniformly_and_every_seed_differs():
    model = build(SMALL, 0, CPU)
    tokens, targets = batch(SMALL)
    per_token = model.loss(tokens, targets) / (targets != -100).sum()
    assert abs(per_token.item() - torch.tensor(501.0).log().item()) < 0.05
    again, other = build(SMALL, 0, CPU), build(SMALL, 1, CPU)
    assert torch.equal(model.embedding, again.embedding)
    assert not torch.equal(model.embedding, other.embedding)


def test_initialisation_fills_every_parameter():
    model = Transformer(SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    initialise(model, 3)
    assert all(p.isfinite().all() for p in model.parameters())


def test_packed_documents_give_the_losses_of_each_document_alone():
    model = randomised(SMALL).double()
    lengths = [5, 1, 11, 7]
    tokens, targets = batch(SMALL, rows=1, length=sum(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = ends.int()
    packed = model.loss(tokens, targets, positions=positions, cu_seqlens=cu_seqlens, max_seqlen=11)
    alone = sum(model.loss(tokens[:, a:b], targets[:, a:b]) for a, b in pairwise(ends.tolist()))
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 501
    args = {"positions": positions, "cu_seqlens": cu_seqlens, "max_seqlen": 11}
    difference = (model(changed, **args) - model(tokens, **args)).abs().amax(-1)[0]
    assert difference[5:].max() == 0
    assert difference[2:5].min() > 0


def test_boundaries_need_a_length():
    tokens, _ = batch(SMALL, rows=1, length=4)
    with pytest.raises(ValueError, match="cu_seqlens needs max_seqlen"):
        randomised(SMALL)(tokens, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))


@pytest.mark.parametrize("backend", ["torch", "masked"])
def test_activation_checkpointing_changes_nothing(backend):
    model = randomised(SMALL)
    model.attention_backend = backend
    twin = copy.deepcopy(model)
    twin.checkpoint_activations = True
    tokens, targets = batch(SMALL, rows=1, length=12)
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    for m in (model, twin):
        m.loss(tokens, targets).backward()
        m.loss(tokens, targets, positions=positions, cu_seqlens=ends, max_seqlen=7).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_what_is_kept_for_the_backward_changes_nothing():
    model = randomised(SMALL)
    twin = copy.deepcopy(model)
    tokens, targets = batch(SMALL)
    keep_what_fits(twin, tokens.numel(), 80 << 30, 4)
    assert twin.blocks[0].down.keep_product
    for m in (model, twin):
        (m.loss(tokens, targets) + m.logprobs(tokens, targets).square().sum()).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize(
    ("rows", "gib", "recompute", "keeps"),
    [
        (32, 80, False, True),
        (128, 80, False, False),
        (32, 12, False, False),
        (1, 12, False, True),
        (32, 80, True, False),
    ],
)
def test_more_is_kept_only_where_half_of_the_gpu_has_room(rows, gib, recompute, keeps):
    with torch.device("meta"):
        model = Transformer(PRESETS["modern-253m"], checkpoint_activations=recompute)
    keep_what_fits(model, rows * 1024, gib << 30, 2)
    assert [block.down.keep_product for block in model.blocks] == [keeps] * 12
    assert (model.keep_logits_bytes > 0) == (keeps or recompute)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped-query", "qk-norm"])
def test_compiled_and_eager_gradients_agree(name):
    model = randomised(SHAPES[name])
    twin = copy.deepcopy(model)
    tokens, targets = batch(model.config, rows=4, length=32)
    model.loss(tokens, targets, 1e-4).backward()
    compiled = torch.compile(twin.loss, fullgraph=True, dynamic=False)(tokens, targets, 1e-4)
    compiled.backward()
    for (key, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 2e-6 * a.grad.norm(), key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_heads": 5}, "n_heads is 5, which does not divide model.dim 64"),
        ({"n_kv_heads": 3}, "n_kv_heads is 3, which does not divide model.n_heads 4"),
        ({"dim": -1}, "dim is -1"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"dim": 12, "n_heads": 4, "n_kv_heads": 4}, "must be even"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_impossible_shapes_are_named(change, words):
    with pytest.raises(UserError, match=words):
        replace(SMALL, **change)


EAGER = """
import sys, torch
from fastlm.config import PRESETS, OptimConfig
from fastlm.model import build
from fastlm.train.optim import make_optimizers
model, tokens = build(PRESETS["tiny"], 0, torch.device("cpu")), torch.zeros(1, 8, dtype=torch.long)
model.loss(tokens, tokens).backward()
ends = torch.tensor([0, 3, 8], dtype=torch.int32)
positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
model.loss(tokens, tokens, positions=positions, cu_seqlens=ends, max_seqlen=5).backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
for optimizer in make_optimizers(model, OptimConfig()):
    optimizer.step()
print("torch._dynamo" in sys.modules)
"""


def test_an_eager_step_does_not_import_the_compiler():
    done = subprocess.run([sys.executable, "-c", EAGER], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
