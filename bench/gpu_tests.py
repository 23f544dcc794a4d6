"""Runs the tests that need a GPU and writes what came of it: python -m bench.gpu_tests [--workers N] [pytest arguments]

These are the tests marked `gpu`: the kernels, the engine and its graphs, the target's forward, and the README's commands as
a user types them. CI has no GPU, so `bench.gate` asks for the newest row in bench/results/gpu_tests.jsonl instead: of
today's source, with nothing failed. A row is written only when every such test was asked for, so not with arguments.
Most of their time is the processor's, so `--workers 4` runs the tests of four files at once on the one GPU (pytest-xdist).
"""

from __future__ import annotations

import argparse
import sys
import time

import pytest
import torch

from bench.timing import append


class Outcomes:
    """A pytest plugin that counts tests: one that fails in its setup has failed, one skipped anywhere is skipped."""

    def __init__(self) -> None:
        self.by_test: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        says_something = report.when == "call" or report.outcome != "passed"
        if says_something and self.by_test.get(report.nodeid) != "failed":
            self.by_test[report.nodeid] = report.outcome

    def count(self, outcome: str) -> int:
        return sum(found == outcome for found in self.by_test.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", help="what to write in the row where there is no git")
    parser.add_argument("--workers", type=int, default=1, help="test files that run at once on the one GPU")
    args, arguments = parser.parse_known_args()
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA GPU here, and without one all of these tests would be skipped")
    outcomes, began = Outcomes(), time.perf_counter()
    side_by_side = ["-n", str(args.workers), "--dist", "loadfile"] if args.workers > 1 else []
    code = pytest.main(["-m", "gpu", "--durations", "10", *side_by_side, *arguments], plugins=[outcomes])
    row = {name: outcomes.count(name) for name in ("passed", "failed", "skipped")}
    print(row, f"{time.perf_counter() - began:.0f} s")
    if not arguments and code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        append("gpu_tests", row | {"seconds": round(time.perf_counter() - began), "workers": args.workers}, args.commit)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
