"""A grouped dynamic causal convolution along the rows of a block, and its backward.

Row k of a block is made of itself and the rows before it in the block, each channel by itself. A tap's coefficient is a
weight of the channel and a number of the row's own, which a group of channels shares. With c a channel, g its group and
slot_k the row's place in its block:

    y_k[c]       = sum_t (base[t, c] + delta_k[t, g]) x_{k-t}[c]                 over taps t <= slot_k
    dx_k[c]      = sum_t (base[t, c] + delta_{k+t}[t, g]) dy_{k+t}[c]            over rows k + t of the same block
    ddelta_k[t, g] = sum_{c in g} dy_k[c] x_{k-t}[c]        dbase[t, c] += sum_k dy_k[c] x_{k-t}[c]    where t <= slot_k

base[0] = 1 and everything else 0 is the identity. Rows of a block follow each other from slot 0 on; a block may end early.

Precision: everything is computed in float32 and rounded once, at each store. Bytes a row, with T taps and G groups: the
forward reads x and delta and writes y, 2 H + T G numbers, the backward 3 H + 2 T G; rows that a neighbour has read come
from a cache. For dbase each of P programs keeps the sum over its own rows and writes it to partial[p], and the P sums are
added in order, so two runs are bitwise equal.
Source: DFlash2 (its blog post of August 2026 and its models in the serving engines); lightweight and dynamic convolutions
(arXiv 1901.10430).

# n rows, H hidden, T taps, G groups of H / G channels, P programs of the backward
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastdraft.kernels.check import check, check_covered
from fastdraft.kernels.jit import jit, launch, tl, triton

PROGRAMS = 256  # of the backward, which each have some rows that follow each other; not tuned


def block_conv_ref(
    x: Tensor,  # [n, H]
    delta: Tensor,  # [n, T, G]
    base: Tensor,  # [T, H]
    slot: Tensor,  # [n] int64
) -> Tensor:  # y [n, H]
    """The specification in plain torch, any dtype, computed in at least float32."""
    work = torch.promote_types(x.dtype, torch.float32)
    coefficient = _coefficients(delta.to(work), base.to(work))
    return (coefficient * _behind(x.to(work), slot, base.shape[0])).sum(1).to(x.dtype)


def block_conv_backward_ref(
    dy: Tensor,  # [n, H]
    x: Tensor,  # [n, H]
    delta: Tensor,  # [n, T, G]
    base: Tensor,  # [T, H]
    slot: Tensor,  # [n] int64
) -> tuple[Tensor, Tensor, Tensor]:  # dx [n, H], ddelta [n, T, G], dbase [T, H], in at least float32
    """The gradients of `block_conv_ref`, unrounded."""
    work = torch.promote_types(x.dtype, torch.float32)
    dy, taps = dy.to(work), base.shape[0]
    products = dy[:, None] * _behind(x.to(work), slot, taps)  # [n, T, H]
    pulled = _coefficients(delta.to(work), base.to(work)) * dy[:, None]  # [n, T, H], what row k gives to row k - t
    pulled = torch.where((slot[:, None] >= torch.arange(taps, device=x.device))[..., None], pulled, 0.0)
    dx = pulled[:, 0].clone()
    for tap in range(1, min(taps, len(x))):
        dx[:-tap] += pulled[tap:, tap]
    return dx, products.unflatten(-1, (delta.shape[2], -1)).sum(-1), products.sum(0)


def _coefficients(
    delta: Tensor,  # [n, T, G]
    base: Tensor,  # [T, H]
) -> Tensor:  # [n, T, H]
    return base + delta.repeat_interleave(base.shape[1] // delta.shape[2], -1)


def _behind(
    x: Tensor,  # [n, H]
    slot: Tensor,  # [n]
    taps: int,
) -> Tensor:  # [n, T, H], row k - t of the same block, 0 where the block has none
    row, tap = torch.arange(len(x), device=x.device)[:, None], torch.arange(taps, device=x.device)
    inside = slot[:, None] >= tap  # [n, T]
    return torch.where(inside[..., None], x[(row - tap).where(inside, 0)], 0.0)


@dataclass(frozen=True)
class BlockConvConfig:
    groups: int  # that a program holds
    num_warps: int


@cache
def block_conv_config(
    group: int,  # channels of a group
) -> BlockConvConfig:
    """A program has about 1024 channels, eight for each thread, so that a thread loads sixteen bytes of bf16 at a time."""
    return BlockConvConfig(max(1024 // group, 1), num_warps=4)


@jit(do_not_specialize_on_alignment=["slot_ptr"])
def _block_conv_kernel(
    x_ptr,  # [n, H]
    delta_ptr,  # [n, T, G]
    base_ptr,  # [T, H]
    slot_ptr,  # [n] int64
    y_ptr,  # [n, H]
    x_stride,
    delta_stride,
    y_stride,
    G: tl.constexpr,
    GROUP: tl.constexpr,  # channels of a group, a power of two
    TAPS: tl.constexpr,
    TAPS_PADDED: tl.constexpr,  # a power of two
    GROUPS: tl.constexpr,  # of a program
):
    row = tl.program_id(0).to(tl.int64)
    tap = tl.arange(0, TAPS_PADDED)[:, None, None]
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    channel = group * GROUP + tl.arange(0, GROUP)[None, None, :]
    seen = (tap < TAPS) & (tap <= tl.load(slot_ptr + row)) & (group < G)
    base = tl.load(base_ptr + tap * (G * GROUP) + channel, mask=seen & (channel >= 0), other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + row * delta_stride + tap * G + group, mask=seen, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + (row - tap) * x_stride + channel, mask=seen & (channel >= 0), other=0.0).to(tl.float32)
    y = tl.sum((base + delta) * x, 0)  # [GROUPS, GROUP]
    own = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[:, None]
    place = own * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(y_ptr + row * y_stride + place, y.to(y_ptr.dtype.element_ty), mask=(own < G) & (place >= 0))


@jit(do_not_specialize=["n", "rows"], do_not_specialize_on_alignment=["slot_ptr"])
def _block_conv_backward_kernel(
    dy_ptr,  # [n, H]
    x_ptr,  # [n, H]
    delta_ptr,  # [n, T, G]
    base_ptr,  # [T, H]
    slot_ptr,  # [n] int64
    dx_ptr,  # [n, H]
    ddelta_ptr,  # [n, T, G]
    partial_ptr,  # [P, T, H] float32
    n,
    rows,  # of a program
    dy_stride,
    x_stride,
    delta_stride,
    dx_stride,
    ddelta_stride,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows
    lanes = tl.arange(0, TAPS_PADDED)
    tap = lanes[:, None, None]
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    channel = group * GROUP + tl.arange(0, GROUP)[None, None, :]
    inside = (tap < TAPS) & (group < G) & (channel >= 0)
    own = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    place = own[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    base = tl.load(base_ptr + tap * (G * GROUP) + channel, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([TAPS_PADDED, GROUPS, GROUP], tl.float32)
    for row in tl.range(first, tl.minimum(first + rows, n)):
        # What this row read of the rows behind it.
        seen = inside & (tap <= tl.load(slot_ptr + row))
        x = tl.load(x_ptr + (row - tap) * x_stride + channel, mask=seen, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + place, mask=(own < G)[:, None] & (place >= 0), other=0.0).to(tl.float32)
        products = dy[None, :, :] * x
        sums += products
        at = ddelta_ptr + row * ddelta_stride + lanes[:, None] * G + own[None, :]
        ddelta = tl.sum(products, 2)  # [TAPS, GROUPS]
        tl.store(at, ddelta.to(ddelta_ptr.dtype.element_ty), mask=(lanes < TAPS)[:, None] & (own < G)[None, :])

        # What the rows before it read of this one: they are of its block where their slot is at least their tap.
        ahead = row + tap
        reads = (tap < TAPS) & (ahead < n)
        reads = reads & (tl.load(slot_ptr + ahead, mask=reads, other=-1) >= tap)
        delta = tl.load(delta_ptr + ahead * delta_stride + tap * G + group, mask=reads & (group < G), other=0.0)
        theirs = tl.load(dy_ptr + ahead * dy_stride + channel, mask=reads & inside, other=0.0).to(tl.float32)
        dx = tl.sum((base + delta.to(tl.float32)) * theirs, 0)
        tl.store(dx_ptr + row * dx_stride + place, dx.to(dx_ptr.dtype.element_ty), mask=(own < G)[:, None] & (place >= 0))
    tl.store(partial_ptr + (tl.program_id(0) * TAPS + tap) * (G * GROUP) + channel, sums, mask=inside)


def _block_conv(
    x: Tensor,  # [n, H]
    delta: Tensor,  # [n, T, G]
    base: Tensor,  # [T, H]
    slot: Tensor,  # [n]
    y: Tensor,  # [n, H]
    config: BlockConvConfig,
) -> None:
    (n, hidden), (_, taps, groups) = x.shape, delta.shape
    _block_conv_kernel[(n, triton.cdiv(groups, config.groups))](
        x,
        delta,
        base,
        slot,
        y,
        x.stride(0),
        delta.stride(0),
        y.stride(0),
        G=groups,
        GROUP=hidden // groups,
        TAPS=taps,
        TAPS_PADDED=triton.next_power_of_2(taps),
        GROUPS=config.groups,
        num_warps=config.num_warps,
    )


def _block_conv_backward(
    dy: Tensor,  # [n, H]
    x: Tensor,  # [n, H]
    delta: Tensor,  # [n, T, G]
    base: Tensor,  # [T, H]
    slot: Tensor,  # [n]
    dx: Tensor,  # [n, H]
    ddelta: Tensor,  # [n, T, G]
    dbase: Tensor,  # [T, H]
    partial: Tensor,  # [P, T, H]
    config: BlockConvConfig,
) -> None:
    (n, hidden), (_, taps, groups) = x.shape, delta.shape
    rows = triton.cdiv(n, min(n, len(partial)))
    programs = triton.cdiv(n, rows)
    _block_conv_backward_kernel[(programs, triton.cdiv(groups, config.groups))](
        dy,
        x,
        delta,
        base,
        slot,
        dx,
        ddelta,
        partial,
        n,
        rows,
        dy.stride(0),
        x.stride(0),
        delta.stride(0),
        dx.stride(0),
        ddelta.stride(0),
        G=groups,
        GROUP=hidden // groups,
        TAPS=taps,
        TAPS_PADDED=triton.next_power_of_2(taps),
        GROUPS=config.groups,
        num_warps=config.num_warps,
    )
    launch(dbase.add_, partial[:programs].sum(0))


@torch.no_grad()
def block_conv(
    x: Tensor,  # [n, H] bf16 or fp32 on a GPU, any float dtype on the CPU; any row stride
    delta: Tensor,  # [n, T, G] of x's dtype, each row in one piece
    base: Tensor,  # [T, H] of x's dtype
    slot: Tensor,  # [n] int64 place of the row in its block, whose rows follow each other from 0 on; not checked
    y: Tensor,  # [n, H] written, any row stride, not x
) -> None:
    """Writes the convolved rows. Allocates nothing on a GPU. Raises ValueError for what does not fit."""
    _check(x, delta, base, slot)
    check("y", y, x.shape, x.dtype, x.device, "rows")
    if len(x) == 0:
        return
    if x.is_cuda:
        _block_conv(x, delta, base, slot, y, block_conv_config(x.shape[1] // delta.shape[2]))
    else:
        y.copy_(block_conv_ref(x, delta, base, slot))


@torch.no_grad()
def block_conv_backward(
    dy: Tensor,  # [n, H] of x's dtype
    x: Tensor,  # [n, H] of the forward
    delta: Tensor,  # [n, T, G]
    base: Tensor,  # [T, H]
    slot: Tensor,  # [n] int64
    dx: Tensor,  # [n, H] written, of x's dtype, neither dy nor x
    ddelta: Tensor,  # [n, T, G] written, of x's dtype, each row in one piece
    dbase: Tensor,  # [T, H] float32 (float64) added to
    partial: Tensor,  # [P, T, H] float32 scratch, P up to PROGRAMS; unused on the CPU
) -> None:
    """Writes the gradients of rows and of their own numbers, and adds that of the channels' weights to dbase.

    The bits of dbase depend on n and P alone. Raises ValueError for what does not fit.
    """
    _check(x, delta, base, slot)
    stats = torch.promote_types(x.dtype, torch.float32)
    check("dy", dy, x.shape, x.dtype, x.device, "rows")
    check("dx", dx, x.shape, x.dtype, x.device, "rows")
    check("ddelta", ddelta, delta.shape, x.dtype, x.device, "rows")
    check("dbase", dbase, base.shape, stats, x.device, "whole")
    if len(x) == 0:
        return
    if x.is_cuda:
        check("partial", partial, ("P", *base.shape), stats, x.device, "whole")
        config = block_conv_config(x.shape[1] // delta.shape[2])
        _block_conv_backward(dy, x, delta, base, slot, dx, ddelta, dbase, partial, config)
        return
    found, of_delta, of_base = block_conv_backward_ref(dy, x, delta, base, slot)
    dx.copy_(found)
    ddelta.copy_(of_delta)
    dbase += of_base


def _check(x: Tensor, delta: Tensor, base: Tensor, slot: Tensor) -> None:
    check("x", x, ("n", "H"), layout="rows")
    n, hidden = x.shape
    check("delta", delta, (n, "T", "G"), x.dtype, x.device, "rows")
    check("base", base, (delta.shape[1], hidden), x.dtype, x.device, "whole")
    check("slot", slot, (n,), torch.int64, x.device)
    check_covered("block_conv", x=x)
    groups = delta.shape[2]
    if groups < 1 or hidden % groups:
        raise ValueError(f"delta has {groups} groups for {hidden} channels; they must divide them")
    if x.is_cuda and (hidden // groups) & (hidden // groups - 1):
        raise ValueError(f"the block_conv kernels need groups of a power of two of channels, these have {hidden // groups}")
