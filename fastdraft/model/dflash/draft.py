"""The DFlash draft: L Qwen3-shaped layers that fill a block of tokens at once, between the target's embedding and head.

Parameter names are the serving engines' names, so the state dict is the checkpoint; the embedding is the target's and stays
out of it. The module offers its pieces (context, queries, keys and values, a layer); the reference, the engine and the
drafter put attention between them.

# n rows, H hidden, K captured target layers, V vocabulary, Hq/Hkv heads, D head dim, L draft layers
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdraft.batch import TargetHead
from fastdraft.kernels.chain_qkv import rotate
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.mixer import Branch
from fastdraft.model.layers import MLP, RMSNorm
from fastdraft.model.rope import Rope


class _Attention(nn.Module):
    """The projections and the two norms over a head; attention itself belongs to the caller."""

    def __init__(self, c: DFlashConfig):
        super().__init__()
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)


class _Layer(nn.Module):
    def __init__(self, c: DFlashConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = _Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size)


class DFlashDraft(nn.Module):
    """Build with `DFlashConfig`, then `take_from_target` before use."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        self.config = c = config
        self.fc = nn.Linear(len(c.layers) * c.hidden_size, c.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.layers = nn.ModuleList([_Layer(c) for _ in range(c.num_hidden_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.rope = Rope(c.rope_parameters, c.head_dim, c.max_position_embeddings)
        self.register_buffer("embedding", torch.full((1, c.hidden_size), torch.nan), persistent=False)  # [V, H]

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def frozen(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the trained weights: nothing, the target has the rest."""
        return {}

    def take_from_target(
        self,
        embedding: Tensor,  # [V, H]
    ) -> None:
        """Sets the embedding, which is the target's. Raises ValueError where it is of another shape, or where the mask's
        row is 0, of which a norm makes nothing that tells one row from another."""
        c = self.config
        if embedding.shape != (c.vocab_size, c.hidden_size):
            raise ValueError(
                f"target embedding is {tuple(embedding.shape)}, the draft expects [{c.vocab_size}, {c.hidden_size}]"
            )
        if not bool(embedding[c.mask_token_id].any()):
            raise ValueError(
                f"the target's embedding of mask_token_id {c.mask_token_id} is all zeros, so a block's masked rows would "
                "read nothing; choose another token with draft.overrides.mask_token_id"
            )
        self.embedding = embedding.detach().to(self.fc.weight.device, self.fc.weight.dtype)

    @torch.no_grad()
    def init_weights(self, std: float, generator: torch.Generator) -> None:
        """Normal(0, std) matrices, unit norms: what a draft starts from when nothing better is known."""
        for p in self.trainable().values():
            p.fill_(1.0) if p.ndim == 1 else p.copy_(torch.randn(p.shape, generator=generator) * std)

    def context(
        self,
        g: Tensor,  # [n, K*H]
    ) -> Tensor:  # [n, H] c, the same for all layers
        return self.hidden_norm(self.fc(g.to(self.fc.weight.dtype)))

    def keys_values(
        self,
        layer: int,
        x: Tensor,  # [n, H] c of context tokens, or normed block rows
        positions: Tensor,  # [n] int64
    ) -> tuple[Tensor, Tensor]:  # k, v [n, Hkv, D], k rotated
        m, dim = self.layers[layer].self_attn, self.config.head_dim
        k = m.k_norm(m.k_proj(x).unflatten(-1, (-1, dim)))
        return rotate(k, *self.rope(positions, x.dtype)), m.v_proj(x).unflatten(-1, (-1, dim))

    def queries(
        self,
        layer: int,
        x: Tensor,  # [n, H] normed block rows
        positions: Tensor,  # [n] int64
    ) -> Tensor:  # [n, Hq, D] rotated
        m = self.layers[layer].self_attn
        q = m.q_norm(m.q_proj(x).unflatten(-1, (-1, self.config.head_dim)))
        return rotate(q, *self.rope(positions, x.dtype))

    def logits(
        self,
        states: Tensor,  # [..., H] of block rows after the final norm
        previous: Tensor,  # [...] int64 the token before the one that each row drafts
        head: TargetHead,
    ) -> Tensor:  # [..., V]
        """What a row drafts from: the target's head of its state. A method whose rows know the token before says how."""
        del previous
        return head.logits(states.to(head.weight.dtype))

    def around(
        self,
        layer: int,
        branch: Branch,
        n: Tensor,  # [n, H] normed rows, block after block
        run: Callable[[Tensor], Tensor],  # the branch: of [n, H] to [n, H]
    ) -> Tensor:  # [n, H] what is added to the residual stream
        """The branch of a layer; a method that mixes rows in front of it and behind it says how (`mixer.py`)."""
        del layer, branch
        return run(n)

    def through_layer(
        self,
        layer: int,
        h: Tensor,  # [n, H] the residual stream of block rows, block after block
        attend: Callable[[Tensor], Tensor],  # of the rows [n, H] that queries, keys and values are made of, to [n, Hq, D]
    ) -> Tensor:  # [n, H] after the layer
        m = self.layers[layer]
        attention = lambda x: m.self_attn.o_proj(attend(x).flatten(-2))  # noqa: E731
        h = h + self.around(layer, "attention", m.input_layernorm(h), attention)
        return h + self.around(layer, "mlp", m.post_attention_layernorm(h), m.mlp)
