"""The target answers prompts itself: a draft learns best from what its target would say.

Batches of prompts of like length, left-padded, through transformers' generate, greedy. On a CPU, a decoding step runs its
attention as one grouped matrix product per key/value head: PyTorch's fused kernel repeats K and V for every query head
and takes half of the step (SmolLM2-135M, batch 96, context 150, 2 cores: 0.43 s a step with it, 0.21 s with this).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from fastdraft.target.hf import Target

GROUPED = "fastdraft_grouped"


@dataclass(frozen=True)
class Answer:
    """What the target said to one prompt, as the tokens it said it in."""

    index: int  # of the prompt
    prompt_ids: list[int]
    answer_ids: list[int]  # the end-of-turn token included, unless max_new_tokens cut the answer off

    def row(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """A line of training data: exact tokens and mask, and the text for people."""
        return {
            "input_ids": self.prompt_ids + self.answer_ids,
            "loss_mask": [0] * len(self.prompt_ids) + [1] * len(self.answer_ids),
            "text": tokenizer.decode(self.prompt_ids + self.answer_ids),
        }


def regenerate(
    target: Target,
    prompts: list[list[int]],  # token ids, ready for the assistant's turn
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[list[Answer]]:
    """Greedy answers, one batch at a time, shortest prompts first."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    pad = min(target.eos_ids)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in batch)
        ids = [[pad] * (width - len(prompts[i])) + prompts[i] for i in batch]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
        with torch.no_grad(), _grouped_on_cpu(target):
            out = target.model.generate(
                input_ids=torch.tensor(ids, device=target.device),
                attention_mask=torch.tensor(mask, device=target.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=sorted(target.eos_ids),
            )
        answers = [_until_eos(row, target.eos_ids) for row in out[:, width:].tolist()]
        yield [Answer(i, prompts[i], answer) for i, answer in zip(batch, answers, strict=True)]


def _until_eos(tokens: list[int], eos_ids: frozenset[int]) -> list[int]:
    end = next((k + 1 for k, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tokens[:end]


@contextmanager
def _grouped_on_cpu(target: Target) -> Iterator[None]:
    """Our attention while generating on a CPU with plain causal attention; whatever the model uses otherwise."""
    before = target.model.config._attn_implementation
    if target.device.type != "cpu" or before != "sdpa":
        yield
        return
    target.model.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        target.model.set_attn_implementation(before)


def _grouped_attention(
    module: nn.Module,
    query: Tensor,  # [B, Hq, n, D]
    key: Tensor,  # [B, Hkv, L, D]
    value: Tensor,  # [B, Hkv, L, D]
    attention_mask: Tensor | None,  # [B, 1, n, L] added to the scores
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:  # [B, n, Hq, D]
    b, hq, n, d = query.shape
    if n > 1:  # the prompt
        mask = None if attention_mask is None else attention_mask.to(query.dtype)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=mask is None)
    hkv = key.shape[1]
    scores = (query.reshape(b, hkv, hq // hkv * n, d) @ key.transpose(-1, -2)).float()
    scores = scores.view(b, hkv, hq // hkv, n, -1) * (d**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores += attention_mask[:, :, None]
    p = scores.softmax(-1).to(query.dtype).view(b, hkv, hq // hkv * n, -1)
    return (p @ value).view(b, hq, n, d).transpose(1, 2), None


AttentionInterface.register(GROUPED, _grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)
