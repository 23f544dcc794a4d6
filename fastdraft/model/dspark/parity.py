"""The ways in which a DSpark checkpoint could be read: DFlash's, and those of the Markov head."""

from __future__ import annotations

from torch import nn

from fastdraft.model.dflash.parity import block_readings
from fastdraft.model.dspark.draft import DSparkDraft
from fastdraft.model.reading import Reading


def _leave_out(draft: DSparkDraft) -> None:
    nn.init.zeros_(draft.markov_head.markov_w2.weight)


def _swap(draft: DSparkDraft) -> None:
    head = draft.markov_head
    head.markov_w1.weight, head.markov_w2.weight = head.markov_w2.weight, head.markov_w1.weight


OWN = [
    Reading("markov head", "the Markov head left out", _leave_out),
    Reading("markov head", "markov_w1 and markov_w2 swapped", _swap),
]


def dspark_readings(draft: DSparkDraft, num_target_layers: int) -> list[Reading]:
    """The documented reading first, then every single fault that would be another reading of this draft."""
    return [*block_readings(draft, num_target_layers), *OWN]
