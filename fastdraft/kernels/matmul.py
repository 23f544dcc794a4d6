"""The step's matrix products: with a weight in bf16 (or wider) or in fp8, and for a weight's gradient."""

from __future__ import annotations

import torch
from torch import Tensor, addmm

from fastdraft.kernels.fp8 import Fp8Weight, multiply
from fastdraft.kernels.jit import launch


def linear(
    x: Tensor,  # [n, in]
    weight: Tensor | Fp8Weight,  # [out, in]
    out: Tensor,  # [n, out] written
) -> None:
    """Writes x W^T."""
    if isinstance(weight, Fp8Weight):
        multiply(x, weight.by_out, weight.room, out)
    else:
        torch.mm(x, weight.T, out=out)


def linear_backward(
    dz: Tensor,  # [n, out]
    weight: Tensor | Fp8Weight,  # [out, in]
    dx: Tensor,  # [n, in] written
) -> None:
    """Writes dz W, the input's gradient."""
    if isinstance(weight, Fp8Weight):
        multiply(dz, weight.by_in, weight.room, dx)
    else:
        torch.mm(dz, weight, out=dx)


def add_outer(
    dweight: Tensor,  # [out, in] += dz^T x, float32 or wider
    dz: Tensor,  # [n, out]
    x: Tensor,  # [n, in]
) -> None:
    """Adds a weight gradient in the accumulator's precision: the product is not rounded to dz's dtype first."""
    if dz.dtype == dweight.dtype:
        launch(dweight.addmm_, dz.T, x)
    elif dz.is_cuda:
        launch(addmm, dweight, dz.T, x, out_dtype=dweight.dtype, out=dweight)
    else:
        launch(dweight.addmm_, dz.T.to(dweight.dtype), x.to(dweight.dtype))
