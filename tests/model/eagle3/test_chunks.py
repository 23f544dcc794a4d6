"""The plan of a batch's chunks against a naive loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import decay, make_draft, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from fastdraft.batch import Batch
from fastdraft.features.store import document_keys, needed
from fastdraft.model.eagle3.chunks import pad_batch, pad_chunk, plan_chunks
from fastdraft.model.eagle3.engine import TTTEngine, pack_index


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=6),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    steps=st.integers(1, 12),
    chunk_rows=st.integers(1, 25),
    seed=st.integers(0, 2**16),
)
def test_plan_equals_a_naive_loop(lengths, density, steps, chunk_rows, seed):
    n, generator = sum(lengths), torch.Generator().manual_seed(seed)
    mask, ids = torch.rand(n, generator=generator) < density, torch.randint(0, 99, (n,), generator=generator)
    wanted, depth, start, first = set(), {}, {}, 0
    for length in lengths:
        for t in range(length):
            start[first + t] = first
            for i in range(steps):
                if t + 2 + i < length and mask[first + t + 2 + i]:
                    wanted.add((i, first + t))
                    depth[first + t] = i + 1
        first += length
    chunks = list(plan_chunks(Batch(ids, mask, tuple(lengths)), steps, chunk_rows))
    chains = sorted(depth)
    runs = [chains[k : k + chunk_rows] for k in range(0, len(chains), chunk_rows)]
    assert [sorted(c.row_pos[: c.sizes[0]].tolist()) for c in chunks] == runs
    found = set()
    for c in chunks:
        rows = sorted(c.row_pos[: c.sizes[0]].tolist())
        seen_by_all = set.intersection(*({(start[t], k) for k in range(start[t], rows[0])} for t in rows))
        assert seen_by_all == {(c.context[0], k) for k in range(*c.context)} if c.context else not seen_by_all
        depths = [depth[t] for t in c.row_pos[: c.sizes[0]].tolist()]
        assert depths == sorted(depths, reverse=True)
        assert c.sizes == tuple(sum(d > i for d in depths) for i in range(depths[0]))
        stacked = [(i, t) for i, rows in enumerate(c.steps) for t in c.row_pos[rows].tolist()]
        assert [t for _, t in stacked] == [t for size in c.sizes for t in c.row_pos[:size].tolist()]
        assert c.row_start.tolist() == [start[t] for _, t in stacked]
        assert c.row_position.tolist() == [t - start[t] + i for i, t in stacked]
        assert c.token_id[c.token_row].tolist() == [int(ids[t + 1 + i]) for i, t in stacked]
        tokens = sorted({t + 1 + i for i, t in stacked})
        assert len(c.token_id) == len(tokens) <= c.sizes[0] + steps - 1
        assert [tokens[k] for k in c.token_row.tolist()] == [t + 1 + i for i, t in stacked]
        heads = [stacked[k] for k in c.head_row.tolist()]
        assert list(zip(c.head_step.tolist(), c.head_out.tolist(), strict=True)) == [(i, i * n + t) for i, t in heads]
        assert c.teacher_pos[c.teacher_row].tolist() == [t + 1 + i for i, t in heads]
        assert c.teacher_pos.tolist() == sorted({t + 1 + i for i, t in heads})  # no row of the teacher is idle
        assert found.isdisjoint(heads)
        found |= set(heads)
    assert found == wanted


def test_a_chunk_moves_whole():
    batch = Batch(torch.arange(20), torch.arange(20) % 3 > 0, (12, 8))
    (chunk,) = plan_chunks(batch, 4, 100)
    assert chunk.to(torch.device("cpu")) is chunk


class Operators(TorchDispatchMode):
    """Lists what PyTorch is asked to compute."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_the_host_plans_without_pytorchs_threads():
    """What is done on the host for every pack is NumPy's, which has one thread; PyTorch's wait for each other (LOG.md)."""
    engine = TTTEngine(make_draft(), make_inputs()[2], decay(3))
    ids, mask = torch.zeros(40_000, dtype=torch.int64), torch.ones(40_000, dtype=torch.bool)
    batch = Batch(ids, mask, (25_000, 15_000))
    with Operators() as asked:
        torch.zeros(1) + 1  # the list works
    assert len(asked.names) == 2
    with Operators() as asked:
        engine.check_ids(batch)
        pack_index(batch)
        padded = pad_batch(batch, 40_960)
        for chunk in plan_chunks(padded, 3, 40_000):
            pad_chunk(chunk, 40_960, (40_448,) * 3)
        needed(batch)
        document_keys(batch)
    views = {"aten.detach.default", "aten.lift_fresh.default"}  # of `numpy` and `from_numpy`: nothing is computed
    assert set(asked.names) <= views
