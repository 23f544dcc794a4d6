"""Times TTT attention: python -m bench.kernels.bench_ttt_attention, or pytest. Rows go to
bench/results/ttt_attention.jsonl.

Llama-3.1-8B's draft heads. `fwd`; `bwd` is both backward kernels (5 products counted), `bwd_q` and `bwd_kv` each of them
alone (the 3 and 4 products it computes). "cudnn" and "flash" are torch's SDPA on the same dense causal attention; packed,
compacted and chunked lists have no SDPA counterpart. Pack "chats": documents of log-normal lengths, the first 23 % of each
not live and left out of the list.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import measure, record, run_cases
from fastdraft.kernels import ttt_attention as op

HQ, HKV, D = 32, 8, 128
CASES = [  # query rows, keys, diagonal terms, packed chats
    (4096, 4096, 0, False),
    (8192, 8192, 0, False),
    (16384, 16384, 0, False),
    (4096, 4096, 3, False),
    (4096, 4096, 6, False),
    (4096, 8192, 3, False),
    (4096, 32768, 3, False),
    (0, 8192, 3, True),
]


def chats(
    num_keys: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # pos, doc_start of the live rows
    gen = torch.Generator().manual_seed(0)
    lengths = (6.2 + 0.8 * torch.randn(num_keys // 64, generator=gen)).exp().long().clamp(64, 4096)
    lengths = lengths[: int((lengths.cumsum(0) <= num_keys).sum())]
    lengths = torch.cat([lengths, num_keys - lengths.sum(0, keepdim=True)])
    start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    pos = torch.arange(num_keys)
    live = pos - start >= (lengths * 0.23).long().repeat_interleave(lengths)
    return pos[live].cuda(), start[live].cuda()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def bench_case(
    rows: int, num_keys: int, num_diag: int, packed: bool, rounds: int = 15, commit: str | None = None
) -> dict[str, dict[str, list[float]]]:
    if packed:
        pos, doc_start = chats(num_keys)
        rows = len(pos)
    else:
        pos = torch.arange(num_keys - rows, num_keys, device="cuda")
        doc_start = torch.zeros_like(pos)
    scale = D**-0.5
    inputs = [
        (normal(rows, HQ, D), *(normal(num_keys, HKV, D) for _ in "kv"), *(normal(num_diag, rows, HKV, D) for _ in "kv"))
        for _ in range(2)
    ]
    douts = [normal(rows, HQ, D) for _ in range(2)]
    kept = [op._ttt_attention_fwd(*x, pos, doc_start, scale) for x in inputs]
    dq, delta = torch.empty_like(douts[0]), torch.empty_like(kept[0][1])
    dk0, dv0 = (torch.zeros(num_keys, HKV, D, device="cuda") for _ in range(2))
    dk_diag, dv_diag = (torch.zeros(num_diag, rows, HKV, D, device="cuda") for _ in range(2))

    def fwd(i):
        op._ttt_attention_fwd(*inputs[i % 2], pos, doc_start, scale, *kept[i % 2])

    def bwd_q(i):
        fixed = pos, doc_start, *kept[i % 2], scale, dk_diag, dv_diag, dq, delta
        op._ttt_attention_bwd_q(douts[i % 2], *inputs[i % 2], *fixed)

    def bwd_kv(i):
        fixed = pos, doc_start, kept[i % 2][1], delta, scale, dk0, dv0
        op._ttt_attention_bwd_kv(douts[i % 2], *inputs[i % 2][:3], *fixed)

    def bwd(i):
        bwd_q(i)
        bwd_kv(i)

    ours = {
        "fwd": {"fastdraft": fwd},
        "bwd": {"fastdraft": bwd},
        "bwd_q": {"fastdraft": bwd_q},
        "bwd_kv": {"fastdraft": bwd_kv},
    }
    if rows == num_keys and num_diag == 0:
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            ours["fwd"][name], ours["bwd"][name] = sdpa(backend, rows)
    pairs = int((pos - doc_start + 1 + num_diag).sum())
    flops = 4 * D * HQ * pairs
    q_bytes, k_bytes, diag_bytes = rows * HQ * D * 2, num_keys * HKV * D * 2, num_diag * rows * HKV * D * 2
    need = {  # bytes, products of the forward's two
        "fwd": (2 * q_bytes + 2 * k_bytes + 2 * diag_bytes, 1),
        "bwd": (4 * q_bytes + 2 * k_bytes + 8 * k_bytes + 2 * diag_bytes + 8 * diag_bytes, 2.5),
        "bwd_q": (4 * q_bytes + 2 * k_bytes + 2 * diag_bytes + 8 * diag_bytes, 1.5),
        "bwd_kv": (2 * q_bytes + 2 * k_bytes + 8 * k_bytes, 2),
    }
    shape = {"M": rows, "N": num_keys, "diag": num_diag, "Hq": HQ, "Hkv": HKV, "D": D} | ({"chats": 1} if packed else {})
    found = {}
    for name, providers in ours.items():
        num_bytes, factor = need[name]
        found[name] = times = measure(providers, rounds)
        record(f"ttt_attention/{name}", shape, "bf16", times, num_bytes, int(flops * factor), commit)
        print("  TFLOP/s", {p: round(flops * factor / us[len(us) // 2] / 1e6) for p, us in times.items()})
    return found


def sdpa(backend: SDPBackend, n: int):
    q, dout = (normal(1, HQ, n, D) for _ in range(2))
    k, v = (normal(1, HKV, n, D) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward(_):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)

    out = forward(0)
    return forward, lambda _: torch.autograd.grad(out, leaves, dout, retain_graph=True)


@functools.cache
def times_of(case: tuple[int, int, int, bool]) -> dict[str, dict[str, list[float]]]:
    return bench_case(*case)


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize("case", CASES)
def test_ttt_attention(case, pass_, show):
    show(times_of(case)[pass_])


if __name__ == "__main__":
    run_cases(__doc__, bench_case, CASES)
