"""What a block's slots are trained on: labels, weights, and the numbers that a step reports of them.

Step j = 0 .. T-1 of a block at anchor a is the slot that predicts x_{a+1+j}: slot j + 1 with fill-in labels, slot j with
shifted ones. It is live where x_{a+1+j} is a token of the document that the loss mask has. Weights:

    w_j = exp(-j / gamma)                                   ce, kl, lk_alpha, lk_lambda
    D_j = sum_{i >= j} c_i,  c_i = prod_{m <= i} s_m,  s_m = (1 - alpha) q_m + alpha      dpace, over live steps

with q_m the draft's probability of the label, without gradient: D_j is the derivative of the expected number of accepted
tokens. The weighted sum of losses is divided by the sum of w over live rows, for dpace by the number of blocks.
Source: DFlash (arXiv 2602.06036); D-PACE as its public trainers compute it.

# C blocks, T steps of a block
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

BlockLossKind = Literal["ce", "dpace", "kl", "lk_alpha", "lk_lambda"]
HARD = ("ce", "dpace")  # against the data's token; the others are against the target's distribution


class StepLoss(Protocol):
    """What engine and reference ask of a loss, whatever its rows are."""

    kind: str
    needs_teacher: bool

    def weights(self, num_steps: int) -> list[float]: ...

    def normaliser(self, num_steps: int) -> list[float]: ...


@dataclass(frozen=True)
class BlockLoss:
    """Which loss a row has and how a block's rows are weighed."""

    kind: BlockLossKind = "ce"
    gamma: float = 7.0
    dpace_alpha: float = 0.5
    lk_scale: float = 1.0
    lk_decay: float = 1.0

    @property
    def needs_teacher(self) -> bool:
        return self.kind not in HARD

    def weights(self, num_steps: int) -> list[float]:
        """w of each step."""
        return decay_weights(self.gamma, num_steps)

    def normaliser(self, num_steps: int) -> list[float]:
        """What a live row of each step adds to the number that the sum of losses is divided by."""
        return [1.0] + [0.0] * (num_steps - 1) if self.kind == "dpace" else self.weights(num_steps)


def decay_weights(gamma: float, num_steps: int) -> list[float]:
    return [math.exp(-j / gamma) for j in range(num_steps)]


def default_gamma(block_size: int) -> float:
    """The paper's by block size, 4, 5 and 7 for blocks of 8, 10 and 16, and what lies between them."""
    return float(np.interp(block_size, (8, 10, 16), (4, 5, 7)))


def dpace_weights(
    q: Tensor,  # [C, T] the draft's probability of each label
    live: Tensor,  # [C, T] bool
    alpha: float,
) -> Tensor:  # [C, T] D, 0 where not live
    s = torch.where(live, (1 - alpha) * q + alpha, 1.0)
    c = torch.where(live, s.cumprod(1), 0.0)
    return torch.where(live, c.flip(1).cumsum(1).flip(1), 0.0)
