"""CUDA graphs: work that a host would launch piece by piece, recorded once and replayed in one launch."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

SCARCE = 0.25  # of a GPU's memory: where less is free, what PyTorch keeps for later is given back before a recording


class GraphPool:
    """Memory that the CUDA graphs of one owner share: it copies a replay's results before it replays another of them.

    PyTorch frees a pool together with the last graph that was recorded in it, and recording into a freed pool fails inside
    PyTorch's allocator. The pool therefore begins with a graph of nothing, which lives as long as the pool does.
    """

    stream: torch.cuda.Stream | None = None  # of all recordings of the process: cuBLAS keeps memory for each stream

    def __init__(self) -> None:
        self._keeper: torch.cuda.CUDAGraph | None = None

    def record(self, launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """The graph of all that `launch` enqueues on the current GPU. RuntimeError when it does what no graph can hold."""
        if self._keeper is None:
            self._handle = torch.cuda.graph_pool_handle()
            keeper = torch.cuda.CUDAGraph()
            self._record(keeper, lambda: None)
            self._keeper = keeper
        graph = torch.cuda.CUDAGraph()
        self._record(graph, launch)
        return graph

    def _record(self, graph: torch.cuda.CUDAGraph, launch: Callable[[], object]) -> None:
        """What `torch.cuda.graph` does, but for giving back all memory that PyTorch keeps, pinned memory too: whoever comes
        next would wait for it again, at every recording. A recording cannot give memory back itself, so it is done where
        memory is scarce. Python's collector of cycles waits until the end: it may find the graphs of an earlier run, and
        CUDA breaks off a recording in whose thread a graph is freed."""
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        if free < SCARCE * total:
            torch.cuda.empty_cache()
        if GraphPool.stream is None:
            GraphPool.stream = torch.cuda.Stream()
        with torch.cuda.stream(GraphPool.stream), _no_cycles_collected():
            # Other threads pin memory and copy meanwhile (the loader, a store's reader), which recording must not forbid.
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                with warnings.catch_warnings():  # of a launch that enqueues nothing: the end of a pack without gradients
                    warnings.filterwarnings("ignore", "The CUDA Graph is empty")
                    graph.capture_end()


class Replay:
    """Work on buffers that stay where they are: its first run is as it is, the second is recorded, later ones replay that.
    On a CPU every run is as it is."""

    def __init__(self, pool: GraphPool, device: torch.device):
        self.pool, self.on_gpu, self.runs = pool, device.type == "cuda", 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, launch: Callable[[], object]) -> None:  # the same work each time; not kept, so its owner can be freed
        if self.on_gpu and self.runs == 1:
            self.graph = self.pool.record(launch)
        self.runs += 1
        if self.graph is None:
            launch()
        else:
            self.graph.replay()


@contextmanager
def _no_cycles_collected() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
