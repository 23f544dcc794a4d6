"""What `auto` means for a dtype: bf16, but fp32 on a CPU whose matrix products are slower in bf16.

A CPU without bf16 instructions (AVX2, most AVX-512, older Arm) emulates such products and takes several to sixty times as
long as in fp32. Flags of the CPU do not tell it: what PyTorch runs depends on its build, on oneDNN and on
ONEDNN_MAX_CPU_ISA too. So the products are timed, once a process. The two kinds of CPU are far apart (0.5 against 2.4 and
more), and a run records what was chosen, so that it goes on in the same dtype elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch

Dtype = Literal["bf16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
SLOW = 1.2  # times as long as fp32 from which on auto is fp32; below it bf16 wins by its half of the memory
ROWS, WIDTH = 128, 512  # of the products timed; fp32 takes 2 ms for all three on one core of a Zen 4
ROUNDS = 3


@cache
def bf16_slowdown() -> float:
    """How many times as long the three products of a linear layer take in bf16 as in fp32 on one thread of this CPU.

    The thread's own time is counted and the best of three rounds taken, so a busy machine gives the same answer. It takes
    10 ms where bf16 is fast and 0.2 s where it is not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds(torch.bfloat16) / _seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    x = torch.ones(ROWS, WIDTH, dtype=dtype)
    dy = torch.ones(ROWS, WIDTH, dtype=dtype)
    weight = torch.ones(WIDTH, WIDTH, dtype=dtype)
    products: list[Callable[[], torch.Tensor]] = [lambda: x @ weight.T, lambda: dy @ weight, lambda: dy.T @ x]
    for product in products:  # oneDNN compiles at a first call
        product()
    total = 0.0
    for product in products:
        rounds = []
        for _ in range(ROUNDS):
            start = time.thread_time()
            product()
            rounds.append(time.thread_time() - start)
        total += min(rounds)
    return total


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json and users write it: bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def bf16_is_slow(device: torch.device) -> bool:
    return device.type == "cpu" and bf16_slowdown() > SLOW


def pick_dtype(asked: Literal["auto", "bf16", "fp32"], device: torch.device) -> Dtype:
    """`asked`, or what auto means on `device`."""
    if asked != "auto":
        return asked
    return "fp32" if bf16_is_slow(device) else "bf16"


def auto_line(names: list[str], device: torch.device) -> str:
    """Says what auto has become for the settings `names`, and why."""
    return f"{' and '.join(names)}: auto is {pick_dtype('auto', device)} on this machine, {speed(device)}"


def slow_line(names: list[str], what_to_do: str) -> str:
    """The warning for bf16 that was asked for on a CPU where it is slow."""
    return (
        f"warning: {' and '.join(names)} bf16, but {speed(torch.device('cpu'))}: expect hours where fp32 takes minutes; "
        f"{what_to_do}"
    )


def speed(device: torch.device) -> str:
    if device.type != "cpu":
        return "a GPU"
    factor = bf16_slowdown()
    if factor > 1:
        return f"whose CPU takes {factor:.1f} times as long for matrix products in bf16 as in fp32"
    return f"whose CPU multiplies matrices {1 / factor:.1f} times as fast in bf16 as in fp32"
