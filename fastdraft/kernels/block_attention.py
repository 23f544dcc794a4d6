"""Attention of the rows of blocks over a context that all blocks share and over the keys of their own block.

A block is B rows at an anchor a of a pack, as DFlash drafts them: its row k stands for the token a + k. A row sees the keys
of its document before the anchor, and keys of its own block. What a query row r sees is therefore two intervals:

    s_u = scale * q_r . K_u      for ctx_start[r] <= u < ctx_end[r]      K, V of the context
    z_j = scale * q_r . K'_j     for blk_start[r] <= j < blk_end[r]      K', V' of the rows of all blocks
    out = (sum_u e^{s_u} V_u + sum_j e^{z_j} V'_j) / e^lse               lse = log(sum_u e^{s_u} + sum_j e^{z_j})
    P = e^{s - lse},  delta = dout . out,  dS = P * (dout . V - delta)   and the same with z, K', V'
    dq = scale * sum dS K,  dK = scale * sum dS q,  dV = sum P dout

`block_rows` makes the intervals of full and of sliding layers. The kernels know nothing else, neither B nor the window nor
which rows of a block ask, so a layer may run its live rows alone. Any order of the rows is right, and ascending anchors are
fast. A row whose intervals are both empty is padding: its out and gradients are exactly 0 and its lse is -inf, whatever its
other inputs hold, NaN included. Keys and values must be finite.

A tile holds all query heads of one key/value head for a few rows, so K and V are read once per group. With B = 16 and G = 4
it is two whole blocks. The keys of the tile's own blocks go first, in one or two blocks of keys, because they lie together.
The tile then walks the context between its first and its last key, and masks only what some row sees in part. Where a tile
holds rows of two documents, the keys between that no row sees are left out.
One kernel over query tiles computes dq, and writes delta. Another, over key blocks, computes dK and dV. It reads a list,
built on the device, of the query tiles that see the block. It runs twice, once over the blocks' own keys, whose gradient is
complete and is written, and once over the context, whose gradient is added to the fp32 buffers that all chunks share. A
short context has few key blocks, and each of them many tiles: too few programs for a GPU. There several programs share the
tiles of a key block, each writes its sum to scratch memory, and a last kernel adds the sums in order. Every element has one
writer in a launch, so two runs are bitwise equal.
Context keys that all rows see may be left to another kernel (`dense_attention`). ctx_start is then the first key that is
left, and the forward and dq go on from what that kernel gave.

Precision: operands are bf16; accumulation, softmax and lse are fp32. fp32 inputs multiply in fp32 (ieee). P and dS round to
the input dtype before their products. On a CPU everything is computed in the input dtype or float32, the wider of the two.
FLOPs per visible (row, key): 4 * D * Hq forward and 14 * D * Hq backward. Those are 7 products, because both kernels
compute S and dP; rates are quoted on the 5 that are needed. HBM: q and out are read once, K and V once per query tile,
mostly from L2.
Source: FlashAttention-2 (arXiv 2307.08691); DFlash (arXiv 2602.06036).

# R query rows, C blocks, B rows of a block, S = C * B, N packed tokens, Hq/Hkv heads, G = Hq/Hkv, D head dim
# BM tile rows, BR tile positions (rows of the list), BN tile keys
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastdraft.kernels.check import check, check_covered
from fastdraft.kernels.jit import jit, tl, triton
from fastdraft.kernels.ttt_attention import (
    HEAD_DIMS,
    LOG2E,
    Tile,
    _add_rows,
    _add_tile,
    _attend,
    _constants,
    _described,
    _key_blocks,
    _p_ds,
    _rows,
    _rows_fit,
    _strides,
    _tile,
)

MAX_BLOCK = 32

# The kernel over the context's keys is given about so many programs, 8 for each of an H100's SMs, so that the late key
# blocks, which few rows see, fill up behind the early ones.
KV_PROGRAMS = 1024
MAX_PARTS = 8

# A CPU holds the scores of so many rows at a time. Rows of nearby anchors see about the same keys.
CPU_ROWS = 128


@dataclass(frozen=True)
class BlockRows:
    """What each query row sees: keys [ctx_start, ctx_end) of the context and [blk_start, blk_end) of the blocks' own."""

    ctx_start: Tensor  # [R] int32 (all four)
    ctx_end: Tensor  # [R]
    blk_start: Tensor  # [R]
    blk_end: Tensor  # [R]


def block_rows(
    anchors: Tensor,  # [C] int32 or int64, row of the context; ascending anchors are fast
    doc_start: Tensor,  # [C] like anchors: first row of the anchor's document, or the first that `dense_attention` left
    block: int,  # B, 1 to 32
    live: Tensor | None = None,  # [R] int32 or int64, which of the C * B rows ask; None: all of them
    window: int | None = None,  # W: row k sees keys from a + k - (W - 1) on; None: from the document's first
    causal: bool = False,  # whether row k sees rows up to k of its block, or all B
) -> BlockRows:
    """The rows of blocks as intervals of keys, on the device of the anchors; the host does not wait.

    The context ends before the anchor, whose own features a server does not have yet. The window is counted from the row,
    as engines do, and bounds the context. It must reach over the block: engines and trainers differ in what a narrower
    window cuts inside a block, so that is refused. Raises ValueError for it, for shapes and dtypes that do not fit, and on
    a CPU for anchors before their document and live rows out of range.
    """
    if not 1 <= block <= MAX_BLOCK:
        raise ValueError(f"a block has 1 to {MAX_BLOCK} rows, got {block}")
    if window is not None and window < block:
        raise ValueError(
            f"a window of {window} is narrower than the block of {block} rows; engines and trainers mask that differently, "
            "so take a window of at least the block"
        )
    integers = (torch.int32, torch.int64)
    check("anchors", anchors, ("C",), integers)
    check("doc_start", doc_start, anchors.shape, anchors.dtype, anchors.device)
    check("live", live, ("R",), integers, anchors.device)
    num_rows = len(anchors) * block
    row = torch.arange(num_rows, device=anchors.device) if live is None else live.long()
    if not anchors.is_cuda:
        if bool((doc_start < 0).any() or (doc_start > anchors).any()):
            raise ValueError("an anchor lies before the first row of its document; 0 <= doc_start <= anchor is needed")
        if bool((row < 0).any() or (row >= num_rows).any()):
            raise ValueError(f"live rows are numbered 0 to {num_rows - 1} ({len(anchors)} blocks of {block}), got others")
    owner = row // block
    anchor = anchors.long()[owner]
    start = doc_start.long()[owner]
    if window is not None:
        start = torch.maximum(start, (anchor + row % block - (window - 1)).clamp(max=anchor))
    first = owner * block
    last = row + 1 if causal else first + block
    return BlockRows(*(x.int() for x in (start, anchor, first, last)))


def block_attention_ref(
    q: Tensor,  # [R, Hq, D]
    k_ctx: Tensor,  # [N, Hkv, D]
    v_ctx: Tensor,  # [N, Hkv, D]
    k_blk: Tensor,  # [S, Hkv, D]
    v_blk: Tensor,  # [S, Hkv, D]
    rows: BlockRows,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # out [R, Hq, D], lse [Hq, R] at least float32
    """The specification, any dtype, differentiable. Holds [R, Hq, N + S] scores."""
    dim, kv_heads = q.shape[2], k_ctx.shape[1]
    scale = dim**-0.5 if scale is None else scale
    ctx, blk = _inside(rows.ctx_start, rows.ctx_end, len(k_ctx)), _inside(rows.blk_start, rows.blk_end, len(k_blk))
    seen = torch.cat([ctx, blk], 1)
    valid = seen.any(1)
    unseen = valid[:, None] & ~seen
    keys, values = torch.cat([k_ctx, k_blk]), torch.cat([v_ctx, v_blk])
    grouped = torch.where(valid[:, None, None], q, 0).unflatten(1, (kv_heads, -1))
    scores = torch.einsum("rhgd,nhd->rhgn", grouped, keys).masked_fill(unseen[:, None, None], -torch.inf)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    out = torch.einsum("rhgn,nhd->rhgd", scores.softmax(-1).to(q.dtype), values)
    out = torch.where(valid[:, None, None], out.flatten(1, 2), 0)
    if not return_lse:
        return out
    return out, torch.where(valid, scores.logsumexp(-1).flatten(1, 2).T, -torch.inf)


def _inside(start: Tensor, end: Tensor, num_keys: int) -> Tensor:  # [R], [R] -> [R, num_keys] bool
    key = torch.arange(num_keys, device=start.device)
    return (key >= start[:, None]) & (key < end[:, None])


@dataclass(frozen=True)
class BlockAttentionConfig:
    fwd: Tile
    bwd_q: Tile
    bwd_kv: Tile


def block_attention_config(
    head_dim: int,
    group: int,  # Hq / Hkv
    dtype: torch.dtype,
    arch: tuple[int, int] | None,  # CUDA compute capability; None for Triton's CPU interpreter
) -> BlockAttentionConfig:
    """Tile sizes. They are those that a sweep on an H100 found for `ttt_attention`, whose loops these kernels share; these
    kernels themselves have not been swept. Raises ValueError, naming it, for what no kernel covers."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"block_attention covers head dims {HEAD_DIMS}, got {head_dim}")
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"block_attention covers bfloat16 and float32, got {dtype}; cast the inputs")
    if arch is not None and arch < (8, 0):
        raise ValueError(f"block_attention needs compute capability 8.0 or newer, this GPU has {arch[0]}.{arch[1]}")
    if group > 32:
        raise ValueError(f"block_attention covers up to 32 query heads per key/value head, got {group}")
    hopper = arch is None or arch >= (9, 0)
    large = arch is None or arch[0] in (9, 10)  # Others have 99 KB of shared memory a block, or little more.
    # Tests and tiny drafts have such heads.
    if head_dim < 64:
        tile = Tile(32, 32, 4, 1)
        return BlockAttentionConfig(tile, tile, tile)
    # float32 is there for exactness, and not for speed: it takes no tensor cores.
    if dtype == torch.float32:
        if head_dim == 256 and not large and arch != (8, 0):
            raise ValueError(
                "block_attention in float32 with head dim 256 needs 132 KB of shared memory a block; use bfloat16"
            )
        tile = Tile(32, 32, 4, 1, hopper)
        return BlockAttentionConfig(tile, tile, tile)
    if not large:
        narrow = 32 if head_dim == 256 else 64
        return BlockAttentionConfig(Tile(64, 32, 4, 1), Tile(narrow, 32, 4, 1), Tile(32, narrow, 4, 1))
    if head_dim == 256:
        return BlockAttentionConfig(Tile(128, 64, 8, 2, True), Tile(64, 32, 8, 2, True), Tile(64, 64, 8, 2, True))
    if head_dim == 64:
        return BlockAttentionConfig(Tile(64, 128, 4, 3, True), Tile(64, 64, 4, 3, True), Tile(64, 64, 4, 2, True))
    return BlockAttentionConfig(Tile(128, 64, 8, 3, True), Tile(128, 64, 8, 3, True), Tile(64, 64, 4, 2, True))


@jit
def _interval(start_ptr, end_ptr, row, exists):
    start = tl.load(start_ptr + row, mask=exists, other=0)
    end = tl.load(end_ptr + row, mask=exists, other=0)
    return start, end


@jit
def _bounds(start, end, ok):
    """What a tile of intervals sees: some row [lo, hi), every ok row [full_lo, full_hi), and no row [gap_lo, gap_hi).

    Where the rows that begin first all end before others begin, as at a document's border, the gap lies between. There may
    be more gaps; only the first is found. A tile with a gap has no key that every row sees.
    """
    far: tl.constexpr = 2**31 - 1
    some = ok & (start < end)
    lo = tl.min(tl.where(some, start, far), 0)
    hi = tl.max(tl.where(some, end, 0), 0)
    full_lo = tl.max(tl.where(some, start, 0), 0)
    full_hi = tl.min(tl.where(some, end, tl.where(ok, 0, far)), 0)
    reach = tl.max(tl.where(some & (start == lo), end, 0), 0)
    gap_hi = tl.min(tl.where(some & (start >= reach), start, far), 0)
    gap_lo = tl.max(tl.where(some & (start < gap_hi), end, 0), 0)
    return lo, hi, full_lo, full_hi, gap_lo, tl.where(gap_hi == far, 0, gap_hi)


@jit
def _own_keys(start, end):
    """The first and the last key, exclusive, of a tile's own blocks; first is not below last where there is none."""
    some = start < end
    return tl.min(tl.where(some, start, 2**31 - 1), 0), tl.max(tl.where(some, end, 0), 0)


@jit
def _context_blocks(start, end, ok, BN: tl.constexpr):
    """Bounds of the context's key blocks. Of [first, end) those in [skip, skip_end) need no mask: either every row sees
    them, and full_end is skip_end, or no row does, and full_end is skip, so that they are left out."""
    lo, hi, full_lo, full_hi, gap_lo, gap_hi = _bounds(start, end, ok)
    first, full_first, full_end, end_block = _key_blocks(lo, hi, full_lo, full_hi, BN)
    gap_first = tl.cdiv(gap_lo, BN)
    gap_end = gap_hi // BN
    gap = gap_end > gap_first
    skip = tl.where(gap, gap_first, full_first)
    skip_end = tl.where(gap, gap_end, full_end)
    return first, end_block, skip, skip_end, tl.where(gap, gap_first, full_end)


@jit(
    do_not_specialize=["R", "N", "S", "lse_stride"],
    do_not_specialize_on_alignment=["ctx_start_ptr", "ctx_end_ptr", "blk_start_ptr", "blk_end_ptr", "lse_ptr"],  # slices
)
def _block_attention_fwd_kernel(
    q_ptr,  # [R, Hq, D]
    k_ctx,  # [N, Hkv, D]
    v_ctx,
    k_blk,  # [S, Hkv, D]
    v_blk,
    ctx_start_ptr,  # [R] (all four)
    ctx_end_ptr,
    blk_start_ptr,
    blk_end_ptr,
    out_ptr,  # [R, Hq, D]
    lse_ptr,  # [Hq, R] fp32
    scale_log2,
    R,
    N,
    S,
    q_stride,
    k_ctx_stride,
    v_ctx_stride,
    k_blk_stride,
    v_blk_stride,
    out_stride,
    lse_stride,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    TMA: tl.constexpr,
    STARTED: tl.constexpr,  # out and lse hold the attention to other keys, and the kernel goes on from there
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    head = kv_head.to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # Late anchors see most keys, so they start first.
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, DP)
    row = tile * BR + m // G
    exists = (m < BR * G) & (row < R)
    start, end = _interval(ctx_start_ptr, ctx_end_ptr, row, exists)
    own_start, own_end = _interval(blk_start_ptr, blk_end_ptr, row, exists)
    ok = exists & ((start < end) | (own_start < own_end))
    q_head = head * G + m % G
    q = _rows(q_ptr + (q_head * D)[:, None], row, q_stride, ok, D, DP)

    # The softmax starts from other keys or from nothing, and takes the keys of the tile's own blocks first.
    if STARTED:
        acc = _rows(out_ptr + (q_head * D)[:, None], row, out_stride, ok, D, DP).to(tl.float32)
        top = tl.load(lse_ptr + q_head * lse_stride + row, mask=ok, other=float("-inf")) * 1.4426950408889634
        total = tl.full([BM], 1.0, tl.float32)
    else:
        acc = tl.zeros([BM, DP], tl.float32)
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
    own_first, own_last = _own_keys(own_start, own_end)
    for first_key in range(own_first, own_last, BN):
        key = first_key + n
        k = _tile(k_blk, first_key, kv_head, k_blk_stride, S, False, TMA, D, DP, BN)
        v = _tile(v_blk, first_key, kv_head, v_blk_stride, S, False, TMA, D, DP, BN)
        seen = (key[None, :] >= own_start[:, None]) & (key[None, :] < own_end[:, None])
        acc, top, total = _attend(acc, top, total, q, k, v, seen, scale_log2, True, PRECISION)

    # One loop takes the key blocks on both sides that need the mask, the other those between, which do not.
    first, end_block, skip, skip_end, full_end = _context_blocks(start, end, ok, BN)
    skipped = skip_end - skip
    for b in range(first, end_block - skipped):
        first_key = tl.where(b < skip, b, b + skipped) * BN
        key = first_key + n
        k = _tile(k_ctx, first_key, kv_head, k_ctx_stride, N, False, TMA, D, DP, BN)
        v = _tile(v_ctx, first_key, kv_head, v_ctx_stride, N, False, TMA, D, DP, BN)
        seen = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
        acc, top, total = _attend(acc, top, total, q, k, v, seen, scale_log2, True, PRECISION)
    for b in range(skip, full_end):
        k = _tile(k_ctx, b * BN, kv_head, k_ctx_stride, N, True, TMA, D, DP, BN)
        v = _tile(v_ctx, b * BN, kv_head, v_ctx_stride, N, True, TMA, D, DP, BN)
        acc, top, total = _attend(acc, top, total, q, k, v, True, scale_log2, False, PRECISION)

    acc = tl.where(ok[:, None], acc / total[:, None], 0.0)
    lse = tl.where(ok, (top + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))
    row = row.to(tl.int64)
    at = out_ptr + (row * out_stride + q_head * D)[:, None] + d[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + q_head * lse_stride + row, lse, mask=exists)


@jit(
    do_not_specialize=["R", "N", "S", "lse_stride", "delta_stride"],
    do_not_specialize_on_alignment=[
        "ctx_start_ptr",
        "ctx_end_ptr",
        "blk_start_ptr",
        "blk_end_ptr",
        "lse_ptr",
        "delta_ptr",
    ],  # slices
)
def _block_attention_bwd_q_kernel(
    dout_ptr,  # [R, Hq, D]
    q_ptr,  # [R, Hq, D]
    k_ctx,  # [N, Hkv, D]
    v_ctx,
    k_blk,  # [S, Hkv, D]
    v_blk,
    ctx_start_ptr,  # [R] (all four)
    ctx_end_ptr,
    blk_start_ptr,
    blk_end_ptr,
    out_ptr,  # [R, Hq, D]
    lse_ptr,  # [Hq, R] fp32
    dq_ptr,  # [R, Hq, D] written
    dq_start_ptr,  # [R, Hq, D] read where STARTED: the part of dq that comes from other keys
    delta_ptr,  # [Hq, R] fp32, written
    scale,
    scale_log2,
    R,
    N,
    S,
    dout_stride,
    q_stride,
    k_ctx_stride,
    v_ctx_stride,
    k_blk_stride,
    v_blk_stride,
    out_stride,
    dq_stride,
    dq_start_stride,
    lse_stride,
    delta_stride,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    TMA: tl.constexpr,
    STARTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    head = kv_head.to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, DP)
    row = tile * BR + m // G
    exists = (m < BR * G) & (row < R)
    start, end = _interval(ctx_start_ptr, ctx_end_ptr, row, exists)
    own_start, own_end = _interval(blk_start_ptr, blk_end_ptr, row, exists)
    ok = exists & ((start < end) | (own_start < own_end))
    q_head = head * G + m % G
    q = _rows(q_ptr + (q_head * D)[:, None], row, q_stride, ok, D, DP)
    dout = _rows(dout_ptr + (q_head * D)[:, None], row, dout_stride, ok, D, DP)
    out = _rows(out_ptr + (q_head * D)[:, None], row, out_stride, ok, D, DP)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + q_head * delta_stride + row, delta, mask=exists)
    lse2 = tl.load(lse_ptr + q_head * lse_stride + row, mask=ok, other=float("inf")) * 1.4426950408889634

    # dq starts from other keys or from nothing, and takes the keys of the tile's own blocks first.
    if STARTED:
        dq = _rows(dq_start_ptr + (q_head * D)[:, None], row, dq_start_stride, ok, D, DP).to(tl.float32) / scale
    else:
        dq = tl.zeros([BM, DP], tl.float32)
    own_first, own_last = _own_keys(own_start, own_end)
    for first_key in range(own_first, own_last, BN):
        key = first_key + n
        k = _tile(k_blk, first_key, kv_head, k_blk_stride, S, False, TMA, D, DP, BN)
        v = _tile(v_blk, first_key, kv_head, v_blk_stride, S, False, TMA, D, DP, BN)
        seen = (key[None, :] >= own_start[:, None]) & (key[None, :] < own_end[:, None])
        _, ds = _p_ds(q, k, v, dout, lse2, delta, seen, scale_log2, True, PRECISION)
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision=PRECISION)

    # One loop takes the key blocks on both sides that need the mask, the other those between, which do not.
    first, end_block, skip, skip_end, full_end = _context_blocks(start, end, ok, BN)
    skipped = skip_end - skip
    for b in range(first, end_block - skipped):
        first_key = tl.where(b < skip, b, b + skipped) * BN
        key = first_key + n
        k = _tile(k_ctx, first_key, kv_head, k_ctx_stride, N, False, TMA, D, DP, BN)
        v = _tile(v_ctx, first_key, kv_head, v_ctx_stride, N, False, TMA, D, DP, BN)
        seen = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
        _, ds = _p_ds(q, k, v, dout, lse2, delta, seen, scale_log2, True, PRECISION)
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision=PRECISION)
    for b in range(skip, full_end):
        k = _tile(k_ctx, b * BN, kv_head, k_ctx_stride, N, True, TMA, D, DP, BN)
        v = _tile(v_ctx, b * BN, kv_head, v_ctx_stride, N, True, TMA, D, DP, BN)
        _, ds = _p_ds(q, k, v, dout, lse2, delta, True, scale_log2, False, PRECISION)
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision=PRECISION)

    at = dq_ptr + (row.to(tl.int64) * dq_stride + q_head * D)[:, None] + d[None, :]
    tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])


@jit(do_not_specialize=["R", "num_tiles"], do_not_specialize_on_alignment=["start_ptr", "end_ptr"])
def _interval_bounds_kernel(
    start_ptr,  # [R]
    end_ptr,  # [R]
    bounds_ptr,  # [6, num_tiles] int32, what `_bounds` gives
    R,
    num_tiles,
    BM: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tile.to(tl.int64) * BM + tl.arange(0, BM)
    start, end = _interval(start_ptr, end_ptr, row, row < R)
    # Every row of the tile counts, there or not, so that a tile with padding sees nothing in full.
    lo, hi, full_lo, full_hi, gap_lo, gap_hi = _bounds(start, end, row >= 0)
    bounds_ptr += tile
    tl.store(bounds_ptr, lo)
    tl.store(bounds_ptr + num_tiles, hi)
    tl.store(bounds_ptr + 2 * num_tiles, full_lo)
    tl.store(bounds_ptr + 3 * num_tiles, full_hi)
    tl.store(bounds_ptr + 4 * num_tiles, gap_lo)
    tl.store(bounds_ptr + 5 * num_tiles, gap_hi)


@jit(do_not_specialize=["N", "num_tiles"])
def _interval_index_kernel(
    bounds_ptr,  # [6, num_tiles] int32
    tiles_ptr,  # [key blocks, num_tiles] int32: tiles that see all of the block from the left, part of it from the right
    counts_ptr,  # [key blocks, 2] int32: how many of each
    N,
    num_tiles,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    start = (block * BN).to(tl.int32)
    tiles_ptr += block * num_tiles
    num_whole = 0
    num_part = 0
    for t0 in range(0, num_tiles, CHUNK):
        t = t0 + tl.arange(0, CHUNK)
        exists = t < num_tiles
        lo, hi = _interval(bounds_ptr, bounds_ptr + num_tiles, t, exists)
        full_lo, full_hi = _interval(bounds_ptr + 2 * num_tiles, bounds_ptr + 3 * num_tiles, t, exists)
        gap_lo, gap_hi = _interval(bounds_ptr + 4 * num_tiles, bounds_ptr + 5 * num_tiles, t, exists)
        end = tl.minimum(start + BN, N)
        sees = exists & (lo < end) & (hi > start) & ((start < gap_lo) | (end > gap_hi))
        whole = sees & (full_lo <= start) & (full_hi >= start + BN)
        part = sees & ~whole
        whole_rank = tl.cumsum(whole.to(tl.int32), 0)
        part_rank = tl.cumsum(part.to(tl.int32), 0)
        tl.store(tiles_ptr + num_whole + whole_rank - 1, t, mask=whole)
        tl.store(tiles_ptr + num_tiles - num_part - part_rank, t, mask=part)
        num_whole += tl.sum(whole.to(tl.int32), 0)
        num_part += tl.sum(part.to(tl.int32), 0)
    tl.store(counts_ptr + 2 * block, num_whole)
    tl.store(counts_ptr + 2 * block + 1, num_part)


@jit
def _write_rows(ptr, row, stride, ok, x, D: tl.constexpr, DP: tl.constexpr):
    d = tl.arange(0, DP)
    at = ptr + row.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])


@jit(
    do_not_specialize=["R", "N", "num_tiles", "lse_stride", "delta_stride"],
    do_not_specialize_on_alignment=["start_ptr", "end_ptr", "lse_ptr", "delta_ptr"],  # slices of stacked rows
)
def _block_attention_bwd_kv_kernel(
    dout_ptr,  # [R, Hq, D]
    q_ptr,  # [R, Hq, D]
    k_ptr,  # [N, Hkv, D], of the context or of the blocks
    v_ptr,
    start_ptr,  # [R], of the same keys
    end_ptr,  # [R]
    lse_ptr,  # [Hq, R] fp32
    delta_ptr,  # [Hq, R] fp32
    tiles_ptr,  # [key blocks, num_tiles] int32
    counts_ptr,  # [key blocks, 2] int32
    dk_ptr,  # [N, Hkv, D], fp32 where ADD
    dv_ptr,
    scale,
    scale_log2,
    R,
    N,
    num_tiles,
    dout_stride,
    q_stride,
    k_stride,
    v_stride,
    dk_stride,
    dv_stride,
    lse_stride,
    delta_stride,
    part_stride,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    ADD: tl.constexpr,  # whether the gradients are added to what dk and dv hold, or written
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    head = kv_head.to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    share = tl.program_id(2)  # of the tiles that see the block
    shares = tl.num_programs(2)
    num_whole = tl.load(counts_ptr + 2 * block)
    num_part = tl.load(counts_ptr + 2 * block + 1)
    nothing_to_add = (num_whole + num_part == 0) & ADD
    if nothing_to_add:
        return
    tiles_ptr += block * num_tiles
    first_key = (block * BN).to(tl.int32)
    key = first_key + tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = _tile(k_ptr, first_key, kv_head, k_stride, N, False, TMA, D, DP, BN)
    v = _tile(v_ptr, first_key, kv_head, v_stride, N, False, TMA, D, DP, BN)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    # Tiles that see part of the block come first. If this loop were pipelined, its buffers would make the next one spill.
    for it in tl.range(num_part * share // shares * G, num_part * (share + 1) // shares * G, num_stages=1):
        first_row = tl.load(tiles_ptr + num_tiles - 1 - it // G) * BM
        q_head = kv_head * G + it % G
        row = first_row + m
        start, end = _interval(start_ptr, end_ptr, row, row < R)
        ok = start < end
        q = tl.where(ok[:, None], _tile(q_ptr, first_row, q_head, q_stride, R, False, TMA, D, DP, BM), 0.0)
        dout = tl.where(ok[:, None], _tile(dout_ptr, first_row, q_head, dout_stride, R, False, TMA, D, DP, BM), 0.0)
        lse = tl.load(lse_ptr + q_head.to(tl.int64) * lse_stride + row, mask=ok, other=float("inf"))
        delta = tl.load(delta_ptr + q_head.to(tl.int64) * delta_stride + row, mask=ok, other=0.0)
        seen = (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
        dk, dv = _add_tile(dk, dv, k, v, q, dout, lse, delta, seen, scale_log2, True, PRECISION)
    for it in range(num_whole * share // shares * G, num_whole * (share + 1) // shares * G):
        first_row = tl.load(tiles_ptr + it // G) * BM
        q_head = kv_head * G + it % G
        q = _tile(q_ptr, first_row, q_head, q_stride, R, True, TMA, D, DP, BM)
        dout = _tile(dout_ptr, first_row, q_head, dout_stride, R, True, TMA, D, DP, BM)
        lse = tl.load(lse_ptr + q_head.to(tl.int64) * lse_stride + first_row + m)
        delta = tl.load(delta_ptr + q_head.to(tl.int64) * delta_stride + first_row + m)
        dk, dv = _add_tile(dk, dv, k, v, q, dout, lse, delta, True, scale_log2, False, PRECISION)

    dk_ptr += share.to(tl.int64) * part_stride
    dv_ptr += share.to(tl.int64) * part_stride
    if ADD:
        _add_rows(dk_ptr + head * D, key, dk_stride, key < N, dk * scale, D, DP)
        _add_rows(dv_ptr + head * D, key, dv_stride, key < N, dv, D, DP)
    else:
        _write_rows(dk_ptr + head * D, key, dk_stride, key < N, dk * scale, D, DP)
        _write_rows(dv_ptr + head * D, key, dv_stride, key < N, dv, D, DP)


@jit(do_not_specialize=["N"])
def _add_parts_kernel(
    partial_ptr,  # [PARTS, 2, N, WIDTH] fp32
    dk_ptr,  # [N, WIDTH] fp32, added to
    dv_ptr,
    N,
    dk_stride,
    dv_stride,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,  # Hkv * D
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    for which in tl.static_range(2):
        total = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(PARTS):
            at = partial_ptr + ((2 * part + which) * N + row) * WIDTH + cols
            total += tl.load(at, mask=inside, other=0.0)
        at = (dk_ptr + row * dk_stride if which == 0 else dv_ptr + row * dv_stride) + cols
        tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


def _config(q: Tensor, k_ctx: Tensor) -> BlockAttentionConfig:
    arch = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    return block_attention_config(q.shape[2], q.shape[1] // k_ctx.shape[1], q.dtype, arch)


def _intervals(rows: BlockRows) -> list[Tensor]:
    return [getattr(rows, field.name) for field in fields(rows)]


def _block_attention_fwd(
    q: Tensor,  # [R, Hq, D]
    k_ctx: Tensor,  # [N, Hkv, D]
    v_ctx: Tensor,  # [N, Hkv, D]
    k_blk: Tensor,  # [S, Hkv, D]
    v_blk: Tensor,  # [S, Hkv, D]
    rows: BlockRows,
    scale: float,
    out: Tensor,  # [R, Hq, D] written
    lse: Tensor,  # [Hq, R] fp32, written
    started: bool = False,
) -> None:
    """Launches the forward kernel."""
    if len(q) == 0:
        return
    tile = _config(q, k_ctx).fwd
    constants = _constants(q, k_ctx, tile)
    positions = tile.rows // constants["G"]
    _block_attention_fwd_kernel[(k_ctx.shape[1], triton.cdiv(len(q), positions))](
        q,
        *(_described(x, tile.keys, tile) for x in (k_ctx, v_ctx, k_blk, v_blk)),
        *_intervals(rows),
        out,
        lse,
        scale * LOG2E,
        len(q),
        len(k_ctx),
        len(k_blk),
        *_strides(q, k_ctx, v_ctx, k_blk, v_blk, out, lse),
        BR=positions,
        STARTED=started,
        **constants,
    )


def _block_attention_bwd_q(
    dout: Tensor,  # [R, Hq, D]
    q: Tensor,  # [R, Hq, D]
    k_ctx: Tensor,  # [N, Hkv, D]
    v_ctx: Tensor,  # [N, Hkv, D]
    k_blk: Tensor,  # [S, Hkv, D]
    v_blk: Tensor,  # [S, Hkv, D]
    rows: BlockRows,
    out: Tensor,  # [R, Hq, D]
    lse: Tensor,  # [Hq, R] fp32
    scale: float,
    dk_blk: Tensor,  # [S, Hkv, D] written
    dv_blk: Tensor,  # [S, Hkv, D] written
    dq: Tensor,  # [R, Hq, D] written
    delta: Tensor,  # [Hq, R] fp32, written
    dq_start: Tensor | None = None,  # [R, Hq, D] fp32
) -> None:
    """Launches the kernel of the queries, then that of the keys on the blocks' own keys."""
    if len(q) > 0:
        tile = _config(q, k_ctx).bwd_q
        constants = _constants(q, k_ctx, tile)
        positions = tile.rows // constants["G"]
        before = dq if dq_start is None else dq_start
        _block_attention_bwd_q_kernel[(k_ctx.shape[1], triton.cdiv(len(q), positions))](
            dout,
            q,
            *(_described(x, tile.keys, tile) for x in (k_ctx, v_ctx, k_blk, v_blk)),
            *_intervals(rows),
            out,
            lse,
            dq,
            before,
            delta,
            scale,
            scale * LOG2E,
            len(q),
            len(k_ctx),
            len(k_blk),
            *_strides(dout, q, k_ctx, v_ctx, k_blk, v_blk, out, dq, before, lse, delta),
            BR=positions,
            STARTED=dq_start is not None,
            **constants,
        )
    _bwd_keys(dout, q, k_blk, v_blk, rows.blk_start, rows.blk_end, lse, delta, scale, dk_blk, dv_blk, add=False)


def _index(
    start: Tensor,  # [R] int32
    end: Tensor,  # [R] int32
    num_keys: int,
    tile: Tile,  # config.bwd_kv
) -> tuple[Tensor, Tensor]:  # tiles [key blocks, tiles] int32, counts [key blocks, 2] int32
    """Which query tiles see each key block. It is built on the device, and the host does not wait."""
    num_tiles = triton.cdiv(len(start), tile.rows)
    blocks = triton.cdiv(num_keys, tile.keys)
    bounds = torch.empty((6, num_tiles), dtype=torch.int32, device=start.device)
    tiles = torch.empty((blocks, num_tiles), dtype=torch.int32, device=start.device)
    counts = torch.empty((blocks, 2), dtype=torch.int32, device=start.device)
    _interval_bounds_kernel[(num_tiles,)](start, end, bounds, len(start), num_tiles, BM=tile.rows)
    _interval_index_kernel[(blocks,)](bounds, tiles, counts, num_keys, num_tiles, BN=tile.keys, CHUNK=1024)
    return tiles, counts


def _bwd_keys(
    dout: Tensor,  # [R, Hq, D]
    q: Tensor,  # [R, Hq, D]
    k: Tensor,  # [N, Hkv, D], of the context or of the blocks
    v: Tensor,  # [N, Hkv, D]
    start: Tensor,  # [R] int32, of the same keys
    end: Tensor,  # [R] int32
    lse: Tensor,  # [Hq, R] fp32
    delta: Tensor,  # [Hq, R] fp32
    scale: float,
    dk: Tensor,  # [N, Hkv, D]
    dv: Tensor,  # [N, Hkv, D]
    add: bool,  # to dk and dv, which are fp32 then; else they are written
    partial: Tensor | None = None,  # [parts, 2, N, Hkv, D] fp32 scratch, where add and several programs share a key block
) -> None:
    """Launches the kernel of the keys."""
    if len(q) == 0 or len(k) == 0:
        if not add:
            dk.zero_()
            dv.zero_()
        return
    tile = _config(q, k).bwd_kv
    tiles, counts = _index(start, end, len(k), tile)
    parts, into_dk, into_dv = (1, dk, dv) if partial is None else (len(partial), partial[0, 0], partial[0, 1])
    _block_attention_bwd_kv_kernel[(k.shape[1], len(tiles), parts)](
        *(_described(x, tile.rows, tile) for x in (dout, q)),
        *(_described(x, tile.keys, tile) for x in (k, v)),
        start,
        end,
        lse,
        delta,
        tiles,
        counts,
        into_dk,
        into_dv,
        scale,
        scale * LOG2E,
        len(q),
        len(k),
        tiles.shape[1],
        *_strides(dout, q, k, v, into_dk, into_dv, lse, delta),
        0 if partial is None else partial.stride(0),
        ADD=add and partial is None,
        **_constants(q, k, tile),
    )
    if partial is not None:
        width = dk.shape[1] * dk.shape[2]
        _add_parts_kernel[(len(k),)](
            partial,
            dk,
            dv,
            len(k),
            dk.stride(0),
            dv.stride(0),
            PARTS=parts,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
        )


def kv_parts(
    num_keys: int,
    kv_heads: int,
    dim: int,
    keys_per_program: int,
    num_tiles: int,  # of query rows
    room: int,  # float32 numbers of scratch memory
) -> int:
    """How many programs share the query tiles of a key block."""
    programs = max(kv_heads * -(-num_keys // keys_per_program), 1)
    fit = room // max(2 * num_keys * kv_heads * dim, 1)
    return max(1, min(KV_PROGRAMS // programs, MAX_PARTS, num_tiles, fit))


def kv_sums(
    scratch: Tensor,  # [M] float32, M = block_attention_partials(D)
    k: Tensor,  # [N, Hkv, D]
    keys_per_program: int,
    num_tiles: int,  # of query rows
) -> Tensor | None:  # [parts, 2, N, Hkv, D], a part of the scratch; None: one program has each key block, however many keys
    """Where the programs that share a key block leave their sums for dk and dv."""
    parts = kv_parts(*k.shape, keys_per_program, num_tiles, len(scratch))
    return None if parts == 1 else scratch[: 2 * parts * k.numel()].view(parts, 2, *k.shape)


def block_attention_partials(dim: int) -> int:
    """How many float32 numbers of scratch memory `block_attention_bwd_kv` can use: two sums of 64 keys a program."""
    return 2 * KV_PROGRAMS * 64 * dim


@dataclass(frozen=True)
class _Slab:
    """Some rows and the keys that at least one of them sees, on a CPU."""

    rows: slice
    ctx: slice
    blk: slice
    unseen: Tensor  # [r, keys of ctx, then of blk] bool
    valid: Tensor  # [r] bool, False: padding


def _slabs(rows: BlockRows) -> Iterator[_Slab]:
    for first in range(0, len(rows.ctx_start), CPU_ROWS):
        part = slice(first, first + CPU_ROWS)
        ctx_start, ctx_end, blk_start, blk_end = (getattr(rows, field.name)[part] for field in fields(rows))
        ctx, blk = _span(ctx_start, ctx_end), _span(blk_start, blk_end)
        seen = torch.cat([_inside(ctx_start, ctx_end, ctx.stop)[:, ctx], _inside(blk_start, blk_end, blk.stop)[:, blk]], 1)
        yield _Slab(part, ctx, blk, ~seen, seen.any(1))


def _span(start: Tensor, end: Tensor) -> slice:
    """The keys from the first to the last that some interval holds."""
    some = start < end
    return slice(int(start[some].min()), int(end[some].max())) if bool(some.any()) else slice(0, 0)


def _heads_first(
    x: Tensor,  # [r, Hq, D]
    slab: _Slab,
    kv_heads: int,
    dtype: torch.dtype,
) -> Tensor:  # [Hkv, G * r, D], 0 where a row is padding
    x = torch.where(slab.valid[:, None, None], x[slab.rows], 0).to(dtype)
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _heads_last(x: Tensor, slab: _Slab) -> Tensor:  # [Hkv, G * r, D] -> [r, Hq, D]
    return x.unflatten(1, (-1, len(slab.valid))).permute(2, 0, 1, 3).flatten(1, 2)


def _keys(ctx: Tensor, blk: Tensor, slab: _Slab, dtype: torch.dtype) -> Tensor:  # [Hkv, n, D]
    return torch.cat([ctx[slab.ctx], blk[slab.blk]]).to(dtype).transpose(0, 1)


def _scores(q: Tensor, keys: Tensor, slab: _Slab, scale: float) -> Tensor:  # [Hkv, G * r, n], -inf where not seen
    scores = (q @ keys.mT).mul_(scale)
    scores.unflatten(1, (-1, len(slab.valid))).masked_fill_(slab.unseen, -torch.inf)
    return scores


def _stats(x: Tensor, slab: _Slab, kv_heads: int, padding: float) -> Tensor:  # [Hq, R] -> [Hkv, G * r, 1]
    return torch.where(slab.valid, x[:, slab.rows], padding).reshape(kv_heads, -1, 1)


def _block_attention_fwd_cpu(q, k_ctx, v_ctx, k_blk, v_blk, rows, scale, out, lse, started) -> None:
    kv_heads, work = k_ctx.shape[1], lse.dtype
    for slab in _slabs(rows):
        scores = _scores(_heads_first(q, slab, kv_heads, work), _keys(k_ctx, k_blk, slab, work), slab, scale)
        total = scores.logsumexp(-1, keepdim=True)
        if started:
            before = _stats(lse, slab, kv_heads, -torch.inf)
            total = torch.logaddexp(total, before)
        finite = total.masked_fill(total == -torch.inf, 0)
        result = scores.sub_(finite).exp_() @ _keys(v_ctx, v_blk, slab, work)
        if started:
            result += (before - finite).exp() * _heads_first(out, slab, kv_heads, work)
        out[slab.rows] = _heads_last(result, slab).to(out.dtype)
        lse[:, slab.rows] = total.view(len(lse), -1)


def _p_ds_cpu(dout, q, k_ctx, v_ctx, k_blk, v_blk, slab, lse, delta, scale) -> tuple[Tensor, ...]:
    """P, dS [Hkv, G * r, n] and q, dout [Hkv, G * r, D], keys [Hkv, n, D] of a slab. dS is not yet scaled."""
    kv_heads, work = k_ctx.shape[1], lse.dtype
    q, dout = (_heads_first(x, slab, kv_heads, work) for x in (q, dout))
    keys = _keys(k_ctx, k_blk, slab, work)
    p = _scores(q, keys, slab, scale).sub_(_stats(lse, slab, kv_heads, 0.0)).exp_()
    ds = (dout @ _keys(v_ctx, v_blk, slab, work).mT).sub_(_stats(delta, slab, kv_heads, 0.0)).mul_(p)
    return p, ds, q, dout, keys


def _block_attention_bwd_q_cpu(
    dout, q, k_ctx, v_ctx, k_blk, v_blk, rows, out, lse, scale, dk_blk, dv_blk, dq, delta, dq_start
) -> None:
    work = lse.dtype
    dk, dv = (torch.zeros(k_blk.shape, dtype=work) for _ in range(2))
    for slab in _slabs(rows):
        both = (torch.where(slab.valid[:, None, None], x[slab.rows], 0).to(work) for x in (out, dout))
        delta[:, slab.rows] = torch.linalg.vecdot(*both).T
        p, ds, rows_q, rows_dout, keys = _p_ds_cpu(dout, q, k_ctx, v_ctx, k_blk, v_blk, slab, lse, delta, scale)
        part = _heads_last(ds @ keys, slab) * scale
        if dq_start is not None:
            part += torch.where(slab.valid[:, None, None], dq_start[slab.rows], 0)
        dq[slab.rows] = part.to(dq.dtype)
        own = slice(slab.ctx.stop - slab.ctx.start, None)
        dk[slab.blk] += (ds[..., own].mT @ rows_q).mul_(scale).transpose(0, 1)
        dv[slab.blk] += (p[..., own].mT @ rows_dout).transpose(0, 1)
    dk_blk.copy_(dk)
    dv_blk.copy_(dv)


def _block_attention_bwd_kv_cpu(dout, q, k_ctx, v_ctx, rows, lse, delta, scale, dk_ctx, dv_ctx) -> None:
    none = k_ctx[:0]
    zero = torch.zeros_like(rows.blk_start)
    for slab in _slabs(BlockRows(rows.ctx_start, rows.ctx_end, zero, zero)):
        p, ds, rows_q, rows_dout, _ = _p_ds_cpu(dout, q, k_ctx, v_ctx, none, none, slab, lse, delta, scale)
        dk_ctx[slab.ctx] += (ds.mT @ rows_q).mul_(scale).transpose(0, 1)
        dv_ctx[slab.ctx] += (p.mT @ rows_dout).transpose(0, 1)


def block_attention_fwd(
    q: Tensor,  # [R, Hq, D], rotated; rows may be strided, heads and D contiguous (all such tensors here)
    k_ctx: Tensor,  # [N, Hkv, D] rotated, finite
    v_ctx: Tensor,  # [N, Hkv, D] finite
    k_blk: Tensor,  # [S, Hkv, D] rotated, finite: the rows of all blocks, whether they ask or not
    v_blk: Tensor,  # [S, Hkv, D] finite
    rows: BlockRows,
    scale: float,  # > 0
    out: Tensor | None = None,  # [R, Hq, D] written
    lse: Tensor | None = None,  # [Hq, R] fp32, R contiguous, written, natural log
    started: bool = False,  # whether out and lse hold the attention to keys before ctx_start, to go on from
) -> tuple[Tensor, Tensor]:  # out, lse
    """The attention of the rows of a layer. CUDA tensors run one kernel, CPU tensors plain PyTorch.

    lse is float64 where q is, on a CPU. Raises ValueError for shapes, dtypes and strides that do not fit together and, on
    CUDA, for a head dim, dtype, group or GPU without a kernel (`block_attention_config`). The intervals' values are not
    checked, because that would wait for the GPU.
    """
    _check(q, k_ctx, v_ctx, k_blk, v_blk, rows, scale)
    stats = torch.promote_types(q.dtype, torch.float32)
    if started and (out is None or lse is None):
        raise ValueError("started goes on from out and lse; give both")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty((q.shape[1], len(q)), dtype=stats, device=q.device) if lse is None else lse
    _check_rows("out", out, q.shape, q)
    check("lse", lse, (q.shape[1], len(q)), stats, q.device, "rows")
    run = _block_attention_fwd if q.is_cuda else _block_attention_fwd_cpu
    run(q, k_ctx, v_ctx, k_blk, v_blk, rows, scale, out, lse, started)
    return out, lse


def block_attention_bwd_q(
    dout: Tensor,  # [R, Hq, D]
    q: Tensor,  # [R, Hq, D]
    k_ctx: Tensor,  # [N, Hkv, D]
    v_ctx: Tensor,  # [N, Hkv, D]
    k_blk: Tensor,  # [S, Hkv, D]
    v_blk: Tensor,  # [S, Hkv, D]
    rows: BlockRows,
    out: Tensor,  # [R, Hq, D] of the forward, all keys included
    lse: Tensor,  # [Hq, R] of the forward
    scale: float,
    dk_blk: Tensor,  # [S, Hkv, D] written, any floating dtype
    dv_blk: Tensor,  # [S, Hkv, D] written, like dk_blk
    dq: Tensor | None = None,  # [R, Hq, D] written
    delta: Tensor | None = None,  # [Hq, R] like lse, written
    dq_start: Tensor | None = None,  # [R, Hq, D] fp32, the part of dq that comes from keys before ctx_start
) -> tuple[Tensor, Tensor]:  # dq, delta
    """The gradients of the queries and of the blocks' own keys and values, and what `block_attention_bwd_kv` needs: delta.

    Own keys that no row sees get a gradient of 0. Raises ValueError as `block_attention_fwd` does.
    """
    _check(q, k_ctx, v_ctx, k_blk, v_blk, rows, scale)
    stats = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if dq is None else dq
    delta = torch.empty((q.shape[1], len(q)), dtype=stats, device=q.device) if delta is None else delta
    for name, x in {"dout": dout, "out": out, "dq": dq}.items():
        _check_rows(name, x, q.shape, q)
    for name, x in {"lse": lse, "delta": delta}.items():
        check(name, x, (q.shape[1], len(q)), stats, q.device, "rows")
    check("dk_blk", dk_blk, k_blk.shape, None, q.device, "rows")
    check("dv_blk", dv_blk, k_blk.shape, dk_blk.dtype, q.device, "rows")
    check("dq_start", dq_start, q.shape, stats, q.device, "rows")
    run = _block_attention_bwd_q if q.is_cuda else _block_attention_bwd_q_cpu
    run(dout, q, k_ctx, v_ctx, k_blk, v_blk, rows, out, lse, scale, dk_blk, dv_blk, dq, delta, dq_start)
    return dq, delta


def block_attention_bwd_kv(
    dout: Tensor,  # [R, Hq, D]
    q: Tensor,  # [R, Hq, D]
    k_ctx: Tensor,  # [N, Hkv, D]
    v_ctx: Tensor,  # [N, Hkv, D]
    rows: BlockRows,
    lse: Tensor,  # [Hq, R] of the forward
    delta: Tensor,  # [Hq, R] of `block_attention_bwd_q`
    scale: float,
    dk_ctx: Tensor,  # [N, Hkv, D] fp32 (float64 where q is), added to
    dv_ctx: Tensor,  # [N, Hkv, D] like dk_ctx, added to
    partial: Tensor | None = None,  # [M] float32 scratch, M = block_attention_partials(D); unused on a CPU
) -> None:
    """Adds the gradients of the context's keys and values. Raises ValueError as `block_attention_fwd` does.

    Give only the keys that some row sees: how the work is divided among programs depends on their number, and where they
    are few it needs `partial`. The bits of the result depend on both.
    """
    _check(q, k_ctx, v_ctx, k_ctx, v_ctx, rows, scale)
    stats = torch.promote_types(q.dtype, torch.float32)
    _check_rows("dout", dout, q.shape, q)
    for name, x in {"lse": lse, "delta": delta}.items():
        check(name, x, (q.shape[1], len(q)), stats, q.device, "rows")
    for name, x in {"dk_ctx": dk_ctx, "dv_ctx": dv_ctx}.items():
        check(name, x, k_ctx.shape, stats, q.device, "rows")
    if q.is_cuda:
        if partial is not None:
            check("partial", partial, ("M",), torch.float32, q.device, "whole")
            tile = _config(q, k_ctx).bwd_kv
            partial = kv_sums(partial, k_ctx, tile.keys, triton.cdiv(len(q), tile.rows))
        start, end = rows.ctx_start, rows.ctx_end
        _bwd_keys(dout, q, k_ctx, v_ctx, start, end, lse, delta, scale, dk_ctx, dv_ctx, True, partial)
    else:
        _block_attention_bwd_kv_cpu(dout, q, k_ctx, v_ctx, rows, lse, delta, scale, dk_ctx, dv_ctx)


def _check(q, k_ctx, v_ctx, k_blk, v_blk, rows, scale) -> None:
    check("q", q, ("R", "Hq", "D"))
    _check_rows("q", q, q.shape, q)
    _check_rows("k_ctx", k_ctx, ("N", "Hkv", q.shape[2]), q)
    _check_rows("v_ctx", v_ctx, k_ctx.shape, q)
    if q.shape[1] % k_ctx.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k_ctx {k_ctx.shape[1]}; Hq must be a multiple of Hkv")
    _check_rows("k_blk", k_blk, ("S", *k_ctx.shape[1:]), q)
    _check_rows("v_blk", v_blk, k_blk.shape, q)
    for field in fields(rows):
        check(field.name, getattr(rows, field.name), (len(q),), torch.int32, q.device)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    check_covered("block_attention", q=q)


def _check_rows(name: str, x: Tensor, shape: Sequence[int | str], like: Tensor) -> None:
    """As `check`, with rows that the copy engine can read where they lie."""
    check(name, x, shape, like.dtype, like.device, "rows")
    if x.is_cuda and not _rows_fit(x):
        raise ValueError(
            f"{name} begins at {x.data_ptr():#x} and has strides {x.stride()} of {x.element_size()} bytes; "
            "it must begin, and its rows must lie, at multiples of 16 bytes"
        )
