"""The draft's head and losses against row_losses_ref in float64: rows, gradients, dead rows, chunks."""

from __future__ import annotations

import pytest
import torch

from fastdraft.batch import TargetHead
from fastdraft.kernels import linear_kl
from fastdraft.kernels.linear_kl import (
    KLConfig,
    _kl_rows,
    kl_rows_,
    kl_rows_ref,
    linear_kl_grad,
    row_losses_ref,
    rows_in_cuda,
)
from fastdraft.kernels.teacher import TeacherRows, teacher_ref

LOSSES = ["kl", "lk_alpha", "lk_lambda"]
LK = (0.9, 1.7)  # lk_scale, lk_decay
SMALL = KLConfig(tile=64, num_warps=1, stages=2)
SHAPES = {  # n, m, H, V, Vd
    "one tile": (5, 4, 8, 100, 64),
    "tile + 1": (5, 4, 8, 100, 65),
    "ragged": (9, 3, 16, 400, 301),
    "one row, one token": (1, 1, 8, 20, 1),
    "Vd = V": (6, 6, 8, 130, 130),
}


class Case:
    """Student and teacher of one shape: `z` logits, `x` states; truth computed from the same rounded inputs."""

    def __init__(self, shape, device, dtype=torch.float32, seed=0):
        n, m, hidden, vocab, draft = shape
        gen = torch.Generator(device).manual_seed(seed)

        def normal(*size, std=1.0):
            return (torch.randn(*size, generator=gen, device=device) * std).to(dtype)

        self.head = TargetHead(normal(vocab, hidden))
        self.f = normal(m, hidden, std=3 * hidden**-0.5)
        self.ids = torch.randperm(vocab, generator=gen, device=device)[:draft].sort().values
        self.x = normal(n, hidden, std=3 * hidden**-0.5)
        self.weight = normal(draft, hidden)
        self.teacher_row = torch.randint(0, m, (n,), generator=gen, device=device)
        self.w = 0.8 ** torch.randint(0, 7, (n,), generator=gen, device=device).float()
        if n > 2:
            self.w[torch.randperm(n, generator=gen, device=device)[: n // 3]] = 0
        self.full = self.head.logits(self.f)  # [m, V] in dtype
        self.teacher = teacher_ref(self.f, self.head, self.ids)
        self.z = self.x @ self.weight.T

    def truth(self, loss):  # KLRows, dz in float64
        """The reference on the same inputs, among them the log-sum-exps as stored."""
        return kl_rows_ref(self.z.double(), double(self.teacher), self.teacher_row, self.w.double(), loss, *LK)


def double(teacher: TeacherRows) -> TeacherRows:
    return TeacherRows(*(x.double() if x.is_floating_point() else x for x in teacher))


@pytest.fixture(params=["kernel", "public"])
def run(request):
    """The Triton row kernel (interpreted on a CPU), and the public function, which is plain torch on a CPU."""
    if request.param == "public":
        return kl_rows_
    return lambda z, *args, grad=True: _kl_rows(z, *args, grad, SMALL)


def check(case, rows, dz, loss, three_way):
    truth, d_truth = case.truth(loss)
    plain, d_plain = kl_rows_ref(case.z, case.teacher, case.teacher_row, case.w, loss, *LK)
    # float32 exponents t - lse_draft round by this much whatever the order of sums, and P~ does not sum to exactly 1.
    rounding = torch.finfo(torch.float32).eps * float(case.teacher.lse_draft.abs().max())
    three_way(rows.loss, plain.loss, truth.loss, "loss", extra=rounding)
    three_way(rows.acceptance, plain.acceptance, truth.acceptance, "acceptance", extra=rounding)
    assert torch.equal(rows.hit, truth.hit)
    three_way(dz, d_plain, d_truth, "dz", extra=rounding)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_and_gradient_match(shape, loss, run, device, three_way, poison):
    case = Case(shape, device)
    z = case.z.clone()
    rows = run(z, case.teacher, case.teacher_row, case.w, loss, *LK)
    check(case, rows, z, loss, three_way)
    again = case.z.clone()
    for a, b in zip(rows, run(again, case.teacher, case.teacher_row, case.w, loss, *LK), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(z, again)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_dead_row_is_exactly_zero_whatever_it_holds(loss, run, device):
    case = Case(SHAPES["ragged"], device)
    dead = case.w == 0
    z = case.z.clone()
    z[dead] = torch.nan
    case.teacher_row[dead] = 2**40  # nothing may be read through it
    rows = run(z, case.teacher, case.teacher_row, case.w, loss, *LK)
    for x in (*rows, z):
        assert bool((x[dead] == 0).all())
        assert bool(torch.isfinite(x[~dead].float()).all())
    assert bool((z[~dead] != 0).any(-1).all())


@pytest.mark.parametrize("loss", LOSSES)
def test_without_grad_the_logits_stay(loss, run, device):
    case = Case(SHAPES["ragged"], device)
    z = case.z.clone()
    want = run(case.z.clone(), case.teacher, case.teacher_row, case.w, loss, *LK)
    rows = run(z, case.teacher, case.teacher_row, case.w, loss, *LK, grad=False)
    assert torch.equal(z, case.z)
    for a, b in zip(rows, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_equal_to_the_teacher_has_no_gradient(loss, run, device):
    logits, lse = torch.zeros(1, 64, device=device), torch.full((1,), 64.0, device=device).log()
    first = torch.zeros(1, dtype=torch.int64, device=device)
    z = torch.zeros(5, 64, device=device)
    w = torch.ones(5, device=device)
    rows = run(z, TeacherRows(logits, lse, lse, first, first, first.float()), first.expand(5).clone(), w, loss, *LK)
    torch.testing.assert_close(rows.acceptance, torch.ones(5, device=device))
    assert bool(rows.hit.all())
    assert float(z.abs().max()) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_far_apart_stay_finite(loss, run, device):
    case = Case(SHAPES["ragged"], device)
    z = case.z * 300  # a spread of hundreds: exp without the max would overflow, alpha underflows
    rows = run(z, case.teacher, case.teacher_row, case.w, loss, *LK)
    for x in (rows.loss, rows.acceptance, z):
        assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("loss", LOSSES)
def test_dx_is_written_and_dweight_added_to(loss, poison, three_way):
    check_linear(Case(SHAPES["ragged"], "cpu"), loss, three_way)


def check_linear(case, loss, three_way):
    """linear_kl_grad (adds into dweight) against float64 from the same x and weight."""

    def reference(dtype):
        stats = torch.promote_types(dtype, torch.float32)
        x, weight = case.x.to(dtype), case.weight.to(dtype)
        teacher = double(case.teacher) if dtype == torch.float64 else case.teacher
        rows, dz = kl_rows_ref(x @ weight.T, teacher, case.teacher_row, case.w.to(stats), loss, *LK)
        return rows.loss, dz @ weight, (dz.T @ x).to(stats)

    truth, plain = reference(torch.float64), reference(case.x.dtype)
    start = torch.ones_like(case.weight, dtype=torch.float32)
    dx, dweight = torch.empty_like(case.x), start.clone()
    rows = linear_kl_grad(
        case.x, case.weight, case.teacher, case.teacher_row, case.w, dx, dweight, torch.empty_like(case.z), loss, *LK
    )
    three_way(rows.loss, plain[0], truth[0], "loss")
    # exp(x) in float32 is off by eps * |x| whatever the order of operations; sum_v P(v) |W_v| <= max|W| carries that to dx
    exponent = float((case.teacher.logits - case.teacher.lse_draft[:, None]).abs().max())
    rounding = torch.finfo(torch.float32).eps * exponent * float(case.weight.abs().max())
    three_way(dx, plain[1], truth[1], "dx", extra=rounding)
    three_way(dweight, plain[2] + start, truth[2] + start, "dweight")
    assert bool((dx[case.w == 0] == 0).all())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_reference_is_the_definition(loss):
    """From full distributions, as the definitions say it; and the CPU's row step has the same values and gradient."""
    case = Case(SHAPES["ragged"], "cpu", torch.float64)
    z, p = case.z.clone().requires_grad_(), case.full.softmax(-1)[case.teacher_row]
    q, on_draft = z.softmax(-1), p[:, case.ids]
    alpha = torch.minimum(on_draft, q).sum(-1)
    ce = -(on_draft / on_draft.sum(-1, keepdim=True) * q.log()).sum(-1)
    mix = LK[0] * torch.exp(-LK[1] * alpha.detach())
    value = {"kl": ce, "lk_alpha": -alpha.log(), "lk_lambda": mix * ce + (1 - mix) * (1 - alpha)}[loss]
    hit = case.ids[q.argmax(-1)] == p.argmax(-1)
    reference = row_losses_ref(case.z, case.teacher.at(case.teacher_row), loss, *LK)
    live = case.w != 0
    (dz,) = torch.autograd.grad((value * case.w)[live].sum(), z)
    ours = case.z.clone()
    rows = kl_rows_(ours, case.teacher, case.teacher_row, case.w.double(), loss, *LK)
    for got, ref, law in zip(rows, reference, (value.detach(), alpha.detach(), hit), strict=True):
        torch.testing.assert_close(ref, law, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[live], law[live], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[live], dz[live], rtol=1e-12, atol=1e-12)


def test_nothing_else_has_the_size_of_the_logits():
    case = Case((40, 10, 8, 3000, 2000), "cpu")
    dx, dweight, logits = torch.empty_like(case.x), torch.zeros_like(case.weight), torch.empty_like(case.z)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_kl_grad(case.x, case.weight, case.teacher, case.teacher_row, case.w, dx, dweight, logits)
    assert case.weight.numel() <= largest < case.z.numel()


def test_errors_say_what_came():
    case = Case(SHAPES["ragged"], "cpu")
    args = (case.teacher, case.teacher_row, case.w)
    with pytest.raises(ValueError, match="'jsd' is not one of kl"):
        kl_rows_(case.z, *args, loss="jsd")
    with pytest.raises(ValueError, match=r"z is \(9, 300\).*\[n, 301\]"):
        kl_rows_(case.z[:, :300], *args)
    with pytest.raises(ValueError, match=r"torch.int32"):
        kl_rows_(case.z, case.teacher, case.teacher_row.int(), case.w)
    with pytest.raises(ValueError, match=r"weight is \(300, 16\).*\[301, 16\]"):
        linear_kl_grad(case.x, case.weight[:300], *args, None, None, case.z)
    with pytest.raises(ValueError, match=r"dweight is \(301, 16\) torch.bfloat16"):
        dweight = torch.zeros_like(case.weight).bfloat16()
        linear_kl_grad(case.x, case.weight, *args, torch.empty_like(case.x), dweight, case.z)
    with pytest.raises(ValueError, match=r"logits is \(8, 301\) torch.float32; \[9, 301\]"):
        linear_kl_grad(case.x, case.weight, *args, None, None, case.z[:8])


GPU_SHAPES = {
    "small": (33, 20, 64, 1000, 250),
    "SmolLM2": (512, 300, 576, 49152, 8192),
    "SmolLM2, Vd = V": (256, 100, 576, 49152, 49152),
    "Llama-3.1-8B": (256, 100, 4096, 128256, 32000),
    "odd vocabulary": (65, 40, 256, 50257, 12345),
    "Vd 131072": (16, 16, 128, 262144, 131072),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_on_the_gpu(shape, loss, dtype, device, three_way, poison, monkeypatch):
    monkeypatch.setattr(linear_kl, "rows_in_cuda", lambda *_: False)  # Triton's kernel, whatever is built
    case = Case(shape, device, dtype)
    z = case.z.clone()
    rows = kl_rows_(z, case.teacher, case.teacher_row, case.w, loss, *LK)
    check(case, rows, z, loss, three_way)
    check_linear(case, loss, three_way)


@pytest.mark.gpu
def test_rows_times_vocabulary_beyond_2_31(device):
    n, draft = 70001, 32000
    assert n * draft > 2**31
    z = torch.randn(n, draft, device=device, dtype=torch.bfloat16)
    logits = torch.randn(n, draft, device=device, dtype=torch.bfloat16)
    lse = torch.cat([part.float().logsumexp(-1) for part in logits.split(4096)])
    last = slice(n - 8, n)
    teacher = TeacherRows(logits, lse, lse + 0.5, logits.argmax(-1), logits.argmax(-1), lse)
    case_z = z[last].clone()
    rows = kl_rows_(z, teacher, torch.arange(n, device=device), torch.ones(n, device=device))
    want = case_z.float().requires_grad_()
    loss = -(logits[last].float().softmax(-1) * want.log_softmax(-1)).sum(-1)
    loss.sum().backward()
    torch.testing.assert_close(rows.loss[last], loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z[last].float(), want.grad, rtol=2**-7, atol=1e-9)


CUDA_SHAPES = {  # blocks take several rows each, so that rings go round
    "one vector": (5, 4, 64, 100, 8),
    "one chunk": (1500, 300, 64, 4000, 2048),
    "chunk + 8": (3000, 300, 64, 4000, 2056),
    "SmolLM2": (1300, 300, 64, 49152, 8192),
    "longest of three in an SM": (1000, 100, 64, 20000, 16384),
    "shortest of one in an SM": (600, 100, 64, 20000, 16392),
    "Llama-3.1-8B": (600, 100, 64, 50000, 32000),
    "SmolLM2, Vd = V": (400, 100, 64, 49152, 49152),
    "longest": (300, 50, 64, 60000, 57344),
}


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", CUDA_SHAPES.values(), ids=CUDA_SHAPES)
def test_in_cuda(shape, loss, csrc, device, three_way, poison):
    case = Case(shape, device, torch.bfloat16)
    assert rows_in_cuda(case.z, case.teacher.logits)
    dead = case.w == 0
    start = case.z.masked_fill(dead[:, None], torch.nan)
    row = torch.cat([case.teacher_row[:1], case.teacher_row.masked_fill(dead, 2**40)])[1:]  # slices, as a chunk's are
    w = torch.cat([case.w[:1], case.w])[1:]
    z, again = start.clone(), start.clone()
    rows = kl_rows_(z, case.teacher, row, w, loss, *LK)
    check(case, rows, z, loss, three_way)
    assert not z[dead].any()
    twice = kl_rows_(again, case.teacher, row, w, loss, *LK)
    without = kl_rows_(case.z, case.teacher, row, w, loss, *LK, grad=False)
    assert torch.equal(z, again) and torch.equal(case.z[~dead], start[~dead])
    for a, b, c in zip(rows, twice, without, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a, rtol=1e-6, atol=0)  # a kernel of its own


@pytest.mark.gpu
def test_in_cuda_long_and_short_rows_in_turn_on_every_gpu(csrc, three_way):
    """The driver is asked once for each GPU and length: no answer may spoil a launch of the other length or GPU."""
    for _ in range(2):
        for index in range(torch.cuda.device_count()):
            for name in ("longest", "one vector", "longest"):
                case = Case(CUDA_SHAPES[name], torch.device("cuda", index), torch.bfloat16)
                assert rows_in_cuda(case.z, case.teacher.logits)
                z = case.z.clone()
                check(case, kl_rows_(z, case.teacher, case.teacher_row, case.w, "kl", *LK), z, "kl", three_way)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_in_cuda_ties_and_extremes(loss, csrc, device):
    first = torch.tensor([0, 2050, 8, 9000], device=device)  # the lowest of equal logits is the argmax
    logits, z = torch.zeros(2, 4, 12000, device=device, dtype=torch.bfloat16)
    z[1, [2050, 2051, 7000]], z[2, [8, 9, 11999]], z[3] = 1.0, 2.0, -3.0
    z[3, 9000] = -1.0
    lse = torch.full((4,), 12000.0, device=device).log()
    row, w = torch.arange(4, device=device), torch.ones(4, device=device)
    for off in (0, 1):
        dz = z.clone()
        rows = kl_rows_(dz, TeacherRows(logits, lse, lse, first + off, first + off, lse), row, w, loss, *LK)
        assert rows.hit.tolist() == [off == 0] * 4
    torch.testing.assert_close(rows.acceptance[0], torch.ones((), device=device))  # a student equal to the teacher
    assert float(dz[0].abs().max()) < 1e-6
    far = torch.randn(4, 12000, device=device).mul(900).bfloat16()  # exp without the max would overflow, alpha underflows
    rows = kl_rows_(far, TeacherRows(logits, lse, lse, first, first, lse), row, w, loss, *LK)
    for x in (rows.loss, rows.acceptance, far):
        assert bool(torch.isfinite(x).all())
