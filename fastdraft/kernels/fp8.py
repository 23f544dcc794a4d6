"""Rows in float8_e4m3fn with a power of two each, and products of such rows: `precision: fp8`.

    s_r = 2^ceil(log2(max_k |x_rk| / 448))     q_rk = e4m3(x_rk / s_r)     out[r, c] = s_r t_c sum_k q_rk p_ck

A scale that is a power of two divides exactly, so an element's only error is e4m3's rounding: |s q - x| <= 2^-4 |x| where
|x| >= 2^-6 s, and 2^-10 s below, s < amax / 224. And the two orientations of a weight (`Fp8Weight`) round an element alike
but for the few below 2^-6 of both scales: forward and backward see one weight. A row with Inf or NaN has that for a scale,
so its products are not finite either.

The product is `torch._scaled_mm` on a GPU (it wants columns in 16s), the dequantised product on a CPU. Its partial sums are
float32: kept in the tensor core, 28672 terms of one sign lost a third of their sum on an H100, and the step was no faster.
Bytes: rows 3 an element (a second read hits L1), columns 5 (the second read is from memory).
Every maximum is exact: two runs are bitwise equal.
Source: FP8 formats (arXiv 2209.05433); row-wise scales in training as torchao's `rowwise_with_gw_hp`.

# n rows, k columns, O outputs and I inputs of a weight
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastdraft.kernels.jit import jit, tl, triton

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 2.0**-118  # an amax below counts as this: scale and 1 / scale stay normal numbers, also of a zero row


class Fp8Rows(NamedTuple):
    q: Tensor  # [n, k] float8_e4m3fn, rows contiguous
    scale: Tensor  # [n] float32


@dataclass(frozen=True)
class Fp8Weight:
    """A weight [O, I] for both products of the step; `matmul.linear` and `linear_backward` take it like a tensor."""

    by_out: Fp8Rows  # [O, I]: x W^T sums over I
    by_in: Fp8Rows  # [I, O]: dz W sums over O
    room: Fp8Rows  # q [bytes], scale [rows]: where the other factor's rows are quantised
    dtype: torch.dtype  # of the weight it was made of, and of what it multiplies

    @property
    def shape(self) -> torch.Size:
        return self.by_out.q.shape

    def __getitem__(self, outputs: slice) -> Fp8Weight:  # some rows of W, as of a tensor
        by_out, by_in = Fp8Rows(*(x[outputs] for x in self.by_out)), Fp8Rows(self.by_in.q[:, outputs], self.by_in.scale)
        return Fp8Weight(by_out, by_in, self.room, self.dtype)


def quantize_rows_ref(
    x: Tensor,  # [n, k]
) -> Fp8Rows:
    """The specification, of any dtype."""
    amax = x.abs().amax(1).float()
    mantissa, exponent = torch.frexp(amax.clamp_min(SMALLEST))  # mantissa in [0.5, 1)
    scale = torch.ldexp(torch.ones_like(amax), exponent - 9 + (mantissa > LARGEST / 512).int())
    scale = torch.where(amax.isfinite(), scale, amax)
    return Fp8Rows((x / scale[:, None]).to(FP8), scale)


def dequantize(
    rows: Fp8Rows,
    dtype: torch.dtype,  # exact in any with float32's range
) -> Tensor:  # [n, k]
    return rows.q.to(dtype) * rows.scale[:, None].to(dtype)


@dataclass(frozen=True)
class Fp8Config:
    tile: int  # columns of a row at a time
    num_warps: int


@cache
def fp8_config(
    columns: int,
) -> Fp8Config:
    """Sixteen elements a thread."""
    tile = min(max(64, 1 << (columns - 1).bit_length()), 4096)
    return Fp8Config(tile, num_warps=max(tile // 512, 1))


COLUMNS, ROWS, STAGES = 32, 128, 4  # tile of the columns' kernel, tiles in flight: 128 programs for 4096 columns


@jit
def _scale_of(peak):  # int32 bits of |x|'s largest, in which NaN > Inf > all numbers -> (scale, 1 / scale)
    tiny: tl.constexpr = (127 - 118) << 23
    fits = (tl.maximum(peak, tiny) + 0x1FFFFF) & 0x7F800000  # up to 1.75 * 2^e gives 2^e, above 2^(e + 1)
    finite = peak < 0x7F800000
    scale = tl.where(finite, fits - (8 << 23), peak)
    inverse = tl.where(finite, (254 << 23) - scale, 0)
    return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@jit
def _quantize_rows_kernel(
    x_ptr,  # [n, K]
    q_ptr,  # [n, K]
    scale_ptr,  # [n] float32
    x_stride,
    q_stride,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, TILE)
    peaks = tl.zeros([TILE], tl.int32)
    for start in range(0, K, TILE):
        x = tl.load(x_ptr + row * x_stride + start + lanes, mask=start + lanes < K, other=0.0)
        peaks = tl.maximum(peaks, tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True))
    scale, inverse = _scale_of(tl.max(peaks, 0))
    tl.store(scale_ptr + row, scale)
    for start in range(0, K, TILE):
        x = tl.load(x_ptr + row * x_stride + start + lanes, mask=start + lanes < K, other=0.0)
        q = (x.to(tl.float32) * inverse).to(tl.float8e4nv)
        tl.store(q_ptr + row * q_stride + start + lanes, q, mask=start + lanes < K)


@jit
def _quantize_columns_kernel(
    x_ptr,  # [n, K]
    q_ptr,  # [K, n]
    scale_ptr,  # [K] float32
    n,
    x_stride,
    q_stride,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    lanes = tl.arange(0, ROWS).to(tl.int64)
    peaks = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in tl.range(0, n, ROWS, num_stages=STAGES):
        rows = start + lanes
        inside = (rows < n)[:, None] & (cols < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside, other=0.0)
        peaks = tl.maximum(peaks, tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True))
    scale, inverse = _scale_of(tl.max(peaks, 0))
    tl.store(scale_ptr + cols, scale, mask=cols < K)
    for start in tl.range(0, n, ROWS, num_stages=STAGES):
        rows = start + lanes
        inside = (rows < n)[:, None] & (cols < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside, other=0.0)
        q = (x.to(tl.float32) * inverse[None, :]).to(tl.float8e4nv)
        tl.store(q_ptr + cols[None, :] * q_stride + rows[:, None], q, mask=inside)


def _quantize_rows(
    x: Tensor,  # [n, k]
    out: Fp8Rows,  # [n, k]
    config: Fp8Config,
) -> None:
    _quantize_rows_kernel[(len(x),)](
        x, *out, x.stride(0), out.q.stride(0), K=x.shape[1], TILE=config.tile, num_warps=config.num_warps
    )


def _quantize_columns(
    x: Tensor,  # [n, k]
    out: Fp8Rows,  # [k, n]
) -> None:
    n, k = x.shape
    _quantize_columns_kernel[(triton.cdiv(k, COLUMNS),)](
        x, *out, n, x.stride(0), out.q.stride(0), K=k, ROWS=ROWS, COLUMNS=COLUMNS, STAGES=STAGES, num_warps=4
    )


@torch.no_grad()
def quantize_rows(
    x: Tensor,  # [n, k] bf16 or fp32 on a GPU, any float dtype on the CPU; any row stride
    out: Fp8Rows,  # [n, k] written
) -> None:
    """Allocates nothing on a GPU. Raises ValueError for what does not fit."""
    _check(x, out, tuple(x.shape))
    if x.is_cuda:
        _quantize_rows(x, out, fp8_config(x.shape[1]))
    else:
        _copy(out, quantize_rows_ref(x))


@torch.no_grad()
def quantize_columns(
    x: Tensor,  # [n, k] as for `quantize_rows`
    out: Fp8Rows,  # [k, n] written: the rows of x's transpose
) -> None:
    """`quantize_rows` of x.T, reading x as it lies."""
    _check(x, out, tuple(x.shape)[::-1])
    if x.is_cuda:
        _quantize_columns(x, out)
    else:
        _copy(out, quantize_rows_ref(x.T))


def _copy(out: Fp8Rows, rows: Fp8Rows) -> None:
    for to, x in zip(out, rows, strict=True):
        to.copy_(x)


def _check(x: Tensor, out: Fp8Rows, shape: tuple[int, ...]) -> None:
    q, scale = out
    if x.ndim != 2 or q.shape != shape or scale.shape != shape[:1] or q.dtype != FP8 or scale.dtype != torch.float32:
        raise ValueError(
            f"x {tuple(x.shape)} gives q {shape} {FP8} and a float32 scale a row, not {tuple(q.shape)} {q.dtype}, "
            f"{tuple(scale.shape)} {scale.dtype}"
        )
    if x.stride(1) != 1 or q.stride(1) != 1 or not scale.is_contiguous() or len({x.device, q.device, scale.device}) > 1:
        raise ValueError(f"x, strides {x.stride()}, and q, {q.stride()}, need contiguous rows, all one device")
    if x.is_cuda and (x.dtype not in (torch.bfloat16, torch.float32) or triton is None):
        raise ValueError(f"the fp8 kernels need Triton and torch.bfloat16 or torch.float32, not {x.dtype}")


@torch.no_grad()
def multiply(
    x: Tensor,  # [n, k] of out's dtype, any row stride
    rows: Fp8Rows,  # [m, k]
    room: Fp8Rows,  # q [bytes], scale [rows]
    out: Tensor,  # [n, m] written: x rows^T, bf16 on a GPU
) -> None:
    """Quantises as many rows of x at a time as `room` holds, and multiplies them."""
    k = x.shape[1]
    size = min(len(room.q) // k, len(room.scale))
    size = size // 256 * 256 or size  # whole tiles of the product
    for part, result in zip(x.split(size), out.split(size), strict=True):
        quantized = Fp8Rows(room.q[: part.numel()].view(part.shape), room.scale[: len(part)])
        quantize_rows(part, quantized)
        if x.is_cuda:
            torch._scaled_mm(
                quantized.q,
                rows.q.T,
                scale_a=quantized.scale[:, None],
                scale_b=rows.scale[None, :],
                out_dtype=out.dtype,
                use_fast_accum=False,
                out=result,
            )
        else:
            torch.mm(dequantize(quantized, x.dtype), dequantize(rows, x.dtype).T, out=result)
