"""Features in 8 bits: float8_e4m3fn with one float32 scale for each token and layer, scale = max |x| / 448.

A value of at least 2^-6 scales is off by at most 2^-4 of itself, a smaller one by at most 2^-10 scales. Outlier channels,
which hidden states have, cost the others nothing above that: it is a floating-point format with a range of 2^17.

# n rows, k layers side by side, D width of a layer
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448


def quantize(
    x: Tensor,  # [n, k*D]
    layers: int,  # k
) -> tuple[Tensor, Tensor]:  # [n, k*D] float8_e4m3fn, [n, k] float32 scales
    """A row that is not finite gets a scale that is not."""
    parts = x.float().unflatten(-1, (layers, -1))
    scale = parts.abs().amax(-1) / LARGEST
    scaled = parts / scale.masked_fill(scale == 0, 1.0)[..., None]
    return scaled.clamp(-LARGEST, LARGEST).flatten(1).to(FP8), scale


def dequantize(
    q: Tensor,  # [n, k*D] float8_e4m3fn
    scale: Tensor,  # [n, k] float32
    dtype: torch.dtype,
) -> Tensor:  # [n, k*D]
    parts = q.float().unflatten(-1, (scale.shape[1], -1))
    return (parts * scale[..., None]).flatten(1).to(dtype)
