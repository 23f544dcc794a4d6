"""RMSNorm with gather and residual, forward and backward, against float64; the weight's gradient repeats bit for bit."""

from __future__ import annotations

import pytest
import torch

from fastdraft.kernels.rms_norm import (
    _rms_norm,
    _rms_norm_backward,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_ref,
    rms_norm_config,
    rms_norm_partials,
    rms_norm_ref,
)

EPS = 1e-5
SHAPES = {  # n, m, H
    "one block": (4, 4, 64),
    "block + 1": (3, 5, 65),
    "ragged": (7, 9, 100),
    "one row": (1, 1, 48),
    "one column": (2, 3, 1),
}


def case(shape, device, dtype=torch.float32, seed=0):
    n, m, hidden = shape
    gen = torch.Generator(device).manual_seed(seed)
    x, delta, dy, add = (torch.randn(k, hidden, generator=gen, device=device).to(dtype) for k in (m, n, n, n))
    weight = (1 + torch.randn(hidden, generator=gen, device=device) / 4).to(dtype)
    rows = torch.randperm(m, generator=gen, device=device)[:n]
    return x, delta, dy, add, weight, rows


def kernel_forward(x, weight, eps, y, r, *, rows=None, delta=None, total=None):
    _rms_norm(x, weight, eps, y, r, rows, delta, total, rms_norm_config(x.shape[1]))


def kernel_backward(dy, x, r, weight, dx, dweight, partial, *, rows=None, x_rows=None, add=(), add_dx=False):
    config = rms_norm_config(x.shape[1])
    _rms_norm_backward(dy, x, r, weight, dx, dweight, partial, rows, x_rows, add, add_dx, config)


def autograd_truth(x, weight, dy):
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy.double())


def forward_buffers(n, x):
    return torch.empty(n, x.shape[1], dtype=x.dtype, device=x.device), torch.empty(
        n, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
    )


def check_forward(forward, shape, device, dtype, three_way, gather, residual):
    x, delta, _, _, weight, rows = case(shape, device, dtype)
    n = len(delta)
    source = x[rows] if gather else x[:n]
    s = source + delta if residual else source
    y, r = forward_buffers(n, x)
    total = torch.empty_like(delta) if residual else None
    forward(x, weight, EPS, y, r, rows=rows if gather else None, delta=delta if residual else None, total=total)
    truth, _, _ = autograd_truth(s, weight, s)
    plain, inverse = rms_norm_ref(s, weight, EPS)
    three_way(y, plain, truth, "y")
    three_way(r[:, None], inverse, rms_norm_ref(s.double(), weight.double(), EPS)[1], "r")
    if residual:
        assert torch.equal(total, s)


def check_backward(backward, shape, device, dtype, three_way, gather, scatter, adds, partials):
    x, _, dy, add, weight, rows = case(shape, device, dtype)
    n, m = len(dy), len(x)
    source = x[rows] if gather else x[:n]
    r = rms_norm_ref(source, weight, EPS)[1][:, 0].contiguous()
    stats = r.dtype
    dweight = torch.ones(x.shape[1], dtype=stats, device=device)
    partial = torch.empty(partials, x.shape[1], dtype=stats, device=device)
    targets = torch.arange(m, device=device).flip(0)[:n]
    before = torch.randn(m, x.shape[1], generator=torch.Generator().manual_seed(7)).to(device, dtype)
    dx = before.clone() if scatter else torch.empty_like(dy)
    add_dx = scatter and adds == 2
    extra = [add] if add_dx else [add, add][:adds]
    extra_truth = sum(
        (a.double() for a in ([add, before[targets]][:adds] if scatter else extra)), torch.zeros_like(dy).double()
    )
    backward(
        dy, x, r, weight, dx, dweight, partial,
        rows=targets if scatter else None, x_rows=rows if gather else None, add=extra, add_dx=add_dx,
    )  # fmt: skip
    _, dx_truth, dw_truth = autograd_truth(source, weight, dy)
    plain_dx, plain_dw = rms_norm_backward_ref(dy, source, r[:, None], weight)
    ours = dx[targets] if scatter else dx
    three_way(ours, (plain_dx + extra_truth.to(stats)).to(dtype), dx_truth + extra_truth, "dx")
    three_way(dweight, plain_dw + 1, dw_truth + 1, "dweight", extra=1e-6 * float(dw_truth.abs().max()))
    if scatter:
        others = torch.ones(m, dtype=torch.bool, device=device)
        others[targets] = False
        assert torch.equal(dx[others], before[others])


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("gather", [False, True], ids=["in order", "gathered"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward(shape, gather, residual, device, three_way, poison):
    for forward in (kernel_forward, rms_norm):
        check_forward(forward, shape, device, torch.float32, three_way, gather, residual)


@pytest.mark.parametrize("adds", [0, 1, 2])
@pytest.mark.parametrize(("gather", "scatter"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backward(shape, gather, scatter, adds, device, three_way, poison):
    for backward in (kernel_backward, rms_norm_backward):
        check_backward(backward, shape, device, torch.float32, three_way, gather, scatter, adds, partials=3)


def test_rows_beyond_n_only_add_and_total_may_be_x(device, poison):
    x, delta, _, _, weight, _ = case((6, 6, 40), device)
    wanted = x + delta
    for forward in (kernel_forward, rms_norm):
        total = x.clone()
        y, r = (b[:4] for b in forward_buffers(6, x))
        forward(total, weight, EPS, y, r, delta=delta, total=total)
        assert torch.equal(total, wanted)
        torch.testing.assert_close(y, rms_norm_ref(wanted[:4], weight, EPS)[0])
        total = x.clone()
        forward(total, weight, EPS, None, None, delta=delta, total=total)
        assert torch.equal(total, wanted)


def test_strided_rows(device, poison):
    """Slices of wider buffers, in and out; the columns beside them stay."""
    x, delta, dy, add, weight, _ = case((5, 5, 24), device)
    for forward, backward in ((kernel_forward, kernel_backward), (rms_norm, rms_norm_backward)):
        wide = {name: torch.empty(5, 40, device=device) for name in ("x", "delta", "total", "y", "dy", "dx", "add")}
        cut = {name: b[:, 8:32] for name, b in wide.items()}
        for name, value in (("x", x), ("delta", delta), ("dy", dy), ("add", add)):
            cut[name].copy_(value)
        r, dweight = torch.empty(5, device=device), torch.zeros(24, device=device)
        forward(cut["x"], weight, EPS, cut["y"], r, delta=cut["delta"], total=cut["total"])
        torch.testing.assert_close(cut["y"], rms_norm_ref(x + delta, weight, EPS)[0])
        partial = torch.empty(2, 24, device=device)
        backward(cut["dy"], cut["total"], r, weight, cut["dx"], dweight, partial, add=(cut["add"],))
        want, dw = rms_norm_backward_ref(dy, x + delta, r[:, None], weight)
        torch.testing.assert_close(cut["dx"], want + add)
        torch.testing.assert_close(dweight, dw)
        for b in wide.values():
            assert b[:, :8].isnan().all() and b[:, 32:].isnan().all()


def test_in_place_and_without_dx(device, poison):
    x, _, dy, add, weight, _ = case((5, 5, 24), device)
    r = rms_norm_ref(x, weight, EPS)[1][:, 0].contiguous()
    want, dw = rms_norm_backward_ref(dy, x, r[:, None], weight)
    for backward in (kernel_backward, rms_norm_backward):
        partial = torch.empty(8, 24, device=device)
        dweight, dx = torch.zeros(24, device=device), add.clone()
        backward(dy, x, r, weight, dx, dweight, partial, add_dx=True)
        torch.testing.assert_close(dx, want + add)
        dx = dy.clone()
        backward(dx, x, r, weight, dx, dweight, partial)
        torch.testing.assert_close(dx, want)
        backward(dy, x, r, weight, None, dweight, partial)
        torch.testing.assert_close(dweight, 3 * dw)


def test_dx_may_be_wider_than_the_rest(device):
    """A float32 sum over chunks takes the gradient of bf16 rows (here float64 of float32 on the CPU path)."""
    x, _, dy, _, weight, rows = case((3, 6, 24), device)
    r = rms_norm_ref(x[rows], weight, EPS)[1][:, 0].contiguous()
    want, _ = rms_norm_backward_ref(dy, x[rows], r[:, None], weight)
    dx = torch.ones(6, 24, dtype=torch.float64)
    at = rows.cpu()
    inputs = (t.cpu() for t in (dy, x, r, weight))
    rms_norm_backward(*inputs, dx, torch.zeros(24), torch.empty(1, 24), rows=at, x_rows=at, add_dx=True)
    torch.testing.assert_close(dx[at], want.cpu().double() + 1, rtol=0, atol=1e-5)
    assert (dx.sum(-1) == 24).sum() == 3


@pytest.mark.parametrize("partials", [1, 3, 5, 200])
def test_the_weight_gradient_repeats_bit_for_bit(partials, device, poison):
    x, _, dy, _, weight, _ = case((33, 33, 40), device)
    r = rms_norm_ref(x, weight, EPS)[1][:, 0].contiguous()
    seen = []
    for _ in range(2):
        dweight, dx = torch.zeros(40, device=device), torch.empty_like(x)
        kernel_backward(dy, x, r, weight, dx, dweight, torch.empty(partials, 40, device=device))
        seen.append((dweight, dx))
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    torch.testing.assert_close(seen[0][0], rms_norm_backward_ref(dy, x, r[:, None], weight)[1])


def test_the_plain_path_runs_in_float64():
    x, delta, dy, _, weight, rows = case((5, 8, 30), "cpu", torch.float64)
    total, (y, r) = torch.empty_like(delta), forward_buffers(5, x)
    rms_norm(x, weight, EPS, y, r, rows=rows, delta=delta, total=total)
    truth, dx_truth, dw_truth = autograd_truth(x[rows] + delta, weight, dy)
    dx, dweight = torch.empty_like(dy), torch.zeros(30, dtype=torch.float64)
    rms_norm_backward(dy, total, r, weight, dx, dweight, torch.empty(1, 30))
    for ours, want in ((y, truth), (dx, dx_truth), (dweight, dw_truth)):
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)


def test_errors_say_what_came():
    x, delta, dy, _, weight, rows = case((4, 6, 16), "cpu")
    y, r = forward_buffers(4, x)
    with pytest.raises(ValueError, match=r"delta is \(4, 15\)"):
        rms_norm(x, weight, EPS, y, r, delta=delta[:, :15], total=delta)
    with pytest.raises(ValueError, match="delta and total together"):
        rms_norm(x, weight, EPS, y, r, delta=delta)
    with pytest.raises(ValueError, match=r"rows is \(3,\)"):
        rms_norm(x, weight, EPS, y, r, rows=rows[:3])
    with pytest.raises(ValueError, match=r"delta is \(3, 16\).*\[>= 4, 16\]"):
        rms_norm(x, weight, EPS, y, r, delta=delta[:3], total=delta[:3])
    with pytest.raises(ValueError, match=r"r is \(4,\) torch.float64"):
        rms_norm(x, weight, EPS, y, r.double())
    with pytest.raises(ValueError, match="add has 3"):
        rms_norm_backward(dy, x, r, weight, y, weight.clone(), weight, add=(dy, dy, dy))
    with pytest.raises(ValueError, match=r"dweight is \(15,\).*\[16\]"):
        rms_norm_backward(dy, x, r, weight, y, weight[:15], weight)
    with pytest.raises(ValueError, match=r"x is \(3, 16\).*\[>= 4, 16\]"):
        rms_norm_backward(dy, x[:3], r, weight, y, weight.clone(), weight)


GPU_SHAPES = {
    "SmolLM2": (1000, 1200, 576),
    "Llama-3.1-8B": (515, 600, 4096),
    "Llama-3.3-70B": (300, 300, 8192),
    "widest": (150, 150, 16384),
    "odd": (77, 80, 1003),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_on_the_gpu(shape, dtype, device, three_way, poison):
    for gather, residual in ((False, False), (False, True), (True, True)):
        check_forward(rms_norm, shape, device, dtype, three_way, gather, residual)
    partials = rms_norm_partials(shape[2], device)
    for gather, scatter, adds in ((False, False, 0), (False, False, 2), (True, True, 1), (True, True, 2)):
        check_backward(rms_norm_backward, shape, device, dtype, three_way, gather, scatter, adds, partials)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_two_runs_are_bitwise_equal_on_the_gpu(shape, device, poison):
    x, delta, dy, add, weight, rows = case(shape, device, torch.bfloat16)
    seen = []
    for _ in range(2):
        (y, r), total = forward_buffers(len(dy), x), torch.empty_like(delta)
        rms_norm(x, weight, EPS, y, r, rows=rows, delta=delta, total=total)
        dx, dweight = torch.empty_like(dy), torch.zeros(shape[2], device=device)
        partial = torch.empty(rms_norm_partials(shape[2], device), shape[2], device=device)
        rms_norm_backward(dy, total, r, weight, dx, dweight, partial, add=(add,))
        seen.append((y, r, total, dx, dweight))
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_bf16_gradients_into_float32_rows(device):
    x, _, dy, _, weight, rows = case((64, 100, 576), device, torch.bfloat16)
    r = rms_norm_ref(x[rows], weight, EPS)[1][:, 0].contiguous()
    want, _ = rms_norm_backward_ref(dy, x[rows], r[:, None], weight)
    dx, partial = torch.ones(100, 576, device=device), torch.empty(rms_norm_partials(576, device), 576, device=device)
    dweight = torch.zeros(576, device=device)
    rms_norm_backward(dy, x, r, weight, dx, dweight, partial, rows=rows, x_rows=rows, add_dx=True)
    torch.testing.assert_close(dx[rows], want + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_other_dtypes_are_refused(device):
    x, _, _, _, weight, _ = case((4, 4, 64), device, torch.float16)
    with pytest.raises(ValueError, match=r"float16; use torch.bfloat16"):
        rms_norm(x, weight, EPS, *forward_buffers(4, x))
