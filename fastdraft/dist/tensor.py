"""The optimizer of a draft whose weights several processes share, and what it is as a whole: for clipping and checkpoints.

Each process of the tensor axis updates its own part. Two things concern all parts: the gradient's norm, in which a weight
that every process has whole counts once, and a checkpoint, which holds whole weights and so goes on in any layout. Masters
and moments are joined on the host, parameter by parameter, and every process of the axis has them there for as long as the
checkpoint is written: 12 bytes a trainable weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdraft.config import OptimConfig
from fastdraft.dist.mesh import Axis
from fastdraft.optim import FlatAdamW

FLAT = ("master", "m", "v")  # of the optimizer's state: one number of each weight


@dataclass(frozen=True)
class Parts:
    """Which part of each weight a process has; the order is that of the flat buffers."""

    shapes: dict[str, torch.Size]  # of the whole parameters, by name
    part: Callable[[str, Sequence[int], int, int], tuple[slice, ...]]  # the method's (`Method.part`)
    axis: Axis  # the tensor axis

    def places(self, rank: int) -> dict[str, tuple[slice, ...]]:
        """A process's place in every parameter."""
        return {name: self.part(name, shape, rank, self.axis.size) for name, shape in self.shapes.items()}

    @property
    def local_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(x.stop - x.start for x in place) for name, place in self.places(0).items()}

    def split(
        self,
        flat: Tensor,  # [P] of this process
    ) -> dict[str, Tensor]:
        """Views of a flat buffer by parameter."""
        shapes = self.local_shapes
        parts = flat.split([math.prod(shape) for shape in shapes.values()])
        return {name: x.view(shape) for (name, shape), x in zip(shapes.items(), parts, strict=True)}

    def whole(
        self,
        flat: Tensor,  # [P] of this process
    ) -> Tensor:  # [sum of the whole parameters] on the host
        """All processes' parts joined, the same on each of them. A collective of the axis."""
        places = [self.places(rank) for rank in range(self.axis.size)]
        joined = []
        for name, own in self.split(flat).items():
            whole = torch.empty(self.shapes[name], dtype=flat.dtype)
            if own.shape == whole.shape:
                whole.copy_(own)  # every process has all of it
            else:
                for place, piece in zip(places, self.axis.gather(own).chunk(self.axis.size), strict=True):
                    whole[place[name]] = piece
            joined.append(whole.view(-1))
        return torch.cat(joined)

    def own(
        self,
        whole: Tensor,  # as `whole` gives it
    ) -> Tensor:  # [P]
        """This process's part of every parameter."""
        places = self.places(self.axis.rank)
        parts = whole.split([math.prod(shape) for shape in self.shapes.values()])
        pieces = zip(self.shapes.items(), parts, strict=True)
        return torch.cat([x.view(shape)[places[name]].reshape(-1) for (name, shape), x in pieces])

    def square_sum(
        self,
        flat: Tensor,  # [P] of this process
    ) -> Tensor:  # scalar float64
        """The sum of all whole parameters' squares, the same on each process. A collective of the axis."""
        shared, own = flat.new_zeros(2, dtype=torch.float64).unbind()
        for name, x in self.split(flat).items():
            total = own if tuple(self.shapes[name]) != x.shape else shared
            total += torch.linalg.vector_norm(x, dtype=torch.float64).square()
        return self.axis.sum_(own + shared / self.axis.size)


class TensorAdamW(FlatAdamW):
    """`FlatAdamW` of one process's parts. The norm that clips is that of the whole gradient, and the state is whole."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],  # this process's parts
        config: OptimConfig,
        total_steps: int,
        dtype: torch.dtype,
        parts: Parts,
    ):
        super().__init__(parameters, config.model_copy(update={"clip": math.inf}), total_steps, dtype)
        self.parts, self.clip = parts, config.clip

    def step(self, num_live: Tensor) -> Tensor:  # scalar tensor: norm of G / N before clipping
        """One step of all parts. To scale the gradient by c is to divide it by N / c rows instead of N."""
        norm = self.parts.square_sum(self.grad).sqrt() / num_live.clamp_min(1)
        scale = (self.clip / norm.clamp_min(1e-30)).clamp_max(1.0)
        super().step(num_live / scale)
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        return state | {name: self.parts.whole(state[name]) for name in FLAT}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state | {name: self.parts.own(state[name]) for name in FLAT})
