"""Times the optimizer's step: python -m bench.kernels.bench_adamw, or pytest. Rows go to bench/results/adamw.jsonl.

Norm, clip, AdamW, bf16 weights and the zeroed gradient. Roof: 38 bytes a parameter. "torch" is the reference, eager,
"torch.compile" that compiled, "torch fused" clip_grad_norm_, AdamW(fused=True), the cast and the zeroing after each other.
"""

from __future__ import annotations

import pytest
import torch

from bench.timing import measure, record, run_cases
from fastdraft.kernels.adamw import _adamw, adamw_config, adamw_ref, adamw_scratch

COUNTS = [  # P: about the drafts of SmolLM2-135M and Llama-3.1-8B
    10_000_000,
    420_000_000,
]
OPTIONS = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, clip=0.5)


def bench_case(count: int, rounds: int = 15, commit: str | None = None) -> dict[str, list[float]]:
    grad, master, m = (torch.randn(count, device="cuda") for _ in range(3))
    v, weights = m.square(), master.bfloat16()
    live, updates = (torch.full((), x, dtype=torch.float64, device="cuda") for x in (4096.0, 10.0))
    not_decayed = torch.tensor([[1000, 5096], [9000, 13096]], device="cuda")
    buffers = (grad, master, m, v, weights, not_decayed, live, updates)
    args = (*buffers, adamw_scratch(grad.device), *OPTIONS.values(), adamw_config())
    compiled = torch.compile(adamw_ref, dynamic=False)
    master.grad = grad
    fused = torch.optim.AdamW([master], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def torch_fused(_):
        grad.div_(4096.0)
        torch.nn.utils.clip_grad_norm_([master], 0.5)
        fused.step()
        weights.copy_(master)
        grad.zero_()

    providers = {
        "fastdraft": lambda _: _adamw(*args),
        "torch": lambda _: adamw_ref(*buffers, **OPTIONS),
        "torch.compile": lambda _: compiled(*buffers, **OPTIONS),
        "torch fused": torch_fused,
    }
    times = measure(providers, rounds)
    record("adamw", {"P": count}, "fp32", times, 38 * count, 0, commit)
    return times


@pytest.mark.parametrize("count", COUNTS)
def test_adamw(count, show):
    show(bench_case(count))


if __name__ == "__main__":
    run_cases(__doc__, bench_case, ((count,) for count in COUNTS))
