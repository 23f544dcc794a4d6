"""AdamW divided among the processes that sum their gradients: each keeps 1/n of the masters and moments.

With n replicas, P trainable weights, and G the fp32 gradient sum of each process, one step is

    start:   reduce-scatter of G, so that each process has its slice of the sum over all; nothing waits for it
    finish:  |g| from all slices;  AdamW on the own slice (`optim.py`);  all-gather of the weights in the compute dtype

What lies between the two, such as the target's forward over the next pack, reads no weight of the draft and hides the
communication. On a GPU `finish` runs on a stream of its own, so that this also holds for what it launches.

Slices have ceil(P / n) elements, as `torch.chunk` and DTensor cut; the last is filled up with zeros, which stay zeros. Each
lies in buffers of its own, so that it is aligned wherever it is cut. Clipping is exact over all slices and needs no pass of
its own: to scale the gradient by c is to divide it by N / c rows instead of N.
Where processes share the draft's weights, all of this is done by the replicas of each part. Only the norm is that of all
parts, in which a weight that every process has whole counts once; a checkpoint holds whole weights, which rank 0 writes.
Bytes on the wire, a process: 4 P (n - 1) / n out, and b P (n - 1) / n back for weights of b bytes.
Muon (`optim.py`) orthogonalises whole matrices, of which a slice may have a part: the directions are gathered, which is
b P (n - 1) / n more, and each process orthogonalises the matrices that its slice is of. Where processes share the draft's
weights, slices with the same place in their parts are of the same matrices: those who have them join them and share that
work (`dist/tensor.py`).
Source: ZeRO (arXiv 1910.02054), stage 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fastdraft.config import OptimConfig
from fastdraft.dist.mesh import Axis
from fastdraft.dist.tensor import Parts, orthogonalized_together
from fastdraft.optim import FlatAdamW, Muon, matrices, one_by_one

FLAT = ("master", "m", "v")  # of the optimizer's state: a number of each weight


class SharedAdamW:
    """Owns the flat buffers of `parameters`, which become views into them. Alone it is `FlatAdamW` and nothing more."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        config: OptimConfig,
        total_steps: int,
        dtype: torch.dtype,
        replicas: Axis,
        parts: Parts | None = None,  # of the draft's weights, where processes share them
        rows_of: Callable[[Tensor], Tensor] = lambda live: live[0],  # N of the live rows [T] of all processes
    ):
        self.config, self.replicas, self.parts = config, replicas, parts
        self.rows_of = rows_of
        self.waited = 0.0  # seconds for which the reduction kept its caller; the caller sets it back
        self._sums: Tensor | None = None  # of the step that is under way
        # `_update` clips, by the norm over all slices and parts; a slice's own must not.
        unclipped = config.model_copy(update={"clip": math.inf})
        self.uncut = [] if parts is None else parts.uncut  # elements of the own slice that other parts have, too
        self.count = sum(p.numel() for p in parameters.values())
        size = -(-self.count // replicas.size)  # elements of a slice
        mine = (replicas.rank * size, (replicas.rank + 1) * size)
        muon = self._muon(parameters, mine, dtype)
        if replicas.size == 1:
            self.own = FlatAdamW(parameters, config if parts is None else unclipped, total_steps, dtype, muon=muon)
            self.grad, self.grads = self.own.grad, self.own.grads
            return
        first = next(iter(parameters.values()))

        # The masters are cut from the parameters as they are: the weights may be rounded.
        master = torch.zeros(size, dtype=torch.promote_types(dtype, torch.float32), device=first.device)
        self.weights = torch.zeros(replicas.size * size, dtype=dtype, device=first.device)
        self.grad = torch.zeros(replicas.size * size, dtype=master.dtype, device=first.device)
        self.grads: dict[str, Tensor] = {}  # views of the gradient sum, by parameter name
        norms, start = [], 0
        for name, p in parameters.items():
            end = start + p.numel()
            lo, hi = max(start, mine[0]), min(end, mine[1])
            if lo < hi:
                master[lo - mine[0] : hi - mine[0]] = p.detach().reshape(-1)[lo - start : hi - start]
                if p.ndim == 1:
                    norms.append((lo - mine[0], hi - mine[0]))
            p.data = self.weights[start:end].view(p.shape)
            self.grads[name] = self.grad[start:end].view(p.shape)
            start = end
        inside = ((max(lo, mine[0]) - mine[0], min(hi, mine[1]) - mine[0]) for lo, hi in self.uncut)
        self.uncut = [(lo, hi) for lo, hi in inside if lo < hi]
        self.own = FlatAdamW({"slice": nn.Parameter(master)}, unclipped, total_steps, dtype, norms, muon)
        self.stream = torch.cuda.Stream(first.device) if first.is_cuda else None
        self._clocks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._share_weights()

    def _muon(self, parameters: dict[str, nn.Parameter], mine: tuple[int, int], dtype: torch.dtype) -> Muon | None:
        """None where the config has AdamW alone."""
        if self.config.optimizer != "muon":
            return None
        shapes = {name: p.shape for name, p in parameters.items()}
        weights = matrices(shapes, self.config, None if self.parts is None else self.parts.shapes)
        gather, together = None, one_by_one
        if self.replicas.size > 1:
            device = next(iter(parameters.values())).device
            self.directions = torch.empty(self.replicas.size * (mine[1] - mine[0]), dtype=dtype, device=device)
            gather = self._gather_directions
        if self.parts is not None:
            together = partial(orthogonalized_together, self.parts)
        return Muon(weights, mine, self.config, dtype, gather, together)

    def lr(self, step: int) -> float:
        return self.own.lr(step)

    @property
    def under_way(self) -> bool:
        """Whether a step was begun and not finished."""
        return self._sums is not None

    def start(self, sums: Tensor) -> Tensor:  # scalar: norm of G / N before clipping, once `finish` was called
        """Begins a step: `sums` [5, T] of this process's rows (`Rows.sums`) and the gradients are added up over all
        processes, `sums` in place. Until `finish` neither they nor the weights and gradients may be touched."""
        self._sums = sums
        if self.replicas.size == 1 and self.parts is None:
            return self.own.step(self.rows_of(sums[3]))
        self._norm = torch.empty((), dtype=self.grad.dtype, device=self.grad.device)
        if self.replicas.size == 1:
            self._update(self.rows_of(sums[3]))
            return self._norm
        self._under_way = [self.replicas.start_sum(sums), self.replicas.start_sum_scatter(self.grad, self.own.grad)]
        return self._norm

    def finish(self) -> Tensor | None:  # [5, T] the sums of all processes, of the step that was under way, if one was
        sums, self._sums = self._sums, None
        if sums is None or self.replicas.size == 1:
            return sums
        began = time.perf_counter()
        main = torch.cuda.current_stream() if self.stream else None
        if main is not None:
            before = main.record_event(torch.cuda.Event(enable_timing=True))
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for work in self._under_way:
                work.wait()
            self.grad.zero_()
            self._update(self.rows_of(sums[3]))
        if main is None:
            self.waited += time.perf_counter() - began
        else:
            main.wait_stream(self.stream)
            self._clocks.append((before, main.record_event(torch.cuda.Event(enable_timing=True))))
        return sums

    def _update(self, num_live: Tensor) -> None:
        """AdamW on the own slice of the summed gradient, then everyone's weights."""
        rows = num_live.clamp_min(1)
        total = torch.linalg.vector_norm(self.own.grad, dtype=torch.float64).square()
        for lo, hi in self.uncut:
            everywhere = torch.linalg.vector_norm(self.own.grad[lo:hi], dtype=torch.float64).square()
            total -= everywhere * (1 - 1 / self.parts.axis.size)
        total = self.replicas.sum_(total)
        if self.parts is not None:
            total = self.parts.axis.sum_(total)
        norm = total.sqrt() / rows
        self._norm.copy_(norm)
        scale = (self.config.clip / norm.clamp_min(1e-30)).clamp_max(1.0)
        self.own.step(num_live / scale)
        self._share_weights()

    def _gather_directions(self, own: Tensor) -> Tensor:  # [n * size]
        self.replicas.gather_into(self.directions, own)
        return self.directions

    def _share_weights(self) -> None:
        if self.replicas.size > 1:
            self.replicas.gather_into(self.weights, self.own.weights)

    def clock(self) -> float:
        """Seconds since the last call for which the reduction kept this process from its work. The device's are read here,
        which must have come to the last step's end."""
        for before, after in self._clocks if self.replicas.size > 1 else ():
            self.waited += before.elapsed_time(after) / 1000
        waited, self.waited, self._clocks = self.waited, 0.0, []
        return waited

    def state_dict(self) -> dict[str, Tensor]:
        """The live buffers, and the step count in a tensor of its own. Masters and moments are [P], of which this process
        holds its slice (DTensor); with `parts` they are those of the whole draft, joined on the host."""
        state = self.own.state_dict()
        if self.parts is not None:
            return state | {name: self._joined(state[name]) for name in FLAT}
        if self.replicas.size == 1:
            return state
        whole = {name: self.replicas.slice_of(state[name], self.count) for name in FLAT}
        return state | whole

    def _joined(
        self,
        own: Tensor,  # this process's slice of its part
    ) -> Tensor:  # [the whole draft's weights] on the host
        if self.replicas.size > 1:
            own = self.replicas.gather(own)[: self.count]
        return self.parts.whole(own)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.parts is not None:
            state = state | {name: self.parts.own(state[name]) for name in FLAT}
        if self.replicas.size == 1:
            self.own.load_state_dict(state)
            return
        size = self.own.master.numel()
        first = self.replicas.rank * size
        own = {name: x[first : first + size] if self.parts else x.to_local() for name, x in state.items() if name in FLAT}
        padded = {name: torch.nn.functional.pad(x, (0, size - x.numel())) for name, x in own.items()}
        self.own.load_state_dict(state | padded)
        self._share_weights()
