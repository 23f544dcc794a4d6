"""Features of packs to shards, beside the target: threads copy, check, hash and write while the next packs run.

On a GPU rows leave through pinned memory on a stream of their own. Two finished shards are written at a time, so that one
is hashed while the disk syncs the other; a third waits with its caller. Host memory: three shards at most.

# N packed tokens, D documents
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastdraft.batch import Batch, Features
from fastdraft.features.fp8 import quantize
from fastdraft.features.meta import DTYPES, Meta
from fastdraft.features.store import PackRows, document_keys, needed, row_kinds, write_shard


@dataclass
class _Open:
    """A shard being filled."""

    packs: list[PackRows] = field(default_factory=list)
    copied: torch.cuda.Event | None = None  # when the last rows are on the host
    num_bytes: int = 0


class ShardWriter:
    """`add` packs, `finish` a shard, `close` at the end; also a context manager. Each raises ValueError when a shard
    that was finished before could not be written: the disk is full, or features are not finite."""

    def __init__(self, folder: Path, meta: Meta):
        self.folder, self.meta = folder, meta
        self._open = _Open()
        self._pool = ThreadPoolExecutor(2, "feature-writer")
        self._writing: deque[Future[None]] = deque()
        self._stream: torch.cuda.Stream | None = None

    @property
    def open_bytes(self) -> int:
        """Of the rows added since the last `finish`."""
        return self._open.num_bytes

    def add(
        self,
        batch: Batch,  # on the host
        features: Features,  # of the whole batch, on the target's device
        documents: Sequence[int],  # those of the batch to keep
    ) -> None:
        """Takes the rows of some documents; does not wait for the device."""
        self.wait(most=2)
        wanted, keys = needed(batch), document_keys(batch)
        keep = torch.zeros(len(batch.lengths), dtype=torch.bool)
        keep[list(documents)] = True
        tensors, probes = {}, {}
        for name, x, index, rows in (
            ("g", features.g, wanted.g_index, wanted.g_rows),
            ("f", features.f, wanted.f_index, wanted.f_rows),
        ):
            if len(documents) < len(batch.lengths):
                index = index[keep.repeat_interleave(torch.tensor(rows))]
            kept = x.index_select(0, index.to(x.device, non_blocking=True))
            if self.meta.dtype == "fp8":
                kept, scale = quantize(kept, self.meta.widths[name])
                probes[name] = tensors[f"{name}_scale"] = self._to_host(scale)
            else:
                probes[name] = self._to_host(kept.sum(1, keepdim=True, dtype=torch.float32))
            tensors[name] = self._to_host(kept.to(DTYPES[self.meta.dtype]))
        kept_documents = sorted(documents)
        self._open.packs.append(
            PackRows(
                [keys[d] for d in kept_documents],
                [(wanted.g_rows[d], wanted.f_rows[d]) for d in kept_documents],
                {name: tensors[name] for name in row_kinds(self.meta)},
                probes,
            )
        )
        self._open.num_bytes += sum(x.numel() * x.element_size() for x in tensors.values())

    def _to_host(self, x: Tensor) -> Tensor:
        """On a GPU the copy is under way; `_Open.copied` says when it is there."""
        if not x.is_cuda:
            return x
        self._stream = self._stream or torch.cuda.Stream(x.device)
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self._stream)
        self._open.copied = self._stream.record_event()
        return host

    def finish(self, number: int, then: Callable[[Path], None] = lambda path: None) -> None:
        """Hands what was added to a thread as shard `number`; `then` is called there once it is on the disk."""
        self.wait(most=1)
        self._writing.append(self._pool.submit(self._write, number, self._open, then))
        self._open = _Open()

    def close(self) -> None:
        """Waits until everything is written."""
        self._pool.shutdown()
        self.wait()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()

    def wait(self, most: int = 0) -> None:
        """Until no more than `most` finished shards are unwritten. Raises what went wrong with those that are done."""
        while len(self._writing) > most or (self._writing and self._writing[0].done()):
            try:
                self._writing.popleft().result()
            except OSError as error:
                raise ValueError(
                    f"features could not be written to {self.folder} ({error.strerror or error}); what is there is whole: "
                    "free some space and run the same command again"
                ) from error

    def _write(self, number: int, shard: _Open, then: Callable[[Path], None]) -> None:
        if shard.copied is not None:
            shard.copied.synchronize()
        then(write_shard(self.folder, number, self.meta, shard.packs))
