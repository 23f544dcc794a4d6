"""From the projection of the hidden half to a step's rotated q, k, v, and back.

QKV of row j is W_h hn_j + W_e en_u, where u = e_row[j] is the token that the row reads. The second product, e, is computed
once per token. A step adds it, rotates q and k by the row's RoPE position, and splits. The rotation is the half-split form
on the first rotary_dim channels of a head; the other channels pass through:

    x = round(z_j + e_u)          q, k: (a, b) -> (a cos - b sin, b cos + a sin),  angle = position_j * freqs
    backward: dz_j = round((da, db) -> (da cos + db sin, db cos - da sin)), dv as it is;  de_u += dz_j

z may hold q alone (step 0), q | k | v, or k | v alone (K^0, V^0 of a pack).
Precision: angles, sines and products are float32. The sines are libdevice's, whose reduction is exact for any position. cos
and sin are rounded to the dtype, as `Rope` gives them, and each store rounds once. dk, dv and de are float32 sums.
Bytes a row of width W: the forward moves 3 W numbers; the backward moves dq, dk, dv and dz, and reads and writes de.
e_row names a token once, so de is added to by plain load and store, and two runs are bitwise equal.
Source: RoPE (arXiv 2104.09864); docs/mathematics.md (c), the shared embedding half.

# n rows, m embedding rows, Hq/Hkv heads, D head dim, W = (Hq + 2 Hkv) * D, without what z does not hold
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastdraft.kernels.check import AtLeast, check, check_covered
from fastdraft.kernels.jit import jit, tl, triton


def cos_sin(
    positions: Tensor,  # [n] int64
    freqs: Tensor,  # [rotary_dim/2] float32
    factor: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # cos, sin [n, rotary_dim/2]
    """RoPE's cos and sin of the positions, computed in at least float32."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions.to(work)[:, None] * freqs.to(work)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(
    x: Tensor,  # [n, heads, D]
    cos: Tensor,  # [n, rotary_dim/2]
    sin: Tensor,  # [n, rotary_dim/2]
) -> Tensor:  # [n, heads, D]
    """The rotation of every head. Channels from rotary_dim on pass through."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos = cos[:, None]
    sin = sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def chain_qkv_ref(
    z: Tensor,  # [n, W]
    e: Tensor | None,  # [m, >= W]
    e_row: Tensor | None,  # [n] int64
    position: Tensor,  # [n] int64
    freqs: Tensor,  # [rotary_dim/2]
    factor: float,
    heads: int,  # Hq, 0 without q
    kv_heads: int,  # Hkv, 0 without k and v
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # q [n, Hq, D], k, v [n, Hkv, D]
    """The specification, any dtype."""
    x = z if e is None else z + e[e_row, : z.shape[1]]
    q, k, v = x.unflatten(-1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
    cos, sin = cos_sin(position, freqs, factor, z.dtype)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def chain_qkv_backward_ref(
    dq: Tensor | None,  # [n, Hq, D]
    dk: Tensor | None,  # [n, Hkv, D]
    dv: Tensor | None,  # [n, Hkv, D]
    position: Tensor,  # [n] int64
    freqs: Tensor,  # [rotary_dim/2]
    factor: float,
    dtype: torch.dtype,  # of z
) -> Tensor:  # dz [n, W] in dtype
    """The specification, any dtype. The rotation's transpose is the rotation back."""
    cos, sin = cos_sin(position, freqs, factor, dtype)
    parts = [rotate(d, cos.to(d.dtype), -sin.to(d.dtype)) for d in (dq, dk) if d is not None]
    parts += [dv] if dv is not None else []
    return torch.cat([d.flatten(1).to(dtype) for d in parts], -1)


@dataclass(frozen=True)
class ChainQKVConfig:
    heads: int  # heads of a tile
    num_warps: int


@cache
def chain_qkv_config(
    rotary_dim: int,
) -> ChainQKVConfig:
    """Each thread holds eight numbers of each half. Every warp computes the row's sines anew, so few are faster."""
    half = max(8, 1 << (rotary_dim // 2 - 1).bit_length())
    return ChainQKVConfig(max(1, 512 // half), num_warps=2)


@jit
def _cos_sin(position, freqs_ptr, factor, HALF: tl.constexpr, HALF_P: tl.constexpr, dtype: tl.constexpr):
    """cos and sin [1, HALF_P], rounded to dtype and given in float32."""
    lanes = tl.arange(0, HALF_P)
    angle = position.to(tl.float32) * tl.load(freqs_ptr + lanes, mask=lanes < HALF, other=0.0)
    cos = (tl.cos(angle) * factor).to(dtype).to(tl.float32)
    sin = (tl.sin(angle) * factor).to(dtype).to(tl.float32)
    return cos[None, :], sin[None, :]


@jit
def _sum(z_ptr, e_ptr, inside, HAS_E: tl.constexpr):
    """round(z + e) where `inside` holds, given in float32."""
    z = tl.load(z_ptr, mask=inside, other=0.0)
    if HAS_E:
        e = tl.load(e_ptr, mask=inside, other=0.0)
        return (z.to(tl.float32) + e.to(tl.float32)).to(z.dtype).to(tl.float32)
    else:
        return z.to(tl.float32)


@jit
def _rotate_heads(
    z_ptr,  # [HEADS * D] of a row
    e_ptr,  # [HEADS * D] of its token
    out_ptr,  # [HEADS, D]
    cos,  # [1, HALF_P]
    sin,  # [1, HALF_P]
    HAS_E: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST_P: tl.constexpr,  # D - 2 HALF to a power of two, 0 where all rotates
    TILE: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    lanes = tl.arange(0, HALF_P)[None, :]
    for first in range(0, HEADS, TILE):
        head = first + tl.arange(0, TILE)[:, None]
        inside = (head < HEADS) & (lanes < HALF)
        at = head * D + lanes
        a = _sum(z_ptr + at, e_ptr + at, inside, HAS_E)
        b = _sum(z_ptr + at + HALF, e_ptr + at + HALF, inside, HAS_E)
        tl.store(out_ptr + at, (a * cos - b * sin).to(dtype), mask=inside)
        tl.store(out_ptr + at + HALF, (b * cos + a * sin).to(dtype), mask=inside)
        if REST_P > 0:
            rest = 2 * HALF + tl.arange(0, REST_P)[None, :]
            inside = (head < HEADS) & (rest < D)
            at = head * D + rest
            tl.store(out_ptr + at, _sum(z_ptr + at, e_ptr + at, inside, HAS_E).to(dtype), mask=inside)


@jit(do_not_specialize_on_alignment=["e_row_ptr", "position_ptr"])
def _chain_qkv_kernel(
    z_ptr,  # [n, W]
    e_ptr,  # [m, >= W]
    e_row_ptr,  # [n] int64
    position_ptr,  # [n] int64
    freqs_ptr,  # [HALF] float32
    q_ptr,  # [n, HQ, D]
    k_ptr,  # [n, HKV, D]
    v_ptr,  # [n, HKV, D]
    factor,
    z_stride,
    e_stride,
    q_stride,
    k_stride,
    v_stride,
    HAS_E: tl.constexpr,
    HQ: tl.constexpr,  # 0 without q
    HKV: tl.constexpr,  # 0 without k and v
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST_P: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    if HAS_E:
        e_ptr += tl.load(e_row_ptr + row) * e_stride
    cos, sin = _cos_sin(tl.load(position_ptr + row), freqs_ptr, factor, HALF, HALF_P, z_ptr.dtype.element_ty)
    if HQ > 0:
        q_ptr += row * q_stride
        _rotate_heads(z_ptr, e_ptr, q_ptr, cos, sin, HAS_E, HQ, D, HALF, HALF_P, REST_P, TILE)
    if HKV > 0:
        z_ptr += HQ * D
        if HAS_E:
            e_ptr += HQ * D
        k_ptr += row * k_stride
        _rotate_heads(z_ptr, e_ptr, k_ptr, cos, sin, HAS_E, HKV, D, HALF, HALF_P, REST_P, TILE)
        WIDTH: tl.constexpr = HKV * D
        v_ptr += row * v_stride
        for first in range(0, WIDTH, TILE * HALF_P):
            cols = first + tl.arange(0, TILE * HALF_P)
            inside = cols < WIDTH
            v = _sum(z_ptr + WIDTH + cols, e_ptr + WIDTH + cols, inside, HAS_E)
            tl.store(v_ptr + cols, v.to(v_ptr.dtype.element_ty), mask=inside)


@jit
def _write_gradient(value, dz_ptr, de_ptr, inside, HAS_E: tl.constexpr):
    """Stores the rounded value, and adds the same number to de."""
    rounded = value.to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr, rounded, mask=inside)
    if HAS_E:
        old = tl.load(de_ptr, mask=inside, other=0.0)
        tl.store(de_ptr, old + rounded.to(tl.float32), mask=inside)


@jit
def _rotate_heads_back(
    d_ptr,  # [HEADS, D] of a row
    dz_ptr,  # [HEADS * D]
    de_ptr,  # [HEADS * D] of its token
    cos,  # [1, HALF_P]
    sin,  # [1, HALF_P]
    HAS_E: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST_P: tl.constexpr,
    TILE: tl.constexpr,
):
    lanes = tl.arange(0, HALF_P)[None, :]
    for first in range(0, HEADS, TILE):
        head = first + tl.arange(0, TILE)[:, None]
        inside = (head < HEADS) & (lanes < HALF)
        at = head * D + lanes
        a = tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(d_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
        _write_gradient(a * cos + b * sin, dz_ptr + at, de_ptr + at, inside, HAS_E)
        _write_gradient(b * cos - a * sin, dz_ptr + at + HALF, de_ptr + at + HALF, inside, HAS_E)
        if REST_P > 0:
            rest = 2 * HALF + tl.arange(0, REST_P)[None, :]
            inside = (head < HEADS) & (rest < D)
            at = head * D + rest
            d = tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float32)
            _write_gradient(d, dz_ptr + at, de_ptr + at, inside, HAS_E)


@jit(do_not_specialize_on_alignment=["e_row_ptr", "position_ptr"])
def _chain_qkv_backward_kernel(
    dz_ptr,  # [n, W]
    de_ptr,  # [m, >= W] float32
    e_row_ptr,  # [n] int64
    position_ptr,  # [n] int64
    freqs_ptr,  # [HALF] float32
    dq_ptr,  # [n, HQ, D]
    dk_ptr,  # [n, HKV, D]
    dv_ptr,  # [n, HKV, D]
    factor,
    dz_stride,
    de_stride,
    dq_stride,
    dk_stride,
    dv_stride,
    HAS_E: tl.constexpr,
    HQ: tl.constexpr,  # 0 without q
    HKV: tl.constexpr,  # 0 without k and v
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST_P: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dz_ptr += row * dz_stride
    if HAS_E:
        de_ptr += tl.load(e_row_ptr + row) * de_stride
    cos, sin = _cos_sin(tl.load(position_ptr + row), freqs_ptr, factor, HALF, HALF_P, dz_ptr.dtype.element_ty)
    if HQ > 0:
        dq_ptr += row * dq_stride
        _rotate_heads_back(dq_ptr, dz_ptr, de_ptr, cos, sin, HAS_E, HQ, D, HALF, HALF_P, REST_P, TILE)
    if HKV > 0:
        dz_ptr += HQ * D
        if HAS_E:
            de_ptr += HQ * D
        dk_ptr += row * dk_stride
        _rotate_heads_back(dk_ptr, dz_ptr, de_ptr, cos, sin, HAS_E, HKV, D, HALF, HALF_P, REST_P, TILE)
        WIDTH: tl.constexpr = HKV * D
        dv_ptr += row * dv_stride
        for first in range(0, WIDTH, TILE * HALF_P):
            cols = first + tl.arange(0, TILE * HALF_P)
            inside = cols < WIDTH
            d = tl.load(dv_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            _write_gradient(d, dz_ptr + WIDTH + cols, de_ptr + WIDTH + cols, inside, HAS_E)


def _chain_qkv(
    kernel,  # forward, or backward, for which z, e, q, k and v are gradients
    z: Tensor,  # [n, W]
    e: Tensor | None,  # [m, >= W]
    e_row: Tensor | None,  # [n]
    position: Tensor,  # [n]
    freqs: Tensor,  # [rotary_dim/2]
    factor: float,
    q: Tensor | None,  # [n, Hq, D]
    k: Tensor | None,  # [n, Hkv, D]
    v: Tensor | None,  # [n, Hkv, D]
    config: ChainQKVConfig,
) -> None:
    n, _, dim = (k if q is None else q).shape
    half = len(freqs)
    rest = dim - 2 * half
    kernel[(n,)](
        z,
        z if e is None else e,  # Without e, z stands in its place and is not read there.
        e_row,
        position,
        freqs,
        q,
        k,
        v,
        factor,
        *(0 if x is None else x.stride(0) for x in (z, e, q, k, v)),
        HAS_E=e is not None,
        HQ=0 if q is None else q.shape[1],
        HKV=0 if k is None else k.shape[1],
        D=dim,
        HALF=half,
        HALF_P=triton.next_power_of_2(half),
        REST_P=triton.next_power_of_2(rest) if rest else 0,
        TILE=config.heads,
        num_warps=config.num_warps,
    )


@torch.no_grad()
def chain_qkv(
    z: Tensor,  # [n, W] product with the hidden half, bf16 or fp32 on a GPU, any float dtype on the CPU; any row stride
    e: Tensor | None,  # [m, >= W] the embedding's share of z's dtype, any row stride; None: z has it already
    e_row: Tensor | None,  # [n] int64 row of e; None with e
    position: Tensor,  # [n] int64 RoPE positions, 0 <= position < 2^24
    freqs: Tensor,  # [rotary_dim/2] float32 inverse frequencies
    factor: float,  # on cos and sin
    q: Tensor | None,  # [n, Hq, D] written, rotated; any row stride
    k: Tensor | None,  # [n, Hkv, D] written, rotated; any row stride
    v: Tensor | None,  # [n, Hkv, D] written; any row stride
) -> None:
    """Splits z + e[e_row] into rotated q, rotated k, and v. q, or k and v, may be None where z lacks their columns.

    Allocates nothing on a GPU. Indices are not checked there. Raises ValueError for what does not fit.
    """
    heads, kv_heads, dim = _check(("z", "e", "q", "k", "v"), z, e, q, k, v, e_row, position, freqs, z.dtype, z.dtype)
    if z.is_cuda:
        config = chain_qkv_config(2 * len(freqs))
        _chain_qkv(_chain_qkv_kernel, z, e, e_row, position, freqs, factor, q, k, v, config)
        return
    for out, value in zip(
        (q, k, v), chain_qkv_ref(z, e, e_row, position, freqs, factor, heads, kv_heads, dim), strict=True
    ):
        if out is not None:
            out.copy_(value)


@torch.no_grad()
def chain_qkv_backward(
    dq: Tensor | None,  # [n, Hq, D] bf16 or fp32 on a GPU
    dk: Tensor | None,  # [n, Hkv, D] of any of these dtypes, as a rule float32 sums
    dv: Tensor | None,  # [n, Hkv, D] the same
    e_row: Tensor | None,  # [n] int64 row of de, none twice; unchecked, a sum would be lost; None with de
    position: Tensor,  # [n] int64
    freqs: Tensor,  # [rotary_dim/2] float32
    factor: float,
    dz: Tensor,  # [n, W] written; any row stride
    de: Tensor | None,  # [m, >= W] float32 (float64), de[e_row[j], :W] += dz[j]; any row stride; None: dz alone
) -> None:
    """Writes q's and k's gradients, rotated back, and v's to dz, rounded, and adds the same numbers to de.

    A step of chains reads every token at most once, so e_row has no repeats. Allocates nothing on a GPU. Raises
    ValueError for what does not fit.
    """
    sums = torch.promote_types(dz.dtype, torch.float32)
    _check(("dz", "de", "dq", "dk", "dv"), dz, de, dq, dk, dv, e_row, position, freqs, sums, None)
    if dz.is_cuda:
        config = chain_qkv_config(2 * len(freqs))
        _chain_qkv(_chain_qkv_backward_kernel, dz, de, e_row, position, freqs, factor, dq, dk, dv, config)
        return
    dz.copy_(chain_qkv_backward_ref(dq, dk, dv, position, freqs, factor, dz.dtype))
    if de is not None:
        de[:, : dz.shape[1]].index_add_(0, e_row, dz.to(de.dtype))


def _check(
    names: tuple[str, str, str, str, str],  # of the five tensors that follow, for the errors
    z: Tensor,
    e: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    e_row: Tensor | None,
    position: Tensor,
    freqs: Tensor,
    e_dtype: torch.dtype,
    qkv_dtype: torch.dtype | None,  # None: any
) -> tuple[int, int, int]:  # Hq, Hkv, D
    """Raises ValueError for shapes, strides, dtypes or devices that do not fit, of the forward or of the backward."""
    z_name, e_name, q_name, k_name, v_name = names
    if (k is None) != (v is None) or (q is None and k is None):
        raise ValueError(f"give {q_name}, or {k_name} and {v_name}, or all three")
    if (e is None) != (e_row is None):
        raise ValueError(f"give {e_name} and e_row together, or neither")
    given = k if q is None else q
    check(k_name if q is None else q_name, given, ("n", "heads", "D"))
    n, _, dim = given.shape
    heads = 0 if q is None else q.shape[1]
    kv_heads = 0 if k is None else k.shape[1]
    width = (heads + 2 * kv_heads) * dim
    check(z_name, z, (n, width), layout="rows")
    check(e_name, e, ("m", AtLeast(width)), e_dtype, z.device, "rows")
    check(q_name, q, (n, heads, dim), qkv_dtype, z.device, "rows")
    check(k_name, k, (n, kv_heads, dim), qkv_dtype, z.device, "rows")
    check(v_name, v, (n, kv_heads, dim), qkv_dtype, z.device, "rows")
    check("e_row", e_row, (n,), torch.int64, z.device)
    check("position", position, (n,), torch.int64, z.device)
    check("freqs", freqs, ("rotary_dim/2",), torch.float32, z.device)
    if not 0 < 2 * len(freqs) <= dim:
        raise ValueError(f"freqs is {tuple(freqs.shape)}; [rotary_dim/2] with rotary_dim in 2..{dim} is needed")
    check_covered("chain_qkv", **dict(zip(names, (z, e, q, k, v), strict=True)))
    return heads, kv_heads, dim
