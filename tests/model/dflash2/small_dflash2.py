"""Small random DFlash2 drafts, whose convolutions and selector are far from doing nothing."""

from __future__ import annotations

import torch
from small_dflash import Small, dflash_shape

from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.dflash2.draft import DFlash2Draft

MORE = dict(conv_kernel_size=2, conv_group_size=4, selector_rank=6, selector_top_k=5)


def small_dflash2(lengths=(19, 1, 2, 7, 23), dtype=torch.float64, seed=0, **changes) -> Small:
    """`Small` with a DFlash2 draft: 16 wide, two layers, blocks of 5, groups of 4 channels, five candidates, rank 6."""
    more = MORE | {name: changes.pop(name) for name in list(changes) if name in MORE}
    case = Small(dflash_shape(**changes), lengths, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    embedding, weights = case.draft.embedding, case.draft.state_dict()
    case.config = DFlash2Config(**case.config.model_dump() | more)
    case.draft = DFlash2Draft(case.config)
    case.draft.init_weights(0.3, generator)
    case.draft.load_state_dict(weights, strict=False)
    for name, p in case.draft.named_parameters():
        if "conv" in name or "selector" in name:
            p.data += 0.4 * torch.randn(p.shape, generator=generator)
    case.draft.to(dtype).take_from_target(embedding)
    return case
