"""The draft vocabulary: the tokens that are trained on most often, counted from tokens alone, or SpecForge's.

# V target vocabulary, Vd draft vocabulary
"""

from __future__ import annotations

import gzip
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

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


def read_vocab_mapping(path: Path, vocab_size: int) -> Tensor:  # [Vd] int64, ascending target ids
    """The draft vocabulary of a vocab_mapping.pt. Raises ValueError when d2t and t2d disagree or are of another target."""
    d2t, t2d = load_tensors(path, "d2t", "t2d")
    t2d = t2d.bool()
    ids = d2t.to(torch.int64) + torch.arange(d2t.numel())
    if t2d.shape != (vocab_size,):
        raise ValueError(f"{path} is for a target of {t2d.numel()} tokens, this one has {vocab_size}")
    if not torch.equal(ids, t2d.nonzero()[:, 0]):
        raise ValueError(f"{path}: d2t and t2d do not name the same {int(t2d.sum())} tokens in ascending order")
    return ids


def load_tensors(path: Path, *names: str) -> list[Tensor]:
    """The named tensors of a torch.save dict. ValueError: the file cannot be read, or holds something else there."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                found = torch.load(file, map_location="cpu", weights_only=True)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # its own words are of how to load the file all the same
        raise ValueError(f"{path} cannot be read: damaged, or more than tensors, which is not loaded") from error
    except (OSError, EOFError, RuntimeError, ValueError, zlib.error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not a dict of tensors")
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path} has no {', '.join(missing)}; it has {', '.join(map(str, found))}")
    if wrong := [f"{name} is {type(found[name]).__name__}" for name in names if not isinstance(found[name], Tensor)]:
        raise ValueError(f"{path}: {'; '.join(wrong)}, not a tensor")
    return [found[name] for name in names]
