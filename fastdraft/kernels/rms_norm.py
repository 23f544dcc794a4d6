"""RMSNorm of gathered rows with the residual add before it, and its backward with the residual's gradient after it.

Row j, of input row s_j = x[rows[j]], or x[j] + delta[j] rounded to x's dtype (written to total[j]):

    r = 1 / sqrt(mean(s^2) + eps)          y = w * round(s r)
    xhat = s r,  c = mean(dy w xhat):      ds = r (dy w - xhat c) + sum of add          dw += sum_j dy xhat

Precision: inputs and y of one dtype, everything inside a row float32, one rounding at each store (round(s r) is the
serving engines'). Bytes a row: s, delta read, total, y written once; backward dy, s, each add read, ds written once.
dw: P programs keep the sum of a fixed set of rows in registers and write it to partial[p]; a second kernel adds the P
partial sums in order. Every reduction has a fixed order: two runs are bitwise equal.
Source: RMSNorm (arXiv 1910.07467).

# n rows, m rows of a gathered tensor, H hidden, P programs of the backward
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastdraft.kernels.jit import jit, tl, triton

MAX_HIDDEN = 16384


def rms_norm_ref(
    x: Tensor,  # [n, H]
    weight: Tensor,  # [H]
    eps: float,
) -> tuple[Tensor, Tensor]:  # y [n, H], 1/rms [n, 1] in at least float32
    """x / rms(x) * weight, reduced in at least float32: the specification, any dtype."""
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(work.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (work * r).to(x.dtype), r


def rms_norm_backward_ref(
    dy: Tensor,  # [n, H]
    x: Tensor,  # [n, H]
    r: Tensor,  # [n, 1] of the forward
    weight: Tensor,  # [H]
) -> tuple[Tensor, Tensor]:  # dx [n, H], dweight [H], both in r's dtype
    """The gradients of `rms_norm_ref`, unrounded."""
    normed, dy = x.to(r.dtype) * r, dy.to(r.dtype)
    dweight = (dy * normed).sum(0)
    dy = dy * weight.to(r.dtype)
    return r * (dy - normed * (dy * normed).mean(-1, keepdim=True)), dweight


@dataclass(frozen=True)
class RMSNormConfig:
    block: int  # columns a program holds: the whole row
    num_warps: int
    stages: int  # rows of the backward in flight
    programs_per_sm: int  # of the backward


@cache
def rms_norm_config(
    hidden: int,
) -> RMSNormConfig:
    """Sixteen numbers a thread; backward programs fill sixteen warps of an SM (their sums take registers). Two rows of
    16384 fp32 numbers in flight do not fit an H100's shared memory."""
    block = max(32, 1 << (hidden - 1).bit_length())
    num_warps = min(max(block // 512, 1), 16)
    return RMSNormConfig(block, num_warps, stages=2 if block <= 8192 else 1, programs_per_sm=16 // num_warps)


REDUCE_ROWS, REDUCE_COLS = 128, 32  # tile of the partial sums' kernel: 32 float32 are one cache line


@jit(do_not_specialize=["num_normed"], do_not_specialize_on_alignment=["rows_ptr", "r_ptr"])
def _rms_norm_kernel(
    x_ptr,  # [m, H]
    rows_ptr,  # [n'] int64
    delta_ptr,  # [n', H]
    total_ptr,  # [n', H]
    weight_ptr,  # [H]
    y_ptr,  # [n, H]
    r_ptr,  # [n] float32
    num_normed,  # n
    x_stride,
    delta_stride,
    total_stride,
    y_stride,
    eps,
    H: tl.constexpr,
    INDEXED: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_Y: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    source = tl.load(rows_ptr + row) if INDEXED else row
    s = tl.load(x_ptr + source * x_stride + cols, mask=inside, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * delta_stride + cols, mask=inside, other=0.0)
        s = (s.to(tl.float32) + delta.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * total_stride + cols, s, mask=inside)
    if HAS_Y:  # noqa: SIM102 (decided when compiled; with `and` it would not be)
        if row < num_normed:
            wide = s.to(tl.float32)
            r = tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
            tl.store(r_ptr + row, r)
            w = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            normed = (wide * r).to(s.dtype).to(tl.float32)
            tl.store(y_ptr + row * y_stride + cols, (w * normed).to(s.dtype), mask=inside)


@jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["x_rows_ptr", "rows_ptr", "r_ptr"])
def _rms_norm_backward_kernel(
    dy_ptr,  # [n, H]
    x_ptr,  # [m, H]
    x_rows_ptr,  # [n] int64
    r_ptr,  # [n] float32
    weight_ptr,  # [H]
    add0_ptr,  # [n, H], or dx
    add1_ptr,  # [n, H], or dx
    dx_ptr,  # [m', H]
    rows_ptr,  # [n] int64
    partial_ptr,  # [P, H] float32
    n,
    dy_stride,
    x_stride,
    add0_stride,
    add1_stride,
    dx_stride,
    H: tl.constexpr,
    X_INDEXED: tl.constexpr,
    INDEXED: tl.constexpr,
    HAS_DX: tl.constexpr,
    ADDS: tl.constexpr,  # 0..2
    ADD0_INDEXED: tl.constexpr,  # add0 is dx itself, read where it is written
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    w = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(first, n, tl.num_programs(0), num_stages=STAGES):
        source = tl.load(x_rows_ptr + row) if X_INDEXED else row
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + source * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row)
        normed = x * r
        dw += dy * normed
        if HAS_DX:
            target = tl.load(rows_ptr + row) if INDEXED else row
            dy *= w
            dx = r * (dy - normed * (tl.sum(dy * normed, 0) / H))
            if ADDS >= 1:
                at = target if ADD0_INDEXED else row
                dx += tl.load(add0_ptr + at * add0_stride + cols, mask=inside, other=0.0).to(tl.float32)
            if ADDS == 2:
                dx += tl.load(add1_ptr + row * add1_stride + cols, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + target * dx_stride + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + first * H + cols, dw, mask=inside)


@jit(do_not_specialize=["num_partial"])
def _add_partial_kernel(
    partial_ptr,  # [P, H] float32
    dweight_ptr,  # [H] float32 added to
    num_partial,  # P
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    lanes = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, num_partial, ROWS):
        rows = start + lanes
        inside = (rows < num_partial)[:, None] & (cols < H)[None, :]
        sums += tl.load(partial_ptr + rows[:, None] * H + cols[None, :], mask=inside, other=0.0)
    old = tl.load(dweight_ptr + cols, mask=cols < H, other=0.0)
    tl.store(dweight_ptr + cols, old + tl.sum(sums, 0), mask=cols < H)


def _rms_norm(
    x: Tensor,  # [m, H]
    weight: Tensor,  # [H]
    eps: float,
    y: Tensor | None,  # [n, H]
    r: Tensor | None,  # [n]
    rows: Tensor | None,  # [n']
    delta: Tensor | None,  # [n', H]
    total: Tensor | None,  # [n', H]
    config: RMSNormConfig,
) -> None:
    normed = 0 if y is None else len(y)
    _rms_norm_kernel[(normed if delta is None else len(delta),)](
        x,
        rows,
        delta,
        total,
        weight,
        y,
        r,
        normed,
        x.stride(0),
        0 if delta is None else delta.stride(0),
        0 if total is None else total.stride(0),
        0 if y is None else y.stride(0),
        eps,
        H=x.shape[1],
        INDEXED=rows is not None,
        HAS_DELTA=delta is not None,
        HAS_Y=y is not None,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )


def _rms_norm_backward(
    dy: Tensor,  # [n, H]
    x: Tensor,  # [m, H]
    r: Tensor,  # [n]
    weight: Tensor,  # [H]
    dx: Tensor | None,  # [n, H], or [m', H] with rows
    dweight: Tensor,  # [H]
    partial: Tensor,  # [P, H]
    rows: Tensor | None,  # [n]
    x_rows: Tensor | None,  # [n]
    add: Sequence[Tensor],
    add_dx: bool,
    config: RMSNormConfig,
) -> None:
    n, hidden = dy.shape
    if n == 0:
        return
    programs = min(n, len(partial))
    adds = (dx, *add) if add_dx else add
    add0, add1 = (*adds, None, None)[:2]
    _rms_norm_backward_kernel[(programs,)](
        dy,
        x,
        x_rows,
        r,
        weight,
        add0,
        add1,
        dx,
        rows,
        partial,
        n,
        dy.stride(0),
        x.stride(0),
        0 if add0 is None else add0.stride(0),
        0 if add1 is None else add1.stride(0),
        0 if dx is None else dx.stride(0),
        H=hidden,
        X_INDEXED=x_rows is not None,
        INDEXED=rows is not None,
        HAS_DX=dx is not None,
        ADDS=len(adds),
        ADD0_INDEXED=rows is not None and add_dx,
        BLOCK=config.block,
        STAGES=config.stages,
        num_warps=config.num_warps,
    )
    _add_partial_kernel[(triton.cdiv(hidden, REDUCE_COLS),)](
        partial, dweight, programs, H=hidden, ROWS=REDUCE_ROWS, COLS=REDUCE_COLS, num_warps=8
    )


@torch.no_grad()
def rms_norm(
    x: Tensor,  # [m, H] bf16 or fp32 on a GPU, any float dtype on the CPU; any row stride
    weight: Tensor,  # [H] of x's dtype
    eps: float,
    y: Tensor | None,  # [n, H] written, any row stride; None: only total is wanted
    r: Tensor | None,  # [n] written, float32 (float64 for float64 x); None with y None
    *,
    rows: Tensor | None = None,  # [n'] int64 input row of each output row; None: j
    delta: Tensor | None = None,  # [n', H] added to the input row, n' >= n
    total: Tensor | None = None,  # [n', H] written with delta, may be x where rows is None
) -> None:
    """y = weight * x_row / rms, after an optional residual add; rows n..n'-1 of delta only write total.

    Allocates nothing on a GPU. Row indices are not checked there. Raises ValueError for what does not fit.
    """
    n = 0 if y is None else len(y)
    count = n if delta is None else len(delta)
    _check_rows({"y": (y, n), "delta": (delta, count), "total": (total, count)}, {"rows": (rows, count)}, x, weight)
    if (delta is None) != (total is None) or (y is None) != (r is None) or (y is None and delta is None):
        raise ValueError("give delta and total together, y and r together, and at least one of the pairs")
    if n > count or (rows is None and len(x) < count):
        raise ValueError(f"y has {n} rows, delta {count}, x {len(x)}: delta needs as many as y, x as many as delta")
    if r is not None and (r.shape != (n,) or r.dtype != torch.promote_types(x.dtype, torch.float32)):
        raise ValueError(f"r is {tuple(r.shape)} {r.dtype}; [{n}] of at least float32 is needed")
    if x.is_cuda:
        _rms_norm(x, weight, eps, y, r, rows, delta, total, rms_norm_config(x.shape[1]))
        return
    s = x[:count] if rows is None else x[rows]
    if delta is not None:
        s = total.copy_(s + delta)
    if y is not None:
        normed, inverse = rms_norm_ref(s[:n], weight, eps)
        y.copy_(normed)
        r.copy_(inverse[:, 0])


def rms_norm_partials(hidden: int, device: torch.device) -> int:  # P, rows of `partial` that `rms_norm_backward` can use
    if device.type != "cuda":
        return 1
    sms = torch.cuda.get_device_properties(device).multi_processor_count if torch.cuda.is_available() else 132  # an H100
    return rms_norm_config(hidden).programs_per_sm * sms


@torch.no_grad()
def rms_norm_backward(
    dy: Tensor,  # [n, H] bf16 or fp32 on a GPU
    x: Tensor,  # [m, H] input rows of the forward (total where there was a delta)
    r: Tensor,  # [n] of the forward
    weight: Tensor,  # [H]
    dx: Tensor | None,  # [n, H], or [m', H] with rows; written, of any of the dtypes; None: only dweight is wanted
    dweight: Tensor,  # [H] float32 (float64) added to
    partial: Tensor,  # [P, H] float32 scratch, contiguous, P = rms_norm_partials(H, device); unused on the CPU
    *,
    rows: Tensor | None = None,  # [n] int64 row of dx, without repeats; None: j
    x_rows: Tensor | None = None,  # [n] int64 row of x; None: j
    add: Sequence[Tensor] = (),  # [n, H] each, read at row j
    add_dx: bool = False,  # what dx held before, read where it is written; with `add` up to two
) -> None:
    """dx[rows[j]] = gradient of row j, + dx[rows[j]] if add_dx, + sum of add[j], rounded once; dweight grows by the
    weight's gradient.

    dy or an add may be dx where both are read at j. The bits of dweight depend on n and P, nothing else. Allocates nothing
    on a GPU. Raises ValueError for what does not fit.
    """
    n = len(dy)
    if len(add) + add_dx > 2 or ((add or add_dx) and dx is None):
        raise ValueError(
            f"add has {len(add)} tensors, add_dx {add_dx}, dx {'None' if dx is None else 'given'}: two at most, with dx"
        )
    tensors = {"dy": (dy, n)}
    if dx is not None:
        tensors["dx"] = (dx, n if rows is None else len(dx))
        tensors |= {f"add[{k}]": (a, n) for k, a in enumerate(add)}
    _check_rows(tensors, {"rows": (rows, n), "x_rows": (x_rows, n)}, x, weight, one_dtype=False)
    stats = torch.promote_types(x.dtype, torch.float32)
    if r.shape != (n,) or r.dtype != stats or dweight.shape != weight.shape or dweight.dtype != stats:
        raise ValueError(
            f"r is {tuple(r.shape)} {r.dtype}, dweight {tuple(dweight.shape)} {dweight.dtype}; "
            f"[{n}] and {tuple(weight.shape)} of {stats} are needed"
        )
    if x_rows is None and len(x) < n:
        raise ValueError(f"x has {len(x)} rows, dy {n}; give x_rows or as many")
    if x.is_cuda:
        if partial.ndim != 2 or partial.shape[1] != x.shape[1] or partial.dtype != stats or not partial.is_contiguous():
            raise ValueError(
                f"partial is {tuple(partial.shape)} {partial.dtype}; contiguous [P, {x.shape[1]}] float32 is needed"
            )
        config = rms_norm_config(x.shape[1])
        _rms_norm_backward(dy, x, r, weight, dx, dweight, partial, rows, x_rows, add, add_dx, config)
        return
    source = x[:n] if x_rows is None else x[x_rows]
    gradient, dw = rms_norm_backward_ref(dy, source, r[:, None], weight)
    dweight += dw
    if dx is not None:
        place = slice(None) if rows is None else rows
        for a in (dx[place], *add) if add_dx else add:
            gradient += a
        dx[place] = gradient.to(dx.dtype)


def _check_rows(
    tensors: dict[str, tuple[Tensor | None, int]],  # name -> tensor of rows, rows it must have
    indices: dict[str, tuple[Tensor | None, int]],
    x: Tensor,
    weight: Tensor,
    one_dtype: bool = True,
) -> None:
    hidden = x.shape[-1]
    if x.ndim != 2 or weight.shape != (hidden,) or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype} must be [m, H] and [H] of one dtype"
        )
    for name, (t, count) in {"x": (x, len(x)), **tensors}.items():
        if t is None:
            continue
        if t.shape != (count, hidden) or t.stride(1) != 1 or (one_dtype and t.dtype != x.dtype) or t.device != x.device:
            raise ValueError(
                f"{name} is {tuple(t.shape)} {t.dtype} on {t.device}, strides {t.stride()}; [{count}, {hidden}] "
                f"{x.dtype if one_dtype else ''} on {x.device} with contiguous rows is needed"
            )
        if t.is_cuda and t.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"no rms_norm kernel covers {name} of {t.dtype}; use torch.bfloat16 or torch.float32")
    for name, (t, count) in indices.items():
        if t is not None and (t.shape != (count,) or t.dtype != torch.int64 or t.device != x.device):
            raise ValueError(
                f"{name} is {tuple(t.shape)} {t.dtype} on {t.device}; [{count}] torch.int64 on {x.device} needed"
            )
    if x.is_cuda and triton is None:
        raise ValueError("the rms_norm kernels need Triton, which is not installed: pip install triton")
    if x.is_cuda and hidden > MAX_HIDDEN:
        raise ValueError(f"the rms_norm kernels hold a row of up to {MAX_HIDDEN} numbers, x has {hidden}")
