"""The draft's head and its loss against the teacher, forward and gradient, over the rows that one buffer of logits holds.

Row r has student logits z = W x_r over the Vd draft-vocabulary tokens, teacher row u = teacher_row[r], weight w_r:

    Q = softmax(z)     P~ = exp(t_u - lse_draft_u)     P = exp(t_u - lse_full_u)
    CE = -sum P~ log Q     alpha = sum min(P, Q)     hit = [argmax z = draft_argmax_u]
    kl: CE     lk_alpha: -log alpha     lk_lambda: l CE + (1 - l)(1 - alpha),  l = lk_scale exp(-lk_decay alpha), constant

    w dloss/dz = w (a (Q - P~) + b Q (c - S)),   c = [P > Q] + [P = Q] / 2,   S = sum c Q
    kl: a = 1, b = 0     lk_alpha: a = 0, b = -1/alpha     lk_lambda: a = l, b = l - 1

c is the derivative of min(P, Q) in Q. It shares ties between the two, as torch.minimum's autograd does. The gradient
overwrites z. A row with w = 0 is dead: its gradient and results are exactly 0, and neither logits are read, so that NaN
there goes nowhere.

Precision: logits are bf16 or float32, everything inside a row is float32. Every reduction has a fixed order, so two runs of
one kernel are bitwise equal. Bytes of the row kernel: z and t are read once and z is written, 3 * Vd * itemsize a row. z is
read a second time, for the LK losses z a third and t a second time, and those reads hit L2 while the rows fit there.
csrc/linear_kl_rows.cu keeps a row in shared memory instead, and `rows_in_cuda` says which rows it takes.
Source: EAGLE-3 (arXiv 2503.01840); LK losses (arXiv 2602.23881).

# n rows, m teacher rows, H draft hidden, Vd draft vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from fastdraft.batch import LossKind
from fastdraft.kernels import cuda
from fastdraft.kernels.check import AtLeast, check, check_covered
from fastdraft.kernels.fp8 import Fp8Weight
from fastdraft.kernels.jit import jit, launch, tl
from fastdraft.kernels.matmul import add_outer, linear, linear_backward
from fastdraft.kernels.teacher import TeacherRows, lanes_add, lanes_reduce, lanes_start

CPU_ROWS = 32  # So many rows of Vd float32 stay in a core's cache: 1 MB at Vd 8192.


class KLRows(NamedTuple):
    """Results of each row, 0 where the row is dead. Neither a step's weight nor a normaliser is in them."""

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
    _check_loss(loss)
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
    stats = teacher.lse_draft.dtype
    rows = _new_rows(torch.zeros, z, stats)
    dz = torch.zeros_like(z)
    with torch.enable_grad():
        s = z[live].to(stats).requires_grad_()
        live_rows = row_losses_ref(s, teacher.at(teacher_row[live]), loss, lk_scale, lk_decay)
        dz[live] = torch.autograd.grad((live_rows.loss * w[live]).sum(), s)[0].to(dz.dtype)
    for out, x in zip(rows, live_rows, strict=True):
        out[live] = x.detach()
    return rows, dz


def _new_rows(make: Callable[..., Tensor], z: Tensor, stats: torch.dtype) -> KLRows:
    """Results for z's rows, made by torch.zeros or torch.empty."""
    return KLRows(*(make(len(z), dtype=dtype, device=z.device) for dtype in (stats, stats, torch.bool)))


def _check_loss(loss: LossKind) -> None:
    if loss not in get_args(LossKind):
        raise ValueError(f"loss {loss!r} is not one of {', '.join(get_args(LossKind))}")


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
    """Each thread holds eight bf16. Long rows take wide tiles: linear_kl/rows in bench/results/linear_kl.jsonl."""
    tile, num_warps = (4096, 16) if vocab > 16384 else (1024, 4)
    return KLConfig(tile * 2 // itemsize, num_warps, stages=3)


@jit
def _shares(z, t, scale, lse_draft, outside):
    """Q, P~ and P of a tile. z lacks the row's maximum already."""
    q = tl.exp(z) * scale
    p_draft = tl.exp(t.to(tl.float32) - lse_draft)
    return q, p_draft, p_draft * outside


@jit(do_not_specialize_on_alignment=["teacher_row_ptr"])  # It is a slice of a chunk's indices.
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

        # The first pass finds Q's maximum and normaliser. Q and log Q are computed from these, because their sum
        # top + log(total) would be rounded to a float32 as large as |top|.
        peaks, sums, starts = lanes_start(TILE)
        for start in tl.range(0, vocab, TILE, num_stages=STAGES):
            cols = start + lanes
            z = tl.load(z_ptr + cols, mask=cols < vocab, other=-3e38, eviction_policy="evict_last").to(tl.float32)
            peaks, sums, starts = lanes_add(peaks, sums, starts, z, start)
        top, best, total = lanes_reduce(peaks, sums, starts, lanes, vocab)
        scale = 1.0 / total
        log_total = tl.log(total)
        tl.store(hit_ptr + row, best.to(tl.int64) == tl.load(draft_argmax_ptr + u))

        # The second pass sums what the losses are made of. KL's gradient needs nothing that is not known, so it is written.
        ce_sums = tl.zeros([TILE], tl.float32)
        alpha_sums = tl.zeros([TILE], tl.float32)
        c_sums = tl.zeros([TILE], tl.float32)
        for start in tl.range(0, vocab, TILE, num_stages=STAGES):
            cols = start + lanes
            inside = cols < vocab
            z = tl.load(z_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32) - top
            t = tl.load(t_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            q, p_draft, p = _shares(z, t, scale, lse_draft, outside)
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
            # The third pass writes the gradient of an LK loss, which needs the row's alpha and c.
            if GRAD:
                c_total = tl.sum(c_sums, 0)
                for start in tl.range(0, vocab, TILE, num_stages=STAGES):
                    cols = start + lanes
                    inside = cols < vocab
                    z = tl.load(z_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first")
                    t = tl.load(t_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first")
                    q, p_draft, p = _shares(z.to(tl.float32) - top, t, scale, lse_draft, outside)
                    c = tl.where(p > q, 1.0, tl.where(p == q, 0.5, 0.0))
                    dz = a * (q - p_draft) + b * q * (c - c_total)
                    tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=inside)


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
    rows = _new_rows(torch.empty, z, torch.float32)
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
    """Whether csrc/linear_kl_rows.cu does these rows, and not Triton. Only this function chooses."""
    # The kernel holds z and t of a row in shared memory, in bf16, and reads 16 bytes at a time.
    fits = z.shape[1] % 8 == 0 and z.shape[1] <= 57344
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
    rows = _new_rows(torch.empty, z, torch.float32)
    launch(
        torch.ops.fastdraft.kl_rows,
        z,
        teacher.logits,
        teacher.lse_draft,
        teacher.lse_full,
        teacher.draft_argmax,
        teacher_row,
        w,
        *rows,
        get_args(LossKind).index(loss),
        lk_scale,
        lk_decay,
        grad,
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
    """The row kernel's formulas in plain torch, for as many rows at a time as a CPU cache holds.

    For KL it takes half the time of autograd through `row_losses_ref`: 37 and 77 ms for 512 rows of 8192 float32, one core.
    """
    stats = teacher.lse_draft.dtype
    out = _new_rows(torch.zeros, z, stats)
    if grad:
        z[w == 0] = 0
    for rows in w.nonzero()[:, 0].split(CPU_ROWS):
        u = teacher_row[rows]
        s = z[rows].to(stats)
        t = teacher.logits[u].to(stats)
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
        out.loss[rows] = value[loss]
        out.acceptance[rows] = alpha
        if not grad:
            continue
        scale = w[rows, None].to(stats)
        if loss == "kl":
            dz = q.sub_(p_draft).mul_(scale)
        else:
            # Below the smallest normal number the loss is constant, so its derivative there is 0.
            inverse = torch.where(alpha < torch.finfo(stats).tiny, 0, 1 / alpha)
            a, b = (torch.zeros_like(mix), -inverse) if loss == "lk_alpha" else (mix, mix - 1)
            c = (p > q).to(stats) + 0.5 * (p == q)
            c -= (c * q).sum(-1, keepdim=True)
            dz = scale * (q * (a[:, None] + b[:, None] * c) - a[:, None] * p_draft)
        z[rows] = dz.to(z.dtype)
    return out


def kl_rows_(
    z: Tensor,  # [n, Vd] student logits, contiguous, bf16 or fp32 on a GPU, any float dtype on the CPU
    teacher: TeacherRows,  # of `fastdraft.kernels.teacher.teacher`, m rows
    teacher_row: Tensor,  # [n] int64, the teacher row each row reads, in 0..m-1; unchecked, a check would wait for the GPU
    w: Tensor,  # [n] float32 gradient weight, 0 = dead row
    loss: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
    grad: bool = True,
) -> KLRows:
    """Loss, acceptance and hit of every row. With `grad`, z is overwritten by the gradient of sum w * loss.

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
    _check_loss(loss)
    check("z", z, ("n", teacher.logits.shape[-1]), layout="whole")
    check("teacher.logits", teacher.logits, ("m", z.shape[1]), device=z.device, layout="whole")
    for name, x in teacher._asdict().items():
        if name != "logits":
            check(f"teacher.{name}", x, teacher.logits.shape[:1], device=z.device)
    check("teacher_row", teacher_row, z.shape[:1], torch.int64, z.device)
    check("w", w, z.shape[:1], torch.float32 if z.is_cuda else None, z.device)
    check_covered("kl_rows", z=z, teacher_logits=teacher.logits)


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
    """Runs the draft's head forward and backward, by three GEMMs and one row kernel.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    check("x", x, (AtLeast(1), "H"))
    check("weight", weight, (teacher.logits.shape[-1], x.shape[1]), x.dtype)
    if (dx is None) != (dweight is None):
        raise ValueError("give both dx and dweight, or neither")
    check("dx", dx, x.shape)
    check("dweight", dweight, weight.shape, torch.promote_types(x.dtype, torch.float32))
    check("logits", logits, (len(x), weight.shape[0]), x.dtype)
    linear(x, weight, logits)
    rows = kl_rows_(logits, teacher, teacher_row, w, loss, lk_scale, lk_decay, dx is not None)
    if dx is not None:
        linear_backward(logits, weight, dx)
        add_outer(dweight, logits, x)
    return rows
