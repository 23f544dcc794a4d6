"""fastdraft trains draft models for speculative decoding."""

import os

__version__ = "0.1.0"

FEW_CORES = 8
LOOK_S = 0.1


def threads_beside_others() -> dict[str, str]:
    """What to add to the environment before PyTorch is imported, where other programs keep one of few cores busy now: then
    its threads are to sleep soon where they wait for each other.

    They loop otherwise, and take the time of the one that they wait for; on idle cores that is faster (LOG.md). Who sets
    GOMP_SPINCOUNT or OMP_WAIT_POLICY has chosen.
    """
    import psutil

    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {*range(os.cpu_count() or 1)}
    if len(mine) > FEW_CORES or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return {}
    shares = psutil.cpu_percent(LOOK_S, percpu=True)  # of all the machine's cores; this process only waits meanwhile
    busy = sum(share for core, share in enumerate(shares) if core in mine)
    return {"GOMP_SPINCOUNT": "1000"} if busy > 50 else {}
