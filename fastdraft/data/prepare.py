"""Tokenise once: data files to a cached Arrow file of samples, split into train and eval.

The cache key is the content of the data files, the tokenizer, the template and every setting that changes a sample, so a
second run, or a change to anything else, reads what is there. Worker processes tokenise; this one reads lines and writes
samples, in the order of the files, whatever the number of workers. What is written gets its final name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastdraft.data.config import DataConfig
from fastdraft.data.conversations import BadLine, Line, expand, parse, read_lines
from fastdraft.data.mask_token import refuse_mask_token
from fastdraft.data.samples import SCHEMA, Sample, flat, record_batch
from fastdraft.data.tokenize import ChatTokenizer, Tokenized

if TYPE_CHECKING:
    from fastdraft.data.stream import Stream

FORMAT = 20  # raised when the same input makes other samples than before
CHUNK_BYTES = 1 << 20  # of input, to a worker at a time
SKIPPED_KEPT = 100  # reasons kept of skipped lines; all are counted
REASONS_SHOWN = 5  # of the kinds of these

# What `Stats.remarks` says of its counts, each behind the number.
REMARKS = {
    "rewritten_conversations": "conversations became one sample per trained turn: the template rewrites earlier turns",
    "long_samples": "samples were longer than max_length",
    "untrained_samples": "samples were left out: no trained token in them",
    "lost_reasoning": "trained turns have reasoning that the chat template does not render: it is not trained",
    "raw_reasoning": (
        "trained turns have reasoning that the chat template cuts: they are trained as the model produced them, "
        "behind the prompt as served"
    ),
    "apart": (
        "trained turns are tokenised apart from their prompts, as they are served, each in a sample of its own: "
        "together their first characters and the prompt's last would make other tokens"
    ),
    "joined": (
        "trained turns begin in the middle of a token, which is not trained: its first characters are the prompt's "
        "(mostly white space at the end of a template's generation prompt)"
    ),
    "endless": (
        "trained turns end without a token that stops the target: the template writes none of the eos ids that its "
        "generation_config.json or its tokenizer names, so no draft learns where an answer ends"
    ),
    "cut": "trained turns were cut by a limit of tokens: what the template writes behind them is not trained",
    "cut_reasoning": (
        "of these turns do not close the block for reasoning that the generation prompt opens: they are trained as "
        "reasoning, behind the prompt as served; if the target answered with reasoning off, say so in "
        "data.chat_template_kwargs (most templates read enable_thinking: false)"
    ),
    "empty_block": (
        "trained turns have no reasoning, and the chat template begins them with an empty block for it, which is "
        "trained as the model's; if the target answered with reasoning off, say so in data.chat_template_kwargs "
        "(most templates read enable_thinking: false), which makes the block the prompt's"
    ),
    "unopened": (
        "trained turns have no reasoning, but the generation prompt opens it: they are trained behind a prompt "
        "that lacks or closes it, which is not served; if the target answered with reasoning off, say so in "
        "data.chat_template_kwargs (most templates read enable_thinking: false)"
    ),
}


@dataclass
class Stats:
    """What came of the data. Counts of a data set with its own eval_paths are those of both together."""

    conversations: int = 0
    turns: int = 0  # trained
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    rewritten_conversations: int = 0  # split into one sample per turn, because the template rewrites earlier turns
    long_samples: int = 0  # longer than max_length: split or truncated
    untrained_samples: int = 0  # left out: no trained token in them
    lost_reasoning: int = 0  # trained turns whose reasoning the template leaves out
    raw_reasoning: int = 0  # trained turns with reasoning that the template cuts, as the model produced them
    apart: int = 0  # trained turns that are tokenised apart from their prompt, as they are served
    joined: int = 0  # trained turns whose first token began before them, which is not trained
    endless: int = 0  # trained turns whose last token is none that stops the target
    cut: int = 0  # trained turns that a limit of tokens ended
    cut_reasoning: int = 0  # of these, without the end of the block for reasoning that the generation prompt opens
    empty_block: int = 0  # trained turns that begin with an empty block for reasoning
    unopened: int = 0  # trained turns without the block that the generation prompt opens
    left_out: dict[str, list] = field(default_factory=dict)  # turns not trained: how many, where the first, by reason
    unread: dict[str, list] = field(default_factory=dict)  # what the template does not render: the same, by its kind
    skipped_lines: int = 0
    skipped: list[str] = field(default_factory=list)  # FILE:LINE: reason, the first SKIPPED_KEPT
    train_samples: int = 0
    eval_samples: int = 0
    after: list[int] = field(default_factory=list)  # of a stream's block: where the next one begins
    from_cache: bool = False

    def add(self, other: Stats) -> None:
        for name, value in asdict(other).items():
            if name not in ("from_cache", "left_out", "unread"):
                setattr(self, name, getattr(self, name) + value)
        del self.skipped[SKIPPED_KEPT:]
        for ours, theirs in ((self.left_out, other.left_out), (self.unread, other.unread)):
            for reason, (count, first) in theirs.items():
                ours.setdefault(reason, [0, first])[0] += count

    def count(self, done: Tokenized) -> None:
        """Count one conversation, but not its tokens."""
        self.conversations += 1
        self.turns += done.turns
        self.samples += len(done.samples)
        self.rewritten_conversations += done.rewritten
        self.long_samples += done.too_long
        self.untrained_samples += done.untrained
        for name in REMARKS.keys() & vars(done).keys():  # of trained turns
            setattr(self, name, getattr(self, name) + getattr(done, name))
        for counted, found in ((self.left_out, done.left_out), (self.unread, done.unread)):
            for where, reason in found:
                counted.setdefault(reason, [0, where])[0] += 1

    def skip(self, error: BadLine) -> None:
        self.skipped_lines += 1
        self.skipped.append(str(error))

    def lines(self) -> list[str]:
        """The statistics as sentences for people."""
        said = [
            f"{self.conversations:,} conversations, {self.samples:,} samples ({self.train_samples:,} train, "
            f"{self.eval_samples:,} eval), {self.tokens:,} tokens, {self.trained_tokens:,} of them trained "
            f"({self.trained_tokens / max(self.tokens, 1):.0%}), in {self.turns:,} turns"
        ]
        return said + self.remarks()

    def remarks(self) -> list[str]:
        """What is not trained, or not as the template renders it, by reason; and what it does not render."""
        said = []
        for name, what in REMARKS.items():
            if count := getattr(self, name):
                said.append(f"{count:,} {what}")
        for reason, (count, first) in self.left_out.items():
            said.append(f"{count:,} assistant turns are not trained: {reason}; the first: {first}")
        for kind, (count, first) in self.unread.items():
            said.append(f"{count:,} {kind} are in no prompt: the chat template does not render them; the first: {first}")
        if self.skipped_lines:
            said.append(f"{self.skipped_lines:,} malformed lines were skipped")
            reasons = Counter(_kind_of(line) for line in self.skipped)
            firsts = {_kind_of(line): line for line in reversed(self.skipped)}
            said += [f"  {count:,} like {firsts[kind]}" for kind, count in reasons.most_common(REASONS_SHOWN)]
        return said


def _kind_of(skipped: str) -> str:
    """The reason of FILE:LINE: REASON, without what differs from line to line."""
    reason = re.sub(r"^.*?:\d+: ", "", skipped)
    return re.sub(r"\d+|'[^']*'|: .*", "", reason)


class Prepared(NamedTuple):
    train: Dataset  # of a stream, a sample
    eval: Dataset  # empty only where `none_held_out` says why
    stats: Stats
    stream: Stream | None
    template_date: str | None  # what the chat template writes as today; None: it writes no date
    none_held_out: str | None = None  # why `eval` is empty, and what to do; None: it is not

    def lines(self) -> list[str]:
        """The statistics as sentences for people."""
        begin = ["streaming; of a sample of the data:"] if self.stream else []
        lines = [*begin, *self.stats.lines(), *date_lines(self.template_date)]
        if self.none_held_out is not None:
            lines.append(f"nothing is held out, so no tau_sim is measured: {self.none_held_out}")
        return lines


def date_lines(template_date: str | None) -> list[str]:
    if template_date is None:
        return []
    return [f"the chat template writes today's date: it is told {template_date}, which data.template_date sets"]


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None = None,  # the target's: token ids are checked against it
    stop_ids: Collection[int] = (),  # of the target, as `ChatTokenizer` takes them
    mask_token: int | None = None,  # of the draft: no document may have it
) -> Prepared:
    """Train and eval samples of the configured files, from the cache if they are there.

    Every process of a job may call this: one works, the others wait for it. ValueError: a missing, unreadable or empty
    file; a bad line (unless on_bad_line is skip); a tokenizer or template that cannot make a mask; nothing to train on; a
    document with the mask token; a damaged cache. OSError when the cache cannot be written.
    """
    train_files = expand(config.paths, setting="data.paths")
    eval_files = expand(config.eval_paths, setting="data.eval_paths")
    chat = chat_tokenizer(config, tokenizer, vocab_size, stop_ids)
    parts = [tokenized(files, config, chat) for files in (train_files, eval_files) if files]
    if mask_token is not None:
        for files, (samples, _) in zip((train_files, eval_files), parts, strict=False):
            refuse_mask_token(samples, mask_token, (line for file in files for line in read_lines(file)))
    return divide(parts, config, chat.template_date)


def find_prepared(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None = None,
    stop_ids: Collection[int] = (),
) -> Prepared | None:
    """`prepare` of what is in the cache, without the look for a mask token. None: a file would have to be tokenised. Errors
    as `prepare`'s."""
    chat = chat_tokenizer(config, tokenizer, vocab_size, stop_ids)
    parts = []
    for paths, setting in ((config.paths, "data.paths"), (config.eval_paths, "data.eval_paths")):
        files = expand(paths, setting=setting)
        if files and not _samples_folder(files, config, chat).is_dir():
            return None
        parts += [_read(_samples_folder(files, config, chat))] if files else []
    return divide(parts, config, chat.template_date)


def divide(
    parts: list[tuple[Dataset, Stats]],  # what became of data.paths and, if given, of data.eval_paths
    config: DataConfig,
    template_date: str | None,
    stream: Stream | None = None,
) -> Prepared:
    """Train and eval sets. ValueError: nothing to train on."""
    stats = Stats(from_cache=all(part.from_cache for _, part in parts))
    for _, part in parts:
        stats.add(part)
    train = parts[0][0]
    if not len(train):
        skipped = f"; {stats.skipped_lines} malformed lines were skipped, first {stats.skipped[0]}" if stats.skipped else ""
        for reason, (count, first) in stats.left_out.items():
            skipped += f"; {count} assistant turns are not trained: {reason}; the first: {first}"
        raise ValueError(
            f"{', '.join(config.paths)}: {stats.conversations} conversations, but no trained token in them: is there an "
            f"assistant turn, does the loss_mask have a 1, and does max_length {config.max_length} reach it?{skipped}"
        )
    train, held_out = (train, parts[1][0]) if config.eval_paths else _split(train, config)
    if config.eval_paths and not len(held_out):
        raise ValueError(f"{', '.join(config.eval_paths)}: no trained token in them; eval data needs assistant turns too")
    stats.train_samples, stats.eval_samples = len(train), len(held_out)
    return Prepared(train, held_out, stats, stream, template_date, None if len(held_out) else _why_none(train, config))


def first_samples(
    config: DataConfig,
    chat: ChatTokenizer,
    stats: Stats,  # counts what is read
) -> Iterator[Sample]:
    """The samples of data.paths one by one as they are read, with no cache: for a preview. Errors as `prepare`'s."""
    lines = (line for path in expand(config.paths, config.streaming, "data.paths") for line in read_lines(path))
    return samples_of(lines, chat, config.on_bad_line == "skip", stats)


def samples_of(lines: Iterable[Line], chat: ChatTokenizer, skip: bool, stats: Stats) -> Iterator[Sample]:
    """Counts what it reads in `stats`. A bad line is counted where it is to be skipped, and raised otherwise."""
    for line in lines:
        try:
            done = chat(parse(line))
        except BadLine as error:
            if not skip:
                raise
            stats.skip(error)
        else:
            stats.count(done)
            yield from done.samples


def read_template(config: DataConfig) -> str | None:
    """The text of data.chat_template, None when the tokenizer's own is to be used. ValueError when it cannot be read."""
    if config.chat_template is None:
        return None
    try:
        text = Path(config.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template {config.chat_template}: cannot be read: {error}") from error
    try:
        found = json.loads(text)
    except ValueError:
        return text
    if isinstance(found, dict) and isinstance(found.get("chat_template"), str):  # a processor's chat_template.json
        return found["chat_template"]
    raise ValueError(f"data.chat_template {config.chat_template}: JSON without a text 'chat_template'; name a Jinja file")


def chat_tokenizer(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None, stop_ids: Collection[int] = ()
) -> ChatTokenizer:
    return ChatTokenizer(
        tokenizer,
        max_length=config.max_length,
        on_too_long=config.on_too_long,
        train_on=config.train_on,
        chat_template=read_template(config),
        chat_template_kwargs=config.chat_template_kwargs,
        template_date=config.template_date,
        vocab_size=vocab_size,
        stop_ids=stop_ids,
    )


def held_out_below(config: DataConfig) -> int:
    """Conversations with a lower hash are held out, wherever they are: data.eval_fraction of all."""
    return 0 if config.eval_paths else int(config.eval_fraction * 2**64)


def _split(data: Dataset, config: DataConfig) -> tuple[Dataset, Dataset]:
    """Train and eval by conversation hash: all samples of a conversation, and its copies, fall on the same side.

    Each side gets at least one conversation if there are two, however small the data; not of a stream's sample.
    """
    keys = data.select_columns("conversation").with_format("arrow")[:]["conversation"].to_numpy()
    held_out = keys < np.uint64(held_out_below(config))
    if config.eval_fraction and keys.min() != keys.max() and not config.streaming:
        if not held_out.any():
            held_out = keys == keys.min()
        elif held_out.all():
            held_out = keys != keys.max()
    elif held_out.all():
        held_out = np.zeros(len(keys), dtype=bool)
    return tuple(data.select(np.flatnonzero(rows), keep_in_memory=True) for rows in (~held_out, held_out))


def _why_none(train: Dataset, config: DataConfig) -> str:
    """Why no conversation is held out, and what to do, for a user who may have asked for some."""
    if not config.eval_fraction:
        return "data.eval_fraction is 0; raise it, or name conversations in data.eval_paths"
    asked = f"data.eval_fraction is {config.eval_fraction:g}"
    if config.streaming:
        count = len(train.unique("conversation"))
        return (
            f"{asked}, but by it the {count:,} conversations that were read first cannot be parted; read more of them with "
            "data.vocab_samples, or name conversations in data.eval_paths"
        )
    return (
        f"{asked}, but the data have one conversation with a trained token, which is trained on; add others, or name "
        "conversations in data.eval_paths"
    )


def tokenized(files: list[str], config: DataConfig, chat: ChatTokenizer) -> tuple[Dataset, Stats]:
    """All samples of the files, tokenised now or before."""
    workers = config.num_workers
    if workers is None:
        workers = (os.cpu_count() or 1) if sum(map(os.path.getsize, files)) > 32 * 2**20 else 0

    def write(file: Path) -> Stats:
        with mapper(chat, config.on_bad_line == "skip", workers) as mapped:
            return write_samples((line for path in files for line in read_lines(path)), mapped, file)

    return cached(_samples_folder(files, config, chat), write)


def _samples_folder(files: list[str], config: DataConfig, chat: ChatTokenizer) -> Path:
    """Where the cache keeps the samples of files, once it has them."""
    key = settings_key(config, chat)
    for file in files:
        with open(file, "rb") as opened:
            key.update(hashlib.file_digest(opened, hashlib.blake2b).digest())
    return cache_dir(config) / f"samples-{key.hexdigest()}"


def cache_dir(config: DataConfig) -> Path:
    return Path(config.cache_dir or Path.home() / ".cache" / "fastdraft").expanduser()


def cached(folder: Path, write: Callable[[Path], Stats], lock: Path | None = None) -> tuple[Dataset, Stats]:
    """The samples in a folder of the cache. If it is not there, `write` makes their file, and the folder gets its name when
    it is complete; of several processes one does, the others wait."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock or f"{folder}.lock"):
            from_cache = folder.is_dir()
            if not from_cache:
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
                partial.mkdir()
                try:
                    stats = write(partial / "samples.arrow")
                    (partial / "stats.json").write_text(json.dumps(asdict(stats)), encoding="utf-8")
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            dataset, stats = _read(folder)
    except OSError as error:
        said = f"cannot write the token cache under {folder.parent}: {error.strerror or error}; name another data.cache_dir"
        raise OSError(error.errno, said) from error
    stats.from_cache = from_cache
    return dataset, stats


def _read(folder: Path) -> tuple[Dataset, Stats]:
    try:
        stats = Stats(**json.loads((folder / "stats.json").read_text(encoding="utf-8")))
        dataset = Dataset.from_file(str(folder / "samples.arrow"))
        if len(dataset) != stats.samples:  # Arrow takes a stream cut between two batches for a shorter one
            raise ValueError(f"{len(dataset)} of {stats.samples} samples are there")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"the token cache {folder} is damaged: {error}; delete it, it will be made again") from error
    return dataset, stats


def settings_key(config: DataConfig, chat: ChatTokenizer) -> hashlib.blake2b:
    """A hash begun with everything but the data that makes the samples what they are."""
    settings = {
        "format": FORMAT,
        "versions": [transformers.__version__, tokenizers.__version__],
        "tokenizer": chat.backend.to_str() if chat.backend else chat.name,
        "templates": chat.templates,
        "template_kwargs": chat.kwargs,
        "vocab_size": chat.vocab_size,
        "stops": sorted(chat.stops),
        "settings": config.model_dump(include={"max_length", "on_too_long", "on_bad_line", "train_on"}),
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode("utf-8"), digest_size=16)


def write_samples(lines: Iterable[Line], mapped: Mapped, file: Path, lowest_key: int = 0) -> Stats:
    """Tokenise lines into one Arrow stream, without conversations that have a hash below `lowest_key`.

    Bad lines raise or are counted, in order.
    """
    stats = Stats()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for batch, part in mapped(_chunks(lines)):
            if lowest_key:
                batch = batch.filter(pc.greater_equal(batch["conversation"], pa.scalar(lowest_key, pa.uint64())))
                part.samples = batch.num_rows
            stats.add(part)
            if batch.num_rows:
                writer.write_batch(batch)
    return stats


def _chunks(lines: Iterable[Line]) -> Iterator[list[Line]]:
    chunk, size = [], 0
    for line in lines:
        chunk.append(line)
        size += line.num_bytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


Done = tuple[pa.RecordBatch, Stats]
Mapped = Callable[[Iterator[list[Line]]], Iterator[Done]]


def _tokenize_chunk(chat: ChatTokenizer, skip: bool, chunk: list[Line]) -> Done:
    stats = Stats()
    samples = list(samples_of(chunk, chat, skip, stats))
    batch = record_batch(samples)
    ids, mask, _ = flat(pa.Table.from_batches([batch]))
    stats.samples, stats.tokens, stats.trained_tokens = len(samples), len(ids), int(mask.sum())
    return batch, stats


@contextmanager
def mapper(chat: ChatTokenizer, skip: bool, workers: int) -> Iterator[Mapped]:
    """A function that maps chunks to what came of them, in order, with a bounded number of chunks in memory."""
    if not workers:
        yield lambda chunks: (_tokenize_chunk(chat, skip, chunk) for chunk in chunks)
        return
    # Not forked from this process, which may have threads and a GPU, and not spawned: the tokenizer goes through a pipe
    # that a new process reads only after its imports, so spawned workers would import one after the other.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (chat, skip))

    def mapped(chunks: Iterator[list[Line]]) -> Iterator[Done]:
        waiting = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_in_worker, chunk))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"one of {workers} worker processes that tokenise died, perhaps killed for want of memory: "
                "lower data.num_workers"
            ) from error

    try:
        yield mapped
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[ChatTokenizer, bool] | None = None  # of this worker process


def _start_worker(chat: ChatTokenizer, skip: bool) -> None:
    global _worker
    _worker = chat, skip
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; whoever started us decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, workers of a run that is killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _in_worker(chunk: list[Line]) -> Done:
    return _tokenize_chunk(*_worker, chunk)
