"""The teacher's rows: draft logits, both log-sum-exps and the argmax, against TargetHead.logits in float64."""

from __future__ import annotations

import pytest
import torch

from fastdraft.batch import TargetHead
from fastdraft.kernels.teacher import (
    TeacherConfig,
    TeacherRows,
    _teacher,
    _teacher_rows,
    permute_head,
    teacher,
    teacher_buffers,
    teacher_ref,
)

SHAPES = {  # n, Ht, V, Vd
    "one tile": (3, 8, 256, 128),
    "tile + 1": (3, 8, 386, 129),
    "ragged, many blocks": (5, 16, 1000, 77),
    "one row, one draft token": (1, 8, 200, 1),
    "Vd = V": (4, 8, 300, 300),
    "one token beyond": (4, 8, 129, 128),
}
TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "scale": 1.5, "softcap": 3.0},
}
SMALL = TeacherConfig(block=256, tile=128, num_warps=1)


def case(shape, device, dtype=torch.float32, bias=False, scale=1.0, softcap=None, seed=0):
    n, hidden, vocab, draft = shape
    gen = torch.Generator(device).manual_seed(seed)
    f, weight, b = (
        torch.randn(*size, generator=gen, device=device).to(dtype) for size in ((n, hidden), (vocab, hidden), (vocab,))
    )
    ids = torch.randperm(vocab, generator=gen, device=device)[:draft].sort().values
    return f, TargetHead(weight, b if bias else None, scale, softcap), ids


def double(head: TargetHead) -> TargetHead:
    return TargetHead(head.weight.double(), None if head.bias is None else head.bias.double(), head.scale, head.softcap)


def with_kernel(f, head, config=SMALL) -> TeacherRows:
    """The Triton row step, also on CPU tensors (interpreted)."""
    rows, _ = teacher_buffers(len(f), head, f.dtype)
    _teacher(f, head, rows, torch.empty(len(f) * config.block, dtype=f.dtype, device=f.device), config, _teacher_rows)
    return rows


def check(ours, plain, truth, three_way):
    for name in ("logits", "lse_draft", "lse_full", "peak"):
        three_way(getattr(ours, name), getattr(plain, name), getattr(truth, name), name)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_match_the_full_head(shape, transform, device, three_way, poison):
    f, head, ids = case(shape, device, **transform)
    truth, plain = teacher_ref(f.double(), double(head), ids), teacher_ref(f, head, ids)
    permuted = permute_head(head, ids)
    for ours in (with_kernel(f, permuted), teacher(f, permuted)):
        check(ours, plain, truth, three_way)
        assert torch.equal(ours.argmax, truth.argmax)
        assert torch.equal(ours.draft_argmax, truth.draft_argmax)
        assert torch.equal(ours.in_draft, torch.isin(truth.argmax, ids))


@pytest.mark.parametrize("seed", range(4))
def test_a_tie_goes_to_the_lowest_target_id(seed, device):
    gen = torch.Generator().manual_seed(seed)
    f = torch.randint(-1, 2, (16, 3), generator=gen).float().to(device)  # small integers: exact, and full of ties
    weight = torch.randint(-1, 2, (700, 3), generator=gen).float().to(device)
    ids = torch.randperm(700, generator=gen)[:90].sort().values.to(device)
    tied = (f @ weight.T) == (f @ weight.T).amax(-1, keepdim=True)
    assert int((tied.sum(-1) > 1).sum()) > 10
    want = tied.int().argmax(-1)
    assert torch.equal(want, torch.stack([row.nonzero()[0, 0] for row in tied]))
    head = permute_head(TargetHead(weight), ids)
    for ours in (with_kernel(f, head), teacher(f, head)):
        assert torch.equal(ours.argmax, want)


def test_buffers_serve_fewer_rows_and_nothing_else_is_touched(device, poison):
    f, head, ids = case((6, 8, 400, 100), device)
    permuted = permute_head(head, ids)
    rows, scratch = teacher_buffers(9, permuted, f.dtype)
    ours = teacher(f, permuted, (rows, scratch))
    assert ours.logits.data_ptr() == rows.logits.data_ptr()
    assert rows.logits[6:].isnan().all() and rows.lse_full[6:].isnan().all()
    assert torch.equal(ours.lse_full, teacher(f, permuted).lse_full)


def test_no_tensor_of_the_whole_vocabulary():
    f, head, ids = case((64, 4, 100000, 500), "cpu")
    permuted = permute_head(head, ids)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != permuted.weight.data_ptr():
                largest = max(largest, out.numel())
            return out

    with Watch():
        teacher(f, permuted)
    assert 64 * 500 < largest < 64 * 100000 / 3


def test_two_runs_are_bitwise_equal(device):
    f, head, ids = case((7, 16, 1000, 77), device, bias=True, softcap=3.0)
    permuted = permute_head(head, ids)
    for a, b in zip(with_kernel(f, permuted), with_kernel(f, permuted), strict=True):
        assert torch.equal(a, b)


def test_the_plain_step_runs_in_float64():
    f, head, ids = case((4, 8, 300, 70), "cpu", torch.float64, bias=True, scale=0.5, softcap=4.0)
    ours, truth = teacher(f, permute_head(head, ids)), teacher_ref(f, head, ids)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_errors_say_what_came():
    f, head, ids = case((4, 8, 300, 70), "cpu")
    permuted = permute_head(head, ids)
    with pytest.raises(ValueError, match=r"f is \(4, 7\)"):
        teacher(f[:, :7], permuted)
    with pytest.raises(ValueError, match=r"torch.float64"):
        teacher(f.double(), permuted)
    with pytest.raises(ValueError, match=r"buffers' logits is \(2, 70\).*\[>= 4, 70\]"):
        teacher(f, permuted, teacher_buffers(2, permuted, f.dtype))
    with pytest.raises(ValueError, match="ascend"):
        permute_head(head, ids.flip(0))
    with pytest.raises(ValueError, match="ascend"):
        permute_head(head, ids + 299)
    with pytest.raises(ValueError, match="301"):
        permute_head(head, torch.arange(301))


GPU_SHAPES = {
    "small": (33, 64, 1000, 250),
    "SmolLM2": (700, 576, 49152, 8192),
    "SmolLM2, Vd = V": (300, 576, 49152, 49152),
    "Llama-3.1-8B": (300, 4096, 128256, 32000),
    "odd vocabulary": (65, 256, 50257, 12345),
    "V 262144": (16, 128, 262144, 65536),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("transform", [TRANSFORMS["plain"], TRANSFORMS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_on_the_gpu(shape, transform, dtype, device, three_way, poison):
    f, head, ids = case(shape, device, dtype, **transform)
    f *= shape[1] ** -0.5 * 4
    truth, plain = teacher_ref(f.double(), double(head), ids), teacher_ref(f, head, ids)
    ours, again = teacher(f, permute_head(head, ids)), teacher(f, permute_head(head, ids))
    check(ours, plain, truth, three_way)
    for a, b in zip(ours, again, strict=True):
        assert torch.equal(a, b)
    logits = double(head).logits(f.double())
    chosen = logits.gather(1, ours.argmax[:, None])[:, 0]  # a rounded logit may crown a near tie
    error = 2 * float((plain.logits.double() - truth.logits).abs().max())
    assert float((truth.peak - chosen).max()) <= error + torch.finfo(dtype).eps * float(truth.peak.abs().max())
    assert torch.equal(ours.in_draft, torch.isin(ours.argmax, ids))
    live = ours.in_draft
    assert torch.equal(ids[ours.draft_argmax[live]], ours.argmax[live])


@pytest.mark.gpu
def test_rows_times_vocabulary_beyond_2_31(device):
    n, hidden, vocab, draft = 70001, 64, 40000, 32000
    f, head, ids = case((n, hidden, vocab, draft), device, torch.bfloat16)
    assert n * draft > 2**31
    ours = teacher(f, permute_head(head, ids))
    for part in (slice(0, 64), slice(n - 64, n)):
        want = teacher_ref(f[part], head, ids)
        torch.testing.assert_close(ours.logits[part], want.logits, rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(ours.lse_full[part], want.lse_full, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.lse_draft[part], want.lse_draft, rtol=1e-3, atol=1e-3)
