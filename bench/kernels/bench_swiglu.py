"""Times SwiGLU: python -m bench.kernels.bench_swiglu, or pytest. Rows go to bench/results/swiglu.jsonl.

"torch" is the reference, eager, "torch.compile" that compiled; "liger" its kernels on the joined projection, where it is
installed (its backward does not give the activation back).
From the second round on the backward's inputs are the last round's results: other numbers, the same work.
"""

from __future__ import annotations

import pytest
import torch

from bench.timing import measure, record, run_cases
from fastdraft.kernels.swiglu import swiglu, swiglu_backward_, swiglu_backward_ref, swiglu_ref

SHAPES = [  # n, I
    (8192, 14336),
    (8192, 1536),
]


def bench_case(n: int, inner: int, rounds: int = 15, commit: str | None = None) -> dict[str, dict[str, list[float]]]:
    gate_up = [torch.randn(n, 2 * inner, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    act = [torch.randn(n, inner, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    compiled = torch.compile(swiglu_ref, dynamic=False)
    compiled_backward = torch.compile(lambda x, dact: (swiglu_backward_ref(x, dact), swiglu_ref(x)), dynamic=False)
    forward = {
        "fastdraft": lambda i: swiglu(gate_up[i % 3], act[i % 3]),
        "torch": lambda i: swiglu_ref(gate_up[i % 3]),
        "torch.compile": lambda i: compiled(gate_up[i % 3]),
    }
    backward = {
        "fastdraft": lambda i: swiglu_backward_(gate_up[i % 3], act[i % 3]),
        "torch": lambda i: (swiglu_backward_ref(gate_up[i % 3], act[i % 3]), swiglu_ref(gate_up[i % 3])),
        "torch.compile": lambda i: compiled_backward(gate_up[i % 3], act[i % 3]),
    }
    try:
        from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward, swiglu_fused_gate_up_forward
    except ImportError:
        pass
    else:
        forward["liger"] = lambda i: swiglu_fused_gate_up_forward(gate_up[i % 3])
        backward["liger"] = lambda i: swiglu_fused_gate_up_backward(gate_up[i % 3], act[i % 3], in_place=True)
    found = {}
    for name, providers, width in (("fwd", forward, 3), ("bwd", backward, 6)):
        found[name] = measure(providers, rounds)
        record(f"swiglu/{name}", {"n": n, "I": inner}, "bf16", found[name], 2 * width * n * inner, 0, commit)
    return found


@pytest.mark.parametrize(("n", "inner"), SHAPES)
def test_swiglu(n, inner, show):
    show(bench_case(n, inner)["bwd"])


if __name__ == "__main__":
    run_cases(__doc__, bench_case, SHAPES)
