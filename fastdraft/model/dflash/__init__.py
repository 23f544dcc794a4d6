"""DFlash (arXiv 2602.06036): a draft of a few layers that fills a block of tokens at once from the target's states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdraft.batch import Batch, Group, StepWeights, TargetHead
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.config import DFlashConfig, choose_mask_token
from fastdraft.model.dflash.cost import blocks_of_a_token, pair_cost, step_cost
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.engine import BlockEngine, block_engine_step, refuse_head
from fastdraft.model.dflash.golden import golden_cases, load_block_golden
from fastdraft.model.dflash.graph_engine import GraphBlockEngine
from fastdraft.model.dflash.head import BlockHead, TokenHead
from fastdraft.model.dflash.loss import BlockLoss, BlockLossKind, StepLoss, default_gamma
from fastdraft.model.dflash.mixer import Mixer
from fastdraft.model.dflash.parity import block_readings, run_blocks, served_steps
from fastdraft.model.dflash.propose import BlockDrafter, refuse_settings
from fastdraft.model.dflash.ref import BlockReferenceEngine, RowLosses, block_ref_step, token_losses_ref
from fastdraft.model.dflash.serving import load_draft, serving_tensors, verify
from fastdraft.model.dflash.start import copy_layers, fit, start_lines
from fastdraft.model.method import MEASURED_WIDTH, Method, Readings, rates_to_try

if TYPE_CHECKING:
    from fastdraft.config import Config


# The loss of a method whose config names none, by measured acceptance (docs/quality.md).
OWN_LOSS: dict[str, BlockLossKind] = {"dflash": "dpace", "dflash2": "ce"}


def loss_kind(config: Config) -> BlockLossKind:
    return config.block.loss or OWN_LOSS.get(config.draft.method, "ce")


def block_loss(config: Config, shape: DFlashConfig) -> BlockLoss:
    b = config.block
    gamma = default_gamma(shape.block_size) if b.gamma is None else b.gamma
    return BlockLoss(loss_kind(config), gamma, b.dpace_alpha, b.lk_scale, b.lk_decay)


def step_weights(config: Config, shape: DFlashConfig) -> StepWeights:
    loss = block_loss(config, shape)
    weights, normaliser = loss.weights(shape.num_drafted), loss.normaliser(shape.num_drafted)
    every_row = [1.0] * shape.num_drafted
    return StepWeights(*(torch.tensor(x, dtype=torch.float64) for x in (weights, normaliser, every_row)))


def build_step(
    config: Config, draft: DFlashDraft, head: TargetHead, device: torch.device, *axes: Group
) -> BlockEngine | BlockReferenceEngine:
    return make_block_step(config, draft, head, block_loss(config, draft.config), token_losses_ref, TokenHead, axes)


def make_block_step(
    config: Config,
    draft: DFlashDraft,
    head: TargetHead,
    loss: StepLoss,
    row_losses: RowLosses,
    head_type: Callable[[DFlashDraft, TargetHead, StepLoss], BlockHead],
    axes: Sequence[Group] = (),  # tensor, of one process as `refuse_parts` sees to, and sequence; or none
    mixer: Mixer | None = None,
) -> BlockEngine | BlockReferenceEngine:
    """The fused engine, or the reference where a config asks for it."""
    refuse_head(head, draft.config.title)
    draw = anchors_of(config)
    if config.step == "reference":
        return BlockReferenceEngine(draft, head, loss, draw, row_losses)
    return GraphBlockEngine(draft, head, loss, draw, config.chunk_rows, head_type, mixer, axes[1] if axes else None)


def refuse_parts(shape: DFlashConfig, size: int) -> None:
    """Raises ValueError where more than one process would share the weights."""
    if size > 1:
        raise ValueError(
            f"dist.tensor={size}: the weights of a {shape.title} draft are not divided among processes; set dist.tensor=1, "
            "and dist.sequence above 1 where a pack is too long for one process. Masters and moments of the optimizer are "
            "divided among all processes as it is"
        )


def anchors_of(config: Config) -> Callable[[Batch, int], Tensor]:
    """Draws a run's anchors of a batch at a step."""
    return lambda batch, step: draw_anchors(batch, config.block.anchors, config.seed, step)


# Settings of the section block that not all methods with this backbone have, and whose they are.
HARD_OR_SOFT = (DFlashConfig.title, "DFlash2")
OWNERS = {
    **dict.fromkeys(("loss", "dpace_alpha", "lk_scale", "lk_decay"), HARD_OR_SOFT),
    **dict.fromkeys(("ce_weight", "l1_weight", "confidence_weight"), ("DSpark",)),
    "selector_alpha": ("DFlash2",),
}
# Settings of the section block that one of its losses reads, and which.
OF_ONE_LOSS = {"dpace_alpha": "dpace", "lk_scale": "lk_lambda", "lk_decay": "lk_lambda"}


def settled(config: Config, title: str = DFlashConfig.title) -> Config:
    """The config with the loss that a step has, and without settings that a draft of the method with this title does not
    read."""
    fields, block = type(config).model_fields, config.block
    of_others = [name for name, owners in OWNERS.items() if title not in owners]
    own = {"loss": loss_kind(config)} | {name: type(block).model_fields[name].default for name in of_others}
    return config.model_copy(update={"loss": fields["loss"].default, "block": block.model_copy(update=own)})


def check_config(config: Config, title: str = DFlashConfig.title) -> None:
    """Raises ValueError for settings that a draft of the method with this title does not read, or cannot have."""
    fields, block = type(config).model_fields, config.block
    if config.draft.vocab_map is not None:
        raise ValueError(f"draft.vocab_map is for drafts with a vocabulary of their own; a {title} draft has the target's")
    for name, owners in OWNERS.items():
        if title not in owners and getattr(block, name) != type(block).model_fields[name].default:
            whose = " and ".join(owners)
            raise ValueError(f"block.{name} is {whose}'s, and draft.method is {config.draft.method}; take it out")
    kind = loss_kind(config)
    for name, loss in OF_ONE_LOSS.items():
        if loss != kind and getattr(block, name) != type(block).model_fields[name].default:
            raise ValueError(f"block.{name} is of block.loss {loss}, and the loss is {kind}; take {name} out")
    if kind == "dpace" and block.gamma is not None:
        whose = f", {title}'s own where none is set" if block.loss is None else ""
        raise ValueError(
            f"block.gamma is {block.gamma:g} and block.loss dpace{whose}, which makes its weights of the draft's own "
            "probabilities; take gamma out, or set block.loss=ce"
        )
    if config.ttt_length != fields["ttt_length"].default:
        raise ValueError(
            f"ttt_length {config.ttt_length} is EAGLE-3's; a {title} draft has draft.overrides.block_size: take it out"
        )
    if config.sampled_depth != 1:
        raise ValueError(
            f"sampled_depth {config.sampled_depth} is EAGLE-3's, whose chains run step after step; a {title} draft fills "
            "its blocks at once: take it out"
        )
    if config.loss != fields["loss"].default:
        raise ValueError(f"the section loss is EAGLE-3's; a {title} draft's loss is in the section block: take loss out")
    if config.precision == "fp8":
        raise ValueError(f"precision: fp8 is not made for {title} drafts; set precision=bf16")


def recipe(config: Config, shape: DFlashConfig) -> list[str]:
    """What a step trains, its loss and how slots are weighed, and why."""
    loss = block_loss(config, shape)
    compared = "the target's distribution" if loss.needs_teacher else "the data's own token"
    weighed = weighed_by_step(loss.gamma)
    if loss.kind == "dpace":
        weighed = (
            "A slot weighs what its token adds to the number that a server is expected to accept, by the draft's own "
            "probabilities, and the sum is divided by the number of blocks."
        )
    lines = [f"{blocks_drawn(config, shape)} The loss {loss.kind} compares a slot with {compared}. {weighed}"]
    if loss.kind == "ce" and OWN_LOSS[config.draft.method] == "dpace":
        lines.append(
            "A DFlash draft 576 wide accepted 0.06 to 0.12 tokens more in a chain of 3 with block.loss=dpace "
            "(docs/quality.md)."
        )
    return [*lines, rates(config, shape)]


def rates(config: Config, shape: DFlashConfig) -> str:
    """What was best for a DFlash draft, by one seed of each rate, and which to try for one as wide as this."""
    if config.optim.optimizer == "muon":
        measured = "with AdamW's rate at 0.002, Muon did better at 0.016, 8 times that, than at 0.002 and 0.008"
        tried = rates_to_try(shape.hidden_size, 2e-3, 1.6e-2)
    else:
        measured = "AdamW did better at 0.004 than at 0.001, 0.002 and 0.008"
        tried = rates_to_try(shape.hidden_size, 4e-3)
    return f"For a DFlash draft {MEASURED_WIDTH} wide {measured} (one seed each, docs/quality.md). {tried}"


def blocks_drawn(config: Config, shape: DFlashConfig) -> str:
    return (
        f"Up to {config.block.anchors} blocks of each document are trained, at every step others, of {shape.num_drafted} "
        "drafted tokens each."
    )


def weighed_by_step(gamma: float) -> str:
    return (
        f"Drafted token j = 0, 1, ... of a block weighs exp(-j / {gamma:g}), since a token counts only where all before it "
        "were accepted, and the sum is divided by the sum of the weights."
    )


def refuse_useless(name: str, pieces: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Raises ValueError where no document of a set has a place at which `draw_anchors` can begin a block."""
    count = 0
    for _, mask, lengths in pieces:
        ends = lengths.cumsum()
        at = np.flatnonzero(mask[:-1] & mask[1:])
        end = ends[np.searchsorted(ends, at, side="right")]
        begin = (ends - lengths)[np.searchsorted(ends, at, side="right")]
        if bool(((at > begin) & (at + 1 < end)).any()):
            return
        count += len(lengths)
    raise ValueError(
        f"none of the {count} {name} documents has a place where a block can begin: two tokens in a row in the mask, "
        "with a token before them; give longer answers, and see what is trained on with `fastdraft data preview`"
    )


def cost_options(config: Config) -> dict[str, int | bool]:
    """What `step_cost` reads of a config beside what all methods' do."""
    return {
        "anchors": config.block.anchors,
        "needs_teacher": BlockLoss(loss_kind(config)).needs_teacher,
        "held_out": bool(config.data.eval_paths) or config.data.eval_fraction > 0,
    }


METHOD = Method(
    shape=DFlashConfig,
    draft=DFlashDraft,
    build_step=build_step,
    fit=fit,
    step_cost=step_cost,
    pair_cost=lambda shape, target_used, config: pair_cost(shape, target_used, config.block.anchors),
    drafter=BlockDrafter,
    serving_tensors=serving_tensors,
    load=load_draft,
    verify=verify,
    step_weights=step_weights,
    check_config=check_config,
    settled=settled,
    engine_names={"vllm": "dflash", "sglang": "DFLASH"},
    from_tokenizer=choose_mask_token,
    refuse_settings=refuse_settings,
    served_steps=served_steps,
    readings=Readings(block_readings, run_blocks),
    recipe=recipe,
    start=copy_layers,
    start_lines=start_lines,
    cost_options=cost_options,
    lowest=(("chunk_rows", 1), ("block.anchors", 8)),
    step_rows=lambda config: blocks_of_a_token(config.data.pack_tokens, config.data.max_length, config.block.anchors),
    golden=golden_cases(load_block_golden, {"reference": block_ref_step, "fused": block_engine_step}),
    refuse_useless=refuse_useless,
    mask_token=lambda shape: shape.mask_token_id,
    has_vocabulary_map=False,
    check_cut=refuse_parts,
)
