"""The parts of a draft's weights that the processes of the tensor axis have, joined and taken apart.

A process's flat buffers hold its parts one behind the other. A checkpoint holds whole weights, so that it goes on in any
layout. They are joined on the host, parameter by parameter, and every process of the axis has all of them there for as long
as the checkpoint is written or read: 12 bytes a trainable weight for the master and two moments.

Muon's directions of whole matrices are joined on the device, each on the one process that orthogonalises it
(`orthogonalized_together`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdraft.dist.mesh import Axis
from fastdraft.optim import Matrix, orthogonalized, shared_out


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


def orthogonalized_together(parts: Parts, weights: list[Matrix], directions: Iterable[Tensor]) -> Iterator[Tensor]:
    """This process's parts of the orthogonalised directions of whole matrices, from its parts of the directions.

    Each matrix is the work of one process of the axis: it gets the others' parts, orthogonalises the whole, and gives the
    parts back. All of the axis call it with the same matrices, in the same order.
    """
    if not weights:
        return
    axis = parts.axis
    theirs = shared_out(weights, axis.size)
    sizes = [sum(w.end - w.start for w in those) for those in theirs]
    places = [parts.places(rank) for rank in range(axis.size)]

    # The parts for one process lie one behind the other, in the order in which it orthogonalises.
    ends = itertools.accumulate(w.end - w.start for those in theirs for w in those)
    here = {w.name: slice(end - (w.end - w.start), end) for w, end in zip(itertools.chain(*theirs), ends, strict=True)}
    message: Tensor | None = None  # [the elements of all parts]
    for matrix, direction in zip(weights, directions, strict=True):
        if message is None:
            message = direction.new_empty(sum(sizes))
        message[here[matrix.name]] = direction
    own = sizes[axis.rank]
    wholes = axis.exchange(message, sizes, [own] * axis.size).view(axis.size, own)  # a row: one process's parts
    del message

    end = 0
    for matrix in theirs[axis.rank]:
        start, end = end, end + matrix.end - matrix.start
        whole = wholes.new_empty(matrix.whole)
        for place, piece in zip(places, wholes, strict=True):
            whole[place[matrix.name]] = piece[start:end].view(matrix.shape)
        whole = orthogonalized(whole)
        for place, piece in zip(places, wholes, strict=True):
            piece[start:end].view(matrix.shape).copy_(whole[place[matrix.name]])
        del whole
    message = axis.exchange(wholes.view(-1), [own] * axis.size, sizes)
    del wholes
    for matrix in weights:
        yield message[here[matrix.name]]
