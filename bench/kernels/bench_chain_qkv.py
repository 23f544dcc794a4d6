"""Times QKV's split, shared half and rotation: python -m bench.kernels.bench_chain_qkv, or pytest.

Rows go to bench/results/chain_qkv.jsonl. "torch" is the reference, eager, "torch.compile"
that compiled; the backward adds to de by index. Positions from 2^17 on are where float32 sines reduce the long way.
"""

from __future__ import annotations

import pytest
import torch

from bench.timing import measure, record, run_cases
from fastdraft.kernels.chain_qkv import chain_qkv, chain_qkv_backward, chain_qkv_backward_ref, chain_qkv_ref

SHAPES = [  # n, Hq, Hkv, D, first position
    (8192, 32, 8, 128, 0),
    (8192, 32, 8, 128, 1 << 17),
    (8192, 9, 3, 64, 0),
]


def bench_case(
    n: int, heads: int, kv_heads: int, dim: int, first: int, rounds: int = 15, commit: str | None = None
) -> dict[str, dict[str, list[float]]]:
    width = (heads + 2 * kv_heads) * dim
    normal = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    z, e, dz = [normal(n, width) for _ in range(3)], normal(n + 8, width), normal(n, width)
    e_row, position = torch.arange(n, device="cuda") + 3, torch.arange(first, first + n, device="cuda")
    freqs = 5e5 ** -(torch.arange(0, dim, 2, device="cuda").float() / dim)
    q, k, v = normal(n, heads, dim), normal(n, kv_heads, dim), normal(n, kv_heads, dim)
    dk, dv = k.float(), v.float()
    de = torch.zeros(n + 8, width, device="cuda")

    def split(z):
        return chain_qkv_ref(z, e, e_row, position, freqs, 1.0, heads, kv_heads, dim)

    def split_backward(dq):
        dz.copy_(chain_qkv_backward_ref(dq, dk, dv, position, freqs, 1.0, dz.dtype))
        de.index_add_(0, e_row, dz.float())

    compiled, compiled_backward = (torch.compile(f, dynamic=False) for f in (split, split_backward))
    cases = {
        "fwd": {
            "fastdraft": lambda i: chain_qkv(z[i % 3], e, e_row, position, freqs, 1.0, q, k, v),
            "torch": lambda i: split(z[i % 3]),
            "torch.compile": lambda i: compiled(z[i % 3]),
        },
        "bwd": {
            "fastdraft": lambda i: chain_qkv_backward(q, dk, dv, e_row, position, freqs, 1.0, dz, de),
            "torch": lambda i: split_backward(q),
            "torch.compile": lambda i: compiled_backward(q),
        },
    }
    kv = 2 * kv_heads * dim
    num_bytes = {"fwd": 2 * 3 * n * width, "bwd": n * (2 * heads * dim + 4 * kv + 2 * width + 8 * width)}
    found = {}
    for name, providers in cases.items():
        found[name] = measure(providers, rounds)
        shape = {"n": n, "Hq": heads, "Hkv": kv_heads, "D": dim} | ({"first": first} if first else {})
        record(f"chain_qkv/{name}", shape, "bf16", found[name], num_bytes[name], 0, commit)
    return found


@pytest.mark.parametrize(("n", "heads", "kv_heads", "dim", "first"), SHAPES)
def test_chain_qkv(n, heads, kv_heads, dim, first, show):
    show(bench_case(n, heads, kv_heads, dim, first)["bwd"])


if __name__ == "__main__":
    run_cases(__doc__, bench_case, SHAPES)
