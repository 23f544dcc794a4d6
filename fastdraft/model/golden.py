"""How far a step is off from a golden case."""

from __future__ import annotations

import math

from torch import Tensor


def relative_error(ours: Tensor, law: Tensor) -> float:
    """The largest difference, as a share of the largest value of `law`; infinite where either is NaN."""
    error = float((ours.detach().double() - law.double()).abs().max() / law.double().abs().max().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error
