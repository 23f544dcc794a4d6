"""The tensor-parallel draft: which part of each weight a process of the tensor axis has, and how a whole draft is cut.

Of n processes each has 1/n of the heads of q, k, v and o, of the MLP's columns, of lm_head's rows (the draft vocabulary),
of the target's head, and of fc's outputs. The norms are small, and every process has them whole. `part` is the one place
that says so: the draft is cut by it here, and whoever joins the parts again (checkpoints) asks it, too.

# V target vocabulary, Vd draft vocabulary, Ht target hidden
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdraft.batch import TargetHead
from fastdraft.kernels.teacher import PermutedHead, permute_head
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.draft import Draft

# The dimension along which a weight is cut: 0 cuts what it gives, 1 what it reads. Other weights are not cut.
CUT = {
    "fc.weight": 0,
    "midlayer.self_attn.q_proj.weight": 0,
    "midlayer.self_attn.k_proj.weight": 0,
    "midlayer.self_attn.v_proj.weight": 0,
    "midlayer.self_attn.o_proj.weight": 1,
    "midlayer.mlp.gate_proj.weight": 0,
    "midlayer.mlp.up_proj.weight": 0,
    "midlayer.mlp.down_proj.weight": 1,
    "lm_head.weight": 0,
}


def part(
    name: str,  # of a parameter
    shape: Sequence[int],  # of the whole parameter
    rank: int,  # on the tensor axis
    size: int,  # of the tensor axis
) -> tuple[slice, ...]:
    """Where a process's part of a parameter lies in the whole one: `whole[part(...)]`, all of it for what is not cut."""
    place = [slice(0, n) for n in shape]
    if name in CUT:
        width = shape[CUT[name]] // size
        place[CUT[name]] = slice(rank * width, (rank + 1) * width)
    return tuple(place)


def check_cut(c: DraftConfig, size: int) -> None:
    """Raises ValueError where a draft cannot be cut into `size` parts, naming the setting."""
    counts = {
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "intermediate_size": c.intermediate_size,
        "draft_vocab_size": c.draft_vocab_size,
        "hidden_size": c.hidden_size,
    }
    odd = [f"{name} {n}" for name, n in counts.items() if n % size]
    if odd:
        fits = [n for n in range(1, size) if not any(count % n for count in counts.values())]
        raise ValueError(
            f"dist.tensor={size} does not divide the draft's {', '.join(odd)}; set dist.tensor to "
            f"{' or '.join(map(str, fits))}, or change the draft's shape in draft.overrides"
        )


def local_config(c: DraftConfig, size: int) -> DraftConfig:
    """The shape of one process's part: its heads, MLP columns and draft tokens. The widths of states stay whole."""
    counts = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "draft_vocab_size")
    return c if size == 1 else c.model_copy(update={name: getattr(c, name) // size for name in counts})


@torch.no_grad()
def cut_draft(draft: Draft, rank: int, size: int) -> None:
    """Leaves a whole draft with one process's part of its weights. Its config stays the whole draft's.

    Raises ValueError as `check_cut`.
    """
    check_cut(draft.config, size)
    if size == 1:
        return
    for name, p in draft.trainable().items():
        p.data = p.data[part(name, p.shape, rank, size)].clone()


def cut_head(
    head: TargetHead,
    draft_ids: Tensor,  # [Vd] int64, ascending target ids
    rank: int,
    size: int,
) -> PermutedHead:
    """One process's rows of the target's head: its part of the draft vocabulary, then its part of the rest."""
    if size == 1:
        return permute_head(head, draft_ids)
    ids = draft_ids.to(device=head.weight.device, dtype=torch.int64)
    is_rest = torch.ones(len(head.weight), dtype=torch.bool, device=ids.device)
    is_rest[ids] = False
    own, rest = (x.tensor_split(size)[rank] for x in (ids, is_rest.nonzero()[:, 0]))
    order = torch.cat([own, rest])
    bias = None if head.bias is None else head.bias[order]
    return PermutedHead(head.weight[order], bias, float(head.scale), head.softcap, order, len(own))
