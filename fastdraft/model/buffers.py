"""The memory an engine works in: named buffers that are taken once, and tensors that lie end to end in one of them.

A table lists buffers by name, so that what an engine needs can be added up without a GPU and without making a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

Table = dict[str, tuple[int, tuple[int, ...], torch.dtype]]  # by name: rows, shape of a row, dtype


def table_bytes(table: Table) -> int:
    return sum(rows * math.prod(shape) * dtype.itemsize for rows, shape, dtype in table.values())


class Buffers:
    """Named buffers, each taken in full when first asked for."""

    def __init__(self, device: torch.device):
        self.device, self.table, self.held, self.resized = device, {}, {}, 0

    def resize(self, table: Table) -> None:
        """From now on these sizes. What a buffer of another size held is gone."""
        for name, spec in table.items():
            if self.table.get(name) != spec:
                self.held.pop(name, None)
        self.table = table
        self.resized += 1

    @property
    def held_table(self) -> Table:
        return {name: self.table[name] for name in self.held}

    def rows(self, name: str) -> int:
        """How many rows the table gives a buffer."""
        return self.table[name][0]

    def __call__(self, name: str, rows: int | None = None) -> Tensor:  # [rows, ...] its first rows, or all; not cleared
        room, shape, dtype = self.table[name]
        if name not in self.held:
            self.held[name] = torch.empty(room, *shape, dtype=dtype, device=self.device)
        return self.held[name][:rows]


def end_to_end(
    parts: list[Tensor],  # [n_j, width] each
) -> Tensor | None:  # [sum n_j, width]
    """One tensor over parts that lie one after the other in one buffer, as `FlatAdamW` has them; None where they do not."""
    first = parts[0]
    same = all(p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in parts)
    follows = all(b.storage_offset() == a.storage_offset() + a.numel() for a, b in pairwise(parts))
    if not (same and follows and all(p.is_contiguous() for p in parts)):
        return None
    return first.as_strided((sum(len(p) for p in parts), first.shape[1]), first.stride(), first.storage_offset())


def flat_gradients(
    parameters: Mapping[str, nn.Parameter],  # of one dtype and device
) -> dict[str, Tensor]:  # at least float32
    """Zero gradient sums by parameter name, end to end in one buffer."""
    first = next(iter(parameters.values()))
    sizes = [p.numel() for p in parameters.values()]
    flat = torch.zeros(sum(sizes), dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
    return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), flat.split(sizes), strict=True)}
