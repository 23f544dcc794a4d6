"""Where a new draft of blocks starts: embedding, final norm and layers from the target.

With `init: target` the draft goes on where the target's last captured layer c ends. fc passes that layer's state,
`hidden_norm` is the norm with which layer c + 1 reads it, and the draft's layers are the target's from c + 1 on, or its
last ones, where there are fewer behind c. In a copy of layer c + 1 the context's values are those of that layer, and so are
the keys, up to their lengths where the target has no norm over heads. Layers of another form are not copied, and start from
random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fastdraft.batch import Ends, TargetLayers
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft

if TYPE_CHECKING:
    from fastdraft.config import DraftSection

# Of the target's final norm. A mask's row begins as the mask's embedding, of which a tied head is sure that the mask itself
# comes: with random layers SmolLM2-135M's first losses are 63 to 78 a row without it.
SURE = 0.4
# Kinds of decoders whose layers compute, of weights of these names, what a draft's layers do. Others with the same names do
# not: Gemma's norms add 1 to their weight, Granite scales what a layer adds, SmolLM3 leaves out some rotations.
ALIKE = ("llama", "mistral", "qwen3")
NUMBERS = ("BF16", "F16", "F32")  # safetensors' names of the dtypes that need no scales
HEAD_NORMS = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}  # of Qwen3's kind


def fit(
    draft: DFlashDraft,
    settings: DraftSection,
    target: Ends,
    token_counts: Callable[[], np.ndarray],  # [V] int64, how often each token is trained on; a DFlash draft has all of V
) -> list[str]:  # what to tell the user
    """Gives a draft the target's embedding, and a new one, with `init: target`, the weight of the target's final norm, with
    which the target's head reads its states, made less sure. Raises ValueError for a target that has no such norm."""
    if settings.init_from is None and settings.init == "target":
        if target.final_norm is None:
            raise ValueError("the target has no final RMSNorm to start from; set draft.init=random")
        draft.norm.weight.data.copy_(SURE * target.final_norm)
    draft.take_from_target(target.embedding.float().cpu())
    c = draft.config
    drafted = f"{c.num_drafted} tokens ({c.labels} labels)"
    lines = [f"blocks of {c.block_size} rows draft {drafted} from the target's layers {list(c.layers)}"]
    if c.labels != c.served_labels:
        lines.append(
            f"labels: {c.labels} is served by no engine as plain {c.title}: this draft can be measured, not exported"
        )
    return lines


def start_lines(config: DFlashConfig, settings: DraftSection, layers: Callable[[], TargetLayers]) -> list[str]:
    """What a new draft starts from, a sentence; none for one that starts from a checkpoint."""
    if settings.init_from is not None:
        return []
    if settings.init == "random":
        return ["draft.init random: the draft starts from random weights"]
    if why := why_not_copied(config, layers()):
        return [f"draft.init target: the draft's layers start from random weights: {why}"]
    numbers = list(copied_layers(config))
    return [f"draft.init target: the draft's layers start as the target's layers {numbers}"]


def copied_layers(config: DFlashConfig) -> range:
    """The target's layers that a draft's start as."""
    first = min(config.layers[-1] + 1, config.num_target_layers - config.num_hidden_layers)
    return range(first, first + config.num_hidden_layers)


def why_not_copied(config: DFlashConfig, layers: TargetLayers) -> str:
    """Empty where the target's layers have the form of the draft's. Nothing is read but names, shapes and dtypes."""
    if layers.kind not in ALIKE:
        return f"the target's layers are those of {layers.kind}, and a draft's compute as those of {', '.join(ALIKE)} do"
    if layers.activation not in ("silu", "swish"):
        return f"the target's MLP has the activation {layers.activation}, and a draft's silu"
    numbers = copied_layers(config)
    if numbers[0] < 0:
        return f"the target has {config.num_target_layers} layers, the draft {config.num_hidden_layers}"
    with torch.device("meta"):
        mine = {name: list(p.shape) for name, p in backbone(DFlashDraft(config).layers[0]).items()}
    for number in numbers:
        kept = {name: x for name, x in layers.weights.get(number, {}).items() if not name.endswith("rotary_emb.inv_freq")}
        if not kept:
            return f"the target's files have no layer {number} in safetensors"
        if missing := sorted(mine.keys() - HEAD_NORMS - kept.keys()):
            return f"the target's layer {number} has no {missing[0]}"
        if more := sorted(kept.keys() - mine.keys()):
            return f"the target's layer {number} has {more[0]}, which a draft's layer has not"
        for name, x in sorted(kept.items()):
            if x.get_shape() != mine[name]:
                return f"{name} is {x.get_shape()} in the target's layer {number} and {mine[name]} in the draft's"
            if x.get_dtype() not in NUMBERS:
                return f"{name} of the target's layer {number} is quantised, {x.get_dtype()}"
    return ""


@torch.no_grad()
def copy_layers(
    draft: DFlashDraft,
    settings: DraftSection,
    layers: Callable[[], TargetLayers],  # read only for a draft that may start from them
) -> list[str]:  # what to tell the user
    """Copies the target's layers into a new draft, with `init: target` and where they have its form."""
    c, h = draft.config, draft.config.hidden_size
    if settings.init_from is not None or settings.init == "random":
        return start_lines(c, settings, layers)
    found = layers()
    lines = start_lines(c, settings, lambda: found)
    if why_not_copied(c, found):
        return lines
    draft.fc.weight.zero_()
    draft.fc.weight[:, -h:] = torch.eye(h)
    draft.hidden_norm.weight.copy_(found.weights[c.layers[-1] + 1]["input_layernorm.weight"][:])
    for layer, number in zip(draft.layers, copied_layers(c), strict=True):
        kept = found.weights[number]
        for name, p in backbone(layer).items():
            if name in kept:
                p.copy_(kept[name][:])
        if not HEAD_NORMS & kept.keys():
            norm, attention = layer.input_layernorm.weight, layer.self_attn
            size = typical_size(attention.q_proj.weight, norm) * typical_size(attention.k_proj.weight, norm)
            attention.q_norm.weight.fill_(size)
    return lines


def backbone(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that layers of each method of blocks have, by the names that the target's layers have for them."""
    return {name: p for name, p in layer.named_parameters() if "_conv." not in name}


def typical_size(
    weight: Tensor,  # [Hq * D, H] of a projection to heads
    norm: Tensor,  # [H] weight of the norm before it
) -> float:
    """The root mean square of an entry of its heads, for normed inputs without a direction.

    A norm over heads takes that size away. The queries' norm gives it back, for queries and keys, because of their product
    alone attention is made. So the keys' norms stay 1 and equal, which vLLM's build for CPUs needs (docs/dflash.md).
    """
    return float((weight * norm).square().sum(1).mean().sqrt())
