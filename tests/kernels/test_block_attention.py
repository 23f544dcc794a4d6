"""The block attention kernels against their reference; without a GPU in fp32 under Triton's interpreter (conftest.py)."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from attention_rule import UNCOVERED, assert_close

from fastdraft.kernels import block_attention as op
from fastdraft.kernels.block_attention import (
    BlockRows,
    block_attention_bwd_kv,
    block_attention_bwd_q,
    block_attention_fwd,
    block_attention_ref,
    block_rows,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(op.triton is None, reason="Triton is not installed (a CPU PyTorch comes without it)")
bf16_on_gpu = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, bf16_on_gpu]
NAMES = ("out", "lse", "dq", "dk_ctx", "dv_ctx", "dk_blk", "dv_blk")


def blocks(lengths, anchors):
    """anchors, doc_start [C] of packed documents, and how many tokens they have."""
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    anchors = torch.tensor(anchors)
    return anchors, starts[torch.searchsorted(starts, anchors, right=True) - 1], sum(lengths)


def tensors(rows, num_keys, num_own, dtype, heads=(2, 1), dim=64, seed=0):
    """q, k_ctx, v_ctx, k_blk, v_blk, dout in float64 rounded through dtype."""
    g = torch.Generator().manual_seed(seed)
    m, (hq, hkv) = len(rows.ctx_start), heads
    shapes = [(m, hq, dim), *[(num_keys, hkv, dim)] * 2, *[(num_own, hkv, dim)] * 2, (m, hq, dim)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def to(rows, device):
    return BlockRows(*(getattr(rows, f.name).to(device) for f in fields(rows)))


def reference(x, dout, rows):
    """out, lse and the gradients, by autograd."""
    leaves = [t.detach().clone().requires_grad_() for t in x]
    out, lse = block_attention_ref(*leaves, rows, return_lse=True)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout, materialize_grads=True)]


def explicit(x, dout, rows):
    """The same by the public functions: on a CPU in plain PyTorch."""
    q, k, v, k_blk, v_blk = x
    scale = q.shape[2] ** -0.5
    out, lse = block_attention_fwd(*x, rows, scale)
    own = [torch.empty_like(t) for t in (k_blk, v_blk)]
    dq, delta = block_attention_bwd_q(dout, *x, rows, out, lse, scale, *own)
    context = [torch.zeros_like(t, dtype=lse.dtype) for t in (k, v)]
    block_attention_bwd_kv(dout, q, k, v, rows, lse, delta, scale, *context)
    return [out, lse, dq, *context, *own]


def kernels(x, dout, rows):
    """The same by the launches, which run interpreted on a CPU."""
    q, k, v, k_blk, v_blk = x
    scale = q.shape[2] ** -0.5
    out, dq = (torch.empty_like(q) for _ in range(2))
    lse, delta = (torch.empty(q.shape[1], len(q), device=q.device) for _ in range(2))
    own = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k_blk, v_blk)]
    context = [torch.zeros(k.shape, device=q.device) for _ in range(2)]
    op._block_attention_fwd(*x, rows, scale, out, lse)
    op._block_attention_bwd_q(dout, *x, rows, out, lse, scale, *own, dq, delta)
    op._bwd_keys(dout, q, k, v, rows.ctx_start, rows.ctx_end, lse, delta, scale, *context, add=True)
    return [out, lse, dq, *context, *own]


@pytest.fixture(autouse=True)
def poisoned(poison):
    """What a kernel forgets to write is NaN."""


def check_rows(rows, num_keys, num_own, dtype, **kwargs):
    *x, dout = tensors(rows, num_keys, num_own, dtype, **kwargs)
    truth = reference([t.double() for t in x], dout.double(), rows)
    x, dout, rows = [t.to(DEVICE) for t in x], dout.to(DEVICE), to(rows, DEVICE)
    plain = reference(x, dout, rows)
    ours = kernels(x, dout, rows)
    assert_close(ours, plain, truth, dtype, NAMES)
    return ours


def check(lengths, anchors, block, dtype, live=None, window=None, causal=False, **kwargs):
    anchors, doc_start, num_keys = blocks(lengths, anchors)
    rows = block_rows(anchors, doc_start, block, live, window, causal)
    return check_rows(rows, num_keys, len(anchors) * block, dtype, **kwargs)


def some(num, share=0.4, seed=1):
    return (torch.rand(num, generator=torch.Generator().manual_seed(seed)) < share).nonzero()[:, 0]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 2, 7, 10, 16, 31, 32])
def test_block_sizes(block, dtype):
    check([90], [0, 1, 33, 34, 89], block, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 31, 32, 33, 63, 64, 65, 129])
def test_context_lengths(keys, dtype):
    """The anchor is the last token, so the context is one key shorter than the pack."""
    check([keys], [keys - 1], 5, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 2), (7, 1), (32, 1)])
def test_groups(heads, dtype):
    check([37], [3, 20, 36], 6, dtype, heads=heads)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", op.HEAD_DIMS)
def test_head_dims(dim, dtype):
    check([37], [3, 20, 36], 6, dtype, dim=dim)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_copy_engine(dtype, monkeypatch):
    """The loads of GPUs before Hopper."""
    config = op.block_attention_config

    def plain(*args):
        c = config(*args)
        return replace(c, **{f.name: replace(getattr(c, f.name), tma=False, stages=1) for f in fields(c)})

    monkeypatch.setattr(op, "block_attention_config", plain)
    check([5, 70, 1], [2, 5, 40, 74, 75], 7, dtype, dim=96)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 8, 40])
def test_packed_documents_and_windows(window, causal, dtype):
    """Tiles hold rows of several documents, and rows whose windows lie apart."""
    lengths = [5, 170, 1, 33, 140]
    check(lengths, [0, 2, 60, 61, 174, 175, 176, 180, 210, 300, 348], 8, dtype, window=window, causal=causal)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_only_live_rows_ask(causal, dtype):
    lengths, anchors = [40, 150, 30], [0, 10, 39, 90, 91, 150, 189, 190, 219]
    live = some(9 * 7)
    ours = check(lengths, anchors, 7, dtype, live=live, window=30, causal=causal)
    unseen = torch.ones(9, 7, dtype=torch.bool)
    for row in live.tolist():
        unseen[row // 7, : row % 7 + 1 if causal else 7] = False
    assert bool(unseen.any()) or not causal
    assert all(bool((grad[unseen.flatten()] == 0).all()) for grad in ours[5:])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_without_a_live_row(dtype):
    """Whole key blocks of the blocks' own keys that no row sees: their gradient is written too."""
    ours = check([90], list(range(40, 70)), 8, dtype, live=torch.arange(64, 72))
    unseen = torch.arange(30 * 8) // 8 != 8
    assert all(bool((grad[unseen] == 0).all()) for grad in ours[5:])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_any_order(dtype):
    order = torch.randperm(9 * 4, generator=torch.Generator().manual_seed(3))
    check([40, 150, 30], [219, 10, 39, 0, 91, 150, 90, 190, 189], 4, dtype, live=order)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gap_that_no_row_sees(dtype):
    """Rows of two documents, or with windows that lie apart, in one tile: the key blocks between are not even read, which
    their NaN would show. Nor are those behind the last anchor."""
    for anchors, case in (([33, 70, 301, 390], {}), ([70, 390], dict(window=3, causal=True))):
        check([300, 300], anchors, 3, dtype, **case)
        rows = to(block_rows(*blocks([300, 300], anchors)[:2], 3, **case), DEVICE)
        *x, dout = (t.to(DEVICE) for t in tensors(rows, 600, 3 * len(anchors), dtype))
        clean = kernels(x, dout, rows)
        for t in x[1:3]:
            t[192:256] = torch.nan
            t[512:] = torch.nan
        assert all(torch.equal(a, b) for a, b in zip(kernels(x, dout, rows), clean, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding(dtype):
    """A row whose two intervals are empty."""
    anchors, doc_start, num_keys = blocks([90], [0, 33, 34, 89])
    rows = block_rows(anchors, doc_start, 8)
    padded = torch.zeros(32, dtype=torch.bool)
    padded[[3, 4, 5, 30, 31]] = True
    rows = BlockRows(*(x.masked_fill(padded, 0) for x in (rows.ctx_start, rows.ctx_end, rows.blk_start, rows.blk_end)))
    ours = check_rows(rows, num_keys, 32, dtype)
    assert all(bool((ours[i][padded] == 0).all()) for i in (0, 2))
    assert bool((ours[1][:, padded] == -torch.inf).all())
    *x, dout = (t.to(DEVICE) for t in tensors(rows, num_keys, 32, dtype))
    x[0][padded] = torch.nan
    dout[padded] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(ours, kernels(x, dout, to(rows, DEVICE)), strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_goes_on_from_keys_before(dtype):
    """The keys [0, 32) by another kernel, here the reference, and the rest by ours."""
    anchors, doc_start, num_keys = blocks([90], [32, 40, 89])
    whole, rest = block_rows(anchors, doc_start, 5), block_rows(anchors, doc_start + 32, 5)
    zero = torch.zeros_like(whole.ctx_start)
    before = BlockRows(zero, zero + 32, zero, zero)
    *x, dout = tensors(whole, num_keys, 15, dtype)
    truth = reference([t.double() for t in x], dout.double(), whole)[:3]
    x, dout, whole, rest, before = (
        [t.to(DEVICE) for t in x],
        dout.to(DEVICE),
        *(to(r, DEVICE) for r in (whole, rest, before)),
    )
    plain = reference(x, dout, whole)[:3]
    scale = 64**-0.5
    double = [t.double() for t in x]
    out, lse = block_attention_ref(*double, before, return_lse=True)
    out, lse = out.to(dtype), lse.float().contiguous()
    op._block_attention_fwd(*x, rest, scale, out, lse, started=True)
    # The part of dq that comes from the keys before, with the merged lse and delta, in float64.
    k, v = (t[:32].double().expand(-1, 2, -1) for t in (x[1], x[2]))
    p = (torch.einsum("rhd,nhd->hrn", double[0], k) * scale - lse.double()[..., None]).exp()
    delta = (out.double() * dout.double()).sum(-1).T[..., None]
    ds = p * (torch.einsum("rhd,nhd->hrn", dout.double(), v) - delta)
    dq_start = (torch.einsum("hrn,nhd->rhd", ds, k) * scale).float().contiguous()
    dq, deltas = torch.empty_like(x[0]), torch.empty_like(lse)
    own = [torch.empty_like(t) for t in x[3:]]
    op._block_attention_bwd_q(dout, *x, rest, out, lse, scale, *own, dq, deltas, dq_start)
    assert_close([out, lse, dq], plain, truth, dtype, NAMES[:3])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_add_to_the_contexts_gradient(dtype):
    """The blocks of a pack in two chunks, each with its own rows and own keys, over the same context."""
    anchors, doc_start, num_keys = blocks([60, 65], [5, 20, 59, 60, 90, 124])
    whole = block_rows(anchors, doc_start, 6)
    *x, dout = tensors(whole, num_keys, 36, dtype)
    truth = reference([t.double() for t in x], dout.double(), whole)[3:5]
    plain = reference([t.to(DEVICE) for t in x], dout.to(DEVICE), to(whole, DEVICE))[3:5]
    q, k, v, k_blk, v_blk, dout = (t.to(DEVICE) for t in (*x, dout))
    total = [torch.zeros(k.shape, device=DEVICE) for _ in range(2)]
    scale = 64**-0.5
    for part in (slice(0, 2), slice(2, 6)):
        rows, at = to(block_rows(anchors[part], doc_start[part], 6), DEVICE), slice(part.start * 6, part.stop * 6)
        mine = q[at], k, v, k_blk[at], v_blk[at]
        out, lse = torch.empty_like(q[at]), torch.empty(2, len(q[at]), device=DEVICE)
        dq, delta = torch.empty_like(out), torch.empty_like(lse)
        own = [torch.empty_like(t) for t in mine[3:]]
        op._block_attention_fwd(*mine, rows, scale, out, lse)
        op._block_attention_bwd_q(dout[at], *mine, rows, out, lse, scale, *own, dq, delta)
        op._bwd_keys(dout[at], q[at], k, v, rows.ctx_start, rows.ctx_end, lse, delta, scale, *total, add=True)
    assert_close(total, plain, truth, dtype, NAMES[3:5])


@needs_kernels
@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_that_share_a_key_block(dtype, parts):
    """Documents, a key block that no row sees, and more parts than some blocks have tiles."""
    anchors, doc_start, num_keys = blocks([150, 90], [3, 20, 60, 140, 149, 152, 200, 239])
    rows = block_rows(anchors, doc_start, 7)
    *x, dout = tensors(rows, num_keys, 56, dtype, heads=(4, 2))
    truth = reference([t.double() for t in x], dout.double(), rows)
    x, dout, rows = [t.to(DEVICE) for t in x], dout.to(DEVICE), to(rows, DEVICE)
    plain, ours = reference(x, dout, rows), kernels(x, dout, rows)
    q, k, v = x[:3]
    lse, delta = ours[1], (ours[0].float() * dout.float()).sum(-1).T.contiguous()
    partial = torch.empty(parts, 2, *k.shape, device=DEVICE)
    found = [torch.full(k.shape, 3.0, device=DEVICE) for _ in range(2)]
    op._bwd_keys(dout, q, k, v, rows.ctx_start, rows.ctx_end, lse, delta, q.shape[2] ** -0.5, *found, True, partial)
    assert_close([t - 3 for t in found], plain[3:5], truth[3:5], dtype, NAMES[3:5])


def test_how_many_programs_share_a_key_block():
    """About 1024 programs where the scratch memory suffices; a long context has enough by itself."""
    room = op.block_attention_partials(128)
    counts = [op.kv_parts(keys, 8, 128, 64, 64, room) for keys in (64, 512, 2048, 4096, 4097, 8192, 1 << 17)]
    assert counts == [8, 8, 4, 2, 1, 1, 1]
    assert op.kv_parts(2048, 8, 128, 64, 3, room) == 3 and op.kv_parts(2048, 8, 128, 64, 64, room // 2) == 2
    assert op.kv_parts(2048, 8, 128, 64, 64, 10) == 1


@pytest.mark.parametrize("keys", [0, 1, 2047, 4096, 8193, 1 << 17])
def test_the_scratch_memory_suffices_for_any_number_of_keys(keys):
    scratch = torch.empty(op.block_attention_partials(128), device="meta")
    k = torch.empty(keys, 8, 128, device="meta")
    parts = op.kv_parts(keys, 8, 128, 64, 64, len(scratch))
    sums = op.kv_sums(scratch, k, 64, 64)
    assert sums is None if parts == 1 else sums.shape == (parts, 2, keys, 8, 128)
    assert (parts > 1) == (keys <= 4096)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_bitwise_equal(dtype):
    anchors, doc_start, num_keys = blocks([50, 141], [3, 20, 49, 50, 90, 91, 92, 150, 190])
    rows = to(block_rows(anchors, doc_start, 10, some(90, 0.8)), DEVICE)
    *x, dout = (t.to(DEVICE) for t in tensors(rows, num_keys, 90, dtype, heads=(4, 2)))
    assert all(torch.equal(a, b) for a, b in zip(*(kernels(x, dout, rows) for _ in range(2)), strict=True))


@needs_kernels
def test_rows_may_be_strided():
    anchors, doc_start, num_keys = blocks([40], [3, 20, 39])
    rows = to(block_rows(anchors, doc_start, 8), DEVICE)
    *x, dout = (t.to(DEVICE) for t in tensors(rows, num_keys, 24, DTYPES[0]))
    q, k, v, k_blk, v_blk = x
    whole = kernels(x, dout, rows)
    fused, context = torch.cat([q, k_blk, v_blk], 1), torch.cat([k, v], 1)
    views = [fused[:, :2], context[:, :1], context[:, 1:], fused[:, 2:3], fused[:, 3:]]
    assert all(torch.equal(a, b) for a, b in zip(whole, kernels(views, dout, rows), strict=True))


@needs_kernels
def test_own_gradients_are_written_in_the_dtype_of_their_buffers():
    anchors, doc_start, num_keys = blocks([40], [3, 20, 39])
    rows = to(block_rows(anchors, doc_start, 8), DEVICE)
    *x, dout = (t.to(DEVICE) for t in tensors(rows, num_keys, 24, DTYPES[0]))
    _, lse, *_, dk, dv = kernels(x, dout, rows)
    out, delta = kernels(x, dout, rows)[0], torch.empty_like(lse)
    doubles = [torch.full(t.shape, 7.0, dtype=torch.float64, device=DEVICE) for t in x[3:]]
    op._block_attention_bwd_q(dout, *x, rows, out, lse, 64**-0.5, *doubles, torch.empty_like(x[0]), delta)
    assert torch.equal(doubles[0].float(), dk) and torch.equal(doubles[1].float(), dv)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="a real model's shape needs a CUDA GPU")
@pytest.mark.parametrize("window, causal", [(None, False), (512, True)])
def test_a_real_model(window, causal):
    """Qwen3-8B's heads: packed documents, blocks of 16, ragged live rows."""
    g = torch.Generator().manual_seed(2)
    anchors = torch.randperm(2048, generator=g)[:60].sort().values.tolist()
    live = some(60 * 16, 0.8)
    check([700, 1300, 48], anchors, 16, torch.bfloat16, live, window, causal, heads=(32, 8), dim=128)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="scratch memory is used on a GPU")
@pytest.mark.parametrize("keys", [200, 8193])
def test_keys_with_and_without_room_for_shared_sums(keys):
    """Of 8193 keys with 8 heads of 128 the scratch memory cannot hold one sum."""
    anchors, doc_start, num_keys = blocks([keys], [20, 90, keys - 1])
    rows = block_rows(anchors, doc_start, 4)
    *x, dout = tensors(rows, num_keys, 12, torch.float32, heads=(8, 8), dim=128)
    truth = reference([t.double() for t in x], dout.double(), rows)
    x, dout, rows = [t.to(DEVICE) for t in x], dout.to(DEVICE), to(rows, DEVICE)
    plain, ours = reference(x, dout, rows), kernels(x, dout, rows)
    found = [torch.zeros_like(t) for t in x[1:3]]
    delta = (ours[0] * dout).sum(-1).T.contiguous()
    scratch = torch.empty(op.block_attention_partials(128), device=DEVICE)
    block_attention_bwd_kv(dout, *x[:3], rows, ours[1], delta, 128**-0.5, *found, scratch)
    assert_close(found, plain[3:5], truth[3:5], torch.float32, NAMES[3:5])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the public functions take the plain path on a CPU")
def test_public_functions_run_the_kernels():
    anchors, doc_start, num_keys = blocks([90], [0, 33, 34, 89])
    rows = to(block_rows(anchors, doc_start, 8), DEVICE)
    *x, dout = (t.to(DEVICE) for t in tensors(rows, num_keys, 32, torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(explicit(x, dout, rows), kernels(x, dout, rows), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU reads rows wherever they lie")
def test_rows_that_the_copy_engine_cannot_read_are_named():
    x = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in inputs().items()}
    x["rows"] = to(x["rows"], DEVICE)
    odd = torch.zeros(8 * 2 * 64 + 1, device=DEVICE)[1:].view(8, 2, 64)
    with pytest.raises(ValueError, match=r"k_blk begins at .* multiples of 16 bytes"):
        block_attention_fwd(**(x | dict(k_blk=odd)))


def naive(q, k, v, k_blk, v_blk, anchors, doc_start, block, live, window, causal):
    """Row by row and key by key as METHODS writes it down, knowing nothing of intervals."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for r, row in enumerate(live.tolist()):
        c, slot = divmod(row, block)
        a, s = int(anchors[c]), int(doc_start[c])
        context = [u for u in range(len(k)) if s <= u < a and (window is None or u >= a + slot - (window - 1))]
        own = [c * block + j for j in range(block) if not causal or j <= slot]
        keys, values = torch.cat([k[context], k_blk[own]]), torch.cat([v[context], v_blk[own]])
        for h in range(q.shape[1]):
            p = (keys[:, h // group] @ q[r, h] * q.shape[2] ** -0.5).softmax(0)
            out[r, h] = p @ values[:, h // group]
    return out


VARIANTS = [(None, False), (None, True), (7, True), (30, False)]


@pytest.mark.parametrize("window, causal", VARIANTS)
def test_the_reference_is_the_definition(window, causal):
    anchors, doc_start, num_keys = blocks([30, 1, 60], [0, 3, 29, 30, 31, 80, 81, 90])
    live = some(56, 0.7)
    rows = block_rows(anchors, doc_start, 7, live, window, causal)
    *x, _ = tensors(rows, num_keys, 56, torch.float64, heads=(4, 2), dim=8)
    truth = naive(*x, anchors, doc_start, 7, live, window, causal)
    torch.testing.assert_close(block_attention_ref(*x, rows), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window, causal", VARIANTS)
def test_the_explicit_backward_is_autograds(window, causal, monkeypatch):
    monkeypatch.setattr(op, "CPU_ROWS", 11)
    anchors, doc_start, num_keys = blocks([30, 1, 60], [0, 3, 29, 30, 31, 80, 81, 90])
    rows = block_rows(anchors, doc_start, 7, some(56, 0.7), window, causal)
    *x, dout = tensors(rows, num_keys, 56, torch.float64, heads=(6, 2), dim=8)
    for ours, truth in zip(explicit(x, dout, rows), reference(x, dout, rows), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_explicit_backward_in_the_training_dtypes(dtype):
    anchors, doc_start, num_keys = blocks([30, 1, 60], [0, 3, 29, 30, 31, 80, 81, 90])
    rows = block_rows(anchors, doc_start, 7, some(56, 0.7), 30, True)
    *x, dout = tensors(rows, num_keys, 56, dtype, heads=(6, 2), dim=32)
    truth = reference([t.double() for t in x], dout.double(), rows)
    assert_close(explicit(x, dout, rows), reference(x, dout, rows), truth, dtype, NAMES)


def test_padding_on_a_cpu():
    """Rows that see nothing: exact zeros from inputs of NaN, with and without keys that went before."""
    anchors, doc_start, num_keys = blocks([60], [0, 33, 59])
    rows = block_rows(anchors, doc_start, 5)
    padded = torch.zeros(15, dtype=torch.bool)
    padded[[2, 14]] = True
    rows = BlockRows(*(getattr(rows, f.name).masked_fill(padded, 0) for f in fields(rows)))
    *x, dout = tensors(rows, num_keys, 15, torch.float64, dim=8)
    truth = reference(x, dout, rows)
    for t in (x[0], dout):
        t[padded] = torch.nan
    ours = explicit(x, dout, rows)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    out, lse = torch.zeros_like(x[0]), torch.full((2, 15), -torch.inf, dtype=torch.float64)
    out[padded] = torch.nan
    block_attention_fwd(*x, rows, 8**-0.5, out, lse, started=True)
    torch.testing.assert_close(out, truth[0], rtol=1e-12, atol=1e-12)


def test_goes_on_from_keys_before_on_a_cpu():
    anchors, doc_start, num_keys = blocks([90], [32, 40, 89])
    whole, rest = block_rows(anchors, doc_start, 5), block_rows(anchors, doc_start + 32, 5)
    zero = torch.zeros_like(whole.ctx_start)
    *x, dout = tensors(whole, num_keys, 15, torch.float64, dim=8)
    truth = explicit(x, dout, whole)
    scale = 8**-0.5
    out, lse = block_attention_fwd(*x, BlockRows(zero, zero + 32, zero, zero), scale)
    block_attention_fwd(*x, rest, scale, out, lse, started=True)
    torch.testing.assert_close(out, truth[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, truth[1], rtol=1e-12, atol=1e-12)
    own = [torch.empty_like(t) for t in x[3:]]
    start = torch.randn_like(x[0])
    dq, _ = block_attention_bwd_q(dout, *x, rest, out, lse, scale, *own)
    with_start, _ = block_attention_bwd_q(dout, *x, rest, out, lse, scale, *own, dq_start=start)
    torch.testing.assert_close(with_start, dq + start, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(block=0), "1 to 32 rows, got 0"),
        (dict(block=33), "1 to 32 rows, got 33"),
        (dict(window=3), "window of 3 is narrower than the block of 4"),
        (dict(doc_start=torch.tensor([0, 6])), "before the first row"),
        (dict(doc_start=torch.tensor([-1, 0])), "before the first row"),
        (dict(doc_start=torch.tensor([0])), r"doc_start is \(1,\).*\[2\]"),
        (dict(anchors=torch.tensor([0.0, 5.0])), r"anchors is \(2,\) torch.float32"),
        (dict(live=torch.tensor([0, 8])), r"numbered 0 to 7 \(2 blocks of 4\)"),
        (dict(live=torch.tensor([-1, 7])), "numbered 0 to 7"),
    ],
)
def test_bad_blocks_are_named(change, words):
    x = dict(anchors=torch.tensor([0, 5]), doc_start=torch.tensor([0, 0]), block=4)
    with pytest.raises(ValueError, match=words):
        block_rows(**(x | change))


def inputs():
    rows = block_rows(torch.tensor([0, 5]), torch.tensor([0, 0]), 4)
    x = dict(q=torch.zeros(8, 4, 64), k_ctx=torch.zeros(9, 2, 64), v_ctx=torch.zeros(9, 2, 64))
    return x | dict(k_blk=torch.zeros(8, 2, 64), v_blk=torch.zeros(8, 2, 64), rows=rows, scale=0.125)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(q=torch.zeros(8, 3, 64)), "multiple of Hkv"),
        (dict(v_ctx=torch.zeros(9, 2, 64, dtype=torch.bfloat16)), r"v_ctx is \(9, 2, 64\) torch.bfloat16.*torch.float32"),
        (dict(k_blk=torch.zeros(8, 1, 64)), r"k_blk is \(8, 1, 64\).*\[S, 2, 64\]"),
        (dict(v_blk=torch.zeros(7, 2, 64)), r"v_blk is \(7, 2, 64\).*\[8, 2, 64\]"),
        (dict(q=torch.zeros(7, 4, 64)), r"ctx_start is \(8,\).*\[7\]"),
        (dict(k_ctx=torch.zeros(2, 9, 64).transpose(0, 1)), "contiguous rows"),
        (dict(scale=-1.0), "positive"),
        (dict(out=torch.zeros(8, 4, 32)), r"out is \(8, 4, 32\)"),
        (dict(lse=torch.zeros(8, 4)), r"lse is \(8, 4\).*\[4, 8\]"),
        (dict(started=True), "give both"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        block_attention_fwd(**(inputs() | change))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(dout=torch.zeros(8, 4, 32)), r"dout is \(8, 4, 32\)"),
        (dict(lse=torch.zeros(8, 4)), r"lse is \(8, 4\)"),
        (dict(dk_blk=torch.zeros(9, 2, 64)), r"dk_blk is \(9, 2, 64\).*\[8, 2, 64\]"),
        (dict(dv_blk=torch.zeros(8, 2, 64, dtype=torch.bfloat16)), "dv_blk is .*bfloat16.*float32"),
        (dict(dq_start=torch.zeros(8, 4, 64, dtype=torch.bfloat16)), "dq_start is .*bfloat16.*float32"),
    ],
)
def test_bad_input_of_the_backward_is_named(change, words):
    x = inputs() | dict(dout=torch.zeros(8, 4, 64), out=torch.zeros(8, 4, 64), lse=torch.zeros(4, 8))
    x |= dict(dk_blk=torch.zeros(8, 2, 64), dv_blk=torch.zeros(8, 2, 64))
    with pytest.raises(ValueError, match=words):
        block_attention_bwd_q(**(x | change))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(delta=torch.zeros(4, 7)), r"delta is \(4, 7\)"),
        (dict(dk_ctx=torch.zeros(9, 2, 64, dtype=torch.bfloat16)), "dk_ctx is .*bfloat16.*float32"),
        (dict(dv_ctx=torch.zeros(8, 2, 64)), r"dv_ctx is \(8, 2, 64\).*\[9, 2, 64\]"),
    ],
)
def test_bad_input_of_the_contexts_backward_is_named(change, words):
    x = {name: x for name, x in inputs().items() if name not in ("k_blk", "v_blk")}
    x |= dict(dout=torch.zeros(8, 4, 64), lse=torch.zeros(4, 8), delta=torch.zeros(4, 8))
    x |= dict(dk_ctx=torch.zeros(9, 2, 64), dv_ctx=torch.zeros(9, 2, 64))
    with pytest.raises(ValueError, match=words):
        block_attention_bwd_kv(**(x | change))


@pytest.mark.parametrize("args, words", UNCOVERED)
def test_uncovered_shapes_are_named(args, words):
    with pytest.raises(ValueError, match=words):
        op.block_attention_config(*args)
