"""Times fp8 rows and products: python -m bench.kernels.bench_fp8, or pytest. Rows go to bench/results/fp8.jsonl.

`fp8/rows` and `fp8/columns` quantise (roof: bf16 read once, fp8 written once; "torch" is the reference, eager).
`fp8/product` is what the engine does for one product of the 8B draft: "fastdraft" quantises x and multiplies, "scaled_mm"
multiplies alone, "scaled_mm, fast" with sums kept in the tensor core, "torch, bf16" is the product it replaces. The roof
of a product is the GPU's bf16 matrix rate, so more than 100 % is what fp8 is for.
"""

from __future__ import annotations

import pytest
import torch

from bench.timing import measure, record, run_cases
from fastdraft.kernels.fp8 import (
    FP8,
    Fp8Rows,
    multiply,
    quantize_columns,
    quantize_rows,
    quantize_rows_ref,
)

SHAPES = [  # what, n, k, m: rows or columns of [n, k]; products of [n, k] and [m, k]
    ("rows", 2048, 4096, 0),
    ("rows", 2048, 14336, 0),
    ("rows", 2048, 28672, 0),
    ("rows", 1792, 32000, 0),
    ("rows", 28672, 4096, 0),
    ("columns", 28672, 4096, 0),
    ("columns", 4096, 14336, 0),
    ("columns", 32000, 4096, 0),
    ("product", 2048, 4096, 6144),  # qkv
    ("product", 2048, 4096, 4096),  # o, and its backward
    ("product", 2048, 4096, 28672),  # gate | up
    ("product", 2048, 14336, 4096),  # down
    ("product", 8192, 4096, 32000),  # head
    ("product", 2048, 4096, 14336),  # down, backward
    ("product", 2048, 28672, 4096),  # gate | up, backward
    ("product", 2048, 6144, 4096),  # qkv, backward
    ("product", 8192, 32000, 4096),  # head, backward
]
ROOM = 2048 * 28672  # `model.ttt.fp8_buffers` of the 8B draft's 2048 chains


def empty_rows(n: int, k: int) -> Fp8Rows:
    return Fp8Rows(torch.empty(n, k, dtype=FP8, device="cuda"), torch.empty(n, device="cuda"))


def quantize_case(what: str, n: int, k: int) -> tuple[dict, int, int]:  # providers, bytes, flops
    x = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    out = empty_rows(n, k) if what == "rows" else empty_rows(k, n)
    quantize = {"rows": quantize_rows, "columns": quantize_columns}[what]
    turned = {"rows": lambda x: x, "columns": lambda x: x.T}[what]
    providers = {
        "fastdraft": lambda i: quantize(x[i % 3], out),
        "torch": lambda i: quantize_rows_ref(turned(x[i % 3])),
    }
    return providers, 3 * n * k, 0


def product_case(n: int, k: int, m: int) -> tuple[dict, int, int]:
    x = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    w, out = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.empty(n, m, device="cuda", dtype=torch.bfloat16)
    xs, weight = [empty_rows(n, k) for _ in x], empty_rows(m, k)
    for to, source in zip([*xs, weight], [*x, w], strict=True):
        quantize_rows(source, to)
    room = Fp8Rows(torch.empty(ROOM, dtype=FP8, device="cuda"), torch.empty(8192, device="cuda"))

    def scaled(i, fast):
        q, scale = xs[i % 3]
        scales = {"scale_a": scale[:, None], "scale_b": weight.scale[None, :]}
        torch._scaled_mm(q, weight.q.T, **scales, out_dtype=out.dtype, use_fast_accum=fast, out=out)

    providers = {
        "fastdraft": lambda i: multiply(x[i % 3], weight, room, out),
        "scaled_mm": lambda i: scaled(i, False),
        "scaled_mm, fast": lambda i: scaled(i, True),
        "torch, bf16": lambda i: torch.mm(x[i % 3], w.T, out=out),
    }
    return providers, 2 * n * k + m * k + 2 * n * m, 2 * n * k * m


def bench_case(what: str, n: int, k: int, m: int, rounds: int = 15, commit: str | None = None) -> dict[str, list[float]]:
    providers, num_bytes, flops = product_case(n, k, m) if what == "product" else quantize_case(what, n, k)
    shape = {"n": n, "k": k} | ({"m": m} if m else {})
    found = measure(providers, rounds)
    record(f"fp8/{what}", shape, "fp8", found, num_bytes, flops, commit)
    return found


@pytest.mark.parametrize(("what", "n", "k", "m"), SHAPES)
def test_fp8(what, n, k, m, show):
    show(bench_case(what, n, k, m))


if __name__ == "__main__":
    run_cases(__doc__, bench_case, SHAPES)
