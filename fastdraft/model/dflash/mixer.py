"""What may stand around a layer's attention and around its MLP in the block engine, for methods that mix rows of a block.

A branch is "attention" or "mlp", n the normed rows that go into it, run its products:

    x = mix_in(n)     y = run(x)     what joins the residual stream = mix_out(y, n)

`DFlashDraft.around` is the same for the reference and the drafter. With a mixer every row runs every layer, because a row
may read another in front of any branch; DFlash itself has none, and what mixing costs is not paid there.

# R block rows of a chunk, block after block, H hidden
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from fastdraft.model.dflash.engine import BlockStep

Branch = Literal["attention", "mlp"]


class Mixer(Protocol):
    """Built of a draft. Buffers and weight gradients are `step`'s, as a `BlockHead`'s are."""

    def mix_in(
        self,
        step: BlockStep,
        layer: int,
        branch: Branch,
        n: Tensor,  # [R, H]
        x: Tensor,  # [R, H] written
    ) -> None: ...

    def mix_out(
        self,
        step: BlockStep,
        layer: int,
        branch: Branch,
        n: Tensor,  # [R, H] as `mix_in` read it
        y: Tensor,  # [R, H]
        out: Tensor,  # [R, H] written
    ) -> None: ...

    def mix_out_backward(
        self,
        step: BlockStep,
        layer: int,
        branch: Branch,
        n: Tensor,  # [R, H]
        y: Tensor,  # [R, H]
        dout: Tensor,  # [R, H] read only: it is the residual stream's gradient too
        dy: Tensor,  # [R, H] written
    ) -> None: ...

    def mix_in_backward(
        self,
        step: BlockStep,
        layer: int,
        branch: Branch,
        n: Tensor,  # [R, H]
        dx: Tensor,  # [R, H]
        dn: Tensor,  # [R, H] written: what `mix_out_backward` found for n included
    ) -> None: ...
