"""Cross entropy and L1 of a row against `ce_l1_rows_ref` in float64: rows, gradients, dead rows, arguments refused."""

from __future__ import annotations

import pytest
import torch

from fastdraft.batch import TargetHead
from fastdraft.kernels.ce_l1 import _ce_l1_rows, ce_l1_rows_, ce_l1_rows_ref
from fastdraft.kernels.linear_kl import KLConfig
from fastdraft.kernels.teacher import TeacherRows, teacher_ref

SMALL = KLConfig(tile=64, num_warps=1, stages=2)
WEIGHTS = (0.1, 0.9)
SHAPES = {  # n, m, V
    "one tile": (5, 3, 64),
    "tile + 1": (5, 5, 65),
    "ragged": (9, 4, 301),
    "one row": (1, 1, 130),
}


class Case:
    def __init__(self, shape, device, dtype=torch.float32, seed=0):
        n, m, vocab = shape
        gen = torch.Generator(device).manual_seed(seed)
        normal = lambda *size: torch.randn(*size, generator=gen, device=device)  # noqa: E731
        f, weight = normal(m, 8).to(dtype), normal(vocab, 8).to(dtype)
        self.teacher = teacher_ref(f, TargetHead(weight), torch.arange(vocab, device=device))
        self.teacher_row = torch.randint(0, m, (n,), generator=gen, device=device)
        self.z = (self.teacher.logits[self.teacher_row].float() + 0.7 * normal(n, vocab)).to(dtype)
        self.label = torch.randint(0, vocab, (n,), generator=gen, device=device)
        self.w = 0.8 ** torch.randint(0, 7, (n,), generator=gen, device=device).float()
        if n > 2:
            self.w[torch.randperm(n, generator=gen, device=device)[: n // 3]] = 0

    def law(self, dtype):
        """`ce_l1_rows_ref` of the same logits in a dtype."""
        t = self.teacher
        logits = t.logits.to(dtype)
        stats = torch.promote_types(dtype, torch.float32)
        lse = logits.to(stats).logsumexp(-1)
        teacher = TeacherRows(logits, lse, lse, t.argmax, t.draft_argmax, t.peak.to(stats))
        w = self.w.to(stats)
        return ce_l1_rows_ref(self.z.to(dtype), self.label, teacher, self.teacher_row, w, *WEIGHTS)


@pytest.fixture(params=["kernel", "public"])
def run(request):
    """The Triton row kernel (interpreted on a CPU), and the public function, which is plain torch on a CPU."""

    def call(z, case, grad=True):
        args = z, case.label, case.teacher, case.teacher_row, case.w, *WEIGHTS, grad
        return ce_l1_rows_(*args) if request.param == "public" else _ce_l1_rows(*args, SMALL)

    return call


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_and_gradient_match(shape, run, device, three_way, poison):
    case = Case(shape, device)
    z, again = case.z.clone(), case.z.clone()
    rows = run(z, case)
    (truth, d_truth), (plain, d_plain) = case.law(torch.float64), case.law(torch.float32)
    # Float32 exponents z - top round by this much whatever the order of sums.
    rounding = torch.finfo(torch.float32).eps * float(case.z.abs().max())
    three_way(rows.ce, plain.ce, truth.ce, "ce", extra=rounding)
    three_way(rows.acceptance, plain.acceptance, truth.acceptance, "acceptance", extra=rounding)
    three_way(z, d_plain, d_truth, "dz", extra=rounding)
    assert torch.equal(rows.hit, truth.hit)
    for a, b in zip((*rows, z), (*run(again, case), again), strict=True):
        assert torch.equal(a, b)


def test_in_float64_it_is_the_reference(device):
    case = Case(SHAPES["ragged"], "cpu", torch.float64)
    z = case.z.clone()
    rows = ce_l1_rows_(z, case.label, case.teacher, case.teacher_row, case.w, *WEIGHTS)
    truth, d_truth = case.law(torch.float64)
    for ours, law in ((rows.ce, truth.ce), (rows.acceptance, truth.acceptance), (z, d_truth)):
        torch.testing.assert_close(ours, law, rtol=1e-12, atol=1e-14)


def test_each_term_has_its_own_weight(run, device):
    """With one weight at 0 the gradient is the other term's, which neither weight alone would show."""
    case = Case(SHAPES["ragged"], device)
    t = case.teacher
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        z = case.z.clone()
        ce_l1_rows_(z, case.label, t, case.teacher_row, case.w, *weights)
        _, want = ce_l1_rows_ref(case.z.double(), case.label, t, case.teacher_row, case.w.double(), *weights)
        torch.testing.assert_close(z.double(), want, rtol=1e-4, atol=1e-6)
        assert float(want.abs().max()) > 1e-2


def test_a_student_that_is_the_teacher_is_always_accepted(run, device):
    case = Case(SHAPES["one tile"], device)
    case.z = case.teacher.logits[case.teacher_row].clone()
    z = case.z.clone()
    rows = run(z, case)
    live = case.w != 0
    torch.testing.assert_close(rows.acceptance[live], torch.ones_like(rows.acceptance[live]), rtol=1e-5, atol=1e-5)
    assert bool(rows.hit[live].all())


def test_a_dead_row_is_exactly_zero_whatever_it_holds(run, device):
    case = Case(SHAPES["ragged"], device)
    dead = case.w == 0
    z = case.z.clone()
    z[dead] = torch.nan
    case.label[dead] = case.teacher_row[dead] = 2**40  # nothing may be read through it
    rows = run(z, case)
    for x in (*rows, z):
        assert bool((x[dead] == 0).all()) and bool(torch.isfinite(x[~dead].float()).all())
    assert bool(dead.any()) and bool((z[~dead] != 0).any(-1).all())


def test_without_grad_the_logits_stay(run, device):
    case = Case(SHAPES["ragged"], device)
    z = case.z.clone()
    rows = run(z, case, grad=False)
    assert torch.equal(z, case.z)
    for a, b in zip(rows, run(z, case), strict=True):
        assert torch.equal(a, b)


def test_arguments_that_do_not_fit_are_refused():
    case = Case(SHAPES["ragged"], "cpu")
    args = case.teacher, case.teacher_row, case.w, *WEIGHTS
    with pytest.raises(ValueError, match=r"label is \(4,\) torch.int64"):
        ce_l1_rows_(case.z, case.label[:4], *args)
    with pytest.raises(ValueError, match=r"z is \(9, 300\)"):
        ce_l1_rows_(case.z[:, :300].contiguous(), case.label, *args)
    with pytest.raises(ValueError, match=r"teacher_row is \(9,\) torch.int32"):
        ce_l1_rows_(case.z, case.label, case.teacher, case.teacher_row.int(), case.w, *WEIGHTS)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [16384, 49152, 151936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_vocabularies_on_a_gpu(vocab, dtype, device, three_way):
    case = Case((64, 40, vocab), device, dtype)
    z = case.z.clone()
    rows = ce_l1_rows_(z, case.label, case.teacher, case.teacher_row, case.w, *WEIGHTS)
    (truth, d_truth), (plain, d_plain) = case.law(torch.float64), case.law(dtype)
    rounding = torch.finfo(torch.float32).eps * float(case.z.abs().max())
    three_way(rows.ce, plain.ce, truth.ce, "ce", extra=rounding)
    three_way(rows.acceptance, plain.acceptance, truth.acceptance, "acceptance", extra=rounding)
    three_way(z, d_plain, d_truth, "dz", extra=rounding)
    assert torch.equal(rows.hit, plain.hit)
