"""Best-fit packing of samples into packs of a token budget, longest first.

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
