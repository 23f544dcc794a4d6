"""The ways in which a DFlash checkpoint could be read: as documented, or with one fault; and what a block drafts so.

`serving/parity.py` compares an engine's proposals, and the text itself, with each of them, and names the fault that
explains what it finds. RoPE sees only differences of positions, so an offset common to all rows is no fault and cannot be
seen.

# L tokens of prompt and output, S drafted tokens, B rows of a block, H hidden, K captured target layers, V vocabulary
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.model.dflash.config import DFlashConfig, evenly_spread_layers
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.ref import block_states_ref
from fastdraft.model.rope import Rope

BLOCKS = 64  # at a time; the reference holds scores of all their rows against all tokens
UNBOUNDED = 2**30  # a window that cuts nothing: a sliding layer that is only causal
FIRST_NORM = "context k_norm"


@dataclass(frozen=True)
class BlockReading:
    """One way to read a checkpoint; the defaults are the documented way. `fault` names what differs from it."""

    fault: str = ""  # layer ids, labels, block, window, mask token, norm, config field, dtype
    says: str = "as the checkpoint says"
    layers: tuple[int, ...] | None = None  # outputs of the target's layers, from 0
    changes: tuple[tuple[str, object], ...] = ()  # fields of the shape
    # a norm that is left out: hidden_norm, norm, or q_norm and k_norm as "heads"; FIRST_NORM: one that stands for others
    without: str | None = None
    rms_norm_eps: float | None = None
    dtype: torch.dtype | None = None  # that the draft runs in


def block_readings(draft: DFlashDraft, num_target_layers: int) -> list[BlockReading]:
    """The documented reading first, then every single fault that would be another reading of this draft."""
    c, found = draft.config, [BlockReading()]
    default = evenly_spread_layers(len(c.layers), num_target_layers)
    moved = {default: "the default"}
    moved |= {tuple(x + by for x in c.layers): f"off by one, {'+' if by > 0 else '-'} 1" for by in (-1, 1)}
    for layers, why in moved.items():
        if layers != c.layers and layers[0] >= 0 and layers[-1] < num_target_layers and len(set(layers)) == len(layers):
            found.append(BlockReading("layer ids", f"outputs of layers {list(layers)} ({why})", layers=layers))
    other = {"fill_in": "shifted", "shifted": "fill_in"}[c.labels]
    says = {"shifted": "slot k drafts the token after the one at its position", "fill_in": "slot k drafts x_{a+k}"}[other]
    rows = c.num_drafted + 1 if other == "fill_in" else c.block_size  # an engine that is asked for as many tokens
    changes = ("labels", other), ("block_size", rows)
    found.append(BlockReading("labels", f"labels shifted by one: {says}", changes=changes))
    causal = ("layer_types", ("sliding_attention",) * c.num_hidden_layers), ("sliding_window", UNBOUNDED)
    if "full_attention" in c.layer_types:
        found.append(BlockReading("block", "a causal block", changes=causal))
    if "sliding_attention" in c.layer_types:
        full = ("layer_types", ("full_attention",) * c.num_hidden_layers), ("sliding_window", None)
        found.append(BlockReading("window", "every layer in full attention", changes=full))
        for by in (-1, 1):
            wide = c.sliding_window + by
            found.append(BlockReading("window", f"a window of {wide}", changes=(("sliding_window", wide),)))
    ends = c.eos_token_id if isinstance(c.eos_token_id, list) else [c.eos_token_id]
    for name, token in {"pad": c.pad_token_id, "eos": ends[0] if ends else None, "bos": c.bos_token_id}.items():
        if token is not None and token != c.mask_token_id:
            says = f"the target's {name} token, {token}, as mask"
            found.append(BlockReading("mask token", says, changes=(("mask_token_id", token),)))
    for norm, says in {
        "hidden_norm": "hidden_norm left out",
        "norm": "the final norm left out",
        "heads": "the norms of queries and keys left out",
    }.items():
        found.append(BlockReading("norm", says, without=norm))
    norms = [layer.self_attn.k_norm.weight for layer in draft.layers]
    if any(not torch.equal(norm, norms[0]) for norm in norms[1:]):
        says = (
            "the context's keys of every layer normed by the first layer's k_norm (a fault of vLLM's build for CPUs, up to "
            "0.32 at least; the checkpoint is not to blame)"
        )
        found.append(BlockReading("norm", says, without=FIRST_NORM))
    plain = {"rope_theta": c.rope_parameters["rope_theta"], "rope_type": "default"}
    ropes = {"RoPE without its scaling": plain, "rope_theta 10000": dict(c.rope_parameters) | {"rope_theta": 10000.0}}
    for says, rope in ropes.items():
        if rope != c.rope_parameters:
            changes = (("rope_parameters", tuple(rope.items())),)
            found.append(BlockReading("config field", f"{says} (rope_parameters)", changes=changes))
    for eps in (1e-5, 1e-6):
        if eps != c.rms_norm_eps:
            found.append(BlockReading("config field", f"rms_norm_eps {eps}", rms_norm_eps=eps))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype != draft.fc.weight.dtype:
            found.append(BlockReading("dtype", f"the draft runs in {str(dtype).removeprefix('torch.')}", dtype=dtype))
    return found


def read_block_as(draft: DFlashDraft, reading: BlockReading) -> DFlashDraft:
    """A copy of the draft with what a reading changes about its weights, norms, masks and frequencies."""
    embedding = draft.embedding  # too large to be copied for each reading
    draft.embedding = embedding.new_empty(0)
    mine = copy.deepcopy(draft)
    draft.embedding = embedding
    mine.embedding = embedding
    if reading.dtype is not None:
        mine.to(reading.dtype)
    changes = dict(reading.changes)
    if "rope_parameters" in changes:
        c = mine.config
        changes["rope_parameters"] = dict(changes["rope_parameters"])
        mine.rope = Rope(changes["rope_parameters"], c.head_dim, c.max_position_embeddings).to(embedding.device)
    mine.config = mine.config.model_copy(update=changes)
    if reading.without == "heads":
        for layer in mine.layers:
            layer.self_attn.q_norm, layer.self_attn.k_norm = nn.Identity(), nn.Identity()
    elif reading.without == FIRST_NORM:
        _norm_context_by_first_layer(mine)
    elif reading.without is not None:
        setattr(mine, reading.without, nn.Identity())
    if reading.rms_norm_eps is not None:
        for norm in (m for m in mine.modules() if hasattr(m, "eps")):
            norm.eps = reading.rms_norm_eps
    return mine


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
    draft: DFlashDraft,  # `read_block_as` the reading
    reading: BlockReading,
    head: TargetHead,
    ids: Tensor,  # [L] int64
    g: Tensor,  # [L, K*H]
    chain: Tensor,  # [L-1, S] int64 tokens
) -> tuple[
    Tensor, Tensor
]:  # of every place and slot: the draft's choice [L-1, S], and how far the token of `chain` is below
    """Row t is the block whose anchor is token t + 1. The gap is of logits, over the largest of them."""
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
