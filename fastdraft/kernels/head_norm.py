"""RMSNorm over each head, then RoPE, and back: from the raw product of a projection to rotated queries or keys.

Row j of a head, of input row s_j = z[rows[j]], or z[j], by the row's RoPE position:

    r = 1 / sqrt(mean(s^2) + eps)     y = w * round(s r)     out: (a, b) -> (a cos - b sin, b cos + a sin)
    backward: dy = the rotation back of dout,  xhat = s r,  c = mean(dy w xhat):
        dz_j = r (dy w - xhat c)          dw += sum over rows and heads of dy xhat

The rotation is the half-split form on the first rotary_dim channels; the others pass through. 1/rms is not kept: the
backward reads s anyway. `rows` lets many rows read one, as the masked rows of blocks do: dz is then that of each row.

Precision: everything inside a row is float32. s r rounds before the product with w, as serving engines do, y rounds before
the rotation, cos and sin are rounded to the dtype, and each store rounds once. The backward does not round in between.
Bytes a row of width W: the forward reads and writes W numbers, the backward reads 2 W and writes W.
For dw each of P programs keeps the sum over a fixed set of rows in registers and writes it to partial[p]; a second kernel
adds the P sums in order. So two runs are bitwise equal.
Source: RMSNorm (arXiv 1910.07467), RoPE (arXiv 2104.09864); Qwen3's norm of queries and keys.

# n rows, m input rows, D head dim, P programs of the backward
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastdraft.kernels.chain_qkv import _cos_sin, cos_sin, rotate
from fastdraft.kernels.check import AtLeast, check, check_covered
from fastdraft.kernels.jit import jit, tl, triton
from fastdraft.kernels.rms_norm import (
    REDUCE_COLS,
    REDUCE_ROWS,
    _add_partial_kernel,
    rms_norm_backward_ref,
    rms_norm_ref,
)


def head_norm_ref(
    z: Tensor,  # [n, heads * D]
    weight: Tensor,  # [D]
    eps: float,
    position: Tensor,  # [n] int64
    freqs: Tensor,  # [rotary_dim/2]
    factor: float,
) -> Tensor:  # [n, heads, D]
    """The specification, any dtype, differentiable."""
    y = rms_norm_ref(z.unflatten(1, (-1, len(weight))), weight, eps)[0]
    return rotate(y, *cos_sin(position, freqs, factor, z.dtype))


def head_norm_backward_ref(
    dout: Tensor,  # [n, heads, D]
    z: Tensor,  # [n, heads * D]
    weight: Tensor,  # [D]
    eps: float,
    position: Tensor,  # [n] int64
    freqs: Tensor,  # [rotary_dim/2]
    factor: float,
) -> tuple[Tensor, Tensor]:  # dz [n, heads * D], dweight [D], both in at least float32
    """The gradients of `head_norm_ref`, unrounded."""
    x = z.unflatten(1, (-1, len(weight)))
    work = torch.promote_types(z.dtype, torch.float32)
    cos, sin = (x.to(work) for x in cos_sin(position, freqs, factor, z.dtype))
    dy = rotate(dout.to(work), cos, -sin)
    r = rms_norm_ref(x, weight, eps)[1]
    dz, dweight = rms_norm_backward_ref(dy.flatten(0, 1), x.flatten(0, 1), r.flatten(0, 1), weight)
    return dz.view(len(z), -1), dweight


@dataclass(frozen=True)
class HeadNormConfig:
    heads: int  # heads of a tile
    num_warps: int


@cache
def head_norm_config(
    rotary_dim: int,
) -> HeadNormConfig:
    """Each thread holds eight numbers of each half, as in `chain_qkv`; not tuned by itself."""
    half = max(8, 1 << (rotary_dim // 2 - 1).bit_length())
    return HeadNormConfig(max(1, 512 // half), num_warps=2)


@jit
def _load_head(
    ptr, head, HEADS: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr
):
    """Channels FIRST to FIRST + SIZE of some heads, in float32, 0 where there are none: [TILE, ROOM]."""
    lanes = tl.arange(0, ROOM)[None, :]
    inside = (head < HEADS) & (lanes < SIZE)
    return tl.load(ptr + head * D + FIRST + lanes, mask=inside, other=0.0).to(tl.float32)


@jit
def _store_head(
    ptr, value, head, HEADS: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr
):
    lanes = tl.arange(0, ROOM)[None, :]
    inside = (head < HEADS) & (lanes < SIZE)
    tl.store(ptr + head * D + FIRST + lanes, value.to(ptr.dtype.element_ty), mask=inside)


@jit
def _load_weight(ptr, FIRST: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr):
    lanes = tl.arange(0, ROOM)
    return tl.load(ptr + FIRST + lanes, mask=lanes < SIZE, other=0.0).to(tl.float32)[None, :]


@jit
def _normed(x, r, w, dtype: tl.constexpr):
    """round(w round(x r)), in float32."""
    return (w * (x * r).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@jit(do_not_specialize_on_alignment=["rows_ptr", "position_ptr"])
def _head_norm_kernel(
    z_ptr,  # [m, HEADS * D]
    rows_ptr,  # [n] int64
    weight_ptr,  # [D]
    position_ptr,  # [n] int64
    freqs_ptr,  # [HALF] float32
    out_ptr,  # [n, HEADS, D]
    factor,
    eps,
    z_stride,
    out_stride,
    INDEXED: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST_P: tl.constexpr,  # D - 2 HALF to a power of two, 0 where all rotates
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(rows_ptr + row) if INDEXED else row
    z_ptr += source * z_stride
    out_ptr += row * out_stride
    dtype = z_ptr.dtype.element_ty
    cos, sin = _cos_sin(tl.load(position_ptr + row), freqs_ptr, factor, HALF, HALF_P, dtype)
    w_a = _load_weight(weight_ptr, 0, HALF, HALF_P)
    w_b = _load_weight(weight_ptr, HALF, HALF, HALF_P)
    for first in range(0, HEADS, TILE):
        head = first + tl.arange(0, TILE)[:, None]
        a = _load_head(z_ptr, head, HEADS, D, 0, HALF, HALF_P)
        b = _load_head(z_ptr, head, HEADS, D, HALF, HALF, HALF_P)
        squares = tl.sum(a * a + b * b, 1)
        if REST_P > 0:
            rest = _load_head(z_ptr, head, HEADS, D, 2 * HALF, D - 2 * HALF, REST_P)
            squares += tl.sum(rest * rest, 1)
        r = tl.rsqrt(squares / D + eps)[:, None]
        a = _normed(a, r, w_a, dtype)
        b = _normed(b, r, w_b, dtype)
        _store_head(out_ptr, a * cos - b * sin, head, HEADS, D, 0, HALF, HALF_P)
        _store_head(out_ptr, b * cos + a * sin, head, HEADS, D, HALF, HALF, HALF_P)
        if REST_P > 0:
            w = _load_weight(weight_ptr, 2 * HALF, D - 2 * HALF, REST_P)
            _store_head(out_ptr, _normed(rest, r, w, dtype), head, HEADS, D, 2 * HALF, D - 2 * HALF, REST_P)


@jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["rows_ptr", "position_ptr"])
def _head_norm_backward_kernel(
    dout_ptr,  # [n, HEADS, D]
    z_ptr,  # [m, HEADS * D]
    rows_ptr,  # [n] int64
    weight_ptr,  # [D]
    position_ptr,  # [n] int64
    freqs_ptr,  # [HALF] float32
    dz_ptr,  # [n, HEADS * D]
    partial_ptr,  # [P, D] float32
    factor,
    eps,
    n,
    dout_stride,
    z_stride,
    dz_stride,
    INDEXED: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST_P: tl.constexpr,
    TILE: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64)
    w_a = _load_weight(weight_ptr, 0, HALF, HALF_P)
    w_b = _load_weight(weight_ptr, HALF, HALF, HALF_P)
    dw_a = tl.zeros([TILE, HALF_P], tl.float32)
    dw_b = tl.zeros([TILE, HALF_P], tl.float32)
    if REST_P > 0:
        w_rest = _load_weight(weight_ptr, 2 * HALF, D - 2 * HALF, REST_P)
        dw_rest = tl.zeros([TILE, REST_P], tl.float32)
    for row in tl.range(first_row, n, tl.num_programs(0)):
        source = tl.load(rows_ptr + row) if INDEXED else row
        z_row = z_ptr + source * z_stride
        dout_row = dout_ptr + row * dout_stride
        dz_row = dz_ptr + row * dz_stride
        cos, sin = _cos_sin(tl.load(position_ptr + row), freqs_ptr, factor, HALF, HALF_P, z_ptr.dtype.element_ty)
        for first in range(0, HEADS, TILE):
            head = first + tl.arange(0, TILE)[:, None]
            a = _load_head(z_row, head, HEADS, D, 0, HALF, HALF_P)
            b = _load_head(z_row, head, HEADS, D, HALF, HALF, HALF_P)
            da = _load_head(dout_row, head, HEADS, D, 0, HALF, HALF_P)
            db = _load_head(dout_row, head, HEADS, D, HALF, HALF, HALF_P)
            squares = tl.sum(a * a + b * b, 1)
            if REST_P > 0:
                rest = _load_head(z_row, head, HEADS, D, 2 * HALF, D - 2 * HALF, REST_P)
                squares += tl.sum(rest * rest, 1)
            r = tl.rsqrt(squares / D + eps)[:, None]
            a *= r
            b *= r
            back_a = da * cos + db * sin
            back_b = db * cos - da * sin
            dw_a += back_a * a
            dw_b += back_b * b
            back_a *= w_a
            back_b *= w_b
            along = tl.sum(back_a * a + back_b * b, 1)
            if REST_P > 0:
                rest *= r
                back_rest = _load_head(dout_row, head, HEADS, D, 2 * HALF, D - 2 * HALF, REST_P)
                dw_rest += back_rest * rest
                back_rest *= w_rest
                along += tl.sum(back_rest * rest, 1)
            along = (along / D)[:, None]
            _store_head(dz_row, r * (back_a - a * along), head, HEADS, D, 0, HALF, HALF_P)
            _store_head(dz_row, r * (back_b - b * along), head, HEADS, D, HALF, HALF, HALF_P)
            if REST_P > 0:
                _store_head(dz_row, r * (back_rest - rest * along), head, HEADS, D, 2 * HALF, D - 2 * HALF, REST_P)
    partial_ptr += first_row * D
    lanes = tl.arange(0, HALF_P)
    tl.store(partial_ptr + lanes, tl.sum(dw_a, 0), mask=lanes < HALF)
    tl.store(partial_ptr + HALF + lanes, tl.sum(dw_b, 0), mask=lanes < HALF)
    if REST_P > 0:
        lanes = tl.arange(0, REST_P)
        tl.store(partial_ptr + 2 * HALF + lanes, tl.sum(dw_rest, 0), mask=lanes < D - 2 * HALF)


def _constants(heads: int, dim: int, half: int, rows: Tensor | None, config: HeadNormConfig) -> dict[str, int]:
    rest = dim - 2 * half
    return {
        "INDEXED": rows is not None,
        "HEADS": heads,
        "D": dim,
        "HALF": half,
        "HALF_P": triton.next_power_of_2(half),
        "REST_P": triton.next_power_of_2(rest) if rest else 0,
        "TILE": config.heads,
        "num_warps": config.num_warps,
    }


def _head_norm(
    z: Tensor,  # [m, heads * D]
    weight: Tensor,  # [D]
    eps: float,
    position: Tensor,  # [n]
    freqs: Tensor,  # [rotary_dim/2]
    factor: float,
    out: Tensor,  # [n, heads, D]
    rows: Tensor | None,  # [n]
    config: HeadNormConfig,
) -> None:
    n, heads, dim = out.shape
    if n == 0:
        return
    constants = _constants(heads, dim, len(freqs), rows, config)
    _head_norm_kernel[(n,)](z, rows, weight, position, freqs, out, factor, eps, z.stride(0), out.stride(0), **constants)


def _head_norm_backward(
    dout: Tensor,  # [n, heads, D]
    z: Tensor,  # [m, heads * D]
    weight: Tensor,  # [D]
    eps: float,
    position: Tensor,  # [n]
    freqs: Tensor,  # [rotary_dim/2]
    factor: float,
    dz: Tensor,  # [n, heads * D]
    dweight: Tensor,  # [D]
    partial: Tensor,  # [P, D]
    rows: Tensor | None,  # [n]
    config: HeadNormConfig,
) -> None:
    n, heads, dim = dout.shape
    if n == 0:
        return
    programs = min(n, len(partial))
    _head_norm_backward_kernel[(programs,)](
        dout,
        z,
        rows,
        weight,
        position,
        freqs,
        dz,
        partial,
        factor,
        eps,
        n,
        dout.stride(0),
        z.stride(0),
        dz.stride(0),
        **_constants(heads, dim, len(freqs), rows, config),
    )
    _add_partial_kernel[(triton.cdiv(dim, REDUCE_COLS),)](
        partial, dweight, programs, H=dim, ROWS=REDUCE_ROWS, COLS=REDUCE_COLS, num_warps=8
    )


@torch.no_grad()
def head_norm(
    z: Tensor,  # [m, heads * D] raw products, bf16 or fp32 on a GPU, any float dtype on the CPU; any row stride
    weight: Tensor,  # [D] of z's dtype
    eps: float,
    position: Tensor,  # [n] int64 RoPE positions, 0 <= position < 2^24
    freqs: Tensor,  # [rotary_dim/2] float32 inverse frequencies
    factor: float,  # on cos and sin
    out: Tensor,  # [n, heads, D] written; any row stride
    rows: Tensor | None = None,  # [n] int64 input row of each output row; None: j
) -> None:
    """Writes the normed and rotated heads. Allocates nothing on a GPU. Indices are not checked there. Raises ValueError for
    what does not fit."""
    _check("out", out, z, weight, position, freqs, rows)
    check("out", out, ("n", "heads", "D"), z.dtype)
    if z.is_cuda:
        _head_norm(z, weight, eps, position, freqs, factor, out, rows, head_norm_config(2 * len(freqs)))
        return
    source = z[: len(out)] if rows is None else z[rows]
    out.copy_(head_norm_ref(source, weight, eps, position, freqs, factor))


@torch.no_grad()
def head_norm_backward(
    dout: Tensor,  # [n, heads, D] bf16 or fp32 on a GPU; any row stride
    z: Tensor,  # [m, heads * D] of the forward
    weight: Tensor,  # [D]
    eps: float,
    position: Tensor,  # [n] int64
    freqs: Tensor,  # [rotary_dim/2] float32
    factor: float,
    dz: Tensor,  # [n, heads * D] written, of any of the dtypes; any row stride
    dweight: Tensor,  # [D] float32 (float64) added to
    partial: Tensor,  # [P, D] float32 scratch, contiguous, P = rms_norm_partials(D, device); unused on the CPU
    rows: Tensor | None = None,  # [n] int64 row of z; None: j
) -> None:
    """Writes the gradient of each row's products and adds the weight's to dweight. Allocates nothing on a GPU. Raises
    ValueError for what does not fit."""
    _check("dout", dout, z, weight, position, freqs, rows)
    stats = torch.promote_types(z.dtype, torch.float32)
    check("dz", dz, (len(dout), z.shape[1]), None, z.device, "rows")
    check("dweight", dweight, weight.shape, stats, z.device)
    check_covered("head_norm", dz=dz)
    if z.is_cuda:
        check("partial", partial, ("P", len(weight)), stats, z.device, "whole")
        config = head_norm_config(2 * len(freqs))
        _head_norm_backward(dout, z, weight, eps, position, freqs, factor, dz, dweight, partial, rows, config)
        return
    source = z[: len(dout)] if rows is None else z[rows]
    gradient, dw = head_norm_backward_ref(dout, source, weight, eps, position, freqs, factor)
    dz.copy_(gradient)
    dweight += dw


def _check(name: str, x: Tensor, z: Tensor, weight: Tensor, position: Tensor, freqs: Tensor, rows: Tensor | None) -> None:
    """Raises ValueError for shapes, strides, dtypes or devices that do not fit; x is out or dout."""
    check("weight", weight, ("D",), z.dtype, z.device, "whole")
    dim = len(weight)
    check(name, x, ("n", "heads", dim), None, z.device, "rows")
    n, heads, _ = x.shape
    check("z", z, ("m" if rows is not None else AtLeast(n), heads * dim), layout="rows")
    check("position", position, (n,), torch.int64, z.device)
    check("rows", rows, (n,), torch.int64, z.device)
    check("freqs", freqs, ("rotary_dim/2",), torch.float32, z.device)
    if not 0 < 2 * len(freqs) <= dim:
        raise ValueError(f"freqs is {tuple(freqs.shape)}; [rotary_dim/2] with rotary_dim in 2..{dim} is needed")
    check_covered("head_norm", z=z, **{name: x})
