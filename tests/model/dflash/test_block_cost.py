"""What `--plan` says of a block step's memory, against the buffers that the engine then has."""

from __future__ import annotations

import pytest
import torch
from small_drafts import dflash_shape, small_dflash

from fastdraft.model.buffers import flat_gradients, table_bytes
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.cost import step_cost
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.dflash.ref import attend_in_blocks


@pytest.mark.parametrize("held_out", [False, True], ids=["no held-out data", "held-out data"])
@pytest.mark.parametrize("kind", ["ce", "dpace", "kl"])
def test_the_plan_is_of_the_engines_buffers(kind, held_out):
    """A loss against the text needs no teacher to train with, and one all the same to be measured."""
    small, loss = small_dflash(dtype=torch.float32), BlockLoss(kind)
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


@pytest.mark.parametrize("window", [None, 5, 12, 200])
def test_the_plans_attention_is_of_the_keys_that_rows_see(window):
    """Counted in the reference, with values of one: what a row sees is the inverse of the weight of any one key."""
    kind = "full_attention" if window is None else "sliding_attention"
    c = dflash_shape(layer_types=(kind,) * 2, sliding_window=window)
    length, e = 160, c.num_attention_heads * c.head_dim
    anchors = torch.arange(1, length - 1)
    rows = len(anchors) * c.block_size
    # All scores are 0, so each key that a row sees has the same weight: column by column, one value of 1 among zeros.
    zeros = torch.zeros(length, 1, 1, dtype=torch.float64), torch.zeros(rows, 1, 1, dtype=torch.float64)
    marked = torch.ones(rows, 1, 1, dtype=torch.float64)  # the block's own keys: their number is known
    share = attend_in_blocks(zeros[1], zeros[0], zeros[0], zeros[1], marked, anchors, torch.zeros_like(anchors), window)
    slot = torch.arange(c.block_size).repeat(len(anchors))
    own = torch.full_like(slot, c.block_size) if window is None else slot + 1
    seen = own / share.flatten()
    _, flops = step_cost(
        c,
        pack_tokens=length,
        document_tokens=length,
        precision="fp32",
        target_dtype=torch.float32,
        step="fused",
        device="cpu",
        chunk_rows=None,
        anchors=512,
        needs_teacher=False,
    )
    (planned,) = [row.size for row in flops if row.name == "draft's attention"]
    assert planned == pytest.approx(7 * 2 * c.num_hidden_layers * e * float(seen.sum()) / length, rel=0.04)
