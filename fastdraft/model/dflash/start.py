"""Where a new DFlash draft starts: embedding and final norm from the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fastdraft.batch import Ends
from fastdraft.model.dflash.draft import DFlashDraft

if TYPE_CHECKING:
    from fastdraft.config import DraftSection


def fit(
    draft: DFlashDraft,
    settings: DraftSection,
    target: Ends,
    token_counts: Callable[[], np.ndarray],  # [V] int64, how often each token is trained on; a DFlash draft has all of V
) -> list[str]:  # what to tell the user
    """Gives a draft the target's embedding, and a new one, with `init: target`, the weight of the target's final norm, with
    which the target's head reads its states. Raises ValueError for what a DFlash draft has not."""
    if settings.vocab_map is not None:
        raise ValueError(
            f"draft.vocab_map is for drafts with a vocabulary of their own; a {draft.config.title} draft has the target's"
        )
    if settings.init_from is None and settings.init == "target":
        if target.final_norm is None:
            raise ValueError("the target has no final RMSNorm to start from; set draft.init=random")
        draft.norm.weight.data.copy_(target.final_norm)
    draft.take_from_target(target.embedding.float().cpu())
    c = draft.config
    drafted = f"{c.num_drafted} tokens ({c.labels} labels)"
    lines = [f"blocks of {c.block_size} rows draft {drafted} from the target's layers {list(c.layers)}"]
    if c.labels != c.served_labels:
        lines.append(
            f"labels: {c.labels} is served by no engine as plain {c.title}: this draft can be measured, not exported"
        )
    return lines
