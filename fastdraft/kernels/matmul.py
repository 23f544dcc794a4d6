"""Matrix products that no single library call covers."""

from __future__ import annotations

from torch import Tensor, addmm

from fastdraft.kernels.jit import nothing_runs


def add_outer(
    dweight: Tensor,  # [out, in] += dz^T x, float32 or wider
    dz: Tensor,  # [n, out]
    x: Tensor,  # [n, in]
) -> None:
    """Adds a weight gradient in the accumulator's precision: the product is not rounded to dz's dtype first."""
    if nothing_runs():  # dz is noise
        return
    if dz.dtype == dweight.dtype:
        dweight.addmm_(dz.T, x)
    elif dz.is_cuda:
        addmm(dweight, dz.T, x, out_dtype=dweight.dtype, out=dweight)
    else:
        dweight.addmm_(dz.T.to(dweight.dtype), x.to(dweight.dtype))
