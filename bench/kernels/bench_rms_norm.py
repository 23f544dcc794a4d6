"""Times RMSNorm with its residual: python -m bench.kernels.bench_rms_norm, or pytest. Rows go to results/rms_norm.jsonl.

`fwd` adds a residual and norms the sum, `bwd` adds the residual's gradient to the norm's. "torch" is the reference, eager,
"torch.compile" that compiled; "liger" its fused add and norm, forward and backward, where it is installed.
"""

from __future__ import annotations

import pytest
import torch

from bench.timing import measure, record, run_cases
from fastdraft.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_backward_ref, rms_norm_partials, rms_norm_ref

EPS = 1e-5
SHAPES = [  # n, H
    (8192, 4096),
    (8192, 8192),
    (8192, 576),
]


def bench_case(n: int, hidden: int, rounds: int = 15, commit: str | None = None) -> dict[str, dict[str, list[float]]]:
    x, delta, total, y, dy = (
        [torch.randn(n, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(3)] for _ in range(5)
    )
    weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    r, dweight = torch.ones(n, device="cuda"), torch.zeros(hidden, device="cuda")
    partial = torch.empty(rms_norm_partials(hidden, r.device), hidden, device="cuda")
    dx = torch.empty_like(y[0])

    def ours_backward(i):
        k = i % 3
        rms_norm_backward(dy[k], total[k], r, weight, dx, dweight, partial, add=(delta[k],))

    def add_and_norm(x, delta):
        s = x + delta
        return s, *rms_norm_ref(s, weight, EPS)

    def norm_backward(dy, x, add):
        back, dw = rms_norm_backward_ref(dy, x, r[:, None], weight)
        return (back + add).to(dx.dtype), dweight + dw

    compiled, compiled_backward = (torch.compile(f, dynamic=False) for f in (add_and_norm, norm_backward))
    forward = {
        "fastdraft": lambda i: rms_norm(x[i % 3], weight, EPS, y[i % 3], r, delta=delta[i % 3], total=total[i % 3]),
        "torch": lambda i: add_and_norm(x[i % 3], delta[i % 3]),
        "torch.compile": lambda i: compiled(x[i % 3], delta[i % 3]),
    }
    backward = {
        "fastdraft": ours_backward,
        "torch": lambda i: norm_backward(dy[i % 3], total[i % 3], delta[i % 3]),
        "torch.compile": lambda i: compiled_backward(dy[i % 3], total[i % 3], delta[i % 3]),
    }
    try:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm
    except ImportError:
        pass
    else:
        leaves = [t.detach().requires_grad_() for t in (x[0], delta[0], weight)]

        def liger(i):
            return liger_fused_add_rms_norm(x[i % 3], delta[i % 3], weight, EPS, in_place=False)

        out = liger_fused_add_rms_norm(*leaves, EPS, in_place=False)
        forward["liger"] = liger
        backward["liger"] = lambda i: torch.autograd.grad(out, leaves, (dy[i % 3], delta[i % 3]), retain_graph=True)
    found = {}
    for name, providers, width in (("fwd", forward, 4), ("bwd", backward, 4)):
        found[name] = measure(providers, rounds)
        record(f"rms_norm/{name}", {"n": n, "H": hidden}, "bf16", found[name], 2 * width * n * hidden, 0, commit)
    return found


@pytest.mark.parametrize(("n", "hidden"), SHAPES)
def test_rms_norm(n, hidden, show):
    show(bench_case(n, hidden)["bwd"])


if __name__ == "__main__":
    run_cases(__doc__, bench_case, SHAPES)
