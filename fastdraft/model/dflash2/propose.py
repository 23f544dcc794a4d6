"""Drafting with DFlash2: DFlash's block, and a walk over each slot's candidates from the anchor on.

The block's forward is one, as DFlash's, and so is the search for candidates. Then slot after slot they are scored given the
token that the walk took before: the anchor first. The next token is the best of them, or drawn from the softmax of their
scores, which is what the target's verification then needs as Q: 0 at all other tokens.

# S sequences, m drafted tokens, K candidates, H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastdraft.model.dflash.propose import WalkingDrafter


class SelectorDrafter(WalkingDrafter):
    def choices(
        self,
        states: Tensor,  # [S, m, H]
    ) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
        logits, ids, query = self.draft.candidates(states, self.head)
        return lambda slot, token: (self.draft.scores(logits[:, slot], ids[:, slot], query[:, slot], token), ids[:, slot])
