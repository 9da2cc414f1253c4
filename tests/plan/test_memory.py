"""Memory by formula against memory counted: storages alive after a forward pass, and PyTorch's own allocator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlm.config import ModelConfig
from fastlm.model import Transformer
from fastlm.plan.memory import saved_bytes

SMALL = ModelConfig(vocab_size=501, dim=64, n_layers=3, n_heads=4, n_kv_heads=4, ffn_dim=160, max_seq_len=64)
SHAPES = {
    "multi-head": SMALL,
    "grouped queries, untied": replace(SMALL, n_kv_heads=2, tie_embeddings=False),
    "one key/value head, qk-norm, wide heads": replace(SMALL, n_kv_heads=1, qk_norm=True, head_width=24),
    "biases, an odd vocabulary, a wide ffn": replace(SMALL, qkv_bias=True, vocab_size=77, ffn_dim=352, n_layers=1),
}


class Storages(TorchDispatchMode):
    """The storages that operations make inside, for as long as they live."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self, but: list[torch.Tensor]) -> int:
        known = {t.untyped_storage()._cdata for t in but}
        return sum(size for key, (ref, size) in self.made.items() if key not in known and not ref.expired())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_saved_bytes_are_what_is_alive_between_forward_and_backward(name, dtype, keep, recompute):
    config, rows, length = SHAPES[name], 3, 40
    torch.manual_seed(0)
    model = Transformer(config, checkpoint_activations=recompute)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    for block in model.blocks:
        block.keep_product = keep
    tokens = torch.randint(config.vocab_size, (rows, length))
    with Storages() as storages, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model.loss(tokens, tokens)
        loss = loss / tokens.numel()
    counted = storages.alive([tokens, *model.parameters(), *model.buffers()])
    expected = saved_bytes(config, rows * length, dtype.itemsize, keep, recompute)
    print(name, dtype, keep, recompute, counted, expected, counted - expected)
    loss.backward()
    assert 0 <= counted - expected <= 64 * config.n_layers
