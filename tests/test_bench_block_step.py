"""The block step's benchmark on a CPU: its FLOPs against a naive loop, its rows; and the peers' steps beside ours.

Those need a checkout of SpecForge and an installed speculators, named by SPECFORGE_DIR and SPECULATORS_DIR.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bench.block_step import Ours, main
from bench.block_work import (
    BLOCK_METHODS,
    SHAPES,
    BlockWork,
    block_shape,
    default_loss,
    flop_parts,
    make_block_work,
    without_mask_token,
)
from fastdraft.batch import Batch
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.loss import BlockLoss

CPU = torch.device("cpu")
TINY = SHAPES["tiny"].model_copy(update={"block_size": 4})


def random_batch(lengths: tuple[int, ...], density: float = 0.8) -> Batch:
    generator = torch.Generator().manual_seed(5)
    n = sum(lengths)
    ids = torch.randint(TINY.vocab_size, (n,), generator=generator)
    return Batch(ids, torch.rand(n, generator=generator) < density, lengths)


def small_work(loss: str = "ce", method: str = "dflash") -> BlockWork:
    """Short documents, one of one token, one shorter than a block; anchors fewer than there are places."""
    config = block_shape("tiny", method, 4)
    batches = without_mask_token([random_batch((45, 6, 40, 1, 31))], config)
    return make_block_work(config, batches, 12, default_loss(method, loss, 4), torch.float32, CPU)


def naive_flops(c: DFlashConfig, batch: Batch, anchors: torch.Tensor) -> int:
    h, e, kv, total = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, 0.0
    total += batch.num_tokens * (4 * len(c.layers) * h * h + 6 * c.num_hidden_layers * h * 2 * kv)
    total += 6 * h * (e + 2 * kv) * (not c.mixes)  # the mask token in layer 0
    for a in anchors.tolist():
        start, end = int(batch.doc_start[a]), int(batch.doc_end[a])
        for k in range(c.block_size):
            label = a + k
            live = k > 0 and label < end and bool(batch.loss_mask[label])
            for layer in range(c.num_hidden_layers):
                on = live or layer < c.num_hidden_layers - 1 or c.mixes
                if c.mixes:
                    # Coefficients of both branches, on both sides: taps times groups.
                    total += 2 * 6 * h * 2 * c.conv_kernel_size * (h // c.conv_group_size)
                if layer > 0 or c.mixes:
                    total += 6 * h * (2 * kv + e * on)
                elif k == 0:
                    total += 6 * h * (e + 2 * kv)
                window = c.sliding_window if c.layer_types[layer] == "sliding_attention" else None
                seen = a - start + c.block_size if window is None else min(a - start, window - 1 - k) + k + 1
                total += on * (6 * (e * h + 3 * h * c.intermediate_size) + 14 * e * seen)
            total += 4 * h * c.vocab_size * live
            if c.mixes:
                total += live * 6 * (h * c.selector_rank + (c.selector_top_k + 1) * c.selector_rank)
    return int(total)


@pytest.mark.parametrize("lengths", [(70,), (20, 9, 1, 37)])
@pytest.mark.parametrize("sliding", [False, True])
def test_flops_are_those_of_a_naive_loop(lengths, sliding):
    config = TINY
    if sliding:
        config = TINY.model_copy(update={"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 9})
    batch = without_mask_token([random_batch(lengths)], config)[0]
    work = make_block_work(config, [batch], 9, BlockLoss(), torch.float32, CPU)
    assert work.flops == naive_flops(config, batch, work.anchors[0]) > 0
    mixed = make_block_work(block_shape("tiny", "dflash2", 4), [batch], 9, BlockLoss(), torch.float32, CPU)
    assert mixed.flops == naive_flops(mixed.config, batch, mixed.anchors[0]) > work.flops
    with_teacher = flop_parts(config, batch, work.anchors[0], needs_teacher=True)["head"]
    assert with_teacher > flop_parts(config, batch, work.anchors[0], needs_teacher=False)["head"]


def test_what_no_text_has_is_taken_out():
    batch = without_mask_token([random_batch((300, 30))], TINY)[0]
    assert not (batch.input_ids == TINY.mask_token_id).any()
    assert not batch.loss_mask[:4].any() and not batch.loss_mask[300:304].any() and batch.loss_mask[4:300].sum() > 200


def test_rows(tmp_path):
    (tmp_path / "chats.jsonl").write_text('[["u", 20], ["a", 44]]\n[["s", 2], ["u", 14], ["a", 48]]\n')
    main(
        f"--device cpu --dtype fp32 --shape tiny --block 4 --tokens 128 --pattern live,chats --packs 1 --rounds 1 "
        f"--anchors 16 --engine fused,reference --seconds 0.1 --commit abc --out {tmp_path} "
        f"--chats {tmp_path}/chats.jsonl".split()
    )
    rows = [json.loads(line) for line in (tmp_path / "block_step.jsonl").read_text().splitlines()]
    assert [(r["shape"]["pattern"], r["provider"]) for r in rows] == [
        (pattern, provider) for pattern in ("live", "chats") for provider in ("fastdraft", "reference")
    ]
    assert [r["rows"] for r in rows] == [64, 64, 128, 128]
    for r in rows:
        assert r["us_per_row"] > r["model_us_per_row"] > 0 and len(r["source"]) == 16
        assert 1.33 < r["us_per_trained_token"] / r["us_per_row"] < 1.6
    assert all(r["loss_error"] < 1e-5 for r in rows if r["provider"] == "reference")


def test_every_method_has_rows_of_its_own(tmp_path):
    methods = ",".join(BLOCK_METHODS)
    main(
        f"--device cpu --dtype fp32 --shape tiny --block 4 --tokens 40 --method {methods} --rounds 1 --anchors 9 "
        f"--engine fused,reference --seconds 0.1 --commit abc --out {tmp_path}".split()
    )
    rows = [json.loads(line) for line in (tmp_path / "block_step.jsonl").read_text().splitlines()]
    assert [r["shape"].get("method", "dflash") for r in rows] == [m for m in BLOCK_METHODS for _ in range(2)]
    assert all(r["loss_error"] < 1e-5 for r in rows if r["provider"] == "reference")


def test_a_loss_that_a_method_has_not_is_refused():
    with pytest.raises(ValueError, match="DSpark has one loss, of three terms, and dpace was asked for; leave --loss out"):
        default_loss("dspark", "dpace", 8)


def compare(work: BlockWork, peer: object, draft: torch.nn.Module) -> None:
    """The summed loss, and its gradient for every weight."""
    ours = Ours(work, "fused", 5)
    ours.model(0)
    peer.model(0)
    torch.testing.assert_close(peer.losses().double(), ours.losses(), rtol=1e-5, atol=0)
    found = dict(draft.named_parameters())
    grads = ours.optimizer.grads
    if work.loss.kind != "dpace":
        assert all(float(g.abs().max()) > 0 for g in grads.values())
    for name, law in grads.items():
        assert float((found[name].grad - law).abs().max()) <= 1e-5 * float(law.abs().max()), name


@pytest.mark.skipif("SPECFORGE_DIR" not in os.environ, reason="SPECFORGE_DIR does not name a checkout of SpecForge")
@pytest.mark.parametrize(("method", "loss"), [("dflash", "ce"), ("dflash", "dpace"), ("dspark", "ce")])
@pytest.mark.parametrize("at_once", [1, 5])
def test_specforge_agrees(method, loss, at_once):
    from bench.peers.specforge_dflash import SpecForgeDFlash

    work = small_work(loss, method)
    peer = SpecForgeDFlash(work, Path(os.environ["SPECFORGE_DIR"]), "sdpa", at_once)
    compare(work, peer, peer.draft)


@pytest.mark.skipif(
    "SPECULATORS_DIR" not in os.environ, reason="SPECULATORS_DIR does not name where speculators is installed"
)
@pytest.mark.parametrize("loss", ["ce", "dpace"])
def test_speculators_agrees(loss):
    from bench.peers.speculators_dflash import SpeculatorsDFlash

    work = small_work(loss)
    peer = SpeculatorsDFlash(work, Path(os.environ["SPECULATORS_DIR"]))
    compare(work, peer, peer.draft)


def test_a_folder_without_the_peer_is_named(tmp_path):
    from bench.peers.specforge_dflash import SpecForgeDFlash
    from bench.peers.speculators_dflash import SpeculatorsDFlash

    with pytest.raises(ValueError, match="has no folder specforge; --specforge needs"):
        SpecForgeDFlash(small_work(), tmp_path, "sdpa", 1)
    with pytest.raises(ValueError, match="has no speculators with DFlash; pip install --no-deps"):
        SpeculatorsDFlash(small_work(), tmp_path)
