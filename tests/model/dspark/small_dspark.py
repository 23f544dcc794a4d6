"""Small random DSpark drafts, packs and features, in any dtype."""

from __future__ import annotations

import torch
from small_dflash import Small, dflash_shape

from fastdraft.model.dspark.config import DSparkConfig
from fastdraft.model.dspark.draft import DSparkDraft


def dspark_shape(**changes) -> DSparkConfig:
    """As `dflash_shape`, with a Markov head of rank 6."""
    fields = dflash_shape(labels="shifted", **{k: v for k, v in changes.items() if k != "markov_rank"}).model_dump()
    return DSparkConfig(**fields, markov_rank=changes.get("markov_rank", 6))


class SmallSpark(Small):
    """`Small` with a DSpark draft whose heads are large enough to matter."""

    def __init__(self, config: DSparkConfig | None = None, lengths=(19, 1, 2, 7, 23), dtype=torch.float64, seed=0):
        config = config or dspark_shape()
        super().__init__(config, lengths, dtype, seed)
        plain, self.draft = self.draft, DSparkDraft(config)
        generator = torch.Generator().manual_seed(seed + 1)
        self.draft.init_weights(0.6, generator)
        self.draft.load_state_dict(plain.state_dict(), strict=False)
        self.draft.confidence_head.proj.bias.data.fill_(0.3)
        self.draft.to(dtype).take_from_target(plain.embedding)
