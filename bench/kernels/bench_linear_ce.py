"""Times a frozen head's cross entropy: python -m bench.kernels.bench_linear_ce, or pytest. Rows go to
bench/results/linear_ce.jsonl.

`linear_ce/rows` is the row kernel alone (roof: logits read once from HBM and once from L2, gradient written once),
`linear_ce/step` its two GEMMs and the row kernel. "torch" is the same mathematics with autograd, with no gradient of the
head, and "liger" its cross entropy, alone and fused with the head. Both give the loss, and neither the hit. From the second
round on our kernel's logits are the last round's gradient: other numbers, the same work.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bench.timing import measure, record, run_cases
from fastdraft.kernels.linear_ce import ce_rows_, linear_ce_grad

CASES = [  # H, V, rows: heads of Qwen3-8B, Llama-3.1-8B and SmolLM2-135M
    (4096, 151936, 2048),
    (4096, 128256, 2048),
    (576, 49152, 2048),
    (576, 49152, 8192),
]
Runs = dict[str, Callable[[int], object]]  # what `measure` takes, by provider


def providers(hidden: int, vocab: int, n: int) -> tuple[Runs, Runs]:  # of the rows and of the step
    gen = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, device="cuda", generator=gen) * std).bfloat16()

    zs = [normal(n, vocab, std=2.0) for _ in range(2)]
    x, weight = [normal(n, hidden) for _ in range(2)], normal(vocab, hidden, std=2 * hidden**-0.5)
    label = torch.randint(vocab, (n,), device="cuda", generator=gen)
    w = torch.ones(n, device="cuda")
    dx, logits = torch.empty_like(x[0]), torch.empty_like(zs[0])

    def gradient(leaf: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
        leaf = leaf.detach().requires_grad_()
        torch.autograd.grad(loss(leaf), leaf)

    def torch_loss(z: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(z.float(), label, reduction="sum")

    rows: Runs = {
        "fastdraft": lambda i: ce_rows_(zs[i % 2], label, w),
        "torch": lambda i: gradient(zs[i % 2], torch_loss),
    }
    step: Runs = {
        "fastdraft": lambda i: linear_ce_grad(x[i % 2], weight, label, w, dx, logits),
        "torch": lambda i: gradient(x[i % 2], lambda a: torch_loss(a @ weight.T)),
    }
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return rows, step
    alone, fused = LigerCrossEntropyLoss(reduction="sum"), LigerFusedLinearCrossEntropyLoss(reduction="sum")
    rows["liger"] = lambda i: gradient(zs[i % 2], lambda z: alone(z, label))
    step["liger"] = lambda i: gradient(x[i % 2], lambda a: fused(weight, a, label))
    return rows, step


def bench_case(
    hidden: int, vocab: int, n: int, rounds: int = 15, commit: str | None = None
) -> dict[str, dict[str, list[float]]]:
    rows, step = providers(hidden, vocab, n)
    shape = {"n": n, "H": hidden, "V": vocab}
    found = {"rows": measure(rows, rounds)}
    record("linear_ce/rows", shape, "bf16", found["rows"], 2 * 2 * n * vocab, 0, commit)
    num_bytes = 2 * (2 * n * hidden + 2 * vocab * hidden + 2 * n * vocab)
    found["step"] = measure(step, rounds)
    record("linear_ce/step", shape, "bf16", found["step"], num_bytes, 4 * n * hidden * vocab, commit)
    return found


@pytest.mark.parametrize("case", CASES)
def test_linear_ce(case, show):
    show(bench_case(*case)["step"])


if __name__ == "__main__":
    run_cases(__doc__, bench_case, CASES)
