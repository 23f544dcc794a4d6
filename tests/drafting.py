"""A drafter at work on one sequence, asked without the dimension of the batch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Drafted(NamedTuple):
    """A row of `Proposals`, without its fillers."""

    tokens: Tensor  # [m] int64
    parents: list[int]
    q: Tensor | None  # [m, Vd]


class One:
    def __init__(self, drafter):
        self.drafter, self.draft_ids = drafter, drafter.draft_ids

    def propose(self, token_ids: Tensor, g: Tensor, depth: int, settings, generator) -> Drafted:
        """Of tokens [r] and states [r, ...], as many as the target has run since the last call."""
        found = self.drafter.propose(token_ids[None], g[None], [len(g)], [depth], settings, [generator])
        assert found.counts == [found.tokens.shape[1]]
        return Drafted(found.tokens[0], found.parents[0].tolist(), None if found.q is None else found.q[0])

    def again(self, token_ids: Tensor, g: Tensor, depth: int, settings, generator) -> Drafted:
        """`propose` once more from the same root, of which the token and the state before it are given."""
        self.drafter.length = self.drafter.length - 1
        return self.propose(token_ids, g, depth, settings, generator)

    def extend(self, g: Tensor) -> None:
        self.drafter.extend(g[None], [len(g)])

    def block(self, root: Tensor) -> Tensor:  # [B, H] of the root [1]
        return self.drafter.block(root)[0]
