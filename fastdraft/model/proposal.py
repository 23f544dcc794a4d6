"""What a draft is asked for and gives in a round of speculative decoding, whatever its method.

# B sequences, r rows, m drafted tokens, V / Vd target / draft vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

COLDEST = 1e-5  # of what samples; logits over less overflow
Verify = Literal["token", "block"]


@dataclass(frozen=True)
class DecodeSettings:
    """How to draft and sample; the names are the engines' options. `temperature` 0 is greedy.

    `num_draft_tokens` counts the root, as SGLang does; None is num_steps + 1, all that a chain has. `top_k` 0 and `top_p` 1
    are off. `sample_draft`: a chain at temperature > 0 draws its tokens from Q; False drafts the argmax at any temperature.
    What is drawn depends on `seed` and the prompt alone.
    `verify` says how a chain that was drawn is checked: each token by itself, or the chain as a whole, which keeps more of
    it. The engines' names of the second are vLLM's rejection_sample_method "block" and SGLang's
    speculative_use_block_verification.
    """

    num_steps: int = 3
    eagle_topk: int = 1
    num_draft_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    sample_draft: bool = True
    seed: int = 0
    verify: Verify = "token"

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.eagle_topk < 1:
            raise ValueError(f"num_steps {self.num_steps} and eagle_topk {self.eagle_topk} must be at least 1")
        most = 1 + _num_candidates(self.num_steps, self.eagle_topk)
        if not 2 <= self.num_verified <= most:
            raise ValueError(
                f"num_draft_tokens {self.num_draft_tokens} (the root included) must lie in 2..{most} "
                f"for num_steps {self.num_steps} and eagle_topk {self.eagle_topk}"
            )
        if self.eagle_topk == 1 and self.num_verified != self.num_steps + 1:
            raise ValueError(
                f"a chain (eagle_topk 1) of {self.num_steps} steps verifies num_steps + 1 tokens, "
                f"not num_draft_tokens {self.num_draft_tokens}; leave num_draft_tokens out"
            )
        if self.temperature != 0 and not COLDEST <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy) or a number from {COLDEST:g} on")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k {self.top_k} must not be negative, top_p {self.top_p} in (0, 1]")
        if self.verify not in get_args(Verify):
            raise ValueError(f"verify {self.verify!r} must be one of {', '.join(get_args(Verify))}")
        if self.verify == "block" and not self.draws_chain:
            raise ValueError(
                "verify block is for a chain whose tokens are drawn at random: it needs temperature > 0, eagle_topk 1 and "
                f"sample_draft, not temperature {self.temperature:g}, eagle_topk {self.eagle_topk} and sample_draft "
                f"{self.sample_draft}; what is not drawn is kept token by token (verify token)"
            )

    @property
    def draws_chain(self) -> bool:
        """Whether drafted tokens are drawn at random, so that a proposal has their distributions."""
        return self.temperature > 0 and self.sample_draft and self.eagle_topk == 1

    @property
    def num_verified(self) -> int:
        return self.num_steps + 1 if self.num_draft_tokens is None else self.num_draft_tokens


def _num_candidates(num_steps: int, eagle_topk: int) -> int:
    return eagle_topk + (num_steps - 1) * eagle_topk**2


@dataclass(frozen=True)
class Proposals:
    """Drafted tokens of each of B sequences, as nodes 1 .. m of a tree whose node 0 is the root; parents come before
    children. A sequence that has fewer nodes than the others has fillers behind them."""

    tokens: Tensor  # [B, m] int64
    parents: Tensor  # [B, m] int64 on the host, node numbers
    counts: list[int]  # B numbers of nodes that are no fillers
    q: Tensor | None = None  # [B, m, Vd] what each token was drawn from; None: not drawn at random


def probabilities(
    logits: Tensor,  # [r, V] or [r, Vd]
    settings: DecodeSettings,
) -> Tensor:  # the same, in at least float32
    logits = TemperatureLogitsWarper(float(settings.temperature))(
        None, logits.to(torch.promote_types(logits.dtype, torch.float32))
    )
    if settings.top_k:
        logits = TopKLogitsWarper(settings.top_k)(None, logits)
    if settings.top_p < 1:
        logits = TopPLogitsWarper(settings.top_p)(None, logits)
    return logits.softmax(-1)


def draw_each(
    p: Tensor,  # [B, r, V]
    generators: list[torch.Generator],  # B
    counts: list[int],  # B numbers of rows to draw for; what is given for the others is no draw
) -> Tensor:  # [B, r] int64
    """A token of each row with its probability, by each sequence's own generator.

    A waiting time of mean 1 / p is the shortest with probability p, and a sequence's times are drawn in one call, so that
    it gets the same tokens alone and among others. No time is 0: what has no probability is never drawn.
    """
    waiting = torch.ones_like(p)
    for own, generator, count in zip(waiting, generators, counts, strict=True):
        if count:
            own[:count].exponential_(generator=generator).clamp_min_(torch.finfo(p.dtype).tiny)
    return (p / waiting).argmax(-1)
