"""The draft's head and its loss against the teacher, forward and gradient, over the rows that one buffer of logits holds.

Row r has student logits z = W x_r over the Vd draft-vocabulary tokens, teacher row u = teacher_row[r], weight w_r:

    Q = softmax(z)     P~ = exp(t_u - lse_draft_u)     P = exp(t_u - lse_full_u)
    CE = -sum P~ log Q     alpha = sum min(P, Q)     hit = [argmax z = draft_argmax_u]
    kl: CE     lk_alpha: -log alpha     lk_lambda: l CE + (1 - l)(1 - alpha),  l = lk_scale exp(-lk_decay alpha), constant

    w dloss/dz = w (a (Q - P~) + b Q (c - S)),   c = [P > Q] + [P = Q] / 2,   S = sum c Q
    kl: a = 1, b = 0     lk_alpha: a = 0, b = -1/alpha     lk_lambda: a = l, b = l - 1

c is the derivative of min(P, Q) in Q as torch.minimum's autograd takes it, ties shared. The gradient overwrites z. A row
with w = 0 is dead: its gradient and results are exactly 0 and neither logits are read, so NaN there stays there.

Precision: logits bf16 or float32; everything inside a row float32. Bytes of the row kernel: z and t read once, z written,
3 * Vd * itemsize a row; z's second read (for the LK losses also a third, and a second of t) hits L2 while rows fit there.
csrc/linear_kl_rows.cu keeps a row in shared memory instead; `rows_in_cuda` says which rows it takes.
Every reduction has a fixed order: two runs of one kernel are bitwise equal.
Source: EAGLE-3 (arXiv 2503.01840); LK losses (arXiv 2602.23881).

# n rows, m teacher rows, H draft hidden, Vd draft vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from fastdraft.batch import LossKind
from fastdraft.kernels import cuda
from fastdraft.kernels.fp8 import Fp8Weight
from fastdraft.kernels.jit import jit, nothing_runs, tl, triton
from fastdraft.kernels.matmul import add_outer, linear, linear_backward
from fastdraft.kernels.teacher import TeacherRows

CPU_ROWS = 32  # rows of Vd float32 that stay in a core's cache: 1 MB at Vd 8192


class KLRows(NamedTuple):
    """Results of each row, 0 where the row is dead. No step weight, no normaliser."""

    loss: Tensor  # [n] float32 (float64 for float64 logits)
    acceptance: Tensor  # [n] the same
    hit: Tensor  # [n] bool


def row_losses_ref(
    z: Tensor,  # [n, Vd] student logits
    teacher: TeacherRows,  # n rows
    loss: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
) -> KLRows:
    """The specification of a live row in plain torch, any dtype, in at least float32. Only the loss carries a gradient."""
    if loss not in get_args(LossKind):
        raise ValueError(f"loss {loss!r} is not one of {', '.join(get_args(LossKind))}")
    stats = torch.promote_types(z.dtype, teacher.lse_draft.dtype)
    z, t = z.to(stats), teacher.logits.to(stats)
    log_q = z.log_softmax(-1)
    alpha = torch.minimum((t - teacher.lse_full[:, None]).exp(), log_q.exp()).sum(-1)
    if loss == "lk_alpha":
        value = -alpha.clamp_min(torch.finfo(stats).tiny).log()
    else:
        value = -((t - teacher.lse_draft[:, None]).exp() * log_q).sum(-1)
        if loss == "lk_lambda":
            mix = lk_scale * torch.exp(-lk_decay * alpha.detach())
            value = mix * value + (1 - mix) * (1 - alpha)
    return KLRows(value, alpha.detach(), z.argmax(-1) == teacher.draft_argmax)


def kl_rows_ref(
    z: Tensor,  # [n, Vd] student logits
    teacher: TeacherRows,  # m rows
    teacher_row: Tensor,  # [n] int64
    w: Tensor,  # [n] gradient weight, 0 = dead
    loss: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
) -> tuple[KLRows, Tensor]:  # rows, gradient of sum w * loss [n, Vd] in z's dtype
    """The specification of the row kernel: `row_losses_ref` of the live rows, its gradient by autograd."""
    live = w != 0
    rows = KLRows(
        *(torch.zeros(len(z), dtype=dtype, device=z.device) for dtype in (teacher.lse_draft.dtype,) * 2 + (torch.bool,))
    )
    dz = torch.zeros_like(z)
    with torch.enable_grad():
        s = z[live].to(teacher.lse_draft.dtype).requires_grad_()
        found = row_losses_ref(s, teacher.at(teacher_row[live]), loss, lk_scale, lk_decay)
        dz[live] = torch.autograd.grad((found.loss * w[live]).sum(), s)[0].to(dz.dtype)
    for out, x in zip(rows, found, strict=True):
        out[live] = x.detach()
    return rows, dz


@dataclass(frozen=True)
class KLConfig:
    tile: int  # columns the row kernel holds at a time
    num_warps: int
    stages: int  # tiles in flight


@cache
def kl_config(
    vocab: int,
    itemsize: int,
) -> KLConfig:
    """Eight bf16 a thread, wide tiles for long rows, narrow for short: linear_kl/rows in bench/results/linear_kl.jsonl."""
    tile, num_warps = (4096, 16) if vocab > 16384 else (1024, 4)
    return KLConfig(tile * 2 // itemsize, num_warps, stages=3)


@jit(do_not_specialize_on_alignment=["teacher_row_ptr"])  # a slice of a chunk's indices
def _kl_rows_kernel(
    z_ptr,  # [n, Vd] student logits; their gradient after
    t_ptr,  # [m, Vd] teacher logits
    lse_draft_ptr,  # [m]
    lse_full_ptr,  # [m]
    draft_argmax_ptr,  # [m] int64
    teacher_row_ptr,  # [n] int64
    w_ptr,  # [n] float32
    loss_ptr,  # [n]
    alpha_ptr,  # [n]
    hit_ptr,  # [n] bool
    vocab,
    lk_scale,
    lk_decay,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,  # write the gradient
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * vocab
    lanes = tl.arange(0, TILE)
    w = tl.load(w_ptr + row)
    if w == 0.0:
        tl.store(loss_ptr + row, 0.0)
        tl.store(alpha_ptr + row, 0.0)
        tl.store(hit_ptr + row, False)
        if GRAD:
            for start in range(0, vocab, TILE):
                tl.store(z_ptr + start + lanes, tl.zeros([TILE], z_ptr.dtype.element_ty), mask=start + lanes < vocab)
    else:
        u = tl.load(teacher_row_ptr + row)
        t_ptr += u * vocab
        lse_draft = tl.load(lse_draft_ptr + u)
        outside = tl.exp(lse_draft - tl.load(lse_full_ptr + u))  # P = P~ * outside

        # Each lane keeps its own running max and sum: no reduction until the row is read, and one exponential an element,
        # since of exp(old - new) and exp(z - new) one is always 1.
        peaks = tl.full([TILE], -3e38, tl.float32)  # finite: a lane that never sees a column must not make inf - inf
        sums = tl.zeros([TILE], tl.float32)
        starts = tl.zeros([TILE], tl.int32)
        for start in tl.range(0, vocab, TILE, num_stages=STAGES):
            cols = start + lanes
            z = tl.load(z_ptr + cols, mask=cols < vocab, other=-3e38, eviction_policy="evict_last").to(tl.float32)
            higher = z > peaks
            e = tl.exp(-tl.abs(z - peaks))
            sums = tl.where(higher, sums * e + 1.0, sums + e)
            starts = tl.where(higher, start, starts)
            peaks = tl.maximum(peaks, z)
        top = tl.max(peaks, 0)
        best = tl.min(tl.where(peaks == top, starts + lanes, vocab - 1), 0)
        total = tl.sum(sums * tl.exp(peaks - top), 0)
        scale, log_total = 1.0 / total, tl.log(total)  # Q and log Q from these: top + log(total) would round to |top|
        tl.store(hit_ptr + row, best.to(tl.int64) == tl.load(draft_argmax_ptr + u))

        ce_sums = tl.zeros([TILE], tl.float32)
        alpha_sums = tl.zeros([TILE], tl.float32)
        c_sums = tl.zeros([TILE], tl.float32)
        for start in tl.range(0, vocab, TILE, num_stages=STAGES):
            cols = start + lanes
            inside = cols < vocab
            z = tl.load(z_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32) - top
            t = tl.load(t_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            q = tl.exp(z) * scale
            p_draft = tl.exp(t - lse_draft)
            p = p_draft * outside
            ce_sums -= p_draft * tl.where(inside, z - log_total, 0.0)
            alpha_sums += tl.minimum(p, q)
            if LOSS == "kl":
                if GRAD:
                    dz = (w * (q - p_draft)).to(z_ptr.dtype.element_ty)
                    tl.store(z_ptr + cols, dz, mask=inside, cache_modifier=".cs")
            else:
                c_sums += tl.where(p > q, q, tl.where(p == q, 0.5 * q, 0.0))
        alpha = tl.sum(alpha_sums, 0)
        ce = tl.sum(ce_sums, 0)
        tl.store(alpha_ptr + row, alpha)
        if LOSS == "kl":
            tl.store(loss_ptr + row, ce)
        else:
            tiny = 1.1754943508222875e-38
            if LOSS == "lk_alpha":
                a = 0.0
                b = tl.where(alpha < tiny, 0.0, -w / tl.maximum(alpha, tiny))
                tl.store(loss_ptr + row, -tl.log(tl.maximum(alpha, tiny)))
            else:
                mix = lk_scale * tl.exp(-lk_decay * alpha)
                a = w * mix
                b = w * (mix - 1.0)
                tl.store(loss_ptr + row, mix * ce + (1.0 - mix) * (1.0 - alpha))
            if GRAD:
                c_total = tl.sum(c_sums, 0)
                for start in tl.range(0, vocab, TILE, num_stages=STAGES):
                    cols = start + lanes
                    inside = cols < vocab
                    z = tl.load(z_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first")
                    t = tl.load(t_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first")
                    q = tl.exp(z.to(tl.float32) - top) * scale
                    p_draft = tl.exp(t.to(tl.float32) - lse_draft)
                    p = p_draft * outside
                    c = tl.where(p > q, 1.0, tl.where(p == q, 0.5, 0.0))
                    dz = a * (q - p_draft) + b * q * (c - c_total)
                    tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=inside)


def _empty_rows(z: Tensor) -> KLRows:
    return KLRows(*(torch.empty(len(z), dtype=d, device=z.device) for d in (torch.float32, torch.float32, torch.bool)))


def _kl_rows(
    z: Tensor,  # [n, Vd] contiguous
    teacher: TeacherRows,  # m rows, logits contiguous
    teacher_row: Tensor,  # [n]
    w: Tensor,  # [n]
    loss: LossKind,
    lk_scale: float,
    lk_decay: float,
    grad: bool,
    config: KLConfig,
) -> KLRows:
    n, vocab = z.shape
    rows = _empty_rows(z)
    _kl_rows_kernel[(n,)](
        z,
        teacher.logits,
        teacher.lse_draft,
        teacher.lse_full,
        teacher.draft_argmax,
        teacher_row,
        w,
        *rows,
        vocab,
        lk_scale,
        lk_decay,
        LOSS=loss,
        GRAD=grad,
        TILE=config.tile,
        STAGES=config.stages,
        num_warps=config.num_warps,
    )
    return rows


def rows_in_cuda(
    z: Tensor,  # [n, Vd]
    logits: Tensor,  # [m, Vd] the teacher's
) -> bool:
    """Whether csrc/linear_kl_rows.cu does these rows, Triton else: the only place that chooses."""
    fits = z.shape[1] % 8 == 0 and z.shape[1] <= 57344  # a row's bf16 z and t in shared memory, read 16 bytes at a time
    return fits and z.dtype == logits.dtype == torch.bfloat16 and cuda.takes(z, logits)


def _kl_rows_cuda(
    z: Tensor,  # [n, Vd] contiguous
    teacher: TeacherRows,  # m rows, logits contiguous
    teacher_row: Tensor,  # [n]
    w: Tensor,  # [n]
    loss: LossKind,
    lk_scale: float,
    lk_decay: float,
    grad: bool,
) -> KLRows:
    rows, t = _empty_rows(z), teacher
    if not nothing_runs():
        torch.ops.fastdraft.kl_rows(
            *(z, t.logits, t.lse_draft, t.lse_full, t.draft_argmax, teacher_row, w, *rows),
            *(get_args(LossKind).index(loss), lk_scale, lk_decay, grad),
        )
    return rows


def _kl_rows_cpu(
    z: Tensor,  # [n, Vd]
    teacher: TeacherRows,
    teacher_row: Tensor,  # [n]
    w: Tensor,  # [n]
    loss: LossKind,
    lk_scale: float,
    lk_decay: float,
    grad: bool,
) -> KLRows:
    """The row kernel's formulas in plain torch, for as many rows at a time as a CPU cache holds."""
    stats = teacher.lse_draft.dtype
    out = KLRows(*(torch.zeros(len(z), dtype=dtype) for dtype in (stats, stats, torch.bool)))
    if grad:
        z[w == 0] = 0
    for rows in w.nonzero()[:, 0].split(CPU_ROWS):
        u = teacher_row[rows]
        s, t = z[rows].to(stats), teacher.logits[u].to(stats)
        p = (t - teacher.lse_full[u, None]).exp_()
        p_draft = t.sub_(teacher.lse_draft[u, None]).exp_()
        out.hit[rows] = s.argmax(-1) == teacher.draft_argmax[u]
        log_q = s.sub_(s.logsumexp(-1, keepdim=True))
        ce = -torch.linalg.vecdot(p_draft, log_q)
        q = log_q.exp_()
        alpha = torch.minimum(p, q).sum(-1)
        mix = lk_scale * torch.exp(-lk_decay * alpha)
        value = {
            "kl": ce,
            "lk_alpha": -alpha.clamp_min(torch.finfo(stats).tiny).log(),
            "lk_lambda": mix * ce + (1 - mix) * (1 - alpha),
        }
        out.loss[rows], out.acceptance[rows] = value[loss], alpha
        if not grad:
            continue
        scale = w[rows, None].to(stats)
        if loss == "kl":
            dz = q.sub_(p_draft).mul_(scale)
        else:
            inverse = torch.where(alpha < torch.finfo(stats).tiny, 0, 1 / alpha)  # the loss is constant below
            a, b = (torch.zeros_like(mix), -inverse) if loss == "lk_alpha" else (mix, mix - 1)
            c = (p > q).to(stats) + 0.5 * (p == q)
            c -= (c * q).sum(-1, keepdim=True)
            dz = scale * (q * (a[:, None] + b[:, None] * c) - a[:, None] * p_draft)
        z[rows] = dz.to(z.dtype)
    return out


def kl_rows_(
    z: Tensor,  # [n, Vd] student logits, contiguous, bf16 or fp32 on a GPU, any float dtype on the CPU
    teacher: TeacherRows,  # of `fastdraft.kernels.teacher.teacher`, m rows
    teacher_row: Tensor,  # [n] int64, the teacher row each row reads, in 0..m-1 (unchecked: a check would wait for the GPU)
    w: Tensor,  # [n] float32 gradient weight, 0 = dead row
    loss: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
    grad: bool = True,
) -> KLRows:
    """Loss, acceptance and hit of every row; with `grad`, z is overwritten by the gradient of sum w * loss.

    CPU tensors run the same formulas in plain torch. Raises ValueError for what does not fit.
    """
    _check(z, teacher, teacher_row, w, loss)
    if z.is_cuda:
        if rows_in_cuda(z, teacher.logits):
            return _kl_rows_cuda(z, teacher, teacher_row, w, loss, lk_scale, lk_decay, grad)
        config = kl_config(z.shape[1], z.element_size())
        return _kl_rows(z, teacher, teacher_row, w, loss, lk_scale, lk_decay, grad, config)
    return _kl_rows_cpu(z, teacher, teacher_row, w, loss, lk_scale, lk_decay, grad)


def _check(z: Tensor, teacher: TeacherRows, teacher_row: Tensor, w: Tensor, loss: LossKind) -> None:
    if loss not in get_args(LossKind):
        raise ValueError(f"loss {loss!r} is not one of {', '.join(get_args(LossKind))}")
    if z.ndim != 2 or z.shape[1] != teacher.logits.shape[1] or not (z.is_contiguous() and teacher.logits.is_contiguous()):
        raise ValueError(
            f"student logits {tuple(z.shape)} and teacher logits {tuple(teacher.logits.shape)} must be contiguous "
            "[n, Vd] and [m, Vd] of one Vd"
        )
    if teacher_row.shape != z.shape[:1] or w.shape != z.shape[:1] or teacher_row.dtype != torch.int64:
        raise ValueError(
            f"teacher_row {tuple(teacher_row.shape)} {teacher_row.dtype} and w {tuple(w.shape)} must be [{len(z)}], "
            "teacher_row of torch.int64"
        )
    if len({x.device for x in (z, teacher_row, w, *teacher)}) > 1:
        raise ValueError(f"logits on {z.device}, teacher on {teacher.logits.device}, w on {w.device}: give one device")
    if z.is_cuda:
        covered = (torch.bfloat16, torch.float32)
        if z.dtype not in covered or teacher.logits.dtype not in covered or w.dtype != torch.float32:
            raise ValueError(
                f"no kl_rows kernel covers student {z.dtype}, teacher {teacher.logits.dtype}, w {w.dtype}; "
                "use torch.bfloat16 or torch.float32 logits and a torch.float32 w"
            )
        if triton is None:
            raise ValueError("the kl_rows kernel needs Triton, which is not installed: pip install triton")


@torch.no_grad()
def linear_kl_grad(
    x: Tensor,  # [n, H] normed draft states
    weight: Tensor | Fp8Weight,  # [Vd, H] lm_head, of x's dtype
    teacher: TeacherRows,
    teacher_row: Tensor,  # [n] int64
    w: Tensor,  # [n] float32
    dx: Tensor | None,  # [n, H], overwritten by the gradient of sum w * loss; None: no gradients
    dweight: Tensor | None,  # [Vd, H] float32 (float64 for float64 x), the gradient is added; None with dx None
    logits: Tensor,  # [n, Vd] of x's dtype, overwritten
    loss: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
) -> KLRows:
    """Forward and backward of the draft's head in one go: what an explicit engine calls.

    Three GEMMs and one row kernel. Raises ValueError for shapes or dtypes that do not fit.
    """
    if x.ndim != 2 or weight.shape != (teacher.logits.shape[1], x.shape[1]) or weight.dtype != x.dtype or len(x) == 0:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype} and teacher logits "
            f"{tuple(teacher.logits.shape)} must be [n, H], [Vd, H], [m, Vd]; x and weight of one dtype"
        )
    if (dx is None) != (dweight is None):
        raise ValueError("give both dx and dweight, or neither")
    stats = torch.promote_types(x.dtype, torch.float32)
    if dx is not None and (dx.shape != x.shape or dweight.shape != weight.shape or dweight.dtype != stats):
        raise ValueError(
            f"dx {tuple(dx.shape)}, dweight {tuple(dweight.shape)} {dweight.dtype} must be {tuple(x.shape)}, "
            f"{tuple(weight.shape)} {stats}"
        )
    if logits.shape != (len(x), weight.shape[0]) or logits.dtype != x.dtype:
        raise ValueError(f"logits is {tuple(logits.shape)} {logits.dtype}; [{len(x)}, {weight.shape[0]}] {x.dtype} needed")
    linear(x, weight, logits)
    rows = kl_rows_(logits, teacher, teacher_row, w, loss, lk_scale, lk_decay, dx is not None)
    if dx is not None:
        linear_backward(logits, weight, dx)
        add_outer(dweight, logits, x)
    return rows
