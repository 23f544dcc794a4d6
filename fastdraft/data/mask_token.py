"""The token that stands for one still to be drafted, in drafts of blocks: no document may have it.

A trained block would read it as a gap. So it is looked for where documents are first known whole: in prepared data before
anything is loaded, and in each block of a stream when it is made, which is before its turn. Looking is one comparison of
token ids; only where the token is found are the files read again, to say which conversation has it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from datasets import Dataset

from fastdraft.data.conversations import BadLine, Line, parse
from fastdraft.data.samples import scan


def refuse_mask_token(
    data: Dataset,
    token: int,
    lines: Iterable[Line],  # that the data were made of, in order
) -> None:
    """Raises ValueError, naming the first conversation as FILE:LINE, where documents have the token."""
    first, found, done = None, 0, 0
    for ids, _, lengths in scan(data):
        rows = np.unique(np.searchsorted(lengths.cumsum(), np.flatnonzero(ids == token), side="right"))
        if first is None and len(rows):
            first = done + int(rows[0])
        found, done = found + len(rows), done + len(lengths)
    if first is None:
        return
    where = _where(data[first]["conversation"], lines) or f"document {first + 1}"
    raise ValueError(
        f"{where} has token {token}, which is the draft's mask_token_id: it would be read as one still to be drafted. "
        f"{found} of {done} documents have it; leave them out, or choose an id that no text of yours has with "
        "draft.overrides.mask_token_id"
    )


def _where(key: int, lines: Iterable[Line]) -> str | None:
    for line in lines:
        try:
            conversation = parse(line)
        except BadLine:
            continue
        if conversation.key == key:
            return conversation.where
    return None
