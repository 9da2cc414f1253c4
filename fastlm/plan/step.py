"""Seconds of an optimizer step: computing, sending, and the part of sending that is waited for.

Computing: every part at the rate that is usually reached of its bound, as
bench/counted/compiled_step.py counts it for one H100 (docs/kernels.md, "The trainer's step,
projected"), scaled to another card by its data sheet. Communicating: a ring's time (Thakur,
Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH"),

    all-gather, reduce-scatter of B bytes over n GPUs: B (n - 1) / n / bandwidth + latency
    all-reduce: twice that

Overlap: what is sent during a pass is hidden behind it as far as it is shorter, but for the first
part to arrive and the last to leave (Li et al. 2020, "PyTorch Distributed"; Zhao et al. 2023,
"PyTorch FSDP").
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastlm.model import training_flops_per_token
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

# Shares of a data sheet's figure that are reached: bench/counted/compiled_step.py's assumptions
# over an H100's 989 TFLOP/s, 3.35 TB/s
MATMULS_REACH = 0.9 * 700 / 989
ATTENTION_REACHES = 288 / 989
KERNELS_REACH = 0.85 * 3.0 / 3.35
LINKS_REACH = 0.8  # assumed
BUCKET_BYTES = 25 << 20  # of gradients: DistributedDataParallel's default
# Seconds before the first byte, and for each step of a ring, in a machine and between machines:
# what NCCL itself reckons with (src/graph/tuning.cc: ring, protocol Simple)
START_S, NODE_HOP_S, NETWORK_HOP_S = 8.4e-6, 3.4e-6, 14e-6


def matmul_rate(card: Card) -> float:
    """FLOP/s that are reached."""
    return MATMULS_REACH * card.flops


def kernel_rate(card: Card) -> float:
    """Bytes/s that are reached."""
    return KERNELS_REACH * card.memory_tb_s * 1e12


class Step(NamedTuple):
    """An optimizer step of one GPU."""

    forward_s: float  # of one pass
    backward_s: float  # of one pass
    update_s: float  # clipping and the optimizer
    sent_bytes: float
    sending_s: float
    waiting_s: float  # the part of it that no computing hides
    tokens: int  # of all GPUs
    flops: float  # of all GPUs, as MFU counts them

    def seconds(self, passes: int) -> float:
        return passes * (self.forward_s + self.backward_s) + self.update_s + self.waiting_s


# ------------------------------------------------------------------------------ computing


def matmul_s(m: int, n: int, k: int, out_bytes: int, card: Card) -> float:
    """Seconds of (m, k) by (k, n): its 2 m n k FLOPs or its operands' bytes, the longer."""
    moved = ITEM * (m * k + k * n) + out_bytes * m * n
    return max(2 * m * n * k / matmul_rate(card), moved / kernel_rate(card))


def kernel_bytes(work: Work) -> tuple[float, float]:
    """Bytes that kernels beside matmuls and attention move, forward and backward (docs/kernels.md).

    A token and layer, b = 2: two norms 2 * 4 b D, both ways; RoPE 2 b (H + K) h, both ways; SwiGLU
    3 b F forward and 5 b F backward; qk_norm 2 and 3 b (H + K) h. A pass: the last norm; two passes
    over the logits, 2 b V; every matrix cast to bf16, 6 bytes; the embedding's rows read, cast and
    their gradients added up, 8 b D in all; the head's two gradients scaled. Recomputing repeats the
    blocks' forward.
    """
    c, n = work.config, work.tokens
    heads = (c.n_heads + c.n_kv_heads) * c.head_dim
    qk = 1 if c.qk_norm else 0
    layer = ITEM * (8 * c.dim + (2 + 2 * qk) * heads + 3 * c.ffn_dim)
    back = ITEM * (8 * c.dim + (2 + 3 * qk) * heads + 5 * c.ffn_dim)
    head = c.padded_vocab_size * c.dim
    ends = ITEM * n * (8 * c.dim + 2 * c.padded_vocab_size) + (ITEM + FULL) * head
    forward = n * c.n_layers * layer + ends + (ITEM + FULL) * hidden_parameters(c)
    backward = n * c.n_layers * back + ITEM * n * 10 * c.dim + 2 * FULL * head
    return forward, backward + (n * c.n_layers * layer if work.recompute else 0)


def pass_s(work: Work, card: Card) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass: matmuls, attention, other kernels, in turn.

    A matmul forward is two backward; the head's three are all in the forward pass. Attention: 2/7
    forward, 5/7 backward (FlashAttention makes the scores again). Recomputing repeats the blocks'
    forward but attention.
    """
    c, n = work.config, work.tokens
    one = sum(matmul_s(n, out, into, ITEM, card) for out, into in matrices(c)) * c.n_layers
    two = one + sum(matmul_s(out, into, n, FULL, card) for out, into in matrices(c)) * c.n_layers
    head = 6 * n * c.padded_vocab_size * c.dim / matmul_rate(card)
    products = training_flops_per_token(c, work.seq_len) - training_flops_per_token(c, 0)
    attention = n * products / (ATTENTION_REACHES * card.flops)
    moved = [size / kernel_rate(card) for size in kernel_bytes(work)]
    again = one if work.recompute else 0
    return one + head + attention * 2 / 7 + moved[0], two + again + attention * 5 / 7 + moved[1]


def muon_flops(m: int, n: int) -> float:
    """Of orthogonalising a matrix, m <= n, in 16 bits: 8 m^2 n + 28 m^3 (fastlm/train/optim.py)."""
    m, n = min(m, n), max(m, n)
    return 8.0 * m * m * n + 28.0 * m**3


def update_s(work: Work, way: Way, card: Card) -> float:
    """Seconds of clipping, 4 bytes a number, and of the optimizer, 28, and 20 m^2 of Muon's stacks.

    A GPU updates its shard. Muon's matrices are shared out over all GPUs, whole ones, so that no
    more GPUs than layers help.
    """
    c = work.config
    stored = stored_parameters(c)
    seconds = 32 * stored / way.shards / kernel_rate(card)
    if work.optimizer == "muon":
        share = -(-c.n_layers // way.gpus)
        squares = sum(min(shape) ** 2 for shape in matrices(c))
        flops = sum(muon_flops(*shape) for shape in matrices(c))
        seconds += share * (flops / matmul_rate(card) + 20 * squares / kernel_rate(card))
    return seconds


# -------------------------------------------------------------------------- communicating


class Ring(NamedTuple):
    """GPUs that share out tensors: how many, in how many machines, and what each can send."""

    gpus: int
    nodes: int
    bytes_s: float

    def seconds(self, size: float, calls: int = 1) -> float:
        """Of all-gathering or reduce-scattering size bytes in so many calls."""
        if self.gpus == 1:
            return 0.0
        outside = self.nodes if self.nodes > 1 else 0
        hops = (self.gpus - max(1, outside)) * NODE_HOP_S + outside * NETWORK_HOP_S
        return self.sent(size) / self.bytes_s + calls * (START_S + hops)

    def sent(self, size: float) -> float:
        """Bytes that each GPU sends."""
        return size * (self.gpus - 1) / self.gpus

    def all_reduce_s(self, size: float, calls: int = 1) -> float:
        """Twice the bytes; hops as in the trees that NCCL takes: 2 log2 of the machines outside."""
        if self.gpus == 1:
            return 0.0
        inside, outside = self.gpus / self.nodes - 1, math.log2(self.nodes)
        hops = 2 * inside * NODE_HOP_S + 2 * outside * NETWORK_HOP_S
        return 2 * self.sent(size) / self.bytes_s + calls * (START_S + hops)


def rings(way: Way, card: Card) -> tuple[Ring, Ring]:
    """The GPUs that share one copy, and those that hold the same shard of all copies.

    All network cards of a machine work for a ring through all of its GPUs.
    """
    here, network = card.node_gb_s * LINKS_REACH * 1e9, card.network_gb_s * LINKS_REACH * 1e9

    def ring(gpus: int, per_node: int) -> Ring:
        nodes = -(-gpus // per_node)
        return Ring(gpus, nodes, here if nodes == 1 else min(here, per_node * network))

    # hsdp: each of a machine's GPUs has a ring of its own to the other machines
    apart = 1 if way.mode == "hsdp" else way.per_node
    return ring(way.shards, way.per_node), ring(way.copies, apart)


def step(work: Work, way: Way, card: Card) -> Step:
    """An optimizer step.

    ddp: fp32 gradients are all-reduced in buckets of 25 MiB while the last backward pass goes on;
    the embedding's, which comes last, is waited for. fsdp, hsdp: each pass all-gathers 16-bit
    weights, all of them forward and the blocks' backward, and reduce-scatters fp32 gradients, block
    by block; after the last pass copies all-reduce their shards.
    """
    c = work.config
    stored, hidden = stored_parameters(c), hidden_parameters(c)
    forward, backward = pass_s(work, card)
    shard, copy = rings(way, card)
    sent, sending = muon_exchange(work, way, card) if work.optimizer == "muon" else (0.0, 0.0)
    waiting = sending
    if way.shards == 1:
        reduce = copy.all_reduce_s(FULL * stored, math.ceil(FULL * stored / BUCKET_BYTES))
        last = copy.all_reduce_s(FULL * c.padded_vocab_size * c.dim)
        sent += 2 * copy.sent(FULL * stored)
        sending += reduce
        waiting += last + max(0.0, reduce - last - backward)
    else:
        rest = stored - hidden  # gathered first, shared out last
        gather, first = shard.seconds(ITEM * stored, c.n_layers + 1), shard.seconds(ITEM * rest)
        again = shard.seconds(ITEM * hidden, c.n_layers)
        scatter, last = shard.seconds(FULL * stored, c.n_layers + 1), shard.seconds(FULL * rest)
        reduce = copy.all_reduce_s(FULL * stored / way.shards, c.n_layers + 1)
        sent += work.passes * shard.sent(ITEM * (stored + hidden) + FULL * stored)
        sent += 2 * copy.sent(FULL * stored / way.shards)
        sending += work.passes * (gather + again + scatter) + reduce
        waiting += work.passes * (first + max(0.0, gather - first - forward) + last)
        waiting += (work.passes - 1) * max(0.0, again + scatter - last - backward)
        waiting += max(0.0, again + scatter - last + reduce - backward)
    tokens = work.tokens * work.passes * way.gpus
    flops = tokens * training_flops_per_token(c, work.seq_len)
    update = update_s(work, way, card)
    return Step(forward, backward, update, sent, sending, waiting, tokens, flops)


def muon_exchange(work: Work, way: Way, card: Card) -> tuple[float, float]:
    """(bytes that a GPU sends, seconds) to orthogonalise each matrix once; no computing hides them.

    In 16 bits. ddp: the momenta are everywhere, and what each GPU made is all-gathered. fsdp, hsdp:
    parts of momenta go to the matrix's GPU and parts of the update come back, two all-to-alls of a
    shard; hsdp all-gathers it between copies.
    """
    calls = len(set(matrices(work.config)))
    shard, copy = rings(way, card)
    part = ITEM * hidden_parameters(work.config) / way.shards
    sent = 2 * shard.sent(part) + copy.sent(part)
    return sent, 2 * shard.seconds(part, calls) + copy.seconds(part, calls)
