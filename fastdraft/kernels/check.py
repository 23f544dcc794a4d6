"""What the kernels' public functions ask of their arguments. Every error says what came and what is needed.

Only shapes, dtypes, devices and strides are looked at. The values are not, because reading them would wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdraft.kernels.jit import triton

COVERED = (torch.bfloat16, torch.float32)  # what the Triton kernels read and write

# "rows": each x[j] of two or three dimensions lies in one piece, and the rows may lie apart. "whole": all of x does.
Layout = Literal["any", "rows", "whole"]


@dataclass(frozen=True)
class AtLeast:
    """A dimension of `check`'s shape that may be longer."""

    length: int

    def __str__(self) -> str:
        return f">= {self.length}"


def check(
    name: str,
    x: Tensor | None,  # or an Fp8Weight, of which only shape and dtype can be asked
    shape: Sequence[int | str | AtLeast],  # a string names a dimension of any length
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,  # one of these; None: any
    device: torch.device | None = None,  # None: any
    layout: Layout = "any",
) -> None:
    """Raises ValueError where `x` is not what is needed. None stands for an optional argument, which was not given."""
    if x is None:
        return
    if (
        (x.shape != shape and not _same_shape(x.shape, shape))
        or (dtype is not None and x.dtype != dtype and not (isinstance(dtype, tuple) and x.dtype in dtype))
        or (device is not None and x.device != device)
        or (layout != "any" and not _lies(x, layout))
    ):
        raise ValueError(_sentence(name, x, shape, dtype, device, layout))


def check_covered(
    op: str,
    **tensors: Tensor | None,  # by name; None: not given
) -> None:
    """Raises ValueError where a tensor on a GPU has a dtype without a kernel, or where Triton is missing for it."""
    for name, x in tensors.items():
        if x is None or not x.is_cuda:
            continue
        if x.dtype not in COVERED:
            raise ValueError(f"no {op} kernel covers {name} of {x.dtype}; use torch.bfloat16 or torch.float32")
        if triton is None:
            raise ValueError(f"the {op} kernels need Triton, which is not installed: pip install triton")


def _same_shape(shape: torch.Size, needed: Sequence[int | str | AtLeast]) -> bool:
    return len(shape) == len(needed) and all(map(_fits, shape, needed))


def _fits(length: int, need: int | str | AtLeast) -> bool:
    if isinstance(need, AtLeast):
        return length >= need.length
    return length == need or isinstance(need, str)


def _lies(x: Tensor, layout: Layout) -> bool:
    if layout == "whole":
        return x.is_contiguous()
    assert x.ndim in (2, 3)
    return x.stride(-1) == 1 and (x.ndim == 2 or x.stride(-2) == x.shape[-1])


def _sentence(name, x, shape, dtype, device, layout) -> str:
    came = f"{name} is {tuple(x.shape)} {x.dtype}"
    needed = f"[{', '.join(map(str, shape))}]"
    if dtype is not None:
        needed += f" {' or '.join(map(str, dtype if isinstance(dtype, tuple) else (dtype,)))}"
    if device is not None:
        came += f" on {x.device}"
        needed += f" on {device}"
    if layout != "any":
        came += f", strides {x.stride()}"
        needed += " with contiguous rows" if layout == "rows" else ", contiguous,"
    return f"{came}; {needed} is needed"
