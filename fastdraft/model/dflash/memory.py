"""What the fused step takes of memory, as tables of named buffers: a chunk's and a pack's.

# N packed tokens, C blocks of a chunk, B rows of a block, R = C * B, U = C + 1 distinct rows of layer 0, H hidden
# Hq/Hkv heads, D head dim, E = Hq*D, kv = Hkv*D, W = E + 2 kv, I MLP width, V vocabulary, L draft layers
"""

from __future__ import annotations

import torch

from fastdraft.batch import PackShare
from fastdraft.kernels.block_attention import block_attention_partials
from fastdraft.kernels.dense_attention import dense_attention_covers, dense_buffers
from fastdraft.kernels.rms_norm import rms_norm_partials
from fastdraft.kernels.teacher import TeacherRows
from fastdraft.model.buffers import Table, table_bytes
from fastdraft.model.dflash.config import DFlashConfig

CHUNK_BYTES = 3.75 * 2**30  # of a chunk's buffers, unless chunk_rows says otherwise
HEAD_BYTES = 2**29  # of student logits at a time
PACK_BLOCK = 4096  # tokens of the context that go through fc and the keys' and values' products at a time


def head_room(c: DFlashConfig, dtype: torch.dtype) -> int:
    """Live rows that the head takes at a time."""
    return max(HEAD_BYTES // (c.vocab_size * dtype.itemsize) // 256 * 256, 256)


def chunk_buffers(
    c: DFlashConfig,
    chunk_blocks: int,
    dtype: torch.dtype,  # of the draft
    target_dtype: torch.dtype,
    device: str,  # cpu, or a GPU's
    teacher: bool,
) -> Table:
    """All buffers of a chunk of so many blocks: what a step needs besides inputs and what is kept for every token."""
    h, inner, d = c.hidden_size, c.intermediate_size, c.head_dim
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    e, kv = heads * d, kv_heads * d
    rows, distinct = chunk_blocks * c.block_size, chunk_blocks + 1
    stats = torch.promote_types(dtype, torch.float32)
    table: Table = {}

    # What each layer's forward leaves for its backward. Layer 0 normalises and multiplies only its distinct rows, where no
    # mixer makes them differ.
    for layer in range(c.num_hidden_layers):
        few = rows if layer or c.mixes else distinct
        table |= {
            f"{layer}.n1": (few, (h,), dtype),
            f"{layer}.r1": (few, (), stats),
            f"{layer}.z": (few, (e + 2 * kv,), dtype),
            f"{layer}.q": (rows, (heads, d), dtype),
            f"{layer}.k": (rows, (kv_heads, d), dtype),
            f"{layer}.out": (rows, (heads, d), dtype),
            f"{layer}.lse": (heads, (rows,), stats),
            f"{layer}.h_mid": (rows, (h,), dtype),
            f"{layer}.n2": (rows, (h,), dtype),
            f"{layer}.r2": (rows, (), stats),
            f"{layer}.gate_up": (rows, (2 * inner,), dtype),
        }
        table |= {f"{layer}.h": (rows, (h,), dtype)} if layer else {}  # layer 0 reads the embedding
        if c.mixes:
            sides = [f"{layer}.{branch}.{side}" for branch in ("attention", "mlp") for side in ("x", "y")]
            table |= dict.fromkeys(sides, (rows, (h,), dtype))

    # Layer 0's values laid out for all rows; and one layer's rows on the way: what a branch adds, and gradients.
    table |= {} if c.mixes else {"0.v": (rows, (kv_heads, d), dtype)}
    table |= {"act": (rows, (inner,), dtype)} | {name: (rows, (heads, d), dtype) for name in ("dout", "dq")}
    table |= {"dk": (rows, (kv_heads, d), dtype)}
    table |= {name: (rows, (h,), dtype) for name in ("branch", "x", "y", "dn", "dh", "dx", "x_live")}
    table |= {"dz": (rows, (e + 2 * kv,), dtype), "r_x": (rows, (), stats), "delta": (heads, (rows,), stats)}

    if dense_attention_covers(d, dtype, device):
        table |= dense_buffers(heads, kv_heads, d, rows, dtype)

    # The head takes as many rows at a time as HEAD_BYTES of logits allow, and the teacher no more positions than that.
    room = min(head_room(c, dtype), rows)
    table |= {"logits": (room, (c.vocab_size,), dtype)}
    table |= {"dmix": (rows, (h,), dtype)} if c.mixes else {}
    table |= c.extra_buffers(rows, room, dtype)
    if teacher:
        of_target = torch.promote_types(target_dtype, torch.float32)
        kinds = (of_target, of_target, torch.int64, torch.int64, of_target)
        table |= {f"teacher.{name}": (room, (), kind) for name, kind in zip(TeacherRows._fields[1:], kinds, strict=True)}
        table |= {"teacher.logits": (room, (c.vocab_size,), target_dtype)}

    # What is done once for the pack, some tokens at a time: the context's keys and values and fc, forward and backward.
    block = PACK_BLOCK
    table |= {"pack.c": (block, (h,), dtype), "pack.r": (block, (), stats), "pack.dc": (block, (h,), dtype)}
    table |= {"kv_weight": (c.num_hidden_layers * 2 * kv, (h,), dtype)}

    # Partial sums: of a norm's weight gradient, one row for each program of the kernel; of the context's keys and values.
    where = torch.device(device)
    if device != "cpu":
        table |= {"partial_kv": (block_attention_partials(d), (), stats)}
    return table | {
        "partial": (rms_norm_partials(h, where), (h,), stats),
        "partial_head": (rms_norm_partials(d, where), (d,), stats),
    }


def pack_buffers(
    c: DFlashConfig,
    tokens: int,
    dtype: torch.dtype,
    sequence: int = 1,  # processes that share the tokens
) -> Table:
    """What a step keeps for every token besides the features: fc's output, what the product for all keys and values gave,
    and of each layer the normed and rotated keys and the gradients. Processes that share the tokens have the first two of
    their own, and of each layer the keys and values of all."""
    stats, kv = torch.promote_types(dtype, torch.float32), (c.num_key_value_heads, c.head_dim)
    own = PackShare(tokens, size=sequence).full_rows
    table: Table = {"c0": (own, (c.hidden_size,), dtype), "context.kv": (own, (c.num_hidden_layers, 2, *kv), dtype)}
    for layer in range(c.num_hidden_layers):
        table |= {f"context.{layer}.{name}": (tokens, kv, dtype) for name in ("k", "v")[: 1 + (sequence > 1)]}
        table |= {f"context.{layer}.{name}": (tokens, kv, stats) for name in ("dk", "dv")}
    return table


def pick_chunk_blocks(
    asked: int | None,
    c: DFlashConfig,
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    device: str,
    teacher: bool,
    limit: float = CHUNK_BYTES,
) -> int:
    """Blocks at a time: what was asked for, else a power of two up to 1024 (64 on a CPU) whose buffers fit the limit."""
    if asked is not None:
        return asked
    for blocks in (1024 >> k for k in range(4 if device == "cpu" else 0, 10)):
        if table_bytes(chunk_buffers(c, blocks, dtype, target_dtype, device, teacher)) <= limit:
            return blocks
    return 1


def room_for(tokens: int) -> int:
    """Tokens that buffers are taken for: packs differ a little in length."""
    return -(-tokens // 1024) * 1024
