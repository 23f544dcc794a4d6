"""FlatAdamW against torch.optim.AdamW, its schedule, fp32 masters under bf16, sums that do not depend on the cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastdraft.config import OptimConfig
from fastdraft.optim import FlatAdamW

SHAPES = {"matrix": (4, 3), "norm": (5,), "head": (2, 6)}


def add_grads(optimizer, grads):
    for name, grad in grads.items():
        optimizer.grads[name] += grad


def make_parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def make_grads(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 5 * torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def run(optimizer: FlatAdamW, steps: range, live: float = 3.0) -> None:
    for step in steps:
        add_grads(optimizer, make_grads(step))
        optimizer.step(torch.tensor(live, dtype=torch.float64))


def test_equals_torch_adamw():
    config = OptimConfig(lr=0.05, weight_decay=0.1, clip=0.7, warmup_ratio=0.3, min_lr_ratio=0.1)
    ours, theirs = make_parameters(), make_parameters()
    flat = FlatAdamW(ours, config, 10, torch.float32)
    groups = [
        {"params": [p for p in theirs.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    torchs = torch.optim.AdamW(groups, lr=1.0, betas=config.betas, eps=config.eps)
    for step in range(10):
        grads = make_grads(step)
        add_grads(flat, grads)
        norm = flat.step(torch.tensor(4.0, dtype=torch.float64))
        for name, p in theirs.items():
            p.grad = grads[name] / 4
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.7)
        for group in torchs.param_groups:
            group["lr"] = flat.lr(step)
        torchs.step()
        torch.testing.assert_close(norm, expected)
        for name in SHAPES:
            torch.testing.assert_close(ours[name].data, theirs[name].data, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_does_what_the_cpu_does():
    config = OptimConfig(lr=0.05, weight_decay=0.1, clip=0.7, warmup_ratio=0.3)
    mine = {name: nn.Parameter(p.data.cuda()) for name, p in make_parameters().items()}
    cpu, gpu = FlatAdamW(make_parameters(), config, 10, torch.float32), FlatAdamW(mine, config, 10, torch.float32)
    for step, live in enumerate((0.0, 3.0, 5.0, 0.0, 2.0)):
        grads = make_grads(step) if live else {}
        add_grads(cpu, grads)
        add_grads(gpu, {name: grad.cuda() for name, grad in grads.items()})
        live = torch.tensor(live, dtype=torch.float64)
        torch.testing.assert_close(gpu.step(live.cuda()).cpu(), cpu.step(live))
    for ours, theirs in zip(gpu.state_dict().values(), cpu.state_dict().values(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)


def test_schedule_counts_optimizer_steps():
    optimizer = FlatAdamW(make_parameters(), OptimConfig(lr=2.0, warmup_ratio=0.2, min_lr_ratio=0.25), 20, torch.float32)
    lrs = [optimizer.lr(step) for step in range(20)]
    assert lrs[:4] == [0.5, 1.0, 1.5, 2.0]
    assert lrs[4:] == [2 * (0.25 + 0.75 * (1 + math.cos(math.pi * k / 16)) / 2) for k in range(16)]
    assert optimizer.lr(20) == 0.5 == optimizer.lr(1000)
    run(optimizer, range(3))
    assert optimizer.step_count == 3
    for _ in range(5):  # micro-batches are not steps
        add_grads(optimizer, make_grads(0))
    assert optimizer.step_count == 3


@pytest.mark.parametrize("cut", [1, 2, 6])
def test_micro_batches_sum(cut):
    """The same six gradients, added in cuts, divided once."""
    flat = FlatAdamW(make_parameters(), OptimConfig(), 10, torch.float64)
    grads = [make_grads(k, torch.float64) for k in range(6)]
    for first in range(0, 6, cut):
        add_grads(flat, {name: sum(g[name] for g in grads[first : first + cut]) for name in SHAPES})
    flat.step(torch.tensor(7.0, dtype=torch.float64))
    whole = FlatAdamW(make_parameters(), OptimConfig(), 10, torch.float64)
    add_grads(whole, {name: sum(g[name] for g in grads) for name in SHAPES})
    whole.step(torch.tensor(7.0, dtype=torch.float64))
    torch.testing.assert_close(flat.master, whole.master, rtol=1e-12, atol=1e-12)


def test_bf16_weights_have_fp32_masters_moments_and_sums():
    parameters = {"w": nn.Parameter(torch.ones(8, 2))}
    optimizer = FlatAdamW(parameters, OptimConfig(lr=1e-4, warmup_ratio=0.0, clip=1e9), 1000, torch.bfloat16)
    assert parameters["w"].dtype == torch.bfloat16
    assert {t.dtype for t in (optimizer.master, optimizer.m, optimizer.v, optimizer.grad)} == {torch.float32}
    for _ in range(30):  # each step moves a weight of 1 by 1e-4, far below bf16's 2^-8
        add_grads(optimizer, {"w": torch.ones(8, 2, dtype=torch.bfloat16)})
        optimizer.step(torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(optimizer.master, torch.full((16,), 1 - 30e-4), rtol=0, atol=1e-5)
    assert torch.equal(parameters["w"], optimizer.master.view(8, 2).bfloat16()) and bool((parameters["w"] < 1).all())
    add_grads(optimizer, {"w": torch.full((8, 2), 256.0, dtype=torch.bfloat16)})
    add_grads(optimizer, {"w": torch.ones(8, 2, dtype=torch.bfloat16)})
    assert bool((optimizer.grad == 257).all())  # in bf16 it would stay 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_views(dtype):
    parameters = make_parameters()
    values = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = FlatAdamW(parameters, OptimConfig(), 10, dtype)
    start = optimizer.weights.untyped_storage().data_ptr()
    for name, p in parameters.items():
        assert p.untyped_storage().data_ptr() == start and torch.equal(p.data, values[name].to(dtype))


def test_a_step_without_live_rows_changes_nothing_but_the_schedule():
    """Also before the first real one, where the moments' bias correction must not count it."""
    seen = {}
    for skips in (0, 2):
        optimizer = FlatAdamW(make_parameters(), OptimConfig(warmup_ratio=0.0, min_lr_ratio=1.0), 20, torch.float32)
        before = optimizer.master.clone()
        for _ in range(skips):
            norm = optimizer.step(torch.tensor(0.0, dtype=torch.float64))
            assert float(norm) == 0 and torch.equal(optimizer.master, before)
            assert not optimizer.m.any() and not optimizer.v.any()
        run(optimizer, range(3))
        optimizer.step(torch.tensor(0.0, dtype=torch.float64))
        run(optimizer, range(3, 5))
        assert optimizer.step_count == 6 + skips and float(optimizer.updates) == 5
        seen[skips] = optimizer.master.clone()
    assert torch.equal(seen[0], seen[2])


def test_state_goes_on_bit_for_bit():
    whole = FlatAdamW(make_parameters(), OptimConfig(), 10, torch.bfloat16)
    run(whole, range(8))
    first = FlatAdamW(make_parameters(), OptimConfig(), 10, torch.bfloat16)
    run(first, range(5))
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = FlatAdamW(make_parameters(seed=9), OptimConfig(), 10, torch.bfloat16)
    second.load_state_dict(state)
    assert torch.equal(second.weights, first.weights)
    run(second, range(5, 8))
    for ours, theirs in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_of_another_draft_is_refused():
    state = FlatAdamW({"w": nn.Parameter(torch.zeros(3))}, OptimConfig(), 10, torch.float32).state_dict()
    with pytest.raises(ValueError, match="checkpoint has 3 trainable weights, this draft 29"):
        FlatAdamW(make_parameters(), OptimConfig(), 10, torch.float32).load_state_dict(state)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        FlatAdamW({}, OptimConfig(), 10, torch.float32)
