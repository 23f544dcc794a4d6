"""Features of documents already seen, kept in host memory: the first epoch runs the target, later ones mostly do not.

For data small enough to fit. A document run in other company may differ in its last bits, so a run that was stopped and
resumed (and fills its cache anew) is not bit for bit the one that was not.

# N packed tokens, Ht target hidden
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdraft.batch import Batch, Features
from fastdraft.target.hf import Target


class FeatureCache:
    """Stands before a target's `capture`, holds up to `gib` GiB of g and f. A document is known by its tokens."""

    def __init__(self, target: Target, gib: float):
        self.target, self.room = target, int(gib * 2**30)
        self.documents: dict[bytes, tuple[Tensor, Tensor]] = {}  # g [length, 3*Ht], f [length, Ht]

    def capture(
        self,
        batch: Batch,  # on the host
    ) -> Features:
        """g and f of every token, on the target's device."""
        keys = [ids.numpy().tobytes() for ids in batch.input_ids.split(batch.lengths)]
        new = [d for d, key in enumerate(keys) if key not in self.documents]
        fresh = {}
        if new:
            part, features = run_documents(self.target, batch, new)
            pairs = zip(features.g.split(part.lengths), features.f.split(part.lengths), strict=True)
            fresh = dict(zip(new, pairs, strict=True))
        for d, pair in fresh.items():
            size = sum(x.numel() * x.element_size() for x in pair)
            if size <= self.room:
                self.room -= size
                self.documents[keys[d]] = tuple(x.cpu() if x.is_cuda else x.clone() for x in pair)
        pairs = [fresh[d] if d in fresh else self.documents[key] for d, key in enumerate(keys)]
        g, f = (torch.cat([x.to(self.target.device) for x in column]) for column in zip(*pairs, strict=True))
        return Features(g, f)


def run_documents(
    target: Target,
    batch: Batch,  # on the host
    documents: list[int],  # ascending; at least one
) -> tuple[Batch, Features]:
    """Some documents of a batch as a batch of their own, and its features."""
    ids, mask = (x.split(batch.lengths) for x in (batch.input_ids, batch.loss_mask))
    lengths = tuple(batch.lengths[d] for d in documents)
    part = Batch(torch.cat([ids[d] for d in documents]), torch.cat([mask[d] for d in documents]), lengths)
    return part, target.capture(part.to(target.device))
