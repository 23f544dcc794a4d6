"""What a draft step is timed on: shapes of real drafts, random weights and features, documents, and the FLOPs of it all.

Weights and features are random and made on the device, from fixed seeds: every provider gets the same. The target's head
has rows of norm about 1, and f is one draft-vocabulary row times SURE plus noise, so the target prefers one
draft-vocabulary token at about 3 to 1: what the loss mask allows is trained on.

# N packed tokens, H draft hidden, Ht target hidden, V vocabulary, Vd draft vocabulary, T TTT steps
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.data.pack import pack
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.draft import Draft

CHATS = Path(__file__).parent / "data" / "chats.jsonl"
MAX_LENGTH = 4096  # tokens of one conversation, `DataConfig.max_length`
SURE, NOISE = 15.0, 2.0  # logit of the preferred token, standard deviation of all others


def _shape(hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, vocab: int, draft: int) -> DraftConfig:
    return DraftConfig(
        hidden_size=hidden,
        target_hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        draft_vocab_size=draft,
        num_target_layers=32,
        layers=(1, 15, 28),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 5e5},
        max_position_embeddings=1 << 20,
    )


SHAPES = {
    "tiny": _shape(32, 48, 4, 2, 8, 96, 64),  # for trying things on a CPU
    "smollm2-135m": _shape(576, 1536, 9, 3, 64, 49152, 32000),
    "llama-3.1-8b": _shape(4096, 14336, 32, 8, 128, 128256, 32000),
    "qwen3-8b": _shape(4096, 12288, 32, 8, 128, 151936, 32000),
    "llama-3.3-70b": _shape(8192, 28672, 64, 8, 128, 128256, 32000),
}


@dataclass(frozen=True)
class Work:
    """What one round of every provider has to do: each pack forward and backward, and an optimizer step after it."""

    config: DraftConfig
    batches: list[Batch]  # on the host
    features: list[Features]  # on the device
    step_weights: Tensor  # [T] on the device
    dtype: torch.dtype
    device: torch.device

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.batches)

    @property
    def num_trained(self) -> int:
        """Tokens whose step-0 row is trained on, as far as the loss mask says."""
        return sum(int(rows_needed(batch, 1)[0].sum()) for batch in self.batches)

    @property
    def unit(self) -> tuple[str, int]:
        """What times are divided by."""
        return "token", self.num_tokens

    @property
    def flops(self) -> int:
        return sum(model_flops(self.config, batch, len(self.step_weights)) for batch in self.batches)

    def rates(self, whole_us: float, model_us: float) -> dict[str, int]:
        """What a row says besides, of a round's time with and without the optimizer."""
        return {
            "tokens_per_s": round(self.num_tokens / whole_us * 1e6),
            "useful_tokens_per_s": round(self.num_trained / whole_us * 1e6),
        }

    @property
    def input_bytes(self) -> int:
        """Of the largest pack: a training step holds one at a time."""
        return max(f.g.nbytes + f.f.nbytes + b.input_ids.nbytes for f, b in zip(self.features, self.batches, strict=True))


def make_work(config: DraftConfig, batches: list[Batch], ttt_length: int, dtype: torch.dtype, device: torch.device) -> Work:
    ids, head = draft_ids(config).to(device), make_head(config, dtype, device).weight
    generator = torch.Generator(device).manual_seed(2)
    features, width = [], config.target_hidden_size
    for batch in batches:
        g, f = (
            torch.randn(batch.num_tokens, w, dtype=dtype, device=device, generator=generator) for w in (3 * width, width)
        )
        f *= NOISE
        for part in f.split(8192):
            chosen = ids[torch.randint(len(ids), (len(part),), device=device, generator=generator)]
            part += SURE * head[chosen]
        features.append(Features(g, f))
    weights = 0.8 ** torch.arange(ttt_length, dtype=torch.float32, device=device)
    return Work(config, batches, features, weights, dtype, device)


def draft_ids(config: DraftConfig) -> Tensor:  # [Vd] int64
    """Spread evenly over the target's vocabulary."""
    return torch.arange(config.draft_vocab_size) * config.vocab_size // config.draft_vocab_size


def make_draft(config: DraftConfig, dtype: torch.dtype, device: torch.device) -> Draft:
    with torch.device(device):
        draft = Draft(config).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in draft.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.normal_(0.0, config.initializer_range, generator=generator)
    draft.set_vocab(draft_ids(config))
    return draft


def llama_config(c: DraftConfig, longest: int, **more: Any) -> LlamaConfig:
    """Our draft's shape in the words of a peer's draft; `more` are other fields of transformers' class."""
    config = LlamaConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=dict(c.rope_parameters),
        max_position_embeddings=longest,
        tie_word_embeddings=False,
        pad_token_id=0,
        initializer_range=c.initializer_range,
        **more,
    )
    config.draft_vocab_size, config.pretraining_tp = c.draft_vocab_size, 1
    return config


def target_config(c: DraftConfig, layers: int, **more: Any) -> LlamaConfig:
    """Of a target as wide as a draft's, with so many layers; `more` are fields that differ, or further ones."""
    fields = dict(
        hidden_size=c.target_hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=False,
    )
    return LlamaConfig(**fields | more)


def random_target(config: LlamaConfig, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def make_head(config: DraftConfig, dtype: torch.dtype, device: torch.device) -> TargetHead:
    generator = torch.Generator(device).manual_seed(1)
    size = (config.vocab_size, config.target_hidden_size)
    weight = torch.randn(size, dtype=dtype, device=device, generator=generator)
    return TargetHead(weight.mul_(config.target_hidden_size**-0.5))


# --- documents -----------------------------------------------------------------------------------------------------------


def live_batch(config: DraftConfig, num_tokens: int, trained: int | None = None) -> Batch:
    """One document, every token trained on, or the last `trained`."""
    ids = torch.randint(config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(num_tokens) >= num_tokens - (trained or num_tokens)
    return Batch(ids, mask, (num_tokens,))


def chat_batches(config: DraftConfig, num_tokens: int, path: Path, num_packs: int) -> list[Batch]:
    """Packs of conversations, the answers trained on; evenly spread over all packs, from longest documents to shortest.

    `path` has a JSON list of [role, tokens] a line, role "a" for the assistant; a conversation is cut at MAX_LENGTH and at
    the pack's size. Raises ValueError when the file fills fewer packs.
    """
    masks = []
    with open(path) as lines:
        for line in lines:
            turns = torch.tensor([[role == "a", size] for role, size in json.loads(line)])
            masks.append(turns[:, 0].bool().repeat_interleave(turns[:, 1])[: min(MAX_LENGTH, num_tokens)])
    random.Random(0).shuffle(masks)
    packs = [p for p in pack([len(m) for m in masks], num_tokens) if sum(len(masks[d]) for d in p) > 0.9 * num_tokens]
    if len(packs) < num_packs:
        raise ValueError(f"{path} fills {len(packs)} packs of {num_tokens} tokens; {num_packs} are asked for")
    generator = torch.Generator().manual_seed(3)
    batches = []
    for k in range(num_packs):
        docs = [masks[d] for d in packs[(2 * k + 1) * len(packs) // (2 * num_packs)]]
        mask = torch.cat(docs)
        ids = torch.randint(config.vocab_size, (len(mask),), generator=generator)
        batches.append(Batch(ids, mask, tuple(map(len, docs))))
    return batches


# --- FLOPs ---------------------------------------------------------------------------------------------------------------


def rows_needed(batch: Batch, ttt_length: int) -> Tensor:  # [T, N] bool, the loss mask trains on row (i, t)
    row, end = torch.arange(batch.num_tokens), batch.doc_end
    label = row + 2 + torch.arange(ttt_length)[:, None]
    return (label < end) & batch.loss_mask[label.clamp_max(batch.num_tokens - 1)]


def model_flops(config: DraftConfig, batch: Batch, ttt_length: int) -> int:
    """Both parts of `flop_parts`. Llama-3.1-8B's draft, 8192 live tokens, T 7: 18.6 GFLOP a token."""
    return sum(flop_parts(config, batch, ttt_length))


def flop_parts(config: DraftConfig, batch: Batch, ttt_length: int) -> tuple[int, int]:  # with weights, of attention
    """FLOPs the mathematics needs for one step, 2 a multiply-add: matrix products only, none computed twice.

    With r_i the rows of TTT step i that some trained row of its chain needs, k_i those trained on themselves, m the
    positions whose target distribution is read, E = Hq*D, K = Hkv*D, and a factor 3 for forward, input gradient and
    weight gradient:

        fc         2 * 3Ht*H * N * 2 (3 with norms)     K^0, V^0    2 * 2H*2K * N * 3
        q of 0     2 * 2H*E * r_0 * 3                       q, k, v     2 * 2H*(E + 2K) * r_i * 3     for i > 0
        o, MLP     2 * (E*H + 3*H*I) * r_i * 3              head        2 * H*Vd * k_i * 3
        teacher    2 * Ht*V * m                             attention   4 * E * sum over rows of (keys seen) * 3.5

    (attention: two products forward, five backward). The embedding's half of QKV is counted at every step, as published;
    sharing it is a saving, not less work done.
    """
    c, n = config, batch.num_tokens
    h, ht, e, kv = (
        c.hidden_size,
        c.target_hidden_size,
        c.num_attention_heads * c.head_dim,
        c.num_key_value_heads * c.head_dim,
    )
    trained = rows_needed(batch, ttt_length)
    needed = trained.flip(0).cumsum(0).flip(0) > 0  # some step of the chain from here on is trained on
    read = torch.zeros(n + ttt_length + 1, dtype=torch.bool)
    products = n * (3 * ht * h * (3 if c.feature_norms else 2) + 3 * 2 * h * 2 * kv)
    attention = 0
    for i in range(ttt_length):
        rows = int(needed[i].sum())
        products += 3 * rows * (2 * h * (e + 2 * kv if i else e) + e * h + 3 * h * c.intermediate_size)
        products += 3 * int(trained[i].sum()) * h * c.draft_vocab_size
        attention += int((batch.positions[needed[i]] + 1 + i).sum())
        read[i + 1 : i + 1 + n] |= trained[i]
    products += int(read.sum()) * ht * c.vocab_size
    return 2 * products, int(3.5 * 4 * e * attention)
