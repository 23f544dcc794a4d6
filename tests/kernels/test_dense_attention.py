"""A context as the dense piece and the rest by the TTT attention kernels, together against the reference of all keys.

Where FlashAttention 4 is not installed a stand-in of the same interface does its part, in plain PyTorch.
"""

from __future__ import annotations

import sys

import pytest
import torch
from test_ttt_attention import DEVICE, DTYPES, NAMES, assert_close, documents, gradients, needs_kernels, reference, tensors

from fastdraft.kernels import dense_attention as dense
from fastdraft.kernels import ttt_attention as op
from fastdraft.model.eagle3 import attention as chain_attention
from fastdraft.model.eagle3.attention import ChainAttention, attention_buffers

needs_flash = pytest.mark.skipif(not dense.installed(), reason="FlashAttention 4 is not installed (pip install .[flash])")


@pytest.fixture(autouse=True)
def poisoned(poison):
    """What a kernel forgets to write is NaN."""


def stand_in_fwd(q, k, v, softmax_scale, return_lse, out, lse):
    """As FlashAttention: [1, M, Hq, D], [1, n, Hkv, D]; every row sees every key."""
    scores = torch.einsum("bmhgd,bnhd->bhgmn", q.unflatten(2, (k.shape[2], -1)), k).float() * softmax_scale
    lse.copy_(scores.logsumexp(-1).flatten(1, 2))
    out.copy_(torch.einsum("bhgmn,bnhd->bmhgd", scores.softmax(-1).to(v.dtype), v).flatten(2, 3))


def stand_in_bwd(q, k, v, out, dout, lse, softmax_scale, deterministic, dq, dk, dv):
    assert q.shape[2] == k.shape[2] and lse.is_contiguous()
    p = (torch.einsum("bmhd,bnhd->bhmn", q, k).float() * softmax_scale - lse[..., None]).exp()
    delta = (out.float() * dout.float()).sum(-1).transpose(1, 2)
    ds = (p * (torch.einsum("bmhd,bnhd->bhmn", dout, v).float() - delta[..., None])).to(q.dtype)
    dq.copy_(torch.einsum("bhmn,bnhd->bmhd", ds, k) * softmax_scale)
    dk.copy_(torch.einsum("bhmn,bmhd->bnhd", ds, q) * softmax_scale)
    dv.copy_(torch.einsum("bhmn,bmhd->bnhd", p.to(q.dtype), dout))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(dense, "_flash_attention", lambda: (stand_in_fwd, stand_in_bwd))


def buffers(table):
    held = {name: torch.empty(rows, *shape, dtype=kind, device=DEVICE) for name, (rows, shape, kind) in table.items()}
    return lambda name, rows: held[name][:rows]


def both_pieces(q, k0, v0, k_diag, v_diag, dout, pos, doc_start, first):
    """out, lse and all gradients, the keys [doc_start, first) as the dense piece."""
    m, heads, dim = q.shape
    scale, stats = dim**-0.5, dict(dtype=torch.float32, device=q.device)
    context, rest = slice(int(doc_start[0]), first), torch.full_like(pos, first)
    out, lse = torch.empty_like(q), torch.empty(heads, m, **stats)
    dk0, dv0, dk_diag, dv_diag = (torch.zeros(x.shape, **stats) for x in (k0, v0, k_diag, v_diag))
    dense.dense_attention_fwd(q, k0[context], v0[context], scale, out, lse)
    args = q, k0, v0, k_diag, v_diag, pos, rest
    op._ttt_attention_fwd(*args, scale, out, lse, started=True)
    take = buffers(dense.dense_buffers(heads, k0.shape[1], dim, m + 3, q.dtype))
    before = dense.dense_attention_bwd(
        dout, q, k0[context], v0[context], out, lse, scale, dk0[context], dv0[context], take
    )  # fmt: skip
    dq, delta = op._ttt_attention_bwd_q(dout, *args, out, lse, scale, dk_diag, dv_diag, dq_start=before)
    op._ttt_attention_bwd_kv(dout, q, k0, v0, pos, rest, lse, delta, scale, dk0, dv0)
    return out, lse, dq, *(x.to(q.dtype) for x in (dk0, dv0, dk_diag, dv_diag))


def check_pieces(pos, doc_start, first, num_keys, num_diag, dtype, **kwargs):
    *x, dout = tensors(pos, num_keys, num_diag, dtype, **kwargs)
    truth = gradients(reference, [t.double() for t in x], dout.double(), pos, doc_start)
    on = [t.to(DEVICE) for t in (*x, dout, pos, doc_start)]
    plain = gradients(reference, on[:5], on[5], *on[6:])
    ours = both_pieces(*on, first)
    assert_close(ours, plain, truth, dtype, NAMES)
    return ours


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, dim", [((2, 1), 64), ((1, 1), 16), ((3, 1), 96), ((8, 2), 32), ((4, 4), 64)])
def test_a_chunk_of_a_long_document(heads, dim, dtype, stand_in):
    pos, doc_start = documents(30, 150)
    check_pieces(pos[100:140], doc_start[100:140], 100, 180, 2, dtype, heads=heads, dim=dim, spare=3)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_diag", [0, 1, 6])
def test_compacted_rows_in_any_order(num_diag, dtype, stand_in):
    pos, doc_start = documents(7, 200)
    rows = torch.randperm(80, generator=torch.Generator().manual_seed(1))[:33] + 120
    check_pieces(pos[rows], doc_start[rows], int(pos[rows].min()), 207, num_diag, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_and_one_key(dtype, stand_in):
    pos, doc_start = documents(3, 40)
    check_pieces(pos[20:21], doc_start[20:21], 20, 43, 2, dtype)
    check_pieces(pos[4:9], doc_start[4:9], 4, 43, 2, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_context_longer_than_its_gradients_buffer(dtype, stand_in, monkeypatch):
    monkeypatch.setattr(dense, "KEYS_PER_ROW", 1)
    calls = []

    def counted(*args, **options):
        calls.append(args[1].shape[1])
        stand_in_bwd(*args, **options)

    monkeypatch.setattr(dense, "_flash_attention", lambda: (stand_in_fwd, counted))
    pos, doc_start = documents(5, 400)
    check_pieces(pos[345:385], doc_start[345:385], 345, 405, 1, dtype, heads=(4, 2))
    assert calls == [128, 128, 84]


@needs_kernels
def test_a_started_row_without_keys_before_it(stand_in):
    """An empty context: out 0, lse -inf to start from, as FlashAttention gives it. And padding rows stay padding."""
    pos, doc_start = (t.to(DEVICE) for t in documents(40))
    pos[7:11] = -1
    q, k0, v0, k, v, _ = (t.to(DEVICE) for t in tensors(pos, 40, 2, DTYPES[0]))
    whole = op._ttt_attention_fwd(q, k0, v0, k, v, pos, doc_start, 0.125)
    out, lse = torch.zeros_like(q), torch.full_like(whole[1], -torch.inf)
    out[7:11], lse[:, 7:11] = torch.nan, torch.nan
    op._ttt_attention_fwd(q, k0, v0, k, v, pos, doc_start, 0.125, out, lse, started=True)
    torch.testing.assert_close(out, whole[0])
    torch.testing.assert_close(lse, whole[1])
    assert bool((out[7:11] == 0).all()) and bool((lse[:, 7:11] == -torch.inf).all())


def chain(device, dtype, sizes=(1100, 900, 520, 300), first=2500, heads=(4, 2), dim=128):
    """Everything `ChainAttention` gives for a chunk of one document, and dK^0, dV^0."""
    g, start = torch.Generator().manual_seed(5), 40
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).bfloat16().to(device, dtype)  # noqa: E731
    n = first + sizes[0]
    k0, v0 = (normal(n, heads[1], dim) for _ in "kv")
    order = torch.randperm(sizes[0], generator=g)
    pos = torch.cat([(first + order)[:m] for m in sizes]).to(device)
    stats = torch.promote_types(dtype, torch.float32)
    d_context = tuple(torch.zeros(k0.shape, dtype=stats, device=device) for _ in "kv")
    table = attention_buffers(*heads, dim, sizes[0] + 9, len(sizes), dtype, "cuda" if k0.is_cuda else "cpu")
    held = {name: torch.empty(rows, *shape, dtype=kind, device=device) for name, (rows, shape, kind) in table.items()}
    args = lambda name, rows: held[name][:rows], k0, v0, pos, torch.full_like(pos, start), sizes
    attention = ChainAttention(*args, (start, first), d_context)
    found = {}
    for i in range(len(sizes)):
        for place in attention.place(i):
            if place is not None:
                place.copy_(normal(*place.shape))
        found[f"out {i}"] = attention.forward(i).clone()
    for i in reversed(range(len(sizes))):
        attention.dout[attention.steps[i]] = normal(sizes[i], heads[0], dim)
        names = ("dq", "dk", "dv")
        found |= {f"{a} {i}": x.clone() for a, x in zip(names, attention.backward(i), strict=True) if x is not None}
    attention.backward_context()
    return found | {"dk0": d_context[0], "dv0": d_context[1]}, getattr(attention, "dense_steps", 0)


@needs_kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="with a GPU and FlashAttention 4 there is the test below")
@pytest.mark.parametrize("first", [90, 41])
def test_chain_attention_as_on_a_gpu(first, stand_in, monkeypatch, three_way):
    """All of `ChainAttention` by kernels in the interpreter; the last step is too small for the dense piece."""
    size = dict(sizes=(40, 33, 16, 7), first=first, heads=(4, 2), dim=32)
    (truth, _), (plain, _) = chain("cpu", torch.float64, **size), chain("cpu", torch.float32, **size)
    monkeypatch.setattr(chain_attention, "dense_attention_covers", lambda *_: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(dense, "MIN_KEYS", 1)
    monkeypatch.setattr(dense, "MIN_ROWS", 16)
    ours, steps = chain("cpu", torch.float32, **size)
    assert steps == 3
    for name, law in truth.items():
        three_way(ours[name], plain[name], law, name, extra=1e-6)


@pytest.mark.parametrize("context, sizes, steps", [
    (None, (4096, 4096), 0),
    ((100, 100 + dense.MIN_KEYS - 1), (4096, 4096), 0),
    ((100, 100 + dense.MIN_KEYS), (4096, dense.MIN_ROWS, dense.MIN_ROWS - 1), 2),
    ((0, 10**6), (10,), 0),
])  # fmt: skip
def test_steps_that_leave_their_context(context, sizes, steps):
    assert dense.dense_steps(context, sizes) == steps


def test_it_needs_the_package_and_a_gpu(monkeypatch):
    assert not dense.dense_attention_covers(128, torch.bfloat16, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arch, version, expected in (
        ((9, 0), True, True),
        ((9, 0), False, False),
        ((8, 0), True, False),
        ((12, 0), True, False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda arch=arch: arch)
        monkeypatch.setattr(dense, "installed", lambda version=version: version)
        assert dense.dense_attention_covers(128, torch.bfloat16, "cuda") == expected
        assert not dense.dense_attention_covers(128, torch.float32, "cuda")
        assert not dense.dense_attention_covers(256, torch.bfloat16, "cuda")
        assert not dense.dense_attention_covers(96, torch.bfloat16, "cuda")
        names = attention_buffers(32, 8, 128, 64, 7, torch.bfloat16, "cuda").keys()
        assert ("dense.dk" in names) == expected


def test_a_version_that_does_not_fit_is_named(monkeypatch):
    monkeypatch.setattr(dense.importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match=r"flash-attn-4 9\.9 is installed but cannot be used"):
        dense._flash_attention.__wrapped__()


def test_a_broken_installation_is_named(monkeypatch, tmp_path):
    """Its packages change quickly: a pair that does not fit raises more than ImportError."""
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (cute / "interface.py").write_text("import os\nos.no_such_thing")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(dense.importlib.metadata, "version", lambda name: "9.9")
    with pytest.raises(ValueError, match=r"flash-attn-4 9\.9 is installed .* AttributeError.*no_such_thing"):
        dense._flash_attention.__wrapped__()
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


# --- with FlashAttention 4 on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_flash
@pytest.mark.parametrize("heads, dim", [((32, 8), 128), ((9, 3), 64)])
def test_flash_attention_and_the_kernels(heads, dim):
    rows = torch.arange(2600, 3700)
    pos, doc_start = documents(300, 3500)
    keep = torch.rand(len(rows), generator=torch.Generator().manual_seed(3)) < 0.7
    check_pieces(pos[rows][keep], doc_start[rows][keep], int(rows[keep][0]), 3800, 3, torch.bfloat16, heads=heads, dim=dim)


@pytest.mark.gpu
@needs_flash
def test_chain_attention_with_its_context(three_way, monkeypatch):
    """With the dense piece and without; the last step is too small for it. Two runs are bitwise equal."""
    first = 40 + dense.MIN_KEYS  # the document starts at 40
    (truth, _), (plain, _) = chain("cpu", torch.float64, first=first), chain("cpu", torch.bfloat16, first=first)
    (ours, steps), (again, _) = (chain("cuda", torch.bfloat16, first=first) for _ in range(2))
    monkeypatch.setattr(dense, "MIN_KEYS", 10**6)
    kernels, none = chain("cuda", torch.bfloat16, first=first)
    assert (steps, none) == (3, 0)
    for name, law in truth.items():
        assert torch.equal(ours[name], again[name]), name
        for found in (ours, kernels):  # sums that stay in float32 are judged as bf16, as they end
            three_way(found[name].bfloat16().cpu(), plain[name].cpu(), law, name)


@pytest.mark.gpu
@needs_flash
def test_a_new_length_compiles_nothing():
    from flash_attn.cute import interface

    caches = [getattr(interface, name).compile_cache.cache for name in ("_flash_attn_fwd", "_flash_attn_bwd")]
    caches += [getattr(interface, name).compile_cache.cache for name in ("_bwd_preprocess", "_bwd_postprocess_convert")]
    sizes = []
    for rows, keys in ((512, 2048), (777, 2049), (2048, 5000), (513, 40000)):
        normal = lambda *shape: torch.randn(shape, device="cuda").bfloat16()  # noqa: E731
        q, dout, (k, v) = normal(rows, 8, 128), normal(rows, 8, 128), (normal(keys, 2, 128) for _ in "kv")
        out, lse = torch.empty_like(q), torch.empty(8, 5000, device="cuda")[:, 3 : 3 + rows]
        dense.dense_attention_fwd(q, k, v, 0.1, out, lse)
        take = buffers(dense.dense_buffers(8, 2, 128, rows, torch.bfloat16))
        dk, dv = (torch.zeros(k.shape, device="cuda") for _ in "kv")
        dense.dense_attention_bwd(dout, q, k, v, out, lse, 0.1, dk, dv, take)
        sizes.append([len(cache) for cache in caches])
    assert all(s == sizes[0] for s in sizes), sizes


@pytest.mark.gpu
@needs_flash
def test_a_step_of_the_engine(monkeypatch):
    from fastdraft import check

    monkeypatch.setattr(check, "PROVED", {})
    rows = check.prove_kernels("cuda")
    assert len(rows) == 4 and all(error <= allowed for *_, error, allowed in rows), rows
