"""Training from a store: a reader that is two packs ahead of the training, and the store as a cache before the target.

A pack's rows are copied out of the mapped shards into one staging buffer (pinned, where there is a GPU), checked against
their documents' checksums there, sent to the device on a stream of its own, widened from fp8 there, and laid where the
pack has their tokens; rows that no loss can reach are zero. A thread does this for the packs to come, at most two of which
wait: the double buffer.

# N packed tokens, D documents, G and F kept rows of g and f, Ht target hidden
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import filelock
import torch
from datasets import Dataset
from torch import Tensor

from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.data.samples import scan
from fastdraft.features.fp8 import dequantize
from fastdraft.features.meta import DTYPES
from fastdraft.features.store import (
    HEADER_BYTES,
    INDEX_BYTES,
    SHARD_BYTES,
    Store,
    document_checksum,
    document_keys,
    list_shards,
    needed,
    row_kinds,
    shard_number,
)
from fastdraft.features.writer import ShardWriter
from fastdraft.target.hf import Target

OnBadShard = Literal["error", "skip"]
AHEAD = 2  # packs read and not yet trained on


@dataclass(frozen=True)
class StoredTarget:
    """What training needs of a target whose features are stored: no layer of it is loaded."""

    embedding: Tensor  # [V, Ht]
    head: TargetHead
    final_norm: Tensor | None  # [Ht]
    fingerprint: str  # `target_fingerprint` of the target that was captured

    @property
    def hidden_size(self) -> int:
        return self.embedding.shape[1]

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype


def check_documents(store: Store, sets: list[Dataset], on_bad_shard: OnBadShard) -> list[str]:
    """What to tell the user; raises ValueError when documents are missing that a damaged shard does not excuse."""
    total = missing = 0
    for dataset in sets:
        for ids, mask, lengths in scan(dataset):
            batch = Batch(torch.from_numpy(ids.astype("int64")), torch.from_numpy(mask.copy()), tuple(lengths.tolist()))
            alive = needed(batch).f_rows
            keys = [key for key, rows in zip(document_keys(batch), alive, strict=True) if rows]
            total += len(keys)
            missing += sum(key not in store.place for key in keys)
    reasons = list(store.damaged.values())
    bad = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} shards more" if len(reasons) > 3 else "")
    if bad and on_bad_shard == "error":
        raise ValueError(f"{bad}. Capture into a new folder, or set features.on_bad_shard=skip to train without")
    if missing and not store.is_complete:
        raise ValueError(
            f"feature store {store.folder} is not complete: {missing} of {total} documents are missing; give its "
            "`fastdraft features capture` command again, it goes on where it stopped"
        )
    if missing and (missing == total or not bad):
        raise ValueError(
            f"feature store {store.folder} lacks {missing} of the run's {total} documents: it was captured from other "
            "data, or with another chat template, template_date, max_length or train_on"
        )
    if bad:
        return [f"{bad}; {missing} of {total} documents are skipped"]
    return []


@dataclass
class Read:
    """A pack's features, without those of some documents, whose rows are zero."""

    features: Features
    absent: list[int] = field(default_factory=list)  # documents that the store does not have
    damaged: list[int] = field(default_factory=list)  # documents whose bytes are not what was written
    ready: torch.cuda.Event | None = None


class StoreReader:
    """Reads packs from a store; damaged documents are an error that names them, or lose their loss mask and are counted."""

    def __init__(
        self,
        store: Store,
        device: torch.device,
        on_bad_shard: OnBadShard = "error",
        dtype: torch.dtype | None = None,  # of the features given; None: what the target ran in
    ):
        self.store, self.device, self.on_bad_shard = store, device, on_bad_shard
        self.dtype = dtype or DTYPES[store.meta.target_dtype]
        self.waited = 0.0  # seconds that `take` kept its caller
        self.skipped = 0  # documents left out, each as often as it was to be trained on
        self.run_again = 0  # documents that a cache has and cannot read, likewise
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: dict[int, Future[Read]] = {}  # by id of the batch
        self._pool: ThreadPoolExecutor | None = None
        self._room = threading.Semaphore(AHEAD)
        self._closing = False

    def capture(self, batch: Batch) -> tuple[Batch, Features]:
        """The batch, its mask cleared where documents had to be skipped, and its features on the device."""
        return self._without_bad(batch, self.take(batch))

    def _without_bad(self, batch: Batch, read: Read) -> tuple[Batch, Features]:
        bad = sorted(read.absent + read.damaged)
        if not bad:
            return batch, read.features
        if self.on_bad_shard == "error":
            raise ValueError(self._complaint(batch, read))
        self.skipped += len(bad)
        keep = torch.ones(len(batch.lengths), dtype=torch.bool)
        keep[bad] = False
        mask = batch.loss_mask & keep.repeat_interleave(torch.tensor(batch.lengths))
        return Batch(batch.input_ids, mask, batch.lengths), read.features

    def _complaint(self, batch: Batch, read: Read) -> str:
        keys = document_keys(batch)
        if read.damaged:
            shard, d = self.store.place[keys[read.damaged[0]]]
            return (
                f"{shard.path} is damaged: the rows of its document {d} have another checksum. `fastdraft features verify "
                f"{self.store.folder}` finds all such; capture anew, or set features.on_bad_shard=skip to train without"
            )
        return f"feature store {self.store.folder} lacks document {keys[read.absent[0]].hex()}"

    def expect(self, batches: list[Batch]) -> None:
        """Starts reading packs that `take` will be called with, in this order."""
        self._pool = self._pool or ThreadPoolExecutor(1, "feature-reader")
        for batch in batches:
            self._coming[id(batch)] = self._pool.submit(self._read_when_room, batch)

    def _read_when_room(self, batch: Batch) -> Read:
        self._room.acquire()
        return self.read(batch) if not self._closing else Read(Features(torch.empty(0), torch.empty(0)))

    def take(self, batch: Batch) -> Read:
        """What `expect` announced, or else read now; ready for the current stream."""
        start = time.perf_counter()
        coming = self._coming.pop(id(batch), None)
        if coming is None:
            read = self.read(batch)
        else:
            try:
                read = coming.result()
            finally:
                self._room.release()
        self.waited += time.perf_counter() - start
        if read.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(read.ready)
            for x in (read.features.g, read.features.f):
                x.record_stream(current)
        return read

    def close(self) -> None:
        self._closing = True
        for coming in self._coming.values():
            coming.cancel()
            self._room.release()
        if self._pool is not None:
            self._pool.shutdown()

    def read(self, batch: Batch) -> Read:
        """Reads a pack here and now, from any thread."""
        meta, wanted, keys = self.store.meta, needed(batch), document_keys(batch)
        places = [self.store.place.get(key) for key in keys]
        for place in filter(None, places):
            place[0].read_ahead(place[1])
        count = {"g": len(wanted.g_index), "f": len(wanted.f_index)}
        staged = {}
        for name, (dtype, width) in row_kinds(meta).items():
            staged[name] = torch.empty(count[name[0]], width, dtype=dtype, pin_memory=self._stream is not None)
        result = Read(Features(torch.empty(0), torch.empty(0)))
        end = {"g": 0, "f": 0}
        for d, place in enumerate(places):
            begin = end
            end = {"g": begin["g"] + wanted.g_rows[d], "f": begin["f"] + wanted.f_rows[d]}
            parts = [x[begin[name[0]] : end[name[0]]] for name, x in staged.items()]
            if wanted.f_rows[d] and not self._copy(place, parts):
                (result.absent if place is None else result.damaged).append(d)
                for part in parts:
                    part.view(torch.uint8).zero_()
        with torch.cuda.stream(self._stream):
            g, f = (
                self._lay_out(batch.num_tokens, name, index, staged)
                for name, index in (("g", wanted.g_index), ("f", wanted.f_index))
            )
            result.ready = self._stream.record_event() if self._stream is not None else None
        result.features = Features(g, f)
        return result

    @staticmethod
    def _copy(place: tuple[Any, int] | None, into: list[Tensor]) -> bool:
        if place is None:
            return False
        shard, d = place
        parts = shard.parts(d)
        if any(a.shape != b.shape for a, b in zip(parts, into, strict=True)):
            return False
        for source, x in zip(parts, into, strict=True):
            x.view(torch.uint8).copy_(source.view(torch.uint8))
        return document_checksum(into) == shard.checksums[d]

    def _lay_out(self, num_tokens: int, name: str, index: Tensor, staged: dict[str, Tensor]) -> Tensor:  # [N, W]
        meta = self.store.meta
        rows = staged[name].to(self.device, non_blocking=True)
        if meta.dtype == "fp8":
            rows = dequantize(rows, staged[f"{name}_scale"].to(self.device, non_blocking=True), DTYPES[meta.target_dtype])
        laid = torch.zeros(num_tokens, rows.shape[1], dtype=self.dtype, device=self.device)
        return laid.index_copy_(0, index.to(self.device, non_blocking=True), rows.to(self.dtype))


class StoreCache(StoreReader):
    """A store that fills itself: documents it lacks are run by the target, and kept while `max_bytes` allow.

    A document run in other company may differ in its last bits, so training equals online training exactly in the first
    epoch and up to rounding after it. One run at a time fills a store; its ranks each get an equal share of the room.
    """

    def __init__(
        self,
        target: Target,
        store: Store,  # of the target's own dtype
        max_bytes: int,
        rank: int = 0,
        world_size: int = 1,
        shard_bytes: int = SHARD_BYTES,
    ):
        super().__init__(store, target.device)
        ends = (store.folder / "target.safetensors").stat().st_size
        if max_bytes <= ends:
            raise ValueError(
                f"features.max_gib is {max_bytes:,} bytes, of which {store.folder}/target.safetensors, the target's "
                f"embedding and head, takes {ends:,}: nothing is left for features; raise it"
            )
        self._lock = filelock.FileLock(store.folder / ".cache.lock")
        try:
            if rank == 0:
                self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(f"another run is filling {store.folder}; give this one a features.path of its own") from None
        self.target, self.shard_bytes = target, shard_bytes
        self.room = (max_bytes - store.num_bytes) // world_size
        self._writer = ShardWriter(store.folder, store.meta)
        taken = [shard_number(path) for path in list_shards(store.folder)]
        self._number, self._stride = max(taken, default=-1) + 1 + rank, world_size
        self._pending: set[bytes] = set()  # added, not yet readable

    def capture(self, batch: Batch) -> tuple[Batch, Features]:
        read, keys = self.take(batch), document_keys(batch)
        if read.absent:
            if any(keys[d] in self._pending for d in read.absent):
                self.flush()
            else:
                self.store.refresh()  # other ranks write, too
            if any(keys[d] in self.store.place for d in read.absent):
                read = self.take(batch)
        self.run_again += len(read.damaged)
        again = sorted(read.absent + read.damaged)
        if not again:
            return batch, read.features
        part, fresh = run_documents(self.target, batch, again)
        if len(again) == len(batch.lengths):
            features = fresh
        else:
            rows = torch.zeros(len(batch.lengths), dtype=torch.bool)
            rows[again] = True
            rows = rows.repeat_interleave(torch.tensor(batch.lengths)).nonzero()[:, 0].to(self.device)
            features = Features(read.features.g.index_copy(0, rows, fresh.g), read.features.f.index_copy(0, rows, fresh.f))
        self._keep(part, fresh, [i for i, d in enumerate(again) if d in set(read.absent)])
        return batch, features

    def _keep(self, batch: Batch, features: Features, documents: list[int]) -> None:
        wanted, keys, row = needed(batch), document_keys(batch), self.store.meta.row_bytes
        size = sum(wanted.g_rows[d] * row["g"] + wanted.f_rows[d] * row["f"] + INDEX_BYTES for d in documents)
        size += 0 if self._writer.open_bytes else HEADER_BYTES
        if not documents or size > self.room:
            return
        self.room -= size
        self._writer.add(batch, features, documents)
        self._pending.update(keys[d] for d in documents)
        if self._writer.open_bytes >= self.shard_bytes:
            self._finish()

    def _finish(self) -> None:
        self._writer.finish(self._number)
        self._number += self._stride

    def flush(self) -> None:
        """Writes out what is pending, and makes it readable. Raises ValueError when the disk is full."""
        if self._writer.open_bytes:
            self._finish()
        self._writer.drain()
        self.store.refresh()
        self._pending.clear()

    def close(self) -> None:
        super().close()
        try:
            self._writer.close()
        finally:
            self._lock.release()


def run_documents(
    target: Target,
    batch: Batch,  # on the host
    documents: list[int],  # ascending; at least one
) -> tuple[Batch, Features]:
    """Some documents of a batch as a batch of their own, and its features."""
    ids, mask = (x.split(batch.lengths) for x in (batch.input_ids, batch.loss_mask))
    lengths = tuple(batch.lengths[d] for d in documents)
    part = Batch(torch.cat([ids[d] for d in documents]), torch.cat([mask[d] for d in documents]), lengths)
    return part, target.capture(part.to(target.device))
