"""The optimizer's step over flat buffers: the gradient's norm, then one pass that does all the rest.

With G the gradient's sum over a global batch of N live rows, u the steps that had live rows, this one included:

    g = G / N                              norm = |g|                      g *= min(1, clip / norm)
    m += (1 - beta1) (g - m)               v += (1 - beta2) (g^2 - v)
    master -= lr (m / (1 - beta1^u) / (sqrt(v / (1 - beta2^u)) + eps) + weight_decay master)
    weights = round(master)                G = 0

Elements in the ranges not_decayed take no weight decay. Where N is 0, the moments, master and u stay as they are, and G is
zeroed. N, u and the norm stay on the device, so that nothing waits for the host.

Precision: the buffers are float32, the weights bf16, or master serves as weights. For the sum of squares each program adds
its elements lane by lane in float32, then the programs' sums are added in float64. Powers of beta are float64. Every sum
has a fixed order that depends on the length alone, so two runs are bitwise equal, on any GPU.
Bytes per parameter: 38, of which the norm reads 4, and the step reads 16 and writes 12 + 2 + 4.
Source: AdamW (arXiv 1711.05101).

# P parameters, S ranges without weight decay
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastdraft.kernels.check import check, check_covered
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
    """The sum takes one wave of an H100. In the step each thread holds two 16-byte loads of each of the four buffers."""
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
            # Few blocks touch a range, and this scalar test spares the others.
            if (first < start + BLOCK) & (last > start):
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
    norm = torch.empty((), dtype=torch.float32, device=grad.device)  # The caller keeps it, so it is new at every step.
    partial = scratch[: config.programs]
    scalars = scratch[config.programs :]
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
    """One AdamW step in place. On a GPU it is three kernels and one small allocation, the norm, and waits for nothing.

    Raises ValueError for buffers that do not fit.
    """
    check("grad", grad, ("P",), torch.float32 if grad.is_cuda else None, layout="whole")
    for name, x in {"master": master, "m": m, "v": v}.items():
        check(name, x, grad.shape, grad.dtype, grad.device, "whole")
    check("weights", weights, grad.shape, device=grad.device, layout="whole")
    check("not_decayed", not_decayed, ("S", 2), torch.int64, grad.device)
    check("num_live", num_live, (), device=grad.device)
    check("updates", updates, (), torch.float64, grad.device)
    options = (lr, betas, eps, weight_decay, clip)
    if not grad.is_cuda:
        return adamw_ref(grad, master, m, v, weights, not_decayed, num_live, updates, *options)
    check_covered("adamw", grad=grad, weights=weights)
    config = adamw_config()
    check("scratch (of adamw_scratch)", scratch, (config.programs + 4,), torch.float32, grad.device, "whole")
    return _adamw(grad, master, m, v, weights, not_decayed, num_live, updates, scratch, *options, config)
