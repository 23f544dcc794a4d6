"""EAGLE-3 (arXiv 2503.01840): a draft of one layer that reads three of the target's, trained by unrolling it T times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastdraft.batch import Group, StepWeights, TargetHead
from fastdraft.kernels.rms_norm import MAX_HIDDEN
from fastdraft.model.eagle3.chunks import SampledDepth
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.cost import pair_cost, step_cost
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.engine import TTTEngine, ttt_engine_step
from fastdraft.model.eagle3.golden import golden_law, load_golden, worst_errors
from fastdraft.model.eagle3.graph_engine import GraphEngine
from fastdraft.model.eagle3.parity import chain_readings, run_chains
from fastdraft.model.eagle3.propose import DraftState
from fastdraft.model.eagle3.ref import ReferenceEngine, ttt_ref_step
from fastdraft.model.eagle3.serving import load_draft, serving_tensors, verify
from fastdraft.model.eagle3.shard import check_cut, cut_draft, part
from fastdraft.model.eagle3.start import fit
from fastdraft.model.method import MEASURED_WIDTH, GoldenCases, Method, Readings, rates_to_try

if TYPE_CHECKING:
    from fastdraft.config import Config


def build_step(
    config: Config,
    draft: Draft,
    head: TargetHead,
    device: torch.device,
    tensor: Group | None = None,
    sequence: Group | None = None,
) -> TTTEngine | ReferenceEngine:
    """The fused step, or the reference where a config asks for it; that one knows of no other process. ValueError: a norm
    is too wide for its kernel."""
    width = 3 * draft.config.target_hidden_size
    if draft.config.norm_before_fc and width > MAX_HIDDEN and device.type == "cuda" and config.step != "reference":
        raise ValueError(
            f"norm_before_fc is one norm of {width} numbers, its kernel holds {MAX_HIDDEN}; take fc_norm, whose norms are "
            "narrower, or set step=reference"
        )
    weights = config.loss.step_decay ** torch.arange(config.ttt_length, dtype=torch.float32, device=device)
    args = draft, head, weights, config.loss.kind, config.loss.lk_scale, config.loss.lk_decay
    depth = sampled_depth(config)
    if config.step == "reference":
        return ReferenceEngine(*args, depth)
    engine = GraphEngine if device.type == "cuda" else TTTEngine  # only a GPU has graphs to record
    return engine(*args, config.chunk_rows, config.precision == "fp8", tensor, sequence, depth)


def sampled_depth(config: Config) -> SampledDepth | None:
    return None if config.sampled_depth == 1 else SampledDepth(config.sampled_depth, config.seed)


def step_weights(config: Config, shape: DraftConfig) -> StepWeights:
    """Step i weighs step_decay ** i; the sum is divided by the live rows of step 0, which no draw leaves out."""
    steps = torch.arange(config.ttt_length, dtype=torch.float64)
    depth = sampled_depth(config)
    drawn = torch.ones_like(steps) if depth is None else torch.from_numpy(depth.shares(config.ttt_length))
    return StepWeights(config.loss.step_decay**steps, (steps == 0).double(), drawn)


def settled(config: Config) -> Config:
    """The config without the section block, which this method does not read."""
    return config.model_copy(update={"block": type(config).model_fields["block"].default})


def check_config(config: Config) -> None:
    if config.block != type(config).model_fields["block"].default:
        raise ValueError("the section block is for methods that draft blocks, not for eagle3; take it out")
    loss = config.loss
    for name in ("lk_scale", "lk_decay"):
        if loss.kind != "lk_lambda" and getattr(loss, name) != type(loss).model_fields[name].default:
            raise ValueError(f"loss.{name} is of loss.kind lk_lambda, and the kind is {loss.kind}; take {name} out")


# The middle of three rates of AdamW's that were tried: with the lowest a draft accepted less, with the highest it depended
# on the seed (docs/quality.md).
MEASURED_LR = 2e-3


def recipe(config: Config, shape: DraftConfig) -> list[str]:
    """Sentences on what a step trains and why, and which rates to try for a draft as wide as this."""
    steps, depth, kind = config.ttt_length, sampled_depth(config), config.loss.kind
    if depth is None:
        chains = f"Every chain runs all {steps} steps, as a server would that drafts so many tokens"
    else:
        share = depth.shares(steps).sum() / steps
        chains = (
            f"A chain runs step i of {steps} with probability {depth.p:g}^i, and its loss weighs 1 / {depth.p:g}^i there: "
            f"{share:.0%} of the rows for the same expected gradient"
        )
    losses = {
        "kl": "kl draws the draft to the target's distribution",
        "lk_alpha": "lk_alpha is the likelihood that the target accepts",
        "lk_lambda": "lk_lambda goes from kl to acceptance itself where that is high",
    }
    measured = (
        f"For a draft {MEASURED_WIDTH} wide AdamW did better at {MEASURED_LR:.2g} and {2 * MEASURED_LR:.2g} than at "
        f"{MEASURED_LR / 2:.2g} (docs/recipe.md)."
    )
    rates = rates_to_try(shape.hidden_size, MEASURED_LR)
    if config.optim.optimizer == "muon":
        times = config.optim.MUON_TIMES
        best = times * MEASURED_LR
        measured = (
            f"For a draft {MEASURED_WIDTH} wide, with AdamW's rate at {MEASURED_LR:.2g}, Muon did better at {best:.2g}, "
            f"{times} times that, than at {best / 4:.2g} and {best * 2:.2g}, and better than AdamW alone "
            "(docs/quality.md)."
        )
        rates = rates_to_try(shape.hidden_size, MEASURED_LR, best)
    return [
        f"{chains}. Step i weighs {config.loss.step_decay:g}^i, since a server comes to it only if the steps before were "
        f"accepted. The loss {losses[kind]}.",
        f"{measured} {rates}",
    ]


METHOD = Method(
    shape=DraftConfig,
    draft=Draft,
    build_step=build_step,
    fit=fit,
    step_cost=step_cost,
    pair_cost=lambda shape, target_used, config: pair_cost(shape, target_used, config.ttt_length, config.sampled_depth),
    drafter=lambda draft, head, batch, capacity: DraftState(draft, batch, capacity),  # it has a head of its own
    serving_tensors=serving_tensors,
    load=load_draft,
    verify=verify,
    step_weights=step_weights,
    check_config=check_config,
    settled=settled,
    engine_names={"vllm": "eagle3", "sglang": "EAGLE3"},
    readings=Readings(chain_readings, run_chains),
    tables=("lm_head.weight",),  # its embedding is not trained
    part=part,
    cut=cut_draft,
    check_cut=check_cut,
    recipe=recipe,
    lowest=(("chunk_rows", 64), ("ttt_length", 1)),
    cost_options=lambda config: {"sampled_depth": config.sampled_depth},
    golden=GoldenCases(
        load_golden,
        lambda case, step: worst_errors(case, {"reference": ttt_ref_step, "fused": ttt_engine_step}[step]),
        lambda case: golden_law(case, ttt_ref_step),
    ),
)
