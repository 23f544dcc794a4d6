"""Times the head of a draft whose vocabulary processes share: python -m bench.kernels.bench_split_kl, or pytest. Rows go to
bench/results/split_kl.jsonl.

One GPU computes what one of several would: the columns of one process. It exchanges with nobody, so the wire is not in the
time. Roof: student and teacher logits read once, gradient written once. `split_kl/rows` are the passes over the logits and
the numbers a row between them; "linear_kl" is the row kernel that knows of no other process, given as many columns.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.timing import arguments, measure, record
from fastdraft.kernels.linear_kl import kl_rows_
from fastdraft.kernels.split_kl import split_kl_rows_
from fastdraft.kernels.teacher import TeacherRows

SHAPES = [  # columns of all processes, processes
    (32000, 2),
    (32000, 4),
    (32000, 8),
]
ROWS, LOSSES = (4096, 8192), ("kl", "lk_alpha")


class Echo:
    """A group in which all others say what this process says."""

    def __init__(self, size: int):
        self.rank, self.size = 0, size

    def sum_(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x.repeat(self.size, *[1] * (x.ndim - 1))


def bench_case(
    draft: int, size: int, n: int, loss: str, rounds: int = 15, commit: str | None = None
) -> dict[str, list[float]]:
    gen, columns = torch.Generator("cuda").manual_seed(0), draft // size

    def normal() -> Tensor:
        return (torch.randn(n, columns, device="cuda", generator=gen) * 2).bfloat16()

    logits = normal()
    lse, best = torch.cat([part.float().logsumexp(-1) for part in logits.split(1024)]), logits.argmax(-1)
    teacher = TeacherRows(logits, lse, lse + 0.1, best, best, lse)
    row, w, zs, group = (
        torch.arange(n, device="cuda"),
        torch.ones(n, device="cuda"),
        [normal() for _ in range(2)],
        Echo(size),
    )
    providers = {
        "fastdraft": lambda i: split_kl_rows_(zs[i % 2], teacher, row, w, 0, group, loss),
        "linear_kl": lambda i: kl_rows_(zs[i % 2], teacher, row, w, loss),
    }
    found = measure(providers, rounds)
    record(
        "split_kl/rows", {"n": n, "Vd": draft, "processes": size, "loss": loss}, "bf16", found, 6 * n * columns, 0, commit
    )
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(("draft", "size"), SHAPES)
def test_split_kl(draft, size, n, loss, show):
    show(bench_case(draft, size, n, loss))


def main() -> None:
    args = arguments(__doc__).parse_args()
    for draft, size in SHAPES:
        for n in ROWS:
            for loss in LOSSES:
                bench_case(draft, size, n, loss, args.rounds, args.commit)


if __name__ == "__main__":
    main()
