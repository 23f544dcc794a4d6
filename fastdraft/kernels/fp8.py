"""Rows in float8_e4m3fn with a power of two each, and products of such rows: `precision: fp8`.

    s_r = 2^ceil(log2(max_k |x_rk| / 448))     q_rk = e4m3(x_rk / s_r)     out[r, c] = s_r t_c sum_k q_rk p_ck

A scale that is a power of two divides exactly, so an element's only error is e4m3's rounding: |s q - x| <= 2^-4 |x| where
|x| >= 2^-6 s, and 2^-10 s below, s < amax / 224. The two orientations of a weight (`Fp8Weight`) round an element alike,
except the few that lie below 2^-6 of both scales, so forward and backward see one weight. A row that holds Inf or NaN has
that for its scale, so its products are not finite either.

The product is `torch._scaled_mm` on a GPU, which wants the number of columns to be a multiple of 16, and the dequantised
product on a CPU. `_scaled_mm` adds its partial sums in float32. When the tensor core kept them, 28672 terms of one sign
lost a third of their sum on an H100, and the step was no faster.
Bytes: rows move 3 an element (the second read hits L1), columns 5 (the second read is from memory).
Every maximum is exact, so two runs are bitwise equal.
Source: FP8 formats (arXiv 2209.05433); row-wise scales in training as torchao's `rowwise_with_gw_hp`.

# n rows, k columns, O outputs and I inputs of a weight
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastdraft.kernels.check import check, check_covered
from fastdraft.kernels.jit import jit, tl, triton

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
SMALLEST = 2.0**-118  # A smaller amax counts as this, so that scale and 1 / scale of any row are normal numbers.


class Fp8Rows(NamedTuple):
    q: Tensor  # [n, k] float8_e4m3fn, rows contiguous
    scale: Tensor  # [n] float32


@dataclass(frozen=True)
class Fp8Weight:
    """A weight [O, I] for both products of the step. `matmul.linear` and `linear_backward` take it like a tensor."""

    by_out: Fp8Rows  # [O, I], for x W^T, which sums over I
    by_in: Fp8Rows  # [I, O], for dz W, which sums over O
    room: Fp8Rows  # q [bytes], scale [rows], the scratch in which the other factor's rows are quantised
    dtype: torch.dtype  # of the weight that it was made of, and of what it multiplies

    @property
    def shape(self) -> torch.Size:
        return self.by_out.q.shape

    def __getitem__(self, outputs: slice) -> Fp8Weight:
        """Some rows of W, as indexing a tensor gives them."""
        by_out = Fp8Rows(self.by_out.q[outputs], self.by_out.scale[outputs])
        by_in = Fp8Rows(self.by_in.q[:, outputs], self.by_in.scale)
        return Fp8Weight(by_out, by_in, self.room, self.dtype)


def quantize_rows_ref(
    x: Tensor,  # [n, k]
) -> Fp8Rows:
    """The specification, of any dtype."""
    amax = x.abs().amax(1).float()
    # With the mantissa in [0.5, 1), amax / 448 lies above 2^(exponent - 9) exactly where the mantissa is above 448 / 512.
    mantissa, exponent = torch.frexp(amax.clamp_min(SMALLEST))
    scale = torch.ldexp(torch.ones_like(amax), exponent - 9 + (mantissa > LARGEST / 512).int())
    scale = torch.where(amax.isfinite(), scale, amax)
    return Fp8Rows((x / scale[:, None]).to(FP8), scale)


def dequantize(
    rows: Fp8Rows,
    dtype: torch.dtype,
) -> Tensor:  # [n, k]
    """What the rows stand for, exact in every dtype that has float32's range."""
    return rows.q.to(dtype) * rows.scale[:, None].to(dtype)


@dataclass(frozen=True)
class Fp8Config:
    tile: int  # columns of a row at a time
    num_warps: int


@cache
def fp8_config(
    columns: int,
) -> Fp8Config:
    """Each thread holds sixteen elements."""
    tile = min(max(64, 1 << (columns - 1).bit_length()), 4096)
    return Fp8Config(tile, num_warps=max(tile // 512, 1))


# The columns' kernel reads tiles of ROWS x COLUMNS, STAGES of them in flight. 4096 columns are 128 programs.
COLUMNS = 32
ROWS = 128
STAGES = 4


@jit
def _scale_of(peak):
    """(scale, 1 / scale) of the largest |x|, given as int32 bits, in which NaN is above Inf and Inf above all numbers."""
    tiny: tl.constexpr = (127 - 118) << 23
    # The largest number in [2^e, 2^(e + 1)) gets the exponent e where it is at most 1.75 * 2^e, and e + 1 above.
    fits = (tl.maximum(peak, tiny) + 0x1FFFFF) & 0x7F800000
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
    # The first pass finds the row's largest number, as bits. The second divides by the scale and rounds.
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
    """Writes x's rows in float8 with their scales. Allocates nothing on a GPU. Raises ValueError for what does not fit."""
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
    """Does what `quantize_rows` of x.T does, but reads x as it lies."""
    _check(x, out, tuple(x.shape)[::-1])
    if x.is_cuda:
        _quantize_columns(x, out)
    else:
        _copy(out, quantize_rows_ref(x.T))


def _copy(out: Fp8Rows, rows: Fp8Rows) -> None:
    for to, x in zip(out, rows, strict=True):
        to.copy_(x)


def _check(x: Tensor, out: Fp8Rows, shape: tuple[int, ...]) -> None:
    check("x", x, ("n", "k"), layout="rows")
    check("q", out.q, shape, FP8, x.device, "rows")
    check("scale", out.scale, shape[:1], torch.float32, x.device, "whole")
    check_covered("fp8", x=x)


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
    size = size // 256 * 256 or size  # The product computes whole tiles of 256 rows.
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
