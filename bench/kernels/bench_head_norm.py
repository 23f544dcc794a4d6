"""Times the norm over each head with RoPE behind it: python -m bench.kernels.bench_head_norm, or pytest. Rows go
to results/head_norm.jsonl.

"two kernels" are `rms_norm` over each head and `chain_qkv`, which do the same one after the other; "torch" is the
reference, eager, "torch.compile" that compiled.
"""

from __future__ import annotations

import pytest
import torch

from bench.timing import measure, record, run_cases
from fastdraft.kernels.chain_qkv import chain_qkv, chain_qkv_backward
from fastdraft.kernels.head_norm import head_norm, head_norm_backward, head_norm_backward_ref, head_norm_ref
from fastdraft.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_partials

EPS = 1e-6
SHAPES = [  # n, heads, D
    (4096, 32, 128),
    (4096, 8, 128),
    (4096, 9, 64),
]


def bench_case(
    n: int,
    heads: int,
    dim: int,
    rounds: int = 15,
    commit: str | None = None,
    compare: bool = True,  # with compiled torch too
) -> dict[str, dict[str, list[float]]]:
    normal = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    z, dout = [normal(n, heads * dim) for _ in range(3)], [normal(n, heads, dim) for _ in range(3)]
    weight, position = normal(dim), torch.arange(n, device="cuda")
    freqs = 1e6 ** -(torch.arange(0, dim, 2, device="cuda").float() / dim)
    out, dz, middle = normal(n, heads, dim), normal(n, heads * dim), normal(n, heads * dim)
    r, dweight = torch.empty(n * heads, device="cuda"), torch.zeros(dim, device="cuda")
    partial = torch.empty(rms_norm_partials(dim, r.device), dim, device="cuda")
    where = position, freqs, 1.0

    def two(i):
        rms_norm(z[i % 3].view(-1, dim), weight, EPS, middle.view(-1, dim), r)
        chain_qkv(middle, None, None, *where, out, None, None)

    def two_backward(i):
        chain_qkv_backward(dout[i % 3], None, None, None, *where, middle, None)
        back = middle.view(-1, dim)
        rms_norm_backward(back, z[i % 3].view(-1, dim), r, weight, back, dweight, partial)

    def plain(z):
        return head_norm_ref(z, weight, EPS, *where)

    def plain_backward(dout, z):
        back, dw = head_norm_backward_ref(dout, z, weight, EPS, *where)
        return back.to(z.dtype), dweight + dw

    compiled, compiled_backward = (torch.compile(f, dynamic=False) for f in (plain, plain_backward))
    cases = {
        "fwd": {
            "fastdraft": lambda i: head_norm(z[i % 3], weight, EPS, *where, out),
            "two kernels": two,
            "torch": lambda i: plain(z[i % 3]),
            "torch.compile": lambda i: compiled(z[i % 3]),
        },
        "bwd": {
            "fastdraft": lambda i: head_norm_backward(dout[i % 3], z[i % 3], weight, EPS, *where, dz, dweight, partial),
            "two kernels": two_backward,
            "torch": lambda i: plain_backward(dout[i % 3], z[i % 3]),
            "torch.compile": lambda i: compiled_backward(dout[i % 3], z[i % 3]),
        },
    }
    found = {}
    for name, providers in cases.items():
        if not compare:
            del providers["torch.compile"]
        found[name] = measure(providers, rounds)
        num_bytes = {"fwd": 2, "bwd": 3}[name] * 2 * n * heads * dim
        record(f"head_norm/{name}", {"n": n, "heads": heads, "D": dim}, "bf16", found[name], num_bytes, 0, commit)
    return found


@pytest.mark.parametrize(("n", "heads", "dim"), SHAPES)
def test_head_norm(n, heads, dim, show):
    show(bench_case(n, heads, dim)["bwd"])


if __name__ == "__main__":
    run_cases(__doc__, bench_case, SHAPES)
