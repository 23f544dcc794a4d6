"""Drafting with DSpark: the block's states at once, then token after token through the Markov head.

Slot k draws x_{n+1+k} from softmax(head(h_k) + W2 W1[token of slot k - 1]); before slot 0 stands the root. A sampled
token's distribution is the one that it was drawn from, given the drafted tokens before it, so speculative sampling down the
chain leaves the target's distribution as it is.

# S sequences, m drafted tokens, H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastdraft.model.dflash.propose import WalkingDrafter


class MarkovDrafter(WalkingDrafter):
    def choices(
        self,
        states: Tensor,  # [S, m, H]
    ) -> Callable[[int, Tensor], tuple[Tensor, None]]:
        return lambda slot, token: (self.draft.logits(states[:, slot], token, self.head), None)
