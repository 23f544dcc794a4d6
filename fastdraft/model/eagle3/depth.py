"""How many steps of a chain are trained: all of them, or at random fewer (`sampled_depth`).

With the setting p < 1 the chain of a token runs step i with probability p^i, and the loss of that step weighs 1 / p^i more.
A row's loss does not depend on which other rows are run, so the expectation of the gradient is that of all rows, while the
steps of a chain take sum_i p^i of the work of T. What is measured on held-out data is never sampled.

# N packed tokens, T TTT steps
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdraft.batch import Batch
from fastdraft.model.draws import token_uniforms


@dataclass(frozen=True)
class SampledDepth:
    p: float  # a chain that ran a step runs the next one with this probability, 0 < p < 1
    seed: int  # of the run

    def shares(self, ttt_length: int) -> np.ndarray:  # [T] float64, of the chains that run each step
        return np.cumprod([1.0] + [self.p] * (ttt_length - 1))

    def weigh(
        self,
        step_weights: Tensor,  # [T]
    ) -> Tensor:  # [T] of the rows that are run
        return step_weights / torch.from_numpy(self.shares(len(step_weights))).to(step_weights)

    def draw(
        self,
        batch: Batch,  # on the host
        step: int,  # of the optimizer, from 1
        ttt_length: int,
    ) -> np.ndarray:  # [N] int64, steps that the chain of each token runs, 1..T
        """One number u of (0, 1] for each token of a document; step i is run where u <= p^i."""
        u = token_uniforms(batch, self.seed, step)
        return ttt_length - np.searchsorted(self.shares(ttt_length)[::-1], u, side="left")
