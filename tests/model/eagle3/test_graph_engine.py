"""Packs padded to a graph's shape: the reference's rows and gradients, whatever ran in the same place before; on a GPU the
graph itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import DRAFTS, decay, make_draft, make_inputs

from fastdraft.batch import Batch, Features
from fastdraft.config import OptimConfig
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.eagle3 import graph_engine as graph
from fastdraft.model.eagle3.chunks import pad_batch, pad_chunk, plan_chunks
from fastdraft.model.eagle3.graph_engine import GraphEngine
from fastdraft.model.eagle3.ref import ttt_ref_step
from fastdraft.optim import FlatAdamW

NAMES = ("loss", "acceptance", "hit", "live", "masked_in")
LENGTHS = ((23, 1, 9, 2, 17, 3, 12), (5, 11), (3, 40, 2), (60,), (23, 1, 9, 2, 17, 3, 12))


@pytest.fixture
def small_shapes(monkeypatch):
    monkeypatch.setattr(graph, "ROOM", 16)
    monkeypatch.setattr(graph, "CHAINS", 8)


def assert_same(rows, law):
    for name in NAMES:
        torch.testing.assert_close(getattr(rows, name), getattr(law, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["kl", "lk_lambda"])
@pytest.mark.parametrize("name", DRAFTS)
def test_padded_packs_equal_the_reference(name, kind, small_shapes):
    draft = make_draft(**DRAFTS[name])
    engine, grads, law = None, flat_gradients(draft.trainable()), {}
    for seed, lengths in enumerate(LENGTHS):
        batch, features, head = make_inputs(lengths, seed=seed)
        engine = engine or GraphEngine(draft, head, decay(5), kind)
        engine.head = GraphEngine(draft, head, decay(5), kind).head
        rows, found = ttt_ref_step(draft, batch, features, head, decay(5), kind)
        law = {k: law.get(k, 0) + g for k, g in found.items()}
        assert_same(engine.run_padded(batch, features, grads), rows)
        assert_same(engine.run_padded(batch, features, None), rows)
    assert len(engine.packs) == 2 * 4  # the last pack ran where the first had been
    for k, grad in grads.items():
        assert float((grad - law[k]).abs().max()) <= 1e-11 * float(law[k].abs().max()), k


def test_what_the_pack_before_left_behind_does_not_matter(small_shapes):
    draft = make_draft(**DRAFTS["gqa"])
    long, short = make_inputs((30, 31), seed=1), make_inputs((29, 20), seed=2)
    alone, after = (GraphEngine(draft, short[2], decay(4)) for _ in range(2))
    mask = torch.ones(61, dtype=torch.bool)
    grads = [flat_gradients(draft.trainable()), flat_gradients(draft.trainable())]
    after.run_padded(Batch(long[0].input_ids, mask, long[0].lengths), long[1], flat_gradients(draft.trainable()))
    for x in after.places.values():
        x.g.fill_(7.0)
        x.f.fill_(7.0)
    rows = [e.run_padded(*short[:2], g) for e, g in zip((alone, after), grads, strict=True)]
    for name in NAMES:
        assert torch.equal(getattr(rows[0], name), getattr(rows[1], name)), name
    assert all(torch.equal(grads[0][k], grads[1][k]) for k in grads[0])


def test_packs_that_are_full_or_nearly_have_one_shape(small_shapes):
    draft, engine = make_draft(), None
    for lengths in ((30, 18), (30, 17), (47,)):  # 48 tokens is three times ROOM
        batch, features, head = make_inputs(lengths)
        engine = engine or GraphEngine(draft, head, decay(4))
        mask = torch.zeros_like(batch.loss_mask)
        mask[2:20] = True
        engine.run_padded(replace(batch, loss_mask=mask), features, None)
    (pack,) = engine.packs.values()
    assert pack.n == 48 + graph.BEHIND and pack.replay.runs == 3


def test_chains_are_padded_to_few_numbers_and_never_by_much():
    padded = [graph.padded_chains(m) for m in range(1, 16385)]
    assert all(m <= p < m + max(512, m / 4) for m, p in enumerate(padded, 1))
    assert padded == sorted(padded) and sorted(set(padded)) == [
        *(512, 1024, 1536, 2048, 2560, 3072, 3584, 4096),
        *(5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384),
    ]


def test_padded_chains_fit_where_the_buffers_do(small_shapes):
    draft, (batch, features, head) = make_draft(), make_inputs((72,))
    batch = replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
    engine = GraphEngine(draft, head, decay(4), chunk_rows=72)  # 71 chains, which would be padded to 80
    assert graph.padded_chains(71) == 80
    assert_same(engine.run_padded(batch, features, None), ttt_ref_step(draft, batch, features, head, decay(4))[0])
    (pack,) = engine.packs.values()
    assert pack.chunk.sizes == (72,) * 4


def test_rows_stay_when_the_next_pack_runs(small_shapes):
    draft, (batch, features, head) = make_draft(), make_inputs((30, 31))
    engine = GraphEngine(draft, head, decay(4))
    rows = engine.run_padded(batch, features, None)
    kept = rows.loss.clone()
    engine.run_padded(batch, Features(2 * features.g, -features.f), None)
    assert torch.equal(rows.loss, kept) and kept.any()


def test_nothing_trained_on_is_no_work(small_shapes):
    draft, (batch, features, head) = make_draft(), make_inputs((30, 31))
    engine, grads = GraphEngine(draft, head, decay(4)), flat_gradients(draft.trainable())
    rows = engine.run_padded(Batch(batch.input_ids, torch.zeros_like(batch.loss_mask), batch.lengths), features, grads)
    assert not rows.sums().any() and not engine.packs and not any(g.any() for g in grads.values())


def test_only_packs_of_one_chunk_run_as_graphs(small_shapes, monkeypatch):
    """A graph is one chunk: a pack of more chains, padded, than chunk_rows runs without one, as does one of much work."""
    draft, (_, _, head) = make_draft(), make_inputs()
    FlatAdamW(draft.trainable(), OptimConfig(optimizer="adamw"), 1, torch.float64)  # lays the weights end to end
    engine = GraphEngine(draft, head, decay(4), chunk_rows=32)
    assert not engine.covers(10)  # there are no graphs on a CPU
    engine.take.device = torch.device("cuda")  # asked for its name alone
    assert [engine.covers(n) for n in (10, 33, 34, 1000)] == [
        True,
        True,
        False,
        False,
    ]  # 34: up to 32 chains and one for padding
    monkeypatch.setattr(graph, "GRAPH_FLOPS", 20 * engine.work)
    assert [engine.covers(n) for n in (20, 21)] == [True, False]
    monkeypatch.undo()
    engine.fp8 = True
    assert not engine.covers(10)
    apart = GraphEngine(make_draft(), head, decay(4), chunk_rows=32)
    apart.take.device = torch.device("cuda")
    assert not apart.covers(10)  # its weights are copied together for every step


def test_buffers_that_moved_are_found(small_shapes):
    """A longer pack takes new buffers: what was recorded for the old ones must go."""
    draft, (batch, features, head) = make_draft(), make_inputs((12,))
    longer = make_inputs((50,), seed=4)
    engine = GraphEngine(draft, head, decay(4))
    law = ttt_ref_step(draft, batch, features, head, decay(4))[0]
    for _ in range(2):
        assert_same(engine.run_padded(batch, features, None), law)
        engine.run_padded(*longer[:2], None)
        engine.take.resize({name: (rows + 1, *rest) for name, (rows, *rest) in engine.take.table.items()})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_pack_is_put_in_place_without_other_memory_of_the_gpu(small_shapes, monkeypatch):
    draft = make_draft(head_dim=8).to("cuda", torch.float32)
    batch, features, head = make_inputs((30, 31), dtype=torch.float32)
    features = Features(features.g.cuda(), features.f.cuda())
    head = replace(head, weight=head.weight.cuda(), bias=head.bias.cuda())
    engine = GraphEngine(draft, head, decay(4).float().cuda())
    law, allocated, fill = engine.run_padded(batch, features, None), [], graph._Pack.fill

    def counted(*args) -> None:
        count = lambda: torch.cuda.memory_stats()["allocation.all.allocated"]  # noqa: E731
        before = count()
        fill(*args)
        allocated.append(count() - before)

    monkeypatch.setattr(graph._Pack, "fill", counted)
    again = engine.run_padded(batch, features, None)
    assert allocated == [0] and torch.equal(again.loss, law.loss)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_padding_keeps_every_row_and_adds_none(lengths, ttt_length, seed):
    mask = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) < 0.6
    batch = pad_batch(Batch(torch.arange(sum(lengths)), mask, tuple(lengths)), sum(lengths) + 7)
    for chunk in plan_chunks(batch, ttt_length, 10**6):
        n, m = batch.num_tokens, chunk.sizes[0] + 3
        wide = pad_chunk(chunk, n, (m,) * ttt_length)
        shapes = {len(x) for x in (wide.row_pos, wide.head_row, wide.head_out)}
        assert wide.sizes == (m,) * ttt_length and shapes == {ttt_length * m}
        assert len(wide.token_id) == len(wide.teacher_pos) == m + ttt_length and len(wide.chain_pos) == m
        assert not batch.loss_mask[-7:].any() and (wide.chain_pos[chunk.sizes[0] :] == n - 1).all()
        rows = {}
        for x in (chunk, wide):
            at = torch.arange(len(x.row_pos))[x.row_pos >= 0]
            read = x.token_id[x.token_row[at]]
            rows[x is wide] = sorted(
                zip(*(y[at].tolist() for y in (x.row_pos, x.row_position)), read.tolist(), strict=True)
            )
        assert rows[False] == rows[True]
        real = wide.head_step < ttt_length
        assert torch.equal(wide.head_out[real], chunk.head_out) and (wide.head_out[~real] == ttt_length * n).all()
        assert torch.equal(wide.row_pos[wide.head_row[real]], chunk.row_pos[chunk.head_row])
        assert (wide.row_pos[wide.head_row[~real]] == -1).all()
        padding = wide.row_pos < 0
        assert not torch.isin(wide.token_row[padding], wide.token_row[~padding]).any()  # a launch adds to a token once
        assert not torch.isin(wide.head_row[~real], wide.head_row[real]).any()
        assert not torch.isin(wide.chain_pos[chunk.sizes[0] :], chunk.chain_pos).any()
        assert torch.equal(wide.teacher_pos[wide.teacher_row[real]], chunk.teacher_pos[chunk.teacher_row])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_is_what_it_recorded(dtype):
    """First without a graph, then recorded, then replayed: the same bits; and the plain engine's numbers up to rounding."""
    draft = make_draft(hidden_size=64, target_hidden_size=64, head_dim=16, vocab_size=151, draft_vocab_size=80).to(
        "cuda", dtype
    )
    for p in draft.parameters():
        p.data = p.data * (0.3 if p.ndim > 1 else 1.0)
    packs = [make_inputs(lengths, seed=seed, dtype=dtype, vocab=151, width=64) for seed, lengths in enumerate(LENGTHS[:3])]
    packs = [(b, Features(f.g.cuda(), f.f.cuda())) for b, f, _ in packs]
    head = make_inputs((5,), dtype=dtype, vocab=151, width=64)[2]
    head = type(head)(head.weight.cuda())
    engine, found = GraphEngine(draft, head, decay(5).float().cuda()), []
    flat = flat_gradients(draft.trainable())
    for _ in range(4):
        for g in flat.values():
            g.zero_()
        rows = [engine.run_padded(b, f, flat) for b, f in packs]
        found.append([r.loss for r in rows] + [g.clone() for g in flat.values()])
    assert all(pack.replay.graph is not None for pack in engine.packs.values())
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
    plain = flat_gradients(draft.trainable())
    for b, f in packs:
        super(GraphEngine, engine)._run(b, f, plain)
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    for name, g in plain.items():
        assert float((flat[name] - g).abs().max()) <= bound * float(g.abs().max()), name
