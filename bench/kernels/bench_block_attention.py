"""Times block attention: python -m bench.kernels.bench_block_attention, or pytest. Rows go to
bench/results/block_attention.jsonl.

Qwen3-8B's heads with blocks of 16 rows, 512 anchors drawn from the tokens of a pack, all rows asking. `fwd`; `bwd` is all
backward kernels (5 products counted), `bwd_q` those of the queries and of the blocks' own keys, `bwd_kv` that of the
context (the 3 and 4 products they compute). "flex" is torch's flex_attention, compiled, over the context's and the blocks'
keys end to end with the same mask, which is made before the clock runs. "sdpa" is torch's memory-efficient SDPA with that
mask as a tensor and K, V repeated for each head; it has no row where the mask has more than MASK entries. Both are compared
with ours before they are timed. A case with fewer anchors is a chunk, the last of the pack. Pack "chats": documents of
log-normal lengths, the first 23 % of each without anchors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.kernels.bench_ttt_attention import chats
from bench.timing import measure, record, run_cases
from fastdraft.kernels import block_attention as op

HQ, HKV, D, B, ANCHORS = 32, 8, 128, 16, 512
MASK = 1 << 28
CASES = [  # keys, anchors of the chunk, window (0: none), packed chats
    (2048, 512, 0, False),
    (4096, 512, 0, False),
    (8192, 512, 0, False),
    (16384, 512, 0, False),
    (32768, 512, 0, False),
    (32768, 128, 0, False),
    (8192, 512, 2048, False),
    (2048, 512, 0, True),
    (8192, 512, 0, True),
]


def blocks(
    num_keys: int, packed: bool
) -> tuple[Tensor, Tensor]:  # anchors, doc_start [ANCHORS], drawn without replacement and sorted
    if packed:
        pos, doc_start = chats(num_keys)
    else:
        pos = torch.arange(num_keys, device="cuda")
        doc_start = torch.zeros_like(pos)
    drawn = torch.randperm(len(pos), generator=torch.Generator().manual_seed(0))[:ANCHORS].sort().values.cuda()
    return pos[drawn], doc_start[drawn]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def bench_case(
    num_keys: int,
    num_anchors: int,
    window: int,
    packed: bool,
    rounds: int = 15,
    commit: str | None = None,
    compare: bool = True,  # with flex and sdpa
) -> dict[str, dict[str, list[float]]]:
    anchors, doc_start = (x[-num_anchors:] for x in blocks(num_keys, packed))
    rows = op.block_rows(anchors, doc_start, B, None, window or None, causal=window > 0)
    num_rows = num_anchors * B
    scale = D**-0.5
    inputs = [
        (normal(num_rows, HQ, D), *(normal(num_keys, HKV, D) for _ in "kv"), *(normal(num_rows, HKV, D) for _ in "kv"))
        for _ in range(2)
    ]
    douts = [normal(num_rows, HQ, D) for _ in range(2)]
    kept = [op.block_attention_fwd(*x, rows, scale) for x in inputs]
    dq, delta = torch.empty_like(douts[0]), torch.empty_like(kept[0][1])
    dk_blk, dv_blk = (torch.empty(num_rows, HKV, D, device="cuda") for _ in range(2))
    dk_ctx, dv_ctx = (torch.zeros(num_keys, HKV, D, device="cuda") for _ in range(2))
    # The kernel over the context's keys is given those that some row sees, as in the engine.
    seen_keys = slice(int(rows.ctx_start.min()), int(rows.ctx_end.max()))
    shifted = op.BlockRows(rows.ctx_start - seen_keys.start, rows.ctx_end - seen_keys.start, rows.blk_start, rows.blk_end)
    partial = torch.empty(op.block_attention_partials(D), device="cuda")

    def fwd(i):
        op.block_attention_fwd(*inputs[i % 2], rows, scale, *kept[i % 2])

    def bwd_q(i):
        op.block_attention_bwd_q(
            douts[i % 2], *inputs[i % 2], rows, *kept[i % 2], scale, dk_blk, dv_blk, dq, delta
        )  # fmt: skip

    def bwd_kv(i):
        q, *keys = inputs[i % 2][:3]
        keys, sums = ([x[seen_keys] for x in pair] for pair in (keys, (dk_ctx, dv_ctx)))
        op.block_attention_bwd_kv(douts[i % 2], q, *keys, shifted, kept[i % 2][1], delta, scale, *sums, partial)

    def bwd(i):
        bwd_q(i)
        bwd_kv(i)

    ours = {
        "fwd": {"fastdraft": fwd},
        "bwd": {"fastdraft": bwd},
        "bwd_q": {"fastdraft": bwd_q},
        "bwd_kv": {"fastdraft": bwd_kv},
    }
    bwd(0)
    result = kept[0][0], dq, *(x.bfloat16() for x in (dk_ctx, dv_ctx, dk_blk, dv_blk))
    dk_ctx.zero_()
    dv_ctx.zero_()
    others = {"flex": flex} if compare else {}
    if compare and num_rows * (num_keys + num_rows) <= MASK:
        others["sdpa"] = sdpa
    for name, other in others.items():
        ours["fwd"][name], ours["bwd"][name] = compared(name, *other(inputs[0], douts[0], rows), result)
    pairs = int((rows.ctx_end - rows.ctx_start + rows.blk_end - rows.blk_start).sum())
    flops = 4 * D * HQ * pairs
    q_bytes, k_bytes, own_bytes = num_rows * HQ * D * 2, num_keys * HKV * D * 2, num_rows * HKV * D * 2
    need = {  # bytes, products of the forward's two
        "fwd": (2 * q_bytes + 2 * k_bytes + 2 * own_bytes, 1),
        "bwd": (4 * q_bytes + 2 * k_bytes + 8 * k_bytes + 2 * own_bytes + 4 * own_bytes, 2.5),
        "bwd_q": (4 * q_bytes + 2 * k_bytes + 2 * own_bytes + 4 * own_bytes, 1.5),
        "bwd_kv": (2 * q_bytes + 2 * k_bytes + 8 * k_bytes, 2),
    }
    shape = {"N": num_keys, "anchors": num_anchors, "B": B, "Hq": HQ, "Hkv": HKV, "D": D}
    shape |= ({"window": window} if window else {}) | ({"chats": 1} if packed else {})
    found = {}
    for name, providers in ours.items():
        num_bytes, factor = need[name]
        found[name] = times = measure(providers, rounds)
        record(f"block_attention/{name}", shape, "bf16", times, num_bytes, int(flops * factor), commit)
        print("  TFLOP/s", {p: round(flops * factor / us[len(us) // 2] / 1e6) for p, us in times.items()})
    return found


def heads_first(x: Tensor) -> Tensor:  # [n, heads, D] -> [1, heads, n, D]
    return x.transpose(0, 1).contiguous()[None]


def seen(rows: op.BlockRows, num_keys: int) -> Callable[..., Tensor]:
    """flex_attention's mask over the context's keys and, behind them, the blocks'."""

    def mask(batch, head, row, key):
        in_context = (key >= rows.ctx_start[row]) & (key < rows.ctx_end[row])
        in_block = (key - num_keys >= rows.blk_start[row]) & (key - num_keys < rows.blk_end[row])
        return in_context | in_block

    return mask


Other = tuple[Callable[[], Tensor], list[Tensor], Tensor, int]  # forward, its leaves q, k, v, dout, how many context keys


def flex(x: tuple[Tensor, ...], dout: Tensor, rows: op.BlockRows) -> Other:
    q, k_ctx, v_ctx, k_blk, v_blk = x
    leaves = [heads_first(t).requires_grad_() for t in (q, torch.cat([k_ctx, k_blk]), torch.cat([v_ctx, v_blk]))]
    mask = create_block_mask(seen(rows, len(k_ctx)), None, None, len(q), leaves[1].shape[2], device="cuda")
    torch.compiler.reset()  # After eight shapes of one function it would no longer compile.
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*leaves, block_mask=mask, enable_gqa=True), leaves, heads_first(dout), len(k_ctx)


def sdpa(x: tuple[Tensor, ...], dout: Tensor, rows: op.BlockRows) -> Other:
    q, k_ctx, v_ctx, k_blk, v_blk = x
    keys, values = (torch.cat(t).repeat_interleave(HQ // HKV, 1) for t in ((k_ctx, k_blk), (v_ctx, v_blk)))
    leaves = [heads_first(t).requires_grad_() for t in (q, keys, values)]
    row, key = torch.arange(len(q), device="cuda"), torch.arange(len(keys), device="cuda")
    mask = seen(rows, len(k_ctx))(0, 0, row[:, None], key[None, :])

    def forward():
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(*leaves, attn_mask=mask)

    return forward, leaves, heads_first(dout), len(k_ctx)


def compared(
    name: str, forward: Callable[[], Tensor], leaves: list[Tensor], dout: Tensor, num_keys: int, ours: tuple[Tensor, ...]
) -> tuple[Callable[[int], object], Callable[[int], object]]:  # forward and backward, to be timed
    """Refuses to time what computes something else: every result lies within 2 % of its largest value of ours."""
    out = forward()
    dq, dk, dv = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    out, dq = (x[0].transpose(0, 1) for x in (out, dq))
    dk, dv = (x[0].transpose(0, 1).unflatten(1, (HKV, -1)).float().sum(2) for x in (dk, dv))
    theirs = out, dq, dk[:num_keys], dv[:num_keys], dk[num_keys:], dv[num_keys:]
    for what, a, b in zip(("out", "dq", "dk_ctx", "dv_ctx", "dk_blk", "dv_blk"), ours, theirs, strict=True):
        error, most = float((a.float() - b.float()).abs().max()), float(b.float().abs().max())
        if error > 0.02 * most:
            raise ValueError(f"{name} gives another {what}: {error:.3g} apart, its largest is {most:.3g}")
    graph = forward()
    return lambda _: forward(), lambda _: torch.autograd.grad(graph, leaves, dout, retain_graph=True)


@functools.cache
def times_of(case: tuple[int, int, int, bool]) -> dict[str, dict[str, list[float]]]:
    return bench_case(*case)


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize("case", CASES)
def test_block_attention(case, pass_, show):
    show(times_of(case)[pass_])


if __name__ == "__main__":
    run_cases(__doc__, bench_case, CASES)
