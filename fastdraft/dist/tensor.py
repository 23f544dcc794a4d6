"""The parts of a draft's weights that the processes of the tensor axis have, joined and taken apart.

A process's flat buffers hold its parts one behind the other. A checkpoint holds whole weights, so that it goes on in any
layout. They are joined on the host, parameter by parameter, and every process of the axis has all of them there for as long
as the checkpoint is written or read: 12 bytes a trainable weight for the master and two moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdraft.dist.mesh import Axis


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

    @property
    def uncut(self) -> list[tuple[int, int]]:
        """(first, one past the last) element in the flat buffer of each parameter that every process has whole."""
        found, start = [], 0
        for name, shape in self.local_shapes.items():
            end = start + math.prod(shape)
            if shape == tuple(self.shapes[name]):
                found.append((start, end))
            start = end
        return found
