"""Data that is read and tokenised while it trains, because it fits no disk or is not to be waited for.

A stream is cut into blocks of data.block_conversations lines. A block is tokenised into the cache ahead of its turn,
shuffled and packed like an epoch of data that is known whole (`data/loader.py`), and deleted two blocks later. So the order
depends on the seed alone, every rank and every start of a run makes the same blocks, and a place in the stream is four
numbers: epoch, file, and lines and bytes read of it. Ranks that see one cache folder tokenise each block once.

The order of files is drawn anew each epoch; lines mix within their block only, so sorted files want shuffling before.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

import filelock
import fsspec
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastdraft.data.config import DataConfig
from fastdraft.data.conversations import Line, expand, read_lines
from fastdraft.data.mask_token import refuse_mask_token
from fastdraft.data.prepare import (
    Mapped,
    Prepared,
    Stats,
    cache_dir,
    cached,
    chat_tokenizer,
    divide,
    held_out_below,
    mapper,
    settings_key,
    tokenized,
    write_samples,
)
from fastdraft.data.tokenize import ChatTokenizer

Place = tuple[int, ...]  # epoch, file of its order, lines and bytes of that file that are read


def open_stream(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None = None,  # as for `prepare`
    stop_ids: Collection[int] = (),  # as for `prepare`
    machine_share: int = 1,  # processes that share this machine's cores, each with a stream of its own
    mask_token: int | None = None,  # as for `prepare`
) -> Prepared:
    """The stream of data.paths, and as train and eval sets a sample of it (`Stream.sample`).

    Held out is what `prepare` would hold out, as far as it is in the sample; the stream leaves all of it out. ValueError as
    `prepare`'s.
    """
    chat = chat_tokenizer(config, tokenizer, vocab_size, stop_ids)
    stream = Stream(config, chat, machine_share, mask_token)
    with ExitStack() as undo:  # its workers end with it, also where the disk is full
        undo.callback(stream.close)
        parts = [stream.sample()]
        if config.eval_paths:
            files = expand(config.eval_paths, setting="data.eval_paths")
            parts.append(tokenized(files, config, chat))
            if mask_token is not None:
                refuse_mask_token(parts[1][0], mask_token, (line for file in files for line in read_lines(file)))
        prepared = divide(parts, config, chat.template_date, stream)
        undo.pop_all()
    return prepared


class Stream:
    """Blocks of a stream by their place, the next one made in the background. `close` stops that."""

    first: Place = (0, 0, 0, 0)

    def __init__(
        self, config: DataConfig, chat: ChatTokenizer, machine_share: int = 1, mask_token: int | None = None
    ) -> None:
        self.files = expand(config.paths, urls=True, setting="data.paths")
        self._config, self._chat, self._lowest_key = config, chat, held_out_below(config)
        self._mask_token = mask_token
        workers = max((os.cpu_count() or 1) // machine_share, 1)
        self._num_workers = workers if config.num_workers is None else config.num_workers
        key = settings_key(config, chat)
        marks = [fsspec.core.url_to_fs(file)[0].ukey(file) for file in self.files]  # changes with a file's size or time
        key.update(json.dumps([marks, config.seed, config.block_conversations, self._lowest_key]).encode())
        self._name = str(cache_dir(config) / f"stream-{key.hexdigest()}")
        self._lock = Path(f"{self._name}.lock")
        self._background = ThreadPoolExecutor(1, "fastdraft-stream")
        self._coming: dict[Place, Future[tuple[Dataset, Place, list[Path]]]] = {}
        self._before: list[list[Path]] = []  # folders of the last blocks given, and of empty ones before each
        self._closed = threading.Event()
        self._workers = ExitStack()
        self._mapped: Mapped | None = None

    def block(self, place: Place) -> tuple[Dataset, Place]:
        """The samples of the block that begins there, at least one, and where the next begins. Starts making that one.

        An error closes the stream. ValueError: a place that is not in the data, an unreadable file, a bad line (unless
        on_bad_line is skip), the mask token in a document.
        """
        if len(place) != 4 or min(place) < 0 or place[1] >= len(self.files):
            raise ValueError(f"place {list(place)} is not in a stream of {len(self.files)} files")
        coming = self._coming.pop(place, None) or self._background.submit(self._make, place)
        try:
            dataset, after, folders = coming.result()
        except BaseException:
            self.close()  # whoever asked may not hold it yet
            raise
        for other in self._coming.values():
            other.cancel()
        self._coming = {after: self._background.submit(self._make, after)}
        for done in self._before[:-1]:
            self._background.submit(self._delete, done)
        self._before = [*self._before[-1:], folders]
        return dataset, after

    def close(self) -> None:
        self._closed.set()
        self._background.shutdown(cancel_futures=True)
        self._workers.close()

    def sample(self) -> tuple[Dataset, Stats]:
        """The first data.vocab_samples conversations, as many of each file."""
        each = -(-self._config.vocab_samples // len(self.files))

        def lines() -> Iterator[Line]:
            return (line for file in self.files for line in islice(read_lines(file), each))

        folder = Path(f"{self._name}-sample-{self._config.vocab_samples}")
        samples, stats = cached(folder, lambda file: write_samples(lines(), self._tokenise(), file), self._lock)
        if self._mask_token is not None:
            refuse_mask_token(samples, self._mask_token, lines())
        return samples, stats

    def _make(self, place: Place) -> tuple[Dataset, Place, list[Path]]:
        at, folders = place, []
        while at[0] < place[0] + 2:  # a whole epoch at least
            folders.append(Path(f"{self._name}-{'-'.join(map(str, at))}"))
            dataset, stats = cached(folders[-1], partial(self._write, at), self._lock)
            if self._mask_token is not None:
                lines = (line for _, line in self._lines(at))
                refuse_mask_token(dataset, self._mask_token, islice(lines, self._config.block_conversations))
            at = tuple(stats.after)
            if len(dataset):
                return dataset, at, folders
        raise ValueError(
            f"{', '.join(self._config.paths)}: no conversation to train on: all that train are held out; "
            f"give more data, or lower data.eval_fraction"
        )

    def _write(self, place: Place, file: Path) -> Stats:
        after = [place[0] + 1, 0, 0, 0]

        def lines() -> Iterator[Line]:
            for count, (i, line) in enumerate(self._lines(place), 1):
                if self._closed.is_set():
                    raise ValueError("the stream was closed")
                yield line
                if count == self._config.block_conversations:
                    after[:] = [place[0], i, *line.place]
                    return

        stats = write_samples(lines(), self._tokenise(), file, self._lowest_key)
        stats.after = after
        return stats

    def _delete(self, folders: list[Path]) -> None:
        with filelock.FileLock(self._lock):  # another run of the same stream may be opening one
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def _lines(self, place: Place) -> Iterator[tuple[int, Line]]:
        """Lines from a place to the end of its epoch, with the number of their file in the epoch's order."""
        epoch, first, *read = place
        order = np.random.default_rng([self._config.seed, epoch]).permutation(len(self.files))
        for i in range(first, len(order)):
            for line in read_lines(self.files[order[i]], tuple(read) if i == first else (0, 0)):
                yield i, line

    def _tokenise(self) -> Mapped:
        if self._mapped is None:
            made = mapper(self._chat, self._config.on_bad_line == "skip", self._num_workers)
            self._mapped = self._workers.enter_context(made)
        return self._mapped
