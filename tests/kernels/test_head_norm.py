"""The norm over each head with RoPE behind it, and its backward, against autograd through a float64 truth."""

from __future__ import annotations

import pytest
import torch

from fastdraft.kernels.chain_qkv import chain_qkv
from fastdraft.kernels.head_norm import (
    HeadNormConfig,
    _head_norm,
    _head_norm_backward,
    head_norm,
    head_norm_backward,
    head_norm_backward_ref,
    head_norm_ref,
)
from fastdraft.kernels.rms_norm import rms_norm, rms_norm_partials

SHAPES = {  # n, m, heads, D, rotary_dim
    "one tile": (3, 5, 2, 16, 16),
    "tile + 1, one row read by many": (7, 2, 5, 16, 16),
    "partial rotary": (4, 4, 3, 24, 10),
    "D 96": (2, 3, 3, 96, 96),
    "one row, one pair": (1, 1, 1, 2, 2),
}
SMALL = HeadNormConfig(heads=2, num_warps=1)
EPS, FACTOR = 1e-5, 1.25


def case(shape, device, dtype=torch.float32):
    n, m, heads, dim, rotary = shape
    gen = torch.Generator(device).manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=gen, device=device)  # noqa: E731
    z = (3 * normal(m, heads * dim)).to(dtype)
    weight = (1 + 0.3 * normal(dim)).to(dtype)
    position = torch.randint(0, 4096, (n,), generator=gen, device=device)
    freqs = (10000.0 ** -(torch.arange(0, rotary, 2, device=device) / rotary)).float()
    rows = None if m >= n else torch.randint(0, m, (n,), generator=gen, device=device)
    dout = normal(n, heads, dim).to(dtype)
    return z, weight, position, freqs, rows, dout


def truth(z, weight, position, freqs, dtype):
    """float64, the rotation as a product with e^(i angle), cos and sin rounded to the dtype as `Rope` gives them."""
    half, x = len(freqs), z.unflatten(1, (-1, len(weight)))
    y = x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight
    angle = (position.float()[:, None] * freqs).double()
    turn = torch.complex(*((f(angle) * FACTOR).to(dtype).double() for f in (torch.cos, torch.sin)))[:, None]
    pair = torch.complex(y[..., :half], y[..., half : 2 * half]) * turn
    return torch.cat([pair.real, pair.imag, y[..., 2 * half :]], -1)


def kernel_forward(z, weight, position, freqs, out, rows):
    _head_norm(z, weight, EPS, position, freqs, FACTOR, out, rows, SMALL)


def kernel_backward(dout, z, weight, position, freqs, dz, dweight, rows):
    partial = torch.empty(2, len(weight), device=z.device)  # two programs share all rows
    _head_norm_backward(dout, z, weight, EPS, position, freqs, FACTOR, dz, dweight, partial, rows, SMALL)


def public_forward(z, weight, position, freqs, out, rows):
    head_norm(z, weight, EPS, position, freqs, FACTOR, out, rows)


def public_backward(dout, z, weight, position, freqs, dz, dweight, rows):
    stats = torch.promote_types(z.dtype, torch.float32)
    partial = torch.empty(rms_norm_partials(len(weight), z.device), len(weight), device=z.device, dtype=stats)
    head_norm_backward(dout, z, weight, EPS, position, freqs, FACTOR, dz, dweight, partial, rows)


def check(forward, backward, shape, device, dtype, three_way):
    z, weight, position, freqs, rows, dout = case(shape, device, dtype)
    source = z[: len(dout)] if rows is None else z[rows]
    wide, wide_weight = source.double().requires_grad_(), weight.double().requires_grad_()
    value = truth(wide, wide_weight, position, freqs, dtype)
    out = torch.empty_like(dout)
    forward(z, weight, position, freqs, out, rows)
    plain = head_norm_ref(source, weight, EPS, position, freqs, FACTOR)
    three_way(out, plain, value.detach(), "out")

    dz_truth, dw_truth = torch.autograd.grad(value, (wide, wide_weight), dout.double())
    plain_dz, plain_dw = head_norm_backward_ref(dout, source, weight, EPS, position, freqs, FACTOR)
    dz = torch.empty(len(dout), z.shape[1], dtype=dtype, device=device)
    dw = torch.full(weight.shape, 2.0, dtype=plain_dw.dtype, device=device)
    backward(dout, z, weight, position, freqs, dz, dw, rows)
    three_way(dz, plain_dz.to(dtype), dz_truth, "dz")
    three_way(dw - 2, plain_dw, dw_truth, "dw", 1e-5 * float(dw_truth.abs().max()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(shape, device, three_way, poison):
    check(kernel_forward, kernel_backward, shape, device, torch.float32, three_way)
    check(public_forward, public_backward, shape, device, torch.float32, three_way)


def test_it_is_the_norm_and_then_the_rotation(device):
    shape = SHAPES["partial rotary"]
    z, weight, position, freqs, _, dout = case(shape, device)
    n, _, heads, dim, _ = shape
    normed, r, want, out = torch.empty_like(z), torch.empty(n * heads, device=device), torch.empty_like(dout), dout.clone()
    rms_norm(z.view(-1, dim), weight, EPS, normed.view(-1, dim), r)
    chain_qkv(normed, None, None, position, freqs, FACTOR, want, None, None)
    kernel_forward(z, weight, position, freqs, out, None)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)


def test_strided_rows(device, poison):
    """z and dz as columns of wider buffers, out and dout too."""
    z, weight, position, freqs, _, dout = case((4, 4, 3, 16, 12), device)
    want = head_norm_ref(z, weight, EPS, position, freqs, FACTOR)
    want_dz, want_dw = head_norm_backward_ref(dout, z, weight, EPS, position, freqs, FACTOR)
    for forward, backward in ((kernel_forward, kernel_backward), (public_forward, public_backward)):
        wide, out, wide_dout, wide_dz = (torch.empty(4, 80, device=device) for _ in range(4))
        wide[:, 16:64], wide_dout[:, 8:56] = z, dout.flatten(1)
        forward(wide[:, 16:64], weight, position, freqs, out[:, 16:64].unflatten(1, (3, 16)), None)
        torch.testing.assert_close(out[:, 16:64], want.flatten(1))
        dw = torch.zeros(16, device=device)
        cut = wide_dout[:, 8:56].unflatten(1, (3, 16))
        backward(cut, wide[:, 16:64], weight, position, freqs, wide_dz[:, 16:64], dw, None)
        torch.testing.assert_close(wide_dz[:, 16:64], want_dz)
        torch.testing.assert_close(dw, want_dw)
        for buffer in (out, wide_dz):
            assert buffer[:, :16].isnan().all() and buffer[:, 64:].isnan().all()


def test_the_plain_path_runs_in_float64():
    z, weight, position, freqs, _, dout = case(SHAPES["one tile"], "cpu", torch.float64)
    out, dz, dw = torch.empty_like(dout), torch.empty(3, z.shape[1]).double(), torch.zeros_like(weight)
    public_forward(z, weight, position, freqs, out, None)
    source, w = z[:3].clone().requires_grad_(), weight.clone().requires_grad_()
    value = head_norm_ref(source, w, EPS, position, freqs, FACTOR)
    torch.testing.assert_close(out, value.detach(), rtol=1e-13, atol=1e-13)
    public_backward(dout, z, weight, position, freqs, dz, dw, None)
    want_dz, want_dw = torch.autograd.grad(value, (source, w), dout)
    torch.testing.assert_close(dz, want_dz, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dw, want_dw, rtol=1e-12, atol=1e-12)


def test_no_rows_are_nothing(device):
    z, weight, position, freqs, _, dout = case(SHAPES["one tile"], device)
    dw = torch.zeros(16, device=device)
    kernel_forward(z, weight, position[:0], freqs, dout[:0].clone(), None)
    kernel_backward(dout[:0], z, weight, position[:0], freqs, z[:0].clone(), dw, None)
    assert not dw.any()


def test_errors_say_what_came():
    z, weight, position, freqs, _, dout = case(SHAPES["one tile"], "cpu")
    with pytest.raises(ValueError, match=r"z is \(5, 32\).*\[>= 3, 16\]"):
        head_norm(z, weight, EPS, position, freqs, 1.0, dout[:, :1])
    with pytest.raises(ValueError, match=r"position is \(2,\)"):
        head_norm(z, weight, EPS, position[:2], freqs, 1.0, dout)
    with pytest.raises(ValueError, match=r"freqs is \(9,\)"):
        head_norm(z, weight, EPS, position, torch.ones(9), 1.0, dout)
    with pytest.raises(ValueError, match=r"rows is \(2,\)"):
        head_norm(z, weight, EPS, position, freqs, 1.0, dout, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"dz is \(5, 32\)"):
        public_backward(dout, z, weight, position, freqs, z, torch.zeros(16), None)


GPU_SHAPES = {
    "8B, q": (515, 515, 32, 128, 128),
    "8B, k": (700, 700, 8, 128, 128),
    "8B, masked rows": (512, 33, 32, 128, 128),
    "SmolLM2": (700, 700, 9, 64, 64),
    "D 256, partial rotary": (130, 130, 16, 256, 64),
    "D 80, partial rotary": (130, 130, 5, 80, 32),
    "many rows for the programs": (5000, 5000, 2, 128, 128),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_on_the_gpu(shape, dtype, device, three_way, poison):
    check(public_forward, public_backward, shape, device, dtype, three_way)


@pytest.mark.gpu
def test_two_runs_are_bitwise_equal_on_the_gpu(device):
    z, weight, position, freqs, _, dout = case(GPU_SHAPES["many rows for the programs"], device, torch.bfloat16)
    found = []
    for _ in range(2):
        dz, dw = torch.empty(5000, 256, device=device).bfloat16(), torch.zeros(128, device=device)
        public_backward(dout, z, weight, position, freqs, dz, dw, None)
        found.append((dz, dw))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
