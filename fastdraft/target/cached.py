"""A feature store that fills itself: the target runs over documents that it lacks, while there is room on the disk.

# N packed tokens, D documents
"""

from __future__ import annotations

import torch

from fastdraft.batch import Batch, Features
from fastdraft.features.store import (
    HEADER_BYTES,
    INDEX_BYTES,
    SHARD_BYTES,
    Store,
    document_keys,
    list_shards,
    needed,
    shard_number,
)
from fastdraft.features.writer import ShardWriter
from fastdraft.files import hold
from fastdraft.target.hf import Target
from fastdraft.target.source import ends_of, runs_apart
from fastdraft.target.stored import StoreReader


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
    ):
        super().__init__(store, target.device)
        # The live target's ends, not the store's copies of them. Rank 0 has just started or checked the store with its
        # target's fingerprint, which takes values of every weight; the others' targets are their own, or parts of one.
        self.ends = ends_of(target, store.meta.target if rank == 0 or target.holders.size > 1 else None)
        self.notes = [f"{reason}; its documents are run again" for reason in store.damaged.values()] + runs_apart(target)
        ends = (store.folder / "target.safetensors").stat().st_size
        if max_bytes <= ends:
            raise ValueError(
                f"features.max_gib is {max_bytes:,} bytes, of which {store.folder}/target.safetensors, the target's "
                f"embedding and head, takes {ends:,}: nothing is left for features; raise it"
            )
        taken = f"another run is filling {store.folder}; give this one a features.path of its own"
        self._lock = hold(store.folder / ".cache.lock", taken) if rank == 0 else None
        self.target = target
        self.room = (max_bytes - store.num_bytes) // world_size
        self._writer = ShardWriter(store.folder, store.meta)
        numbers = [shard_number(path) for path in list_shards(store.folder)]
        self._number, self._stride = max(numbers, default=-1) + 1 + rank, world_size
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

    def meet(self) -> None:
        self.target.meet()

    def _keep(self, batch: Batch, features: Features, documents: list[int]) -> None:
        wanted, keys, row = needed(batch), document_keys(batch), self.store.meta.row_bytes
        size = sum(wanted.g_rows[d] * row["g"] + wanted.f_rows[d] * row["f"] + INDEX_BYTES for d in documents)
        size += 0 if self._writer.open_bytes else HEADER_BYTES
        if not documents or size > self.room:
            return
        self.room -= size
        self._writer.add(batch, features, documents)
        self._pending.update(keys[d] for d in documents)
        if self._writer.open_bytes >= SHARD_BYTES:
            self._finish()

    def _finish(self) -> None:
        self._writer.finish(self._number)
        self._number += self._stride

    def flush(self) -> None:
        """Writes out what is pending, and makes it readable. Raises ValueError when the disk is full."""
        if self._writer.open_bytes:
            self._finish()
        self._writer.wait()
        self.store.refresh()
        self._pending.clear()

    def close(self) -> None:
        super().close()
        try:
            self._writer.close()
        finally:
            if self._lock is not None:
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
