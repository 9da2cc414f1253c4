"""Memory by formula against memory counted: storages alive after a forward pass, and PyTorch's own
allocator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlm.config import PRESETS, ModelConfig, OptimConfig
from fastlm.model import SwiGLULinear, Transformer
from fastlm.plan import memory
from fastlm.plan.cards import CARDS
from fastlm.plan.work import Way, Work, hidden_parameters, stored_parameters, ways
from fastlm.train.optim import make_optimizers, named_state

MEASURED = json.loads((Path(__file__).parent / "measured.json").read_text(encoding="utf-8"))[
    "peak_gib"
]
ONE = ways(1, 8)[0]
H100 = CARDS["h100"]
SMALL = ModelConfig(
    vocab_size=501, dim=64, n_layers=3, n_heads=4, n_kv_heads=4, ffn_dim=160, max_seq_len=64
)
SHAPES = {
    "multi-head": SMALL,
    "grouped queries, untied": replace(SMALL, n_kv_heads=2, tie_embeddings=False),
    "one key/value head, qk-norm, wide heads": replace(
        SMALL, n_kv_heads=1, qk_norm=True, head_width=24
    ),
    "biases, an odd vocabulary, a wide ffn, one layer": replace(
        SMALL, qkv_bias=True, vocab_size=77, ffn_dim=352, n_layers=1
    ),
}


class Storages(TorchDispatchMode):
    """The storages that operations make inside, each for as long as it lives."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self, but: list[Tensor]) -> int:
        """Bytes of those that still live, but those of the tensors given."""
        known = {tensor.untyped_storage()._cdata for tensor in but}
        return sum(
            size for key, (ref, size) in self.made.items() if key not in known and not ref.expired()
        )


@pytest.mark.parametrize(("keep", "recompute"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_saved_bytes_are_what_lives_between_forward_and_backward(name, dtype, keep, recompute):
    config, rows, length = SHAPES[name], 3, 40
    model = Transformer(config, checkpoint_activations=recompute)
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.01)
    for part in model.modules():
        if isinstance(part, SwiGLULinear):
            part.keep_product = keep
    tokens = torch.zeros(rows, length, dtype=torch.long)
    with Storages() as storages, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model.loss(tokens, tokens)
    counted = storages.alive([tokens, *model.parameters(), *model.buffers()])
    expected = memory.saved_bytes(config, rows * length, dtype.itemsize, keep, recompute)
    row_bounds = 4 * (rows + 1) * config.n_layers  # int32, of attention on a CPU
    assert loss.nbytes == 4
    assert 0 <= counted - expected - loss.nbytes <= row_bounds


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_optimizer_take_what_the_trainers_tensors_take(shape, name):
    config = SHAPES[shape]
    with torch.device("meta"):
        model = Transformer(config)
        state = named_state(model, make_optimizers(model, OptimConfig(name=name)))
    assert sum(p.numel() for p in model.parameters()) == stored_parameters(config)
    blocks = sum(p.numel() for block in model.blocks for p in block.parameters() if p.dim() == 2)
    assert blocks == hidden_parameters(config)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    taken = sum(tensor.nbytes for tensor in state.values() if tensor.dim())  # step counters aside
    assert taken == memory.optimizer_bytes(config, name)
    assert vectors < stored_parameters(config) - hidden_parameters(config)


@pytest.mark.parametrize("case", MEASURED)
def test_peak_of_modern_253m_is_the_allocators_at_full_size(case):
    work = Work(PRESETS["modern-253m"], 32, 1024, optimizer=case.split(",")[0])
    _, moment = memory.peak(work, ONE, H100)
    assert sum(moment.values()) / 2**30 == pytest.approx(MEASURED[case], rel=0.005)


def test_saved_bytes_of_modern_253m_are_the_compilers():
    results = Path(__file__).parents[2] / "bench" / "results" / "h100-projected.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    wanted = {
        "case": "modern-253m, pretrain, 32 x 1024",
        "peer": "ours",
        "unit": "GB saved for the backward",
    }
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    expected = memory.saved_bytes(PRESETS["modern-253m"], 32 * 1024, keep_product=True)
    assert abs(1e9 * row["median"] - expected) <= 64  # the loss itself


def test_shards_of_a_model_add_up_to_it():
    work = Work(PRESETS["modern-253m"], 32, 1024)
    one = memory.moments(work, ONE, H100)["optimizer"]
    shards = memory.moments(work, Way("fsdp", 8, 1, 8), H100)["optimizer"]
    for kind in ("weights", "gradients", "optimizer"):
        assert 0 <= 8 * shards[kind] - one[kind] < 8


def test_memory_falls_with_shards_and_recomputing_and_copies_add_ddps_buckets():
    work = Work(PRESETS["modern-253m"], 32, 1024)

    def total(work: Work, way: Way) -> int:
        return sum(memory.peak(work, way, H100)[1].values())

    fsdp = [total(work, Way("fsdp", shards, 1, 8)) for shards in (2, 8, 64)]
    assert fsdp == sorted(fsdp, reverse=True)
    buckets = 4 * stored_parameters(work.config)
    assert total(work, Way("ddp", 1, 64, 8)) == total(work, ONE) + buckets
    assert total(replace(work, recompute=True), ONE) < total(work, ONE) / 2


def test_product_is_kept_where_a_run_would_keep_it():
    work = Work(PRESETS["modern-253m"], 32, 1024)
    assert memory.keeps_product(work, 79 << 30)
    assert not memory.keeps_product(work, 12 << 30)
    assert not memory.keeps_product(replace(work, recompute=True), 79 << 30)
