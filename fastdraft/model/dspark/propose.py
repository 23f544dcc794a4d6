"""Drafting with DSpark: the block's states at once, then token after token through the Markov head.

Slot k draws x_{n+1+k} from softmax(head(h_k) + W2 W1[token of slot k - 1]); before slot 0 stands the root. A sampled
token's distribution is the one that it was drawn from, given the drafted tokens before it, so speculative sampling down the
chain leaves the target's distribution as it is.

# S sequences, m drafted tokens, H hidden, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdraft.model.dflash.propose import BlockDrafter
from fastdraft.model.proposal import DecodeSettings, draw_each, probabilities


class MarkovDrafter(BlockDrafter):
    def draw(
        self,
        states: Tensor,  # [S, m, H] of the slots that draft
        roots: Tensor,  # [S] int64
        depths: list[int],
        settings: DecodeSettings,
        generators: list[torch.Generator],
    ) -> tuple[Tensor, Tensor | None]:
        tokens, drawn_from, previous = [], [], roots
        for slot, state in enumerate(states.unbind(1)):
            logits = self.draft.logits(state, previous, self.head)  # [S, V]
            if settings.draws_chain:
                drawn_from.append(probabilities(logits, settings))
                counts = [int(slot < depth) for depth in depths]
                previous = draw_each(drawn_from[-1][:, None], generators, counts)[:, 0]
            else:
                previous = logits.argmax(-1)
            tokens.append(previous)
        return torch.stack(tokens, 1), torch.stack(drawn_from, 1) if drawn_from else None
