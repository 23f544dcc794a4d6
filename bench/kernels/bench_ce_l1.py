"""Times a row's cross entropy and L1 with their gradient: python -m bench.kernels.bench_ce_l1, or pytest. Rows go to
bench/results/ce_l1.jsonl.

Roof: logits and teacher's logits read once from HBM, the gradient written once; what is read again comes from L2 while the
rows fit there. "torch" is the same mathematics with autograd. Every four rows share a teacher row, as slots of overlapping
blocks do. From the second round on our kernel's logits are the last round's gradient: other numbers, the same work.
"""

from __future__ import annotations

import pytest
import torch

from bench.timing import measure, record, run_cases
from fastdraft.batch import TargetHead
from fastdraft.kernels.ce_l1 import ce_l1_losses_ref, ce_l1_rows_
from fastdraft.kernels.teacher import teacher_ref

CASES = [  # V, rows: heads of Qwen3-8B, Llama-3.1-8B and SmolLM2-135M
    (151936, 1536),
    (128256, 2048),
    (49152, 4096),
]
WEIGHTS = (0.1, 0.9)
SHARE = 4  # rows that read one teacher row


def bench_case(vocab: int, n: int, rounds: int = 15, commit: str | None = None) -> dict[str, list[float]]:
    gen = torch.Generator("cuda").manual_seed(0)
    normal = lambda *size: torch.randn(*size, device="cuda", generator=gen).bfloat16()  # noqa: E731
    zs = [2 * normal(n, vocab) for _ in range(2)]
    teacher = teacher_ref(normal(n // SHARE, 64), TargetHead(normal(vocab, 64) / 4), torch.arange(vocab, device="cuda"))
    row = torch.arange(n, device="cuda") // SHARE
    label = torch.randint(vocab, (n,), device="cuda", generator=gen)
    w = torch.ones(n, device="cuda")

    def plain(i: int) -> None:
        z = zs[i % 2].detach().requires_grad_()
        torch.autograd.grad(ce_l1_losses_ref(z, label, teacher.at(row), *WEIGHTS)[0].sum(), z)

    runs = {"fastdraft": lambda i: ce_l1_rows_(zs[i % 2], label, teacher, row, w, *WEIGHTS), "torch": plain}
    found = measure(runs, rounds)
    record("ce_l1", {"n": n, "V": vocab}, "bf16", found, 2 * (2 * n + n // SHARE) * vocab, 0, commit)
    return found


@pytest.mark.parametrize("case", CASES)
def test_ce_l1(case, show):
    show(bench_case(*case))


if __name__ == "__main__":
    run_cases(__doc__, bench_case, CASES)
