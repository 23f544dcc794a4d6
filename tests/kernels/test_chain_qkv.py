"""The split into rotated q, k, v and its backward against float64, and sines at a million tokens."""

from __future__ import annotations

import pytest
import torch

from fastdraft.kernels.chain_qkv import (
    ChainQKVConfig,
    _chain_qkv,
    _chain_qkv_backward_kernel,
    _chain_qkv_kernel,
    chain_qkv,
    chain_qkv_backward,
    chain_qkv_backward_ref,
    chain_qkv_config,
    chain_qkv_ref,
)

SHAPES = {  # n, m, Hq, Hkv, D, rotary_dim
    "one tile": (3, 5, 2, 2, 16, 16),
    "tile + 1": (3, 4, 5, 3, 16, 16),
    "q alone": (4, 6, 3, 0, 16, 16),
    "k and v alone": (4, 6, 0, 3, 16, 16),
    "D 96": (2, 3, 3, 1, 96, 96),
    "partial rotary": (3, 5, 3, 2, 24, 10),
    "one row, one pair": (1, 1, 1, 1, 2, 2),
}
SMALL = ChainQKVConfig(heads=2, num_warps=1)
FACTOR = 1.25


def case(shape, device, dtype=torch.float32, far=4096):
    n, m, heads, kv_heads, dim, rotary = shape
    gen = torch.Generator(device).manual_seed(0)
    width = (heads + 2 * kv_heads) * dim
    z, dz = (torch.randn(n, width, generator=gen, device=device).to(dtype) for _ in range(2))
    e = torch.randn(m, width + 8, generator=gen, device=device).to(dtype)
    e_row = torch.randperm(m, generator=gen, device=device)[:n]
    if heads == 0:  # as K^0, V^0 of a pack: their product has the embedding's share already
        e = e_row = None
    position = torch.randint(0, far, (n,), generator=gen, device=device)
    freqs = (10000.0 ** -(torch.arange(0, rotary, 2, device=device) / rotary)).float()
    return z, e, e_row, position, freqs, dz


def outputs(shape, device, dtype):
    n, _, heads, kv_heads, dim, _ = shape
    return [torch.empty(n, h, dim, dtype=dtype, device=device) if h else None for h in (heads, kv_heads, kv_heads)]


def parts(dz, shape):
    """dq in dz's dtype, dk and dv as float32 sums."""
    _, _, heads, kv_heads, dim, _ = shape
    dq, dk, dv = dz.unflatten(-1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
    stats = torch.promote_types(dz.dtype, torch.float32)
    return dq if heads else None, dk.to(stats) if kv_heads else None, dv.to(stats) if kv_heads else None


def kernel_forward(*args):
    _chain_qkv(_chain_qkv_kernel, *args, SMALL)


def kernel_backward(dq, dk, dv, e_row, position, freqs, factor, dz, de):
    _chain_qkv(_chain_qkv_backward_kernel, dz, de, e_row, position, freqs, factor, dq, dk, dv, SMALL)


def complex_truth(z, e, e_row, position, freqs, dim, heads, kv_heads):
    """Rotation as multiplication by e^(i angle), float64."""
    x = z.double() if e is None else z.double() + e.double()[e_row, : z.shape[1]]
    x = x.unflatten(-1, (-1, dim)).clone()
    half = len(freqs)
    # the angle is a float32 product, by definition of Rope; its sines here are float64's
    angle = (position.float()[:, None] * freqs).double()
    turn = torch.polar(torch.full_like(angle, FACTOR), angle)[:, None]
    rotated = x[:, : heads + kv_heads]
    pair = torch.complex(rotated[..., :half], rotated[..., half : 2 * half]) * turn
    rotated[..., :half], rotated[..., half : 2 * half] = pair.real, pair.imag
    return x.split([heads, kv_heads, kv_heads], 1)


def check(forward, backward, shape, device, dtype, three_way, far=4096):
    n, m, heads, kv_heads, dim, _ = shape
    z, e, e_row, position, freqs, dz = case(shape, device, dtype, far)
    out = outputs(shape, device, dtype)
    forward(z, e, e_row, position, freqs, FACTOR, *out)
    sizes = (heads, kv_heads, dim)
    plain = chain_qkv_ref(z, e, e_row, position, freqs, FACTOR, *sizes)
    truth = complex_truth(z, e, e_row, position, freqs, dim, heads, kv_heads)
    # the truth's sines are not rounded to the dtype: what that moves is allowed
    extra = float(z.abs().max() + (0 if e is None else e.abs().max())) * torch.finfo(dtype).eps
    for name, ours, p, t in zip("qkv", out, plain, truth, strict=True):
        if ours is not None:
            three_way(ours, p, t, name, extra)

    # the transpose, in the same arithmetic: autograd through the float64 truth
    wide = z.double().requires_grad_()
    values = complex_truth_grad(wide, position, freqs, dim, heads, kv_heads)
    grads = parts(dz, shape)
    given = torch.cat(
        [torch.zeros(n, 0, device=device).double()] + [g.flatten(1).double() for g in grads if g is not None], 1
    )
    (dz_truth,) = torch.autograd.grad(values, wide, given)
    got = torch.empty_like(dz)
    stats = torch.promote_types(dtype, torch.float32)
    de = None if e is None else torch.ones(m, e.shape[1], dtype=stats, device=device)
    backward(*grads, e_row, position, freqs, FACTOR, got, de)
    plain_dz = chain_qkv_backward_ref(*grads, position, freqs, FACTOR, dtype)
    three_way(got, plain_dz, dz_truth, "dz", float(dz.abs().max()) * torch.finfo(dtype).eps)
    if de is not None:
        want = torch.ones_like(de)
        want[e_row, : dz.shape[1]] += got.to(stats)
        assert torch.equal(de, want)


def complex_truth_grad(z, position, freqs, dim, heads, kv_heads):
    """The linear map of `complex_truth` without e, differentiable, flat."""
    x = z.unflatten(-1, (-1, dim))
    half, rotates = len(freqs), heads + kv_heads
    angle = (position.float()[:, None] * freqs).double()[:, None]
    turn = torch.polar(torch.full_like(angle, FACTOR), angle)
    pair = torch.complex(x[:, :rotates, :half], x[:, :rotates, half : 2 * half]) * turn
    rotated = torch.cat([pair.real, pair.imag, x[:, :rotates, 2 * half :]], -1)
    return torch.cat([rotated, x[:, rotates:]], 1).flatten(1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(shape, device, three_way, poison):
    check(kernel_forward, kernel_backward, shape, device, torch.float32, three_way)
    check(chain_qkv, chain_qkv_backward, shape, device, torch.float32, three_way)


def test_strided_rows(device, poison):
    """q, k, v as slices of one buffer, z and e of wider ones, the gradients too."""
    shape = (4, 6, 3, 2, 16, 12)
    z, e, e_row, position, freqs, dz = case(shape, device)
    q, k, v = chain_qkv_ref(z, e, e_row, position, freqs, FACTOR, 3, 2, 16)
    for forward, backward in ((kernel_forward, kernel_backward), (chain_qkv, chain_qkv_backward)):
        wide_z, wide_e, out = (torch.empty(rows, 160, device=device) for rows in (4, 6, 4))
        wide_z[:, 16:128], wide_e[:, 16:136] = z, e
        cut = out[:, 16:128].unflatten(-1, (7, 16))
        forward(wide_z[:, 16:128], wide_e[:, 16:136], e_row, position, freqs, FACTOR, cut[:, :3], cut[:, 3:5], cut[:, 5:])
        torch.testing.assert_close(cut, torch.cat([q, k, v], 1))
        assert out[:, :16].isnan().all() and out[:, 128:].isnan().all()
        out, wide_de = torch.empty(4, 160, device=device), torch.zeros(6, 160, device=device)
        grads = dz.unflatten(-1, (7, 16)).split([3, 2, 2], 1)
        backward(*grads, e_row, position, freqs, FACTOR, out[:, 16:128], wide_de[:, 16:136])
        torch.testing.assert_close(out[:, 16:128], chain_qkv_backward_ref(*grads, position, freqs, FACTOR, z.dtype))
        assert out[:, :16].isnan().all() and out[:, 128:].isnan().all()
        assert not wide_de[:, :16].any() and not wide_de[:, 128:].any() and wide_de[:, 16:128].any()


def test_backward_undoes_forward(device):
    """Without the factor the rotation is orthogonal: back(forward(z)) = z."""
    shape = (5, 5, 3, 2, 16, 12)
    z, _, _, position, freqs, _ = case(shape, device)
    out = outputs(shape, device, z.dtype)
    kernel_forward(z, None, None, position, freqs, 1.0, *out)
    back = torch.empty_like(z)
    kernel_backward(*out, None, position, freqs, 1.0, back, None)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-5)


def test_two_runs_are_bitwise_equal(device):
    shape = SHAPES["tile + 1"]
    *inputs, _ = case(shape, device)
    first, second = outputs(shape, device, torch.float32), outputs(shape, device, torch.float32)
    kernel_forward(*inputs, FACTOR, *first)
    kernel_forward(*inputs, FACTOR, *second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_the_plain_path_runs_in_float64():
    shape = (4, 6, 3, 2, 16, 12)
    z, e, e_row, position, freqs, dz = case(shape, "cpu", torch.float64)
    out = outputs(shape, "cpu", torch.float64)
    chain_qkv(z, e, e_row, position, freqs, FACTOR, *out)
    angle = position[:, None] * freqs.double()
    want = (z + e[e_row, : z.shape[1]]).unflatten(-1, (-1, 16))
    first = want[:, 0, :6] * angle.cos() * FACTOR - want[:, 0, 6:12] * angle.sin() * FACTOR
    torch.testing.assert_close(out[0][:, 0, :6], first, rtol=1e-13, atol=1e-13)
    de = torch.zeros_like(e)
    chain_qkv_backward(*parts(dz, shape), e_row, position, freqs, FACTOR, torch.empty_like(z), de)
    assert de.any() and not de[:, z.shape[1] :].any()


def test_errors_say_what_came():
    shape = SHAPES["one tile"]
    z, e, e_row, position, freqs, _ = case(shape, "cpu")
    q, k, v = outputs(shape, "cpu", torch.float32)
    with pytest.raises(ValueError, match="q, or k and v"):
        chain_qkv(z, e, e_row, position, freqs, 1.0, q, k, None)
    with pytest.raises(ValueError, match=r"z is \(3, 96\).*\[3, 32\]"):
        chain_qkv(z, e, e_row, position, freqs, 1.0, q, None, None)
    with pytest.raises(ValueError, match=r"e_row is \(2,\)"):
        chain_qkv(z, e, e_row[:2], position, freqs, 1.0, q, k, v)
    with pytest.raises(ValueError, match=r"freqs is \(9,\)"):
        chain_qkv(z, e, e_row, position, torch.ones(9), 1.0, q, k, v)
    with pytest.raises(ValueError, match=r"e is \(\d+, \d+\) torch.float64"):
        chain_qkv(z, e.double(), e_row, position, freqs, 1.0, q, k, v)
    with pytest.raises(ValueError, match=r"de is \(\d+, \d+\) torch.bfloat16.*torch.float32"):
        chain_qkv_backward(q, k, v, e_row, position, freqs, 1.0, z, e.bfloat16())


GPU_SHAPES = {
    "SmolLM2": (700, 800, 9, 3, 64, 64),
    "Llama-3.1-8B": (515, 700, 32, 8, 128, 128),
    "8B, q alone": (515, 700, 32, 0, 128, 128),
    "8B, k and v alone": (700, 700, 0, 8, 128, 128),
    "Llama-3.3-70B": (130, 200, 64, 8, 128, 128),
    "D 96, group 1": (130, 200, 32, 32, 96, 96),
    "D 256, partial rotary": (130, 200, 16, 2, 256, 64),
    "D 80, partial rotary": (130, 200, 5, 5, 80, 32),
}


@pytest.mark.gpu
@pytest.mark.parametrize("far", [4096, 2**20], ids=["4k", "1M"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_on_the_gpu(shape, dtype, far, device, three_way, poison):
    check(chain_qkv, chain_qkv_backward, shape, device, dtype, three_way, far)


@pytest.mark.gpu
def test_sines_hold_up_to_a_million_tokens(device):
    """q of (1, 0) gives cos and sin themselves."""
    position = torch.cat([torch.arange(2**20 - 4000, 2**20 + 1), torch.arange(0, 2**20, 257)]).to(device)
    n, freqs = len(position), torch.tensor([1.0, 0.7361], device=device)
    z = torch.tensor([[1.0, 1.0, 0.0, 0.0]], device=device).repeat(n, 1)
    q = torch.empty(n, 1, 4, device=device)
    chain_qkv(z, None, None, position, freqs, 1.0, q, None, None)
    angle = (position.float()[:, None] * freqs).double()
    truth = torch.cat([angle.cos(), angle.sin()], -1)
    assert float((q[:, 0].double() - truth).abs().max()) < 2.5e-7


@pytest.mark.gpu
def test_two_runs_are_bitwise_equal_on_the_gpu(device):
    shape = GPU_SHAPES["Llama-3.1-8B"]
    z, e, e_row, position, freqs, dz = case(shape, device, torch.bfloat16)
    seen = []
    for _ in range(2):
        out, got = outputs(shape, device, torch.bfloat16), torch.empty_like(z)
        de = torch.zeros_like(e, dtype=torch.float32)
        chain_qkv(z, e, e_row, position, freqs, FACTOR, *out)
        chain_qkv_backward(*parts(dz, shape), e_row, position, freqs, FACTOR, got, de)
        seen.append((*out, got, de))
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_other_dtypes_are_refused(device):
    shape = SHAPES["one tile"]
    z, e, e_row, position, freqs, _ = case(shape, device, torch.float16)
    with pytest.raises(ValueError, match=r"float16; use torch.bfloat16"):
        chain_qkv(z, e, e_row, position, freqs, 1.0, *outputs(shape, device, torch.float16))


def test_the_config_holds_a_tile():
    for rotary in (2, 64, 96, 128, 256):
        config = chain_qkv_config(rotary)
        assert config.heads & (config.heads - 1) == 0 and config.heads * rotary // 2 <= 512
