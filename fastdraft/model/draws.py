"""Random numbers of a document: what a training step draws for it depends on nothing that surrounds it.

They are seeded by the run's seed, the optimizer step and the document's own tokens and loss mask. So they are the same
whatever packs, chunks and processes the document meets, and a resumed run draws what the whole one drew. Two documents
with the same tokens and mask draw the same.

# N packed tokens, L tokens of a document
"""

from __future__ import annotations

import numpy as np
import xxhash

from fastdraft.batch import Batch


def _key(ids: np.ndarray, mask: np.ndarray, seed: int, step: int) -> int:  # 64 bits
    digest = xxhash.xxh3_64(f"{seed} {step}".encode())
    digest.update(np.ascontiguousarray(ids))
    digest.update(np.ascontiguousarray(mask))
    return digest.intdigest()


def document_generator(
    ids: np.ndarray,  # [L] int64
    mask: np.ndarray,  # [L] bool
    seed: int,  # of the run
    step: int,  # of the optimizer
) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(_key(ids, mask, seed, step)))


def token_uniforms(
    batch: Batch,  # on the host
    seed: int,  # of the run
    step: int,  # of the optimizer
) -> np.ndarray:  # [N] float64 in (0, 1]
    """A number for each token: SplitMix64 (Steele, Lea, Flood 2014) of its document's key, as many steps on as the token is
    places into it. A generator for each document would take 10 us to make, and short chats fill a pack by the hundred."""
    ids, mask = batch.input_ids.numpy(), batch.loss_mask.numpy()
    ends = np.cumsum(batch.lengths)
    parts = [slice(end - length, end) for end, length in zip(ends, batch.lengths, strict=True)]
    keys = np.array([_key(ids[part], mask[part], seed, step) for part in parts], dtype=np.uint64)
    place = np.arange(1, batch.num_tokens + 1, dtype=np.uint64) - np.repeat(
        (ends - batch.lengths).astype(np.uint64), batch.lengths
    )
    x = np.repeat(keys, batch.lengths) + place * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return ((x >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
