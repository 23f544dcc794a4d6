"""Golden cases: small float64 EAGLE-3 steps computed by an independent implementation, replayed on any engine.

A case's row r is teacher row u = r + 1 of a document whose first token nobody reads, so a document of n rows becomes
one of n + 2 tokens here: x_0 = 0, x_{r+1} = input_ids[r], x_{n+1} = 0, loss_mask[r+2] = the case's loss_mask[r]. The
teacher's logits are given, so the target's head is the identity and f is the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdraft.batch import Batch, Features, LossKind, Rows, TargetHead
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.golden import named, read_case, relative_error

# `ttt_ref_step`'s signature: (draft, batch, features, head, step_weights, kind) -> (rows, gradients by parameter name)
RunStep = Callable[[Draft, Batch, Features, TargetHead, Tensor, LossKind], tuple[Rows, dict[str, Tensor]]]


GIVEN = (  # of a case's config
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("draft_vocab_size", "rms_norm_eps", "rope_parameters", "fc_norm"),
)
OPTIONAL = ("norm_output",)  # that cases made before it do not name


@dataclass(frozen=True)
class Golden:
    """One case: what goes in, and the law for what must come out."""

    name: str
    kind: LossKind
    step_weights: Tensor  # [T] float64: turns our per-step sums into the case's total loss
    draft: Draft
    batch: Batch
    features: Features
    head: TargetHead
    step_loss: Tensor  # [T] as our sum over live rows
    acceptance: Tensor  # [T]
    hits: Tensor  # [T]
    masked_in: Tensor  # [T]
    grads: dict[str, Tensor]

    def inputs(self, device: str, dtype: torch.dtype) -> Golden:
        """The same case with what goes in rounded to dtype, on a device; what must come out stays."""
        moved = {name: x if x is None else x.to(device, dtype) for name, x in vars(self.features).items()}
        head = replace(self.head, weight=self.head.weight.to(device, dtype))
        draft = copy.deepcopy(self.draft).to(device, dtype)
        weights = self.step_weights.to(device, torch.promote_types(dtype, torch.float32))
        return replace(self, draft=draft, features=Features(**moved), head=head, step_weights=weights)


def load_golden(path: Path) -> Golden:
    """Reads one case. Raises ValueError naming the file when it is not a golden case."""
    c, t = read_case(path)
    config = DraftConfig(
        **{name: c[name] for name in GIVEN},
        **{name: c[name] for name in OPTIONAL if name in c},
        target_hidden_size=c["hidden_size"],
        num_target_layers=8,
        layers=(1, 3, 4),
        max_position_embeddings=4096,
    )
    draft = Draft(config).to(torch.float64)
    draft.load_state_dict(named(t, "weights.") | {"d2t": t["inputs.d2t"], "t2d": t["inputs.t2d"]})
    batch, features = _as_documents(t)
    count = t["inputs.input_ids"].numel()
    decay = 0.8 ** torch.arange(c["ttt_length"], dtype=torch.float64)
    live = _live_counts(t, c["ttt_length"])
    per_step = live if c["lk_loss_type"] else torch.full_like(decay, count)
    return Golden(
        name=c["name"],
        kind=f"lk_{c['lk_loss_type']}" if c["lk_loss_type"] else "kl",
        step_weights=decay / per_step,
        draft=draft,
        batch=batch,
        features=features,
        head=TargetHead(torch.eye(c["vocab_size"], dtype=torch.float64)),
        step_loss=t["outputs.step_loss"] * per_step,
        acceptance=t["outputs.acceptance_rate"],
        hits=t["outputs.correct"],
        masked_in=t["outputs.denom"],
        grads=named(t, "grads."),
    )


def _as_documents(t: dict[str, Tensor]) -> tuple[Batch, Features]:
    ids, mask, g, f, lengths = [], [], [], [], []
    for row, n in enumerate(t["inputs.attention_mask"].sum(1).tolist()):
        zero = torch.zeros(1, dtype=torch.int64)
        ids.append(torch.cat([zero, t["inputs.input_ids"][row, :n], zero]))
        mask.append(torch.cat([zero, zero, t["inputs.loss_mask"][row, :n]]).bool())
        aux, logits = t["inputs.aux_hidden_states"][row, :n], t["inputs.target_logits"][row, :n]
        g.append(torch.cat([aux, aux.new_zeros(2, aux.shape[1])]))
        f.append(torch.cat([logits.new_zeros(1, logits.shape[1]), logits, logits.new_zeros(1, logits.shape[1])]))
        lengths.append(n + 2)
    return Batch(torch.cat(ids), torch.cat(mask), tuple(lengths)), Features(torch.cat(g), torch.cat(f))


def _live_counts(t: dict[str, Tensor], ttt_length: int) -> Tensor:  # [T] float64
    """Live rows of each step, counted from the inputs: (row, i) is live when teacher row + i is trained on and drawable."""
    top_in_vocab = t["inputs.t2d"][t["inputs.target_logits"].argmax(-1)]
    live = (t["inputs.loss_mask"] * t["inputs.attention_mask"]).bool() & top_in_vocab
    return torch.stack([live[:, i:].sum() for i in range(ttt_length)]).double()


def worst_errors(case: Golden, run_step: RunStep) -> dict[str, float]:
    """Worst relative error of step losses, acceptance and each gradient: max|ours - golden| / max|golden|; NaN is inf."""
    rows, grads = run_step(case.draft, case.batch, case.features, case.head, case.step_weights, case.kind)
    loss, acceptance, hits, live, masked_in = rows.sums().cpu()
    found = {
        "step_loss": relative_error(loss, case.step_loss),
        "acceptance": relative_error(acceptance / live, case.acceptance),
        "hits": relative_error(hits, case.hits),
        "masked_in": relative_error(masked_in, case.masked_in),
    }
    if missing := case.grads.keys() ^ grads.keys():
        raise ValueError(f"{case.name}: gradients and golden gradients differ in {sorted(missing)}")
    return found | {f"grad {name}": relative_error(grads[name].cpu(), law) for name, law in case.grads.items()}


def golden_law(case: Golden, run_ref: RunStep) -> dict[str, Any]:
    """What must come out of a case by the reference."""
    rows, grads = run_ref(case.draft, case.batch, case.features, case.head, case.step_weights, case.kind)
    loss, acceptance, hits, live, masked_in = rows.sums()
    return dict(step_loss=loss, acceptance=acceptance / live, hits=hits, masked_in=masked_in, grads=grads)
