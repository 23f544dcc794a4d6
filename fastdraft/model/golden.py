"""Golden cases, whatever their method: how a file of one is read, and how far a step is off from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


def read_case(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:  # config, tensors
    """Raises ValueError naming the file when it is not one of a golden case."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # of a file that may hold anything
        raise ValueError(f"{path} is not a readable golden case: {error}") from error


def named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def relative_error(ours: Tensor, law: Tensor) -> float:
    """The largest difference, as a share of the largest value of `law`; infinite where either is NaN."""
    error = float((ours.detach().double() - law.double()).abs().max() / law.double().abs().max().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error
