"""Drafting with DFlash2: DFlash's block, and a walk over each slot's candidates from the anchor on.

The block's forward is one, as DFlash's, and so is the search for candidates. Then slot after slot they are scored given the
token that the walk took before: the anchor first. The next token is the best of them, or drawn from the softmax of their
scores, which is what the target's verification then needs as Q: 0 at all other tokens.

# S sequences, m drafted tokens, K candidates, H hidden, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdraft.model.dflash.propose import BlockDrafter
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.proposal import DecodeSettings, draw_each, probabilities


class SelectorDrafter(BlockDrafter):
    draft: DFlash2Draft

    def draw(
        self,
        states: Tensor,  # [S, m, H] of the slots that draft
        roots: Tensor,  # [S] int64
        depths: list[int],
        settings: DecodeSettings,
        generators: list[torch.Generator],
    ) -> tuple[Tensor, Tensor | None]:
        """The walk of each sequence."""
        draft, token, tokens, drawn_from = self.draft, roots, [], []
        logits, ids, query = draft.candidates(states, self.head)
        for slot in range(states.shape[1]):
            mine = ids[:, slot]
            scores = draft.scores(logits[:, slot], mine, query[:, slot], token)
            if settings.draws_chain:
                p = probabilities(scores, settings)
                place = draw_each(p[:, None], generators, [int(slot < depth) for depth in depths])[:, 0]
                drawn_from.append(p.new_zeros(len(p), draft.config.vocab_size).scatter(1, mine, p))
            else:
                place = scores.argmax(-1)
            token = mine.gather(1, place[:, None])[:, 0]
            tokens.append(token)
        return torch.stack(tokens, 1), torch.stack(drawn_from, 1) if drawn_from else None
