"""What the fused step takes of memory, as tables of named buffers: a chunk's, a pack's, and what fp8 adds.

# N packed tokens, M chains of a chunk, R = T*M stacked rows, T TTT steps, H hidden, Ht target hidden
# Hq/Hkv heads, D head dim, W = (Hq + 2 Hkv)*D, I MLP width, Vd draft vocabulary
"""

from __future__ import annotations

import torch

from fastdraft.batch import PackShare
from fastdraft.kernels.fp8 import FP8
from fastdraft.kernels.rms_norm import rms_norm_partials
from fastdraft.kernels.teacher import TeacherRows
from fastdraft.model.buffers import Table, table_bytes
from fastdraft.model.eagle3.attention import attention_buffers
from fastdraft.model.eagle3.config import DraftConfig

CHUNK_BYTES = 3.75 * 2**30  # of a chunk's buffers, unless chunk_rows says otherwise: the 8B draft's 2048 chains at T 7
HEAD_BYTES = 2**29  # of student logits at a time: 8192 rows of the 8B draft


def chunk_buffers(
    c: DraftConfig,
    chunk_rows: int,
    steps: int,
    dtype: torch.dtype,  # of the draft
    target_dtype: torch.dtype,
    device: str,  # cpu, or a GPU's
) -> Table:
    """All buffers of a chunk of `chunk_rows` chains: what a step needs besides inputs and what is kept for every token."""
    h, inner, ht = c.hidden_size, c.intermediate_size, c.target_hidden_size
    kv_width = 2 * c.num_key_value_heads * c.head_dim
    width = c.num_attention_heads * c.head_dim + kv_width
    rows, tokens = steps * chunk_rows, chunk_rows + steps
    stats = torch.promote_types(dtype, torch.float32)
    table: Table = {}

    # Stacked rows of all steps: what the forward leaves for the backward (`Stack` says what each of them is).
    stacked = {"y": h, "h_mid": h, "n2": h, "hn": h, "dy": h, "qkv": width, "gate_up": 2 * inner, "act": inner}
    table |= {name: (rows, (columns,), dtype) for name, columns in stacked.items()}
    table |= {name: (rows, (), stats) for name in ("r_n2", "r_hn")}

    # One step's rows: what a branch of the layer adds to the residual stream, the gradient of a norm's output, and with
    # norm_output the normed state that the step reads.
    table |= {name: (chunk_rows, (h,), dtype) for name in ("branch", "dn")}
    if c.norm_output:
        table |= {"fed": (chunk_rows, (h,), dtype), "r_fed": (chunk_rows, (), stats)}

    # The tokens that the chunk's rows read: their normed embedding, its half of QKV, and the gradients of both.
    table |= {"e": (tokens, (h,), dtype), "r_e": (tokens, (), stats), "d_e": (tokens, (h,), dtype)}
    table |= {"e_qkv": (tokens, (width,), dtype), "de": (tokens, (width,), stats)}

    # The head takes as many rows at a time as HEAD_BYTES of logits allow.
    head_rows = min(max(HEAD_BYTES // (c.draft_vocab_size * dtype.itemsize) // 256 * 256, 256), rows)
    table |= {"x": (head_rows, (h,), dtype), "dx": (head_rows, (h,), dtype), "r_x": (head_rows, (), stats)}
    table |= {"logits": (head_rows, (c.draft_vocab_size,), dtype)}

    # The teacher keeps its draft-vocabulary logits; the others pass through a scratch of some columns at a time. That is
    # the student's logits buffer, which nobody needs yet, unless it is of another dtype or holds no 256 columns.
    teacher_stats = torch.promote_types(target_dtype, torch.float32)
    kinds = (teacher_stats, teacher_stats, torch.int64, torch.int64, teacher_stats)
    table |= {f"teacher.{name}": (tokens, (), kind) for name, kind in zip(TeacherRows._fields[1:], kinds, strict=True)}
    table |= {"teacher.logits": (tokens, (c.draft_vocab_size,), target_dtype)}
    columns = min(c.draft_vocab_size * head_rows // tokens // 256 * 256, 256 * -(-c.vocab_size // 256))
    if target_dtype != dtype or columns == 0:
        table |= {"teacher.scratch": (tokens, (columns or 256,), target_dtype)}

    table |= attention_buffers(c.num_attention_heads, c.num_key_value_heads, c.head_dim, chunk_rows, steps, dtype, device)

    # What is done once for the pack, `block` tokens at a time: K^0, V^0 and fc, forward and backward.
    block = 2 * chunk_rows
    table |= {"pack.x": (block, (2 * h,), dtype), "pack.dx": (block, (2 * h,), dtype)}
    table |= {"pack.kv": (block, (kv_width,), dtype), "pack.r": (2 * block, (), stats)}
    if k := c.feature_norms:
        width = 3 * ht // k
        table |= {name: (block, (3 * ht,), dtype) for name in ("pack.g", "pack.dg")}
        table |= {"pack.r_g": (k * block, (), stats)}
        table |= {"pack.partial": (rms_norm_partials(width, torch.device(device)), (width,), stats)}

    # Partial sums of a norm's weight gradient, one row for each program of the kernel.
    return table | {"partial": (rms_norm_partials(h, torch.device(device)), (h,), stats)}


def pack_buffers(
    c: DraftConfig,
    tokens: int,
    dtype: torch.dtype,
    sequence: int = 1,  # processes that share the tokens
) -> Table:
    """What a step keeps for every token besides the features. Every process has all keys, values and their gradients."""
    stats, kv = torch.promote_types(dtype, torch.float32), (c.num_key_value_heads, c.head_dim)
    own = PackShare(tokens, size=sequence).full_rows
    table: Table = {name: (own, (c.hidden_size,), dtype) for name in ("h0", "dh0")}
    if sequence > 1:
        table |= {"own_kv": (own, (2 * kv[0], kv[1]), dtype)}
    table |= {name: (tokens, kv, dtype) for name in ("k0", "v0")}
    return table | {name: (tokens, kv, stats) for name in ("dk0", "dv0")}


def fp8_buffers(c: DraftConfig, chunk_rows: int, steps: int) -> Table:
    """What `precision: fp8` adds: both orientations of the weights below, and room for the other factor's rows."""
    table: Table = {}
    for name, (outputs, inputs) in fp8_shapes(c).items():
        for side, n, k in (("out", outputs, inputs), ("in", inputs, outputs)):
            table |= {f"fp8.{name}.{side}": (n, (k,), FP8), f"fp8.{name}.{side}_scale": (n, (), torch.float32)}
    longest = max(n for shape in fp8_shapes(c).values() for n in shape)
    room = max(2 * c.intermediate_size * chunk_rows, 256 * longest)  # longer rows go through in parts
    return table | {"fp8.q": (room, (), FP8), "fp8.scale": (steps * chunk_rows, (), torch.float32)}


def fp8_shapes(c: DraftConfig) -> dict[str, tuple[int, int]]:
    """Weights [out, in] of the products that run at every step of a chain. Bf16 stay those that run once a token and bring
    little (fc, the embedding's half of QKV, K^0 and V^0: what all chains read), and all weight gradients."""
    h, e = c.hidden_size, c.num_attention_heads * c.head_dim
    width, inner, vocab = e + 2 * c.num_key_value_heads * c.head_dim, c.intermediate_size, c.draft_vocab_size
    return {"qkv": (width, h), "out": (h, e), "gate_up": (2 * inner, h), "down": (h, inner), "head": (vocab, h)}


def fitting_chunk_rows(
    c: DraftConfig, steps: int, dtype: torch.dtype, target_dtype: torch.dtype, device: str, limit: float
) -> int:
    """Chains whose buffers take up to `limit` bytes: a power of two up to 16384 (2048 on a CPU, whose attention keeps
    scores); 0 where 64 need more."""
    sizes = (16384 >> k for k in range(3 if device == "cpu" else 0, 9))
    needs = ((m, table_bytes(chunk_buffers(c, m, steps, dtype, target_dtype, device))) for m in sizes)
    return next((m for m, need in needs if need <= limit), 0)


def pick_chunk_rows(
    asked: int | None, c: DraftConfig, steps: int, dtype: torch.dtype, target_dtype: torch.dtype, device: str
) -> int:
    """Chains at a time: what was asked for, else as many as CHUNK_BYTES hold."""
    return asked or fitting_chunk_rows(c, steps, dtype, target_dtype, device, CHUNK_BYTES) or 64


def num_lanes(tensor: int) -> int:
    """Chunks that go on in turns, each with buffers of its own, where so many processes share the draft's weights."""
    return 2 if tensor > 1 else 1


def buffer_rows(tokens: int, chunk_rows: int) -> tuple[int, int]:
    """Tokens of a pack and chains of a chunk that buffers are taken for: packs differ a little in length."""
    room = -(-tokens // 1024) * 1024
    return room, min(chunk_rows, room)
