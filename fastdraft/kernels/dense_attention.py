"""Attention of rows that all see the same keys: the dense piece of a chunk, by FlashAttention 4 where it is installed.

Rows of a document that started before the chunk see every key of the chunk's context [doc_start, first), at any step and in
any list: a rectangle without a mask. FlashAttention 4 (flash_attn.cute, the package's extra `flash`) computes it, and
`ttt_attention` goes on from there over the keys that are left and the diagonal terms, whose online softmax is the merge:

    out_a = softmax(scale * q K_a^T) V_a,  lse_a        (out, lse) = ttt_attention started from (out_a, lse_a)
    dq_a, dK_a, dV_a of the merged out and lse          dq = dq_a + ttt_attention's part

The backward reads q, out, dout with the group's heads laid out as further rows, [G * M, Hkv, D]: without a mask that is the
same product, each key block then has one writer, nothing is summed over heads in fp32 buffers as long as the context, and
dq alone needs an order. DETERMINISTIC fixes that order, so that two runs are bitwise equal here too.

Precision: bf16 operands, fp32 accumulation, softmax and lse; out_a, dq_a, dK_a, dV_a round to bf16 before they are added in
fp32. FLOPs: 4 * D * Hq forward, 10 * D * Hq backward per (row, key) (5 products; the Triton kernels compute 7). HBM beside
q, out, dout, K, V: the three laid out anew, dK_a, dV_a written, read and added to fp32.
Source: FlashAttention-4 (github.com/Dao-AILab/flash-attention, flash_attn/cute), BSD licence, imported and never copied.

# M query rows, n keys, Hq/Hkv heads, G = Hq/Hkv, D head dim
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Take = Callable[[str, int], Tensor]  # a buffer by its name, the first rows of it

HEAD_DIMS = (64, 96, 128)
MIN_KEYS = 4096  # of a context: FlashAttention gains 10 % with 4096, 18 % with 8192, 28 % with 65536, nothing with 2048
MIN_ROWS = 512  # of a step; FlashAttention compiles kernels of their own for very few
KEYS_PER_ROW = 16  # keys whose dK_a, dV_a are held at a time, per row: memory grows with the chunk, not the context
DETERMINISTIC = True


def dense_attention_covers(dim: int, dtype: torch.dtype, device: str) -> bool:
    """Whether contexts go to FlashAttention 4: installed, a Hopper or data-centre Blackwell GPU, bf16, its head dims.

    The choice was measured on an H100 (rows of bench/results/dense_attention.jsonl)."""
    if not installed() or device == "cpu" or not torch.cuda.is_available():
        return False
    return dim in HEAD_DIMS and dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10)


def dense_steps(
    context: tuple[int, int] | None,  # keys [doc_start, first) that all rows see
    sizes: tuple[int, ...],  # rows of each step, not growing
) -> int:
    """How many steps, the first ones, leave their context to the dense piece: the only place that chooses."""
    if context is None or context[1] - context[0] < MIN_KEYS:
        return 0
    return sum(m >= MIN_ROWS for m in sizes)


@functools.cache
def installed() -> bool:
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def _flash_attention() -> tuple[Callable, Callable]:
    """Forward and backward. They compile once for a head dim, for any length; compiled kernels stay on disk."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    cache = Path.home() / ".cache" / "fastdraft" / "flash_attention"  # its own default is a folder all users can write
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache))
    try:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    except Exception as error:  # also what versions of its own packages that do not fit each other raise
        raise ValueError(
            f"flash-attn-4 {importlib.metadata.version('flash-attn-4')} is installed but cannot be used: "
            f"{type(error).__name__}: {error}; "
            "pip install 'fastdraft[flash]' for the version that fits, or uninstall it"
        ) from error
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted")  # its own, at every compilation
    return _flash_attn_fwd, _flash_attn_bwd


def dense_buffers(
    heads: int, kv_heads: int, dim: int, chunk_rows: int, dtype: torch.dtype
) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:  # by name: rows, shape of a row, dtype
    """What `dense_attention_bwd` takes for up to `chunk_rows` rows. Does not depend on the context's length."""
    table = {f"dense.{name}": (chunk_rows, (heads, dim), dtype) for name in ("q", "out", "dout", "dq_rows")}
    table |= {f"dense.{name}": (_key_room(chunk_rows), (kv_heads, dim), dtype) for name in ("dk", "dv")}
    return table | {"dense.dq": (chunk_rows, (heads, dim), torch.float32)}


def dense_attention_fwd(
    q: Tensor,  # [M, Hq, D], rows may be strided, heads and D contiguous (all tensors here)
    k: Tensor,  # [n, Hkv, D] the context
    v: Tensor,  # [n, Hkv, D]
    scale: float,
    out: Tensor,  # [M, Hq, D] written
    lse: Tensor,  # [Hq, M] fp32, M contiguous, written, natural log
) -> None:
    forward, _ = _flash_attention()
    forward(q[None], k[None], v[None], softmax_scale=scale, return_lse=True, out=out[None], lse=lse[None])


def dense_attention_bwd(
    dout: Tensor,  # [M, Hq, D]
    q: Tensor,  # [M, Hq, D]
    k: Tensor,  # [n, Hkv, D] the context
    v: Tensor,  # [n, Hkv, D]
    out: Tensor,  # [M, Hq, D] of all keys
    lse: Tensor,  # [Hq, M] fp32, of all keys
    scale: float,
    dk: Tensor,  # [n, Hkv, D] fp32, added to
    dv: Tensor,  # [n, Hkv, D] fp32, added to
    take: Take,  # of `dense_buffers`
) -> Tensor:  # [M, Hq, D] fp32, the context's part of dq: valid until the next call
    _, backward = _flash_attention()
    m, kv_heads = len(q), k.shape[1]
    rows = [_heads_as_rows(x, take(f"dense.{name}", m), kv_heads) for name, x in (("q", q), ("out", out), ("dout", dout))]
    stats = lse.unflatten(0, (kv_heads, -1)).reshape(1, kv_heads, -1)  # [1, Hkv, G * M]
    dq_rows, dq = take("dense.dq_rows", m).view(rows[0].shape), take("dense.dq", m)
    for keys in _slabs(len(k), _key_room(m)):
        slab = [take(name, keys.stop - keys.start) for name in ("dense.dk", "dense.dv")]
        backward(
            rows[0],
            k[keys][None],
            v[keys][None],
            *rows[1:],
            stats,
            softmax_scale=scale,
            deterministic=DETERMINISTIC,
            dq=dq_rows,
            dk=slab[0][None],
            dv=slab[1][None],
        )
        dk[keys].add_(slab[0])
        dv[keys].add_(slab[1])
        part = dq_rows.view(-1, m, kv_heads, q.shape[2]).permute(1, 2, 0, 3)  # [M, Hkv, G, D]
        total = dq.unflatten(1, (kv_heads, -1))
        if keys.start == 0:
            total.copy_(part)
        else:
            total += part
    return dq


def _key_room(m: int) -> int:
    return -(-KEYS_PER_ROW * m // 128) * 128


def _heads_as_rows(
    x: Tensor,  # [M, Hq, D]
    room: Tensor,  # [M, Hq, D] written
    kv_heads: int,
) -> Tensor:  # [1, G * M, Hkv, D], row g * M + m and head h are x[m, h * G + g]
    m, heads, dim = x.shape
    room = room.view(heads // kv_heads, m, kv_heads, dim)
    room.copy_(x.unflatten(1, (kv_heads, -1)).permute(2, 0, 1, 3))
    return room.view(1, -1, kv_heads, dim)


def _slabs(
    n: int,
    room: int,  # a multiple of 128
) -> list[slice]:
    """Up to `room` of n keys at a time, about as many each."""
    size = -(-n // -(-n // room))
    size = -(-size // 128) * 128
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]
