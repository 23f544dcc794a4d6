"""The fused optimizer step against float64 AdamW; `tests/test_optim.py` checks the formulas against torch.optim."""

from __future__ import annotations

import pytest
import torch

from fastdraft.kernels.adamw import AdamWConfig, _adamw, adamw_, adamw_config, adamw_ref, adamw_scratch

SIZES = {"one block": 64, "block + 1": 65, "ragged": 1000, "one number": 1}
SMALL = AdamWConfig(programs=4, norm_block=32, block=64, num_warps=1)
OPTIONS = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=0.5)
RANGES = [(0, 1), (30, 70), (128, 192), (700, 701)]


def case(count, device, seed=0):
    gen = torch.Generator(device).manual_seed(seed)
    grad, master, m, v = (torch.randn(count, generator=gen, device=device) for _ in range(4))
    ranges = [(a, min(b, count)) for a, b in RANGES if a < count]
    return {
        "grad": 5 * grad,
        "master": master,
        "m": m / 10,
        "v": v.square() / 10,
        "weights": torch.empty(count, dtype=torch.float32, device=device),
        "not_decayed": torch.tensor(ranges, dtype=torch.int64, device=device),
        "num_live": torch.tensor(7.0, dtype=torch.float64, device=device),
        "updates": torch.tensor(3.0, dtype=torch.float64, device=device),
    }


def copied(state, dtype=None):
    return {name: x.to(dtype) if dtype and x.is_floating_point() and x.ndim else x.clone() for name, x in state.items()}


def with_kernel(grad, master, m, v, weights, not_decayed, num_live, updates, *, lr, betas, eps, weight_decay, clip):
    """The Triton step, also on CPU tensors (interpreted)."""
    config = adamw_config() if grad.is_cuda else SMALL
    scratch = torch.empty(config.programs + 4, device=grad.device)
    options = (lr, betas, eps, weight_decay, clip)
    return _adamw(grad, master, m, v, weights, not_decayed, num_live, updates, scratch, *options, config)


def public(**state):
    return adamw_(**state, scratch=adamw_scratch(state["grad"].device))


def check(step, state, three_way, steps=3, **changes):
    """A few steps with fresh gradients: buffers, norm and counts."""
    options = OPTIONS | changes
    ours, plain, truth = copied(state), copied(state), copied(state, torch.float64)
    for k in range(steps):
        fresh = case(state["grad"].numel(), state["grad"].device, seed=k + 1)["grad"]
        for s in (ours, plain, truth):
            s["grad"] += fresh.to(s["grad"].dtype)
        norms = [run(**s, **options) for run, s in ((step, ours), (adamw_ref, plain), (adamw_ref, truth))]
        three_way(*norms, "norm")
        for name in ("master", "m", "v", "weights"):
            three_way(ours[name], plain[name], truth[name], f"{name} after step {k}")
        assert not ours["grad"].any() and float(ours["updates"]) == float(truth["updates"]) == 4 + k


@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.0}, {"clip": 1e9}], ids=["all", "no decay", "no clip"])
@pytest.mark.parametrize("count", SIZES.values(), ids=SIZES)
def test_steps(count, changes, device, three_way, poison):
    for step in (with_kernel, public):
        check(step, case(count, device), three_way, **changes)


def test_weight_decay_leaves_the_ranges_out(device):
    for step in (with_kernel, public):
        state = case(1000, device)
        for name in ("grad", "m"):
            state[name].zero_()
        before = state["master"].clone()
        step(**state, **OPTIONS)
        kept = torch.zeros(1000, dtype=torch.bool, device=device)
        for first, last in RANGES:
            kept[first:last] = True
        assert torch.equal(state["master"][kept], before[kept])
        torch.testing.assert_close(state["master"][~kept], before[~kept] * (1 - 0.02 * 0.1))


def test_the_first_step_moves_by_lr(device):
    """Bias correction from count 1: |update| = 1 whatever the gradient."""
    for step in (with_kernel, public):
        state = case(100, device)
        for name in ("m", "v", "updates"):
            state[name].zero_()
        before, sign = state["master"].clone(), state["grad"].sign()
        step(**state, **OPTIONS | {"weight_decay": 0.0, "clip": 1e9, "lr": 0.5})
        torch.testing.assert_close(state["master"], before - 0.5 * sign, rtol=0, atol=1e-5)


def test_no_live_row_changes_nothing(device):
    for step in (with_kernel, public):
        state = case(1000, device)
        state["grad"].zero_()
        state["num_live"].zero_()
        before = copied(state)
        norm = step(**state, **OPTIONS)
        assert float(norm) == 0
        for name in ("master", "m", "v", "updates"):
            assert torch.equal(state[name], before[name]), name
        assert torch.equal(state["weights"], before["master"])


def test_without_weights_of_their_own_and_no_ranges(device, three_way, poison):
    state = case(300, device) | {"weights": None, "not_decayed": torch.empty(0, 2, dtype=torch.int64, device=device)}
    ours, want = ({n: x if x is None else x.clone() for n, x in state.items()} for _ in range(2))
    with_kernel(**ours, **OPTIONS)
    adamw_ref(**want, **OPTIONS)
    torch.testing.assert_close(ours["master"], want["master"], rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_shows_in_the_norm(device):
    for value in (torch.nan, torch.inf):
        state = case(200, device)
        state["grad"][77] = value
        assert not torch.isfinite(with_kernel(**state, **OPTIONS))


def test_two_runs_are_bitwise_equal(device, poison):
    seen = []
    for _ in range(2):
        state = case(1000, device)
        seen.append((with_kernel(**state, **OPTIONS), *(state[n] for n in ("master", "m", "v", "weights"))))
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


def test_errors_say_what_came():
    state = case(100, "cpu")
    with pytest.raises(ValueError, match=r"m is \(99,\)"):
        public(**state | {"m": state["m"][:99]}, **OPTIONS)
    with pytest.raises(ValueError, match=r"v is \(100,\) torch.float64"):
        public(**state | {"v": state["v"].double()}, **OPTIONS)
    with pytest.raises(ValueError, match=r"not_decayed is \(4,\)"):
        public(**state | {"not_decayed": torch.arange(4)}, **OPTIONS)
    with pytest.raises(ValueError, match=r"updates is \(\) torch.float32.*\[\] torch.float64"):
        public(**state | {"updates": torch.tensor(1.0)}, **OPTIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [10_000_001, 100_000_000], ids=["10M", "100M"])
def test_on_the_gpu(count, device, three_way, poison):
    check(public, case(count, device), three_way, steps=2)


@pytest.mark.gpu
def test_bf16_weights_are_the_rounded_masters(device):
    state = case(1_000_003, device) | {"weights": torch.empty(1_000_003, dtype=torch.bfloat16, device=device)}
    first, second = copied(state), copied(state)
    norms = [public(**s, **OPTIONS) for s in (first, second)]
    assert torch.equal(first["weights"], first["master"].bfloat16())
    assert torch.equal(*norms)
    for name in ("master", "m", "v", "weights"):
        assert torch.equal(first[name], second[name])


@pytest.mark.gpu
def test_the_host_does_not_wait(device):
    state, scratch = case(1000, device), adamw_scratch(device)
    adamw_(**state, scratch=scratch, **OPTIONS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw_(**state, scratch=scratch, **OPTIONS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_other_dtypes_are_refused(device):
    state = copied(case(100, device), torch.float64)
    with pytest.raises(ValueError, match=r"grad is \(100,\) torch.float64.*torch.float32"):
        public(**state, **OPTIONS)
