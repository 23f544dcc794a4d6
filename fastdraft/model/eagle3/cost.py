"""What a step of the EAGLE-3 draft takes: memory by category and FLOPs a token. Arithmetic only, no tensors.

The reference engine (`ref.py`) keeps, for the backward of one pack, every row of every TTT step: two to four float32 rows
over the draft vocabulary (by loss), attention probabilities [Hq, L, L + i] of every document, and keys and values repeated
for each query head. On top of what is kept comes the largest short-lived part: full-vocabulary teacher logits or one
document's attention.

The fused engine (`engine.py`) lists what it takes: a chunk's buffers, once, and what it keeps for every token of a pack. On
the CPU its attention keeps [rows, Hq, N] probabilities too. Its FLOPs are counted with every token trained on: loss masks
make its chunks fewer and its work less. With `sampled_depth` p step i counts p^i of its rows; buffers have room for all.

# N tokens of a pack, L tokens of a document, T TTT steps, M chains of a chunk, R = T*M, H draft hidden, Ht target hidden,
# V target vocabulary, Vd draft vocabulary, Hq/Hkv heads, D head dim, E = Hq*D, K = Hkv*D, W = E + 2K, I MLP width,
# b bytes of a compute number, w of a softmax number, tb of a target number
"""

from __future__ import annotations

import torch

from fastdraft.batch import LossKind, PackShare
from fastdraft.model.buffers import table_bytes
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.memory import (
    buffer_rows,
    chunk_buffers,
    fp8_buffers,
    num_lanes,
    pack_buffers,
    pick_chunk_rows,
)
from fastdraft.model.method import Precision, Row, StepKind

ROWS_KEPT: dict[LossKind, int] = {"kl": 2, "lk_alpha": 3, "lk_lambda": 4}  # of log Q, Q, P, P~, those the backward reads


def _reference_step(c: DraftConfig, n: int, length: int, steps: int, b: int, rows_kept: int) -> tuple[Row, ...]:
    """Bytes one forward of ttt_ref keeps (activations, attention scores, logits), and its largest short-lived part."""
    h, e, inner, heads = c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size, c.num_attention_heads
    w, cast = max(b, 4), b < 4  # a cast to float32 is a copy only below float32
    per_token = 0
    for i in range(steps):
        norms = 6 * h * b + 3 * h * w  # four norms' inputs and outputs; in fp32 the layer's output serves two of them
        if c.norm_output and i < steps - 1:
            norms += h * (b + w)  # the normed state that the next step reads, and what its own backward reads
        concat = 2 * h * b
        mlp = 4 * inner * b
        keys = (2 * (i + 1) + i) * e * b  # K^0..K^i and V^0..V^i for every query head, and einsum's copy of K^1..K^i
        queries = (3 if i else 2) * e * b  # q, einsum's copy of it, the attention's output
        per_token += norms + concat + mlp + keys + queries
    docs, rest = divmod(n, length)
    pairs = docs * length * length + rest * rest
    probabilities = sum(heads * (pairs + i * n) * (w + (b if cast else 0)) + pairs for i in range(steps))
    logits = (rows_kept * steps + 1) * n * c.draft_vocab_size * w  # and the teacher's, shared by all steps
    vocabulary = n * c.vocab_size * ((b if cast else 0) + 2 * w)  # teacher logits as computed, cast, exponentiated
    rows = 5 * n * c.draft_vocab_size * w  # one step's loss and acceptance
    attention = heads * length * (length + steps) * (3 * b + w)
    return (
        Row("activations kept for the backward", n * per_token, True),
        Row("attention scores kept", probabilities, True),
        Row("logits kept", logits, True),
        Row("largest short-lived tensors", max(vocabulary, rows, attention), True),
    )


def _reference_flops(c: DraftConfig, length: int, steps: int) -> int:
    """Matrix FLOPs of ttt_ref per token, 2 per multiply-add; a backward costs twice its forward."""
    e, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = 2 * c.hidden_size * (e + 2 * kv) + e * c.hidden_size + 3 * c.hidden_size * c.intermediate_size
    forward = sum(layer + c.hidden_size * c.draft_vocab_size + 2 * e * (length + i) for i in range(steps))
    fc = 3 * c.target_hidden_size * c.hidden_size
    teacher = c.target_hidden_size * c.vocab_size
    fc_backward = 2 * fc if c.feature_norms else fc  # without norms before it, nothing needs the gradient of g
    return 2 * (3 * forward + fc + fc_backward + teacher)


def _fused_step(
    c: DraftConfig,
    pack: int,
    sequence: int,
    steps: int,
    chunk_rows: int | None,
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    device: str,
    fp8: bool,
    lanes: int,
) -> tuple[Row, ...]:
    """Bytes of one step of the fused engine, every token trained on."""
    room, m = buffer_rows(pack, pick_chunk_rows(chunk_rows, c, steps, dtype, target_dtype, device))
    n = PackShare(pack, size=sequence).full_rows  # of this process
    stats = torch.promote_types(dtype, torch.float32).itemsize
    rows, width = steps * min(m, n), c.target_hidden_size
    results = n * (16 + 9 + steps * (2 * stats + 3))  # next ids and positions, ids and mask, `Rows`
    kept = table_bytes(pack_buffers(c, room, dtype, sequence)) + results
    index = rows * (8 * 7 + 40) + min(m + steps, n) * width * target_dtype.itemsize  # the plan's rows, their results, and f
    cast = 0 if dtype == target_dtype else min(2 * m, n) * 3 * width * dtype.itemsize
    found = [
        Row("target's head, draft vocabulary first", target_dtype.itemsize * c.vocab_size * width + 8 * c.vocab_size),
        Row(
            "buffers of a chunk" if lanes == 1 else f"buffers of {lanes} chunks that go on in turns",
            lanes * table_bytes(chunk_buffers(c, m, steps, dtype, target_dtype, device)),
        ),
        Row("kept for every token of a pack", kept),
        Row("short-lived tensors", max(index, cast), True),
    ]
    if fp8:
        found.append(Row("weights and rows in fp8", table_bytes(fp8_buffers(c, m, steps))))
    if device == "cpu":
        heads, b = c.num_attention_heads, dtype.itemsize
        scores = sum(min(m, n) * (heads * ((pack + i) * stats + pack * b) + pack) for i in range(steps))
        sums = 2 * pack * c.num_key_value_heads * c.head_dim * stats
        backward = (4 if steps > 1 else 2) * min(m, n) * heads * pack * stats
        found.append(Row("attention's scores and gradients of a chunk (CPU)", scores + sums + backward, True))
    return tuple(found)


def _fused_flops(c: DraftConfig, n: int, length: int, steps: int, cpu: bool, sampled_depth: float) -> tuple[Row, Row]:
    """Matrix FLOPs of the fused engine per token, every token trained on: what it executes, recomputed products too."""
    h, ht, e, kv = (
        c.hidden_size,
        c.target_hidden_size,
        c.num_attention_heads * c.head_dim,
        c.num_key_value_heads * c.head_dim,
    )
    qkv, mlp = h * (e + 2 * kv), 3 * h * c.intermediate_size
    products = attention = 0
    for size, count in ((length, n // length), (n % length, 1)):
        products += count * size * (3 * ht * h * (2 + bool(c.feature_norms)) + 3 * 2 * h * 2 * kv)
        products += count * max(size - 2, 0) * (ht * c.vocab_size + 3 * qkv)
        for i in range(steps):
            drawn = count * sampled_depth**i
            rows = max(size - 2 - i, 0)  # x_{t+2+i} exists
            products += drawn * rows * (3 * (e * h + mlp + h * c.draft_vocab_size) + 3 * (qkv if i else h * e))
            if cpu:  # every key of the pack, two products forward, four back
                attention += drawn * rows * 6 * e * (n + i)
            else:  # keys up to its own; two products forward, three for dq, four for dk and dv
                attention += drawn * e * (9 * rows * (rows + 1) // 2 + 7 * rows * i)
    return Row("draft step but for attention", int(2 * products // n)), Row("draft's attention", int(2 * attention // n))


def pair_cost(c: DraftConfig, target_used: int, steps: int, sampled_depth: float = 1.0) -> float:
    """What attention in a document of L tokens costs per L^2, where the other work of a token (the target's forward and the
    fused draft step) costs 1. The target's attention is counted as wide as its hidden state; half the pairs are causal."""
    rest, _ = _fused_flops(c, 4096, 4096, steps, False, sampled_depth)
    target = 2 * c.target_hidden_size * c.num_target_layers
    draft = 9 * c.num_attention_heads * c.head_dim * sum(sampled_depth**i for i in range(steps))
    return (target + draft) / (2 * target_used + rest.size)


def step_cost(
    c: DraftConfig,
    *,
    pack_tokens: int,  # N
    document_tokens: int,  # longest document L
    ttt_length: int,  # T
    precision: Precision,
    target_dtype: torch.dtype,
    device: str,  # cuda or cpu
    loss: LossKind = "kl",
    step: StepKind = "reference",
    chunk_rows: int | None = None,  # M of the fused step; None: its own choice
    tensor: int = 1,  # processes that share the draft's weights, of whose part `c` is the shape
    sequence: int = 1,  # processes that share the pack
    sampled_depth: float = 1.0,
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:  # bytes at the peak of a step, FLOPs per packed token
    """What a draft step takes beside weights, optimizer, target and features."""
    n, length, steps = pack_tokens, document_tokens, ttt_length
    if step == "fused":
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        options = (chunk_rows, dtype, target_dtype, device, precision == "fp8", num_lanes(tensor))
        memory = _fused_step(c, n, sequence, steps, *options)
        return memory, _fused_flops(c, n, length, steps, device == "cpu", sampled_depth)
    b, compute = (4, "fp32") if precision == "fp32" else (2, "bf16")
    memory = _reference_step(c, n, length, steps, b, ROWS_KEPT[loss])
    memory = (Row(f"gradient of one pack ({compute})", b * c.num_parameters()["trainable"], True), *memory)
    return memory, (Row("draft step, forward and backward", _reference_flops(c, length, steps)),)
