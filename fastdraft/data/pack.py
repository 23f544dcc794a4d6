"""Best-fit packing of samples into packs of a token budget, longest first; and dealing packs to ranks by what they cost.

Each sample goes where it leaves the least room. Open packs are kept by their free room, and which amounts of free room
occur is a bit set in one integer, so finding the best fit is a shift and the lowest set bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(
    lengths: Sequence[int] | np.ndarray,  # [n] tokens, each 1 .. budget
    budget: int,  # tokens of one pack
) -> list[list[int]]:
    """Packs as lists of indices into lengths. Deterministic; samples of equal length keep their order, so a caller that
    shuffles them first gets other packs of the same number. ValueError for a length above the budget."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.max() > budget or lengths.min() < 1):
        bad = int(lengths.max() if lengths.max() > budget else lengths.min())
        raise ValueError(
            f"a sample of {bad} tokens does not fit a pack of 1 .. {budget}; lower max_length or raise pack_tokens"
        )
    packs: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free tokens -> open packs
    rooms = 0  # bit r set where room[r] has a pack
    order = np.argsort(-lengths, kind="stable")
    for i, n in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fits = rooms >> n
        if fits:
            free = n + (fits & -fits).bit_length() - 1
            p = room[free].pop()
            if not room[free]:
                rooms ^= 1 << free
            packs[p].append(i)
        else:
            free, p = budget, len(packs)
            packs.append([i])
        if free > n:
            room.setdefault(free - n, []).append(p)
            rooms |= 1 << (free - n)
    return packs


def deal(
    costs: Sequence[float] | np.ndarray,  # [n] of the packs of one optimizer step
    num_ranks: int,  # divides n
) -> list[list[int]]:
    """For each rank the packs it takes, ascending: equally many for all, the costliest first to the rank with least so far.

    Deterministic, so every rank can deal for itself. Equally many, because some parallel forwards meet once a pack.
    """
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for p in np.argsort(-np.asarray(costs, dtype=np.float64), kind="stable").tolist():
        rank = min((r for r in range(num_ranks) if len(dealt[r]) * num_ranks < len(costs)), key=loads.__getitem__)
        dealt[rank].append(p)
        loads[rank] += costs[p]
    return [sorted(packs) for packs in dealt]
