"""SwiGLU and its in-place backward against float64."""

from __future__ import annotations

import pytest
import torch

from fastdraft.kernels.swiglu import (
    SwigluConfig,
    _swiglu,
    _swiglu_backward_kernel,
    _swiglu_kernel,
    swiglu,
    swiglu_backward_,
    swiglu_backward_ref,
    swiglu_ref,
)

SHAPES = {"one block": (3, 64), "block + 1": (3, 65), "ragged": (5, 150), "one row": (1, 40), "one column": (4, 1)}  # n, I
SMALL = SwigluConfig(64, 1)


def case(shape, device, dtype=torch.float32):
    gen = torch.Generator(device).manual_seed(0)
    n, width = shape
    gate_up = (3 * torch.randn(n, 2 * width, generator=gen, device=device)).to(dtype)
    return gate_up, torch.randn(n, width, generator=gen, device=device).to(dtype)


def kernel_forward(gate_up, act):
    _swiglu(_swiglu_kernel, gate_up, act, SMALL)


def kernel_backward(gate_up, dact):
    _swiglu(_swiglu_backward_kernel, gate_up, dact, SMALL)


def check(forward, backward, gate_up, dact, three_way):
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    truth = torch.nn.functional.silu(gate) * up
    (gradient_truth,) = torch.autograd.grad(truth, wide, dact.double())
    act = torch.empty_like(dact)
    forward(gate_up, act)
    three_way(act, swiglu_ref(gate_up), truth.detach(), "act")
    gradient, again = gate_up.clone(), dact.clone()
    backward(gradient, again)
    three_way(gradient, swiglu_backward_ref(gate_up, dact), gradient_truth, "gradient")
    assert torch.equal(again, act)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(shape, device, three_way, poison):
    gate_up, dact = case(shape, device)
    for forward, backward in ((kernel_forward, kernel_backward), (swiglu, swiglu_backward_)):
        check(forward, backward, gate_up, dact, three_way)


def test_strided_rows(device, poison):
    gate_up, dact = case((4, 70), device)
    for forward, backward in ((kernel_forward, kernel_backward), (swiglu, swiglu_backward_)):
        wide, narrow = torch.empty(4, 160, device=device), torch.empty(4, 90, device=device)
        wide[:, 8:148], narrow[:, 4:74] = gate_up, dact
        act = torch.empty(4, 90, device=device)
        forward(wide[:, 8:148], act[:, 4:74])
        backward(wide[:, 8:148], narrow[:, 4:74])
        torch.testing.assert_close(act[:, 4:74], swiglu_ref(gate_up))
        torch.testing.assert_close(narrow[:, 4:74], swiglu_ref(gate_up))
        torch.testing.assert_close(wide[:, 8:148], swiglu_backward_ref(gate_up, dact))
        for beside in (wide[:, :8], wide[:, 148:], act[:, :4], act[:, 74:], narrow[:, 74:]):
            assert beside.isnan().all()


def test_large_gates_saturate(device):
    gate_up = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 2.0, 2.0, 2.0, 2.0, 2.0]], device=device)
    for forward, backward in ((kernel_forward, kernel_backward), (swiglu, swiglu_backward_)):
        act, gradient, dact = torch.empty(1, 5, device=device), gate_up.clone(), torch.ones(1, 5, device=device)
        forward(gate_up, act)
        backward(gradient, dact)
        torch.testing.assert_close(act, torch.tensor([[0.0, 0.0, 0.0, 180.0, 2e4]], device=device))
        want = torch.tensor([[0.0, 0.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 90.0, 1e4]], device=device)
        torch.testing.assert_close(gradient, want)


def test_the_plain_path_runs_in_float64():
    gate_up, dact = case((4, 30), "cpu", torch.float64)
    gate, up = gate_up.chunk(2, -1)
    want = torch.nn.functional.silu(gate) * up
    act = torch.empty_like(dact)
    swiglu(gate_up, act)
    torch.testing.assert_close(act, want, rtol=1e-14, atol=1e-14)


def test_errors_say_what_came():
    gate_up, dact = case((4, 30), "cpu")
    with pytest.raises(ValueError, match=r"act is \(4, 29\).*\[4, 30\]"):
        swiglu(gate_up, dact[:, :29])
    with pytest.raises(ValueError, match=r"dact is \(4, 30\) torch.float64"):
        swiglu_backward_(gate_up, dact.double())
    with pytest.raises(ValueError, match="contiguous rows"):
        swiglu(gate_up[:, ::2], dact[:, :15])
    with pytest.raises(ValueError, match=r"gate_up is \(4, 59\).*\[4, 58\]"):
        swiglu(gate_up[:, :59], dact[:, :29])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(1000, 1536), (515, 14336), (64, 28672), (77, 1003)], ids=str)
def test_on_the_gpu(shape, dtype, device, three_way, poison):
    gate_up, dact = case(shape, device, dtype)
    check(swiglu, swiglu_backward_, gate_up, dact, three_way)
    first, second = ((gate_up.clone(), dact.clone()) for _ in range(2))
    swiglu_backward_(*first)
    swiglu_backward_(*second)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.gpu
def test_rows_beyond_2_31_elements(device):
    n, width = 75000, 14336
    gate_up = torch.empty(n, 2 * width, dtype=torch.bfloat16, device=device)
    assert gate_up.numel() > 2**31
    gate_up[-64:], _ = case((64, width), device, torch.bfloat16)
    act = torch.empty(n, width, dtype=torch.bfloat16, device=device)
    swiglu(gate_up, act)
    torch.testing.assert_close(act[-64:], swiglu_ref(gate_up[-64:]), rtol=2**-7, atol=1e-6)


@pytest.mark.gpu
def test_other_dtypes_are_refused(device):
    gate_up, dact = case((4, 64), device, torch.float16)
    with pytest.raises(ValueError, match=r"float16; use torch.bfloat16"):
        swiglu(gate_up, dact)
