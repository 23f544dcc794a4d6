"""Whole runs in tests: their losses, acting at a step, and two ranks of a process group."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch

from fastdraft.config import Config
from fastdraft.data.loader import Ahead
from fastdraft.features.store import Store
from fastdraft.metrics import read_metrics
from fastdraft.train import TrainResult, train

CLOCKS = ("time", "tokens_per_s", "data_wait", "checkpoint_wait", "tokens_per_s_gpu", "wait_reduce", "wait_slowest", "mfu")


def losses(run_dir) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in read_metrics(run_dir)]


def at_step(monkeypatch, step: int, act) -> None:
    """Calls act(batches) as the loader hands out optimizer step `step`; what it returns, if anything, is trained on."""
    original, count = Ahead.__next__, itertools.count(1)

    def handed(self):
        batches = original(self)
        return (act(batches) or batches) if next(count) == step else batches

    monkeypatch.setattr(Ahead, "__next__", handed)


def train_until(step: int, config: Config, number: signal.Signals = signal.SIGTERM) -> TrainResult:
    """A run that gets a signal in that step, and ends behind it."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda _: signal.raise_signal(number))
        return train(config)


def by_two_ranks(act, *args, start: str = "fork", seconds: float = 100) -> list[int]:
    """`by_ranks` of two."""
    return by_ranks(2, act, *args, start=start, seconds=seconds)


def by_ranks(world: int, act, *args, start: str = "fork", seconds: float = 100) -> list[int]:
    """Calls act(*args) in `world` processes, as torchrun would start them. Their exit codes, after at most `seconds` each.

    With GPUs they must start by "spawn", since a fork of this process cannot use them.
    """
    ranks = start_ranks(world, act, *args, start=start)
    for process in ranks:
        process.join(seconds)
        process.kill()
    return [process.exitcode for process in ranks]


def start_ranks(world: int, act, *args, start: str = "fork") -> list[multiprocessing.Process]:
    """The processes of `by_ranks`, running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context(start)
    ranks = [context.Process(target=_as_rank, args=(rank, world, port, act, *args)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def _as_rank(rank: int, world: int, port: int, act, *args) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    act(*args)
    torch.distributed.destroy_process_group()


def documents(store: Path) -> dict[bytes, list[torch.Tensor]]:
    """What a feature store has of each document, by its key."""
    found = Store(store)
    return {key: [part.clone() for part in shard.parts(d)] for key, (shard, d) in found.place.items()}


def same_documents(a: Path, b: Path) -> None:
    ours, theirs = documents(a), documents(b)
    assert ours.keys() == theirs.keys() and ours
    for key, parts in ours.items():
        for x, y in zip(parts, theirs[key], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
