"""DFlash2's golden case: a float64 step computed by an independent trainer, replayed on any engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastdraft.model.dflash.golden import BlockGolden, case_of, read_case
from fastdraft.model.dflash2.config import NESTED, DFlash2Config
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.dflash2.loss import SelectorLoss


def load_selector_golden(path: Path) -> BlockGolden:
    """Reads one case; its row losses are the unary ones plus alpha times the selector's. Its hits are the unary logits' own,
    which no draft with a selector reports, so they are left out. Raises ValueError naming the file when it is none."""
    c, t = read_case(path)
    shape = DFlash2Config
    case = case_of(c, t, shape, DFlash2Draft, {name: c[name] for name in NESTED})
    alpha = float(c["selector_alpha"])
    drafted = slice(case.draft.config.first_slot, None)
    selected: Tensor = t["outputs.row_selector_ce"][:, drafted]
    loss = SelectorLoss("ce", c["gamma"], selector_alpha=alpha)
    return replace(case, loss=loss, row_loss=case.row_loss + alpha * selected, hits=None)
