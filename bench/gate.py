"""Are the recorded rows those of today's source, and none slower than before? python -m bench.gate; no GPU is needed.

It fails, naming each, when

- a Triton kernel has no benchmark in bench/kernels,
- an op (each kernel's, and the whole steps `step` and `block_step`) has no row, or none of its kernel in csrc, or its
  newest row is of other source than today's (`bench.sources`),
- the tests that need a GPU (`bench.gpu_tests`) have no row, or their newest is of other source or has a failed test,
- a newest row is more than 5 % slower than the row before it of the same op, shape, dtype and GPU, or is of a run that
  failed, unless it carries a `note` that explains it.

What no GPU has measured yet may wait, in the open: a line of bench/results/waiting.jsonl names the op, the hash of exactly
the source that waits, and why. The gate prints these lines each time, and they end with the next change of that source.

Only our own rows are judged: provider fastdraft, which is Triton's kernel or the engine, and cuda, the kernel in csrc of an
op that has one there. To make them fresh, run the benchmark again on a GPU (csrc built) and commit the rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.sources import ROOT, source

SLOWER = 1.05
STEPS = {"step": "eagle3", "block_step": "dflash"}  # the method whose whole step an op is


def load(path: Path) -> list[dict]:
    """Rows of a file in the order they were written. ValueError names the line that is none."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return rows


def our_providers(op: str, root: Path = ROOT) -> tuple[str, ...]:
    """Providers of an op that are this repository's: `cuda` while csrc has a kernel of it."""
    return ("fastdraft", "cuda") if any(root.glob(f"csrc/{op.split('/')[0]}*.cu")) else ("fastdraft",)


def key(row: dict) -> tuple[str, ...]:
    """What two rows have in common that may be compared."""
    return row["op"], json.dumps(row["shape"], sort_keys=True), row["dtype"], str(row["gpu"]), row["provider"]


def time_us(row: dict) -> float:
    return next(row[name] for name in ("us_per_token", "us_per_row", "us") if name in row)


def newest(rows: list[dict]) -> dict[tuple[str, ...], list[dict]]:  # key -> its last two rows or one
    """Of each op, shape, dtype, GPU and provider, in the file's order."""
    last: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        last[key(row)] = [*last.get(key(row), []), row][-2:]
    return last


def problems(root: Path = ROOT) -> list[str]:
    """A sentence for everything that is missing, stale or slower."""
    found, waits = [], waiting(root)
    benched = {path.stem.removeprefix("bench_") for path in (root / "bench/kernels").glob("bench_*.py")}
    for path in sorted((root / "fastdraft/kernels").glob("*.py")):
        if "tl.program_id" in path.read_text() and path.stem not in benched:
            found.append(f"{path.stem}: no benchmark; add bench/kernels/bench_{path.stem}.py")
    steps = [op for op, method in STEPS.items() if (root / f"fastdraft/model/{method}/engine.py").exists()]
    for op in [*sorted(benched), *steps]:
        path = root / f"bench/results/{op}.jsonl"
        rows = [row for row in load(path) if row["provider"] in our_providers(op, root)] if path.exists() else []
        have = {row["provider"] for row in rows}
        for provider in our_providers(op, root):
            if provider not in have and op not in waits:
                found.append(f"{op}: no row of {provider} in bench/results/{op}.jsonl; run its benchmark on a GPU")
        now = source(op, root)
        for (name, provider), row in {(row["op"], row["provider"]): row for row in rows}.items():
            if row.get("source") != now and op not in waits:
                when = f"{provider}'s newest row ({row['date']}, {row['commit']})"
                found.append(f"{name}: the source changed since {when}; time it again")
        for last in newest(rows).values():
            row = last[-1]
            about = f"{row['op']} {json.dumps(row['shape'])}, {row['provider']}, on {row['gpu']}"
            if "note" in row:
                continue
            if "failed" in row:
                found.append(f"{about}: {row['failed']}")
            elif len(last) == 2 and "failed" not in last[0] and time_us(row) > SLOWER * time_us(last[0]):
                found.append(
                    f"{about}: {time_us(row):.6g} us, was {time_us(last[0]):.6g} ({last[0]['date']}, {last[0]['commit']}); "
                    f'make it faster, or give the row a "note" that says why'
                )
    return found if "gpu_tests" in waits else found + gpu_test_problems(root)


def gpu_test_problems(root: Path) -> list[str]:
    """A sentence when the tests that CI skips for want of a GPU did not all pass with today's source."""
    path = root / "bench/results/gpu_tests.jsonl"
    rows = load(path) if path.exists() else []
    if not rows:
        return ["gpu_tests: no row in bench/results/gpu_tests.jsonl; run `make gpu` on a GPU"]
    row = rows[-1]
    when = f"their newest row ({row['date']}, {row['commit']})"
    if row["source"] != source("gpu_tests", root):
        return [f"gpu_tests: the source changed since {when}; run `make gpu` on a GPU"]
    if row["failed"]:
        return [f"gpu_tests: {row['failed']} failed in {when}; mend them and run `make gpu` on a GPU"]
    return []


def waiting(root: Path = ROOT) -> dict[str, str]:
    """Why an op's rows are not of today's source, by op, where bench/results/waiting.jsonl says so of just this source."""
    path = root / "bench/results/waiting.jsonl"
    lines = load(path) if path.exists() else []
    return {line["op"]: line["why"] for line in lines if line["source"] == source(line["op"], root)}


def main() -> None:
    waits = waiting()
    found = problems()
    for op, why in waits.items():
        print(f"{op} waits for a GPU: {why}")
    print("\n".join(found) or "every other benchmark row is of today's source, and none is slower than before")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
