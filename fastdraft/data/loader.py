"""Samples to batches: packs in an order that depends on seed and block alone, dealt to ranks, resumable to the pack.

# n samples, N tokens of a pack, L tokens of a document
A block is an epoch of a data set, or a piece of a stream. Its samples are shuffled and packed, its packs shuffled. An
optimizer step takes packs_per_step packs, running over the end of a block into the next, so every step is full. Which packs
make a step does not depend on the number of ranks; which rank takes which is dealt by cost, L + pair_cost * L^2 summed over
a pack's documents. Ranks that share a sequence are one rank here and get the same packs.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from fastdraft.batch import Batch
from fastdraft.data.pack import deal, pack
from fastdraft.data.samples import flat, scan
from fastdraft.data.stream import Place, Stream

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Loader:
    """Endless iterator over optimizer steps: each item is the list of this rank's batches, on the CPU.

    `state_dict` after an item resumes with the item that would have come next, under any world size.
    ValueError: packs_per_step not divisible by world_size, or more than an epoch has; a sample longer than pack_tokens;
    nothing to train on.
    """

    def __init__(
        self,
        data: Dataset | Stream,
        pack_tokens: int,
        packs_per_step: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pair_cost: float = 0.0,  # of L^2 in a document's cost: attention's share; `cost.pair_cost`
    ) -> None:
        if packs_per_step < 1 or packs_per_step % world_size:
            next_one = max(1, -(-packs_per_step // world_size)) * world_size
            raise ValueError(
                f"optim.packs_per_step {packs_per_step} must be a positive multiple of the {world_size} ranks that share a "
                f"step: set it to {next_one}, or start another number of processes"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks")
        self.pack_tokens, self.packs_per_step, self.seed = pack_tokens, packs_per_step, seed
        self.rank, self.world_size, self.pair_cost = rank, world_size, pair_cost
        self._blocks = _Epochs(data) if isinstance(data, Dataset) else data
        self._block = self._open(self._blocks.first)
        self._next = 0  # the next pack to hand out
        if isinstance(data, Dataset) and packs_per_step > self.num_packs:
            raise ValueError(
                f"optim.packs_per_step {packs_per_step} is more than the {self.num_packs} packs of {pack_tokens} tokens "
                "that all the training data make, so a step would see documents twice; lower it, or data.pack_tokens, or "
                "give more data"
            )

    @property
    def num_packs(self) -> int:
        """Packs of this block, over all ranks; the same in every epoch of a data set."""
        return len(self._block.packs)

    @property
    def packs(self) -> list[np.ndarray]:
        """All packs of the block in order, each the rows of the data set that it holds (see `read_pack`)."""
        return self._block.packs

    def num_steps(self, epochs: int) -> int:
        """Optimizer steps that see every sample that often; the last may run into the epoch after."""
        return -(-epochs * self.num_packs // self.packs_per_step)

    @property
    def utilisation(self) -> float:
        """Share of the packs' token budget that holds tokens."""
        return float(self._block.lengths.sum() / (self.num_packs * self.pack_tokens))

    def lines(self) -> list[str]:
        """For people: how well the packs are filled."""
        return [f"{self.num_packs:,} packs of {self.pack_tokens:,} tokens, {self.utilisation:.1%} full"]

    def state_dict(self) -> dict[str, Any]:
        return {"place": list(self._block.place), "pack": self._next, **self._identity(self._block)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. ValueError when the data, pack_tokens or seed is not what the state was taken with."""
        place = tuple(state["place"])
        block = self._block if place == self._block.place else self._open(place)
        for name, value in self._identity(block).items():
            if state.get(name) != value:
                what = " (the hash of its documents: the files, the tokenizer, its template, or how this version of "
                what = f"{what}fastdraft reads them has changed)" if name == "data" else ""
                raise ValueError(
                    f"cannot resume at the same place in the data: {name} was {state.get(name)!r} and is {value!r}{what}; "
                    f"resume with the data and settings of the checkpoint, or start a new run from its weights"
                )
        if not 0 <= state["pack"] < len(block.packs):
            raise ValueError(f"cannot resume at {state['place']}, pack {state['pack']}: there are {len(block.packs)} packs")
        self._block, self._next = block, state["pack"]

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        step = []
        for _ in range(self.packs_per_step):
            step.append((self._block, self._next))
            self._next += 1
            if self._next == len(self._block.packs):
                self._block, self._next = self._open(self._block.after), 0
        mine = (step[i] for i in self._deal([block.pack_lengths[p] for block, p in step])[self.rank])
        return [read_pack(block.table, block.packs[p]) for block, p in mine]

    def work(
        self,
        token: float,  # work for a token of a pack
        row: float,  # and for one that is trained on
    ) -> np.ndarray:  # [steps, world_size]
        """What each rank does in each whole optimizer step of this block, beside the pairs of tokens that attention sees:
        those of a document of L tokens take `pair_cost` L^2 (token + row). No pack is read."""
        block, k = self._block, self.packs_per_step
        trained = np.concatenate([_trained(mask, n) for _, mask, n in scan(block.table)])
        costs = [
            float((token * n + row * trained[rows] + self.pair_cost * (token + row) * n**2).sum())
            for rows, n in zip(block.packs, block.pack_lengths, strict=True)
        ]
        steps = range(0, len(costs) - k + 1, k)
        dealt = [self._deal(block.pack_lengths[first : first + k]) for first in steps]
        return np.array(
            [
                [sum(costs[first + i] for i in packs) for packs in of_ranks]
                for first, of_ranks in zip(steps, dealt, strict=True)
            ]
        )

    def _deal(self, pack_lengths: list[np.ndarray]) -> list[list[int]]:
        """For each rank which packs of a step it takes."""
        return deal([float((n + self.pair_cost * n**2).sum()) for n in pack_lengths], self.world_size)

    def _identity(self, block: _Block) -> dict[str, Any]:
        return {"data": block.data, "pack_tokens": self.pack_tokens, "seed": self.seed}

    def _open(self, place: Place) -> _Block:
        """The block that begins there, shuffled and packed."""
        dataset, after = self._blocks.block(place)
        usable, lengths, data = self._blocks.survey if isinstance(self._blocks, _Epochs) else _survey(dataset)
        rng = np.random.default_rng([self.seed, *place[:3]])  # a Parquet file's places have no bytes
        order = rng.permutation(len(usable))
        packs = pack(lengths[order], self.pack_tokens)
        packs = [order[packs[p]] for p in rng.permutation(len(packs))]
        return _Block(
            place,
            after,
            dataset.with_format("arrow"),
            data,
            lengths,
            [usable[p] for p in packs],
            [lengths[p] for p in packs],
        )


@dataclass(frozen=True)
class _Block:
    place: Place
    after: Place  # where the next one begins
    table: Dataset  # in Arrow format
    data: str  # hash of all samples
    lengths: np.ndarray  # [n] of the usable samples
    packs: list[np.ndarray]  # rows of the table in each
    pack_lengths: list[np.ndarray]  # their lengths


class _Epochs:
    """A data set as an endless row of blocks, each the whole of it: an epoch's place is its number."""

    first: Place = (0,)

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.survey = dataset, _survey(dataset)

    def block(self, place: Place) -> tuple[Dataset, Place]:
        if len(place) != 1 or place[0] < 0:
            raise ValueError(f"place {list(place)} is not the number of an epoch")
        return self.dataset, (place[0] + 1,)


class Ahead:
    """A loader's steps, made `depth` ahead in a background thread, pinned if asked, and announced there. A context manager
    that takes the loader over: set its state before. `next` raises the loader's errors; `waited` is the seconds that it
    kept its caller."""

    def __init__(
        self,
        loader: Loader,
        pin: bool = False,
        depth: int = 2,
        announce: Callable[[list[Batch]], None] = lambda batches: None,  # gets the very batches that `next` will give
    ) -> None:
        self.waited = 0.0
        self._loader, self._pin, self._depth, self._announce = loader, pin, depth, announce
        self._state = loader.state_dict()
        self._pool = ThreadPoolExecutor(1, "fastdraft-loader")
        self._coming: deque[Future[tuple[list[Batch], dict[str, Any]]]] = deque()

    def __enter__(self) -> Ahead:
        for _ in range(self._depth):
            self._coming.append(self._pool.submit(self._make))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __next__(self) -> list[Batch]:
        start = time.perf_counter()
        batches, self._state = self._coming.popleft().result()
        self.waited += time.perf_counter() - start
        self._coming.append(self._pool.submit(self._make))
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The loader's state after the step last taken, whatever has been made ahead."""
        return self._state

    def _make(self) -> tuple[list[Batch], dict[str, Any]]:
        batches = next(self._loader)
        batches = [batch.pin_memory() for batch in batches] if self._pin else batches
        self._announce(batches)
        return batches, self._loader.state_dict()


def eval_batches(dataset: Dataset, pack_tokens: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Every sample once, over all ranks together, in an order of its own that never changes. Who takes only the first, as
    eval.max_packs says, has long and short documents alike. A rank may get one batch more than another. ValueError as for
    `Loader`."""
    table, packs = dataset.with_format("arrow"), eval_packs(dataset, pack_tokens)
    return (read_pack(table, packs[p]) for p in spread(len(packs))[rank::world_size])


def eval_packs(dataset: Dataset, pack_tokens: int) -> list[np.ndarray]:
    """The packs of `eval_batches`, each the rows of the data set that it holds; those of the longest samples come first. A
    feature store's hash has this order."""
    usable, lengths, _ = _survey(dataset)
    return [usable[rows] for rows in pack(lengths, pack_tokens)]


def spread(n: int) -> list[int]:
    """0 .. n - 1 from the middle on, in an order of which every beginning lies evenly among all: numbers whose multiples of
    the golden ratio have fractions below some bound are at most three distances apart."""
    return np.argsort((np.arange(n) - n // 2) * GOLDEN_RATIO % 1, kind="stable").tolist()


def _survey(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows that train something, their lengths, and a hash of all tokens and masks. One pass over the data."""
    lengths, trains = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    digests = [hashlib.blake2b(digest_size=16) for _ in range(3)]
    for ids, mask, n in scan(dataset):
        trains.append(_trained(mask, n) > 0)
        lengths.append(n)
        for digest, values in zip(digests, (ids.astype(np.int32), mask, n), strict=True):
            digest.update(np.ascontiguousarray(values))
    usable = np.flatnonzero(np.concatenate(trains))
    if not len(usable):
        raise ValueError(f"none of the {len(dataset)} samples has a trained token; check the roles and the chat template")
    data = hashlib.blake2b(b"".join(d.digest() for d in digests), digest_size=16).hexdigest()
    return usable, np.concatenate(lengths)[usable], data


def _trained(
    mask: np.ndarray,  # [M] bool, of samples end to end
    lengths: np.ndarray,  # [n]
) -> np.ndarray:  # [n]
    """Tokens of each sample that are trained on: the first two are never predicted."""
    place = np.arange(len(mask)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(owner[mask & (place >= 2)], minlength=len(lengths))


def read_pack(
    table: Dataset,  # in Arrow format
    rows: np.ndarray,
) -> Batch:
    piece: pa.Table = table[rows.tolist()]
    ids, mask, lengths = flat(piece)
    return Batch(
        torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.copy()), tuple(int(length) for length in lengths)
    )
