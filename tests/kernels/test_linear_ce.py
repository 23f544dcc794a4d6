"""The frozen head's cross entropy against `ce_rows_ref` in float64: rows, gradients, dead rows, arguments refused."""

from __future__ import annotations

import pytest
import torch

from fastdraft.kernels.linear_ce import CEConfig, _ce_rows, ce_config, ce_rows_, ce_rows_ref, linear_ce_grad

SMALL = CEConfig(tile=64, num_warps=1, stages=2)
SHAPES = {  # n, H, V
    "one tile": (5, 8, 64),
    "tile + 1": (5, 8, 65),
    "ragged": (9, 16, 301),
    "one row": (1, 8, 130),
    "one token": (3, 8, 1),
}


class Case:
    def __init__(self, shape, device, dtype=torch.float32, seed=0):
        n, hidden, vocab = shape
        gen = torch.Generator(device).manual_seed(seed)
        self.x = (torch.randn(n, hidden, generator=gen, device=device) * 3 * hidden**-0.5).to(dtype)
        self.weight = torch.randn(vocab, hidden, generator=gen, device=device).to(dtype)
        self.z = self.x @ self.weight.T
        self.label = torch.randint(0, vocab, (n,), generator=gen, device=device)
        self.label[::2] = self.z[::2].argmax(-1)
        self.w = 0.8 ** torch.randint(0, 7, (n,), generator=gen, device=device).float()
        if n > 2:
            self.w[torch.randperm(n, generator=gen, device=device)[: n // 3]] = 0


@pytest.fixture(params=["kernel", "public"])
def run(request):
    """The Triton row kernel (interpreted on a CPU), and the public function, which is plain torch on a CPU."""
    if request.param == "public":
        return ce_rows_
    return lambda z, label, w, grad=True: _ce_rows(z, label, w, grad, SMALL)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_and_gradient_match(shape, run, device, three_way, poison):
    case = Case(shape, device)
    z, again = case.z.clone(), case.z.clone()
    rows = run(z, case.label, case.w)
    truth, d_truth = ce_rows_ref(case.z.double(), case.label, case.w.double())
    plain, d_plain = ce_rows_ref(case.z, case.label, case.w)
    # Float32 exponents z - top round by this much whatever the order of sums.
    rounding = torch.finfo(torch.float32).eps * float(case.z.abs().max())
    three_way(rows.loss, plain.loss, truth.loss, "loss", extra=rounding)
    three_way(z, d_plain, d_truth, "dz", extra=rounding)
    assert torch.equal(rows.hit, truth.hit) and bool(rows.hit.any())
    for a, b in zip((*rows, z), (*run(again, case.label, case.w), again), strict=True):
        assert torch.equal(a, b)


def test_a_dead_row_is_exactly_zero_whatever_it_holds(run, device):
    case = Case(SHAPES["ragged"], device)
    dead = case.w == 0
    z = case.z.clone()
    z[dead] = torch.nan
    case.label[dead] = 2**40  # nothing may be read through it
    rows = run(z, case.label, case.w)
    for x in (*rows, z):
        assert bool((x[dead] == 0).all()) and bool(torch.isfinite(x[~dead].float()).all())
    assert bool(dead.any()) and bool((z[~dead] != 0).any(-1).all())


def test_without_grad_the_logits_stay(run, device):
    case = Case(SHAPES["ragged"], device)
    z = case.z.clone()
    rows = run(z, case.label, case.w, grad=False)
    assert torch.equal(z, case.z)
    for a, b in zip(rows, run(z, case.label, case.w), strict=True):
        assert torch.equal(a, b)


def test_the_head_matches_autograd_and_takes_none(three_way):
    case = Case((40, 16, 301), "cpu", torch.float64)
    x = case.x.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ case.weight.T, case.label, reduction="none")
    (want,) = torch.autograd.grad((loss * case.w).sum(), x)
    dx, logits = torch.full_like(case.x, torch.nan), torch.empty(40, 301, dtype=torch.float64)
    rows = linear_ce_grad(case.x, case.weight, case.label, case.w, dx, logits)
    live = case.w != 0
    torch.testing.assert_close(dx, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(rows.loss, loss.detach() * live, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(linear_ce_grad(case.x, case.weight, case.label, case.w, None, logits).loss, rows.loss)


def test_arguments_that_do_not_fit_are_refused():
    case = Case(SHAPES["ragged"], "cpu")
    with pytest.raises(ValueError, match=r"label is \(4,\) torch.int64"):
        ce_rows_(case.z, case.label[:4], case.w)
    with pytest.raises(ValueError, match=r"label is \(9,\) torch.int32"):
        ce_rows_(case.z, case.label.int(), case.w)
    with pytest.raises(ValueError, match="contiguous"):
        ce_rows_(case.z.T.contiguous().T, case.label, case.w)
    with pytest.raises(ValueError, match=r"weight is \(301, 8\)"):
        linear_ce_grad(case.x, case.weight[:, :8], case.label, case.w, None, case.z)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [16384, 49152, 151936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_vocabularies_on_a_gpu(vocab, dtype, device, three_way):
    case = Case((64, 256, vocab), device, dtype)
    assert ce_config(vocab, dtype.itemsize).num_warps in (4, 16)
    z = case.z.clone()
    rows = ce_rows_(z, case.label, case.w)
    truth, d_truth = ce_rows_ref(case.z.double(), case.label, case.w.double())
    plain, d_plain = ce_rows_ref(case.z, case.label, case.w)
    rounding = torch.finfo(torch.float32).eps * float(case.z.abs().max())
    three_way(rows.loss, plain.loss, truth.loss, "loss", extra=rounding)
    three_way(z, d_plain, d_truth, "dz", extra=rounding)
    assert torch.equal(rows.hit, plain.hit)
