"""The draft's head and its loss where each of several processes has a part of the vocabulary's columns.

What is computed is what `linear_kl.py` and `teacher.py` compute, whose formulas and names are used here. A process has the
logits of its own columns, and they never leave it: what the processes tell each other are a few numbers of each row.

    teacher    lse_draft, lse_full, peak, argmax, its draft id    gathered    5 numbers a row
    student    max z, sum exp(z - max z), argmax z                gathered    3
               CE, alpha, S = sum c Q                             summed      3
    gradient   dx = dz W                                          summed      H

CE, alpha and S are sums over columns, so each process adds up its own once Q's normaliser is known. KL's gradient needs no
more than that normaliser and is written in the same pass; an LK loss reads the logits a third time.

Precision: as in linear_kl.py. Argmax goes through the gather as a floating-point number, exact up to 2^24 columns.
Bytes of the two or three row kernels: z is read twice and written once, t is read once; for the LK losses z a third time
and t a second. Every reduction has a fixed order.
Source: EAGLE-3 (arXiv 2503.01840); LK losses (arXiv 2602.23881).

# n rows, m teacher rows, H draft hidden, Vd columns of this process, P processes
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdraft.batch import Group, LossKind
from fastdraft.kernels.fp8 import Fp8Weight
from fastdraft.kernels.jit import jit, tl
from fastdraft.kernels.linear_kl import CPU_ROWS, KLConfig, KLRows, _check, _shares, kl_config
from fastdraft.kernels.matmul import add_outer, linear, linear_backward
from fastdraft.kernels.teacher import TeacherRows, lanes_add, lanes_reduce, lanes_start


class Peaks(NamedTuple):
    """What the softmax of each row needs, of a process's columns or of all."""

    top: Tensor  # [n] the largest logit
    total: Tensor  # [n] sum of exp(logit - top)
    best: Tensor  # [n] the lowest column of the largest logit, as a floating-point number


def join_peaks(
    of_each: Tensor,  # [P, n, 3] every process's `Peaks`, columns counted over all
) -> Peaks:
    """The peaks over all columns."""
    tops, totals, bests = of_each.unbind(-1)
    top = tops.amax(0)
    total = (totals * (tops - top).exp()).sum(0)
    best = torch.where(tops == top, bests, torch.inf).amin(0)
    return Peaks(top, total, best)


def join_teacher_(
    rows: TeacherRows,  # of `teacher` with a process's rows of the head; overwritten but for the logits
    first: int,  # draft id of the process's first column
    group: Group,
) -> TeacherRows:
    """Makes what `teacher` found in a process's columns of the target's head what it would have found in all of them."""
    stats = rows.peak.dtype
    draft_id = torch.where(rows.in_draft, rows.draft_argmax + first, -1)
    floats = torch.stack([rows.lse_draft, rows.lse_full, rows.peak], -1)
    ids = torch.stack([rows.argmax, draft_id], -1)
    own = torch.cat([floats.double(), ids.double()], -1)  # [m, 5]; an id is exact as a double
    lse_draft, lse_full, peaks, argmax, draft_argmax = group.gather(own).view(group.size, *own.shape).unbind(-1)
    winner = torch.where(peaks == peaks.amax(0), argmax, torch.inf).argmin(0, keepdim=True)
    rows.lse_draft.copy_(lse_draft.logsumexp(0).to(stats))
    rows.lse_full.copy_(lse_full.logsumexp(0).to(stats))
    rows.peak.copy_(peaks.amax(0).to(stats))
    rows.argmax.copy_(argmax.gather(0, winner)[0].long())
    rows.draft_argmax.copy_(draft_argmax.gather(0, winner)[0].long())
    return rows


@jit
def _row_peaks_kernel(
    z_ptr,  # [n, Vd] student logits
    w_ptr,  # [n] float32
    peaks_ptr,  # [n, 3] float32 written: top, total, best
    vocab,
    first,  # column of z[:, 0] among all
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * vocab
    peaks_ptr += row * 3
    lanes = tl.arange(0, TILE)
    if tl.load(w_ptr + row) == 0.0:
        tl.store(peaks_ptr, 0.0)
        tl.store(peaks_ptr + 1, 1.0)
        tl.store(peaks_ptr + 2, 0.0)
    else:
        peaks, sums, starts = lanes_start(TILE)
        for start in tl.range(0, vocab, TILE, num_stages=STAGES):
            cols = start + lanes
            z = tl.load(z_ptr + cols, mask=cols < vocab, other=-3e38, eviction_policy="evict_last").to(tl.float32)
            peaks, sums, starts = lanes_add(peaks, sums, starts, z, start)
        top, best, total = lanes_reduce(peaks, sums, starts, lanes, vocab)
        tl.store(peaks_ptr, top)
        tl.store(peaks_ptr + 1, total)
        tl.store(peaks_ptr + 2, (best + first).to(tl.float32))


@jit(do_not_specialize_on_alignment=["teacher_row_ptr"])  # It is a slice of a chunk's indices.
def _row_sums_kernel(
    z_ptr,  # [n, Vd] student logits; with GRAD KL's gradient after, and 0 in dead rows
    t_ptr,  # [m, Vd] teacher logits
    lse_draft_ptr,  # [m] of all columns
    lse_full_ptr,  # [m]
    teacher_row_ptr,  # [n] int64
    w_ptr,  # [n] float32
    top_ptr,  # [n] of all columns
    total_ptr,  # [n]
    sums_ptr,  # [n, 3] float32 written: CE, alpha, S
    vocab,
    KL: tl.constexpr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * vocab
    sums_ptr += row * 3
    lanes = tl.arange(0, TILE)
    w = tl.load(w_ptr + row)
    if w == 0.0:
        tl.store(sums_ptr, 0.0)
        tl.store(sums_ptr + 1, 0.0)
        tl.store(sums_ptr + 2, 0.0)
        if GRAD:
            for start in range(0, vocab, TILE):
                tl.store(z_ptr + start + lanes, tl.zeros([TILE], z_ptr.dtype.element_ty), mask=start + lanes < vocab)
    else:
        u = tl.load(teacher_row_ptr + row)
        t_ptr += u * vocab
        lse_draft = tl.load(lse_draft_ptr + u)
        outside = tl.exp(lse_draft - tl.load(lse_full_ptr + u))
        top = tl.load(top_ptr + row)
        total = tl.load(total_ptr + row)
        scale = 1.0 / total
        log_total = tl.log(total)
        ce_sums = tl.zeros([TILE], tl.float32)
        alpha_sums = tl.zeros([TILE], tl.float32)
        c_sums = tl.zeros([TILE], tl.float32)
        for start in tl.range(0, vocab, TILE, num_stages=STAGES):
            cols = start + lanes
            inside = cols < vocab
            z = tl.load(z_ptr + cols, mask=inside, other=float("-inf")).to(tl.float32) - top
            t = tl.load(t_ptr + cols, mask=inside, other=float("-inf")).to(tl.float32)
            q, p_draft, p = _shares(z, t, scale, lse_draft, outside)
            ce_sums -= p_draft * tl.where(inside, z - log_total, 0.0)
            alpha_sums += tl.minimum(p, q)
            c_sums += tl.where(p > q, q, tl.where(p == q, 0.5 * q, 0.0))
            if KL and GRAD:
                dz = (w * (q - p_draft)).to(z_ptr.dtype.element_ty)
                tl.store(z_ptr + cols, dz, mask=inside)
        tl.store(sums_ptr, tl.sum(ce_sums, 0))
        tl.store(sums_ptr + 1, tl.sum(alpha_sums, 0))
        tl.store(sums_ptr + 2, tl.sum(c_sums, 0))


@jit(do_not_specialize_on_alignment=["teacher_row_ptr"])
def _row_gradient_kernel(
    z_ptr,  # [n, Vd] student logits; an LK loss's gradient after
    t_ptr,  # [m, Vd] teacher logits
    lse_draft_ptr,  # [m] of all columns
    lse_full_ptr,  # [m]
    teacher_row_ptr,  # [n] int64
    w_ptr,  # [n] float32
    top_ptr,  # [n] of all columns
    total_ptr,  # [n]
    a_ptr,  # [n] float32 factor of Q - P~, w included
    b_ptr,  # [n] float32 factor of Q (c - S), w included
    s_ptr,  # [n] float32 S of all columns
    vocab,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * vocab
    lanes = tl.arange(0, TILE)
    if tl.load(w_ptr + row) != 0.0:
        u = tl.load(teacher_row_ptr + row)
        t_ptr += u * vocab
        lse_draft = tl.load(lse_draft_ptr + u)
        outside = tl.exp(lse_draft - tl.load(lse_full_ptr + u))
        top = tl.load(top_ptr + row)
        scale = 1.0 / tl.load(total_ptr + row)
        a = tl.load(a_ptr + row)
        b = tl.load(b_ptr + row)
        c_total = tl.load(s_ptr + row)
        for start in tl.range(0, vocab, TILE, num_stages=STAGES):
            cols = start + lanes
            inside = cols < vocab
            z = tl.load(z_ptr + cols, mask=inside, other=float("-inf")).to(tl.float32) - top
            t = tl.load(t_ptr + cols, mask=inside, other=float("-inf")).to(tl.float32)
            q, p_draft, p = _shares(z, t, scale, lse_draft, outside)
            c = tl.where(p > q, 1.0, tl.where(p == q, 0.5, 0.0))
            dz = a * (q - p_draft) + b * q * (c - c_total)
            tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=inside)


class _TritonRows:
    """The three passes over the logits as kernels."""

    def __init__(self, z: Tensor, teacher: TeacherRows, teacher_row: Tensor, w: Tensor, config: KLConfig | None = None):
        self.z, self.teacher, self.teacher_row, self.w = z, teacher, teacher_row, w
        config = config or kl_config(z.shape[1], z.element_size())
        self.options = {"TILE": config.tile, "STAGES": config.stages, "num_warps": config.num_warps}
        self.read = z, teacher.logits, teacher.lse_draft, teacher.lse_full, teacher_row, w

    def new(self) -> Tensor:  # [n, 3]
        return torch.empty(len(self.z), 3, dtype=torch.float32, device=self.z.device)

    def peaks(self, first: int) -> Tensor:  # [n, 3]
        out = self.new()
        _row_peaks_kernel[(len(out),)](self.z, self.w, out, self.z.shape[1], first, **self.options)
        return out

    def sums(self, peaks: Peaks, kl: bool, grad: bool) -> Tensor:  # [n, 3]
        out = self.new()
        launch = _row_sums_kernel[(len(out),)]
        launch(*self.read, peaks.top, peaks.total, out, self.z.shape[1], KL=kl, GRAD=grad, **self.options)
        return out

    def write_gradient(self, peaks: Peaks, a: Tensor, b: Tensor, s: Tensor) -> None:
        launch = _row_gradient_kernel[(len(a),)]
        launch(*self.read, peaks.top, peaks.total, a, b, s, self.z.shape[1], **self.options)


class _PlainRows:
    """The same passes in plain torch, for as many rows at a time as a CPU cache holds."""

    def __init__(self, z: Tensor, teacher: TeacherRows, teacher_row: Tensor, w: Tensor):
        self.z, self.teacher, self.teacher_row, self.w = z, teacher, teacher_row, w
        self.stats = teacher.lse_draft.dtype
        self.parts = w.nonzero()[:, 0].split(CPU_ROWS)

    def peaks(self, first: int) -> Tensor:  # [n, 3]
        out = self.z.new_tensor([0.0, 1.0, 0.0], dtype=self.stats).repeat(len(self.z), 1)
        for rows in self.parts:
            z = self.z[rows].to(self.stats)
            top = z.amax(-1)
            best = (z == top[:, None]).int().argmax(-1) + first  # The lowest of several, which torch.max does not promise.
            out[rows] = torch.stack([top, (z - top[:, None]).exp().sum(-1), best.to(self.stats)], -1)
        return out

    def shares(self, rows: Tensor, peaks: Peaks) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # log Q, Q, P~, P
        u = self.teacher_row[rows]
        t = self.teacher.logits[u].to(self.stats)
        log_q = self.z[rows].to(self.stats) - peaks.top[rows, None] - peaks.total[rows, None].log()
        p_draft, p = ((t - lse[u, None]).exp() for lse in (self.teacher.lse_draft, self.teacher.lse_full))
        return log_q, log_q.exp(), p_draft, p

    def sums(self, peaks: Peaks, kl: bool, grad: bool) -> Tensor:  # [n, 3]
        out = torch.zeros(len(self.z), 3, dtype=self.stats)
        if grad:
            self.z[self.w == 0] = 0
        for rows in self.parts:
            log_q, q, p_draft, p = self.shares(rows, peaks)
            c = (p > q).to(self.stats) + 0.5 * (p == q)
            out[rows] = torch.stack([-(p_draft * log_q).sum(-1), torch.minimum(p, q).sum(-1), (c * q).sum(-1)], -1)
            if kl and grad:
                self.z[rows] = (self.w[rows, None].to(self.stats) * (q - p_draft)).to(self.z.dtype)
        return out

    def write_gradient(self, peaks: Peaks, a: Tensor, b: Tensor, s: Tensor) -> None:
        for rows in self.parts:
            _, q, p_draft, p = self.shares(rows, peaks)
            c = (p > q).to(self.stats) + 0.5 * (p == q) - s[rows, None]
            self.z[rows] = (a[rows, None] * (q - p_draft) + b[rows, None] * q * c).to(self.z.dtype)


def split_kl_rows_(
    z: Tensor,  # [n, Vd] student logits of this process's columns, contiguous, bf16 or fp32 on a GPU
    teacher: TeacherRows,  # of `join_teacher_`, m rows; its logits are this process's columns
    teacher_row: Tensor,  # [n] int64, in 0..m-1, unchecked
    w: Tensor,  # [n] float32 gradient weight, 0 = dead row
    first: int,  # draft id of the first column
    group: Group,
    loss: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
    grad: bool = True,
    passes: type[_TritonRows | _PlainRows] | None = None,  # None: what the device has
) -> KLRows:
    """`kl_rows_` of all columns. With `grad`, z is overwritten by its columns of the gradient of sum w * loss.

    All of the group call it with the same rows. Raises ValueError for what does not fit.
    """
    _check(z, teacher, teacher_row, w, loss)
    run = (passes or (_TritonRows if z.is_cuda else _PlainRows))(z, teacher, teacher_row, w)
    own = run.peaks(first)
    peaks = join_peaks(group.gather(own).view(group.size, *own.shape))
    ce, alpha, s = group.sum_(run.sums(peaks, loss == "kl", grad)).unbind(-1)

    # From here on everything is a number a row. A row that is dead has sums of 0, and shall have a loss of 0.
    tiny = torch.finfo(alpha.dtype).tiny
    live = w != 0
    mix = lk_scale * torch.exp(-lk_decay * alpha)
    if loss == "kl":
        value = ce
    elif loss == "lk_alpha":
        # Below the smallest normal number the loss is constant, so its derivative there is 0.
        a, b = torch.zeros_like(alpha), torch.where(alpha < tiny, 0, -1 / alpha.clamp_min(tiny))
        value = -alpha.clamp_min(tiny).log()
    else:
        a, b = mix, mix - 1
        value = mix * ce + (1 - mix) * (1 - alpha)
    if grad and loss != "kl":
        run.write_gradient(peaks, (w * a).to(alpha.dtype), (w * b).to(alpha.dtype), s.contiguous())
    hit = (peaks.best == teacher.draft_argmax[torch.where(live, teacher_row, 0)]) & live
    return KLRows(value.where(live, 0), alpha.where(live, 0), hit)


@torch.no_grad()
def split_kl_grad(
    x: Tensor,  # [n, H] normed draft states
    weight: Tensor | Fp8Weight,  # [Vd, H] this process's rows of lm_head, of x's dtype
    teacher: TeacherRows,
    teacher_row: Tensor,  # [n] int64
    w: Tensor,  # [n] float32
    dx: Tensor | None,  # [n, H], overwritten by the gradient of sum w * loss; None: no gradients
    dweight: Tensor | None,  # [Vd, H] float32 (float64 for float64 x), the gradient is added; None with dx None
    logits: Tensor,  # [n, Vd] of x's dtype, overwritten
    first: int,  # draft id of the first column
    group: Group,
    loss: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
) -> KLRows:
    """`linear_kl_grad` where each of the group has a part of the columns; all of it call it with the same x.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    linear(x, weight, logits)
    rows = split_kl_rows_(logits, teacher, teacher_row, w, first, group, loss, lk_scale, lk_decay, dx is not None)
    if dx is not None:
        linear_backward(logits, weight, dx)
        add_outer(dweight, logits, x)
        group.sum_(dx)
    return rows
