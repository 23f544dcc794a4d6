"""What prepared data is like, in numbers: lengths, trained share, coverage of a vocabulary map, how full the packs are.

# n samples, V target vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from fastdraft.data.pack import pack
from fastdraft.data.samples import scan
from fastdraft.data.vocab import coverage, token_counts

VOCABULARIES = (8192, 16384, 32768, 65536)  # whose coverage is said
QUANTILES = {"half": 0.5, "90 %": 0.9, "99 %": 0.99}


@dataclass(frozen=True)
class Statistics:
    """Of the samples to train on."""

    lengths: np.ndarray  # [n] tokens
    trained: np.ndarray  # [n] trained tokens of each sample
    counts: np.ndarray  # [V] how often each token is trained
    pack_tokens: int
    fill: np.ndarray  # [packs] tokens in each pack of an epoch

    def coverage(self, draft_vocab_size: int | None = None) -> dict[int, float]:
        """Share of trained tokens that a map of each customary size, and of this one, would hold."""
        sizes = {size for size in VOCABULARIES if size < len(self.counts)} | {draft_vocab_size or len(self.counts)}
        return coverage(self.counts, sorted(sizes))

    def lines(self, draft_vocab_size: int | None = None) -> list[str]:
        """The statistics as sentences for people."""
        places = np.quantile(self.lengths, list(QUANTILES.values()), method="higher")
        said = ", ".join(f"{name} up to {at:,}" for name, at in zip(QUANTILES, places.tolist(), strict=True))
        covered = ", ".join(f"{size:,}: {share:.2%}" for size, share in self.coverage(draft_vocab_size).items())
        return [
            f"train samples: {self.lengths.min():,} to {self.lengths.max():,} tokens, "
            f"mean {self.lengths.mean():,.1f}; {said}",
            f"trained share of a sample: mean {np.mean(self.trained / self.lengths):.0%}, "
            f"of all train tokens {self.trained.sum() / self.lengths.sum():.0%}",
            f"{np.count_nonzero(self.counts):,} of {len(self.counts):,} tokens are ever trained; what a vocabulary map "
            f"of so many holds of all trained: {covered}",
            f"{len(self.fill):,} packs of {self.pack_tokens:,} tokens, {self.fill.mean() / self.pack_tokens:.1%} full",
        ]


def statistics(dataset: Dataset, vocab_size: int, pack_tokens: int) -> Statistics:
    """ValueError as `token_counts` and `pack`."""
    lengths, trained = [], []
    for _, mask, n in scan(dataset):
        lengths.append(n)
        trained.append(np.bincount(np.repeat(np.arange(len(n)), n), weights=mask, minlength=len(n)))
    lengths = np.concatenate(lengths)
    fill = np.array([lengths[samples].sum() for samples in pack(lengths, pack_tokens)])
    return Statistics(lengths, np.concatenate(trained), token_counts(dataset, vocab_size), pack_tokens, fill)
