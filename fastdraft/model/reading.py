"""The ways in which a checkpoint could be read: as documented, or with one fault.

RoPE sees only differences of positions, so an offset common to all rows is no fault and cannot be seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdraft.model.precision import dtype_name
from fastdraft.model.rope import Rope


@dataclass(frozen=True)
class Reading:
    """One way to read a checkpoint; the defaults are the documented way. `fault` names what differs from it."""

    fault: str = ""
    says: str = "as the checkpoint says"
    change: Callable[[Any], object] = lambda draft: None  # of a copy of the draft
    layers: tuple[int, ...] | None = None  # outputs of the target's layers, from 0; None: the draft's own
    # Of a draft of chains: step i of the chain from t is at position t + advance(i), and step 0 reads x_{t+shift}.
    advance: Callable[[int], int] = lambda step: step
    shift: int = 1


def read_as(draft: nn.Module, reading: Reading) -> nn.Module:
    """A copy of the draft, read so. It shares the buffers, of which a target's embedding is too large to be copied."""
    mine = copy.deepcopy(draft, {id(buffer): buffer for buffer in draft.buffers()})
    reading.change(mine)
    return mine


def configured(**fields: Any) -> Callable[[nn.Module], None]:
    """A change of fields of the draft's shape."""
    return lambda draft: setattr(draft, "config", draft.config.model_copy(update=fields))


def readings_of_any(draft: nn.Module, default_layers: tuple[int, ...], num_target_layers: int) -> list[Reading]:
    """Faults that any method's draft can have: of layer ids, RoPE, epsilon and dtype."""
    c, found, moved = draft.config, [], {default_layers: "the default"}
    for by, sign in ((-1, "-"), (1, "+")):
        moved.setdefault(tuple(x + by for x in c.layers), f"off by one, {sign} 1")
    for layers, why in moved.items():
        if layers != c.layers and list(layers) == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < num_target_layers:
            found.append(Reading("layer ids", f"outputs of layers {list(layers)} ({why})", layers=layers))
    plain = {"rope_theta": c.rope_parameters["rope_theta"], "rope_type": "default"}
    ropes = {"RoPE without its scaling": plain, "rope_theta 10000": c.rope_parameters | {"rope_theta": 10000.0}}
    for says, rope in ropes.items():
        if rope != c.rope_parameters:
            found.append(Reading("config field", f"{says} (rope_parameters)", lambda draft, rope=rope: _turn(draft, rope)))
    for eps in (1e-5, 1e-6):
        if eps != c.rms_norm_eps:
            found.append(Reading("config field", f"rms_norm_eps {eps}", lambda draft, eps=eps: _set_epsilon(draft, eps)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype != draft.fc.weight.dtype:
            says = f"the draft runs in {dtype_name(dtype)}"
            found.append(Reading("dtype", says, lambda draft, dtype=dtype: draft.to(dtype)))
    return found


def _turn(draft: nn.Module, rope: dict[str, Any]) -> None:
    draft.rope = Rope(rope, draft.config.head_dim, draft.config.max_position_embeddings).to(draft.fc.weight.device)


def _set_epsilon(draft: nn.Module, eps: float) -> None:
    for norm in (m for m in draft.modules() if hasattr(m, "eps")):
        norm.eps = eps
