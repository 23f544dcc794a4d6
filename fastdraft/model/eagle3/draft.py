"""The EAGLE-3 draft: one Llama decoder layer whose attention reads cat(embedding, hidden).

Parameter names are the serving engines' names, so the state dict is the checkpoint. The module offers the layer's
pieces (combine, qkv, finish, fed_back, logits); the TTT reference, the engine and the decoder put attention between them.

# n rows, H draft hidden, Ht target hidden, V target vocabulary, Vd draft vocabulary, Hq/Hkv heads, D head dim, I MLP width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdraft.kernels.chain_qkv import rotate
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.layers import MLP, RMSNorm
from fastdraft.model.rope import Rope

SURE = 0.4  # of the target's final norm: SmolLM2-135M's first losses are 7.3 a row with it, 13 without


class Attention(nn.Module):
    """The four projections; attention itself belongs to the caller."""

    def __init__(self, c: DraftConfig):
        super().__init__()
        self.q_proj = nn.Linear(2 * c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)


class MidLayer(nn.Module):
    def __init__(self, c: DraftConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.mlp = MLP(c.hidden_size, c.intermediate_size)


class Draft(nn.Module):
    """Build with `DraftConfig`, then `set_vocab` and `set_embedding` (or load a serving checkpoint) before use."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.config = c = config
        self.fc = nn.Linear(3 * c.target_hidden_size, c.hidden_size, bias=False)
        if c.fc_norm:
            self.fc_norm = nn.ModuleList([RMSNorm(c.target_hidden_size, c.rms_norm_eps) for _ in range(3)])
        if c.norm_before_fc:
            self.input_norm = RMSNorm(3 * c.target_hidden_size, c.rms_norm_eps)
        self.midlayer = MidLayer(c)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.draft_vocab_size, bias=False)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.embed_tokens.weight.requires_grad_(False)
        self.register_buffer("d2t", torch.zeros(c.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(c.vocab_size, dtype=torch.bool))
        self.rope = Rope(c.rope_parameters, c.head_dim, c.max_position_embeddings)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def has_own_embedding(self) -> bool:
        """Whether its embedding is other than the target's: it is then kept and exported."""
        return self.config.hidden_size != self.config.target_hidden_size

    def frozen(self) -> dict[str, Tensor]:
        """What it needs beside its trained weights and its target: the vocabulary map, and an embedding of its own."""
        own = {"embed_tokens.weight": self.embed_tokens.weight.data} if self.has_own_embedding else {}
        return {"d2t": self.d2t, "t2d": self.t2d} | own

    def take_from_target(
        self,
        embedding: Tensor,  # [V, Ht]
    ) -> None:
        """Sets what checkpoints leave out, since the target has it."""
        if not self.has_own_embedding:
            self.set_embedding(embedding.float().cpu())

    @property
    def draft_ids(self) -> Tensor:  # [Vd] int64, target id of each draft token
        return torch.arange(self.config.draft_vocab_size, device=self.d2t.device) + self.d2t

    def set_vocab(
        self,
        draft_ids: Tensor,  # [Vd] int64, ascending target ids
    ) -> None:
        """Sets d2t (an offset: target id - draft id) and t2d. Raises ValueError when the ids do not fit."""
        c = self.config
        ids = draft_ids.to(torch.int64).cpu()
        if ids.shape != (c.draft_vocab_size,):
            raise ValueError(f"the vocabulary map has {ids.numel()} tokens, the draft {c.draft_vocab_size}")
        if ids.numel() > 1 and not bool((ids[1:] > ids[:-1]).all()):
            raise ValueError("the vocabulary map's target ids must ascend without repeats")
        if int(ids[0]) < 0 or int(ids[-1]) >= c.vocab_size:
            raise ValueError(
                f"the vocabulary map names target id {int(ids[0] if ids[0] < 0 else ids[-1])}, "
                f"outside the target's vocabulary of {c.vocab_size}; rebuild the map for this target"
            )
        self.d2t.copy_(ids - torch.arange(len(ids)))
        self.t2d.zero_()[ids] = True

    @torch.no_grad()
    def set_embedding(
        self,
        target_embedding: Tensor,  # [V, Ht]
    ) -> None:
        """Copies the target's embedding; where H != Ht, its best rank-H projection (H < Ht) or zero padding (H > Ht)."""
        c, e = self.config, target_embedding
        if e.shape != (c.vocab_size, c.target_hidden_size):
            raise ValueError(
                f"target embedding is {tuple(e.shape)}, the draft expects [{c.vocab_size}, {c.target_hidden_size}]"
            )
        if c.hidden_size > e.shape[1]:
            e = F.pad(e, (0, c.hidden_size - e.shape[1]))
        elif c.hidden_size < e.shape[1]:
            gram = e.double().T @ e.double()
            e = e @ torch.linalg.eigh(gram).eigenvectors[:, -c.hidden_size :].to(e.dtype)
        self.embed_tokens.weight.copy_(e)

    @torch.no_grad()
    def start_from_target(
        self,
        head: Tensor,  # [V, Ht] the target's lm_head
        final_norm: Tensor,  # [Ht] weight of the target's final norm
    ) -> None:
        """Starts lm_head (draft-vocabulary rows) and norm as the target's, fc as a pass of the high state. Needs H == Ht.

        So the layer begins as a small change to a state that the head reads well. But that state says the token before the
        one wanted: SURE softens what it says. LOG.md has a comparison with random weights.
        """
        self.lm_head.weight.copy_(head[self.draft_ids.to(head.device)])
        self.norm.weight.copy_(SURE * final_norm)
        h = self.config.hidden_size
        self.fc.weight.zero_()
        self.fc.weight[:, -h:] = torch.eye(h, dtype=self.fc.weight.dtype, device=self.fc.weight.device)

    @torch.no_grad()
    def init_weights(self, std: float, generator: torch.Generator) -> None:
        """Normal(0, std) matrices, unit norms: what a draft starts from when nothing better is known."""
        for p in self.trainable().values():
            p.fill_(1.0) if p.ndim == 1 else p.copy_(torch.randn(p.shape, generator=generator) * std)

    # --- the layer in pieces -------------------------------------------------------------------------------------

    def combine(
        self,
        g: Tensor,  # [n, 3*Ht]
    ) -> Tensor:  # [n, H] h^0
        if self.config.fc_norm:
            g = torch.cat([norm(part) for norm, part in zip(self.fc_norm, g.chunk(3, -1), strict=True)], -1)
        if self.config.norm_before_fc:
            g = self.input_norm(g)
        return self.fc(g)

    def qkv(
        self,
        token_ids: Tensor,  # [n] int64
        h: Tensor,  # [n, H]
        positions: Tensor,  # [n] int64 RoPE positions
    ) -> tuple[Tensor, Tensor, Tensor]:  # q [n, Hq, D], k, v [n, Hkv, D]; q, k rotated
        c, m = self.config, self.midlayer
        e = self.embed_tokens(token_ids).to(h.dtype)
        x = torch.cat([m.input_layernorm(e), m.hidden_norm(h)], -1)
        cos, sin = self.rope(positions, h.dtype)
        q = rotate(m.self_attn.q_proj(x).unflatten(-1, (c.num_attention_heads, c.head_dim)), cos, sin)
        k = rotate(m.self_attn.k_proj(x).unflatten(-1, (c.num_key_value_heads, c.head_dim)), cos, sin)
        v = m.self_attn.v_proj(x).unflatten(-1, (c.num_key_value_heads, c.head_dim))
        return q, k, v

    def finish(
        self,
        h: Tensor,  # [n, H] the hidden read
        attention: Tensor,  # [n, Hq, D]
    ) -> Tensor:  # [n, H] y, the layer's output, before the final norm
        m = self.midlayer
        h = h + m.self_attn.o_proj(attention.flatten(-2))
        return h + m.mlp(m.post_attention_layernorm(h))

    def fed_back(
        self,
        y: Tensor,  # [n, H] output of `finish`
    ) -> Tensor:  # [n, H] what the next step reads as its hidden state
        """y itself, or with `norm_output` (EAGLE-3.1, arXiv 2605.09992) what lm_head reads of it."""
        return self.norm(y) if self.config.norm_output else y

    def logits(
        self,
        y: Tensor,  # [n, H] output of `finish`
    ) -> Tensor:  # [n, Vd]
        return self.lm_head(self.norm(y))
