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
complete and is written, and once over the context, whose gradient is added to the fp32 buffers that all chunks share. Every
element has one writer in a launch, so two runs are bitwise equal.
Context keys that all rows see may be left to another kernel (`dense_attention`). ctx_start is then the first key that is
left, and the forward and dq go on from what that kernel gave.

Precision: operands are bf16; accumulation, softmax and lse are fp32. fp32 inputs multiply in fp32 (ieee). P and dS round to
the input dtype before their products. On a CPU everything is computed in the input dtype or float32, the wider of the two.
FLOPs per visible (row, key): 4 * D * Hq forward and 14 * D * Hq backward. Those are 7 products, because both kernels
compute S and dP; rates are quoted on the 5 that are needed. HBM: q and out are read once, K and V once per query tile,
mostly from L2.
Source: FlashAttention-2 (arXiv 2307.08691); DFlash (arXiv 2602.06036).

# R query rows, C blocks, B rows of a block, S = C * B, N packed tokens, Hq/Hkv heads, G = Hq/Hkv, D head dim
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastdraft.kernels.check import check, check_covered

MAX_BLOCK = 32

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
    check("out", out, q.shape, q.dtype, q.device, "rows")
    check("lse", lse, (q.shape[1], len(q)), stats, q.device, "rows")
    _block_attention_fwd_cpu(q, k_ctx, v_ctx, k_blk, v_blk, rows, scale, out, lse, started)
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
        check(name, x, q.shape, q.dtype, q.device, "rows")
    for name, x in {"lse": lse, "delta": delta}.items():
        check(name, x, (q.shape[1], len(q)), stats, q.device, "rows")
    check("dk_blk", dk_blk, k_blk.shape, None, q.device, "rows")
    check("dv_blk", dv_blk, k_blk.shape, dk_blk.dtype, q.device, "rows")
    check("dq_start", dq_start, q.shape, stats, q.device, "rows")
    _block_attention_bwd_q_cpu(
        dout, q, k_ctx, v_ctx, k_blk, v_blk, rows, out, lse, scale, dk_blk, dv_blk, dq, delta, dq_start
    )
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
) -> None:
    """Adds the gradients of the context's keys and values. Raises ValueError as `block_attention_fwd` does."""
    _check(q, k_ctx, v_ctx, k_ctx, v_ctx, rows, scale)
    stats = torch.promote_types(q.dtype, torch.float32)
    check("dout", dout, q.shape, q.dtype, q.device, "rows")
    for name, x in {"lse": lse, "delta": delta}.items():
        check(name, x, (q.shape[1], len(q)), stats, q.device, "rows")
    for name, x in {"dk_ctx": dk_ctx, "dv_ctx": dv_ctx}.items():
        check(name, x, k_ctx.shape, stats, q.device, "rows")
    _block_attention_bwd_kv_cpu(dout, q, k_ctx, v_ctx, rows, lse, delta, scale, dk_ctx, dv_ctx)


def _check(q, k_ctx, v_ctx, k_blk, v_blk, rows, scale) -> None:
    check("q", q, ("R", "Hq", "D"), layout="rows")
    check("k_ctx", k_ctx, ("N", "Hkv", q.shape[2]), q.dtype, q.device, "rows")
    check("v_ctx", v_ctx, k_ctx.shape, q.dtype, q.device, "rows")
    if q.shape[1] % k_ctx.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k_ctx {k_ctx.shape[1]}; Hq must be a multiple of Hkv")
    check("k_blk", k_blk, ("S", *k_ctx.shape[1:]), q.dtype, q.device, "rows")
    check("v_blk", v_blk, k_blk.shape, q.dtype, q.device, "rows")
    for field in fields(rows):
        check(field.name, getattr(rows, field.name), (len(q),), torch.int32, q.device)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    check_covered("block_attention", q=q)
