"""What passes between the rooms: a batch of packed documents, the target's features, its head, what a step gives back and
how a method weighs it.

# N packed tokens, D documents, Ht target hidden, V target vocabulary, T TTT steps
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

LossKind = Literal["kl", "lk_alpha", "lk_lambda"]


class KeptTensor(Protocol):
    """A tensor in a file, which is read when it is asked for: what safetensors' `get_slice` gives."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, part: slice) -> Tensor: ...


LayerWeights = dict[str, KeptTensor]  # of one decoder layer, by their names in it


class TargetLayers(NamedTuple):
    """A target's decoder layers, as its files and its config tell of them."""

    weights: dict[int, LayerWeights]  # by number, those that are there
    kind: str  # of the decoder: its model_type
    activation: str  # of its MLP


def document_starts(lengths: tuple[int, ...]) -> Tensor:  # [N] int64 on the host, row of the first token of each's document
    sizes = np.array(lengths, dtype=np.int64)
    return torch.from_numpy(np.repeat(sizes.cumsum() - sizes, sizes))


def to_device(
    tensors: Sequence[Tensor],  # int64, on the host
    device: torch.device,
) -> Tensor:  # [sum of their elements]
    """One after the other on a device, in one copy that the host does not wait for."""
    return _end_to_end(tensors, device).to(device, non_blocking=True)


def copy_into(
    place: Tensor,  # [sum of their elements] int64, on any device
    tensors: Sequence[Tensor],  # int64, on the host
) -> None:
    """What `to_device` gives, into memory that is there already, without any other on its device."""
    place.copy_(_end_to_end(tensors, place.device), non_blocking=True)


def _end_to_end(tensors: Sequence[Tensor], device: torch.device) -> Tensor:  # on the host, page-locked for a GPU
    host = torch.empty(sum(x.numel() for x in tensors), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate([x.numpy().ravel() for x in tensors], out=host.numpy())
    return host


@dataclass(frozen=True)
class Batch:
    """Documents laid end to end, nothing between them. Document d owns rows sum(lengths[:d]) .. sum(lengths[:d+1])."""

    input_ids: Tensor  # [N] int64, x
    loss_mask: Tensor  # [N] bool, True where the draft is trained to predict this token
    lengths: tuple[int, ...]  # D document lengths, on the host; they sum to N

    def __post_init__(self) -> None:
        n = sum(self.lengths)
        if self.input_ids.shape != (n,) or self.loss_mask.shape != (n,):
            raise ValueError(
                f"document lengths sum to {n}, but input_ids is {tuple(self.input_ids.shape)} and "
                f"loss_mask is {tuple(self.loss_mask.shape)}; each must be one row of that many tokens"
            )

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @cached_property
    def doc_start(self) -> Tensor:  # [N] int64, row of the first token of this row's document
        return document_starts(self.lengths).to(self.input_ids.device)

    @cached_property
    def doc_end(self) -> Tensor:  # [N] int64, one past the row of the document's last token
        sizes = np.array(self.lengths, dtype=np.int64)
        return torch.from_numpy(np.repeat(sizes.cumsum(), sizes)).to(self.input_ids.device)

    @cached_property
    def positions(self) -> Tensor:  # [N] int64, place of the token in its document, from 0
        return torch.arange(self.num_tokens, device=self.input_ids.device) - self.doc_start

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which `to` copies to a GPU without waiting."""
        return Batch(self.input_ids.pin_memory(), self.loss_mask.pin_memory(), self.lengths)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.input_ids.to(device, non_blocking=True), self.loss_mask.to(device, non_blocking=True), self.lengths
        )


@dataclass(frozen=True)
class PackShare:
    """The rows of a pack that one of `size` processes owns when they share its tokens.

    The pack is cut into 2 * size slices of equal length, the last ones shorter or empty, and a process owns slices `rank`
    and 2 * size - 1 - rank: so every process has the same work where each token looks at all before it. Alone, a process
    owns the whole pack.
    """

    num_tokens: int  # N
    rank: int = 0
    size: int = 1
    halo: int = 0  # rows behind each slice, of the next owners, whose features this process has too

    @property
    def slice_rows(self) -> int:
        """Rows of a slice that is full."""
        return -(-self.num_tokens // (2 * self.size))

    @property
    def full_rows(self) -> int:
        """Rows of an owner whose slices are full; alone, those of the pack."""
        return self.num_tokens if self.size == 1 else 2 * self.slice_rows

    @cached_property
    def slices(self) -> tuple[tuple[int, int], tuple[int, int]]:  # (first row, one past the last) of each, ascending
        n = self.slice_rows
        places = (self.rank, 2 * self.size - 1 - self.rank)
        return tuple((min(s * n, self.num_tokens), min((s + 1) * n, self.num_tokens)) for s in places)

    @cached_property
    def rows(self) -> Tensor:  # [n] int64 on the host, ascending: the rows that this process owns
        return torch.cat([torch.arange(first, end) for first, end in self.slices])

    @cached_property
    def rows_and_halo(self) -> Tensor:  # [m] int64 on the host, ascending: its own rows and those of its halos
        (a, b), (c, d) = self.slices
        first = min(b + self.halo, c) if a < b else b  # a halo that reaches the second slice ends where that begins
        return torch.cat([torch.arange(a, first), torch.arange(c, min(d + self.halo, self.num_tokens))])

    def pieces(self) -> Iterator[tuple[int, slice, slice]]:
        """Of each slice of the pack: its owner, where it lies among the rows of its owner, and which rows it is."""
        for rank in range(self.size):
            first = 0
            for start, end in replace(self, rank=rank).slices:
                yield rank, slice(first, first + end - start), slice(start, end)
                first += end - start


@dataclass(frozen=True)
class Features:
    """What the frozen target says about every token of a batch (docs/mathematics.md: g and f)."""

    g: Tensor  # [N, K*Ht] outputs of the K target layers that the draft reads, lowest first; EAGLE-3 reads three
    # [N, Ht] the state the target's lm_head reads (after the final norm); None where the method that is trained needs none
    f: Tensor | None


def own_features(
    features: Features,  # of a whole pack
    share: PackShare,
) -> Features:
    """What the owner of a share needs: g of its rows, f of its rows and halos."""
    (a, b), (c, d) = share.slices
    first = len(share.rows_and_halo) - (min(d + share.halo, share.num_tokens) - c)  # rows of f before the second slice
    f = torch.cat([features.f[a : a + first], features.f[c : d + share.halo]])
    return Features(torch.cat([features.g[a:b], features.g[c:d]]), f)


@dataclass(frozen=True)
class TargetHead:
    """The target's output distribution: logits(f) = cap(scale * (f W^T + b)), cap(z) = softcap * tanh(z / softcap)."""

    weight: Tensor  # [V, Ht]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def logits(
        self,
        f: Tensor,  # [n, Ht]
    ) -> Tensor:  # [n, V]
        z = torch.nn.functional.linear(f, self.weight, self.bias)
        if self.scale != 1.0:
            z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z


@dataclass(frozen=True)
class Ends:
    """What training needs of a target besides its features: what stands before its first layer and behind its last."""

    embedding: Tensor  # [V, Ht]
    head: TargetHead
    final_norm: Tensor | None  # [Ht] where it is a plain RMSNorm's weight
    fingerprint: str  # `target_fingerprint`

    @property
    def hidden_size(self) -> int:
        return self.embedding.shape[1]

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype


@dataclass(frozen=True)
class Rows:
    """Per-row results of a TTT step. Row (i, t) is TTT step i at token t; what is not live is exactly 0."""

    loss: Tensor  # [T, N] the row's loss, no step weight, no normaliser
    acceptance: Tensor  # [T, N] sum_v min(P(v), Q(v)), P with its full-vocabulary normaliser
    hit: Tensor  # [T, N] bool, argmax of Q is argmax of P
    live: Tensor  # [T, N] bool, the row is trained on
    masked_in: Tensor  # [T, N] bool, loss_mask and document allow the row; live also needs argmax P in the draft vocabulary

    def sums(self) -> Tensor:  # [5, T] float64: loss, acceptance, hits, live, masked_in
        return torch.stack(
            [x.to(torch.float64).sum(1) for x in (self.loss, self.acceptance, self.hit, self.live, self.masked_in)]
        )


class StepWeights(NamedTuple):
    """How a method weighs the steps of `Rows`: sum_i loss_i * weight_i is divided by sum_i live_i * normaliser_i.

    Where a training step draws the rows that it has, with a probability `drawn`, they weigh weight_i / drawn_i there.
    """

    weight: Tensor  # [T] float64
    normaliser: Tensor  # [T] float64
    drawn: Tensor  # [T] float64, in (0, 1]

    def count(
        self,
        live: Tensor,  # [T] float64, live rows of each step, on the same device as these
    ) -> Tensor:  # scalar
        return (live * self.normaliser).sum()

    def to(self, device: torch.device) -> StepWeights:
        """The same on a device, for a whole loop: the host waits for such a copy, and so for all that a GPU has to do."""
        return StepWeights(*(x.to(device) for x in self))


class UnderWay(Protocol):
    """Something that processes have begun to do together."""

    def wait(self) -> None:
        """Nothing that follows, here or on a GPU's stream, runs before it is done."""


class Group(Protocol):
    """The processes that share a step's work, as the step is given them. `dist/mesh.py` has the groups of a run.

    Each call is made by all of the group, in the same order.
    """

    rank: int
    size: int

    def sum_(self, x: Tensor) -> Tensor:
        """All processes' tensors added up, in place."""

    def start_sum(self, x: Tensor) -> UnderWay:
        """Begins `sum_`: until `wait` of what is returned x may not be touched."""

    def gather(self, x: Tensor) -> Tensor:  # [size * n, ...]
        """All processes' tensors [n, ...], one under the other."""

    def sum_scatter(self, x: Tensor) -> Tensor:  # [n / size, ...]
        """This process's part, along the first dimension, of the sum of all processes' tensors [n, ...]."""

    def exchange(self, x: Tensor, sends: Sequence[int], gets: Sequence[int]) -> Tensor:  # [sum of gets, ...]
        """Sends so many rows of x to each process, one after the other, and gives what each has sent to this one."""


class Alone:
    """A process without others: each call gives back what it was given, and nothing is waited for."""

    rank, size = 0, 1

    def sum_(self, x: Tensor) -> Tensor:
        return x

    def start_sum(self, x: Tensor) -> Alone:
        return self

    def wait(self) -> None:
        pass

    def gather(self, x: Tensor) -> Tensor:
        return x

    def sum_scatter(self, x: Tensor) -> Tensor:
        return x

    def exchange(self, x: Tensor, sends: Sequence[int], gets: Sequence[int]) -> Tensor:
        return x


def tau_sim(acceptance: Tensor) -> float:
    """Simulated accepted length 1 + sum_i prod_{j<=i} alpha_j from per-step mean acceptance [T]."""
    return 1.0 + float(acceptance.double().cumprod(0).sum())
