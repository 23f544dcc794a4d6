"""SwiGLU over the stacked gate and up projections, and its backward in place.

    s = sigmoid(gate)     act = gate s up     dgate = dact up s (1 + gate (1 - s))     dup = dact gate s

The backward overwrites gate | up by dgate | dup, and dact by act. The down projection's weight gradient needs act, so the
forward's act need not be kept. Precision: everything is computed in float32 and rounded once, at each store.
Bytes a row: the forward moves 3 I numbers, the backward 6 I. The op is elementwise, so two runs are bitwise equal.
Source: GLU variants (arXiv 2002.05202).

# n rows, I MLP width
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastdraft.kernels.check import check, check_covered
from fastdraft.kernels.jit import jit, tl, triton


def swiglu_ref(
    gate_up: Tensor,  # [n, 2*I]
) -> Tensor:  # act [n, I]
    """The specification, any dtype, computed in at least float32."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def swiglu_backward_ref(
    gate_up: Tensor,  # [n, 2*I]
    dact: Tensor,  # [n, I]
) -> Tensor:  # [n, 2*I] gradients of gate | up
    """The gradients that the backward writes."""
    work = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(work).chunk(2, -1)
    s = gate.sigmoid()
    dact = dact.to(work)
    return torch.cat([dact * up * s * (1 + gate * (1 - s)), dact * gate * s], -1).to(gate_up.dtype)


@dataclass(frozen=True)
class SwigluConfig:
    block: int  # columns of a program
    num_warps: int


@cache
def swiglu_config(
    itemsize: int,
) -> SwigluConfig:
    """Each thread holds sixteen bytes of each tensor."""
    return SwigluConfig(1024 * 2 // itemsize, num_warps=4)


@jit
def _swiglu_kernel(
    gate_up_ptr,  # [n, 2*I]
    act_ptr,  # [n, I]
    gate_up_stride,
    act_stride,
    WIDTH: tl.constexpr,  # I
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    gate_up_ptr += row * gate_up_stride + cols
    gate = tl.load(gate_up_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + WIDTH, mask=inside, other=0.0).to(tl.float32)
    act = gate * tl.sigmoid(gate) * up
    tl.store(act_ptr + row * act_stride + cols, act.to(act_ptr.dtype.element_ty), mask=inside)


@jit
def _swiglu_backward_kernel(
    gate_up_ptr,  # [n, 2*I]; dgate | dup after
    dact_ptr,  # [n, I]; act after
    gate_up_stride,
    dact_stride,
    WIDTH: tl.constexpr,  # I
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    gate_up_ptr += row * gate_up_stride + cols
    dact_ptr += row * dact_stride + cols
    gate = tl.load(gate_up_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + WIDTH, mask=inside, other=0.0).to(tl.float32)
    dact = tl.load(dact_ptr, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    dtype = gate_up_ptr.dtype.element_ty
    tl.store(gate_up_ptr, (dact * up * s * (1.0 + gate * (1.0 - s))).to(dtype), mask=inside)
    tl.store(gate_up_ptr + WIDTH, (dact * silu).to(dtype), mask=inside)
    tl.store(dact_ptr, (silu * up).to(dtype), mask=inside)


def _swiglu(
    kernel,  # forward or backward
    gate_up: Tensor,  # [n, 2*I]
    act: Tensor,  # [n, I] act or dact
    config: SwigluConfig,
) -> None:
    n, width = act.shape
    kernel[(n, triton.cdiv(width, config.block))](
        gate_up, act, gate_up.stride(0), act.stride(0), WIDTH=width, BLOCK=config.block, num_warps=config.num_warps
    )


@torch.no_grad()
def swiglu(
    gate_up: Tensor,  # [n, 2*I] gate | up, bf16 or fp32 on a GPU, any float dtype on the CPU; any row stride
    act: Tensor,  # [n, I] written; any row stride
) -> None:
    """Writes act = silu(gate) * up. Allocates nothing on a GPU. Raises ValueError for shapes or dtypes that do not fit."""
    _check(gate_up, act, "act")
    if gate_up.is_cuda:
        _swiglu(_swiglu_kernel, gate_up, act, swiglu_config(act.element_size()))
    else:
        act.copy_(swiglu_ref(gate_up))


@torch.no_grad()
def swiglu_backward_(
    gate_up: Tensor,  # [n, 2*I] of the forward; overwritten by the gradients of gate | up
    dact: Tensor,  # [n, I]; overwritten by act
) -> None:
    """Runs the backward in place; dact becomes the act. Raises ValueError for shapes or dtypes that do not fit."""
    _check(gate_up, dact, "dact")
    if gate_up.is_cuda:
        _swiglu(_swiglu_backward_kernel, gate_up, dact, swiglu_config(dact.element_size()))
    else:
        gradient = swiglu_backward_ref(gate_up, dact)
        act = swiglu_ref(gate_up)
        gate_up.copy_(gradient)
        dact.copy_(act)


def _check(gate_up: Tensor, act: Tensor, name: str) -> None:
    check("gate_up", gate_up, ("n", "2*I"), layout="rows")
    n, both = gate_up.shape
    check(name, act, (n, both // 2), gate_up.dtype, gate_up.device, "rows")
    check("gate_up", gate_up, (n, 2 * act.shape[1]))  # An odd width has no half.
    check_covered("swiglu", gate_up=gate_up)
