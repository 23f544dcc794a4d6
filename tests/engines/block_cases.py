"""A tiny target, and a draft of each block method trained so little on its outputs that many of its tokens are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from small_blocks import train_briefly

from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dspark.loss import DSparkLoss
from fastdraft.model.methods import METHODS
from fastdraft.serving.engines import Run
from fastdraft.serving.export import export_draft, verify
from fastdraft.target.hf import Target
from fastdraft.target.identity import origin

NEW_TOKENS = 30
FIELDS = {
    "dflash": {"block_size": 6},
    "dspark": {"block_size": 5, "markov_rank": 16},
    "dflash2": {"block_size": 6, "selector_rank": 16, "selector_top_k": 8},
}
LOSSES = {"dflash": BlockLoss(gamma=4.0), "dspark": DSparkLoss(gamma=4.0), "dflash2": SelectorLoss(gamma=4.0)}


@dataclass(frozen=True)
class BlockCase:
    target: Target
    checkpoint: Path
    run: Run


def far_apart(draft: torch.nn.Module) -> None:
    """Norms of the layers' keys as after long training, where one layer's cannot stand for another's."""
    generator = torch.Generator().manual_seed(1)
    for layer in draft.layers:
        weight = layer.self_attn.k_norm.weight
        weight.data *= (0.5 * torch.randn(weight.shape, generator=generator)).exp()


def make_block_case(
    changes: dict,  # of the draft's shape
    folder: Path,
    method: str = "dflash",
    start: Callable[[torch.nn.Module], None] = lambda draft: None,  # changes a new draft's weights
    steps: int = 15,
    end: Callable[[torch.nn.Module], None] = lambda draft: None,  # changes the trained draft before it is exported
) -> BlockCase:
    target, draft, asked, _ = train_briefly(method, FIELDS[method] | changes, LOSSES[method], steps, start=start)
    target.model.save_pretrained(folder / "target")
    end(draft)
    checkpoint = export_draft(draft, folder / "draft", torch.float32, trained_for=origin(str(folder / "target")))
    assert not verify(checkpoint, folder / "target").errors
    name = METHODS[method].engine_names["vllm"]
    run = str(folder / "target"), str(checkpoint), asked, NEW_TOKENS, [2], "float32", draft.config.num_drafted
    return BlockCase(target, checkpoint, Run(*run, algorithm=name))
