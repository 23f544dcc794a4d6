"""The serving engines' EAGLE-3 forward, small and slow, from the checkpoint's files alone: safetensors and JSON.

Written from the engines' documented reading of a checkpoint; it shares no code with fastdraft, so that agreement says
something. A prompt x_0 .. x_n with target states g_0 .. g_{n-1} is prefilled as rows t = 0 .. n-1, each reading token
x_{t+1} and fc(g_t) at position t; row n-1 proposes x_{n+1}. Every further step reads the token proposed and the state
before the final norm (with norm_output the one after it), one position later, and attends to all rows so far.

# n rows, H draft hidden, Ht target hidden, V target vocabulary, Vd draft vocabulary, D head dim
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class ServedDraft:
    """A draft as an engine would hold it. `target_embedding` [V, Ht] is used where the checkpoint ships none."""

    def __init__(self, path: Path | str, target_embedding: Tensor | None = None, dtype: torch.dtype = torch.float32):
        self.config = json.loads((Path(path) / "config.json").read_text())
        weights = load_file(Path(path) / "model.safetensors")
        self.w = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
        self.dtype = dtype
        embedding = self.w.get("embed_tokens.weight", target_embedding)
        if embedding is None:
            raise ValueError("the checkpoint ships no embed_tokens.weight; give the target's embedding")
        self.embedding = embedding.to(dtype)
        vd = self.config["draft_vocab_size"]
        self.target_ids = torch.arange(vd) + self.w.get("d2t", torch.zeros(vd, dtype=torch.int64))  # [Vd]
        self.inv_freq, self.rope_factor = _inv_freq(self.config)
        self.keys = self.values = None
        self.next_position = 0

    @property
    def captured_layers(self) -> list[int] | None:
        """Target layers whose outputs (from 0) both engines feed this draft; None: their default."""
        top = self.config.get("eagle_aux_hidden_state_layer_ids")
        nested = self.config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
        assert (top is None) == (nested is None) and (top is None or [b - 1 for b in top] == nested)
        return nested

    def prefill(
        self,
        g: Tensor,  # [n, 3*Ht]
        next_tokens: Tensor,  # [n] int64, x_1 .. x_n
    ) -> Tensor:  # [n, Vd] logits; the last row's are the first proposal
        self.keys = self.values = None
        self.next_position = 0
        g = g.to(self.dtype)
        if self.config.get("fc_norm"):
            g = torch.cat([self._norm(f"fc_norm.{i}.weight", part) for i, part in enumerate(g.chunk(3, -1))], -1)
        if self.config.get("norm_before_fc"):
            g = self._norm("input_norm.weight", g)
        return self._forward(next_tokens, g @ self.w["fc.weight"].T)

    def step(self, token: int) -> Tensor:  # [Vd] logits
        """One more step after `prefill`: `token` (a target id) is the one proposed before."""
        return self._forward(torch.tensor([token]), self.state)[0]

    def draft(
        self,
        g: Tensor,  # [n, 3*Ht]
        next_tokens: Tensor,  # [n] int64
        num_steps: int,
    ) -> list[int]:
        """Greedy chain of `num_steps` target ids."""
        logits, chain = self.prefill(g, next_tokens)[-1], []
        while True:
            chain.append(int(self.target_ids[logits.argmax()]))
            if len(chain) == num_steps:
                return chain
            logits = self.step(chain[-1])

    def _forward(
        self,
        tokens: Tensor,  # [n]
        hidden: Tensor,  # [n, H]
    ) -> Tensor:  # [n, Vd]
        c, n = self.config, tokens.shape[0]
        heads, kv_heads, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        positions = torch.arange(self.next_position, self.next_position + n)
        self.next_position += n
        residual = hidden
        x = torch.cat(
            [
                self._norm("midlayer.input_layernorm.weight", self.embedding[tokens]),
                self._norm("midlayer.hidden_norm.weight", hidden),
            ],
            -1,
        )
        q, k, v = (x @ self.w[f"midlayer.self_attn.{p}_proj.weight"].T for p in "qkv")
        q = self._rotate(q.view(n, heads, d), positions)
        k = self._rotate(k.view(n, kv_heads, d), positions)
        v = v.view(n, kv_heads, d)
        self.keys = k if self.keys is None else torch.cat([self.keys, k])
        self.values = v if self.values is None else torch.cat([self.values, v])
        out = torch.empty_like(q)
        for row in range(n):
            seen = int(positions[row]) + 1
            for head in range(heads):
                kv = head // (heads // kv_heads)
                scores = self.keys[:seen, kv] @ q[row, head] / math.sqrt(d)
                out[row, head] = scores.softmax(0) @ self.values[:seen, kv]
        hidden = residual + out.reshape(n, heads * d) @ self.w["midlayer.self_attn.o_proj.weight"].T
        x = self._norm("midlayer.post_attention_layernorm.weight", hidden)
        gate, up = (x @ self.w[f"midlayer.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        hidden = hidden + (gate * gate.sigmoid() * up) @ self.w["midlayer.mlp.down_proj.weight"].T
        normed = self._norm("norm.weight", hidden)
        self.state = (normed if self.config.get("norm_output") else hidden)[-1:]
        return normed @ self.w["lm_head.weight"].T

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt() * self.w[name]

    def _rotate(
        self,
        x: Tensor,  # [n, heads, D]
        positions: Tensor,  # [n]
    ) -> Tensor:  # [n, heads, D]
        half = self.inv_freq.shape[0]
        angle = (positions[:, None].double() * self.inv_freq)[:, None]
        cos, sin = (angle.cos() * self.rope_factor).to(x.dtype), (angle.sin() * self.rope_factor).to(x.dtype)
        y = x.clone()
        y[..., :half] = x[..., :half] * cos - x[..., half : 2 * half] * sin
        y[..., half : 2 * half] = x[..., half : 2 * half] * cos + x[..., :half] * sin
        return y


def _inv_freq(config: dict) -> tuple[Tensor, float]:  # [rotary_dim/2] float64, factor on cos and sin
    """Frequencies from rope_parameters, and the same again from the older spelling, which must agree."""
    new = config["rope_parameters"]
    old = {"rope_type": "default", **(config["rope_scaling"] or {}), "rope_theta": config["rope_theta"]}
    if "partial_rotary_factor" in config:
        old["partial_rotary_factor"] = config["partial_rotary_factor"]
    (freq, factor), (freq_old, factor_old) = (_frequencies(rope, config["head_dim"]) for rope in (new, old))
    assert torch.equal(freq, freq_old) and factor == factor_old
    return freq, factor


def _frequencies(rope: dict, head_dim: int) -> tuple[Tensor, float]:
    dim, base = int(head_dim * rope.get("partial_rotary_factor", 1.0)), rope["rope_theta"]
    freq = base ** -(torch.arange(0, dim, 2).double() / dim)
    kind = rope["rope_type"]
    if kind == "default":
        return freq, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return freq / factor, 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        wavelength = 2 * math.pi / freq
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * freq / factor + smooth * freq
        blended = torch.where(wavelength > original / low, freq / factor, blended)
        return torch.where(wavelength < original / high, freq, blended), 1.0
    if kind == "yarn":
        bounds = [
            dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))
            for rotations in (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
        ]
        if rope.get("truncate", True):
            bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
        low, high = max(bounds[0], 0), min(bounds[1], dim - 1)
        high = low + 0.001 if low == high else high
        ramp = ((torch.arange(dim // 2).double() - low) / (high - low)).clamp(0, 1)
        return freq / factor * ramp + freq * (1 - ramp), 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    raise ValueError(f"rope_type {kind!r} is unknown here")
