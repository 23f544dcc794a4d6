"""Golden cases: small float64 DFlash steps computed by independent trainers, replayed on any engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdraft.batch import Batch, Features, Rows, TargetHead
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.loss import BlockLoss, StepLoss
from fastdraft.model.golden import named, read_case, relative_error
from fastdraft.model.method import GoldenCases, StepKind

# (draft, batch, features, head, anchors, loss) -> rows, gradients of the weighted sum of losses by parameter name
RunBlocks = Callable[[DFlashDraft, Batch, Features, TargetHead, Tensor, StepLoss], tuple[Rows, dict[str, Tensor]]]

GIVEN = (  # of a case's config
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "num_target_layers", "block_size", "mask_token_id", "layer_types", "sliding_window", "rms_norm_eps"),
    "rope_parameters",
)


@dataclass(frozen=True)
class BlockGolden:
    """One case: what goes in, and the law for what must come out."""

    name: str
    loss: StepLoss
    draft: DFlashDraft
    batch: Batch
    features: Features
    head: TargetHead
    anchors: Tensor  # [A]
    row_loss: Tensor  # [A, T] of live rows, without weights
    row_acceptance: Tensor  # [A, T]
    live: Tensor  # [A, T] bool
    hits: Tensor | None  # [T] of the data's tokens; None: the method counts those of the teacher
    normaliser: float
    grads: dict[str, Tensor]  # of the normalised loss

    def inputs(self, device: str, dtype: torch.dtype) -> BlockGolden:
        """The same case with what goes in rounded to dtype, on a device; what must come out stays."""
        features = Features(*(x.to(device, dtype) for x in (self.features.g, self.features.f)))
        draft = copy.deepcopy(self.draft).to(device, dtype)
        return replace(self, draft=draft, features=features, head=TargetHead(self.head.weight.to(device, dtype)))


def read_block_golden(path: Path, method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:  # config, tensors
    """A case's file. Raises ValueError naming it when it is not a golden case of that method."""
    config, tensors = read_case(path)
    if config.get("method") != method:
        raise ValueError(f"{path} is a golden case of {config.get('method')}, not of {method}")
    return config, tensors


def load_block_golden(path: Path) -> BlockGolden:
    """Reads one case. Raises ValueError naming the file when it is not a golden case of DFlash."""
    c, tensors = read_block_golden(path, "dflash")
    loss = BlockLoss("dpace" if c["loss_type"] == "dpace" else "ce", c["gamma"], c.get("dpace_alpha", 0.5))
    shape = {"labels": "shifted" if c["alignment"] == "shifted" else "fill_in"}
    first = 1 if shape["labels"] == "fill_in" else 0
    law = tensors["outputs.row_ce"][:, first:], tensors["outputs.slot_correct"][first:]
    return block_golden(c, tensors, loss, DFlashDraft(golden_shape(c, DFlashConfig, **shape)), *law)


def golden_shape(c: dict[str, Any], shape: type[DFlashConfig], **own: Any) -> DFlashConfig:
    """The shape of a case's draft; `own` are the fields that only its method has."""
    return shape(**{name: c[name] for name in GIVEN}, layers=c["target_layer_ids"], max_position_embeddings=4096, **own)


def block_golden(
    c: dict[str, Any],  # the case's config
    tensors: dict[str, Tensor],
    loss: StepLoss,
    draft: DFlashDraft,
    row_loss: Tensor,  # [A, T]
    hits: Tensor | None,  # [T]
) -> BlockGolden:
    """What the file's tensors make of a case, whatever method it is of."""
    draft = draft.to(torch.float64)
    draft.load_state_dict(named(tensors, "weights."))
    draft.take_from_target(tensors["inputs.embed_tokens"].double())
    drafted = slice(draft.config.first_slot, None)
    return BlockGolden(
        name=c["name"],
        loss=loss,
        draft=draft,
        batch=Batch(
            tensors["inputs.input_ids"], tensors["inputs.loss_mask"].bool(), tuple(tensors["inputs.lengths"].tolist())
        ),
        features=Features(tensors["inputs.aux_hidden_states"].double(), tensors["inputs.last_hidden"].double()),
        head=TargetHead(tensors["inputs.target_head"].double()),
        anchors=tensors["inputs.anchors"],
        row_loss=row_loss,
        row_acceptance=tensors["outputs.row_acceptance"][:, drafted],
        live=tensors["outputs.row_live"][:, drafted],
        hits=hits,
        normaliser=float(tensors["outputs.normaliser"]),
        grads=named(tensors, "grads."),
    )


def worst_block_errors(case: BlockGolden, run: RunBlocks) -> dict[str, float]:
    """Worst relative error of row losses and each gradient: max|ours - golden| / max|golden|; NaN is inf."""
    rows, grads = run(case.draft, case.batch, case.features, case.head, case.anchors, case.loss)
    loss, hit, live = (x.cpu()[:, case.anchors].T for x in (rows.loss, rows.hit, rows.live))
    found = {
        "row_loss": relative_error(loss, case.row_loss.where(case.live, 0.0)),
        "live": relative_error(live, case.live),
    }
    if case.hits is not None:
        found["hits"] = relative_error(hit.sum(0), case.hits)
    if case.loss.needs_teacher:
        acceptance = rows.acceptance.cpu()[:, case.anchors].T
        found["acceptance"] = relative_error(acceptance, case.row_acceptance.where(case.live, 0.0))
    if missing := case.grads.keys() ^ grads.keys():
        raise ValueError(f"{case.name}: gradients and golden gradients differ in {sorted(missing)}")
    ours = {name: grad.cpu() / case.normaliser for name, grad in grads.items()}
    return found | {f"grad {name}": relative_error(ours[name], law) for name, law in case.grads.items()}


def block_law(case: BlockGolden, run_ref: RunBlocks) -> dict[str, Any]:
    """What must come out of a case by the reference, with the case's own inputs and normaliser."""
    rows, grads = run_ref(case.draft, case.batch, case.features, case.head, case.anchors, case.loss)
    loss, acceptance, live, hit = (x[:, case.anchors].T for x in (rows.loss, rows.acceptance, rows.live, rows.hit))
    law = {"row_loss": loss, "row_acceptance": acceptance, "live": live}
    law |= {} if case.hits is None else {"hits": hit.sum(0)}
    return law | {"grads": {name: grad / case.normaliser for name, grad in grads.items()}}


def golden_cases(load: Callable[[Path], BlockGolden], steps: dict[StepKind, RunBlocks]) -> GoldenCases:
    """A method's cases, from how one is read and the steps they are replayed on."""
    return GoldenCases(
        load,
        lambda case, step: worst_block_errors(case, steps[step]),
        lambda case: block_law(case, steps["reference"]),
    )
