"""DSpark's golden cases: small float64 steps computed by independent trainers, replayed on any engine."""

from __future__ import annotations

from pathlib import Path

from fastdraft.model.dflash.golden import BlockGolden, block_golden, golden_shape, read_block_golden
from fastdraft.model.dspark.config import DSparkConfig
from fastdraft.model.dspark.draft import DSparkDraft
from fastdraft.model.dspark.loss import DSparkLoss


def load_dspark_golden(path: Path) -> BlockGolden:
    """Reads one case. Raises ValueError naming the file when it is not a golden case of DSpark."""
    c, t = read_block_golden(path, "dspark")
    loss = DSparkLoss(c["gamma"], c["ce_alpha"], c["l1_alpha"], c["confidence_alpha"])
    draft = DSparkDraft(golden_shape(c, DSparkConfig, markov_rank=c["markov_rank"], markov_head_type=c["markov_head_type"]))
    distance = 2 * (1 - t["outputs.row_acceptance"])
    terms = t["outputs.row_ce"], distance, t["outputs.row_confidence_bce"]
    weights = loss.ce_weight, loss.l1_weight, loss.confidence_weight
    return block_golden(c, t, loss, draft, sum(w * x for w, x in zip(weights, terms, strict=True)), None)
