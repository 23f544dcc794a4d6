"""The ways in which a DFlash2 checkpoint could be read: DFlash's, and those of its convolutions and its selector."""

from __future__ import annotations

import torch

from fastdraft.model.dflash.parity import BlockReading, block_readings, read_block_as
from fastdraft.model.dflash2.draft import DFlash2Draft

PLAIN = BlockReading("selector", "plain DFlash, convolutions and selector left out", without="both")
UNSELECTED = BlockReading("selector", "the selector left out", without="candidate_selector")
SWAPPED = BlockReading("selector", "the selector's two tables swapped", without="candidate_selector.order")
UNCONVOLVED = BlockReading("convolution", "the convolutions left out", without="conv")
ONE_SIDED = BlockReading("convolution", "the convolutions' two sides swapped", without="conv.order")
OWN = (PLAIN, UNSELECTED, SWAPPED, UNCONVOLVED, ONE_SIDED)


def selector_readings(draft: DFlash2Draft, num_target_layers: int) -> list[BlockReading]:
    """The documented reading first, then every single fault that would be another reading of this draft."""
    return [*block_readings(draft, num_target_layers), *OWN]


@torch.no_grad()
def read_selector_as(draft: DFlash2Draft, reading: BlockReading) -> DFlash2Draft:
    """A copy of the draft, read so."""
    if reading not in OWN:
        return read_block_as(draft, reading)
    mine: DFlash2Draft = read_block_as(draft, BlockReading())
    selector = mine.candidate_selector
    if reading in (PLAIN, UNSELECTED):
        selector.successor_codebook.zero_()
    if reading == SWAPPED:
        before, after = selector.predecessor_codebook, selector.successor_codebook
        selector.predecessor_codebook, selector.successor_codebook = after, before
    for convolution in (getattr(layer, name) for layer in mine.layers for name in ("attention_conv", "mlp_conv")):
        if reading in (PLAIN, UNCONVOLVED):
            convolution.be_identity()
        if reading == ONE_SIDED:
            convolution.base_kernel.copy_(convolution.base_kernel.flip(0))
            both = convolution.kernel_projection.weight.unflatten(0, (2, -1))
            convolution.kernel_projection.weight.copy_(both.flip(0).flatten(0, 1))
    return mine
