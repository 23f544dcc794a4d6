"""Cross entropy with one token and the L1 distance from the teacher, of each row's logits, with the gradient of their sum.

Row r has logits z over the V tokens, label y_r, teacher row u = teacher_row[r] and weight w_r:

    Q = softmax(z)     P = exp(t_u - lse_u)     CE = -log Q_y     alpha = sum min(P, Q)     hit = [argmax z = argmax t_u]
    L1 = sum |Q - P| = 2 (1 - alpha)                loss = a CE + b L1

    w dloss/dz = w (a (Q - onehot(y)) - 2 b Q (c - S)),   c = [P > Q] + [P = Q] / 2,   S = sum c Q

c is the derivative of min(P, Q) in Q; where P = Q the derivative of |Q - P| is 0. The gradient overwrites z. A row with
w = 0 is dead: its gradient and results are exactly 0, and neither its logits nor its label are read, so that NaN there goes
nowhere. alpha, the share of drafted tokens that a server keeps, is what DSpark's confidence head learns.

Precision: logits are bf16 or float32, everything inside a row is float32. Every reduction has a fixed order, so two runs of
one kernel are bitwise equal. Bytes of the row kernel: z and t are read once and z is written, 3 * V * itemsize a row. With
the gradient z is read two times more and t once more, and those reads hit L2 while the rows fit there.
Source: DSpark (arXiv 2607.05147), as its public trainers compute it.

# n rows, m teacher rows, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdraft.kernels.check import check, check_covered
from fastdraft.kernels.jit import jit, tl
from fastdraft.kernels.linear_kl import KLConfig, kl_config
from fastdraft.kernels.teacher import TeacherRows, lanes_add, lanes_reduce, lanes_start

CPU_ROWS = 32  # So many rows of V float32 stay in a core's cache: 6 MB at V 49152.


class CEL1Rows(NamedTuple):
    """Results of each row, 0 where the row is dead. Its weight is not in them. L1 is 2 (1 - acceptance)."""

    ce: Tensor  # [n] float32 (float64 for float64 logits)
    acceptance: Tensor  # [n] the same
    hit: Tensor  # [n] bool


def ce_l1_losses_ref(
    z: Tensor,  # [n, V] logits
    label: Tensor,  # [n] int64
    teacher: TeacherRows,  # n rows
    ce_weight: float,  # a
    l1_weight: float,  # b
) -> tuple[Tensor, CEL1Rows]:  # loss [n] with its autograd graph, rows without
    """The specification of a live row in plain torch, any dtype, in at least float32."""
    stats = torch.promote_types(z.dtype, teacher.lse_full.dtype)
    log_q = z.to(stats).log_softmax(-1)
    q, p = log_q.exp(), (teacher.logits.to(stats) - teacher.lse_full[:, None]).exp()
    ce = -log_q.gather(1, label[:, None])[:, 0]
    loss = ce_weight * ce + l1_weight * (q - p).abs().sum(-1)
    acceptance = torch.minimum(p, q).sum(-1)
    return loss, CEL1Rows(ce.detach(), acceptance.detach(), z.argmax(-1) == teacher.argmax)


def ce_l1_rows_ref(
    z: Tensor,  # [n, V] logits
    label: Tensor,  # [n] int64
    teacher: TeacherRows,  # m rows
    teacher_row: Tensor,  # [n] int64
    w: Tensor,  # [n] gradient weight, 0 = dead
    ce_weight: float,
    l1_weight: float,
) -> tuple[CEL1Rows, Tensor]:  # rows, gradient of sum w * loss [n, V] in z's dtype
    """The specification of the row kernel: `ce_l1_losses_ref` of the live rows, its gradient by autograd."""
    live = w != 0
    rows = _new_rows(torch.zeros, z)
    dz = torch.zeros_like(z)
    with torch.enable_grad():
        s = z[live].to(rows.ce.dtype).requires_grad_()
        loss, found = ce_l1_losses_ref(s, label[live], teacher.at(teacher_row[live]), ce_weight, l1_weight)
        dz[live] = torch.autograd.grad((loss * w[live]).sum(), s)[0].to(dz.dtype)
    for out, x in zip(rows, found, strict=True):
        out[live] = x
    return rows, dz


def _new_rows(make: Callable[..., Tensor], z: Tensor) -> CEL1Rows:
    """Results for z's rows, made by torch.zeros or torch.empty."""
    stats = torch.promote_types(z.dtype, torch.float32)
    return CEL1Rows(*(make(len(z), dtype=dtype, device=z.device) for dtype in (stats, stats, torch.bool)))


@jit(do_not_specialize_on_alignment=["label_ptr", "teacher_row_ptr", "w_ptr"])  # They are slices of a chunk's rows.
def _ce_l1_rows_kernel(
    z_ptr,  # [n, V] logits; their gradient after
    label_ptr,  # [n] int64
    t_ptr,  # [m, V] teacher logits
    lse_ptr,  # [m]
    argmax_ptr,  # [m] int64
    teacher_row_ptr,  # [n] int64
    w_ptr,  # [n] float32
    ce_ptr,  # [n]
    alpha_ptr,  # [n]
    hit_ptr,  # [n] bool
    vocab,
    ce_weight,
    l1_weight,
    GRAD: tl.constexpr,  # write the gradient
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * vocab
    lanes = tl.arange(0, TILE)
    w = tl.load(w_ptr + row)
    if w == 0.0:
        tl.store(ce_ptr + row, 0.0)
        tl.store(alpha_ptr + row, 0.0)
        tl.store(hit_ptr + row, False)
        if GRAD:
            for start in range(0, vocab, TILE):
                tl.store(z_ptr + start + lanes, tl.zeros([TILE], z_ptr.dtype.element_ty), mask=start + lanes < vocab)
    else:
        u = tl.load(teacher_row_ptr + row)
        t_ptr += u * vocab
        lse = tl.load(lse_ptr + u)

        # The first pass normalises Q. The label's logit is read before the gradient overwrites it.
        label = tl.load(label_ptr + row)
        z_label = tl.load(z_ptr + label).to(tl.float32)
        peaks, sums, starts = lanes_start(TILE)
        for start in tl.range(0, vocab, TILE, num_stages=STAGES):
            cols = start + lanes
            z = tl.load(z_ptr + cols, mask=cols < vocab, other=-3e38, eviction_policy="evict_last").to(tl.float32)
            peaks, sums, starts = lanes_add(peaks, sums, starts, z, start)
        top, best, total = lanes_reduce(peaks, sums, starts, lanes, vocab)
        tl.store(ce_ptr + row, tl.log(total) - (z_label - top))
        tl.store(hit_ptr + row, best.to(tl.int64) == tl.load(argmax_ptr + u))

        # The second compares Q with P.
        scale = 1.0 / total
        alphas = tl.zeros([TILE], tl.float32)
        c_sums = tl.zeros([TILE], tl.float32)
        for start in tl.range(0, vocab, TILE, num_stages=STAGES):
            cols = start + lanes
            inside = cols < vocab
            z = tl.load(z_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
            t = tl.load(t_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
            q = tl.exp(z - top) * scale
            p = tl.exp(t - lse)
            alphas += tl.minimum(p, q)
            c_sums += tl.where(p > q, q, tl.where(p == q, 0.5 * q, 0.0))
        tl.store(alpha_ptr + row, tl.sum(alphas, 0))

        # The third writes the gradient, which needs S.
        if GRAD:
            c_total = tl.sum(c_sums, 0)
            a = w * ce_weight
            b = -2.0 * w * l1_weight
            for start in tl.range(0, vocab, TILE, num_stages=STAGES):
                cols = start + lanes
                inside = cols < vocab
                z = tl.load(z_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
                t = tl.load(t_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
                q = tl.exp(z - top) * scale
                p = tl.exp(t - lse)
                c = tl.where(p > q, 1.0, tl.where(p == q, 0.5, 0.0))
                dz = q * (a + b * (c - c_total)) - tl.where(cols == label, a, 0.0)
                tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=inside)


def _ce_l1_rows(
    z: Tensor,  # [n, V] contiguous
    label: Tensor,  # [n]
    teacher: TeacherRows,  # m rows, logits contiguous
    teacher_row: Tensor,  # [n]
    w: Tensor,  # [n]
    ce_weight: float,
    l1_weight: float,
    grad: bool,
    config: KLConfig,
) -> CEL1Rows:
    n, vocab = z.shape
    rows = _new_rows(torch.empty, z)
    _ce_l1_rows_kernel[(n,)](
        z,
        label,
        teacher.logits,
        teacher.lse_full,
        teacher.argmax,
        teacher_row,
        w,
        *rows,
        vocab,
        ce_weight,
        l1_weight,
        GRAD=grad,
        TILE=config.tile,
        STAGES=config.stages,
        num_warps=config.num_warps,
    )
    return rows


def _ce_l1_rows_cpu(
    z: Tensor,  # [n, V]
    label: Tensor,  # [n]
    teacher: TeacherRows,
    teacher_row: Tensor,  # [n]
    w: Tensor,  # [n]
    ce_weight: float,
    l1_weight: float,
    grad: bool,
) -> CEL1Rows:
    """The row kernel's formulas in plain torch, for as many rows at a time as a CPU cache holds."""
    out = _new_rows(torch.zeros, z)
    stats = out.ce.dtype
    if grad:
        z[w == 0] = 0
    for rows in w.nonzero()[:, 0].split(CPU_ROWS):
        u, y = teacher_row[rows], label[rows, None]
        s = z[rows].to(stats)
        out.hit[rows] = s.argmax(-1) == teacher.argmax[u]
        log_q = s.sub_(s.logsumexp(-1, keepdim=True))
        out.ce[rows] = -log_q.gather(1, y)[:, 0]
        q, p = log_q.exp_(), teacher.logits[u].to(stats).sub_(teacher.lse_full[u, None]).exp_()
        out.acceptance[rows] = torch.minimum(p, q).sum(-1)
        if not grad:
            continue
        c = (p > q).to(stats) + 0.5 * (p == q)
        c -= torch.linalg.vecdot(c, q)[:, None]
        dz = q * c.mul_(-2 * l1_weight).add_(ce_weight)
        dz.scatter_add_(1, y, torch.full_like(y, -ce_weight, dtype=stats))
        z[rows] = dz.mul_(w[rows, None].to(stats)).to(z.dtype)
    return out


def ce_l1_rows_(
    z: Tensor,  # [n, V] logits, contiguous, bf16 or fp32 on a GPU, any float dtype on the CPU
    label: Tensor,  # [n] int64 in 0..V-1 where live; unchecked, a check would wait for the GPU
    teacher: TeacherRows,  # of `fastdraft.kernels.teacher.teacher` over all V, m rows
    teacher_row: Tensor,  # [n] int64, the teacher row that each row reads, in 0..m-1; unchecked as the label
    w: Tensor,  # [n] float32 gradient weight, 0 = dead row
    ce_weight: float,  # a
    l1_weight: float,  # b
    grad: bool = True,
) -> CEL1Rows:
    """Cross entropy, acceptance and hit of every row. With `grad`, z is overwritten by the gradient of sum w * loss.

    CPU tensors run the same formulas in plain torch. Raises ValueError for what does not fit.
    """
    check("z", z, ("n", teacher.logits.shape[-1]), layout="whole")
    check("label", label, z.shape[:1], torch.int64, z.device)
    check("teacher.logits", teacher.logits, ("m", z.shape[1]), device=z.device, layout="whole")
    for name in ("lse_full", "argmax"):
        check(f"teacher.{name}", getattr(teacher, name), teacher.logits.shape[:1], device=z.device)
    check("teacher_row", teacher_row, z.shape[:1], torch.int64, z.device)
    check("w", w, z.shape[:1], torch.float32 if z.is_cuda else None, z.device)
    check_covered("ce_l1_rows", z=z, teacher_logits=teacher.logits)
    weights = float(ce_weight), float(l1_weight)
    if z.is_cuda:
        return _ce_l1_rows(z, label, teacher, teacher_row, w, *weights, grad, kl_config(z.shape[1], z.element_size()))
    return _ce_l1_rows_cpu(z, label, teacher, teacher_row, w, *weights, grad)
