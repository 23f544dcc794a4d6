"""The optimizer's step over flat buffers: the gradient's norm, then one pass that does all the rest.

With G the gradient's sum over a global batch of N live rows, u the steps that had live rows, this one included:

    g = G / N                              norm = |g|                      g *= min(1, clip / norm)
    m += (1 - beta1) (g - m)               v += (1 - beta2) (g^2 - v)
    master -= lr (m / (1 - beta1^u) / (sqrt(v / (1 - beta2^u)) + eps) + weight_decay master)
    weights = round(master)                G = 0

Elements in the ranges not_decayed take no weight decay. N = 0: the moments, master and u stay as they are, G is zeroed.
N, u and the norm stay on the device: nothing waits for the host.

Precision: buffers float32, weights bf16 (or none of their own). The sum of squares: each program adds its elements lane by
lane in float32, then the programs' sums are added in float64; powers of beta in float64. Every sum has a fixed order that
depends on the length alone: two runs are bitwise equal, on any GPU.
Bytes per parameter: 4 for the norm, then 16 read and 12 + 2 + 4 written: 38.
Source: AdamW (arXiv 1711.05101).

# P parameters, S ranges without weight decay
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastdraft.kernels.jit import jit, tl, triton


def adamw_ref(
    grad: Tensor,  # [P]
    master: Tensor,  # [P]
    m: Tensor,  # [P]
    v: Tensor,  # [P]
    weights: Tensor | None,  # [P]
    not_decayed: Tensor,  # [S, 2] int64
    num_live: Tensor,  # scalar
    updates: Tensor,  # scalar float64
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float,
) -> Tensor:  # scalar: norm of G / N before clipping
    """The specification, any dtype, in place."""
    beta1, beta2 = betas
    go = (num_live > 0).to(grad.dtype)
    updates += go
    count = updates.clamp_min(1)
    grad.div_(num_live.clamp_min(1))
    norm = grad.norm()
    grad.mul_((clip / norm.clamp_min(1e-30)).clamp_max(1.0))
    m.lerp_(grad, go * (1 - beta1))
    v.lerp_(grad.square(), go * (1 - beta2))
    update = (m / (1 - beta1**count)).div_(v.sqrt().div_((1 - beta2**count).sqrt()).add_(eps))
    if weight_decay:
        decay = master * weight_decay
        for first, last in not_decayed.tolist():
            decay[first:last] = 0
        update.add_(decay)
    master.sub_(update.mul_(go * lr))
    if weights is not None:
        weights.copy_(master)
    grad.zero_()
    return norm


@dataclass(frozen=True)
class AdamWConfig:
    programs: int  # of the sum of squares; a power of two
    norm_block: int  # elements a program of the sum of squares reads at a time
    block: int  # elements of a program of the step
    num_warps: int


@cache
def adamw_config() -> AdamWConfig:
    """One wave of an H100 for the sum; the step holds two 16-byte loads of each of the four buffers a thread."""
    return AdamWConfig(1024, 4096, 1024, num_warps=4)


@jit
def _square_sum_kernel(
    grad_ptr,  # [P] float32
    partial_ptr,  # [programs] float32
    count,  # P
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(program * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = start + lanes
        grad = tl.load(grad_ptr + at, mask=at < count, other=0.0)
        sums += grad * grad
    tl.store(partial_ptr + program, tl.sum(sums, 0))


@jit
def _scalars_kernel(
    partial_ptr,  # [PROGRAMS] float32
    num_live_ptr,  # scalar
    updates_ptr,  # scalar float64, counted up
    norm_ptr,  # scalar float32, written
    scalars_ptr,  # [4] float32, written: factor of G, go, factor of m, factor of sqrt(v)
    clip,
    log_beta1,
    log_beta2,
    PROGRAMS: tl.constexpr,
):
    total = tl.sum(tl.load(partial_ptr + tl.arange(0, PROGRAMS)).to(tl.float64), 0)
    num_live = tl.load(num_live_ptr).to(tl.float64)
    go = tl.where(num_live > 0, 1.0, 0.0)
    inverse = 1.0 / tl.maximum(num_live, 1.0)
    norm = tl.sqrt(total) * inverse
    updates = tl.load(updates_ptr) + go
    count = tl.maximum(updates, 1.0)
    tl.store(updates_ptr, updates)
    tl.store(norm_ptr, norm.to(tl.float32))
    tl.store(scalars_ptr, (inverse * tl.minimum(clip / tl.maximum(norm, 1e-30), 1.0)).to(tl.float32))
    tl.store(scalars_ptr + 1, go.to(tl.float32))
    tl.store(scalars_ptr + 2, (1.0 / (1.0 - tl.exp(count * log_beta1))).to(tl.float32))
    tl.store(scalars_ptr + 3, (1.0 / tl.sqrt(1.0 - tl.exp(count * log_beta2))).to(tl.float32))


@jit
def _adamw_kernel(
    grad_ptr,  # [P] float32; 0 after
    master_ptr,  # [P] float32
    m_ptr,  # [P] float32
    v_ptr,  # [P] float32
    weights_ptr,  # [P]
    not_decayed_ptr,  # [RANGES, 2] int64
    scalars_ptr,  # [4] float32
    count,  # P
    lr,
    rest1,  # 1 - beta1
    rest2,
    eps,
    weight_decay,
    RANGES: tl.constexpr,  # S, 0 without weight decay
    DECAY: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < count
    go = tl.load(scalars_ptr + 1)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0) * tl.load(scalars_ptr)
    master = tl.load(master_ptr + at, mask=inside, other=0.0)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    m += go * rest1 * (grad - m)
    v += go * rest2 * (grad * grad - v)
    update = m * tl.load(scalars_ptr + 2) / (tl.sqrt(v) * tl.load(scalars_ptr + 3) + eps)
    if DECAY:
        decay = master * weight_decay
        for k in tl.static_range(RANGES):
            first = tl.load(not_decayed_ptr + 2 * k)
            last = tl.load(not_decayed_ptr + 2 * k + 1)
            if (first < start + BLOCK) & (last > start):  # few blocks touch a range: a scalar test spares the rest
                decay = tl.where((at >= first) & (at < last), 0.0, decay)
        update += decay
    master -= go * lr * update
    tl.store(master_ptr + at, master, mask=inside)
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    if HAS_WEIGHTS:
        tl.store(weights_ptr + at, master.to(weights_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_ptr + at, tl.zeros([BLOCK], tl.float32), mask=inside)


def _adamw(
    grad: Tensor,  # [P]
    master: Tensor,  # [P]
    m: Tensor,  # [P]
    v: Tensor,  # [P]
    weights: Tensor | None,  # [P]
    not_decayed: Tensor,  # [S, 2]
    num_live: Tensor,  # scalar
    updates: Tensor,  # scalar
    scratch: Tensor,  # [programs + 4]
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float,
    config: AdamWConfig,
) -> Tensor:  # scalar
    count = grad.numel()
    norm = torch.empty((), dtype=torch.float32, device=grad.device)  # of its own: the caller keeps it over steps
    partial, scalars = scratch[: config.programs], scratch[config.programs :]
    log1, log2 = (math.log(beta) if beta else -math.inf for beta in betas)
    _square_sum_kernel[(config.programs,)](grad, partial, count, BLOCK=config.norm_block, num_warps=8)
    _scalars_kernel[(1,)](
        partial, num_live, updates, norm, scalars, clip, log1, log2, PROGRAMS=config.programs, num_warps=4
    )
    _adamw_kernel[(triton.cdiv(count, config.block),)](
        grad,
        master,
        m,
        v,
        weights,
        not_decayed,
        scalars,
        count,
        lr,
        1 - betas[0],
        1 - betas[1],
        eps,
        weight_decay,
        RANGES=len(not_decayed) if weight_decay else 0,
        DECAY=weight_decay != 0,
        HAS_WEIGHTS=weights is not None,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return norm


def adamw_scratch(device: torch.device) -> Tensor:  # [programs + 4] float32
    """What `adamw_` needs beside its buffers, once per optimizer."""
    return torch.empty(adamw_config().programs + 4, dtype=torch.float32, device=device)


@torch.no_grad()
def adamw_(
    grad: Tensor,  # [P] the sum G, zeroed; float32 on a GPU, any float dtype on the CPU, as master, m and v
    master: Tensor,  # [P] updated
    m: Tensor,  # [P] updated
    v: Tensor,  # [P] updated
    weights: Tensor | None,  # [P] written, master rounded; None where master serves
    not_decayed: Tensor,  # [S, 2] int64 first and one-past-last element of each range without weight decay
    num_live: Tensor,  # scalar N
    updates: Tensor,  # scalar float64, counted up where N > 0
    scratch: Tensor,  # of `adamw_scratch`
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float,
) -> Tensor:  # scalar: norm of G / N before clipping
    """One AdamW step in place. On a GPU three kernels, one small allocation (the norm), no wait for the device.

    Raises ValueError for buffers that do not fit.
    """
    buffers = {"grad": grad, "master": master, "m": m, "v": v} | ({} if weights is None else {"weights": weights})
    for name, x in buffers.items():
        if x.ndim != 1 or x.shape != grad.shape or not x.is_contiguous() or x.device != grad.device:
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}; {tuple(grad.shape)} on {grad.device} is needed")
        if name != "weights" and x.dtype != grad.dtype:
            raise ValueError(f"{name} is {x.dtype}, grad {grad.dtype}; give both alike")
    if not_decayed.ndim != 2 or not_decayed.shape[1] != 2 or not_decayed.dtype != torch.int64:
        raise ValueError(f"not_decayed is {tuple(not_decayed.shape)} {not_decayed.dtype}; [S, 2] torch.int64 is needed")
    if updates.numel() != 1 or updates.dtype != torch.float64 or num_live.numel() != 1:
        raise ValueError(f"updates ({updates.dtype}) must be one torch.float64 number and num_live one number")
    options = (lr, betas, eps, weight_decay, clip)
    if not grad.is_cuda:
        return adamw_ref(grad, master, m, v, weights, not_decayed, num_live, updates, *options)
    if grad.dtype != torch.float32 or (weights is not None and weights.dtype not in (torch.bfloat16, torch.float32)):
        raise ValueError(
            f"no adamw kernel covers buffers of {grad.dtype}, weights {weights if weights is None else weights.dtype}; "
            "use torch.float32 buffers, torch.bfloat16 or torch.float32 weights"
        )
    if triton is None:
        raise ValueError("the adamw kernels need Triton, which is not installed: pip install triton")
    config = adamw_config()
    if scratch.shape != (config.programs + 4,) or any(x.device != grad.device for x in (not_decayed, num_live, updates)):
        raise ValueError("scratch must come from adamw_scratch, and not_decayed, num_live and updates lie beside grad")
    return _adamw(grad, master, m, v, weights, not_decayed, num_live, updates, scratch, *options, config)
