"""The convolutions around attention and MLP in the block engine: one product gives both sides' coefficients.

# R block rows of a chunk, block after block, H hidden, T taps, G groups
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdraft.kernels.block_conv import block_conv, block_conv_backward
from fastdraft.kernels.matmul import add_outer, linear
from fastdraft.model.dflash.mixer import Branch
from fastdraft.model.dflash2.draft import DFlash2Draft

if TYPE_CHECKING:
    from fastdraft.model.dflash.engine import BlockStep


class ConvolutionMixer:
    """A `Mixer`. `mix_out_backward` leaves the gradient of its coefficients beside the place of the input side's, so that
    `mix_in_backward` takes both back through their product at once."""

    def __init__(self, draft: DFlash2Draft):
        self.block_size = draft.config.block_size
        self.slots: Tensor | None = None  # made once, for the largest chunk: a recorded graph goes on reading it

    def mix_in(self, step: BlockStep, layer: int, branch: Branch, n: Tensor, x: Tensor) -> None:
        base, projection = self.weights(step.named, layer, branch)
        delta = step.take(f"{layer}.{branch}.delta", len(n))
        linear(n, projection, delta.flatten(1))
        block_conv(n, delta[:, 0], base[0], self.slot(step, len(n)), x)

    def mix_out(self, step: BlockStep, layer: int, branch: Branch, n: Tensor, y: Tensor, out: Tensor) -> None:
        base, _ = self.weights(step.named, layer, branch)
        delta = step.take(f"{layer}.{branch}.delta", len(n))
        block_conv(y, delta[:, 1], base[1], self.slot(step, len(n)), out)

    def mix_out_backward(
        self, step: BlockStep, layer: int, branch: Branch, n: Tensor, y: Tensor, dout: Tensor, dy: Tensor
    ) -> None:
        self.backward(step, layer, branch, 1, y, dout, dy)

    def mix_in_backward(self, step: BlockStep, layer: int, branch: Branch, n: Tensor, dx: Tensor, dn: Tensor) -> None:
        ddelta = self.backward(step, layer, branch, 0, n, dx, dn).flatten(1)
        _, projection = self.weights(step.named, layer, branch)
        _, dprojection = self.weights(step.named_grads, layer, branch)
        add_outer(dprojection, ddelta, n)
        torch.addmm(dn, ddelta, projection, out=dn)

    def backward(
        self,
        step: BlockStep,
        layer: int,
        branch: Branch,
        side: int,
        x: Tensor,  # [R, H] the side's input
        dout: Tensor,  # [R, H]
        dx: Tensor,  # [R, H] written
    ) -> Tensor:  # [R, 2, T, G] gradient of the coefficients, of this side and what was there of the other
        base, _ = self.weights(step.named, layer, branch)
        dbase, _ = self.weights(step.named_grads, layer, branch)
        delta, ddelta = step.take(f"{layer}.{branch}.delta", len(x)), step.take("conv.ddelta", len(x))
        block_conv_backward(
            dout,
            x,
            delta[:, side],
            base[side],
            self.slot(step, len(x)),
            dx,
            ddelta[:, side],
            dbase[side],
            step.take("conv.partial"),
        )
        return ddelta

    def weights(
        self, named: dict[str, Tensor], layer: int, branch: Branch
    ) -> tuple[Tensor, Tensor]:  # base [2, T, H], projection [2*T*G, H]
        at = f"layers.{layer}.{branch}_conv"
        return named[f"{at}.base_kernel"], named[f"{at}.kernel_projection.weight"]

    def slot(self, step: BlockStep, rows: int) -> Tensor:  # [R] int64 place of a row in its block
        if self.slots is None:
            self.slots = torch.arange(step.engine.chunk_blocks * self.block_size, device=step.device) % self.block_size
        return self.slots[:rows]
