"""Rotary position embedding of a draft.

The inverse frequencies of scaled variants (linear, llama3, yarn: what `DraftConfig` lets pass) come from transformers' own
table, so a draft rotates exactly as its target does. Rotation is the half-split ("neox") form both engines use for
Llama-style drafts: y = x * cos + rotate_half(x) * sin on the first `rotary_dim` channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastdraft.kernels.chain_qkv import cos_sin


def inverse_frequencies(
    rope_parameters: dict[str, Any], head_dim: int, max_positions: int
) -> tuple[Tensor, float]:  # [rotary_dim/2] float32, factor on cos and sin
    """Frequencies for `rope_parameters` (rope_theta, rope_type and that type's fields)."""
    kind = rope_parameters.get("rope_type", "default")
    rotary_dim = int(head_dim * rope_parameters.get("partial_rotary_factor", 1.0))
    if kind == "default":
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
        return 1.0 / (rope_parameters["rope_theta"] ** exponent), 1.0
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope_parameters=dict(rope_parameters),
    )
    with torch.device("cpu"):  # it makes numbers of its own, also where a draft is made for its shapes, on meta
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


class Rope(nn.Module):
    """cos/sin for any position, computed in float32 (float64 when asked), with no cache to outgrow."""

    def __init__(self, rope_parameters: dict[str, Any], head_dim: int, max_positions: int):
        super().__init__()
        freqs, self.factor = inverse_frequencies(rope_parameters, head_dim, max_positions)
        self.register_buffer("freqs", freqs, persistent=False)

    def _apply(self, fn, recurse=True):  # a cast of the draft to bf16 must not round the frequencies
        freqs = self.freqs
        super()._apply(fn, recurse)
        self.freqs = freqs.to(self.freqs.device)
        return self

    def forward(
        self,
        positions: Tensor,  # [n] int64
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # cos, sin [n, rotary_dim/2]
        return cos_sin(positions, self.freqs, self.factor, dtype)
