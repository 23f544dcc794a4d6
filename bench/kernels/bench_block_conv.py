"""Times the convolution along a block: python -m bench.kernels.bench_block_conv, or pytest. Rows go to
bench/results/block_conv.jsonl.

`block_conv/fwd` reads rows and coefficients and writes rows, `block_conv/bwd` gives all three gradients. "torch" is the
same in plain PyTorch and autograd. Blocks have 16 rows, two taps and groups of 16 channels, as published drafts have.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.timing import measure, record, run_cases
from fastdraft.kernels.block_conv import PROGRAMS, block_conv, block_conv_backward, block_conv_ref

CASES = [  # H, rows: widths of Qwen3-8B and SmolLM2-135M
    (4096, 4096),
    (4096, 16384),
    (576, 16384),
]
Runs = dict[str, Callable[[int], object]]  # what `measure` takes, by provider
TAPS, GROUP, BLOCK = 2, 16, 16


def providers(hidden: int, n: int) -> tuple[Runs, Runs]:  # of the forward and of the backward
    gen = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=gen).bfloat16()

    xs, dys = ([normal(n, hidden) for _ in range(3)] for _ in range(2))
    delta, base = normal(n, TAPS, hidden // GROUP), normal(TAPS, hidden)
    slot = torch.arange(n, device="cuda") % BLOCK
    y, dx, ddelta = torch.empty_like(xs[0]), torch.empty_like(xs[0]), torch.empty_like(delta)
    dbase = torch.zeros(TAPS, hidden, device="cuda")
    partial = torch.empty(PROGRAMS, TAPS, hidden, device="cuda")
    graphs = []
    for x in xs:
        leaves = [t.detach().requires_grad_() for t in (x, delta, base)]
        graphs.append((block_conv_ref(*leaves, slot), leaves))
    forward: Runs = {
        "fastdraft": lambda i: block_conv(xs[i % 3], delta, base, slot, y),
        "torch": lambda i: block_conv_ref(xs[i % 3], delta, base, slot),
    }
    backward: Runs = {
        "fastdraft": lambda i: block_conv_backward(dys[i % 3], xs[i % 3], delta, base, slot, dx, ddelta, dbase, partial),
        "torch": lambda i: torch.autograd.grad(*graphs[i % 3], dys[i % 3], retain_graph=True),
    }
    return forward, backward


def bench_case(hidden: int, n: int, rounds: int = 15, commit: str | None = None) -> dict[str, dict[str, list[float]]]:
    shape = {"n": n, "H": hidden, "T": TAPS}
    groups = hidden // GROUP
    moved = {"fwd": 2 * n * (2 * hidden + TAPS * groups), "bwd": 2 * n * (3 * hidden + 2 * TAPS * groups)}
    found = {}
    for side, runs in zip(moved, providers(hidden, n), strict=True):
        found[side] = measure(runs, rounds)
        record(f"block_conv/{side}", shape, "bf16", found[side], moved[side], 0, commit)
    return found


@pytest.mark.parametrize("case", CASES)
def test_block_conv(case, show):
    show(bench_case(*case)["bwd"])


if __name__ == "__main__":
    run_cases(__doc__, bench_case, CASES)
