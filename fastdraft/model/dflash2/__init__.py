"""DFlash2: DFlash with convolutions along a block, and a selector that chooses among each slot's candidates in turn."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from fastdraft.batch import Group, TargetHead
from fastdraft.model import dflash
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.golden import golden_cases
from fastdraft.model.dflash.parity import run_blocks
from fastdraft.model.dflash.ref import BlockReferenceEngine
from fastdraft.model.dflash.serving import verify
from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.dflash2.golden import load_selector_golden
from fastdraft.model.dflash2.head import SelectorHead, selector_engine_step
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dflash2.mixer import ConvolutionMixer
from fastdraft.model.dflash2.parity import selector_readings
from fastdraft.model.dflash2.propose import SelectorDrafter
from fastdraft.model.dflash2.ref import selector_losses_ref, selector_ref_step
from fastdraft.model.dflash2.serving import DFLASH2, load_or_widen
from fastdraft.model.method import Readings

if TYPE_CHECKING:
    from fastdraft.config import Config


def selector_loss(config: Config, shape: DFlash2Config) -> SelectorLoss:
    return SelectorLoss(**vars(dflash.block_loss(config, shape)), selector_alpha=config.block.selector_alpha)


def build_step(
    config: Config, draft: DFlash2Draft, head: TargetHead, device: torch.device, *axes: Group
) -> BlockEngine | BlockReferenceEngine:
    loss, mixer = selector_loss(config, draft.config), ConvolutionMixer(draft)
    return dflash.make_block_step(config, draft, head, loss, selector_losses_ref, SelectorHead, axes, mixer)


def recipe(config: Config, shape: DFlash2Config) -> list[str]:
    """DFlash's, and the selector's part of the loss."""
    return [
        *dflash.recipe(config, shape),
        f"To a slot's loss comes {config.block.selector_alpha:g} times the selector's cross entropy among the slot's "
        f"{shape.selector_top_k} candidates, given the token before: it learns which of them fits that token.",
    ]


# What is not named here is DFlash's: anchors, weights of steps, start, cost, the way to export.
METHOD = dflash.METHOD._replace(
    shape=DFlash2Config,
    draft=DFlash2Draft,
    build_step=build_step,
    drafter=SelectorDrafter,
    load=load_or_widen,
    verify=partial(verify, written=DFLASH2),
    check_config=partial(dflash.check_config, title=DFlash2Config.title),
    settled=partial(dflash.settled, title=DFlash2Config.title),
    recipe=recipe,
    tables=("candidate_selector.*_codebook",),
    golden=golden_cases(load_selector_golden, {"reference": selector_ref_step, "fused": selector_engine_step}),
    readings=Readings(selector_readings, run_blocks),
)
