"""EAGLE-3 (arXiv 2503.01840): a draft of one layer that reads three of the target's, trained by unrolling it T times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastdraft.batch import Group, TargetHead
from fastdraft.kernels.rms_norm import MAX_HIDDEN
from fastdraft.model.eagle3.config import ARCHITECTURE, DraftConfig, init_config
from fastdraft.model.eagle3.cost import pair_cost, step_cost
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.graph_engine import GraphEngine
from fastdraft.model.eagle3.propose import DraftState
from fastdraft.model.eagle3.ref import ReferenceEngine
from fastdraft.model.eagle3.serving import load_draft, serving_tensors, verify
from fastdraft.model.eagle3.shard import check_cut, cut_draft, part
from fastdraft.model.eagle3.start import fit
from fastdraft.model.method import Method

if TYPE_CHECKING:
    from fastdraft.config import Config


def build_step(
    config: Config,
    draft: Draft,
    head: TargetHead,
    device: torch.device,
    tensor: Group | None = None,
    sequence: Group | None = None,
) -> GraphEngine | ReferenceEngine:
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
    if config.step == "reference":
        return ReferenceEngine(*args)
    return GraphEngine(*args, config.chunk_rows, config.precision == "fp8", tensor, sequence)


METHOD = Method(
    shape=DraftConfig,
    draft=Draft,
    architecture=ARCHITECTURE,
    num_steps=lambda config: config.ttt_length,
    build_step=build_step,
    fit=fit,
    step_cost=step_cost,
    pair_cost=lambda shape, target_params, config: pair_cost(shape, target_params, config.ttt_length),
    drafter=DraftState,
    serving_tensors=serving_tensors,
    load=load_draft,
    verify=verify,
    init_config=init_config,
    part=part,
    cut=cut_draft,
    check_cut=check_cut,
)
