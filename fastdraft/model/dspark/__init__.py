"""DSpark (arXiv 2607.05147): DFlash's block, whose tokens are drawn one after the other through a small Markov head."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from fastdraft.batch import Group, StepWeights, TargetHead
from fastdraft.model import dflash
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.golden import golden_cases
from fastdraft.model.dflash.loss import default_gamma
from fastdraft.model.dflash.parity import run_blocks
from fastdraft.model.dflash.ref import BlockReferenceEngine
from fastdraft.model.dflash.serving import load_draft, verify
from fastdraft.model.dspark.config import DSparkConfig
from fastdraft.model.dspark.draft import DSparkDraft
from fastdraft.model.dspark.golden import load_dspark_golden
from fastdraft.model.dspark.head import DSparkHead, dspark_engine_step
from fastdraft.model.dspark.loss import DSparkLoss
from fastdraft.model.dspark.parity import dspark_readings
from fastdraft.model.dspark.propose import MarkovDrafter
from fastdraft.model.dspark.ref import dspark_losses_ref, dspark_ref_step
from fastdraft.model.dspark.serving import DSPARK
from fastdraft.model.method import Readings

if TYPE_CHECKING:
    from fastdraft.config import Config


def dspark_loss(config: Config, shape: DSparkConfig) -> DSparkLoss:
    b = config.block
    gamma = default_gamma(shape.block_size) if b.gamma is None else b.gamma
    return DSparkLoss(gamma, b.ce_weight, b.l1_weight, b.confidence_weight)


def step_weights(config: Config, shape: DSparkConfig) -> StepWeights:
    weights = torch.tensor(dspark_loss(config, shape).weights(shape.num_drafted), dtype=torch.float64)
    return StepWeights(weights, weights, torch.ones_like(weights))


def build_step(
    config: Config, draft: DSparkDraft, head: TargetHead, device: torch.device, *axes: Group
) -> BlockEngine | BlockReferenceEngine:
    loss = dspark_loss(config, draft.config)
    return dflash.make_block_step(config, draft, head, loss, dspark_losses_ref, DSparkHead, axes)


def check_config(config: Config) -> None:
    """Raises ValueError for settings that a DSpark draft does not read, or cannot have."""
    dflash.check_config(config, DSparkConfig.title)
    if config.block.ce_weight == config.block.l1_weight == 0:
        raise ValueError("block.ce_weight and block.l1_weight are both 0, so nothing says what to draft; give one of them")


def recipe(config: Config, shape: DSparkConfig) -> list[str]:
    """What a step trains, the three terms of its loss and how slots are weighed, and why."""
    loss = dspark_loss(config, shape)
    return [
        f"{dflash.blocks_drawn(config, shape)} A slot's loss is {loss.ce_weight:g} times the cross entropy with the data's "
        f"own token, {loss.l1_weight:g} times the L1 distance from the target's distribution, and "
        f"{loss.confidence_weight:g} times the confidence head's. {dflash.weighed_by_step(loss.gamma)}",
        dflash.rates(config, shape),
    ]


# What is not named here is DFlash's: anchors, start, cost, the way to export.
METHOD = dflash.METHOD._replace(
    shape=DSparkConfig,
    draft=DSparkDraft,
    build_step=build_step,
    drafter=MarkovDrafter,
    load=partial(load_draft, written=DSPARK),
    verify=partial(verify, written=DSPARK),
    step_weights=step_weights,
    check_config=check_config,
    settled=partial(dflash.settled, title=DSparkConfig.title),
    engine_names={"vllm": "dspark", "sglang": "DSPARK"},
    recipe=recipe,
    readings=Readings(dspark_readings, run_blocks),
    cost_options=lambda config: {"anchors": config.block.anchors, "needs_teacher": True},
    tables=("markov_head.*", "confidence_head.*"),
    golden=golden_cases(load_dspark_golden, {"reference": dspark_ref_step, "fused": dspark_engine_step}),
)
