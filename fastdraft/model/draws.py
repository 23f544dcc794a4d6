"""Random numbers of a document: what a training step draws for it depends on nothing that surrounds it.

They are seeded by the run's seed, the optimizer step and the document's own tokens and loss mask. So they are the same
whatever packs, chunks and processes the document meets, and a resumed run draws what the whole one drew. Two documents
with the same tokens and mask draw the same.
"""

from __future__ import annotations

import numpy as np
import xxhash


def document_generator(
    ids: np.ndarray,  # [L] int64
    mask: np.ndarray,  # [L] bool
    seed: int,  # of the run
    step: int,  # of the optimizer
) -> np.random.Generator:
    digest = xxhash.xxh3_64(f"{seed} {step}".encode())
    digest.update(np.ascontiguousarray(ids))
    digest.update(np.ascontiguousarray(mask))
    return np.random.Generator(np.random.PCG64(digest.intdigest()))
