"""DFlash's loss of a slot, with the selector's cross entropy among the slot's candidates beside it.

A live row has the loss  unary + alpha CE, the unary one being what `block.loss` names and CE the selector's
(`kernels/selector.py`): against the data's token, after the data's token before it. Both have the weight of the row's step.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdraft.model.dflash.loss import BlockLoss


@dataclass(frozen=True)
class SelectorLoss(BlockLoss):
    selector_alpha: float = 1.0
