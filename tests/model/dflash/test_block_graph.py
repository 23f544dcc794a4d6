"""Packs and chunks padded to a graph's shape: the reference's rows and gradients for each method of blocks, whatever ran in
the same place before; on a GPU the graphs themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_drafts import Small, dflash_shape, reference_step, small_dflash, small_dflash2, small_dspark
from torch import nn

from bench.block_work import block_engine
from fastdraft.batch import Batch, Features, Rows
from fastdraft.config import OptimConfig
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash import graph_engine, memory
from fastdraft.model.dflash.blocks import draw_anchors, pad_blocks, plan_blocks
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.graph_engine import GraphBlockEngine
from fastdraft.model.dflash.loss import BlockLoss, StepLoss
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dspark.loss import DSparkLoss
from fastdraft.optim import FlatAdamW

SLIDING = dict(num_hidden_layers=2, layer_types=("sliding_attention", "full_attention"), sliding_window=6)
LENGTHS = ((19, 1, 2, 7, 23), (40, 9), (5, 6, 30), (19, 1, 2, 7, 23))


@dataclass(frozen=True)
class Kind:
    """A method, a shape and a loss; drafts of all packs have the same weights."""

    make: Callable[..., Small]  # of lengths, dtype and seed
    loss: StepLoss

    def engine(self, case: Small, chunk_blocks: int, made: type = GraphBlockEngine) -> BlockEngine:
        draw = lambda batch, number: draw_anchors(batch, 12, 3, number)  # noqa: E731
        return block_engine(case.draft, case.head, self.loss, draw, chunk_blocks, made)


KINDS = {
    "ce": Kind(small_dflash, BlockLoss("ce", 3.0)),
    "dpace": Kind(partial(small_dflash, **SLIDING), BlockLoss("dpace", dpace_alpha=0.4)),
    "kl, shifted": Kind(partial(small_dflash, labels="shifted", num_hidden_layers=1), BlockLoss("kl", 3.0)),
    "dspark": Kind(small_dspark, DSparkLoss(3.0)),
    "dflash2": Kind(small_dflash2, SelectorLoss("ce", 3.0)),
    "dflash2, dpace": Kind(small_dflash2, SelectorLoss("dpace", 3.0, 0.4)),
}


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(memory, "room_for", lambda tokens: -(-tokens // 16) * 16)
    monkeypatch.setattr(graph_engine, "TEACHER", 4)


def packs_of(kind: Kind, dtype=torch.float64, lengths=LENGTHS) -> list[Small]:
    """Packs of unlike sizes that share the first one's draft and head."""
    cases = [kind.make(x, dtype, seed) for seed, x in enumerate(lengths)]
    for case in cases[1:]:
        case.draft, case.head = cases[0].draft, cases[0].head
    return cases


def assert_same(rows: Rows, law: Rows, tolerance: float = 1e-11) -> None:
    assert torch.equal(rows.live, law.live) and torch.equal(rows.hit, law.hit) and bool(law.live.any())
    torch.testing.assert_close(rows.loss, law.loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(rows.acceptance, law.acceptance, rtol=tolerance, atol=tolerance)


def furthest(found: dict, law: dict) -> float:
    assert found.keys() == law.keys()
    return max(float((found[k] - law[k]).abs().max() / law[k].abs().max().clamp_min(1e-30)) for k in law)


@pytest.mark.parametrize(("chunk_blocks", "room"), [(2, 256), (5, 7), (34, 256), (100, 7)])
@pytest.mark.parametrize("name", KINDS)
def test_padded_packs_are_the_reference(name, chunk_blocks, room, monkeypatch):
    """The head takes all live rows of a chunk at once, or seven at a time, whose last part may be padding alone."""
    monkeypatch.setattr(memory, "head_room", lambda *_: room)
    kind = KINDS[name]
    cases = packs_of(kind)
    engine, grads, law = kind.engine(cases[0], chunk_blocks), flat_gradients(cases[0].draft.trainable()), {}
    for case in cases:
        anchors = engine.draw(case.batch, 1)
        rows, found = reference_step(case, anchors, kind.loss)
        law = {k: law.get(k, 0) + g for k, g in found.items()}
        assert_same(engine.run_padded(case.batch, case.features, anchors, grads), rows)
        measured = engine.run_padded(case.batch, case.features, anchors, None)
        torch.testing.assert_close(measured.loss, rows.loss, rtol=1e-11, atol=1e-11)
    assert furthest(grads, law) < 1e-10
    assert len(engine.packs) == 4  # of 64 and 48 tokens, with gradients and without


@pytest.mark.parametrize("name", KINDS)
def test_what_ran_in_the_same_place_does_not_matter(name):
    kind = KINDS[name]
    case, other = packs_of(kind, lengths=((30, 9), (25, 20)))
    alone, after = (kind.engine(case, 100) for _ in range(2))
    anchors, grads = alone.draw(case.batch, 1), [flat_gradients(case.draft.trainable()) for _ in range(2)]
    after.run_padded(other.batch, other.features, after.draw(other.batch, 1), grads[1])
    for x in after.places.values():
        x.g.fill_(7.0)
        if x.f is not None:
            x.f.fill_(-7.0)
    for pack in after.packs.values():
        for chunk in pack.chunks.values():
            chunk.indices.zero_()
    for g in grads[1].values():
        g.zero_()
    rows = [e.run_padded(case.batch, case.features, anchors, g) for e, g in zip((alone, after), grads, strict=True)]
    assert len(after.packs) == 1  # both packs ran in one place
    assert torch.equal(rows[0].loss, rows[1].loss) and torch.equal(rows[0].live, rows[1].live)
    assert all(torch.equal(grads[0][k], grads[1][k]) for k in grads[0])


def test_rows_stay_when_the_next_pack_runs():
    kind = KINDS["kl, shifted"]
    (case,) = packs_of(kind, lengths=((30, 9),))
    engine = kind.engine(case, 100)
    anchors = engine.draw(case.batch, 1)
    rows = engine.run_padded(case.batch, case.features, anchors, None)
    kept = {name: x.clone() for name, x in vars(rows).items()}
    engine.run_padded(case.batch, Features(2 * case.features.g, -case.features.f), anchors[:2], None)
    assert all(torch.equal(getattr(rows, name), x) for name, x in kept.items()) and kept["loss"].any()


def test_buffers_that_moved_are_found():
    """A longer pack takes new buffers: what was recorded for the old ones must go."""
    kind = KINDS["ce"]
    case, longer = packs_of(kind, lengths=((12,), (50,)))
    engine = kind.engine(case, 100)
    anchors = engine.draw(case.batch, 1)
    law = reference_step(case, anchors, kind.loss)[0]
    for _ in range(2):
        rows = engine.run_padded(case.batch, case.features, anchors, None)
        torch.testing.assert_close(rows.loss, law.loss, rtol=1e-11, atol=1e-11)
        engine.run_padded(longer.batch, longer.features, engine.draw(longer.batch, 1), None)
        engine.take.resize({name: (rows + 1, *rest) for name, (rows, *rest) in engine.take.table.items()})


def test_which_chunks_run_as_graphs(monkeypatch):
    kind = KINDS["ce"]
    (case,) = packs_of(kind, lengths=((30, 9),))
    loose = kind.engine(case, 100)
    FlatAdamW(case.draft.trainable(), OptimConfig(optimizer="adamw"), 1, torch.float64)  # lays the weights end to end
    engine = kind.engine(case, 100)
    assert not engine.covers()  # there are no graphs on a CPU
    for each in (loose, engine):
        each.take.device = torch.device("cuda")  # asked for its name alone
    assert engine.covers() and not kind.engine(case, 1).covers()
    with monkeypatch.context() as two:
        two.setattr(engine.sequence, "size", 2)
        assert not engine.covers()
    monkeypatch.setattr(graph_engine, "GRAPH_FLOPS", engine.work - 1)
    assert not engine.covers()
    monkeypatch.undo()
    case.draft.layers[0].mlp.up_proj.weight = nn.Parameter(case.draft.layers[0].mlp.up_proj.weight.detach().clone())
    assert not engine.covers()  # gate and up are copied together for every step


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(2, 60),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_padding_keeps_every_row_and_adds_none(lengths, chunk_blocks, shifted, with_teacher, seed):
    config, room = dflash_shape(labels="shifted" if shifted else "fill_in"), 6
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    mask = torch.rand(n, generator=generator) < 0.7
    ids = torch.randint(39, (n,), generator=generator)
    batch = graph_engine._with_padding(Batch(ids, mask, tuple(lengths)), n + 7)
    anchors = draw_anchors(batch, 12, 0, 1)
    b, t, n = config.block_size, config.num_drafted, batch.num_tokens
    for chunk in plan_blocks(batch, anchors, config, chunk_blocks, room):
        live, real = len(chunk.head_row) + 5, slice(0, len(chunk.head_row))
        blocks, here = len(chunk.anchor) + 3, len(chunk.anchor)
        wide = pad_blocks(chunk, config, n, blocks, live, 9 if with_teacher else 0, room)
        assert len(wide.anchor) == blocks and len(wide.head_row) == live and len(wide.row_id) == blocks * b
        assert torch.equal(wide.read_id[wide.row_read], wide.row_id)
        assert torch.equal(wide.row_id[: here * b], chunk.row_id) and (wide.row_id[here * b :] == 39).all()
        names = ("head_row", "head_position", "head_step", "head_block", "head_out", "label", "previous", "teacher_row")
        for name in names:
            assert torch.equal(getattr(wide, name)[real], getattr(chunk, name)), name
        # Padding stands at the last token, sees nothing, weighs nothing, and asks for rows of its own, each once.
        assert (wide.anchor[here:] == n - 1).all() and torch.equal(wide.anchor[here:], wide.start[here:])
        assert (wide.head_step[len(chunk.head_row) :] == t).all() and not batch.loss_mask[-7:].any()
        assert (wide.head_out[len(chunk.head_row) :] == n - 1).all() and (chunk.head_out % n < n - 7).all()
        assert (wide.head_row.diff() > 0).all() and (wide.head_row[len(chunk.head_row) :] >= here * b).all()
        assert torch.equal(wide.row_position[wide.head_row], wide.head_position)
        assert torch.equal(wide.head_row // b, wide.head_block)
        assert [p.rows.start for p in wide.parts] == list(range(0, live, room)) and wide.parts[-1].rows.stop == live
        if with_teacher:
            for mine, theirs in zip(wide.parts, chunk.parts, strict=False):
                index = chunk.teacher_row[theirs.rows]
                at = wide.teacher_pos[mine.teacher][wide.teacher_row[mine.rows][: len(index)]]
                assert torch.equal(at, chunk.teacher_pos[theirs.teacher][index])
        else:
            assert not len(wide.teacher_pos)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_graphs_are_what_they_recorded(name, dtype):
    """First without graphs, then recorded, then replayed: the same bits; and the plain engine's numbers up to rounding."""
    kind = KINDS[name]
    cases = packs_of(replace(kind, make=lambda *args: on_gpu(kind.make(*args))), dtype, LENGTHS[:3])
    engine, found = kind.engine(cases[0], 34), []
    flat = flat_gradients(cases[0].draft.trainable())
    packs = [(case.batch, case.features, engine.draw(case.batch, 1)) for case in cases]
    for _ in range(4):
        for g in flat.values():
            g.zero_()
        rows = [engine.run_padded(*pack, flat) for pack in packs]
        found.append([r.loss for r in rows] + [g.clone() for g in flat.values()])
    replays = [r for p in engine.packs.values() for r in (p.begin, p.finish, *(c.replay for c in p.chunks.values()))]
    assert all(replay.graph is not None for replay in replays)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
    by_itself = flat_gradients(cases[0].draft.trainable())
    for pack in packs:
        BlockEngine.run(engine, *pack, by_itself)
    assert furthest(flat, by_itself) <= (1e-4 if dtype == torch.float32 else 5e-2)


def on_gpu(case: Small) -> Small:
    case.draft.cuda().take_from_target(case.draft.embedding.cuda())
    case.features = Features(case.features.g.cuda(), case.features.f.cuda())
    case.head = replace(case.head, weight=case.head.weight.cuda())
    return case
