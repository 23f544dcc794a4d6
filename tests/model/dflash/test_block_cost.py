"""What `--plan` says of a block step's memory, against the buffers that the engine then has."""

from __future__ import annotations

import pytest
import torch
from small_dflash import Small

from fastdraft.model.buffers import flat_gradients, table_bytes
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.cost import step_cost
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.loss import BlockLoss


@pytest.mark.parametrize("held_out", [False, True], ids=["no held-out data", "held-out data"])
@pytest.mark.parametrize("kind", ["ce", "dpace", "kl"])
def test_the_plan_is_of_the_engines_buffers(kind, held_out):
    """A loss against the text needs no teacher to train with, and one all the same to be measured."""
    small, loss = Small(dtype=torch.float32), BlockLoss(kind)
    engine = BlockEngine(small.draft, small.head, loss, lambda batch, step: draw_anchors(batch, 512, 0, step), 3)
    engine.begin(1)
    engine.step(small.batch, small.features, flat_gradients(small.draft.trainable()))
    if held_out:
        engine.rows(small.batch, small.features)
    rows, _ = step_cost(
        small.config,
        pack_tokens=small.batch.num_tokens,
        document_tokens=max(small.batch.lengths),
        precision="fp32",
        target_dtype=torch.float32,
        step="fused",
        device="cpu",
        chunk_rows=3,
        anchors=512,
        needs_teacher=loss.needs_teacher,
        held_out=held_out,
    )
    results = small.config.num_drafted * small.batch.num_tokens * (2 * 4 + 3)
    planned = sum(row.size for row in rows if "scores" not in row.name)
    assert planned - results == table_bytes(engine.take.table)
    assert any("held-out" in row.name for row in rows) == (held_out and kind != "kl")
