"""CUDA graphs: work that a host would launch piece by piece, recorded once and replayed in one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


class GraphPool:
    """Memory that the CUDA graphs of one owner share: it copies a replay's results before it replays another of them.

    PyTorch frees a pool together with the last graph that was recorded in it, and recording into a freed pool fails inside
    PyTorch's allocator. The pool therefore begins with a graph of nothing, which lives as long as the pool does.
    """

    def __init__(self) -> None:
        self._keeper: torch.cuda.CUDAGraph | None = None

    def record(self, launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """The graph of all that `launch` enqueues on the current GPU. RuntimeError when it does what no graph can hold."""
        if self._keeper is None:
            self._handle = torch.cuda.graph_pool_handle()
            keeper = torch.cuda.CUDAGraph()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")
                self._record(keeper, lambda: None)
            self._keeper = keeper
        graph = torch.cuda.CUDAGraph()
        self._record(graph, launch)
        return graph

    def _record(self, graph: torch.cuda.CUDAGraph, launch: Callable[[], object]) -> None:
        # Other threads pin memory and copy meanwhile (the loader, a store's reader), which recording must not forbid them.
        with torch.cuda.graph(graph, pool=self._handle, capture_error_mode="thread_local"):
            launch()
