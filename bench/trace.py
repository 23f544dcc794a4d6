"""Where a GPU's time goes in one run of something: in kernels, in sums with other GPUs that nothing hides, or in nothing.

`traced` runs it under torch.profiler and gives every process a `Shares` of its own GPU. Time counts once, however many
kernels run at it: NCCL's is exposed while no other kernel runs, and idle is what lies between the first kernel's begin and
the last one's end without any. A kernel of NCCL also waits for the slowest process: that is the one with the least exposed
time, and what the others have beyond it is waiting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NUM_KERNELS = 8  # named in a summary, those that take longest


class Kernel(NamedTuple):
    name: str
    start: float  # seconds
    end: float

    @property
    def is_nccl(self) -> bool:
        return self.name.startswith("nccl")


@dataclass(frozen=True)
class Shares:
    """Seconds of one GPU, but for `launches`."""

    span: float  # from the first kernel's begin to the last one's end
    compute: float  # in which a kernel runs that is not NCCL's
    nccl: float  # in which one of NCCL's runs
    exposed: float  # in which only NCCL's run
    idle: float  # in which none runs
    launches: int
    collectives: dict[str, tuple[int, float, float]]  # by NCCL's name: how many, seconds, of them exposed
    kernels: dict[str, tuple[int, float]]  # of the others the longest: how many, seconds

    def rounded(self) -> dict:
        """For JSON, in milliseconds."""
        row = {f"{k}_ms": round(1e3 * v, 3) for k, v in asdict(self).items() if isinstance(v, float)}
        row["launches"] = self.launches
        for name in ("collectives", "kernels"):
            row[name] = {k: [n, *(round(1e3 * s, 3) for s in times)] for k, (n, *times) in getattr(self, name).items()}
        return row


def traced(run: Callable[[], object]) -> Shares:
    """Runs it once on this process's GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    on_gpu = (e for e in events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation())
    return shares(Kernel(e.name(), e.start_ns() / 1e9, (e.start_ns() + e.duration_ns()) / 1e9) for e in on_gpu)


def shares(kernels: Iterable[Kernel]) -> Shares:
    """The summary of a GPU's kernels, copies and fills among them. Raises ValueError where there are none."""
    found = sorted(kernels, key=lambda k: k.start)
    if not found:
        raise ValueError("the trace has no kernel of a GPU: nothing ran there, or the profiler may not look at it")
    nccl, other = [k for k in found if k.is_nccl], [k for k in found if not k.is_nccl]
    computing = united(other)
    span, compute = max(k.end for k in found) - found[0].start, length(computing)
    both = length(united(found))
    collectives: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for k, exposed in zip(nccl, uncovered(nccl, computing), strict=True):
        entry = collectives[k.name.split("(")[0]]
        entry[0] += 1
        entry[1] += k.end - k.start
        entry[2] += exposed
    longest: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for k in other:
        entry = longest[k.name[:60]]
        entry[0] += 1
        entry[1] += k.end - k.start
    first = sorted(longest.items(), key=lambda item: -item[1][1])[:NUM_KERNELS]
    return Shares(
        span,
        compute,
        length(united(nccl)),
        both - compute,
        span - both,
        len(found),
        {k: (int(n), t, e) for k, (n, t, e) in collectives.items()},
        {k: (int(n), t) for k, (n, t) in first},
    )


def united(kernels: list[Kernel]) -> list[tuple[float, float]]:
    """The times at which any of them runs, without overlap; `kernels` by their start."""
    times: list[tuple[float, float]] = []
    for k in kernels:
        if times and k.start <= times[-1][1]:
            times[-1] = times[-1][0], max(times[-1][1], k.end)
        else:
            times.append((k.start, k.end))
    return times


def length(times: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in times)


def uncovered(
    kernels: list[Kernel],  # by their start
    times: list[tuple[float, float]],  # of `united`
) -> list[float]:
    """Of each kernel, the seconds at which none of the times is."""
    rest, first = [], 0
    for k in kernels:
        while first < len(times) and times[first][1] <= k.start:
            first += 1
        covered, at = 0.0, first
        while at < len(times) and times[at][0] < k.end:
            covered += min(k.end, times[at][1]) - max(k.start, times[at][0])
            at += 1
        rest.append(k.end - k.start - covered)
    return rest
