"""DFlash2's golden case: a small float64 step computed by an independent trainer, replayed on any engine."""

from __future__ import annotations

from pathlib import Path

from fastdraft.model.dflash.golden import BlockGolden, block_golden, golden_shape, read_block_golden
from fastdraft.model.dflash2.config import NESTED, DFlash2Config
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.dflash2.loss import SelectorLoss


def load_selector_golden(path: Path) -> BlockGolden:
    """Reads one case. Its hits are those of the logits alone, which a draft with a selector does not report, so they are
    left out. Raises ValueError naming the file when it is not a golden case of DFlash2."""
    c, t = read_block_golden(path, "dflash2")
    loss = SelectorLoss("ce", c["gamma"], selector_alpha=c["selector_alpha"])
    draft = DFlash2Draft(golden_shape(c, DFlash2Config, **{name: c[name] for name in NESTED}))
    law = t["outputs.row_ce"] + loss.selector_alpha * t["outputs.row_selector_ce"]
    return block_golden(c, t, loss, draft, law[:, draft.config.first_slot :], None)
