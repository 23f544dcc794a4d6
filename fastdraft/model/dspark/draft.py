"""The DSpark draft: DFlash's layers, a Markov head that knows the token before, and a head that says how sure it is.

# n rows, H hidden, V vocabulary, r rank of the Markov head
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdraft.batch import TargetHead
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dspark.config import DSparkConfig


class _MarkovHead(nn.Module):
    """W2 W1[x]: what the token before a row's adds to its logits."""

    def __init__(self, c: DSparkConfig):
        super().__init__()
        self.markov_w1 = nn.Embedding(c.vocab_size, c.markov_rank)
        self.markov_w2 = nn.Linear(c.markov_rank, c.vocab_size, bias=False)

    def forward(self, previous: Tensor) -> Tensor:  # [...] to [..., V]
        return self.markov_w2(self.markov_w1(previous))


class _ConfidenceHead(nn.Module):
    """One logit a row, of its state and W1 of the token before: whether what it drafts will be accepted."""

    def __init__(self, c: DSparkConfig):
        super().__init__()
        self.proj = nn.Linear(c.hidden_size + c.markov_rank, 1)


class DSparkDraft(DFlashDraft):
    """Build with `DSparkConfig`, then `take_from_target` before use."""

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        self.markov_head = _MarkovHead(config)
        self.confidence_head = _ConfidenceHead(config)

    @torch.no_grad()
    def init_weights(self, std: float, generator: torch.Generator) -> None:
        super().init_weights(std, generator)
        self.confidence_head.proj.bias.zero_()

    def logits(self, states: Tensor, previous: Tensor, head: TargetHead) -> Tensor:
        """The target's head of a row's state, corrected by the token before the one that the row drafts."""
        base = super().logits(states, previous, head)
        return base + self.markov_head(previous).to(base.dtype)

    def confidence(
        self,
        states: Tensor,  # [..., H] after the final norm
        previous: Tensor,  # [...] int64
    ) -> Tensor:  # [...] logit of the probability that the drafted token is accepted, in at least float32
        w1, proj = self.markov_head.markov_w1, self.confidence_head.proj
        stats = torch.promote_types(states.dtype, torch.float32)
        read = torch.cat([states, w1(previous).to(states.dtype)], -1).to(stats)
        return (read @ proj.weight[0].to(stats)) + proj.bias[0].to(stats)
