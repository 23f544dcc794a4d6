"""Times the dense piece of a long context: python -m bench.kernels.bench_dense_attention, or pytest. Rows go to
bench/results/dense_attention.jsonl.

M rows against n keys that all of them see, 8B's draft heads and SmolLM2-135M's. "fastdraft" is FlashAttention 4 as the
engine calls it: `bwd` lays q, out and dout out anew and adds dK, dV to fp32 buffers. "triton" is `ttt_attention` on the
same rectangle, "cudnn" torch's SDPA; "atomic" is ours without the fixed order of sums (`DETERMINISTIC`). 5 products are
counted in `bwd`. `MIN_KEYS` is where "fastdraft" beats "triton". The last line says what a new shape costs on the host.
"""

from __future__ import annotations

import functools
import time

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import measure, record, run_cases
from fastdraft.kernels import dense_attention as dense
from fastdraft.kernels import ttt_attention as op

HEADS = {128: (32, 8), 64: (9, 3)}  # by head dim
CASES = [(2048, keys, 128) for keys in (1024, 2048, 4096, 8192, 32768, 65536)]
CASES += [(4096, keys, 128) for keys in (2048, 8192, 65536)]
CASES += [(2048, keys, 64) for keys in (2048, 8192, 65536)]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def room(rows: int, dim: int) -> dense.Take:
    table = dense.dense_buffers(*HEADS[dim], dim, rows, torch.bfloat16)
    held = {name: torch.empty(most, *shape, dtype=kind, device="cuda") for name, (most, shape, kind) in table.items()}
    return lambda name, n: held[name][:n]


def cudnn(q, k, v):
    """Forward and backward; every shape gets a plan of its own."""
    leaves = [x.detach()[None].transpose(1, 2).requires_grad_() for x in (q, k, v)]

    def forward():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*leaves, enable_gqa=True)

    return forward, leaves


def bench_case(
    rows: int, keys: int, dim: int, rounds: int = 15, commit: str | None = None
) -> dict[str, dict[str, list[float]]]:
    heads, kv_heads = HEADS[dim]
    inputs = [(normal(rows, heads, dim), normal(keys, kv_heads, dim), normal(keys, kv_heads, dim)) for _ in range(2)]
    douts, scale = [normal(rows, heads, dim) for _ in range(2)], dim**-0.5
    kept = [(torch.empty_like(q), torch.empty(heads, rows, device="cuda")) for q, _, _ in inputs]
    dk, dv = (torch.zeros(keys, kv_heads, dim, device="cuda") for _ in "kv")
    take, dq = room(rows, dim), normal(rows, heads, dim)
    none = inputs[0][1].new_empty((0, rows, kv_heads, dim))
    index = torch.full((rows,), keys - 1, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")

    def fwd(i):
        dense.dense_attention_fwd(*inputs[i % 2], scale, *kept[i % 2])

    def bwd(i):
        dense.dense_attention_bwd(douts[i % 2], *inputs[i % 2], *kept[i % 2], scale, dk, dv, take)

    def atomic(i):
        dense.DETERMINISTIC = False
        bwd(i)
        dense.DETERMINISTIC = True

    def triton_fwd(i):
        op._ttt_attention_fwd(*inputs[i % 2], none, none, *index, scale, *kept[i % 2])

    def triton_bwd(i):
        q, k, v = inputs[i % 2]
        out, lse = kept[i % 2]
        fixed = *index, out, lse, scale, none, none
        _, delta = op._ttt_attention_bwd_q(douts[i % 2], q, k, v, none, none, *fixed, dq)
        op._ttt_attention_bwd_kv(douts[i % 2], q, k, v, *index, lse, delta, scale, dk, dv)

    for i in range(2):
        fwd(i)
    forward, leaves = cudnn(*inputs[0])
    out, dout = forward(), douts[0][None].transpose(1, 2)
    providers = {
        "fwd": {"fastdraft": fwd, "triton": triton_fwd, "cudnn": lambda _: forward()},
        "bwd": {"fastdraft": bwd, "atomic": atomic, "triton": triton_bwd}
        | {"cudnn": lambda _: torch.autograd.grad(out, leaves, dout, retain_graph=True)},
    }
    flops = 4 * dim * heads * rows * keys
    q_bytes, k_bytes = rows * heads * dim * 2, keys * kv_heads * dim * 2
    need = {
        "fwd": (2 * q_bytes + 2 * k_bytes, 1),
        "bwd": (5 * q_bytes + 10 * k_bytes, 2.5),
    }  # bytes, of the forward's FLOPs
    shape = {"M": rows, "n": keys, "Hq": heads, "Hkv": kv_heads, "D": dim}
    found = {}
    for name, runs in providers.items():
        num_bytes, factor = need[name]
        found[name] = times = measure(runs, rounds)
        record(f"dense_attention/{name}", shape, "bf16", times, num_bytes, int(flops * factor), commit)
        print("  TFLOP/s", {p: round(flops * factor / us[len(us) // 2] / 1e6) for p, us in times.items()})
    return found


def new_shape_ms(dim: int = 128) -> dict[str, list[float]]:
    """Host milliseconds of a forward and backward at lengths not seen before, from the second on."""
    heads, kv_heads = HEADS[dim]
    found = {"fastdraft": [], "cudnn": []}
    for rows, keys in ((1030, 3001), (1207, 4111), (1333, 5007)):
        q, dout, k, v = (normal(n, h, dim) for n, h in ((rows, heads),) * 2 + ((keys, kv_heads),) * 2)
        dk, dv = (torch.zeros(k.shape, device="cuda") for _ in "kv")
        out, lse = torch.empty_like(q), torch.empty(heads, rows, device="cuda")
        take = room(rows, dim)
        torch.cuda.synchronize()
        start = time.perf_counter()
        dense.dense_attention_fwd(q, k, v, 0.1, out, lse)
        dense.dense_attention_bwd(dout, q, k, v, out, lse, 0.1, dk, dv, take)
        found["fastdraft"].append(round(1e3 * (time.perf_counter() - start), 2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        forward, leaves = cudnn(q, k, v)
        torch.autograd.grad(forward(), leaves, dout[None].transpose(1, 2))
        found["cudnn"].append(round(1e3 * (time.perf_counter() - start), 2))
    return {name: ms[1:] for name, ms in found.items()}


@functools.cache
def times_of(case: tuple[int, int, int]) -> dict[str, dict[str, list[float]]]:
    return bench_case(*case)


@pytest.mark.skipif(not dense.installed(), reason="FlashAttention 4 is not installed (pip install .[flash])")
@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize("case", CASES)
def test_dense_attention(case, pass_, show):
    show(times_of(case)[pass_])


if __name__ == "__main__":
    run_cases(__doc__, bench_case, CASES)
    print("host ms of a new shape, forward and backward:", new_shape_ms())
