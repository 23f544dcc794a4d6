"""Attention of rows that all see the same keys: the dense piece of a chunk, by FlashAttention 4 where it is installed.

Rows of a document that started before the chunk see every key of the chunk's context [doc_start, first), at any step and in
any list. That is a rectangle without a mask. FlashAttention 4 (flash_attn.cute, the package's extra `flash`) computes it.
`ttt_attention` goes on from there over the keys that are left and the diagonal terms. Its online softmax is the merge:

    out_a = softmax(scale * q K_a^T) V_a,  lse_a        (out, lse) = ttt_attention started from (out_a, lse_a)
    dq_a, dK_a, dV_a of the merged out and lse          dq = dq_a + ttt_attention's part

The backward reads q, out and dout with the group's heads laid out as further rows, [G * M, Hkv, D]. Without a mask that is
the same product, and each key block then has one writer. Nothing is summed over heads in fp32 buffers as long as the
context, and only dq needs an order. DETERMINISTIC fixes that order, so that two runs are bitwise equal here too.

Precision: operands are bf16; accumulation, softmax and lse are fp32. out_a, dq_a, dK_a and dV_a round to bf16 before they
are added in fp32. FLOPs per (row, key): 4 * D * Hq forward and 10 * D * Hq backward, which are 5 products where the Triton
kernels compute 7. HBM beside q, out, dout, K and V: the first three are laid out anew, and dK_a and dV_a are written, read
and added to fp32.
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

Take = Callable[[str, int], Tensor]  # It gives a buffer by its name, the first rows of it.

# FlashAttention 4.0.0b36 also takes a head dim of 96, and gives a wrong dK for it on an H100, which a test found.
HEAD_DIMS = (64, 128)

# A context needs so many keys. The gain is 28 % with 65536 keys, 18 % with 8192, 10 % with 4096, none with 2048.
MIN_KEYS = 4096

# A step needs so many rows. For very few, FlashAttention would compile other kernels.
MIN_ROWS = 512

# dK_a and dV_a are held for so many keys per row at a time, so that memory grows with the chunk and not with the context.
KEYS_PER_ROW = 16
DETERMINISTIC = True


def dense_attention_covers(dim: int, dtype: torch.dtype, device: str) -> bool:
    """Whether contexts go to FlashAttention 4. It must be installed, the GPU a Hopper or a data-centre Blackwell, the dtype
    bf16, and the head dim one of its own. The choice was measured on an H100 (bench/results/dense_attention.jsonl)."""
    if not installed() or device == "cpu" or not torch.cuda.is_available():
        return False
    return dim in HEAD_DIMS and dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10)


def dense_steps(
    context: tuple[int, int] | None,  # keys [doc_start, first) that all rows see
    sizes: tuple[int, ...],  # rows of each step, not growing
) -> int:
    """How many of the first steps leave their context to the dense piece. Only this function chooses."""
    if context is None or context[1] - context[0] < MIN_KEYS:
        return 0
    return sum(m >= MIN_ROWS for m in sizes)


@functools.cache
def installed() -> bool:
    """Whether FlashAttention 4 is installed, which is not yet whether it can be used."""
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def _flash_attention() -> tuple[Callable, Callable]:
    """FlashAttention's forward and backward. They compile once for a head dim and any length, and stay on disk."""
    # FlashAttention's own default is a folder that all users can write.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    cache = Path.home() / ".cache" / "fastdraft" / "flash_attention"
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache))
    try:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    except Exception as error:  # Versions of its packages that do not fit each other raise more than ImportError.
        raise ValueError(
            f"flash-attn-4 {importlib.metadata.version('flash-attn-4')} is installed but cannot be used: "
            f"{type(error).__name__}: {error}; "
            "pip install 'fastdraft[flash]' for the version that fits, or uninstall it"
        ) from error
    # FlashAttention gives this warning at every compilation, and a user can do nothing about it.
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted")
    return _flash_attn_fwd, _flash_attn_bwd


def dense_buffers(
    heads: int, kv_heads: int, dim: int, chunk_rows: int, dtype: torch.dtype
) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:  # by name: rows, shape of a row, dtype
    """What `dense_attention_bwd` takes for up to `chunk_rows` rows. It does not depend on the context's length."""
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
    """Writes the context's out and lse."""
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
) -> Tensor:  # [M, Hq, D] fp32, the context's part of dq, valid until the next call
    """Adds the context's part of dK and dV and gives that of dq. Up to `_key_room` keys are done at a time."""
    _, backward = _flash_attention()
    m = len(q)
    kv_heads = k.shape[1]
    rows = [_heads_as_rows(x, take(f"dense.{name}", m), kv_heads) for name, x in (("q", q), ("out", out), ("dout", dout))]
    stats = lse.unflatten(0, (kv_heads, -1)).reshape(1, kv_heads, -1)  # [1, Hkv, G * M]
    dq_rows = take("dense.dq_rows", m).view(rows[0].shape)
    dq = take("dense.dq", m)
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
    """How many keys dK_a and dV_a are held for at a time, where a step has m rows."""
    return -(-KEYS_PER_ROW * m // 128) * 128


def _heads_as_rows(
    x: Tensor,  # [M, Hq, D]
    room: Tensor,  # [M, Hq, D] written
    kv_heads: int,
) -> Tensor:  # [1, G * M, Hkv, D]
    """Copies x into `room` so that its row g * M + m and head h are x[m, h * G + g]."""
    m, heads, dim = x.shape
    room = room.view(heads // kv_heads, m, kv_heads, dim)
    room.copy_(x.unflatten(1, (kv_heads, -1)).permute(2, 0, 1, 3))
    return room.view(1, -1, kv_heads, dim)


def _slabs(
    n: int,
    room: int,  # a multiple of 128
) -> list[slice]:
    """Parts of n keys of up to `room` each, all about as large."""
    size = -(-n // -(-n // room))
    size = -(-size // 128) * 128
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]
