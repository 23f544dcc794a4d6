"""The ways in which a DFlash checkpoint could be read: as documented, or with one fault; and what a block drafts so.

`serving/parity.py` compares an engine's proposals, and the text itself, with each of them, and names the fault that
explains what it finds.

# L tokens of prompt and output, S drafted tokens, B rows of a block, H hidden, K captured target layers, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.model.dflash.config import DFlashConfig, evenly_spread_layers
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.ref import block_states_ref
from fastdraft.model.reading import Reading, configured, readings_of_any

BLOCKS = 64  # at a time; the reference holds scores of all their rows against all tokens
UNBOUNDED = 2**30  # a window that cuts nothing: a sliding layer that is only causal


def block_readings(draft: DFlashDraft, num_target_layers: int) -> list[Reading]:
    """The documented reading first, then every single fault that would be another reading of this draft."""
    c, found = draft.config, [Reading()]
    other = {"fill_in": "shifted", "shifted": "fill_in"}[c.labels]
    says = {"shifted": "slot k drafts the token after the one at its position", "fill_in": "slot k drafts x_{a+k}"}[other]
    rows = c.num_drafted + 1 if other == "fill_in" else c.block_size  # an engine that is asked for as many tokens
    found.append(Reading("labels", f"labels shifted by one: {says}", configured(labels=other, block_size=rows)))
    causal = configured(layer_types=("sliding_attention",) * c.num_hidden_layers, sliding_window=UNBOUNDED)
    if "full_attention" in c.layer_types:
        found.append(Reading("block", "a causal block", causal))
    if "sliding_attention" in c.layer_types:
        full = configured(layer_types=("full_attention",) * c.num_hidden_layers, sliding_window=None)
        found.append(Reading("window", "every layer in full attention", full))
        for wide in (c.sliding_window - 1, c.sliding_window + 1):
            found.append(Reading("window", f"a window of {wide}", configured(sliding_window=wide)))
    ends = c.eos_token_id if isinstance(c.eos_token_id, list) else [c.eos_token_id]
    for name, token in {"pad": c.pad_token_id, "eos": ends[0] if ends else None, "bos": c.bos_token_id}.items():
        if token is not None and token != c.mask_token_id:
            says = f"the target's {name} token, {token}, as mask"
            found.append(Reading("mask token", says, configured(mask_token_id=token)))
    found.append(Reading("norm", "hidden_norm left out", lambda draft: setattr(draft, "hidden_norm", nn.Identity())))
    found.append(Reading("norm", "the final norm left out", lambda draft: setattr(draft, "norm", nn.Identity())))
    found.append(Reading("norm", "the norms of queries and keys left out", _leave_out_head_norms))
    norms = [layer.self_attn.k_norm.weight for layer in draft.layers]
    if any(not torch.equal(norm, norms[0]) for norm in norms[1:]):
        says = (
            "the context's keys of every layer normed by the first layer's k_norm (a fault of vLLM's build for CPUs, up to "
            "0.32 at least; the checkpoint is not to blame)"
        )
        found.append(Reading("norm", says, _norm_context_by_first_layer))
    default = evenly_spread_layers(len(c.layers), num_target_layers)
    return found + readings_of_any(draft, default, num_target_layers)


def _leave_out_head_norms(draft: DFlashDraft) -> None:
    for layer in draft.layers:
        layer.self_attn.q_norm, layer.self_attn.k_norm = nn.Identity(), nn.Identity()


def _norm_context_by_first_layer(draft: DFlashDraft) -> None:
    context, keys_values, first = draft.context, draft.keys_values, draft.layers[0].self_attn.k_norm
    made = []

    def remember(g: Tensor) -> Tensor:
        made[:] = [context(g)]
        return made[0]

    def by_first(layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        attention = draft.layers[layer].self_attn
        own = attention.k_norm
        attention.k_norm = first if x is made[0] else own
        found = keys_values(layer, x, positions)
        attention.k_norm = own
        return found

    draft.context, draft.keys_values = remember, by_first


@torch.no_grad()
def run_blocks(
    draft: DFlashDraft,  # `read_as` the reading
    reading: Reading,
    head: TargetHead,
    ids: Tensor,  # [L] int64
    g: Tensor,  # [L, K*H]
    chain: Tensor,  # [L-1, S] int64 tokens
) -> tuple[Tensor, Tensor]:  # [L-1, S] the draft's choices, [L-1, S] gaps
    """Row t is the block whose anchor is token t + 1. A gap is how far the token of `chain` is below the choice, over the
    largest logit."""
    device, steps = ids.device, chain.shape[1]
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), (len(ids),))
    features, first = Features(g.to(draft.fc.weight.dtype), None), draft.config.first_slot
    choices, gaps = [], []
    for anchors in torch.arange(1, len(ids), device=device).split(BLOCKS):
        states = block_states_ref(draft, batch, features, anchors)[:, first : first + steps]
        tokens = chain[anchors - 1]
        previous = torch.cat([ids[anchors, None], tokens[:, :-1]], 1)
        logits = draft.logits(states, previous, head).float()
        best, choice = logits.max(-1)
        theirs = logits.gather(-1, tokens[..., None])[..., 0]
        choices.append(choice)
        largest = logits.masked_fill(logits.isinf(), 0.0).abs().amax(-1)  # -inf: what a selector does not choose among
        gaps.append((best - theirs) / largest)
    return torch.cat(choices), torch.cat(gaps)


def served_steps(config: DFlashConfig, asked: int | None) -> int:
    """What an engine is asked to draft: a whole block. ValueError for less, because vLLM would then make smaller blocks
    than the draft was trained on, and for more."""
    if asked not in (None, config.num_drafted):
        raise ValueError(
            f"num_steps is {asked}, and a block of {config.block_size} rows drafts {config.num_drafted} tokens; vLLM makes "
            "its blocks as long as it is told, other than the draft was trained on: leave num_steps out"
        )
    return config.num_drafted
