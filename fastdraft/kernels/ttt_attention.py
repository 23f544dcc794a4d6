"""Attention of a list of TTT queries over K^0, V^0 and each query's own diagonal terms.

Query row r sits at token row t = pos[r] of a pack; step i's row sees the context of its document and its own chain:

    s_n = scale * q_r . K^0_n   for doc_start[r] <= n <= pos[r]          z_j = scale * q_r . K^j_r   for 1 <= j <= i
    out = (sum_n e^{s_n} V^0_n + sum_j e^{z_j} V^j_r) / e^lse            lse = log(sum_n e^{s_n} + sum_j e^{z_j})
    P = e^{s - lse},  delta = dout . out,  dS = P * (dout . V - delta)
    dq = scale * sum dS K,  dK = scale * sum dS q,  dV = sum P dout

The list may be dense, compacted, packed, a chunk or a shard, because only pos and doc_start say what a row sees. pos[r] < 0
marks a padding row: its out and gradients are exactly 0 and its lse is -inf, whatever its other inputs hold, NaN included.
K^0 and V^0 must be finite.

A tile holds all query heads of one key/value head for a few positions, so K and V are read once per group. The diagonal
terms go first: they are i * positions extra keys, each of which only the rows of its own position see. A tile then walks
the key blocks between min(doc_start) and max(pos), and masks only the blocks that some row sees in part.
One kernel over query tiles computes dq and the diagonal gradients, and writes delta. Another, over key blocks, computes
dK^0 and dV^0. It reads a list, built on the device, of the query tiles that see the block, and may run once for the rows
of all steps. Gradients are added to fp32 buffers in L2, each element once a launch, so two runs are bitwise equal.
Keys that all rows see may be left to another kernel (`dense_attention`). doc_start is then the first key that is left, and
the forward and dq go on from what that kernel gave.

Precision: operands are bf16; accumulation, softmax and lse are fp32. fp32 inputs multiply in fp32 (ieee). P and dS round to
the input dtype before their products. FLOPs per visible (row, key): 4 * D * Hq forward and 14 * D * Hq backward. Those are
7 products, because both kernels compute S and dP; rates are quoted on the 5 that are needed. HBM: q, out and the diagonals
are read once, K^0 and V^0 once per query tile, mostly from L2.
Source: FlashAttention-2 (arXiv 2307.08691); EAGLE-3 training-time test (arXiv 2503.01840).

# M query rows, N packed tokens, Hq/Hkv heads, G = Hq/Hkv, D head dim (DP: next power of two), i diagonal terms
# BM tile rows, BR tile positions, BN tile keys
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdraft.kernels.check import AtLeast, check, check_covered
from fastdraft.kernels.jit import TensorDescriptor, jit, tl, triton

LOG2E = 1.4426950408889634
HEAD_DIMS = (8, 16, 32, 64, 96, 128, 256)


def ttt_attention_ref(
    q: Tensor,  # [M, Hq, D]
    k0: Tensor,  # [N, Hkv, D]
    v0: Tensor,  # [N, Hkv, D]
    k_diag: Tensor | None,  # [i, M', Hkv, D], M' >= M
    v_diag: Tensor | None,  # [i, M', Hkv, D]
    pos: Tensor,  # [M] int, row in k0; below 0 is padding
    doc_start: Tensor,  # [M] int, first row of the document
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # out [M, Hq, D], lse [Hq, M] at least float32
    """The specification, any dtype, differentiable. Holds [M, Hq, N] scores."""
    m, heads, dim = q.shape
    n, kv_heads = k0.shape[:2]
    scale = dim**-0.5 if scale is None else scale
    work = torch.promote_types(q.dtype, torch.float32)
    valid = pos >= 0
    keys = torch.arange(n, device=q.device)
    unseen = valid[:, None] & ((keys < doc_start[:, None]) | (keys > pos[:, None]))
    grouped = torch.where(valid[:, None, None], q, 0).unflatten(1, (kv_heads, heads // kv_heads))
    scores = torch.einsum("mhgd,nhd->mhgn", grouped, k0).masked_fill(unseen[:, None, None], -torch.inf)
    if k_diag is not None and k_diag.shape[0]:
        k_diag, v_diag = (torch.where(valid[:, None, None], x[:, :m], 0) for x in (k_diag, v_diag))
        scores = torch.cat([scores, torch.einsum("mhgd,jmhd->mhgj", grouped, k_diag)], -1)
    scores = scores.to(work) * scale
    p = scores.softmax(-1).to(q.dtype)
    out = torch.einsum("mhgn,nhd->mhgd", p[..., :n], v0)
    if p.shape[-1] > n:
        out = out + torch.einsum("mhgj,jmhd->mhgd", p[..., n:], v_diag)
    out = torch.where(valid[:, None, None], out.flatten(1, 2), 0)
    if not return_lse:
        return out
    return out, torch.where(valid, scores.logsumexp(-1).flatten(1, 2).T, -torch.inf)


@dataclass(frozen=True)
class Tile:
    rows: int  # BM, query rows: positions times group; in bwd_kv, positions of one head
    keys: int  # BN
    warps: int
    stages: int
    tma: bool = False  # dense tiles come through the copy engine (compute capability 9.0 and up)


@dataclass(frozen=True)
class TTTAttentionConfig:
    fwd: Tile
    bwd_q: Tile
    bwd_kv: Tile


def ttt_attention_config(
    head_dim: int,
    group: int,  # Hq / Hkv
    dtype: torch.dtype,
    arch: tuple[int, int] | None,  # CUDA compute capability; None for Triton's CPU interpreter
) -> TTTAttentionConfig:
    """Tile sizes. Hopper's come from a sweep on an H100 (rows of bench/results/ttt_attention.jsonl). Other GPUs' fit the
    shared memory and are not tuned. Raises ValueError, naming it, for what no kernel covers."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"ttt_attention covers head dims {HEAD_DIMS}, got {head_dim}")
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"ttt_attention covers bfloat16 and float32, got {dtype}; cast the inputs")
    if arch is not None and arch < (8, 0):
        raise ValueError(f"ttt_attention needs compute capability 8.0 or newer, this GPU has {arch[0]}.{arch[1]}")
    if group > 32:
        raise ValueError(f"ttt_attention covers up to 32 query heads per key/value head, got {group}")
    hopper = arch is None or arch >= (9, 0)
    # Tests and tiny drafts have such heads.
    if head_dim < 64:
        tile = Tile(32, 32, 4, 1)
        return TTTAttentionConfig(tile, tile, tile)
    # float32 is there for exactness, and not for speed: it takes no tensor cores.
    if dtype == torch.float32:
        if head_dim == 256 and arch is not None and arch[0] not in (9, 10) and arch != (8, 0):
            raise ValueError(
                "ttt_attention in float32 with head dim 256 needs 132 KB of shared memory a block; use bfloat16"
            )
        tile = Tile(32, 32, 4, 1, hopper)
        return TTTAttentionConfig(tile, tile, tile)
    # These GPUs have 99 KB of shared memory a block, or little more.
    if arch is not None and arch[0] not in (9, 10):
        narrow = 32 if head_dim == 256 else 64
        return TTTAttentionConfig(Tile(64, 32, 4, 1), Tile(narrow, 32, 4, 1), Tile(32, narrow, 4, 1))
    if head_dim == 256:
        return TTTAttentionConfig(Tile(128, 64, 8, 2, True), Tile(64, 32, 8, 2, True), Tile(64, 64, 8, 2, True))
    if head_dim == 64:
        return TTTAttentionConfig(Tile(64, 128, 4, 3, True), Tile(64, 64, 4, 3, True), Tile(64, 64, 4, 2, True))
    return TTTAttentionConfig(Tile(128, 64, 8, 3, True), Tile(128, 64, 8, 3, True), Tile(64, 64, 4, 2, True))


@jit
def _tile_rows(pos_ptr, doc_ptr, tile, M, G: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr):
    """The rows of a tile of whole positions, and what they see: some row [lo, hi), every row [full_lo, full_hi)."""
    m = tl.arange(0, BM)
    row = tile * BR + m // G
    ok = (m < BR * G) & (row < M)
    pos = tl.load(pos_ptr + row, mask=ok, other=-1).to(tl.int32)
    ok = ok & (pos >= 0)
    doc = tl.load(doc_ptr + row, mask=ok, other=0).to(tl.int32)
    far: tl.constexpr = 2**31 - 1
    lo = tl.min(tl.where(ok, doc, far), 0)
    hi = tl.max(tl.where(ok, pos + 1, 0), 0)
    full_lo = tl.max(tl.where(ok, doc, 0), 0)
    full_hi = tl.min(tl.where(ok, pos + 1, far), 0)
    return row, ok, pos, doc, lo, hi, full_lo, full_hi


@jit
def _key_blocks(lo, hi, full_lo, full_hi, BN: tl.constexpr):
    """Bounds of key blocks. [first, full_first) and [full_end, end) need the mask, [full_first, full_end) does not."""
    first = tl.minimum(lo, hi) // BN
    end = tl.cdiv(hi, BN)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_lo, BN), first), end)
    full_end = tl.maximum(tl.minimum(full_hi // BN, end), full_first)
    return first, full_first, full_end, end


@jit
def _diag_keys(pos_ptr, tile, f, num_diag, M, BR: tl.constexpr):
    """Diagonal key f of a tile: its chain step (from 0), its position inside the tile, its row, and whether it exists."""
    own = f % BR
    row = tile * BR + own
    ok = (f < num_diag * BR) & (row < M)
    ok = ok & (tl.load(pos_ptr + row, mask=ok, other=-1) >= 0)
    return f // BR, own, row, ok


@jit
def _columns(at, d, D: tl.constexpr, DP: tl.constexpr):
    if DP == D:
        return tl.load(at)
    else:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)


@jit
def _rows(ptr, row, stride, ok, D: tl.constexpr, DP: tl.constexpr):
    """[rows, DP] at ptr + row * stride. Rows that are not ok and columns past D are 0. With ok None every row exists."""
    d = tl.arange(0, DP)
    at = ptr + row.to(tl.int64)[:, None] * stride + d[None, :]
    if ok is None:
        return _columns(at, d, D, DP)
    else:
        return tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0.0)


@jit
def _tile(
    x,  # pointer to, or descriptor of, [N, heads, D]
    start,
    head,
    stride,
    N,
    WHOLE: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """[ROWS, DP], one head's rows start .. start + ROWS, 0 from N on. With WHOLE all of them exist. By TMA, columns past D
    hold the next head's values; callers multiply them with zeros or do not store what they reach."""
    if TMA:
        return x.load([start, head * D])
    else:
        n = tl.arange(0, ROWS)
        d = tl.arange(0, DP)
        at = x + tl.cast(start, tl.int64) * stride + tl.cast(head, tl.int64) * D + n[:, None] * stride + d[None, :]
        if WHOLE:
            return _columns(at, d, D, DP)
        else:
            return tl.load(at, mask=(start + n < N)[:, None] & (d < D)[None, :], other=0.0)


@jit
def _attend(acc, top, total, q, k, v, seen, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds one block to an online softmax of acc [BM, DP], the running maximum (log2) [BM] and the running sum [BM]."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = tl.math.exp2(s * scale_log2 - safe[:, None])
    shrink = tl.math.exp2(top - safe)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@jit(
    do_not_specialize=["M", "N", "num_diag", "lse_stride"],
    do_not_specialize_on_alignment=["pos_ptr", "doc_ptr", "lse_ptr"],  # slices of stacked rows
)
def _ttt_attention_fwd_kernel(
    q_ptr,  # [M, Hq, D]
    k0_ptr,  # [N, Hkv, D]
    v0_ptr,
    k_diag_ptr,  # [i, M', Hkv, D]
    v_diag_ptr,
    pos_ptr,  # [M]
    doc_ptr,  # [M]
    out_ptr,  # [M, Hq, D]
    lse_ptr,  # [Hq, M] fp32
    scale_log2,
    M,
    N,
    num_diag,
    q_stride,
    k0_stride,
    v0_stride,
    k_diag_step,
    k_diag_stride,
    v_diag_step,
    v_diag_stride,
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
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # Late positions see most keys, so they start first.
    row, ok, pos, doc, lo, hi, full_lo, full_hi = _tile_rows(pos_ptr, doc_ptr, tile, M, G, BM, BR)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    q_head = head * G + m % G
    q = _rows(q_ptr + (q_head * D)[:, None], row, q_stride, ok, D, DP)
    k_diag_ptr += head * D
    v_diag_ptr += head * D

    # The softmax starts from other keys or from nothing, and takes the diagonal terms first.
    if STARTED:
        acc = _rows(out_ptr + (q_head * D)[:, None], row, out_stride, ok, D, DP).to(tl.float32)
        top = tl.load(lse_ptr + q_head * lse_stride + row, mask=ok, other=float("-inf")) * 1.4426950408889634
        total = tl.full([BM], 1.0, tl.float32)
    else:
        acc = tl.zeros([BM, DP], tl.float32)
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
    for f0 in range(0, num_diag * BR, BN):
        step, own, diag_row, exists = _diag_keys(pos_ptr, tile, f0 + n, num_diag, M, BR)
        k = _rows(k_diag_ptr + (step.to(tl.int64) * k_diag_step)[:, None], diag_row, k_diag_stride, exists, D, DP)
        v = _rows(v_diag_ptr + (step.to(tl.int64) * v_diag_step)[:, None], diag_row, v_diag_stride, exists, D, DP)
        seen = exists[None, :] & (own[None, :] == (m // G)[:, None])
        acc, top, total = _attend(acc, top, total, q, k, v, seen, scale_log2, True, PRECISION)

    # One loop takes the key blocks on both sides that need the mask, the other those between, which do not.
    first, full_first, full_end, end = _key_blocks(lo, hi, full_lo, full_hi, BN)
    skip = full_end - full_first
    for b in range(first, end - skip):
        start = tl.where(b < full_first, b, b + skip) * BN
        key = start + n
        k = _tile(k0_ptr, start, kv_head, k0_stride, N, False, TMA, D, DP, BN)
        v = _tile(v0_ptr, start, kv_head, v0_stride, N, False, TMA, D, DP, BN)
        seen = (key[None, :] >= doc[:, None]) & (key[None, :] <= pos[:, None])
        acc, top, total = _attend(acc, top, total, q, k, v, seen, scale_log2, True, PRECISION)
    for b in range(full_first, full_end):
        k = _tile(k0_ptr, b * BN, kv_head, k0_stride, N, True, TMA, D, DP, BN)
        v = _tile(v0_ptr, b * BN, kv_head, v0_stride, N, True, TMA, D, DP, BN)
        acc, top, total = _attend(acc, top, total, q, k, v, True, scale_log2, False, PRECISION)

    acc = tl.where(ok[:, None], acc / total[:, None], 0.0)
    lse = tl.where(ok, (top + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))
    d = tl.arange(0, DP)
    exists = (m < BR * G) & (row < M)
    row = row.to(tl.int64)
    at = out_ptr + (row * out_stride + q_head * D)[:, None] + d[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + q_head * lse_stride + row, lse, mask=exists)


@jit
def _p_ds(q, k, v, dout, lse2, delta, seen, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """P and dS of a block, [BM, BN] fp32. dS is not yet scaled."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.math.exp2(s * scale_log2 - lse2[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    return p, p * (dp - delta[:, None])


@jit
def _add_rows(ptr, row, stride, ok, x, D: tl.constexpr, DP: tl.constexpr):
    """Adds x [rows, DP] in the L2 cache. A launch adds to every element once, so no sum depends on timing. Compared with a
    load and a store this frees registers: bwd_q runs at 706 instead of 623 TFLOP/s at 16k."""
    d = tl.arange(0, DP)
    at = ptr + row.to(tl.int64)[:, None] * stride + d[None, :]
    tl.atomic_add(at, x, mask=ok[:, None] & (d < D)[None, :], sem="relaxed")


@jit(
    do_not_specialize=["M", "N", "num_diag", "lse_stride", "delta_stride"],
    do_not_specialize_on_alignment=["pos_ptr", "doc_ptr", "lse_ptr", "delta_ptr"],  # slices of stacked rows
)
def _ttt_attention_bwd_q_kernel(
    dout_ptr,  # [M, Hq, D]
    q_ptr,  # [M, Hq, D]
    k0_ptr,  # [N, Hkv, D]
    v0_ptr,
    k_diag_ptr,  # [i, M', Hkv, D]
    v_diag_ptr,
    pos_ptr,  # [M]
    doc_ptr,  # [M]
    out_ptr,  # [M, Hq, D]
    lse_ptr,  # [Hq, M] fp32
    dq_ptr,  # [M, Hq, D] written
    dq_start_ptr,  # [M, Hq, D] read where STARTED: the part of dq that comes from other keys
    delta_ptr,  # [Hq, M] fp32, written
    dk_diag_ptr,  # [i, M', Hkv, D] fp32, added to
    dv_diag_ptr,
    scale,
    scale_log2,
    M,
    N,
    num_diag,
    dout_stride,
    q_stride,
    k0_stride,
    v0_stride,
    k_diag_step,
    k_diag_stride,
    v_diag_step,
    v_diag_stride,
    out_stride,
    dq_stride,
    dq_start_stride,
    dk_diag_step,
    dk_diag_stride,
    dv_diag_step,
    dv_diag_stride,
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
    row, ok, pos, doc, lo, hi, full_lo, full_hi = _tile_rows(pos_ptr, doc_ptr, tile, M, G, BM, BR)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    d = tl.arange(0, DP)
    q_head = head * G + m % G
    exists_m = (m < BR * G) & (row < M)
    q = _rows(q_ptr + (q_head * D)[:, None], row, q_stride, ok, D, DP)
    dout = _rows(dout_ptr + (q_head * D)[:, None], row, dout_stride, ok, D, DP)
    out = _rows(out_ptr + (q_head * D)[:, None], row, out_stride, ok, D, DP)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + q_head * delta_stride + row, delta, mask=exists_m)
    lse2 = tl.load(lse_ptr + q_head * lse_stride + row, mask=ok, other=float("inf")) * 1.4426950408889634
    k_diag_ptr += head * D
    v_diag_ptr += head * D
    dk_diag_ptr += head * D
    dv_diag_ptr += head * D

    # dq starts from other keys or from nothing, and takes the diagonal terms first, whose gradients are complete here.
    if STARTED:
        dq = _rows(dq_start_ptr + (q_head * D)[:, None], row, dq_start_stride, ok, D, DP).to(tl.float32) / scale
    else:
        dq = tl.zeros([BM, DP], tl.float32)
    for f0 in range(0, num_diag * BR, BN):
        step, own, diag_row, exists = _diag_keys(pos_ptr, tile, f0 + n, num_diag, M, BR)
        step = step.to(tl.int64)[:, None]
        k = _rows(k_diag_ptr + step * k_diag_step, diag_row, k_diag_stride, exists, D, DP)
        v = _rows(v_diag_ptr + step * v_diag_step, diag_row, v_diag_stride, exists, D, DP)
        seen = exists[None, :] & (own[None, :] == (m // G)[:, None])
        p, ds = _p_ds(q, k, v, dout, lse2, delta, seen, scale_log2, True, PRECISION)
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        _add_rows(dk_diag_ptr + step * dk_diag_step, diag_row, dk_diag_stride, exists, dk, D, DP)
        dv = tl.dot(tl.trans(p.to(q.dtype)), dout, input_precision=PRECISION)
        _add_rows(dv_diag_ptr + step * dv_diag_step, diag_row, dv_diag_stride, exists, dv, D, DP)

    # One loop takes the key blocks on both sides that need the mask, the other those between, which do not.
    first, full_first, full_end, end = _key_blocks(lo, hi, full_lo, full_hi, BN)
    skip = full_end - full_first
    for b in range(first, end - skip):
        start = tl.where(b < full_first, b, b + skip) * BN
        key = start + n
        k = _tile(k0_ptr, start, kv_head, k0_stride, N, False, TMA, D, DP, BN)
        v = _tile(v0_ptr, start, kv_head, v0_stride, N, False, TMA, D, DP, BN)
        seen = (key[None, :] >= doc[:, None]) & (key[None, :] <= pos[:, None])
        p, ds = _p_ds(q, k, v, dout, lse2, delta, seen, scale_log2, True, PRECISION)
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision=PRECISION)
    for b in range(full_first, full_end):
        k = _tile(k0_ptr, b * BN, kv_head, k0_stride, N, True, TMA, D, DP, BN)
        v = _tile(v0_ptr, b * BN, kv_head, v0_stride, N, True, TMA, D, DP, BN)
        p, ds = _p_ds(q, k, v, dout, lse2, delta, True, scale_log2, False, PRECISION)
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision=PRECISION)

    at = dq_ptr + (row.to(tl.int64) * dq_stride + q_head * D)[:, None] + d[None, :]
    tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=exists_m[:, None] & (d < D)[None, :])


@jit(do_not_specialize=["M", "num_tiles"], do_not_specialize_on_alignment=["pos_ptr", "doc_ptr"])
def _tile_bounds_kernel(
    pos_ptr,  # [M]
    doc_ptr,  # [M]
    bounds_ptr,  # [4, num_tiles] int32: lo, hi, full_lo, full_hi
    M,
    num_tiles,
    BM: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tile.to(tl.int64) * BM + tl.arange(0, BM)
    pos = tl.load(pos_ptr + row, mask=row < M, other=-1).to(tl.int32)
    ok = pos >= 0
    doc = tl.load(doc_ptr + row, mask=ok, other=0).to(tl.int32)
    tl.store(bounds_ptr + tile, tl.min(tl.where(ok, doc, 2**31 - 1), 0))
    tl.store(bounds_ptr + num_tiles + tile, tl.max(tl.where(ok, pos + 1, 0), 0))
    tl.store(bounds_ptr + 2 * num_tiles + tile, tl.max(tl.where(ok, doc, 0), 0))
    tl.store(bounds_ptr + 3 * num_tiles + tile, tl.min(pos + 1, 0))  # A tile with padding sees nothing in full.


@jit(do_not_specialize=["N", "num_tiles"])
def _tile_index_kernel(
    bounds_ptr,  # [4, num_tiles] int32
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
        lo = tl.load(bounds_ptr + t, mask=exists, other=0)
        hi = tl.load(bounds_ptr + num_tiles + t, mask=exists, other=0)
        full_lo = tl.load(bounds_ptr + 2 * num_tiles + t, mask=exists, other=0)
        full_hi = tl.load(bounds_ptr + 3 * num_tiles + t, mask=exists, other=0)
        sees = exists & (lo < tl.minimum(start + BN, N)) & (hi > start)
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
def _add_tile(dk, dv, k, v, q, dout, lse, delta, seen, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds one query tile to dK and dV [BN, DP]. The scores are transposed, [BN, BM]."""
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = tl.math.exp2(s * scale_log2 - (lse * 1.4426950408889634)[None, :])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(q.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@jit(
    do_not_specialize=["M", "N", "num_tiles", "lse_stride", "delta_stride"],
    do_not_specialize_on_alignment=["pos_ptr", "doc_ptr", "lse_ptr", "delta_ptr"],  # slices of stacked rows
)
def _ttt_attention_bwd_kv_kernel(
    dout_ptr,  # [M, Hq, D]
    q_ptr,  # [M, Hq, D]
    k0_ptr,  # [N, Hkv, D]
    v0_ptr,
    pos_ptr,  # [M]
    doc_ptr,  # [M]
    lse_ptr,  # [Hq, M] fp32
    delta_ptr,  # [Hq, M] fp32
    tiles_ptr,  # [key blocks, num_tiles] int32
    counts_ptr,  # [key blocks, 2] int32
    dk0_ptr,  # [N, Hkv, D] fp32, added to
    dv0_ptr,
    scale,
    scale_log2,
    M,
    N,
    num_tiles,
    dout_stride,
    q_stride,
    k0_stride,
    v0_stride,
    dk0_stride,
    dv0_stride,
    lse_stride,
    delta_stride,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    head = kv_head.to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    num_whole = tl.load(counts_ptr + 2 * block)
    num_part = tl.load(counts_ptr + 2 * block + 1)
    if num_whole + num_part == 0:
        return
    tiles_ptr += block * num_tiles
    first_key = (block * BN).to(tl.int32)
    key = first_key + tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = _tile(k0_ptr, first_key, kv_head, k0_stride, N, False, TMA, D, DP, BN)
    v = _tile(v0_ptr, first_key, kv_head, v0_stride, N, False, TMA, D, DP, BN)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    # Tiles that see part of the block come first. If this loop were pipelined, its buffers would make the next one spill.
    for it in tl.range(0, num_part * G, num_stages=1):
        start = tl.load(tiles_ptr + num_tiles - 1 - it // G) * BM
        q_head = kv_head * G + it % G
        row = start + m
        pos = tl.load(pos_ptr + row, mask=row < M, other=-1).to(tl.int32)
        ok = pos >= 0
        doc = tl.load(doc_ptr + row, mask=ok, other=0).to(tl.int32)
        q = tl.where(ok[:, None], _tile(q_ptr, start, q_head, q_stride, M, False, TMA, D, DP, BM), 0.0)
        dout = tl.where(ok[:, None], _tile(dout_ptr, start, q_head, dout_stride, M, False, TMA, D, DP, BM), 0.0)
        lse = tl.load(lse_ptr + q_head.to(tl.int64) * lse_stride + row, mask=ok, other=float("inf"))
        delta = tl.load(delta_ptr + q_head.to(tl.int64) * delta_stride + row, mask=ok, other=0.0)
        seen = (key[:, None] >= doc[None, :]) & (key[:, None] <= pos[None, :])
        dk, dv = _add_tile(dk, dv, k, v, q, dout, lse, delta, seen, scale_log2, True, PRECISION)
    for it in range(num_whole * G):
        start = tl.load(tiles_ptr + it // G) * BM
        q_head = kv_head * G + it % G
        q = _tile(q_ptr, start, q_head, q_stride, M, True, TMA, D, DP, BM)
        dout = _tile(dout_ptr, start, q_head, dout_stride, M, True, TMA, D, DP, BM)
        lse = tl.load(lse_ptr + q_head.to(tl.int64) * lse_stride + start + m)
        delta = tl.load(delta_ptr + q_head.to(tl.int64) * delta_stride + start + m)
        dk, dv = _add_tile(dk, dv, k, v, q, dout, lse, delta, True, scale_log2, False, PRECISION)

    _add_rows(dk0_ptr + head * D, key, dk0_stride, key < N, dk * scale, D, DP)
    _add_rows(dv0_ptr + head * D, key, dv0_stride, key < N, dv, D, DP)


def _config(q: Tensor, k0: Tensor) -> TTTAttentionConfig:
    arch = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    return ttt_attention_config(q.shape[2], q.shape[1] // k0.shape[1], q.dtype, arch)


def _constants(q: Tensor, k0: Tensor, tile: Tile) -> dict:
    dim = q.shape[2]
    return dict(
        G=q.shape[1] // k0.shape[1],
        D=dim,
        DP=max(16, triton.next_power_of_2(dim)),
        BM=tile.rows,
        BN=tile.keys,
        TMA=tile.tma,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _strides(*tensors: Tensor) -> list[int]:
    """The strides that the kernels need: one of a [M, Hq, D] tensor, two of [i, M, Hkv, D], and one of [Hq, M]."""
    return [stride for x in tensors for stride in x.stride()[: max(x.ndim - 2, 1)]]


def _described(
    x: Tensor,  # [n, heads, D]
    rows: int,
    tile: Tile,
) -> Tensor | TensorDescriptor:
    """What `_tile` reads x by: a descriptor for the copy engine, where the tile uses it, or x."""
    if not tile.tma:
        return x
    n, heads, dim = x.shape
    return TensorDescriptor(x, [n, heads * dim], [x.stride(0), 1], [rows, triton.next_power_of_2(dim)])


def _ttt_attention_fwd(
    q: Tensor,  # [M, Hq, D], rows may be strided, heads and D contiguous (all tensors here)
    k0: Tensor,  # [N, Hkv, D]
    v0: Tensor,  # [N, Hkv, D]
    k_diag: Tensor,  # [i, M', Hkv, D], M' >= M; i may be 0
    v_diag: Tensor,  # [i, M', Hkv, D]
    pos: Tensor,  # [M] int32 or int64
    doc_start: Tensor,  # [M] like pos
    scale: float,
    out: Tensor | None = None,  # [M, Hq, D] written
    lse: Tensor | None = None,  # [Hq, M] fp32, M contiguous, written
    config: TTTAttentionConfig | None = None,
    started: bool = False,  # whether out and lse hold the attention to keys before doc_start, to go on from
) -> tuple[Tensor, Tensor]:  # out, lse
    """One step's forward. It launches one kernel and allocates only what is not given."""
    m, heads, dim = q.shape
    out = torch.empty((m, heads, dim), dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty((heads, m), dtype=torch.float32, device=q.device) if lse is None else lse
    if m == 0:
        return out, lse
    tile = (config or _config(q, k0)).fwd
    constants = _constants(q, k0, tile)
    positions = tile.rows // constants["G"]
    _ttt_attention_fwd_kernel[(k0.shape[1], triton.cdiv(m, positions))](
        q,
        _described(k0, tile.keys, tile),
        _described(v0, tile.keys, tile),
        k_diag,
        v_diag,
        pos,
        doc_start,
        out,
        lse,
        scale * LOG2E,
        m,
        k0.shape[0],
        k_diag.shape[0],
        *_strides(q, k0, v0, k_diag, v_diag, out, lse),
        BR=positions,
        STARTED=started,
        **constants,
    )
    return out, lse


def _ttt_attention_bwd_q(
    dout: Tensor,  # [M, Hq, D]
    q: Tensor,  # [M, Hq, D]
    k0: Tensor,  # [N, Hkv, D]
    v0: Tensor,  # [N, Hkv, D]
    k_diag: Tensor,  # [i, M', Hkv, D]
    v_diag: Tensor,  # [i, M', Hkv, D]
    pos: Tensor,  # [M]
    doc_start: Tensor,  # [M]
    out: Tensor,  # [M, Hq, D] of the forward, all keys included
    lse: Tensor,  # [Hq, M] fp32, M contiguous
    scale: float,
    dk_diag: Tensor,  # [i, M', Hkv, D] fp32, added to
    dv_diag: Tensor,  # [i, M', Hkv, D] fp32, added to
    dq: Tensor | None = None,  # [M, Hq, D] written
    delta: Tensor | None = None,  # [Hq, M] fp32, M contiguous, written
    config: TTTAttentionConfig | None = None,
    dq_start: Tensor | None = None,  # [M, Hq, D] fp32, the part of dq that comes from keys before doc_start
) -> tuple[Tensor, Tensor]:  # dq, delta
    """One step's gradient of the queries and of its diagonal terms, and the delta `_ttt_attention_bwd_kv` needs."""
    m, heads, dim = q.shape
    dq = torch.empty((m, heads, dim), dtype=q.dtype, device=q.device) if dq is None else dq
    delta = torch.empty((heads, m), dtype=torch.float32, device=q.device) if delta is None else delta
    if m == 0:
        return dq, delta
    tile = (config or _config(q, k0)).bwd_q
    constants = _constants(q, k0, tile)
    positions = tile.rows // constants["G"]
    _ttt_attention_bwd_q_kernel[(k0.shape[1], triton.cdiv(m, positions))](
        dout,
        q,
        _described(k0, tile.keys, tile),
        _described(v0, tile.keys, tile),
        k_diag,
        v_diag,
        pos,
        doc_start,
        out,
        lse,
        dq,
        dq if dq_start is None else dq_start,
        delta,
        dk_diag,
        dv_diag,
        scale,
        scale * LOG2E,
        m,
        k0.shape[0],
        k_diag.shape[0],
        *_strides(dout, q, k0, v0, k_diag, v_diag, out, dq, dq if dq_start is None else dq_start),
        *_strides(dk_diag, dv_diag, lse, delta),
        BR=positions,
        STARTED=dq_start is not None,
        **constants,
    )
    return dq, delta


def _ttt_attention_index(
    pos: Tensor,  # [M]
    doc_start: Tensor,  # [M]
    num_keys: int,  # N
    tile: Tile,  # config.bwd_kv
) -> tuple[Tensor, Tensor]:  # tiles [key blocks, tiles] int32, counts [key blocks, 2] int32
    """Which query tiles see each key block. It is built on the device, and the host does not wait."""
    num_tiles = triton.cdiv(pos.shape[0], tile.rows)
    blocks = triton.cdiv(num_keys, tile.keys)
    bounds = torch.empty((4, num_tiles), dtype=torch.int32, device=pos.device)
    tiles = torch.empty((blocks, num_tiles), dtype=torch.int32, device=pos.device)
    counts = torch.empty((blocks, 2), dtype=torch.int32, device=pos.device)
    _tile_bounds_kernel[(num_tiles,)](pos, doc_start, bounds, pos.shape[0], num_tiles, BM=tile.rows)
    _tile_index_kernel[(blocks,)](bounds, tiles, counts, num_keys, num_tiles, BN=tile.keys, CHUNK=1024)
    return tiles, counts


def _ttt_attention_bwd_kv(
    dout: Tensor,  # [M, Hq, D]; M rows of one step, or the rows of several steps one after the other
    q: Tensor,  # [M, Hq, D]
    k0: Tensor,  # [N, Hkv, D]
    v0: Tensor,  # [N, Hkv, D]
    pos: Tensor,  # [M]
    doc_start: Tensor,  # [M]
    lse: Tensor,  # [Hq, M] fp32, M contiguous
    delta: Tensor,  # [Hq, M] fp32, M contiguous, of `_ttt_attention_bwd_q`
    scale: float,
    dk0: Tensor,  # [N, Hkv, D] fp32, added to
    dv0: Tensor,  # [N, Hkv, D] fp32, added to
    config: TTTAttentionConfig | None = None,
) -> None:
    """Adds the gradient of K^0 and V^0."""
    if q.shape[0] == 0 or k0.shape[0] == 0:
        return
    tile = (config or _config(q, k0)).bwd_kv
    tiles, counts = _ttt_attention_index(pos, doc_start, k0.shape[0], tile)
    _ttt_attention_bwd_kv_kernel[(k0.shape[1], tiles.shape[0])](
        _described(dout, tile.rows, tile),
        _described(q, tile.rows, tile),
        _described(k0, tile.keys, tile),
        _described(v0, tile.keys, tile),
        pos,
        doc_start,
        lse,
        delta,
        tiles,
        counts,
        dk0,
        dv0,
        scale,
        scale * LOG2E,
        q.shape[0],
        k0.shape[0],
        tiles.shape[1],
        *_strides(dout, q, k0, v0, dk0, dv0, lse, delta),
        **_constants(q, k0, tile),
    )


class _TTTAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k0, v0, k_diag, v_diag, pos, doc_start, scale):
        out, lse = _ttt_attention_fwd(q, k0, v0, k_diag, v_diag, pos, doc_start, scale)
        ctx.save_for_backward(q, k0, v0, k_diag, v_diag, pos, doc_start, out, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k0, v0, k_diag, v_diag, pos, doc_start, out, lse = ctx.saved_tensors
        dout = dout if _rows_fit(dout) else dout.contiguous()
        grads = [torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (k0, v0, k_diag, v_diag)]
        dq, delta = _ttt_attention_bwd_q(dout, q, k0, v0, k_diag, v_diag, pos, doc_start, out, lse, ctx.scale, *grads[2:])
        _ttt_attention_bwd_kv(dout, q, k0, v0, pos, doc_start, lse, delta, ctx.scale, *grads[:2])
        return dq, *(x.to(q.dtype) for x in grads), None, None, None


def ttt_attention(
    q: Tensor,  # [M, Hq, D] queries of one TTT step, rotated
    k0: Tensor,  # [N, Hkv, D] rotated, finite
    v0: Tensor,  # [N, Hkv, D] finite
    k_diag: Tensor | None,  # [i, M', Hkv, D], M' >= M; None at step 0
    v_diag: Tensor | None,  # [i, M', Hkv, D]
    pos: Tensor,  # [M] int32 or int64, row in k0; below 0 is padding
    doc_start: Tensor,  # [M] like pos, first row of the document
    scale: float | None = None,  # > 0; 1/sqrt(D) unless given
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # out [M, Hq, D], lse [Hq, M] fp32, natural log, no gradient
    """Differentiable attention of one step's queries. CPU tensors run `ttt_attention_ref`, CUDA tensors the kernels.

    Raises ValueError for shapes that do not fit together and, on CUDA, for a head dim (8 to 256, see HEAD_DIMS), dtype
    (bfloat16, float32), group (up to 32) or GPU (compute capability 8.0 and up) without a kernel. The values of pos and
    doc_start are not checked (that would wait for the GPU): 0 <= doc_start <= pos < N.
    """
    if k_diag is None or v_diag is None:
        if k_diag is not v_diag:
            raise ValueError("give both k_diag and v_diag, or neither")
        k_diag = v_diag = k0.new_empty((0, q.shape[0], *k0.shape[1:]))
    _check(q, k0, v0, k_diag, v_diag, pos, doc_start, scale)
    if not q.is_cuda:
        return ttt_attention_ref(q, k0, v0, k_diag, v_diag, pos, doc_start, scale, return_lse)
    _config(q, k0)
    rows = [x if _rows_fit(x) else x.contiguous() for x in (q, k0, v0, k_diag, v_diag)]
    out, lse = _TTTAttention.apply(*rows, pos, doc_start, q.shape[2] ** -0.5 if scale is None else scale)
    return (out, lse) if return_lse else out


def _rows_fit(x: Tensor) -> bool:
    """Whether the kernels and the copy engine read x in place: heads and D contiguous, rows at multiples of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(-3) * x.element_size() % 16 == 0
    return aligned and x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]


def _check(q, k0, v0, k_diag, v_diag, pos, doc_start, scale) -> None:
    check("q", q, ("M", "Hq", "D"))
    check("k0", k0, ("N", "Hkv", q.shape[2]), q.dtype, q.device)
    check("v0", v0, k0.shape, q.dtype, q.device)
    if q.shape[1] % k0.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k0 {k0.shape[1]}; Hq must be a multiple of Hkv")
    check("k_diag", k_diag, ("i", AtLeast(len(q)), *k0.shape[1:]), q.dtype, q.device)
    check("v_diag", v_diag, k_diag.shape, q.dtype, q.device)
    for name, x in {"pos": pos, "doc_start": doc_start}.items():
        check(name, x, (len(q),), (torch.int32, torch.int64), q.device)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    check_covered("ttt_attention", q=q)
