"""What a step of a DFlash draft takes: memory by category and FLOPs a token. Arithmetic only, no tensors.

Blocks are counted with every token trained on: a document of L tokens has min(N, L - 2) of them. Loss masks make them
fewer. The reference engine (`ref.py`) keeps, for the backward, every block row of a pack in every layer, scores against all
tokens and all block rows of the pack, and three float32 rows over the vocabulary for each live row.

# N anchors of a document at most, n tokens of a pack, L tokens of a document, B rows of a block, H hidden, V vocabulary
"""

from __future__ import annotations

import torch

from fastdraft.batch import PackShare
from fastdraft.model.buffers import table_bytes
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.memory import chunk_buffers, pack_buffers, pick_chunk_blocks, room_for
from fastdraft.model.method import Precision, Row, StepKind
from fastdraft.model.precision import dtype_name


def num_blocks(pack_tokens: int, document_tokens: int, anchors: int) -> int:
    """Blocks of a pack of documents that long, every token trained on."""
    docs, rest = divmod(pack_tokens, document_tokens)
    return docs * min(anchors, max(document_tokens - 2, 0)) + min(anchors, max(rest - 2, 0))


def blocks_of_a_token(pack_tokens: int, document_tokens: int, anchors: int) -> float:
    """The blocks that `step_cost` counts for a packed token: one each, or fewer where documents have more than N tokens."""
    return max(num_blocks(pack_tokens, document_tokens, anchors), 1) / pack_tokens


def step_cost(
    c: DFlashConfig,
    *,
    pack_tokens: int,  # n
    document_tokens: int,  # longest document L
    precision: Precision,
    target_dtype: torch.dtype,
    step: StepKind,
    device: str,  # cuda or cpu
    chunk_rows: int | None,  # blocks at a time of the fused engine; None: its own choice
    anchors: int,  # N
    needs_teacher: bool,
    sequence: int = 1,  # processes that share the pack
    held_out: bool = False,  # whether data are held out, on which every loss is compared with a teacher
    **_of_other_methods: object,
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:  # bytes at the peak of a step, FLOPs per packed token
    """What a draft step takes beside weights, optimizer, target and features."""
    blocks = num_blocks(pack_tokens, document_tokens, anchors)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    flops = _flops(c, pack_tokens, document_tokens, blocks, needs_teacher)
    n = PackShare(pack_tokens, size=sequence).full_rows  # of this process
    blocks = num_blocks(n, min(document_tokens, n), anchors)
    if step == "reference":
        return _reference_step(c, n, blocks, dtype), flops
    at_once = pick_chunk_blocks(chunk_rows, c, dtype, target_dtype, device, needs_teacher)
    stats = torch.promote_types(dtype, torch.float32).itemsize
    rows = min(at_once, max(blocks, 1)) * c.block_size
    results = c.num_drafted * n * (2 * stats + 3)
    chunk, measured = (
        table_bytes(chunk_buffers(c, at_once, dtype, target_dtype, device, teacher))
        for teacher in (needs_teacher, needs_teacher or held_out)
    )
    found = [
        Row("buffers of a chunk", chunk),
        Row(
            "kept for every token of a pack", table_bytes(pack_buffers(c, room_for(pack_tokens), dtype, sequence)) + results
        ),
    ]
    if measured > chunk:
        found.append(Row("teacher of held-out data", measured - chunk))
    if dtype != target_dtype:
        found.append(Row(f"target's head in {dtype_name(dtype)}", c.vocab_size * c.hidden_size * dtype.itemsize))
    if device == "cpu":
        scores = 3 * min(rows, 128) * c.num_attention_heads * (pack_tokens + rows) * stats
        found.append(Row("attention's scores of some rows (CPU)", scores, True))
    return tuple(found), flops


def _reference_step(c: DFlashConfig, n: int, blocks: int, dtype: torch.dtype) -> tuple[Row, ...]:
    b, stats, rows = dtype.itemsize, 4, blocks * c.block_size
    e = c.num_attention_heads * c.head_dim
    keys = (n + rows) * e * 2 * b
    layer = rows * (8 * c.hidden_size + 5 * e + 4 * c.intermediate_size) * b + keys
    scores = 2 * c.num_attention_heads * rows * (n + rows) * stats
    logits = 3 * blocks * c.num_drafted * c.vocab_size * stats
    return (
        Row("activations kept for the backward", c.num_hidden_layers * layer, True),
        Row("attention scores kept", c.num_hidden_layers * scores, True),
        Row("logits kept", logits, True),
        Row("gradient of one pack", c.num_parameters()["trainable"] * b, True),
    )


def _flops(c: DFlashConfig, n: int, length: int, blocks: int, needs_teacher: bool) -> tuple[Row, ...]:
    """Matrix FLOPs per token, 2 per multiply-add; a backward costs twice its forward, of the frozen head once."""
    h, e, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    rows, live = blocks * c.block_size, blocks * c.num_drafted
    after = e * h + 3 * h * c.intermediate_size  # what stands behind attention
    all_rows = h * (e + 2 * kv) + after
    layers = 3 * ((c.num_hidden_layers - 1) * rows * all_rows + 2 * rows * h * kv + live * (h * e + after))
    if c.mixes:  # then every row runs every layer
        layers = 3 * c.num_hidden_layers * rows * (all_rows + c.own_layer_weights)
    context = n * (2 * len(c.layers) * h * h + 3 * c.num_hidden_layers * 2 * h * kv)
    head = (2 + needs_teacher * n / max(live, 1)) * live * h * c.vocab_size + 3 * live * c.own_head_weights
    attention = 7 * 2 * rows * e * sum(_keys_seen(c, kind, min(length, n)) for kind in c.layer_types)
    per_token = lambda size: int(2 * size // n)  # noqa: E731
    return (
        Row("context and draft layers but for attention", per_token(layers + context)),
        Row("head of the live rows", per_token(head)),
        Row("draft's attention", int(attention // n)),
    )


def _keys_seen(c: DFlashConfig, kind: str, length: int) -> float:
    """Keys that a row of a block sees in a layer, as a mean over the block's rows and over anchors anywhere in a document
    of `length` tokens. A row k of a sliding layer sees W - 1 - k tokens before the anchor, as far as there are so many."""
    if kind == "full_attention":
        return length // 2 + c.block_size
    own = (c.block_size + 1) / 2  # rows up to its own; W is no less than B
    reach = [min(c.sliding_window - 1 - k, length) for k in range(c.block_size)]
    return own + sum(tokens - tokens**2 / (2 * max(length, 1)) for tokens in reach) / c.block_size


def pair_cost(c: DFlashConfig, target_used: int, anchors: int) -> float:
    """What attention in a document of L tokens costs per L^2, where the other work of a token (the target's forward and the
    draft step) costs 1. The target's attention is counted as wide as its hidden state; half the pairs are causal. A draft's
    blocks grow with a document up to its limit of anchors only, so of them the share at 4096 tokens is taken."""
    length = 4096
    blocks = num_blocks(length, length, anchors)
    layers, head, attention = _flops(c, length, length, blocks, needs_teacher=False)
    target = 2 * c.hidden_size * c.num_target_layers
    return (target + attention.size / length) / (2 * target_used + layers.size + head.size)
