"""One way to time GPU work and to write it down.

Providers are interleaved (one run of each, many rounds), each round with the next of the rotated inputs, timed by CUDA
events. The roof of a row is the larger of its FLOPs over the matrix rate and its bytes over the copy rate, both measured
in the same process. A short spin before each run keeps the host's launches out of the time.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch

from bench.sources import source

RESULTS = Path(__file__).parent / "results"


def measure(
    providers: dict[str, Callable[[int], object]],  # name -> what to run, given the round's number
    rounds: int,
) -> dict[str, list[float]]:  # name -> microseconds, ascending
    for run in providers.values():
        for i in range(3):
            run(i)
    events = {name: [] for name in providers}
    for i in range(rounds):
        for name, run in providers.items():
            torch.cuda._sleep(1_000_000)  # about half a millisecond: the host runs ahead, so launches are not what is timed
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(i)
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: sorted(a.elapsed_time(b) * 1e3 for a, b in pairs) for name, pairs in events.items()}


@functools.cache
def roof() -> tuple[float, float]:
    """(bytes per second of a device-to-device copy, bf16 FLOPs per second of an 8192^3 matrix product) of this GPU."""
    source, a = torch.randn(1 << 28, device="cuda"), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    target, out = torch.empty_like(source), torch.empty_like(a)
    times = measure({"copy": lambda _: target.copy_(source), "mm": lambda _: torch.mm(a, a, out=out)}, 20)
    copy_us, mm_us = (times[name][10] for name in ("copy", "mm"))
    return 2 * source.nbytes / copy_us * 1e6, 2 * 8192**3 / mm_us * 1e6


@functools.cache
def sustained_matrix_rate() -> float:
    """bf16 FLOPs per second of 8192^3 products in the second second of nothing else: at the clock that power allows."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    for _ in range(2):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 1:
            for _ in range(20):
                torch.mm(a, a, out=out)
            torch.cuda.synchronize()
            count += 20
        rate = count * 2 * 8192**3 / (time.perf_counter() - start)
    return rate


def append(op: str, row: dict, commit: str | None, results: Path = RESULTS) -> None:
    """Appends a row to results/<op's file>.jsonl behind where and of what it was measured.

    `commit` is for machines without git. A row may carry a `note` that explains it; the gate then lets it be slow.
    """
    if not commit:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip()
    cuda = torch.cuda.is_available()
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "machine": f"{os.cpu_count()} CPU cores {platform.machine()}",
        "torch": torch.__version__,
        "triton": _triton(),
        "source": source(op),
        "op": op,
    }
    results.mkdir(exist_ok=True, parents=True)
    with open(results / f"{op.split('/')[0]}.jsonl", "a") as out:
        out.write(json.dumps(about | row) + "\n")


def _triton() -> str | None:
    """Its version; None where only a CPU is to compute, which needs none."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("triton")
    return None


def record(
    op: str,
    shape: dict[str, int],
    dtype: str,
    times: dict[str, list[float]],
    num_bytes: int,
    flops: int,
    commit: str | None,
) -> None:
    """Prints a line per provider and appends a row each."""
    copy_rate, matrix_rate = roof()
    floor_us = max(num_bytes / copy_rate, flops / matrix_rate) * 1e6
    for provider, us in times.items():
        median = us[len(us) // 2]
        row = {
            "shape": shape,
            "dtype": dtype,
            "provider": provider,
            "us": round(median, 1),
            "p20": round(us[len(us) // 5], 1),
            "p80": round(us[len(us) * 4 // 5], 1),
            "bytes": num_bytes,
            "flops": flops,
            "pct_of_roof": round(100 * floor_us / median, 1),
        }
        append(op, row, commit)
        print(f"{op:24s} {shape!s:60s} {provider:16s} {median:10.1f} us  {row['pct_of_roof']:5.1f} % of roof", flush=True)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every kernel benchmark is asked on the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--commit", help="what to write in the rows where there is no git")
    parser.add_argument("--rounds", type=int, default=15)
    return parser


def run_cases(
    description: str | None,
    bench_case: Callable[..., object],  # (*case, rounds, commit)
    cases: Iterable[tuple],
) -> None:
    """The program of a kernel's benchmark: every case, as the command line says."""
    args = arguments(description).parse_args()
    for case in cases:
        bench_case(*case, args.rounds, args.commit)
