"""FlatAdamW against torch.optim.AdamW, its schedule, fp32 masters under bf16, sums that do not depend on the cut."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from meta_step import LiveBytes
from torch import nn

from fastdraft import optim
from fastdraft.config import OptimConfig
from fastdraft.optim import FlatAdamW, matrices, muon_cost, orthogonalized

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


def adamw(parameters: dict[str, nn.Parameter], dtype: torch.dtype, steps: int = 10, **settings) -> FlatAdamW:
    return FlatAdamW(parameters, OptimConfig(optimizer="adamw", **settings), steps, dtype)


def run(optimizer: FlatAdamW, steps: range, live: float = 3.0) -> None:
    for step in steps:
        add_grads(optimizer, make_grads(step))
        optimizer.step(torch.tensor(live, dtype=torch.float64))


def torch_adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """What FlatAdamW is to equal: weights of norms do not decay."""
    groups = [{"params": [p], "weight_decay": config.weight_decay * (p.ndim > 1)} for p in parameters]
    return torch.optim.AdamW(groups, lr=1.0, betas=config.betas, eps=config.eps)


def step_both(flat: FlatAdamW, torchs: torch.optim.AdamW, theirs: dict, step: int, grads: dict, **tolerance):
    """Step number `step` by both, of four tokens, behind one clipping of all gradients, whose norms are compared."""
    add_grads(flat, grads)
    norm = flat.step(torch.tensor(4.0, dtype=torch.float64))
    for name, p in theirs.items():
        p.grad = grads[name] / 4
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs.values(), 0.7), **tolerance)
    for group in torchs.param_groups:
        group["lr"] = flat.lr(step)
    torchs.step()


def test_equals_torch_adamw():
    config = OptimConfig(optimizer="adamw", lr=0.05, weight_decay=0.1, clip=0.7, warmup_ratio=0.3, min_lr_ratio=0.1)
    ours, theirs = make_parameters(), make_parameters()
    flat, torchs = FlatAdamW(ours, config, 10, torch.float32), torch_adamw(theirs.values(), config)
    for step in range(10):
        step_both(flat, torchs, theirs, step, make_grads(step))
        for name in SHAPES:
            torch.testing.assert_close(ours[name].data, theirs[name].data, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_does_what_the_cpu_does():
    config = OptimConfig(optimizer="adamw", lr=0.05, weight_decay=0.1, clip=0.7, warmup_ratio=0.3)
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
    optimizer = adamw(make_parameters(), torch.float32, 20, lr=2.0, warmup_ratio=0.2, min_lr_ratio=0.25)
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
    flat = adamw(make_parameters(), torch.float64)
    grads = [make_grads(k, torch.float64) for k in range(6)]
    for first in range(0, 6, cut):
        add_grads(flat, {name: sum(g[name] for g in grads[first : first + cut]) for name in SHAPES})
    flat.step(torch.tensor(7.0, dtype=torch.float64))
    whole = adamw(make_parameters(), torch.float64)
    add_grads(whole, {name: sum(g[name] for g in grads) for name in SHAPES})
    whole.step(torch.tensor(7.0, dtype=torch.float64))
    torch.testing.assert_close(flat.master, whole.master, rtol=1e-12, atol=1e-12)


def test_bf16_weights_have_fp32_masters_moments_and_sums():
    parameters = {"w": nn.Parameter(torch.ones(8, 2))}
    optimizer = adamw(parameters, torch.bfloat16, 1000, lr=1e-4, warmup_ratio=0.0, clip=1e9)
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
    optimizer = adamw(parameters, dtype)
    start = optimizer.weights.untyped_storage().data_ptr()
    for name, p in parameters.items():
        assert p.untyped_storage().data_ptr() == start and torch.equal(p.data, values[name].to(dtype))


def test_a_step_without_live_rows_changes_nothing_but_the_schedule():
    """Also before the first real one, where the moments' bias correction must not count it."""
    seen = {}
    for skips in (0, 2):
        optimizer = adamw(make_parameters(), torch.float32, 20, warmup_ratio=0.0, min_lr_ratio=1.0)
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
    whole = adamw(make_parameters(), torch.bfloat16)
    run(whole, range(8))
    first = adamw(make_parameters(), torch.bfloat16)
    run(first, range(5))
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = adamw(make_parameters(seed=9), torch.bfloat16)
    second.load_state_dict(state)
    assert torch.equal(second.weights, first.weights)
    run(second, range(5, 8))
    for ours, theirs in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_of_another_draft_is_refused():
    state = FlatAdamW({"w": nn.Parameter(torch.zeros(3))}, OptimConfig(optimizer="adamw"), 10, torch.float32).state_dict()
    with pytest.raises(ValueError, match="checkpoint has 3 trainable weights, this draft 29"):
        adamw(make_parameters(), torch.float32).load_state_dict(state)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        adamw({}, torch.float32)


# --- schedules -----------------------------------------------------------------------------------------------------------


def test_wsd_warms_up_stays_and_falls():
    config = OptimConfig(optimizer="adamw", lr=2.0, warmup_ratio=0.2, min_lr_ratio=0.25, schedule="wsd", wsd_decay=0.4)
    optimizer = FlatAdamW(make_parameters(), config, 20, torch.float32)
    lrs = [optimizer.lr(step) for step in range(20)]
    assert lrs[:4] == [0.5, 1.0, 1.5, 2.0] and lrs[4:12] == [2.0] * 8
    assert lrs[12:] == pytest.approx([2 * (0.25 + 0.75 * (1 - math.sqrt(k / 9))) for k in range(1, 9)])
    assert optimizer.lr(20) == 0.5 == optimizer.lr(1000)
    by_default = adamw(make_parameters(), torch.float32, 100, lr=1.0, schedule="wsd")
    assert by_default.lr(79) == 1.0 > by_default.lr(80) and by_default.lr(100) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wsd_decay": 0.1}, "wsd_decay 0.1 is of schedule: wsd, and schedule is cosine"),
        ({"schedule": "wsd", "warmup_ratio": 0.9}, "warmup_ratio 0.9 and wsd_decay 0.2 are more than all steps"),
        (
            {"optimizer": "adamw", "muon_lr": 0.1},
            "muon_lr is of optimizer: muon, and optimizer is adamw; set optimizer=muon, or take it out",
        ),
        ({"optimizer": "adamw", "muon_weights": ["fc.weight"]}, "muon_weights is of optimizer: muon"),
        ({"optimizer": "muon", "muon_momentum": 1.0}, "less than 1"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        OptimConfig(**changes)


# --- Muon ----------------------------------------------------------------------------------------------------------------

MUON = OptimConfig(
    lr=0.05,
    weight_decay=0.1,
    clip=0.7,
    warmup_ratio=0.3,
    min_lr_ratio=0.1,
    optimizer="muon",
    muon_lr=0.02,
    muon_weights=["wide", "tall", "square"],
)


def of_several(seed: int = 0) -> dict[str, nn.Parameter]:
    """Matrices wide, tall and square; norms before, between and behind them; a head, which is AdamW's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"norm": (5,), "wide": (4, 9), "tall": (11, 3), "n": (2,), "square": (6, 6), "lm_head": (7, 4), "last": (3,)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for name, shape in shapes.items()
    }


def of_step(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    size = (5.0, 0.01)[step % 2]  # clipped by turns
    return {n: size * torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in of_several().items()}


def test_muon_by_its_formula_and_adamw_for_the_rest():
    """In float64, against the formula written out matrix by matrix, and torch.optim.AdamW, beside one clipping of both."""
    ours, theirs = of_several(), of_several()
    flat = FlatAdamW(ours, MUON, 10, torch.float64)
    names = ("wide", "tall", "square")
    torchs = torch_adamw((p for name, p in theirs.items() if name not in names), MUON)
    moments = {name: torch.zeros_like(theirs[name].data) for name in names}
    for step in range(10):
        step_both(flat, torchs, theirs, step, of_step(step), rtol=1e-12, atol=0)
        for name in names:
            p, m = theirs[name], moments[name]
            m += 0.05 * (p.grad - m)
            x = 0.05 * p.grad + 0.95 * m
            x = x / x.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            rate = flat.lr(step) * 0.02 / 0.05
            p.data -= rate * (0.2 * max(p.shape) ** 0.5 * x + 0.1 * p.data)
        for name in theirs:
            torch.testing.assert_close(ours[name].data, theirs[name].data, rtol=1e-6, atol=1e-9)
    assert not flat.v[5 : 5 + 36].any() and not flat.grad.any()  # `kernels/adamw.py` alone has a v


def test_orthogonalized_brings_singular_values_near_one():
    for shape in ((40, 40), (20, 70), (70, 20)):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        found = orthogonalized(1e-3 * x)
        law = torch.linalg.svdvals(found)
        assert law.min() > 0.3 and law.max() < 1.3
        torch.testing.assert_close(u.T @ found @ vh.T, torch.diag(torch.diagonal(u.T @ found @ vh.T)), rtol=0, atol=1e-9)
    assert not orthogonalized(torch.zeros(3, 5)).any()


def test_torchs_muon_takes_the_same_steps():
    """It iterates in bf16, as we do for bf16 weights: equal up to that rounding, which five iterations enlarge."""
    config = OptimConfig(
        lr=0.005, weight_decay=0.1, clip=1e9, warmup_ratio=0.0, schedule="wsd", optimizer="muon", muon_weights=["w"]
    )  # 0.005, of which muon_lr is four times as much
    mine, theirs = ({"w": nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(2)))} for _ in range(2))
    flat = FlatAdamW(mine, config, 1000, torch.bfloat16)
    torchs = torch.optim.Muon(theirs.values(), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before = flat.master.clone()
    for step in range(8):
        grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(50 + step))
        flat.grads["w"] += grad
        theirs["w"].grad = grad
        flat.step(torch.tensor(1.0, dtype=torch.float64))
        torchs.step()
    moved, error = (theirs["w"].data.flatten() - before).norm(), (theirs["w"].data.flatten() - flat.master).norm()
    assert error < 0.01 * moved


def test_a_step_of_muon_without_live_rows_changes_nothing():
    flat = FlatAdamW(of_several(), MUON, 10, torch.float64)
    before = {name: x.clone() for name, x in flat.state_dict().items()}
    norm = flat.step(torch.tensor(0.0, dtype=torch.float64))
    assert float(norm) == 0 and flat.step_count == 1
    assert all(torch.equal(flat.state_dict()[name], x) for name, x in before.items() if name != "step_count")


def test_muon_goes_on_bit_for_bit():
    def steps(flat, numbers):
        for k in numbers:
            for name, grad in of_step(k).items():
                flat.grads[name] += grad.float()
            flat.step(torch.tensor(3.0, dtype=torch.float64))

    whole, first, second = (FlatAdamW(of_several(seed), MUON, 10, torch.bfloat16) for seed in (0, 0, 5))
    steps(whole, range(8))
    steps(first, range(5))
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    steps(second, range(5, 8))
    for ours, theirs in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(second.weights, second.master.bfloat16())


def test_what_muon_steps_is_named():
    shapes = {name: p.shape for name, p in of_several().items()}
    assert [m.name for m in matrices(shapes, MUON)] == ["wide", "tall", "square"]
    chosen = MUON.model_copy(update={"muon_weights": ["*a*e", "lm_head"]})
    assert [(m.name, m.start) for m in matrices(shapes, chosen)] == [("square", 76), ("lm_head", 112)]
    for patterns, said in (
        (
            ["wide", "norm"],
            r"names norm, which is \[5\]: Muon orthogonalises matrices, and this is none; leave it to AdamW",
        ),
        (["wide", "fc.*"], r"names 'fc\.\*', and no trained weight has that name; there are norm, wide, tall"),
        ([], "no weight is left to it"),
    ):
        with pytest.raises(ValueError, match=said):
            FlatAdamW(of_several(), MUON.model_copy(update={"muon_weights": patterns}), 10, torch.float64)


def test_the_memory_of_a_step_of_muon_is_predicted():
    """By PyTorch's own count of what is allocated while a step runs, in fp32 and bf16, wide, tall and square."""
    config = MUON.model_copy(update={"weight_decay": 0.0, "muon_weights": ["w"]})
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((64, 256), (256, 64), (128, 128)):
            flat = FlatAdamW({"w": nn.Parameter(torch.randn(shape))}, config, 10, dtype)
            weights = None if flat.weights is flat.master else flat.weights
            args = flat.grad, flat.master, flat.m, weights, torch.ones(()), torch.ones(())
            with LiveBytes([x for x in args if x is not None], device="cpu") as live:
                flat.muon.step_(*args, 0.1)
            predicted = muon_cost(matrices({"w": shape}, config), dtype.itemsize, math.prod(shape)).num_bytes
            assert predicted * 0.6 <= live.peak <= predicted * 1.01, (dtype, shape, live.peak / predicted)


class Replays:
    """A graph pool whose graphs do what was recorded; a recording itself does nothing."""

    def record(self, launch):
        return SimpleNamespace(replay=launch)


def test_a_recorded_step_reads_each_steps_numbers():
    """Factor, go and rate are new tensors at every step, and a graph knows where the first ones were."""
    flats = [FlatAdamW(of_several(), MUON, 10, torch.float64) for _ in range(2)]
    direct, recorded = (flat.muon for flat in flats)
    held = optim._Recorded((flats[1].grad, flats[1].master, flats[1].m, None), [torch.ones((), dtype=torch.float64)] * 3)
    held.replay.pool, held.replay.on_gpu = Replays(), True
    for step, (factor, go, rate) in enumerate([(0.5, 1, 0.1), (0.2, 1, 0.2), (1.0, 0, 0.3), (0.7, 1, 0.05)]):
        scalars = [torch.tensor(float(x), dtype=torch.float64) for x in (factor, go, rate)]
        for flat in flats:
            flat.grad.zero_()
            add_grads(flat, of_step(step))
        direct._launch(flats[0].grad, flats[0].master, flats[0].m, None, *scalars)
        held.run(recorded._launch, scalars)
        assert torch.equal(flats[0].master, flats[1].master) and torch.equal(flats[0].m, flats[1].m), step
        assert torch.equal(flats[0].grad, flats[1].grad), step
    assert held.replay.graph is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_muon_on_the_gpu_does_what_the_cpu_does():
    mine = {name: nn.Parameter(p.data.float().cuda()) for name, p in of_several().items()}
    cpu = FlatAdamW({n: nn.Parameter(p.data.float()) for n, p in of_several().items()}, MUON, 10, torch.float32)
    gpu = FlatAdamW(mine, MUON, 10, torch.float32)
    for step, live in enumerate((0.0, 3.0, 5.0, 0.0, 2.0)):
        grads = of_step(step) if live else {}
        add_grads(cpu, {name: grad.float() for name, grad in grads.items()})
        add_grads(gpu, {name: grad.float().cuda() for name, grad in grads.items()})
        live = torch.tensor(live, dtype=torch.float64)
        torch.testing.assert_close(gpu.step(live.cuda()).cpu(), cpu.step(live))
    for ours, theirs in zip(gpu.state_dict().values(), cpu.state_dict().values(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_step_of_muon_is_the_launched_one(dtype, monkeypatch):
    """Bit for bit, with a rate that moves, steps without live rows, weight decay, and a state loaded on the way."""
    flats = []
    for most in (0.0, optim.GRAPH_FLOPS):
        monkeypatch.setattr(optim, "GRAPH_FLOPS", most)
        flats.append(FlatAdamW({n: nn.Parameter(p.data.float().cuda()) for n, p in of_several().items()}, MUON, 10, dtype))
    launched, recorded = flats
    for step, live in enumerate((3.0, 2.0, 0.0, 5.0, 2.0, 4.0)):
        grads = {name: grad.float().cuda() for name, grad in of_step(step).items()} if live else {}
        if step == 4:
            kept = {name: x.clone() for name, x in launched.state_dict().items()}
            recorded.load_state_dict(kept)
        for flat in flats:
            add_grads(flat, grads)
        live = torch.tensor(live, dtype=torch.float64, device="cuda")
        assert torch.equal(launched.step(live), recorded.step(live))
        assert not recorded.grad.any()
    assert launched.muon.recorded is None and recorded.muon.recorded.replay.graph is not None
    for ours, theirs in zip(recorded.state_dict().values(), launched.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(recorded.weights, launched.weights)
