"""DFlash2: DFlash with convolutions along a block, and a selector that chooses among each slot's candidates in turn."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from fastdraft.batch import TargetHead
from fastdraft.model import dflash
from fastdraft.model.dflash.engine import BlockEngine, refuse_head
from fastdraft.model.dflash.ref import BlockReferenceEngine
from fastdraft.model.dflash2.config import ARCHITECTURE, DFlash2Config
from fastdraft.model.dflash2.cost import pair_cost, step_cost
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.dflash2.head import SelectorHead
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dflash2.mixer import ConvolutionMixer
from fastdraft.model.dflash2.propose import SelectorDrafter
from fastdraft.model.dflash2.ref import selector_losses_ref

if TYPE_CHECKING:
    from fastdraft.config import Config


def selector_loss(config: Config, shape: DFlash2Config) -> SelectorLoss:
    unary = dflash.block_loss(config, shape)
    return SelectorLoss(**vars(unary), selector_alpha=config.block.selector_alpha)


def build_step(
    config: Config, draft: DFlash2Draft, head: TargetHead, device: torch.device, *_axes: object
) -> BlockEngine | BlockReferenceEngine:
    """As DFlash's, with the convolutions and the selector's head."""
    refuse_head(head)
    loss, draw = selector_loss(config, draft.config), dflash.anchors_of(config)
    if config.step == "reference":
        return BlockReferenceEngine(draft, head, loss, draw, selector_losses_ref)
    return BlockEngine(draft, head, loss, draw, config.chunk_rows, SelectorHead, ConvolutionMixer(draft))


METHOD = dflash.METHOD._replace(
    shape=DFlash2Config,
    draft=DFlash2Draft,
    architecture=ARCHITECTURE,
    build_step=build_step,
    step_cost=step_cost,
    pair_cost=lambda shape, target_params, config: pair_cost(shape, target_params, config.block.anchors),
    drafter=SelectorDrafter,
)
