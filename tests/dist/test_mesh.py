"""The grid of processes: who is whose neighbour, and what neighbours do together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from small_runs import by_ranks

from fastdraft.dist import mesh


def test_eight_processes_in_a_grid():
    assert by_ranks(8, _grid) == [0] * 8


def _grid() -> None:
    mesh.start_process("cpu")
    mesh.lay_out(sequence=2, tensor=2)
    me = mesh.rank()
    mine = torch.full((2,), float(me))
    neighbours = {
        "tensor": [me - me % 2, me - me % 2 + 1],
        "sequence": [me & ~2, me | 2],
        "data": [me & ~4, me | 4],
        "replicas": [me % 2, me % 2 + 2, me % 2 + 4, me % 2 + 6],
    }
    for name, ranks in neighbours.items():
        axis = mesh.axis(name)
        assert axis.size == len(ranks) and ranks[axis.rank] == me, (name, me)
        assert axis.sum_(mine.clone()).tolist() == [sum(ranks)] * 2
        assert axis.gather(mine).tolist() == [float(r) for r in ranks for _ in range(2)]
        assert axis.sum_scatter(torch.arange(axis.size * 3.0)).tolist() == [
            axis.size * x for x in range(3 * axis.rank, 3 * axis.rank + 3)
        ]


def test_alone_nothing_is_done():
    mesh.lay_out()
    x = torch.ones(3)
    for name in ("data", "sequence", "tensor", "replicas"):
        axis = mesh.axis(name)
        assert (axis.rank, axis.size) == (0, 1)
        assert axis.sum_(x) is axis.gather(x) is axis.sum_scatter(x) is x


def test_a_grid_that_the_processes_do_not_fill_is_refused():
    with pytest.raises(
        ValueError, match=r"dist\.sequence=2 and dist\.tensor=3 need a multiple of 6 processes, this run has 1"
    ):
        mesh.lay_out(sequence=2, tensor=3)


def test_each_start_of_the_processes_has_a_name_of_its_own():
    """torchrun keeps its store when it starts processes again: words of the dead are in it, and nobody answers to them."""
    store, names = dist.HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = [pool.submit(mesh._name_of_start, store, rank, 3) for rank in (2, 1, 0)]
            (name,) = {future.result(60) for future in found}
        names.append(name)
        store.set("hello/1", "a word of one who died")
    assert len(set(names)) == 3


def test_a_process_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(mesh, "_timeout", timedelta(seconds=0.2))
    with pytest.raises(ValueError, match=r"rank 1 did not come within dist.timeout_s=0.2 s of the start"):
        mesh._name_of_start(dist.HashStore(), 0, 2)
