"""DSpark's loss of a live row: cross entropy, distance from the teacher, and how well the row knows whether it is right.

    a CE(data's token) + b |Q - P|_1 + c BCE(confidence, alpha)        alpha = sum min(P, Q) = 1 - |Q - P|_1 / 2

alpha, the share of drafted tokens that a server keeps, is a target without gradient. Step j of a block weighs
exp(-j / gamma), and the weighted sum is divided by the sum of the weights of live rows.
Source: DSpark (arXiv 2607.05147), as its public trainers compute it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastdraft.model.dflash.loss import decay_weights


@dataclass(frozen=True)
class DSparkLoss:
    """The weights of the three terms, and how a block's rows are weighed."""

    kind: ClassVar[str] = "dspark"
    needs_teacher: ClassVar[bool] = True

    gamma: float = 4.0
    ce_weight: float = 0.1  # a
    l1_weight: float = 0.9  # b
    confidence_weight: float = 1.0  # c

    def weights(self, num_steps: int) -> list[float]:
        """w of each step."""
        return decay_weights(self.gamma, num_steps)

    def normaliser(self, num_steps: int) -> list[float]:
        """What a live row of each step adds to the number that the sum of losses is divided by."""
        return self.weights(num_steps)
