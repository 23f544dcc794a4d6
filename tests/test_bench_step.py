"""The step benchmark on a CPU: its FLOPs against a naive loop, its documents, its rows; and SpecForge's step beside ours.

The last needs a checkout, named by the environment variable SPECFORGE_DIR.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bench.step import Ours, main
from bench.work import SHAPES, chat_batches, live_batch, make_work, model_flops, rows_needed
from fastdraft.batch import Batch

TINY = SHAPES["tiny"]


def random_batch(lengths: tuple[int, ...], density: float = 0.6) -> Batch:
    generator = torch.Generator().manual_seed(5)
    n = sum(lengths)
    mask = torch.rand(n, generator=generator) < density
    return Batch(torch.randint(TINY.vocab_size, (n,), generator=generator), mask, lengths)


def naive_flops(batch: Batch, steps: int) -> int:
    c, first, total, read = TINY, 0, 0.0, set()
    h, e, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for length in batch.lengths:
        trained = lambda t, i, first=first, length=length: (  # noqa: E731
            t + 2 + i < length and bool(batch.loss_mask[first + t + 2 + i])
        )
        for t in range(length):
            total += 2 * (2 * 3 * h * h + 3 * 2 * h * 2 * kv)
            for i in range(steps):
                if any(trained(t, j) for j in range(i, steps)):
                    total += 6 * (2 * h * (e + (2 * kv if i else 0)) + e * h + 3 * h * c.intermediate_size)
                    total += 3.5 * 4 * e * (t + 1 + i)
                if trained(t, i):
                    total += 6 * h * c.draft_vocab_size
                    read.add(first + t + 1 + i)
        first += length
    return int(total + 2 * len(read) * h * c.vocab_size)


@pytest.mark.parametrize("lengths", [(40,), (9, 1, 17, 2, 8)])
@pytest.mark.parametrize("density", [0.1, 0.7])
def test_flops_are_those_of_a_naive_loop(lengths, density):
    batch = random_batch(lengths, density)
    assert model_flops(TINY, batch, 5) == naive_flops(batch, 5) > 0


def test_flops_of_a_real_draft():
    """The known figure of Llama-3.1-8B at 8192 live tokens."""
    config = SHAPES["llama-3.1-8b"]
    assert model_flops(config, live_batch(config, 8192), 7) / 8192 == pytest.approx(18.6e9, rel=0.002)


def test_chats_fill_packs_and_train_on_answers():
    batches = chat_batches(TINY, 4096, Path("bench/data/chats.jsonl"), 4)
    for batch in batches:
        assert 0.9 * 4096 < batch.num_tokens <= 4096 and max(batch.lengths) <= 4096
    share = sum(int(b.loss_mask.sum()) for b in batches) / sum(b.num_tokens for b in batches)
    assert 0.5 < share < 0.95
    with pytest.raises(ValueError, match=r"fills \d+ packs of 1048576 tokens; 4 are asked for"):
        chat_batches(TINY, 1 << 20, Path("bench/data/chats.jsonl"), 4)


def test_what_the_mask_allows_is_trained_on():
    """The target's choice is a draft-vocabulary token but for accidents of so narrow a head."""
    batch = random_batch((31, 12))
    ours = Ours(make_work(TINY, [batch], 3, torch.float32, torch.device("cpu")), "fused", None)
    ours.model(0)
    needed = rows_needed(batch, 3)
    assert torch.equal(ours.rows.masked_in, needed) and ours.rows.live.sum() > 0.8 * needed.sum()


@pytest.mark.slow
def test_rows(tmp_path):
    (tmp_path / "chats.jsonl").write_text('[["u", 6], ["a", 12]]\n[["s", 2], ["u", 4], ["a", 8]]\n')
    main(
        f"--device cpu --dtype fp32 --shape tiny --tokens 32 --pattern live,chats --packs 1 --ttt 3 --rounds 1 "
        f"--engine fused,reference --seconds 0.1 --commit abc --out {tmp_path} --chats {tmp_path}/chats.jsonl".split()
    )
    rows = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [(r["shape"]["pattern"], r["shape"]["tokens"], r["provider"]) for r in rows] == [
        (pattern, 32, provider) for pattern in ("live", "chats") for provider in ("fastdraft", "reference")
    ]
    assert all(r["us_per_token"] > r["model_us_per_token"] > 0 and len(r["source"]) == 16 for r in rows)
    assert all(r["loss_error"] < 1e-5 for r in rows if r["provider"] == "reference")
    live, chats = rows[0], rows[2]
    assert live["useful_tokens_per_s"] == pytest.approx(live["tokens_per_s"] * 30 / 32, rel=0.01)
    assert chats["useful_tokens_per_s"] < 0.9 * chats["tokens_per_s"]


def test_fp8_rows_stand_beside_bf16(tmp_path):
    main(
        f"--device cpu --shape tiny --tokens 64 --ttt 2 --rounds 1 --seconds 0.1 --precision bf16,fp8 --commit abc "
        f"--out {tmp_path}".split()
    )
    plain, row = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert (plain["provider"], plain["dtype"]) == ("fastdraft", "bf16")
    assert (row["provider"], row["dtype"], row["interleaved_with"]) == ("fastdraft, fp8", "fp8", ["fastdraft"])
    assert 0 < row["loss_error"] < 1e-2


@pytest.mark.skipif("SPECFORGE_DIR" not in os.environ, reason="SPECFORGE_DIR does not name a checkout of SpecForge")
def test_specforge_agrees():
    """Losses and gradients in fp32, conversations padded together: a mask, short documents, one of one token."""
    from bench.peers.specforge import SpecForge

    work = make_work(TINY, [random_batch((25, 3, 20, 1, 11))], 4, torch.float32, torch.device("cpu"))
    ours, peer = Ours(work, "fused", None), SpecForge(work, Path(os.environ["SPECFORGE_DIR"]), "sdpa", 5)
    ours.model(0)
    peer.model(0)
    torch.testing.assert_close(peer.losses(), ours.losses().double(), rtol=1e-5, atol=0)
    rows = peer.packs[0][0]["input_ids"].numel()  # its loss is a mean over them
    found = dict(peer.draft.named_parameters())
    for name, law in ours.optimizer.grads.items():
        assert float((found[name].grad * rows - law).abs().max()) <= 1e-5 * float(law.abs().max()), name
