"""Times the selector among the highest logits: python -m bench.kernels.bench_selector, or pytest. Rows go to
bench/results/selector.jsonl.

`selector/candidates` finds each row's 16 candidates (roof: logits read once), `selector/rows` is its loss and gradient with
the additions to both tables (roof: the vectors of 17 tokens and of the one before read once, those of the tables read and
written once). "torch" is torch.topk, and the same mathematics with autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.timing import measure, record, run_cases
from fastdraft.kernels.selector import (
    Candidates,
    SelectorGrads,
    add_rows_,
    candidates,
    candidates_ref,
    select_rows_,
    selected_ref,
)

CASES = [  # V, rows: Qwen3-8B, in the part of a chunk that its head takes, and SmolLM2-135M
    (151936, 1536),
    (49152, 4096),
]
K, RANK = 16, 256
Runs = dict[str, Callable[[int], object]]  # what `measure` takes, by provider


def providers(vocab: int, n: int) -> tuple[Runs, Runs]:  # of the candidates and of the rows
    gen = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=gen).bfloat16()

    zs = [2 * normal(n, vocab) for _ in range(2)]
    h, predecessor, successor = normal(n, RANK), normal(vocab, RANK), normal(vocab, RANK)
    label, before = (torch.randint(vocab, (n,), device="cuda", generator=gen) for _ in range(2))
    wide = lambda *size: torch.empty(*size, device="cuda")  # noqa: E731
    out = Candidates(torch.empty(n, K + 1, dtype=torch.int64, device="cuda"), wide(n, K + 1))
    grads = SelectorGrads(wide(n, K + 1), wide(n, RANK), wide(n, RANK), torch.empty_like(h))
    tables, w, dz = [torch.zeros(vocab, RANK, device="cuda") for _ in range(2)], torch.ones(n, device="cuda"), zs[1].clone()
    found = candidates_ref(zs[0], label, K)

    def ours(_: int) -> None:
        select_rows_(found, h, before, predecessor, successor, w, dz, grads)
        add_rows_(tables[0], found.ids, grads.query, grads.place)
        add_rows_(tables[1], before, grads.pull)

    def plain(_: int) -> None:
        leaves = [t.detach().requires_grad_() for t in (h, predecessor, successor, found.logits)]
        loss = selected_ref(Candidates(found.ids, leaves[3]), leaves[0], before, *leaves[1:3]).loss
        torch.autograd.grad(loss.sum(), leaves)

    search: Runs = {
        "fastdraft": lambda i: candidates(zs[i % 2], label, out),
        "torch": lambda i: zs[i % 2].topk(K, -1),
    }
    return search, {"fastdraft": ours, "torch": plain}


def bench_case(vocab: int, n: int, rounds: int = 15, commit: str | None = None) -> dict[str, dict[str, list[float]]]:
    shape = {"n": n, "V": vocab, "K": K, "R": RANK}
    moved = {"candidates": 2 * n * vocab, "rows": n * RANK * (K + 2) * (2 + 4 + 4)}
    found = {}
    for part, runs in zip(moved, providers(vocab, n), strict=True):
        found[part] = measure(runs, rounds)
        record(f"selector/{part}", shape, "bf16", found[part], moved[part], 0, commit)
    return found


@pytest.mark.parametrize("case", CASES)
def test_selector(case, show):
    show(bench_case(*case)["candidates"])


if __name__ == "__main__":
    run_cases(__doc__, bench_case, CASES)
