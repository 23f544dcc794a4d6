"""Golden cases: small float64 DFlash steps computed by independent trainers, replayed on any engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fastdraft.batch import Batch, Features, Rows, TargetHead
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.golden import relative_error

# (draft, batch, features, head, anchors, loss) -> rows, gradients of the weighted sum of losses by parameter name
RunBlocks = Callable[[DFlashDraft, Batch, Features, TargetHead, Tensor, BlockLoss], tuple[Rows, dict[str, Tensor]]]

GIVEN = (  # of a case's config
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "num_target_layers", "block_size", "mask_token_id", "layer_types", "sliding_window", "rms_norm_eps"),
    "rope_parameters",
)


@dataclass(frozen=True)
class BlockGolden:
    """One case: what goes in, and the law for what must come out."""

    name: str
    loss: BlockLoss
    draft: DFlashDraft
    batch: Batch
    features: Features
    head: TargetHead
    anchors: Tensor  # [A]
    row_loss: Tensor  # [A, T] of live rows, without weights
    row_acceptance: Tensor  # [A, T]
    live: Tensor  # [A, T] bool
    hits: Tensor  # [T]
    normaliser: float
    grads: dict[str, Tensor]  # of the normalised loss

    def inputs(self, device: str, dtype: torch.dtype) -> BlockGolden:
        """The same case with what goes in rounded to dtype, on a device; what must come out stays."""
        features = Features(*(x.to(device, dtype) for x in (self.features.g, self.features.f)))
        draft = copy.deepcopy(self.draft).to(device, dtype)
        return replace(self, draft=draft, features=features, head=TargetHead(self.head.weight.to(device, dtype)))


def load_block_golden(path: Path) -> BlockGolden:
    """Reads one case. Raises ValueError naming the file when it is not a golden case of DFlash."""
    try:
        with safe_open(path, "pt") as file:
            c = json.loads(file.metadata()["config"])
            t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except Exception as error:
        raise ValueError(f"{path} is not a readable golden case: {error}") from error
    shifted = c["alignment"] == "shifted"
    config = DFlashConfig(
        **{name: c[name] for name in GIVEN},
        layers=c["target_layer_ids"],
        labels="shifted" if shifted else "fill_in",
        max_position_embeddings=4096,
    )
    draft = DFlashDraft(config).to(torch.float64)
    draft.load_state_dict({key.removeprefix("weights."): value for key, value in t.items() if key.startswith("weights.")})
    draft.take_from_target(t["inputs.embed_tokens"].double())
    batch = Batch(t["inputs.input_ids"], t["inputs.loss_mask"].bool(), tuple(t["inputs.lengths"].tolist()))
    drafted = slice(config.first_slot, None)
    return BlockGolden(
        name=c["name"],
        loss=BlockLoss("dpace" if c["loss_type"] == "dpace" else "ce", c["gamma"], c.get("dpace_alpha", 0.5)),
        draft=draft,
        batch=batch,
        features=Features(t["inputs.aux_hidden_states"].double(), t["inputs.last_hidden"].double()),
        head=TargetHead(t["inputs.target_head"].double()),
        anchors=t["inputs.anchors"],
        row_loss=t["outputs.row_ce"][:, drafted],
        row_acceptance=t["outputs.row_acceptance"][:, drafted],
        live=t["outputs.row_live"][:, drafted],
        hits=t["outputs.slot_correct"][drafted],
        normaliser=float(t["outputs.normaliser"]),
        grads={key.removeprefix("grads."): value for key, value in t.items() if key.startswith("grads.")},
    )


def worst_block_errors(case: BlockGolden, run: RunBlocks) -> dict[str, float]:
    """Worst relative error of row losses and each gradient: max|ours - golden| / max|golden|; NaN is inf."""
    rows, grads = run(case.draft, case.batch, case.features, case.head, case.anchors, case.loss)
    loss, hit, live = (x.cpu()[:, case.anchors].T for x in (rows.loss, rows.hit, rows.live))
    found = {
        "row_loss": relative_error(loss, case.row_loss.where(case.live, 0.0)),
        "hits": relative_error(hit.sum(0), case.hits),
        "live": relative_error(live, case.live),
    }
    if missing := case.grads.keys() ^ grads.keys():
        raise ValueError(f"{case.name}: gradients and golden gradients differ in {sorted(missing)}")
    ours = {name: grad.cpu() / case.normaliser for name, grad in grads.items()}
    return found | {f"grad {name}": relative_error(ours[name], law) for name, law in case.grads.items()}
