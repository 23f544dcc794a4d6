"""Sampled depth: who draws what, which rows are then computed, and that the expected gradient is that of all rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import DRAFTS, assert_same, decay, make_draft, make_inputs

from fastdraft.batch import Batch, Features
from fastdraft.config import Config, parse_config
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.draws import token_uniforms
from fastdraft.model.eagle3 import METHOD
from fastdraft.model.eagle3 import graph_engine as graph
from fastdraft.model.eagle3.chunks import SampledDepth, pad_batch, pad_chunk, plan_chunks
from fastdraft.model.eagle3.engine import TTTEngine
from fastdraft.model.eagle3.graph_engine import GraphEngine
from fastdraft.model.eagle3.ref import ReferenceEngine, ttt_ref_step
from fastdraft.train import train_values

HALF = SampledDepth(0.5, seed=3)


def batch_of(lengths, density: float = 1.0, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    mask = torch.rand(n, generator=generator) < density
    return Batch(torch.randint(0, 99, (n,), generator=generator), mask, tuple(lengths))


# --- what is drawn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 0.97])
def test_step_i_is_drawn_with_probability_p_to_the_i(p):
    n = 40_000
    drawn = SampledDepth(p, seed=0).draw(batch_of((n,)), 1, 7)
    assert drawn.min() == 1 and drawn.max() <= 7
    for i in range(7):
        law = p**i
        assert abs((drawn > i).mean() - law) <= 4.5 * (law * (1 - law) / n) ** 0.5 + 1e-9, i
    shorter = SampledDepth(p, seed=0).draw(batch_of((n,)), 1, 3)
    assert np.array_equal(shorter, drawn.clip(max=3))  # how many steps there are changes no draw


def test_tokens_and_documents_draw_apart_from_each_other():
    """Uniform by 16 classes (chi-square), without a correlation of neighbours, of the same place in two documents that
    differ in one token, or of two steps."""
    n = 1 << 16
    batch = batch_of((n,))
    ids = batch.input_ids.clone()
    ids[9] += 1
    u, next_step = token_uniforms(batch, 0, 1), token_uniforms(batch, 0, 2)
    other = token_uniforms(replace(batch, input_ids=ids), 0, 1)
    assert u.min() > 0 and u.max() <= 1
    counts = np.bincount((u * 15.999999).astype(int), minlength=16)
    assert ((counts - n / 16) ** 2 / (n / 16)).sum() < 45  # beyond which one in ten thousand lies
    for a, b in ((u[1:], u[:-1]), (u[7:], u[:-7]), (u, other), (u, next_step)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / n**0.5


def test_a_documents_draw_is_its_own():
    """Alone, in another pack, or in another order: the same. Another seed, step, token or mask: another."""
    lengths = (40, 31, 55)
    whole = batch_of(lengths, 0.5)
    parts = [Batch(*(x.split(lengths)[k] for x in (whole.input_ids, whole.loss_mask)), (lengths[k],)) for k in range(3)]
    drawn = HALF.draw(whole, 5, 7)
    alone = [HALF.draw(part, 5, 7) for part in parts]
    assert np.array_equal(drawn, np.concatenate(alone))
    turned = Batch(*(torch.cat([getattr(p, n) for p in parts[::-1]]) for n in ("input_ids", "loss_mask")), lengths[::-1])
    assert np.array_equal(HALF.draw(turned, 5, 7), np.concatenate(alone[::-1]))
    ids, mask = parts[0].input_ids.clone(), ~parts[0].loss_mask
    ids[3] += 1
    others = [HALF.draw(parts[0], 6, 7), SampledDepth(0.5, seed=4).draw(parts[0], 5, 7)]
    others += [HALF.draw(replace(parts[0], input_ids=ids), 5, 7), HALF.draw(replace(parts[0], loss_mask=mask), 5, 7)]
    assert not any(np.array_equal(alone[0], other) for other in others)


# --- which rows are computed ---------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=8),
    density=st.sampled_from([0.05, 0.3, 1.0]),
    steps=st.integers(2, 12),
    chunk_rows=st.integers(1, 25),
    seed=st.integers(0, 2**16),
)
def test_a_plan_has_the_drawn_rows_and_fits_its_buffers(lengths, density, steps, chunk_rows, seed):
    batch = batch_of(lengths, density, seed)
    n, end = batch.num_tokens, batch.doc_end.tolist()
    drawn = SampledDepth(0.7, seed).draw(batch, 2, steps)
    wanted = {
        (i, t) for t in range(n) for i in range(min(steps, drawn[t])) if t + 2 + i < end[t] and batch.loss_mask[t + 2 + i]
    }
    depth = {t: max(i for i, s in wanted if s == t) + 1 for t in {t for _, t in wanted}}
    found, chains = set(), []
    for c in plan_chunks(batch, steps, chunk_rows, drawn=drawn):
        mine = c.row_pos[: c.sizes[0]].tolist()
        chains += sorted(mine)
        assert len(mine) <= chunk_rows and len(c.token_id) <= chunk_rows + steps - 1  # what `memory.py` has room for
        assert len(c.teacher_pos) <= len(c.token_id)
        assert c.sizes == tuple(sum(depth[t] > i for t in mine) for i in range(max(depth[t] for t in mine)))
        stacked = [(i, t) for i, rows in enumerate(c.steps) for t in c.row_pos[rows].tolist()]
        assert c.token_id[c.token_row].tolist() == [int(batch.input_ids[t + 1 + i]) for i, t in stacked]
        found |= {stacked[k] for k in c.head_row.tolist()}
    assert chains == sorted(depth) and found == wanted


def test_a_chunk_ends_where_it_has_read_enough():
    """Each document trains its last token alone: the one chain that reaches it reads many tokens that no other reads."""
    batch = Batch(torch.zeros(90, dtype=torch.int64), torch.arange(90) % 9 == 8, (9,) * 10)
    drawn = np.where(np.arange(90) % 9 == 1, 7, 1)  # beside the chain that begins right before that token
    sizes = [c.sizes for c in plan_chunks(batch, 7, 8, drawn=drawn)]
    assert sum(s[0] for s in sizes) == 20 and len(sizes) > 3


# --- exactness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "lk_alpha", "lk_lambda"])
@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("chunk_rows", [6, 4096])
def test_the_engine_equals_the_reference(name, kind, chunk_rows):
    draft, (batch, features, head) = make_draft(**DRAFTS[name]), make_inputs()
    engine = TTTEngine(draft, head, decay(5), kind, chunk_rows=chunk_rows, depth=HALF)
    reference, all_rows = ReferenceEngine(draft, head, decay(5), kind, depth=HALF), engine.rows(batch, features)
    for step in (1, 2):
        ours, theirs = (flat_gradients(draft.trainable()) for _ in range(2))
        for x in (engine, reference):
            x.begin(step)
        rows = engine.step(batch, features, ours)
        assert_same((rows, ours), (reference.step(batch, features, theirs), theirs))
        assert (rows.live.sum(1) <= all_rows.live.sum(1)).all() and rows.live.sum() < all_rows.live.sum()
        assert torch.equal(rows.live[0], all_rows.live[0])  # what the sum is divided by
        for x in ("loss", "acceptance"):
            torch.testing.assert_close(getattr(rows, x)[rows.live], getattr(all_rows, x)[rows.live], rtol=1e-12, atol=0)


def test_what_is_measured_is_never_drawn():
    draft, (batch, features, head) = make_draft(), make_inputs()
    law = ttt_ref_step(draft, batch, features, head, decay(5))[0]
    for kind in (TTTEngine, GraphEngine, ReferenceEngine):
        engine = kind(draft, head, decay(5), depth=HALF)
        engine.begin(1)
        torch.testing.assert_close(engine.rows(batch, features).loss, law.loss, rtol=1e-12, atol=1e-12)


def test_the_expected_gradient_is_that_of_all_rows():
    """Over 400 steps' draws the mean along the full gradient is 1 within four standard errors, which a weight that was
    forgotten misses by far; so is the loss that a run reports."""
    lengths, steps = (40, 31, 22), 5
    draft, (batch, features, head) = make_draft(), make_inputs(lengths)
    batch = replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
    full = flat_gradients(draft.trainable())
    rows = TTTEngine(draft, head, torch.ones(steps, dtype=torch.float64)).step(batch, features, full)
    full = torch.cat([g.flatten() for g in full.values()])
    settings = {"target": {"path": "t"}, "data": {"paths": ["d"]}, "ttt_length": steps, "sampled_depth": 0.5, "seed": 3}
    config = parse_config(settings | {"loss": {"step_decay": 1.0}}, Config)
    law = train_values(rows.sums(), METHOD.step_weights(config.model_copy(update={"sampled_depth": 1.0}), draft.config))
    engine = METHOD.build_step(config, draft, head, torch.device("cpu"))
    along, said = [], []
    for step in range(1, 401):
        grads = flat_gradients(draft.trainable())
        engine.begin(step)
        values = train_values(engine.step(batch, features, grads).sums(), METHOD.step_weights(config, draft.config))
        along.append(float(torch.cat([g.flatten() for g in grads.values()]) @ full / (full @ full)))
        said.append(values["loss"] / law["loss"])
    for found in map(np.array, (along, said)):
        error = found.std() / len(found) ** 0.5
        assert abs(found.mean() - 1) <= 4 * error < 0.1 and found.std() > 0.01


def test_steps_of_which_no_row_was_drawn_have_no_acceptance():
    sums = torch.tensor([[3.0, 1, 0, 1], [2, 1, 0, 1], [1, 1, 0, 1], [4, 2, 0, 1], [4, 2, 0, 1]], dtype=torch.float64)
    config = parse_config({"target": {"path": "t"}, "data": {"paths": ["d"]}, "ttt_length": 4}, Config)
    values = train_values(sums, METHOD.step_weights(config, make_draft().config))
    assert values["tau_sim"] == 1 + 0.5 + 0.25 and [k for k in values if k[0] == "a"] == ["a0", "a1", "a3"]


# --- packs as graphs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shapes(monkeypatch):
    for name, size in {"ROOM": 16, "CHAINS": 8, "STEP_ROWS": 2}.items():
        monkeypatch.setattr(graph, name, size)


@pytest.mark.parametrize("lengths", [(30, 31, 80), (9,) * 20, (3, 40, 2)])
def test_padded_packs_equal_the_reference_and_have_fewer_rows(lengths, small_shapes):
    draft, (batch, features, head) = make_draft(**DRAFTS["norm_output"]), make_inputs(lengths)
    engine = GraphEngine(draft, head, decay(7), depth=SampledDepth(0.6, seed=1))
    reference = ReferenceEngine(draft, head, decay(7), depth=SampledDepth(0.6, seed=1))
    for step in (1, 2, 3):
        ours, theirs = (flat_gradients(draft.trainable()) for _ in range(2))
        for x in (engine, reference):
            x.begin(step)
        law = reference.step(batch, features, theirs), theirs
        assert_same((engine.run_padded(batch, features, ours), ours), law)
    engine.run_padded(batch, features, None)
    shapes = [pack.chunk.sizes for pack in engine.packs.values()]
    assert all(list(s) == sorted(s, reverse=True) for s in shapes)
    assert sum(shapes[-1]) == 7 * shapes[-1][0]  # what is measured
    if len(lengths) == 20:
        assert sum(shapes[0]) < 0.8 * 7 * shapes[0][0]


def test_a_pack_that_drew_more_than_there_is_room_for_takes_the_full_shape(small_shapes, monkeypatch):
    draft, (batch, features, head) = make_draft(), make_inputs((30, 31, 80))
    batch = replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
    engine, n = GraphEngine(draft, head, decay(4), depth=HALF), batch.num_tokens
    monkeypatch.setattr(SampledDepth, "draw", lambda *_: np.full(n, 4))
    grads, law = flat_gradients(draft.trainable()), ttt_ref_step(draft, batch, features, head, HALF.weigh(decay(4)))
    assert_same((engine.run_padded(batch, features, grads), grads), law)
    (pack,) = engine.packs.values()
    assert len(set(pack.chunk.sizes)) == 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(2, 12), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_padding_of_uneven_steps_keeps_every_row_and_adds_none(lengths, steps, seed):
    batch = batch_of(lengths, 0.6, seed)
    n = batch.num_tokens + 7
    drawn = np.pad(SampledDepth(0.7, seed).draw(batch, 1, steps), (0, 7))
    for chunk in plan_chunks(pad_batch(batch, n), steps, 10**6, drawn=drawn):
        real = (*chunk.sizes, *[0] * (steps - len(chunk.sizes)))
        m = max(real[0], len(chunk.token_id) - steps) + 1
        sizes = (m, *(min(m, size + 1) for size in real[1:]))
        wide = pad_chunk(chunk, n, sizes)
        assert wide.sizes == sizes and len(wide.row_pos) == len(wide.head_row) == sum(sizes)
        for i, rows in enumerate(chunk.steps):
            mine = wide.row_pos[wide.steps[i]]
            assert torch.equal(mine[: chunk.sizes[i]], chunk.row_pos[rows]) and (mine[chunk.sizes[i] :] == -1).all()
        read = wide.head_step < steps
        assert torch.equal(wide.head_out[read], chunk.head_out)
        assert torch.equal(wide.row_pos[wide.head_row[read]], chunk.row_pos[chunk.head_row])
        assert (wide.row_pos[wide.head_row[~read]] == -1).all()
        padding = wide.row_pos < 0
        assert not torch.isin(wide.token_row[padding], wide.token_row[~padding]).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_graphs_and_the_plain_engine_draw_the_same():
    draft = make_draft(hidden_size=64, target_hidden_size=64, head_dim=16, vocab_size=151, draft_vocab_size=80)
    draft.to("cuda", torch.float32)
    for p in draft.parameters():
        p.data = p.data * (0.3 if p.ndim > 1 else 1.0)
    batch, features, head = make_inputs((700, 900, 300), dtype=torch.float32, vocab=151, width=64)
    features, head = Features(features.g.cuda(), features.f.cuda()), type(head)(head.weight.cuda())
    engine = GraphEngine(draft, head, decay(7).float().cuda(), depth=HALF)
    flat, plain = flat_gradients(draft.trainable()), flat_gradients(draft.trainable())
    for step in (1, 2, 3, 4):
        engine.begin(step)
        rows = engine.run_padded(batch, features, flat)
        law = super(GraphEngine, engine)._run(batch, features, plain)
        assert torch.equal(rows.live, law.live)
        torch.testing.assert_close(rows.loss, law.loss, rtol=1e-4, atol=1e-4)
    (pack,) = engine.packs.values()
    assert pack.replay.graph is not None and sum(pack.chunk.sizes) < 0.5 * 7 * pack.chunk.sizes[0]
    for name, g in plain.items():
        assert float((flat[name] - g).abs().max()) <= 1e-4 * float(g.abs().max()), name


# --- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampled_depth": 0.05}, "sampled_depth: Input should be greater than or equal to 0.1"),
        ({"sampled_depth": 1.5}, "sampled_depth: Input should be less than or equal to 1"),
        ({"sampled_depth": 0.8, "ttt_length": 1}, "ttt_length 1 has none; take it out, or raise ttt_length"),
    ],
)
def test_settings_that_draw_nothing_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        parse_config({"target": {"path": "t"}, "data": {"paths": ["d"]}} | changes, Config)
