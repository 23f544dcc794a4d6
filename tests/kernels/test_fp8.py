"""Rows in fp8: the kernels against the reference, the reference against its stated bounds, products against float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastdraft.kernels.fp8 import (
    FP8,
    Fp8Config,
    Fp8Rows,
    Fp8Weight,
    _quantize_columns,
    _quantize_rows,
    dequantize,
    quantize_columns,
    quantize_rows,
    quantize_rows_ref,
)
from fastdraft.kernels.jit import triton
from fastdraft.kernels.matmul import linear, linear_backward

SHAPES = {"one tile": (3, 64), "tile + 1": (3, 65), "ragged": (5, 150), "one row": (1, 40), "one column": (4, 1)}  # n, k


def case(shape, device, dtype=torch.float32):
    """Rows of very different sizes, one of them zero."""
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(*shape, generator=gen, device=device) * torch.logspace(-6, 6, shape[0], device=device)[:, None]
    x[shape[0] // 2] = 0 if shape[0] > 1 else x[0]
    return x.to(dtype)


def empty_rows(n, k, device):
    return Fp8Rows(torch.empty(n, k, dtype=FP8, device=device), torch.empty(n, device=device))


def kernel_rows(x, out):
    _quantize_rows(x, out, Fp8Config(64, 1))


def assert_same(got: Fp8Rows, want: Fp8Rows):
    """Bit for bit."""
    assert torch.equal(got.scale, want.scale) and torch.equal(got.q.float(), want.q.float())


@pytest.fixture(autouse=True)
def interpreted_conversion(monkeypatch):
    """Triton 3.7's interpreter forgets the carry when it rounds to fp8 (31.9 becomes 16): here PyTorch converts."""
    if torch.cuda.is_available() or triton is None:
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def to_fp8(x, source, target, rounding):
        if str(target) != "fp8e4nv" or str(source) != "fp32":
            return convert(x, source, target, rounding)
        return torch.from_numpy(x.view("float32").copy()).to(FP8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", to_fp8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(64, 512), (1, 16), (7, 33)], ids=str)
def test_the_stated_bounds_hold(shape, dtype):
    x = case(shape, "cpu", dtype)
    rows = quantize_rows_ref(x)
    amax = x.double().abs().amax(1)
    assert torch.equal(torch.frexp(rows.scale)[0], torch.full_like(rows.scale, 0.5)), "a power of two"
    live = amax > 0
    assert bool((amax <= 448 * rows.scale.double()).all()) and bool((amax > 224 * rows.scale.double())[live].all())
    error, scale = (dequantize(rows, torch.float64) - x.double()).abs(), rows.scale.double()[:, None]
    normal = x.double().abs() >= 2**-6 * scale
    assert bool((error <= torch.where(normal, 2**-4 * x.double().abs(), 2**-10 * scale)).all())
    assert not rows.q.float()[~live].any() and bool((rows.scale > 0).all())
    assert torch.equal(dequantize(rows, torch.bfloat16).double(), dequantize(rows, torch.float64)), "exact in bf16"


@pytest.mark.parametrize("top", [224.0, 224.1, 447.0, 448.0, 448.1, 3e38, 1e-37, 2.0**-118])
def test_scales_at_their_edges(top, device):
    x = torch.tensor([[top, -top, top / 3]], device=device)
    want = quantize_rows_ref(x)
    for quantize in (kernel_rows, quantize_rows):
        got = empty_rows(1, 3, device)
        quantize(x, got)
        assert_same(got, want)
    expected = 2.0 ** (math.ceil(math.log2(top / 448)) if top > 1e-36 else -126)
    assert float(want.scale[0]) == expected and float(want.q[0, 0]) <= 448


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_and_columns(shape, device, poison):
    x, (n, k) = case(shape, device), shape
    for quantize in (kernel_rows, quantize_rows):
        got = empty_rows(n, k, device)
        quantize(x, got)
        assert_same(got, quantize_rows_ref(x))
    for quantize in (_quantize_columns, quantize_columns):
        got = empty_rows(k, n, device)
        quantize(x, got)
        assert_same(got, quantize_rows_ref(x.T))


def test_columns_in_many_tiles(device, poison):
    x = case((260, 70), device).flip(1)
    for quantize in (_quantize_columns, quantize_columns):
        got = empty_rows(70, 260, device)
        quantize(x, got)
        assert_same(got, quantize_rows_ref(x.T))


def test_strided_rows(device, poison):
    x = case((4, 70), device)
    wide = torch.empty(4, 96, device=device)
    wide[:, 8:78] = x
    for quantize in (kernel_rows, quantize_rows):
        q, scale = torch.zeros(4, 90, dtype=FP8, device=device), torch.empty(4, device=device)
        quantize(wide[:, 8:78], Fp8Rows(q[:, 4:74], scale))
        assert_same(Fp8Rows(q[:, 4:74], scale), quantize_rows_ref(x))
        assert not q.float()[:, :4].any() and not q.float()[:, 74:].any()
    for quantize in (_quantize_columns, quantize_columns):
        q, scale = torch.zeros(70, 16, dtype=FP8, device=device), torch.empty(70, device=device)
        quantize(wide[:, 8:78], Fp8Rows(q[:, 4:8], scale))
        assert_same(Fp8Rows(q[:, 4:8], scale), quantize_rows_ref(x.T))
        assert not q.float()[:, :4].any() and not q.float()[:, 8:].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad, device):
    x = case((4, 48), device).abs() + 1
    x[2, 5] = bad
    for quantize in (kernel_rows, quantize_rows):
        got = empty_rows(4, 48, device)
        quantize(x, got)
        assert got.scale.isfinite().tolist() == [True, True, False, True]
    got = empty_rows(48, 4, device)
    _quantize_columns(x, got)
    assert (~got.scale.isfinite()).nonzero().tolist() == [[5]]
    weight = make_weight(torch.randn(32, 48, device=device).bfloat16())
    out = torch.empty(4, 32, device=device, dtype=torch.bfloat16)
    linear(x.bfloat16(), weight, out)
    assert not out[2].isfinite().any() and out[[0, 1, 3]].isfinite().all()


def make_weight(w, room_rows=3, room_numbers=None) -> Fp8Weight:
    by_out, by_in = empty_rows(*w.shape, w.device), empty_rows(*w.T.shape, w.device)
    quantize_rows(w, by_out)
    quantize_columns(w, by_in)
    q = torch.empty(room_numbers or room_rows * max(w.shape), dtype=FP8, device=w.device)
    return Fp8Weight(by_out, by_in, Fp8Rows(q, torch.empty(room_rows, device=w.device)), w.dtype)


def assert_product(out, a, b):
    """Within what the roundings of a, b (rows over the summed index) and of out allow, element by element."""
    a, b = a.double(), b.double()
    bound_a, bound_b = (2**-4 * x.abs() + 2**-10 / 224 * x.abs().amax(1, keepdim=True) for x in (a, b))
    truth = a @ b.T
    bound = a.abs() @ bound_b.T + bound_a @ b.abs().T + bound_a @ bound_b.T
    error = (out.double() - truth).abs()
    assert bool((error <= bound + 2**-8 * (truth.abs() + bound)).all())
    assert float(error.norm() / truth.norm()) < 0.05  # independent roundings average out: 2.6 % a factor


def check_products(n, outputs, inputs, device, **room):
    """Both products of a weight, whole and of its first outputs, from strided rows."""
    gen = torch.Generator(device).manual_seed(1)
    x, dz = (torch.randn(n, k + 16, generator=gen, device=device).bfloat16()[:, :k] for k in (inputs, outputs))
    w = torch.randn(outputs, inputs, generator=gen, device=device).bfloat16()
    weight, half = make_weight(w, **room), outputs // 32 * 16
    assert weight.shape == w.shape and weight[:half].shape == (half, inputs)
    out, dx = (torch.empty(n, k, dtype=torch.bfloat16, device=device) for k in (outputs, inputs))
    linear(x, weight, out)
    assert_product(out, x, w)
    part = torch.empty(n, half, dtype=torch.bfloat16, device=device)
    linear(x, weight[:half], part)
    assert_product(part, x, w[:half])
    linear_backward(dz, weight, dx)
    assert_product(dx, dz, w.T)
    linear_backward(dz[:, :half], weight[:half], dx)
    assert_product(dx, dz[:, :half], w[:half].T)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_products_in_parts(n, device, poison):
    check_products(n, 96, 64, device)


def test_forward_and_backward_see_one_weight():
    gen = torch.Generator().manual_seed(1)
    w = torch.randn(256, 512, generator=gen).bfloat16()
    weight = make_weight(w)
    normal = w.abs() >= 2**-6 * torch.maximum(weight.by_out.scale[:, None], weight.by_in.scale[None, :])
    assert float(normal.float().mean()) > 0.999
    one, other = (dequantize(x, torch.float32) for x in (weight.by_out, weight.by_in))
    assert torch.equal(one[normal], other.T[normal])


def test_a_plain_weight_is_a_plain_product():
    x, w, dz = torch.randn(3, 5).double(), torch.randn(7, 5).double(), torch.randn(3, 7).double()
    out, dx = torch.empty(3, 7).double(), torch.empty(3, 5).double()
    linear(x, w, out)
    linear_backward(dz, w, dx)
    assert torch.equal(out, x @ w.T) and torch.equal(dx, dz @ w)


def test_errors_say_what_came():
    x, out = torch.randn(4, 32), empty_rows(4, 32, "cpu")
    with pytest.raises(ValueError, match=r"q is \(4, 31\).*\[4, 32\]"):
        quantize_rows(x, Fp8Rows(out.q[:, :31], out.scale))
    with pytest.raises(ValueError, match=r"q is \(4, 32\).*\[32, 4\]"):
        quantize_columns(x, out)
    with pytest.raises(ValueError, match="contiguous rows"):
        quantize_rows(torch.randn(4, 64)[:, ::2], out)
    with pytest.raises(ValueError, match=r"torch.float64"):
        quantize_rows(x, Fp8Rows(out.q, out.scale.double()))
    with pytest.raises(ValueError, match=r"x is \(128,\).*\[n, k\]"):
        quantize_rows(x.view(-1), out)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1000, 4096), (515, 14336), (64, 28672), (77, 32000), (33, 1003)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_on_the_gpu(shape, dtype, device, poison):
    x = case(shape, device, dtype)
    for quantize, source, size in ((quantize_rows, x, shape), (quantize_columns, x.T, shape[::-1])):
        got = empty_rows(*size, device)
        quantize(x, got)
        assert_same(got, quantize_rows_ref(source))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "outputs", "inputs"), [(2048, 6144, 4096), (777, 4096, 14336), (5, 32000, 576), (300, 48, 96)]
)
def test_products_on_the_gpu(n, outputs, inputs, device, poison):
    """Row counts that are no multiples of a tile, parts of a weight, strided rows."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    check_products(n, outputs, inputs, device, room_rows=512)
