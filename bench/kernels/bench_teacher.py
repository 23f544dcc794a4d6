"""Times the teacher's rows: python -m bench.kernels.bench_teacher, or pytest. Rows go to bench/results/teacher.jsonl.

Roof: the head's GEMM, or head, features and kept logits moved once.
"""

from __future__ import annotations

import pytest
import torch

from bench.timing import measure, record, run_cases
from fastdraft.batch import TargetHead
from fastdraft.kernels.teacher import permute_head, teacher, teacher_buffers, teacher_ref

SHAPES = [  # H, V, Vd
    (4096, 128256, 32000),
    (576, 49152, 8192),
    (576, 49152, 49152),
]
ROWS = (4096, 8192)


def bench_case(hidden: int, vocab: int, draft: int, n: int, rounds: int = 15, commit: str | None = None):
    ids = torch.randperm(vocab, device="cuda")[:draft].sort().values
    head = TargetHead(torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16) * hidden**-0.5)
    permuted = permute_head(head, ids)
    f = [torch.randn(n, hidden, device="cuda", dtype=torch.bfloat16) * 3 for _ in range(3)]
    buffers = teacher_buffers(n, permuted, torch.bfloat16)
    times = measure(
        {
            "fastdraft": lambda i: teacher(f[i % 3], permuted, buffers),
            "torch": lambda i: teacher_ref(f[i % 3], head, ids),
        },
        rounds,
    )
    num_bytes = 2 * (vocab * hidden + n * hidden + n * draft)
    shape = {"n": n, "H": hidden, "V": vocab, "Vd": draft}
    record("teacher", shape, "bf16", times, num_bytes, 2 * n * hidden * vocab, commit)
    return times


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(("hidden", "vocab", "draft"), SHAPES)
def test_teacher(hidden, vocab, draft, n, show):
    show(bench_case(hidden, vocab, draft, n))


if __name__ == "__main__":
    run_cases(__doc__, bench_case, ((*shape, n) for shape in SHAPES for n in ROWS))
