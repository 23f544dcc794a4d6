"""The TTT attention kernels against their reference; without a GPU in fp32 under Triton's interpreter (conftest.py)."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from attention_rule import UNCOVERED, assert_close

from fastdraft.kernels import ttt_attention as op
from fastdraft.kernels.ttt_attention import ttt_attention, ttt_attention_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(op.triton is None, reason="Triton is not installed (a CPU PyTorch comes without it)")
bf16_on_gpu = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, bf16_on_gpu]


def documents(*lengths):
    """pos, doc_start of every row of packed documents."""
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    doc_start = starts.repeat_interleave(torch.tensor(lengths))
    return torch.arange(len(doc_start)), doc_start


def tensors(pos, num_keys, num_diag, dtype, heads=(2, 1), dim=64, spare=0, seed=0):
    """q, k0, v0, k_diag, v_diag, dout as leaves, in float64 rounded through dtype."""
    g = torch.Generator().manual_seed(seed)
    m, (hq, hkv) = len(pos), heads
    shapes = [(m, hq, dim), *[(num_keys, hkv, dim)] * 2, *[(num_diag, m + spare, hkv, dim)] * 2, (m, hq, dim)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def gradients(fn, x, dout, *index):
    x = [t.detach().clone().requires_grad_() for t in x]
    out, lse = fn(*x, *index)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, x, dout, materialize_grads=True)]


def kernels(q, k0, v0, k_diag, v_diag, pos, doc_start):
    return op._TTTAttention.apply(q, k0, v0, k_diag, v_diag, pos, doc_start, q.shape[-1] ** -0.5)


def reference(q, k0, v0, k_diag, v_diag, pos, doc_start):
    return ttt_attention_ref(q, k0, v0, k_diag, v_diag, pos, doc_start, return_lse=True)


NAMES = ("out", "lse", "dq", "dk0", "dv0", "dk_diag", "dv_diag")


@pytest.fixture(autouse=True)
def poisoned(poison):
    """What a kernel forgets to write is NaN."""


def check(pos, doc_start, num_keys, num_diag, dtype, **kwargs):
    *x, dout = tensors(pos, num_keys, num_diag, dtype, **kwargs)
    truth = gradients(reference, [t.double() for t in x], dout.double(), pos, doc_start)
    on = [t.to(DEVICE) for t in (*x, dout, pos, doc_start)]
    plain = gradients(reference, on[:5], on[5], *on[6:])
    ours = gradients(kernels, on[:5], on[5], *on[6:])
    assert_close(ours, plain, truth, dtype, NAMES)
    return ours


def tile(dtype, dim=64, group=2):
    arch = torch.cuda.get_device_capability() if DEVICE == "cuda" else None
    return op.ttt_attention_config(dim, group, dtype, arch).fwd


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["one row", "tile", "tile+1", "ragged"])
def test_lengths(case, dtype):
    t = tile(dtype)
    length = {"one row": 1, "tile": t.rows // 2, "tile+1": t.rows // 2 + 1, "ragged": max(t.rows, t.keys) + 7}[case]
    check(*documents(length), length, 2, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_diag", [0, 1, 6])
def test_chain_depths(num_diag, dtype):
    check(*documents(20), 20, num_diag, dtype, spare=3)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 2), (7, 1)])
def test_groups(heads, dtype):
    check(*documents(37), 37, 2, dtype, heads=heads)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", op.HEAD_DIMS)
def test_head_dims(dim, dtype):
    check(*documents(33), 33, 2, dtype, dim=dim)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_copy_engine(dtype, monkeypatch):
    """The loads of GPUs before Hopper."""
    config = op.ttt_attention_config

    def plain(*args):
        c = config(*args)
        return replace(c, **{f.name: replace(getattr(c, f.name), tma=False, stages=1) for f in fields(c)})

    monkeypatch.setattr(op, "ttt_attention_config", plain)
    check(*documents(5, 70, 1), 76, 2, dtype, dim=96)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_documents(dtype):
    check(*documents(5, 70, 1, 33, 2), 111, 2, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_compacted_list_with_padding(dtype):
    pos, doc_start = documents(40, 50, 30)
    keep = torch.rand(len(pos), generator=torch.Generator().manual_seed(1)) < 0.4
    pos, doc_start = (
        torch.cat([x[keep], x[keep][:9], x[keep][:0].new_full((5,), y)]) for x, y in ((pos, -1), (doc_start, 0))
    )
    ours = check(pos, doc_start, 120, 3, dtype, spare=4)
    m = len(pos)
    assert all(bool((ours[i][-5:] == 0).all()) for i in (0, 2))
    assert bool((ours[1][:, -5:] == -torch.inf).all())
    assert all(bool((ours[i][:, m - 5 :] == 0).all()) for i in (5, 6))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_of_a_longer_context(dtype):
    pos, doc_start = documents(30, 150)
    check(pos[100:140], doc_start[100:140], 180, 2, dtype)


@needs_kernels
def test_padding_rows_may_hold_nan():
    dtype = DTYPES[0]
    pos, doc_start = documents(20)
    pos[7:11] = -1
    *x, dout = (t.to(DEVICE) for t in tensors(pos, 20, 2, dtype))
    index = pos.to(DEVICE), doc_start.to(DEVICE)
    clean = gradients(kernels, x, dout, *index)
    for t in (x[0], dout):
        t[7:11] = torch.nan
    for t in x[3:]:
        t[:, 7:11] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(clean, gradients(kernels, x, dout, *index), strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_steps_at_once_equal_step_by_step(dtype):
    """dK^0, dV^0 of the stacked rows of all steps, and of one accumulating call a step."""
    pos, doc_start = documents(60, 25)
    rows = [torch.arange(85), torch.arange(0, 85, 2), torch.arange(0, 85, 4)]
    pos, doc_start = (torch.cat([x[r] for r in rows]) for x in (pos, doc_start))
    q, k0, v0, _, _, dout = tensors(pos, 85, 0, dtype)
    none = k0.new_empty((0, len(pos), *k0.shape[1:]))
    truth = gradients(
        reference, [t.double() for t in (q, k0, v0, none, none)], dout.double(), pos, doc_start
    )[3:5]  # fmt: skip
    q, k0, v0, none, dout, pos, doc_start = (t.to(DEVICE) for t in (q, k0, v0, none, dout, pos, doc_start))
    plain = gradients(reference, [q, k0, v0, none, none], dout, pos, doc_start)[3:5]
    scale = q.shape[-1] ** -0.5
    out, lse = op._ttt_attention_fwd(q, k0, v0, none, none, pos, doc_start, scale)
    _, delta = op._ttt_attention_bwd_q(dout, q, k0, v0, none, none, pos, doc_start, out, lse, scale, none, none)
    once = [torch.zeros(k0.shape, device=DEVICE) for _ in range(2)]
    op._ttt_attention_bwd_kv(dout, q, k0, v0, pos, doc_start, lse, delta, scale, *once)
    steps = [torch.zeros(k0.shape, device=DEVICE) for _ in range(2)]
    end = 0
    for r in rows:
        s = slice(end, end := end + len(r))
        op._ttt_attention_bwd_kv(dout[s], q[s], k0, v0, pos[s], doc_start[s], lse[:, s], delta[:, s], scale, *steps)
    assert_close(once, plain, truth, dtype, NAMES[3:5])
    assert_close(steps, plain, truth, dtype, NAMES[3:5])


@needs_kernels
def test_diagonal_gradients_add_to_what_the_buffer_holds():
    pos, doc_start = (t.to(DEVICE) for t in documents(20))
    q, k0, v0, k, v, dout = (t.to(DEVICE) for t in tensors(pos, 20, 2, DTYPES[0], spare=2))
    out, lse = op._ttt_attention_fwd(q, k0, v0, k, v, pos, doc_start, 0.125)
    runs = []
    for start in (0.0, 1.0):
        dk, dv = (torch.full(k.shape, start, device=DEVICE) for _ in range(2))
        op._ttt_attention_bwd_q(dout, q, k0, v0, k, v, pos, doc_start, out, lse, 0.125, dk, dv)
        runs.append((dk, dv))
    for zero, one in zip(*runs, strict=True):
        torch.testing.assert_close(one, zero + 1)
        assert bool((one[:, 20:] == 1).all())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_bitwise_equal(dtype):
    pos, doc_start = documents(50, 41)
    *x, dout = (t.to(DEVICE) for t in tensors(pos, 91, 2, dtype))
    runs = [gradients(kernels, x, dout, pos.to(DEVICE), doc_start.to(DEVICE)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_kernels
def test_rows_may_be_strided():
    pos, doc_start = (t.to(DEVICE) for t in documents(40))
    q, k0, v0, k, v, dout = (t.to(DEVICE) for t in tensors(pos, 40, 1, DTYPES[0]))
    whole = gradients(kernels, [q, k0, v0, k, v], dout, pos, doc_start)
    fused = torch.cat([q, k0, v0], 1)
    out, lse = kernels(fused[:, :2], fused[:, 2:3], fused[:, 3:], k, v, pos, doc_start)
    assert torch.equal(out, whole[0]) and torch.equal(lse, whole[1])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="a real model's shape needs a CUDA GPU")
def test_a_real_model():
    """Llama-3.1-8B's heads: packed, compacted rows of a chunk, long context."""
    pos, doc_start = documents(700, 1300, 48)
    keep = (torch.rand(2048, generator=torch.Generator().manual_seed(2)) < 0.7) & (pos >= 300)
    check(pos[keep], doc_start[keep], 2048, 6, torch.bfloat16, heads=(32, 8), dim=128)


def test_reference_is_the_models_attention():
    pytest.importorskip("pydantic")
    from fastdraft.model.eagle3.ref import attention_ref

    pos, doc_start = documents(6, 9)
    q, k0, v0, k, v, _ = tensors(pos, 15, 3, torch.float64, heads=(4, 2), dim=8)
    theirs = attention_ref(q, [k0, *k], [v0, *v], (6, 9))
    torch.testing.assert_close(ttt_attention(q, k0, v0, k, v, pos, doc_start), theirs, rtol=1e-12, atol=1e-12)
    padded = torch.where(pos == 3, -1, pos)
    out, lse = ttt_attention(q, k0, v0, k, v, padded, doc_start, return_lse=True)
    assert bool((out[3] == 0).all()) and bool((lse[:, 3] == -torch.inf).all())
    torch.testing.assert_close(out[4:], theirs[4:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(q=torch.zeros(4, 3, 64)), "multiple of Hkv"),
        (dict(k_diag=torch.zeros(1, 3, 2, 64)), r"k_diag is \(1, 3, 2, 64\).*\[i, >= 4, 2, 64\]"),
        (dict(v0=torch.zeros(9, 2, 64, dtype=torch.bfloat16)), r"v0 is \(9, 2, 64\) torch.bfloat16.*torch.float32"),
        (dict(pos=torch.zeros(3, dtype=torch.int64)), r"pos is \(3,\) torch.int64.*\[4\]"),
        (dict(pos=torch.zeros(4)), r"pos is \(4,\) torch.float32.*torch.int32 or torch.int64"),
        (dict(scale=-1.0), "positive"),
        (dict(v_diag=None), "both"),
    ],
)
def test_bad_input_is_named(change, words):
    x = dict(q=torch.zeros(4, 4, 64), k0=torch.zeros(9, 2, 64), v0=torch.zeros(9, 2, 64))
    x |= dict(k_diag=torch.zeros(1, 4, 2, 64), v_diag=torch.zeros(1, 4, 2, 64))
    x |= dict(pos=torch.zeros(4, dtype=torch.int64), doc_start=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=words):
        ttt_attention(**(x | change))


@pytest.mark.parametrize("args, words", UNCOVERED)
def test_uncovered_shapes_are_named(args, words):
    with pytest.raises(ValueError, match=words):
        op.ttt_attention_config(*args)
