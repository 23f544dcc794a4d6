"""fastdraft trains draft models for speculative decoding."""

import os

__version__ = "0.1.0"

FEW_CORES = 8


def share_cores() -> None:
    """On a machine of few cores, lets PyTorch's threads sleep soon where they wait for each other; to be called before
    PyTorch is imported.

    They loop otherwise, and where another program runs, too, they take the time of the one that they wait for (LOG.md).
    Who sets GOMP_SPINCOUNT or OMP_WAIT_POLICY has chosen.
    """
    few = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) <= FEW_CORES
    if few and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
