"""Drafting with DFlash2: DFlash's block, and a walk over each slot's candidates from the anchor on.

The block's forward is one, as DFlash's, and so is the search for candidates. Then slot after slot they are scored given the
token that the walk took before: the anchor first. The next token is the best of them, or drawn from the softmax of their
scores, which is what the target's verification then needs as Q: 0 at all other tokens.

# S sequences, m drafted tokens, K candidates, H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdraft.batch import TargetHead
from fastdraft.model.dflash.propose import BatchBlockDrafter, BlockDrafter
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.proposal import DecodeSettings, Proposal, Proposals, draw, draw_each, probabilities


def walk(
    draft: DFlash2Draft,
    head: TargetHead,
    states: Tensor,  # [S, m, H] of the slots that draft
    roots: Tensor,  # [S] int64
    settings: DecodeSettings,
    pick: Callable[[Tensor, int], Tensor],  # draws a place of [S, K] probabilities in a slot: [S]
) -> tuple[Tensor, Tensor | None]:  # tokens [S, m]; what each was drawn from [S, m, V], None where it was not drawn
    logits, ids, query = draft.candidates(states, head)
    samples = settings.draws_chain
    token, tokens, drawn_from = roots, [], []
    for slot in range(states.shape[1]):
        mine = ids[:, slot]
        scores = draft.scores(logits[:, slot], mine, query[:, slot], token)
        if samples:
            p = probabilities(scores, settings)
            place = pick(p, slot)
            drawn_from.append(p.new_zeros(len(p), draft.config.vocab_size).scatter(1, mine, p))
        else:
            place = scores.argmax(-1)
        token = mine.gather(1, place[:, None])[:, 0]
        tokens.append(token)
    return torch.stack(tokens, 1), torch.stack(drawn_from, 1) if samples else None


class SelectorDrafter(BlockDrafter):
    draft: DFlash2Draft

    def draw(self, states: Tensor, root: Tensor, settings: DecodeSettings, generator: torch.Generator) -> Proposal:
        pick = lambda p, slot: draw(p, generator)  # noqa: E731
        tokens, q = walk(self.draft, self.head, states[None], root, settings, pick)
        return Proposal(tokens[0], list(range(len(states))), None if q is None else q[0])


class BatchSelectorDrafter(BatchBlockDrafter):
    """`SelectorDrafter` of S sequences."""

    draft: DFlash2Draft

    def draw(
        self,
        states: Tensor,  # [S, m, H]
        roots: Tensor,  # [S] int64
        depths: list[int],
        settings: DecodeSettings,
        generators: list[torch.Generator],
    ) -> Proposals:
        def pick(p: Tensor, slot: int) -> Tensor:
            return draw_each(p[:, None], generators, [int(slot < depth) for depth in depths])[:, 0]

        tokens, q = walk(self.draft, self.head, states, roots, settings, pick)
        return Proposals(tokens, torch.arange(states.shape[1]).repeat(len(depths), 1), depths, q)
