"""Training from a feature store: a reader that is two packs ahead of the training.

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
from functools import cached_property
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor

from fastdraft.batch import Batch, Ends, Features
from fastdraft.data.samples import scan
from fastdraft.features.fp8 import dequantize
from fastdraft.features.meta import DTYPES
from fastdraft.features.store import (
    Store,
    document_checksum,
    document_keys,
    needed,
    row_kinds,
)
from fastdraft.target.source import Source

OnBadShard = Literal["error", "skip"]
AHEAD = 2  # packs read and not yet trained on


def lacking(store: Store, dataset: Dataset) -> tuple[list[int], int]:
    """The documents of a data set with a loss that a store does not have, and how many have a loss."""
    missing, total, first = [], 0, 0
    for ids, mask, lengths in scan(dataset):
        batch = Batch(torch.from_numpy(ids.astype("int64")), torch.from_numpy(mask.copy()), tuple(lengths.tolist()))
        alive = [d for d, rows in enumerate(needed(batch).f_rows) if rows]
        keys = document_keys(batch)
        missing += [first + d for d in alive if keys[d] not in store.place]
        total, first = total + len(alive), first + len(lengths)
    return missing, total


def check_documents(store: Store, sets: list[Dataset], on_bad_shard: OnBadShard) -> list[str]:
    """What to tell the user; raises ValueError when documents are missing that a damaged shard does not excuse."""
    counts = [lacking(store, dataset) for dataset in sets]
    missing, total = sum(len(absent) for absent, _ in counts), sum(of_all for _, of_all in counts)
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


class StoreReader(Source):
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
        self.notes: list[str] = []
        self.skipped = 0  # documents left out, each as often as it was to be trained on
        self.run_again = 0  # documents that a cache has and cannot read, likewise
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: dict[int, Future[Read]] = {}  # by id of the batch
        self._pool: ThreadPoolExecutor | None = None
        self._room = threading.Semaphore(AHEAD)
        self._closing = False

    @cached_property
    def ends(self) -> Ends:
        """The target's, as the store holds them: no layer of the target is loaded."""
        return Ends(*self.store.ends(self.device, self.dtype), self.store.meta.target)

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

    def counts(self) -> dict[str, int]:
        if not self.skipped + self.run_again:
            return {}
        return {"skipped_documents": self.skipped, "damaged_documents": self.run_again}

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
