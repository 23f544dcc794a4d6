"""What every method's checkpoint in the serving engines' format must hold: sound weights of one dtype, the target's."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from fastdraft.model.target_config import named_dtype


def weight_problems(
    tensors: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],  # of the weights, by name; what `tensors` lacks is not looked at
    dtypes: Container[torch.dtype],  # that a weight may have
) -> list[str]:
    """A sentence for each misshaped weight, wrong dtype, and NaN or infinity; and one where dtypes are mixed."""
    problems: list[str] = []
    found: dict[torch.dtype, str] = {}
    for name, shape in shapes.items():
        if name not in tensors:
            continue
        t = tensors[name]
        if tuple(t.shape) != shape:
            problems.append(f"{name} is {list(t.shape)}, config.json makes it {list(shape)}.")
        if t.dtype not in dtypes:
            problems.append(f"{name} is {t.dtype}; weights must be bfloat16, float16 or float32.")
            continue
        found.setdefault(t.dtype, name)
        if not bool(t.isfinite().all()):
            problems.append(f"{name} has {int((~t.isfinite()).sum())} NaN or infinite values; export a sound checkpoint.")
    if len(found) > 1:
        mixed = ", ".join(f"{name} {dtype}" for dtype, name in found.items())
        problems.append(f"weights are of several dtypes ({mixed}); all must be the target's.")
    return problems


def dtype_problems(tensors: dict[str, Tensor], config: dict[str, Any], target: dict[str, Any]) -> list[str]:
    """The weights' dtype against both spellings in config.json and against the target's."""
    weights = {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}
    theirs = named_dtype(target)
    said = [
        f"{key} is {config[key]}, the weights are {', '.join(sorted(weights))}; they must be the same."
        for key in ("dtype", "torch_dtype")
        if config.get(key) is not None and {config[key]} != weights
    ]
    if theirs is not None and {theirs} != weights:
        said.append(f"Weights are {', '.join(sorted(weights))}, the target's are {theirs}; export with the target's dtype.")
    return said
