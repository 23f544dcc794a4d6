"""Where a new EAGLE-3 draft starts: its vocabulary from the data, embedding, head and norm from the target.

# V target vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fastdraft.batch import Ends
from fastdraft.data.vocab import build_vocab_map, coverage, read_vocab_mapping
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.serving import recurrence_notes
from fastdraft.model.method import CONFIG
from fastdraft.model.target_config import read_json

if TYPE_CHECKING:
    from fastdraft.config import DraftSection


def fit(
    draft: Draft,
    settings: DraftSection,
    target: Ends,
    token_counts: Callable[[], np.ndarray],  # [V] int64, how often each token is trained on
) -> list[str]:  # what to tell the user
    """Sets what a new draft takes from the target and the data: vocabulary map, embedding, and where to start from."""
    messages, size = [], draft.config.draft_vocab_size
    if settings.init_from is None:
        counts = token_counts()
        if settings.vocab_map is not None:
            ids = _given_vocabulary(Path(settings.vocab_map), draft.config.vocab_size)
            share = counts[ids.numpy()].sum() / counts.sum()
            messages.append(
                f"vocabulary map of {settings.vocab_map}: its {len(ids):,} tokens are {share:.2%} of all trained"
            )
        else:
            ids = build_vocab_map(counts, size)
            share = coverage(counts, [size])[size]
            messages.append(f"vocabulary map: the {size:,} most trained tokens are {share:.2%} of all trained")
        draft.set_vocab(ids)
        if settings.init == "target" and draft.config.hidden_size == target.hidden_size:
            if target.final_norm is None:
                raise ValueError("the target has no final RMSNorm to start from; set draft.init=random")
            draft.start_from_target(target.head.weight, target.final_norm)
    else:
        notes = recurrence_notes(read_json(Path(settings.init_from) / CONFIG), draft.norm.weight)
        messages += [f"warning: draft.init_from: {note}" for note in notes]
    if settings.init_from is None or bool(draft.embed_tokens.weight.isnan().any()):
        draft.set_embedding(target.embedding.float().cpu())
    return messages


def _given_vocabulary(path: Path, vocab_size: int) -> Tensor:  # [Vd] int64, ascending target ids
    """`read_vocab_mapping` of draft.vocab_map. ValueError for any file that is none: what PyTorch's unpickler says of one
    depends on its first bytes."""
    try:
        return read_vocab_mapping(path, vocab_size)
    except ValueError as error:
        raise ValueError(f"draft.vocab_map: {error}") from error
    except Exception as error:
        raise ValueError(
            f"draft.vocab_map: {path} is no vocab_mapping.pt of SpecForge, a file that torch.save wrote "
            f"({type(error).__name__}: {error})"
        ) from error
