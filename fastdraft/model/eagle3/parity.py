"""The ways in which an EAGLE-3 checkpoint could be read, and what its chains draft so (`serving/parity.py`).

A chain starts at every position of a text at once, as in training-time test: step i of the chain from t reads x_{t+1}
(i = 0) or the token before at its depth, at RoPE position t + i, and attends to K^0_s for s <= t and to its own chain.

# L tokens of prompt and output, S draft steps, Ht target hidden, Vd draft vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdraft.batch import TargetHead
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.ref import attention_ref
from fastdraft.model.reading import Reading, configured, readings_of_any
from fastdraft.model.target_config import default_layers


def chain_readings(draft: Draft, num_target_layers: int) -> list[Reading]:
    """The documented reading first, then every single fault that would be another reading of this draft."""
    c = draft.config
    found = [
        Reading(),
        Reading("position", "every step at the position of the first", advance=lambda step: 0),
        Reading("position", "steps after the first one position late", advance=lambda step: step + (step > 0)),
        Reading("token", "step 0 reads the token at its own position, not the next one", shift=0),
    ]
    if c.draft_vocab_size < c.vocab_size:
        if int(draft.d2t.min()) >= 0 and int(draft.d2t.max()) < c.vocab_size:
            found.append(Reading("vocabulary map", "d2t read as target ids, not as offsets", _take_as_ids))
        found.append(Reading("vocabulary map", "d2t ignored, draft ids taken for target ids", _ignore_map))
    fed = "before the final norm goes to the next step (no norm_output)"
    if not c.norm_output:
        fed = "after the final norm goes to the next step (norm_output)"
    found.append(Reading("norm", f"the state {fed}", configured(norm_output=not c.norm_output)))
    if c.feature_norms:
        norm = "fc_norm" if c.fc_norm else "norm_before_fc"
        found.append(Reading("norm", f"{norm} left out", configured(fc_norm=False, norm_before_fc=False)))
    return found + readings_of_any(draft, default_layers(num_target_layers), num_target_layers)


def _take_as_ids(draft: Draft) -> None:
    draft.d2t = draft.d2t - torch.arange(len(draft.d2t), device=draft.d2t.device)  # which `draft_ids` adds back


def _ignore_map(draft: Draft) -> None:
    draft.d2t = torch.zeros_like(draft.d2t)


@torch.no_grad()
def run_chains(
    draft: Draft,  # `read_as` the reading
    reading: Reading,
    head: TargetHead,  # not read: the draft has a head of its own
    ids: Tensor,  # [L] int64
    g: Tensor,  # [L, 3*Ht]
    chain: Tensor,  # [L-1, S] int64 target ids
) -> tuple[Tensor, Tensor]:  # [L-1, S] the draft's choices, [L-1, S] gaps
    """A gap is how far the token of `chain` is below the choice, over the largest logit; inf where it is not in Vd."""
    rows = len(ids) - 1
    positions = torch.arange(rows, device=ids.device)
    h = draft.combine(g[:rows].to(draft.fc.weight.dtype))
    token = ids[reading.shift :][:rows]
    place = torch.full((draft.config.vocab_size,), -1, dtype=torch.int64, device=ids.device)  # [V] draft id of a target id
    known = (draft.draft_ids >= 0) & (draft.draft_ids < draft.config.vocab_size)
    place[draft.draft_ids[known]] = known.nonzero().flatten()
    keys, values, choices, gaps = [], [], [], []
    for i in range(chain.shape[1]):
        if i:
            token = chain[:, i - 1]
        q, k, v = draft.qkv(token, h, positions + reading.advance(i))
        keys.append(k)
        values.append(v)
        y = draft.finish(h, attention_ref(q, keys, values, (rows,)))
        logits = draft.logits(y).float()
        best, top = logits.max(-1)
        draft_id = place[chain[:, i]]
        theirs = logits.gather(1, draft_id.clamp_min(0)[:, None])[:, 0]
        gap = (best - theirs) / logits.abs().amax(-1)
        gaps.append(gap.where(draft_id >= 0, torch.inf))
        choices.append(draft.draft_ids[top])
        h = draft.fed_back(y)
    return torch.stack(choices, 1), torch.stack(gaps, 1)
