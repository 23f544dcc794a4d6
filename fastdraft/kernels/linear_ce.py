"""A frozen head and its cross entropy against one token a row, forward and gradient, over what one buffer of logits holds.

Row r has logits z = W x_r over the V tokens, label y_r and weight w_r:

    Q = softmax(z)     CE = -log Q_y     hit = [argmax z = y]     w dCE/dz = w (Q - onehot(y))     dx = dz W

The gradient overwrites z. A row with w = 0 is dead: its gradient and results are exactly 0, and its logits and label are
not read, so that NaN there goes nowhere. The head is the target's and has no gradient. dx is linear in w, so who knows a
weight only after the losses (D-PACE) gives 1 here and multiplies dx by it.

Precision: logits are bf16 or float32, everything inside a row is float32. Every reduction has a fixed order, so two runs of
one kernel are bitwise equal. Bytes of the row kernel: z is read twice, the second time from L2 while the rows fit there,
and written once, 3 * V * itemsize a row.
Source: DFlash (arXiv 2602.06036); softmax cross entropy.

# n rows, H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastdraft.kernels.check import AtLeast, check, check_covered
from fastdraft.kernels.jit import jit, tl
from fastdraft.kernels.matmul import linear, linear_backward
from fastdraft.kernels.teacher import lanes_add, lanes_reduce, lanes_start

CPU_ROWS = 32  # So many rows of V float32 stay in a core's cache: 6 MB at V 49152.


class CERows(NamedTuple):
    """Results of each row, 0 where the row is dead. Its weight is not in them. Q_y is exp(-loss)."""

    loss: Tensor  # [n] float32 (float64 for float64 logits)
    hit: Tensor  # [n] bool


def ce_rows_ref(
    z: Tensor,  # [n, V] logits
    label: Tensor,  # [n] int64
    w: Tensor,  # [n] gradient weight, 0 = dead
) -> tuple[CERows, Tensor]:  # rows, gradient of sum w * loss [n, V] in z's dtype
    """The specification in plain torch, any dtype, its gradient by autograd."""
    live = w != 0
    stats = torch.promote_types(z.dtype, torch.float32)
    rows = _new_rows(torch.zeros, z)
    dz = torch.zeros_like(z)
    with torch.enable_grad():
        s = z[live].to(stats).requires_grad_()
        loss = torch.nn.functional.cross_entropy(s, label[live], reduction="none")
        dz[live] = torch.autograd.grad((loss * w[live]).sum(), s)[0].to(dz.dtype)
    rows.loss[live] = loss.detach()
    rows.hit[live] = z[live].argmax(-1) == label[live]
    return rows, dz


def _new_rows(make: Callable[..., Tensor], z: Tensor) -> CERows:
    """Results for z's rows, made by torch.zeros or torch.empty."""
    stats = torch.promote_types(z.dtype, torch.float32)
    return CERows(*(make(len(z), dtype=dtype, device=z.device) for dtype in (stats, torch.bool)))


@dataclass(frozen=True)
class CEConfig:
    tile: int  # columns the row kernel holds at a time
    num_warps: int
    stages: int  # tiles in flight


@cache
def ce_config(
    vocab: int,
    itemsize: int,
) -> CEConfig:
    """Each thread holds eight bf16, as the row kernel of linear_kl does; not tuned by itself."""
    tile, num_warps = (4096, 16) if vocab > 16384 else (1024, 4)
    return CEConfig(tile * 2 // itemsize, num_warps, stages=3)


@jit(do_not_specialize_on_alignment=["label_ptr", "w_ptr"])  # They are slices of a chunk's rows.
def _ce_rows_kernel(
    z_ptr,  # [n, V] logits; their gradient after
    label_ptr,  # [n] int64
    w_ptr,  # [n] float32
    loss_ptr,  # [n]
    hit_ptr,  # [n] bool
    vocab,
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
        tl.store(hit_ptr + row, False)
        if GRAD:
            for start in range(0, vocab, TILE):
                tl.store(z_ptr + start + lanes, tl.zeros([TILE], z_ptr.dtype.element_ty), mask=start + lanes < vocab)
    else:
        # The label's logit is read before the gradient overwrites it.
        label = tl.load(label_ptr + row)
        z_label = tl.load(z_ptr + label).to(tl.float32)
        peaks, sums, starts = lanes_start(TILE)
        for start in tl.range(0, vocab, TILE, num_stages=STAGES):
            cols = start + lanes
            z = tl.load(z_ptr + cols, mask=cols < vocab, other=-3e38, eviction_policy="evict_last").to(tl.float32)
            peaks, sums, starts = lanes_add(peaks, sums, starts, z, start)
        top, best, total = lanes_reduce(peaks, sums, starts, lanes, vocab)
        tl.store(loss_ptr + row, tl.log(total) - (z_label - top))
        tl.store(hit_ptr + row, best.to(tl.int64) == label)

        if GRAD:
            scale = w / total
            for start in tl.range(0, vocab, TILE, num_stages=STAGES):
                cols = start + lanes
                inside = cols < vocab
                z = tl.load(z_ptr + cols, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
                dz = tl.exp(z - top) * scale - tl.where(cols == label, w, 0.0)
                tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=inside)


def _ce_rows(
    z: Tensor,  # [n, V] contiguous
    label: Tensor,  # [n]
    w: Tensor,  # [n]
    grad: bool,
    config: CEConfig,
) -> CERows:
    n, vocab = z.shape
    rows = _new_rows(torch.empty, z)
    _ce_rows_kernel[(n,)](
        z, label, w, *rows, vocab, GRAD=grad, TILE=config.tile, STAGES=config.stages, num_warps=config.num_warps
    )
    return rows


def _ce_rows_cpu(
    z: Tensor,  # [n, V]
    label: Tensor,  # [n]
    w: Tensor,  # [n]
    grad: bool,
) -> CERows:
    """The row kernel's formulas in plain torch, for as many rows at a time as a CPU cache holds."""
    out = _new_rows(torch.zeros, z)
    if grad:
        z[w == 0] = 0
    for rows in w.nonzero()[:, 0].split(CPU_ROWS):
        s, y = z[rows].to(out.loss.dtype), label[rows, None]  # z[rows] is a copy
        out.hit[rows] = s.argmax(-1) == y[:, 0]
        s = s.sub_(s.amax(-1, keepdim=True))
        z_label = s.gather(1, y)[:, 0]
        q = s.exp_()
        total = q.sum(-1)
        out.loss[rows] = total.log() - z_label
        if grad:
            dz = q.div_(total[:, None]).scatter_add_(1, y, torch.full_like(y, -1, dtype=s.dtype))
            z[rows] = dz.mul_(w[rows, None].to(s.dtype)).to(z.dtype)
    return out


def ce_rows_(
    z: Tensor,  # [n, V] logits, contiguous, bf16 or fp32 on a GPU, any float dtype on the CPU
    label: Tensor,  # [n] int64 in 0..V-1 where live; unchecked, a check would wait for the GPU
    w: Tensor,  # [n] float32 gradient weight, 0 = dead row
    grad: bool = True,
) -> CERows:
    """Cross entropy and hit of every row. With `grad`, z is overwritten by the gradient of sum w * loss.

    CPU tensors run the same formulas in plain torch. Raises ValueError for what does not fit.
    """
    check("z", z, ("n", "V"), layout="whole")
    check("label", label, z.shape[:1], torch.int64, z.device)
    check("w", w, z.shape[:1], torch.float32 if z.is_cuda else None, z.device)
    check_covered("ce_rows", z=z)
    if z.is_cuda:
        return _ce_rows(z, label, w, grad, ce_config(z.shape[1], z.element_size()))
    return _ce_rows_cpu(z, label, w, grad)


@torch.no_grad()
def linear_ce_grad(
    x: Tensor,  # [n, H] normed draft states
    weight: Tensor,  # [V, H] the frozen head, of x's dtype
    label: Tensor,  # [n] int64
    w: Tensor,  # [n] float32
    dx: Tensor | None,  # [n, H], overwritten by the gradient of sum w * loss; None: no gradient
    logits: Tensor,  # [n, V] of x's dtype, overwritten
) -> CERows:
    """Runs the head forward and backward to its input, by two GEMMs and one row kernel.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    check("x", x, (AtLeast(1), "H"))
    check("weight", weight, ("V", x.shape[1]), x.dtype)
    check("dx", dx, x.shape)
    check("logits", logits, (len(x), weight.shape[0]), x.dtype)
    linear(x, weight, logits)
    rows = ce_rows_(logits, label, w, dx is not None)
    if dx is not None:
        linear_backward(logits, weight, dx)
    return rows
