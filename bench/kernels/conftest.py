"""Makes the kernel benches pytest-benchmark programs: python -m pytest bench/kernels --benchmark-only

`bench.timing` measures, providers interleaved, and writes the rows. pytest-benchmark is then given fastdraft's GPU times to
show, compare and save (--benchmark-save, --benchmark-compare): its clock is one that only recorded times move on. The
other providers' medians are in `extra_info`.
"""

from __future__ import annotations

import pytest
import torch


class Clock:
    """Stands still but for `run`, which takes as long as the next recorded time."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = Clock()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=item.originalname))
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def show(benchmark):
    """Hands a case's times (provider -> microseconds, ascending) to pytest-benchmark."""

    def give(times: dict[str, list[float]]) -> None:
        recorded = iter(times["fastdraft"])

        def run() -> None:
            CLOCK.seconds += next(recorded, 0.0) / 1e6

        benchmark.extra_info |= {name: us[len(us) // 2] for name, us in times.items()}
        benchmark.pedantic(run, rounds=len(times["fastdraft"]))

    return give
