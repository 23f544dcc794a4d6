"""Recording a CUDA graph, on a GPU and with a stand-in for one."""

from __future__ import annotations

import gc
import warnings
from contextlib import nullcontext

import pytest
import torch

from fastdraft.model.graph import GraphPool

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Cycle:
    """Garbage that only the collector of cycles finds."""

    def __init__(self, ends: list[str], graph: object = None):
        self.me, self.ends, self.graph = self, ends, graph

    def __del__(self) -> None:
        self.ends.append("found")


def rouse_the_collector() -> None:
    """Allocates what makes Python look through the oldest objects, too."""
    kept = []
    for _ in range(200):
        kept.append([[] for _ in range(1000)])


class Graph:
    """A stand-in that warns as PyTorch does of a graph of nothing."""

    def capture_begin(self, **_: object) -> None: ...

    def capture_end(self) -> None:
        warnings.warn("The CUDA Graph is empty. This usually means ...", stacklevel=1)


@pytest.fixture
def stand_in(monkeypatch):
    none = {"synchronize": lambda: None, "mem_get_info": lambda: (1, 1), "graph_pool_handle": lambda: None}
    for name, value in (none | {"Stream": object, "stream": lambda _: nullcontext(), "CUDAGraph": Graph}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(GraphPool, "stream", None)


def test_nothing_is_collected_while_a_graph_is_recorded(stand_in):
    ends: list[str] = []
    Cycle(ends)
    during = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GraphPool().record(lambda: (rouse_the_collector(), during.append(len(ends))))
    assert during == [0] and gc.isenabled()
    gc.collect()
    assert ends == ["found"]


def test_the_collector_is_on_again_after_a_recording_that_fails(stand_in):
    with pytest.raises(ZeroDivisionError):
        GraphPool().record(lambda: 1 // 0)
    assert gc.isenabled()


@gpu
@pytest.mark.gpu
def test_the_graphs_of_an_earlier_run_may_be_garbage_while_a_graph_is_recorded():
    """Freed within a recording, they would break it off."""
    x, ends = torch.zeros(8, device="cuda"), []
    Cycle(ends, GraphPool().record(lambda: x.add_(1)))

    def launch() -> None:
        x.add_(1)
        rouse_the_collector()
        x.add_(1)

    graph = GraphPool().record(launch)
    graph.replay()
    gc.collect()
    assert x.tolist() == [2.0] * 8 and ends == ["found"]
