"""Small random DFlash drafts, packs and features, in any dtype."""

from __future__ import annotations

import torch

from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft


def dflash_shape(**changes) -> DFlashConfig:
    """16 wide, 4 heads of 8 over 2, two layers that read two of eight, blocks of 5, vocabulary 40, mask token 39."""
    fields = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=40,
        num_target_layers=8,
        layers=(1, 5),
        block_size=5,
        mask_token_id=39,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=256,
    )
    fields |= changes
    fields.setdefault("layer_types", ("full_attention",) * fields["num_hidden_layers"])
    return DFlashConfig(**fields)


class Small:
    """A draft, a pack of documents with a patchy mask, its features and the target's head."""

    def __init__(self, config: DFlashConfig | None = None, lengths=(19, 1, 2, 7, 23), dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=generator).to(dtype)

        self.config = c = config or dflash_shape()
        self.draft = DFlashDraft(c)
        self.draft.init_weights(0.3, generator)
        for name, p in self.draft.named_parameters():
            if p.ndim == 1:
                p.data += 0.2 * torch.randn(p.shape, generator=generator)
                assert "norm" in name
        self.draft.to(dtype).take_from_target(normal(c.vocab_size, c.hidden_size))
        n = sum(lengths)
        ids = torch.randint(c.vocab_size - 1, (n,), generator=generator)
        self.batch = Batch(ids, torch.rand(n, generator=generator) < 0.75, tuple(lengths))
        self.features = Features(normal(n, len(c.layers) * c.hidden_size), normal(n, c.hidden_size))
        self.head = TargetHead(normal(c.vocab_size, c.hidden_size))
