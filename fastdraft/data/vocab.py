"""The draft vocabulary: the tokens that are trained on most often, counted from tokens alone.

# V target vocabulary, Vd draft vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fastdraft.data.samples import scan


def token_counts(
    dataset: Dataset,
    vocab_size: int,
) -> np.ndarray:  # [V] int64
    """How often each token is trained on (loss mask set). ValueError for a token id outside 0 .. vocab_size - 1."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for ids, mask, _ in scan(dataset):
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            bad = int(ids.max()) if ids.max() >= vocab_size else int(ids.min())
            raise ValueError(
                f"token id {bad} is not in the target's vocabulary of {vocab_size}: this data is of another target"
            )
        counts += np.bincount(ids[mask], minlength=vocab_size)
    return counts


def build_vocab_map(
    counts: np.ndarray,  # [V] from `token_counts`
    draft_vocab_size: int,
) -> Tensor:  # [Vd] int64, ascending target ids
    """The draft_vocab_size most trained tokens; ties, and what is missing if fewer are ever trained, go to the lower id.

    ValueError for a draft vocabulary larger than the target's.
    """
    if not 1 <= draft_vocab_size <= len(counts):
        raise ValueError(
            f"draft_vocab_size {draft_vocab_size} must be between 1 and the target's vocabulary of {len(counts)}"
        )
    return torch.from_numpy(np.sort(_by_count(counts)[:draft_vocab_size]))


def coverage(
    counts: np.ndarray,  # [V] from `token_counts`
    sizes: Sequence[int],
) -> dict[int, float]:
    """For each draft vocabulary size, the share of trained tokens that it holds. ValueError if nothing is trained."""
    if not counts.any():
        raise ValueError("no trained token to cover: every loss mask is empty")
    cumulative = np.cumsum(counts[_by_count(counts)]) / counts.sum()
    return {size: float(cumulative[min(size, len(counts)) - 1]) for size in sizes}


def _by_count(counts: np.ndarray) -> np.ndarray:
    return np.argsort(-counts, kind="stable")
