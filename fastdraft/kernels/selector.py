"""A selector among the tokens that logits rank highest, given the token before: choice, cross entropy and gradient.

Row r has logits z over V tokens, a state's projection h, the token before p and the label y. C are the K tokens with the
largest z. Two tables hold a vector of R numbers for each token, A for what stands before and B for what may follow:

    q = A[p] * h        s_c = z_c + q . B[c]
    served    S = softmax(s) over C, choice = argmax s over C
    trained   C' = C with its last member replaced by y where y is not in C;  CE = -log softmax(s over C')_y
    with weight w and d_c = w (softmax(s over C')_c - [c = y]):
              dz_c += d_c      dB[c] += d_c q      u = sum_c d_c B[c]      dh = A[p] * u      dA[p] += h * u

`candidates` finds C before a loss makes z its own gradient; `select_rows_` adds dz_c to that gradient. The gradients of
the tables wait for `add_rows_`, because a weight may be known only when all losses are (D-PACE). K + 1 places a row are
kept: C in descending order of z, and y last, whether it is in C or not. Where several logits equal the smallest of C, it is
not said which of them are in C, as with torch.topk.

Precision: z, h, A and B are bf16 or float32, everything inside a row is float32. Nothing is added up atomically, because
`add_rows_` sorts, so two runs are bitwise equal. Bytes: `candidates` reads z once; the others move some K R numbers a row.
The K largest are found by lanes: lane j has the columns j, j + TILE, ..., of which one pass keeps the largest. No column of
a lane outside the K lanes with the largest maxima can be above all of these, so only K lanes are read again.
Source: DFlash2 (its blog post of August 2026, and its models in the serving engines).

# n rows, V vocabulary, K candidates, M = K + 1 places, R rank of the tables
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastdraft.kernels.check import check, check_covered
from fastdraft.kernels.jit import jit, launch, tl, triton
from fastdraft.kernels.teacher import TeacherRows


class Candidates(NamedTuple):
    ids: Tensor  # [n, M] int64, the K tokens with the largest logits, and the label
    logits: Tensor  # [n, M] their z, float32 (float64 for float64 z)


class SelectedRows(NamedTuple):
    """Results of each row without its weight."""

    loss: Tensor  # [n] float32 (float64): CE
    choice: Tensor  # [n] int64, the token that is served
    acceptance: Tensor  # [n] sum over C of min(P, S) with a teacher's P; 0 without one


class SelectorGrads(NamedTuple):
    """What the tables' gradients are made of, with the weights in it."""

    place: Tensor  # [n, M] d_c, 0 at places that are not trained
    query: Tensor  # [n, R] q
    pull: Tensor  # [n, R] h * u
    state: Tensor  # [n, R] dh, of h's dtype


def candidates_ref(
    z: Tensor,  # [n, V]
    label: Tensor,  # [n] int64
    k: int,
) -> Candidates:
    """The specification of `candidates`."""
    ids = torch.cat([z.topk(k, -1).indices, label[:, None]], 1)
    return Candidates(ids, z.gather(1, ids).to(torch.promote_types(z.dtype, torch.float32)))


def selected_ref(
    found: Candidates,
    h: Tensor,  # [n, R]
    before: Tensor,  # [n] int64
    predecessor: Tensor,  # [V, R]
    successor: Tensor,  # [V, R]
    teacher: TeacherRows | None = None,
    teacher_row: Tensor | None = None,  # [n] int64
) -> SelectedRows:  # its loss carries the autograd graph
    """The specification of `select_rows_`, any dtype; the gradient of sum w * loss is autograd's."""
    stats, k = found.logits.dtype, found.ids.shape[1] - 1
    q = predecessor[before].to(stats) * h.to(stats)
    s = found.logits + (successor[found.ids].to(stats) @ q[..., None])[..., 0]  # [n, M]
    inside = (found.ids[:, :k] == found.ids[:, k:]).any(1)
    loss = s.masked_fill(~_trained(inside, k), -torch.inf).logsumexp(-1) - s[:, k]
    served = s[:, :k].detach()
    choice = found.ids.gather(1, served.argmax(-1, keepdim=True))[:, 0]
    acceptance = torch.zeros_like(loss.detach())
    if teacher is not None:
        theirs = teacher.logits[teacher_row[:, None], found.ids[:, :k]].to(stats) - teacher.lse_full[teacher_row, None]
        acceptance = theirs.exp().minimum(served.softmax(-1)).sum(-1)
    return SelectedRows(loss, choice, acceptance)


def _trained(
    inside: Tensor,  # [n] bool, the label is a candidate
    k: int,
) -> Tensor:  # [n, M] bool, the places of C': the label's always is the last one
    """Where the label is a candidate its own place counts for it, so the last is left out. `s` is the same at both."""
    place = torch.arange(k + 1, device=inside.device)
    return (place < k - 1) | ((place == k - 1) & inside[:, None]) | ((place == k) & ~inside[:, None])


@dataclass(frozen=True)
class SelectorConfig:
    tile: int  # lanes of the search for candidates
    search_warps: int
    row_warps: int  # of a row of the selector
    entries: int  # that `add_rows_` adds at a time


@cache
def selector_config(vocab: int) -> SelectorConfig:
    """Lanes as many as the loss's row kernel has; a lane of 152k tokens then has 38 of them."""
    tile, warps = (4096, 16) if vocab > 16384 else (1024, 4)
    return SelectorConfig(tile, warps, row_warps=4, entries=16)


@jit
def _packed(x, place):
    """One int64 that orders by x, then by the lower place; `_place` gives the place back. NaN stands at either end."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@jit
def _place(packed):
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@jit(do_not_specialize_on_alignment=["label_ptr", "ids_ptr", "logits_ptr"])
def _candidates_kernel(
    z_ptr,  # [n, V]
    label_ptr,  # [n] int64
    ids_ptr,  # [n, M] int64
    logits_ptr,  # [n, M] float32
    vocab,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    SPAN: tl.constexpr,  # columns of a lane, padded
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * vocab
    lanes = tl.arange(0, TILE)
    peaks = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, vocab, TILE):
        cols = start + lanes
        z = tl.load(z_ptr + cols, mask=cols < vocab, other=float("-inf"), eviction_policy="evict_last")
        peaks = tl.maximum(peaks, z.to(tl.float32))

    # The K lanes with the largest maxima, one after the other; columns beyond the vocabulary make lanes that come last.
    LEAST: tl.constexpr = -(2**63)
    places = tl.arange(0, K_PADDED)
    chosen = tl.zeros([K_PADDED], tl.int32)
    keys = tl.where(lanes < vocab, _packed(peaks, lanes), LEAST)
    for k in range(K):
        top = tl.max(keys, 0)
        chosen = tl.where(places == k, _place(top).to(tl.int32), chosen)
        keys = tl.where(keys == top, LEAST, keys)

    # Their columns, and the K largest of these.
    cols = chosen[:, None] + TILE * tl.arange(0, SPAN)[None, :]
    inside = (places < K)[:, None] & (cols < vocab)
    z = tl.load(z_ptr + cols, mask=inside, other=float("-inf")).to(tl.float32)
    left = tl.where(inside, _packed(z, cols), LEAST)
    ids = tl.zeros([K_PADDED], tl.int64)
    for k in range(K):
        top = tl.max(tl.max(left, 1), 0)
        ids = tl.where(places == k, _place(top), ids)
        left = tl.where(left == top, LEAST, left)
    ids = tl.where(places == K, tl.load(label_ptr + row), ids)
    kept = places <= K
    tl.store(ids_ptr + row * (K + 1) + places, ids, mask=kept)
    tl.store(logits_ptr + row * (K + 1) + places, tl.load(z_ptr + ids, mask=kept, other=0.0).to(tl.float32), mask=kept)


@jit(do_not_specialize_on_alignment=["before_ptr", "w_ptr", "teacher_row_ptr", "ids_ptr", "logits_ptr", "place_ptr"])
def _select_rows_kernel(
    dz_ptr,  # [n, V] gradient of another loss, added to
    ids_ptr,  # [n, M]
    logits_ptr,  # [n, M]
    h_ptr,  # [n, R]
    before_ptr,  # [n]
    predecessor_ptr,  # [V, R]
    successor_ptr,  # [V, R]
    w_ptr,  # [n] float32
    teacher_ptr,  # [m, V] its logits
    lse_ptr,  # [m] float32
    teacher_row_ptr,  # [n]
    loss_ptr,  # [n]
    choice_ptr,  # [n] int64
    acceptance_ptr,  # [n]
    place_ptr,  # [n, M] float32
    query_ptr,  # [n, R] float32
    pull_ptr,  # [n, R] float32
    state_ptr,  # [n, R]
    vocab,
    h_stride,
    teacher_stride,
    K: tl.constexpr,
    M_PADDED: tl.constexpr,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places, cols = tl.arange(0, M_PADDED), tl.arange(0, R_PADDED)
    kept, ranked = places <= K, cols < R
    ids = tl.load(ids_ptr + row * (K + 1) + places, mask=kept, other=-1)
    label = tl.max(tl.where(places == K, ids, -1), 0)
    z = tl.load(logits_ptr + row * (K + 1) + places, mask=kept, other=0.0)
    h = tl.load(h_ptr + row * h_stride + cols, mask=ranked, other=0.0).to(tl.float32)
    before = tl.load(before_ptr + row)
    a = tl.load(predecessor_ptr + before * R + cols, mask=ranked, other=0.0).to(tl.float32)
    query = a * h
    table = successor_ptr + ids[:, None] * R + cols[None, :]
    b = tl.load(table, mask=kept[:, None] & ranked[None, :], other=0.0).to(tl.float32)
    s = z + tl.sum(b * query[None, :], 1)

    # What is served: the candidates alone.
    served = places < K
    top = tl.max(tl.where(served, s, float("-inf")), 0)
    first = tl.min(tl.where(served & (s == top), places, M_PADDED), 0)
    tl.store(choice_ptr + row, tl.max(tl.where(places == first, ids, 0), 0))
    acceptance = 0.0
    if HAS_TEACHER:
        share = tl.where(served, tl.exp(s - top), 0.0)
        share = share / tl.sum(share, 0)
        theirs = tl.load(teacher_row_ptr + row)
        logits = tl.load(teacher_ptr + theirs * teacher_stride + ids, mask=served, other=0.0).to(tl.float32)
        p = tl.exp(logits - tl.load(lse_ptr + theirs))
        acceptance = tl.sum(tl.where(served, tl.minimum(p, share), 0.0), 0)
    tl.store(acceptance_ptr + row, acceptance)

    # What is trained: the label takes the last candidate's place where it is none of them.
    found = tl.max(tl.where(served & (ids == label), 1, 0), 0)
    trained = (places < K - 1) | ((places == K - 1) & (found > 0)) | ((places == K) & (found == 0))
    peak = tl.max(tl.where(trained, s, float("-inf")), 0)
    e = tl.where(trained, tl.exp(s - peak), 0.0)
    total = tl.sum(e, 0)
    s_label = tl.sum(tl.where(places == K, s, 0.0), 0)
    tl.store(loss_ptr + row, tl.log(total) - (s_label - peak))
    if GRAD:
        w = tl.load(w_ptr + row)
        d = w * (e / total - tl.where(trained & (ids == label), 1.0, 0.0))
        tl.store(place_ptr + row * (K + 1) + places, d, mask=kept)
        at = dz_ptr + row * vocab + ids
        old = tl.load(at, mask=trained, other=0.0).to(tl.float32)
        tl.store(at, (old + d).to(dz_ptr.dtype.element_ty), mask=trained)
        u = tl.sum(d[:, None] * b, 0)
        tl.store(query_ptr + row * R + cols, query, mask=ranked)
        tl.store(pull_ptr + row * R + cols, h * u, mask=ranked)
        tl.store(state_ptr + row * R + cols, (a * u).to(state_ptr.dtype.element_ty), mask=ranked)


@jit(do_not_specialize=["count"])
def _add_rows_kernel(
    id_ptr,  # [count] int64 ascending
    order_ptr,  # [count] int64 entry of each, in the order that they are added
    weight_ptr,  # [count] float32 of an entry
    rows_ptr,  # [n, R] float32; entry e reads row e // EACH
    out_ptr,  # [V, R] float32
    count,
    EACH: tl.constexpr,  # entries of a row
    HAS_WEIGHT: tl.constexpr,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    # The program of the first entry of an id adds up all of that id; the others have nothing to do.
    begin = tl.program_id(0)
    own = tl.load(id_ptr + begin)
    is_first = begin == 0
    if begin > 0:
        is_first = tl.load(id_ptr + begin - 1) != own
    if is_first:
        lanes, cols = tl.arange(0, ENTRIES), tl.arange(0, R_PADDED)
        ranked = cols < R
        total = tl.zeros([R_PADDED], tl.float32)
        at = begin
        more = True
        while more:
            place = at + lanes
            same = tl.load(id_ptr + place, mask=place < count, other=-1) == own
            entry = tl.load(order_ptr + place, mask=same, other=0)
            source = rows_ptr + (entry // EACH)[:, None] * R + cols[None, :]
            rows = tl.load(source, mask=same[:, None] & ranked[None, :], other=0.0)
            if HAS_WEIGHT:
                rows *= tl.load(weight_ptr + entry, mask=same, other=0.0)[:, None]
            total += tl.sum(rows, 0)
            at += ENTRIES
            more = tl.sum(same.to(tl.int32), 0) == ENTRIES
        out = out_ptr + own * R + cols
        tl.store(out, tl.load(out, mask=ranked, other=0.0) + total, mask=ranked)


def _candidates(
    z: Tensor,  # [n, V]
    label: Tensor,  # [n]
    out: Candidates,
    config: SelectorConfig,
) -> None:
    (n, vocab), k = z.shape, out.ids.shape[1] - 1
    span = triton.next_power_of_2(triton.cdiv(vocab, config.tile))
    padded = triton.next_power_of_2(k + 1)
    _candidates_kernel[(n,)](
        z, label, *out, vocab, K=k, K_PADDED=padded, SPAN=span, TILE=config.tile, num_warps=config.search_warps
    )


def _select_rows(
    dz: Tensor | None,  # [n, V]
    found: Candidates,
    h: Tensor,  # [n, R]
    before: Tensor,  # [n]
    predecessor: Tensor,  # [V, R]
    successor: Tensor,  # [V, R]
    w: Tensor | None,  # [n]
    teacher: TeacherRows | None,
    teacher_row: Tensor | None,  # [n]
    rows: SelectedRows,
    grads: SelectorGrads | None,
    config: SelectorConfig,
) -> None:
    places, (n, rank) = found.ids.shape[1], h.shape
    known, lse = (None, None) if teacher is None else (teacher.logits, teacher.lse_full)
    _select_rows_kernel[(n,)](
        dz,
        *found,
        h,
        before,
        predecessor,
        successor,
        w,
        known,
        lse,
        teacher_row,
        *rows,
        *((None,) * 4 if grads is None else grads),
        0 if dz is None else dz.shape[1],
        h.stride(0),
        0 if known is None else known.stride(0),
        K=places - 1,
        M_PADDED=triton.next_power_of_2(places),
        R=rank,
        R_PADDED=triton.next_power_of_2(rank),
        GRAD=grads is not None,
        HAS_TEACHER=teacher is not None,
        num_warps=config.row_warps,
    )


def _add_rows(
    ids: Tensor,  # [count] int64 ascending
    order: Tensor,  # [count] int64
    weight: Tensor | None,  # [count]
    rows: Tensor,  # [n, R]
    each: int,
    out: Tensor,  # [V, R]
    config: SelectorConfig,
) -> None:
    rank = rows.shape[1]
    _add_rows_kernel[(len(ids),)](
        ids,
        order,
        weight,
        rows,
        out,
        len(ids),
        EACH=each,
        HAS_WEIGHT=weight is not None,
        R=rank,
        R_PADDED=triton.next_power_of_2(rank),
        ENTRIES=config.entries,
        num_warps=config.row_warps,
    )


@torch.no_grad()
def candidates(
    z: Tensor,  # [n, V] logits, contiguous, bf16 or fp32 on a GPU, any float dtype on the CPU
    label: Tensor,  # [n] int64 in 0..V-1; unchecked
    out: Candidates,  # of [n, K + 1], written; 1 <= K <= V
) -> None:
    """Writes each row's K candidates and its label, with their logits. Raises ValueError for what does not fit."""
    check("z", z, ("n", "V"), layout="whole")
    n, vocab = z.shape
    check("label", label, (n,), torch.int64, z.device)
    check("ids", out.ids, (n, "K + 1"), torch.int64, z.device, "whole")
    check("logits", out.logits, out.ids.shape, torch.promote_types(z.dtype, torch.float32), z.device, "whole")
    check_covered("selector", z=z)
    k = out.ids.shape[1] - 1
    if not 1 <= k <= vocab:
        raise ValueError(f"{k} candidates of {vocab} tokens were asked for; it must be 1..{vocab}")
    if z.is_cuda:
        _candidates(z, label, out, selector_config(vocab))
        return
    for place, found in zip(out, candidates_ref(z, label, k), strict=True):
        place.copy_(found)


@torch.no_grad()
def select_rows_(
    found: Candidates,  # of [n, M]
    h: Tensor,  # [n, R] projected states, bf16 or fp32 on a GPU, contiguous rows
    before: Tensor,  # [n] int64 token before each row's; unchecked
    predecessor: Tensor,  # [V, R] A, of h's dtype
    successor: Tensor,  # [V, R] B, of h's dtype
    w: Tensor | None = None,  # [n] float32 (float64) weight of each row's gradient; with grads
    dz: Tensor | None = None,  # [n, V] gradient of another loss of the same logits, to which d_c is added; with grads
    grads: SelectorGrads | None = None,  # written; None: no gradient
    teacher: TeacherRows | None = None,  # over all V tokens, for the acceptance
    teacher_row: Tensor | None = None,  # [n] int64 row of the teacher
) -> SelectedRows:
    """Loss, choice and acceptance of every row. Raises ValueError for shapes, dtypes or layouts that do not fit."""
    check("h", h, ("n", "R"), layout="rows")
    (n, rank), stats = h.shape, torch.promote_types(h.dtype, torch.float32)
    check("ids", found.ids, (n, "K + 1"), torch.int64, h.device, "whole")
    check("logits", found.logits, found.ids.shape, stats, h.device, "whole")
    check("before", before, (n,), torch.int64, h.device)
    check("predecessor", predecessor, ("V", rank), h.dtype, h.device, "whole")
    check("successor", successor, predecessor.shape, h.dtype, h.device, "whole")
    if (w is None) != (grads is None) or (dz is None) != (grads is None) or (teacher is None) != (teacher_row is None):
        raise ValueError("give w, dz and grads together, and teacher and teacher_row together")
    check("w", w, (n,), stats, h.device)
    check("dz", dz, (n, predecessor.shape[0]), None, h.device, "whole")
    check("teacher_row", teacher_row, (n,), torch.int64, h.device)
    if grads is not None:
        check("place", grads.place, found.ids.shape, stats, h.device, "whole")
        for name in ("query", "pull", "state"):
            check(name, getattr(grads, name), h.shape, h.dtype if name == "state" else stats, h.device, "whole")
    check_covered("selector", h=h, dz=dz)
    if h.is_cuda:
        rows = SelectedRows(
            *(torch.empty(n, dtype=dtype, device=h.device) for dtype in (stats, torch.int64, stats)),
        )
        config = selector_config(predecessor.shape[0])
        _select_rows(dz, found, h, before, predecessor, successor, w, teacher, teacher_row, rows, grads, config)
        return rows
    rows = selected_ref(found, h, before, predecessor, successor, teacher, teacher_row)
    if grads is not None:
        _gradients(found, h, before, predecessor, successor, w, dz, grads)
    return rows


def _gradients(found, h, before, predecessor, successor, w, dz, grads) -> None:
    """The formulas of the gradient in plain torch."""
    stats, k = found.logits.dtype, found.ids.shape[1] - 1
    a, b, wide = predecessor[before].to(stats), successor[found.ids].to(stats), h.to(stats)
    query = a * wide
    s = found.logits + (b @ query[..., None])[..., 0]
    inside = (found.ids[:, :k] == found.ids[:, k:]).any(1)
    trained = _trained(inside, k)
    share = s.masked_fill(~trained, -torch.inf).softmax(-1)
    d = w[:, None] * (share - (trained & (found.ids == found.ids[:, k:])).to(stats))
    u = (d[:, None] @ b)[:, 0]
    for place, value in zip(grads, (d, query, wide * u, a * u), strict=True):
        place.copy_(value)
    # The last place adds 0 where the label is a candidate too.
    dz.scatter_add_(1, found.ids, d.to(dz.dtype))


@torch.no_grad()
def add_rows_(
    out: Tensor,  # [V, R] float32 (float64) added to
    ids: Tensor,  # [n] or [n, M] int64 row of `out` that each entry is added to; unchecked
    rows: Tensor,  # [n, R] of out's dtype; every entry of a row adds it
    weight: Tensor | None = None,  # of ids' shape, what the row is multiplied by for each entry
) -> None:
    """out[ids[j]] += weight[j] * rows[j], each id's entries in their order. Raises ValueError for what does not fit."""
    check("out", out, ("V", "R"), layout="whole")
    check("rows", rows, (ids.shape[0], out.shape[1]), out.dtype, out.device, "whole")
    check("ids", ids, ids.shape, torch.int64, out.device, "whole")
    check("weight", weight, ids.shape, out.dtype, out.device, "whole")
    each = ids[0].numel() if len(ids) else 1
    flat = ids.flatten()
    if not len(flat):
        return
    if out.is_cuda:
        ordered, order = flat.sort(stable=True)
        _add_rows(ordered, order, weight, rows, each, out, selector_config(len(out)))
        return
    wide = rows.repeat_interleave(each, 0)
    launch(out.index_add_, 0, flat, wide if weight is None else wide * weight.flatten()[:, None])
