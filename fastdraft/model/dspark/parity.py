"""The ways in which a DSpark checkpoint could be read: DFlash's, and those of the Markov head.

# V vocabulary, r rank of the Markov head
"""

from __future__ import annotations

import torch
from torch import nn

from fastdraft.model.dflash.parity import BlockReading, block_readings, read_block_as
from fastdraft.model.dspark.draft import DSparkDraft

LEFT_OUT = BlockReading("markov head", "the Markov head left out", without="markov_head")
SWAPPED = BlockReading("markov head", "markov_w1 and markov_w2 swapped", without="markov_head.order")


def dspark_readings(draft: DSparkDraft, num_target_layers: int) -> list[BlockReading]:
    """The documented reading first, then every single fault that would be another reading of this draft."""
    return [*block_readings(draft, num_target_layers), LEFT_OUT, SWAPPED]


def read_dspark_as(draft: DSparkDraft, reading: BlockReading) -> DSparkDraft:
    """A copy of the draft, read so."""
    if reading not in (LEFT_OUT, SWAPPED):
        return read_block_as(draft, reading)
    mine = read_block_as(draft, BlockReading())
    head = mine.markov_head
    w1, w2 = head.markov_w1.weight.detach(), head.markov_w2.weight.detach()
    if reading == LEFT_OUT:
        head.markov_w2.weight = nn.Parameter(torch.zeros_like(w2))
    else:
        head.markov_w1.weight, head.markov_w2.weight = nn.Parameter(w2), nn.Parameter(w1)
    return mine
