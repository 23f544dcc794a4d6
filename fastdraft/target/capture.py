"""The capture job: the target runs once over all documents, and their features go into a store.

The packs are those of a run's first epoch (and its held-out packs), and the target sees them as it would online: with the
same settings, training from the store has the same features bit for bit in that epoch. A document that comes twice is
kept once. Shards are fixed beforehand, from tokens alone, so a store's bytes do not depend on who wrote which shard, on
how often the job was killed, or on the number of processes: any number of them, on any machines that share the folder,
take shards that nobody holds. A lock dies with its process.

# D documents of a pack
"""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import xxhash
from datasets import Dataset

from fastdraft.batch import Batch, Features
from fastdraft.data.loader import Loader, eval_packs, read_pack
from fastdraft.dist import mesh
from fastdraft.features.meta import Meta
from fastdraft.features.store import INDEX_BYTES, SHARD_BYTES, document_keys, list_shards, needed, shard_number
from fastdraft.features.writer import ShardWriter
from fastdraft.files import GIB, free_disk
from fastdraft.target.source import Source

LOCKS = "claims"
Capture = Callable[[Batch], tuple[Batch, Features]]  # `Source.capture`


@dataclass(frozen=True)
class Pack:
    table: Dataset  # in Arrow format
    rows: np.ndarray  # of the table, in the order of the pack
    documents: tuple[int, ...]  # those to store: what no earlier pack has
    num_tokens: int

    def read(self) -> Batch:
        return read_pack(self.table, self.rows)


@dataclass(frozen=True)
class CapturePlan:
    """What a capture will write, known from tokens and masks alone."""

    shards: tuple[tuple[Pack, ...], ...]
    shard_bytes: tuple[int, ...]  # features and index
    tokens: int  # the target runs over these
    documents: int  # stored
    trained: int  # stored rows of f: one for each trained token
    data: str  # hash of the documents, in order

    @property
    def num_bytes(self) -> int:
        return sum(self.shard_bytes)

    def lines(self, meta: Meta) -> list[str]:
        plain = sum(meta.row_bytes.values())
        return [
            f"{self.documents:,} documents, {self.tokens:,} tokens, {self.trained:,} of them trained",
            f"{meta.dtype}: {self.num_bytes / max(self.tokens, 1):,.0f} bytes a token (all rows: {plain:,}), "
            f"{self.num_bytes:,} bytes ({self.num_bytes / GIB:.3f} GiB) in {len(self.shards)} shards",
        ]


def plan_capture(
    train_set: Dataset,
    eval_set: Dataset,
    pack_tokens: int,
    seed: int,  # data.seed
    meta: Meta,
    shard_bytes: int = SHARD_BYTES,
) -> CapturePlan:
    """Reads all tokens once. ValueError as for `Loader`."""
    seen: set[bytes] = set()
    shards, sizes, filling, size = [], [], [], 0
    tokens = trained = 0
    data = xxhash.xxh3_64(f"{pack_tokens} {seed} {shard_bytes}".encode())
    for table, rows in _packs(train_set, eval_set, pack_tokens, seed):
        batch = read_pack(table, rows)
        new = []
        for d, key in enumerate(document_keys(batch)):
            if key not in seen:
                seen.add(key)
                new.append(d)
                data.update(key)
        if not new:
            continue
        wanted = needed(batch)
        trained += sum(wanted.f_rows[d] for d in new)
        tokens += batch.num_tokens
        size += sum(wanted.g_rows[d] * meta.row_bytes["g"] + wanted.f_rows[d] * meta.row_bytes["f"] for d in new)
        filling.append(Pack(table, rows, tuple(new), batch.num_tokens))
        if size >= shard_bytes:
            shards.append(tuple(filling))
            sizes.append(size)
            filling, size = [], 0
    if filling:
        shards.append(tuple(filling))
        sizes.append(size)
    index = [INDEX_BYTES * sum(len(pack.documents) for pack in packs) for packs in shards]
    sizes = map(sum, zip(sizes, index, strict=True))
    return CapturePlan(tuple(shards), tuple(sizes), tokens, len(seen), trained, data.hexdigest())


def _packs(train_set: Dataset, eval_set: Dataset, pack_tokens: int, seed: int) -> Iterator[tuple[Dataset, np.ndarray]]:
    held_out = eval_packs(eval_set, pack_tokens) if len(eval_set) else ()
    for documents, packs in ((train_set, Loader(train_set, pack_tokens, 1, seed).packs), (eval_set, held_out)):
        table = documents.with_format("arrow")
        yield from ((table, rows) for rows in packs)


def missing_bytes(plan: CapturePlan, folder: Path, part: tuple[int, int] = (0, 1)) -> int:
    """What is still to be written of a part."""
    here = {shard_number(path) for path in list_shards(folder)}
    return sum(plan.shard_bytes[n] for n in range(part[0], len(plan.shards), part[1]) if n not in here)


def run_capture(
    source: Source,
    plan: CapturePlan,
    folder: Path,
    meta: Meta,  # of the started store
    part: tuple[int, int] = (0, 1),  # (i, n): only shards i, i+n, ...; for machines that share no folder, to be merged
    say: Callable[[str], None] = lambda line: None,
    holders: mesh.Axis | None = None,  # the processes that hold the source's target together; None: each holds its own
    capture_s: float = 0.0,  # of a pack and, below, of its rows to be written, as `mesh.begin` takes them
    write_s: float = 0.0,
) -> None:
    """Fills the store; returns when every shard of the part is there, whoever wrote it. Goes on where it was killed.

    Raises ValueError when the disk is too small or becomes full, or features are not finite.
    """
    free_disk(folder, missing_bytes(plan, folder, part), "the feature store")
    locks = folder / LOCKS
    locks.mkdir(exist_ok=True)
    mine = range(part[0], len(plan.shards), part[1])
    first = mesh.rank() * len(mine) // mesh.world()
    order = [*mine[first:], *mine[:first]]  # ranks begin far apart
    progress = _Progress(mine, folder, say)
    alone = holders is None or holders.size == 1

    def capture(batch: Batch) -> tuple[Batch, Features]:
        mesh.begin("running the target over a pack", capture_s)
        captured = source.capture(batch)
        mesh.begin("writing features", write_s)
        return captured

    # Take what is free; then wait for what others left behind when they died. Processes that hold the target together wait
    # for no lock, which would keep the others from a forward: they look again together until all is there. How long others
    # are at what they have locked is not known, so that wait is not timed, nor what is run in it.
    passes = (False, True) if alone else itertools.repeat(False)
    for again, wait in enumerate(passes):
        with ShardWriter(folder, meta) as writer:
            for number in order:
                run = source.capture if wait else capture
                _capture_shard(source, run, plan.shards[number], number, writer, wait, progress)
            source.meet()
            mesh.begin(None)
        if not alone:
            if not holders.largest(missing_bytes(plan, folder, part)):
                break
            if again:
                time.sleep(1)
    if not missing_bytes(plan, folder):  # complete: nobody writes any more
        shutil.rmtree(locks, ignore_errors=True)


def fill_store(
    source: Source,
    plan: CapturePlan,  # of documents that the store lacks
    folder: Path,
    meta: Meta,  # of the started store, which takes whatever comes
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Adds a plan's documents to a store that others do not fill at the same time. Raises ValueError as `run_capture`."""
    free_disk(folder, plan.num_bytes, "the feature store")
    first = max(map(shard_number, list_shards(folder)), default=-1) + 1
    progress = _Progress(range(first, first + len(plan.shards)), folder, say)
    with ShardWriter(folder, meta) as writer:
        for number, packs in enumerate(plan.shards, first):
            _add_packs(source, source.capture, packs, writer)
            writer.finish(number, lambda _, number=number, packs=packs: progress.wrote(number, packs))


def _add_packs(source: Source, capture: Capture, packs: tuple[Pack, ...], writer: ShardWriter) -> None:
    batches = [pack.read() for pack in packs]
    source.expect(batches)
    for pack, batch in zip(packs, batches, strict=True):
        writer.add(*capture(batch), pack.documents)


def _capture_shard(
    source: Source,
    capture: Capture,
    packs: tuple[Pack, ...],
    number: int,
    writer: ShardWriter,
    wait: bool,
    progress: _Progress,
) -> None:
    if _is_there(writer.folder, number):
        return
    lock = filelock.FileLock(writer.folder / LOCKS / f"{number:05d}.lock", thread_local=False)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        return  # somebody is at it
    except FileNotFoundError:
        return  # the last shard was written just now, and its writer took the locks away
    except NotImplementedError as error:
        raise ValueError(
            f"{writer.folder} lies on a file system without locks: give each process --part I/N and a folder of its own, "
            "then merge them"
        ) from error
    if _is_there(writer.folder, number):
        lock.release()
        return

    def written(path: Path) -> None:
        progress.wrote(number, packs)
        lock.release()

    _add_packs(source, capture, packs, writer)
    writer.finish(number, written)


def _is_there(folder: Path, number: int) -> bool:
    return any(folder.glob(f"shard-{number:05d}-*.safetensors"))


class _Progress:
    """A line for each shard that this process wrote: its own speed, and the time left if others do as much as till now."""

    def __init__(self, mine: range, folder: Path, say: Callable[[str], None]):
        self.mine, self.folder, self.say = mine, folder, say
        self.left_before = self._left()
        self.tokens, self.start, self.lock = 0, time.perf_counter(), threading.Lock()

    def _left(self) -> int:
        here = {shard_number(path) for path in list_shards(self.folder)}
        return sum(number not in here for number in self.mine)

    def wrote(self, number: int, packs: tuple[Pack, ...]) -> None:
        seconds = time.perf_counter() - self.start
        with self.lock:  # two threads write
            self.tokens += sum(pack.num_tokens for pack in packs)
        left = self._left()
        minutes = left * seconds / max(self.left_before - left, 1) / 60
        self.say(
            f"shard {number}: {len(self.mine) - left} of {len(self.mine)} are there, {self.tokens / seconds:,.0f} tokens/s "
            f"here, about {minutes:.0f} min left"
        )
