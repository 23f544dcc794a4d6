"""How fast data is prepared: python -m bench.preparation --tokenizer DIR [--data FILE.jsonl] [--workers 0 2 8]

Appends rows to bench/results/data.jsonl. Without --data, chats are made of words of Python's documentation, 1 to 4 turns.
Nothing is read from an earlier run's cache. CPU only; `load` is what the machine had to do besides, in processes waiting.

  data/tokenise   tokens/s of `prepare`, JSONL to Arrow on the disk, by worker processes (0: in this one) once they run; and
                  tokens per second of CPU time of this process, which with workers only reads lines and writes samples
  data/vocab      tokens/s counted for the vocabulary map, memory-mapped, trained or not
  data/pack       samples/s packed best-fit, and how full the packs are
  data/loader     tokens/s of batches that the loader hands out; survey: tokens/s of its one pass over the data at the start
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from datasets import concatenate_datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.timing import RESULTS, append
from fastdraft.data.config import DataConfig
from fastdraft.data.conversations import read_lines
from fastdraft.data.loader import Loader
from fastdraft.data.pack import pack
from fastdraft.data.prepare import cached, chat_tokenizer, mapper, write_samples
from fastdraft.data.vocab import token_counts

PACK_TOKENS = 4096


def make_chats(path: Path, count: int) -> None:
    words = " ".join(" ".join(topics.values()).split()).split(" ")
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            messages = []
            for role, mean in (("user", 50), ("assistant", 200)) * rng.choice([1, 1, 2, 3, 4]):
                size = min(max(3, int(rng.expovariate(1 / mean))), 4000)
                at = rng.randrange(len(words) - size)
                messages.append({"role": role, "content": " ".join(words[at : at + size])})
            file.write(json.dumps({"messages": messages}) + "\n")


def tokenise(data: Path, tokenizer: PreTrainedTokenizerBase, workers: int, folder: Path) -> tuple[Any, dict]:
    """The data set, and the row: from when all workers have had work, because starting them takes seconds."""
    config = DataConfig(paths=[str(data)], max_length=PACK_TOKENS)
    chat, done = chat_tokenizer(config, tokenizer, len(tokenizer)), []

    def write(file: Path):
        with mapper(chat, False, workers) as mapped:

            def timed(chunks):
                for made in mapped(chunks):
                    done.append((time.perf_counter(), time.process_time(), made[1].tokens))
                    yield made

            return write_samples(read_lines(str(data)), timed, file)

    dataset, stats = cached(folder / f"workers-{workers}", write)
    warm = max(4 * workers, 1)  # chunks in flight when the first is back
    if len(done) <= warm:
        raise ValueError(f"{data} is read in {len(done)} chunks; {workers} workers are timed after {warm}: give more data")
    wall, cpu, tokens = done[-1][0] - done[warm - 1][0], done[-1][1] - done[warm - 1][1], sum(n for *_, n in done[warm:])
    speeds = {"tokens_per_s": round(tokens / wall), "tokens_per_cpu_s_here": round(tokens / cpu)}
    return dataset, {"workers": workers, "tokens": stats.tokens} | speeds


def timed(run) -> tuple[float, Any]:
    """Least seconds of three runs, and what it gave."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--tokenizer", required=True, help="a folder or hub name")
    args.add_argument("--data", type=Path, help="JSONL of chats")
    args.add_argument("--chats", type=int, default=30_000, help="to make, without --data")
    args.add_argument("--workers", type=int, nargs="+", default=[0, os.cpu_count() or 1])
    args.add_argument("--commit", help="for machines without git")
    args.add_argument("--results", type=Path, default=RESULTS)
    args = args.parse_args()
    load = round(os.getloadavg()[0], 1)  # of the minute before
    about = {"tokenizer": Path(args.tokenizer).name, "data": args.data.name if args.data else "made"}

    def write(op: str, row: dict) -> None:
        print(op, row, flush=True)
        append(op, about | row | {"load": load}, args.commit, args.results)

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or Path(folder) / "chats.jsonl"
        if not args.data:
            make_chats(data, args.chats)
        for workers in args.workers:
            dataset, row = tokenise(data, tokenizer, workers, Path(folder))
            write("data/tokenise", row)
        tokens = row["tokens"]
        many = concatenate_datasets([dataset] * -(-100_000_000 // tokens))  # the same file, read again: no disk is timed
        seconds, _ = timed(lambda: token_counts(many, len(tokenizer)))
        times = len(many) // len(dataset)
        write("data/vocab", {"tokens": times * tokens, "tokens_per_s": round(times * tokens / seconds)})
        lengths = np.random.default_rng(0).lognormal(6.5, 0.9, 1_000_000).clip(3, PACK_TOKENS).astype(np.int64)
        seconds, packs = timed(lambda: pack(lengths, PACK_TOKENS))
        full = round(lengths.sum() / (len(packs) * PACK_TOKENS), 5)
        write("data/pack", {"samples": len(lengths), "samples_per_s": round(len(lengths) / seconds), "full": full})
        survey, loader = timed(lambda: Loader(dataset, PACK_TOKENS, 8))
        steps = loader.num_steps(1)
        seconds, given = timed(lambda: sum(b.num_tokens for step in itertools.islice(loader, steps) for b in step))
        row = {"tokens_per_s": round(given / seconds), "survey_tokens_per_s": round(tokens / survey)}
        write("data/loader", row | {"full": round(loader.utilisation, 5)})


if __name__ == "__main__":
    main()
