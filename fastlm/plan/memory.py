"""Bytes in the memory of one GPU, by kind, at the moments of a step when most of it is in use.

b = 2 bytes in bf16, N = tokens of a pass, D = dim, F = ffn_dim, H and K = query and key/value heads
of h channels, V = the padded vocabulary, L = layers, P = parameters. Source of every term: what
fastlm/model and its kernels save, and what fastlm/train/optim.py allocates. PyTorch's allocator
is meant; a CUDA context and NCCL's buffers come on top.
"""

from __future__ import annotations

import torch

from fastlm.config import ModelConfig
from fastlm.kernels.head_chunks import gpu_chunk_rows
from fastlm.model import SwiGLULinear, Transformer, keep_what_fits
from fastlm.plan.cards import Card
from fastlm.plan.work import (
    FULL,
    ITEM,
    Way,
    Work,
    hidden_parameters,
    matrices,
    stored_parameters,
)

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
CUBLAS = 2 * 32 << 20  # workspaces on sm_90, of the host's thread and of autograd's
RESERVED_GIB = 2  # left free for the CUDA context, NCCL's buffers and gaps: assumed

Moment = dict[str, int]  # kind -> bytes


def keeps_product(work: Work, memory_bytes: int) -> bool:
    """Whether a run keeps SwiGLU's product on such a GPU, asked of a model without storage."""
    with torch.device("meta"):
        model = Transformer(work.config, checkpoint_activations=work.recompute)
    keep_what_fits(model, work.tokens, memory_bytes, ITEM)
    return any(isinstance(part, SwiGLULinear) and part.keep_product for part in model.modules())


def block_bytes(c: ModelConfig, tokens: int, itemsize: int, keep_product: bool) -> int:
    """What one block saves for its backward pass, without copies of its weights.

    N b (4 D + (H + 2 K) h + H h + 2 F [+ F] [+ (H + K) h]) + 4 N (2 + H [+ H + K]): two residual
    sums and two norms' outputs, q, k, v, attention's output, gate and up, SwiGLU's product where it
    is kept, the raw q and k under qk_norm; in fp32 the norms' scales and attention's log-sum-exp.
    """
    heads = c.n_heads + c.n_kv_heads
    numbers = 4 * c.dim + 2 * heads * c.head_dim + (3 if keep_product else 2) * c.ffn_dim
    scales = 2 + c.n_heads
    if c.qk_norm:
        numbers += heads * c.head_dim
        scales += heads
    return tokens * (itemsize * numbers + FULL * scales)


def saved_bytes(
    c: ModelConfig,
    tokens: int,
    itemsize: int = ITEM,
    keep_product: bool = False,
    recompute: bool = False,
) -> int:
    """What a forward pass leaves in memory for the backward pass.

    L blocks, a 16-bit copy of their matrices where the matmuls are 16-bit, the last norm's input
    and scale (N (b D + 4)), and of the head's loss its two gradients, made in the forward pass: N b
    D and 4 V D. With recompute a block is its two inputs (the first has one) and attention's output
    and log-sum-exp.
    """
    heads = c.n_heads * c.head_dim
    if recompute:
        streams = (2 * c.n_layers - 1) * c.dim
        numbers = streams + c.n_layers * heads
        blocks = tokens * (itemsize * numbers + FULL * c.n_layers * c.n_heads)
    else:
        blocks = c.n_layers * block_bytes(c, tokens, itemsize, keep_product)
        blocks += cast_bytes(c, itemsize)
    ends = tokens * (2 * itemsize * c.dim + FULL)
    return blocks + ends + FULL * c.padded_vocab_size * c.dim


def cast_bytes(c: ModelConfig, itemsize: int) -> int:
    """The matmuls' copies of the blocks' matrices; in fp32 they read the weights themselves."""
    return itemsize * hidden_parameters(c) if itemsize < FULL else 0


def optimizer_bytes(c: ModelConfig, name: str) -> int:
    """AdamW's two moments of every number in fp32, 8 P; Muon has one for the blocks' matrices."""
    return 2 * FULL * stored_parameters(c) - (FULL * hidden_parameters(c) if name == "muon" else 0)


def muon_bytes(c: ModelConfig, way: Way) -> int:
    """What orthogonalising takes while it lasts; on one GPU b (2 hidden + 7 sum of m^2).

    m: a matrix's shorter side. The momenta as one stack, beside it those products that this GPU
    makes, and seven stacks of m x m (polynomials() in fastlm/train/optim.py). Of several GPUs each
    has its share of every shape's matrices, and gets its part of all back.
    """
    share = -(-c.n_layers // way.gpus)
    squares = share * sum(min(shape) ** 2 for shape in matrices(c))
    mine = share * sum(m * n for m, n in matrices(c))
    part = -(-hidden_parameters(c) // way.shards)
    come = mine if way.shards > 1 else 0  # whole matrices, from parts
    back = part if way.gpus > 1 else 0
    return ITEM * (part + come + mine + max(7 * squares, back))


def moments(work: Work, way: Way, card: Card) -> dict[str, Moment]:
    """The moments at which memory is fullest, each by kind; the peak is the largest sum.

    loss: the last chunk of logits, before any activation is freed. last block: its backward pass,
    the first to run. backward: its end, when every gradient is there, compiled beside those of the
    passes before. optimizer: Muon's work, or nothing beside the gradients. A shard of the weights
    is 4 P / shards; where they are sharded, a block's 16-bit weights are there while it runs, and
    the next one's, its gradient before that is shared out (6 bytes a number), and embedding, head
    and norms in 16 bits all the time.
    """
    c, tokens, shards = work.config, work.tokens, way.shards
    keep = keeps_product(work, card.memory_gib << 30)
    stored, block = stored_parameters(c), hidden_parameters(c) // c.n_layers
    head = FULL * c.padded_vocab_size * c.dim  # its gradient in fp32, made with the loss
    casts, gathered, scattered, passed_on = cast_bytes(c, ITEM), 0, 0, head
    if shards > 1:  # the matmuls read what is gathered instead of copies
        casts, passed_on = 0, head // 2  # gradients are in 16 bits until they are shared out
        gathered = ITEM * (stored - hidden_parameters(c) + 2 * block)
        scattered = (ITEM + FULL) * block
    shard = -(-FULL * stored // shards)
    state = {"weights": shard, "optimizer": -(-optimizer_bytes(c, work.optimizer) // shards)}
    # Gradients before a backward pass: those of the passes before; ddp's buckets are always there
    earlier = shard if work.passes > 1 or way.mode == "ddp" else 0
    activations = saved_bytes(c, tokens, ITEM, keep, work.recompute) - head
    if not work.recompute:
        activations += casts - cast_bytes(c, ITEM)
    row = ITEM * c.padded_vocab_size
    chunk = row * gpu_chunk_rows(tokens, row, c.dim, card.memory_gib << 30, card.multiprocessors)
    logits = chunk + (head // 2 if shards == 1 else 0)  # and the head's weight in 16 bits
    stream = ITEM * tokens * c.dim  # the head's input, then the gradient that goes down the blocks
    # SwiGLU's backward: the gradients of gate and up, the product's, and the product where it was
    # not kept
    swiglu = ITEM * tokens * (3 if keep else 4) * c.ffn_dim - stream
    again = 0
    if work.recompute:  # the block's activations once more, but attention's, which were kept
        kept = tokens * (ITEM * c.n_heads * c.head_dim + FULL * c.n_heads)
        again = block_bytes(c, tokens, ITEM, keep) - kept + casts // c.n_layers
    last_block = gathered + scattered + swiglu + again
    muon = muon_bytes(c, way) if work.optimizer == "muon" else 0

    def moment(gradients: int, activations: int, logits: int, workspace: int) -> Moment:
        found = state | {"gradients": gradients, "activations": activations, "logits": logits}
        return {kind: (found | {"workspace": workspace + CUBLAS})[kind] for kind in KINDS}

    return {
        "loss": moment(earlier + head, activations, logits, gathered + stream),
        "last block": moment(earlier + passed_on, activations, 0, last_block),
        "backward": moment(earlier + shard, 0, 0, gathered + scattered),
        "optimizer": moment(shard, 0, 0, muon),
    }


def peak(work: Work, way: Way, card: Card) -> tuple[str, Moment]:
    """The moment of the largest sum, and its bytes by kind."""
    found = moments(work, way, card)
    name = max(found, key=lambda moment: sum(found[moment].values()))
    return name, found[name]


def fits(moment: Moment, card: Card) -> bool:
    return sum(moment.values()) <= (card.memory_gib - RESERVED_GIB) << 30
