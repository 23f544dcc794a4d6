"""Drafting with DFlash2: DFlash's block, and a walk over each slot's candidates from the anchor on.

The block's forward is one, as DFlash's. Then slot after slot the candidates are scored given the token that the walk took
before: the anchor first. The next token is the best of them, or drawn from the softmax of their scores, which is what the
target's verification then needs as Q: 0 at all other tokens.

# m drafted tokens, K candidates, R rank, H hidden, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdraft.model.dflash.propose import BlockDrafter
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.proposal import DecodeSettings, Proposal, probabilities


class SelectorDrafter(BlockDrafter):
    draft: DFlash2Draft

    def propose(
        self, token_ids: Tensor, g: Tensor, depth: int, settings: DecodeSettings, generator: torch.Generator
    ) -> Proposal:
        self.extend(g)
        c = self.draft.config
        states = self.block(token_ids[-1:])[c.first_slot : c.first_slot + depth]
        logits = self.head.logits(states.to(self.head.weight.dtype))
        best, ids = logits.topk(c.selector_top_k, -1)  # [m, K]
        query = self.draft.candidate_selector.hidden_projection(states)  # [m, R]
        sampled = settings.temperature > 0 and settings.sample_draft
        token, tokens, rows = token_ids[-1], [], []
        for slot in range(depth):
            scores = candidate_scores(self.draft, best[slot], ids[slot], query[slot], token)
            if sampled:
                q = probabilities(scores[None], settings)[0]
                token = ids[slot, torch.multinomial(q, 1, generator=generator)[0]]
                rows.append(q.new_zeros(logits.shape[1]).index_put((ids[slot],), q))
            else:
                token = ids[slot, scores.argmax()]
            tokens.append(token)
        return Proposal(torch.stack(tokens), list(range(depth)), torch.stack(rows) if sampled else None)


def candidate_scores(
    draft: DFlash2Draft,
    logits: Tensor,  # [..., K] of the candidates
    ids: Tensor,  # [..., K] int64
    query: Tensor,  # [..., R] projected states
    before: Tensor,  # [...] int64 the token before
) -> Tensor:  # [..., K] in at least float32
    selector = draft.candidate_selector
    stats = torch.promote_types(logits.dtype, torch.float32)
    pulled = (selector.predecessor_codebook[before] * query).to(stats)
    return logits.to(stats) + (selector.successor_codebook[ids].to(stats) @ pulled[..., None])[..., 0]
