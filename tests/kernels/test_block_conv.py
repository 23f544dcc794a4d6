"""The grouped dynamic causal convolution and its backward against float64."""

from __future__ import annotations

import pytest
import torch

from fastdraft.kernels.block_conv import (
    BlockConvConfig,
    _block_conv,
    _block_conv_backward,
    block_conv,
    block_conv_backward,
    block_conv_backward_ref,
    block_conv_ref,
)

SMALL = BlockConvConfig(groups=2, num_warps=1)
SHAPES = {  # lengths of the blocks, groups, channels of a group, taps
    "two taps": ((5, 5, 5), 4, 16, 2),
    "a ragged tail of groups": ((5, 5), 5, 4, 2),
    "blocks that end early": ((4, 1, 2, 4, 3), 3, 8, 2),
    "three taps": ((6, 6, 2), 4, 4, 3),
    "one tap": ((3, 3), 2, 8, 1),
    "more taps than rows": ((1, 2, 1), 2, 2, 4),
    "one row": ((1,), 1, 16, 2),
    "one channel": ((4, 4), 1, 1, 2),
}


def case(shape, device, dtype=torch.float32):
    lengths, groups, group, taps = shape
    gen = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=gen, device=device).to(dtype)

    n, hidden = sum(lengths), groups * group
    slot = torch.cat([torch.arange(length) for length in lengths]).to(device)
    return normal(n, hidden), normal(n, taps, groups), normal(taps, hidden), slot, normal(n, hidden)


def by_hand(x, delta, base, slot):
    """The sum of the docstring, number by number."""
    y = torch.zeros_like(x)
    for k in range(len(x)):
        for t in range(base.shape[0]):
            if t <= slot[k]:
                wide = delta[k, t].repeat_interleave(x.shape[1] // delta.shape[2])
                y[k] = y[k] + (base[t] + wide) * x[k - t]
    return y


def truth_of(x, delta, base, slot, dy):
    wide = [t.double().requires_grad_() for t in (x, delta, base)]
    y = by_hand(*wide, slot)
    return y.detach(), torch.autograd.grad((y * dy.double()).sum(), wide, materialize_grads=True)


def small_forward(x, delta, base, slot, y):
    _block_conv(x, delta, base, slot, y, SMALL)


def small_backward(*args):
    _block_conv_backward(*args, SMALL)


def check(forward, backward, tensors, three_way, partials=3):
    x, delta, base, slot, dy = tensors
    truth, gradients = truth_of(*tensors)
    y = torch.empty_like(x)
    forward(x, delta, base, slot, y)
    three_way(y, block_conv_ref(x, delta, base, slot), truth, "y")
    stats = torch.promote_types(x.dtype, torch.float32)
    dx, ddelta = torch.empty_like(x), torch.empty_like(delta)
    dbase = torch.ones(base.shape, dtype=stats, device=x.device)
    partial = torch.empty(partials, *base.shape, dtype=stats, device=x.device)
    backward(dy, x, delta, base, slot, dx, ddelta, dbase, partial)
    plain = block_conv_backward_ref(dy, x, delta, base, slot)
    for name, ours, other, law in zip(("dx", "ddelta", "dbase"), (dx, ddelta, dbase - 1), plain, gradients, strict=True):
        # dbase is added to ones, which costs it a rounding at that size.
        three_way(ours, other.to(ours.dtype), law, name, extra=2**-20 if name == "dbase" else 0.0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(shape, device, three_way, poison):
    tensors = case(shape, device)
    for forward, backward in ((small_forward, small_backward), (block_conv, block_conv_backward)):
        check(forward, backward, tensors, three_way)


def test_strided_rows(device, three_way, poison):
    """Both sides' numbers lie in one row, as one product gives them, and the states may be columns of something wider."""
    x, delta, base, slot, dy = case(SHAPES["two taps"], device)
    n, hidden = x.shape
    for forward, backward in ((small_forward, small_backward), (block_conv, block_conv_backward)):
        wide, both = torch.empty(n, hidden + 24, device=device), torch.empty(n, 2, *delta.shape[1:], device=device)
        dwide, dboth = torch.empty_like(wide), torch.empty_like(both)
        wide[:, 8 : 8 + hidden], both[:, 1] = x, delta
        inner, y = wide[:, 8 : 8 + hidden], torch.empty_like(wide)
        forward(inner, both[:, 1], base, slot, y[:, 8 : 8 + hidden])
        torch.testing.assert_close(y[:, 8 : 8 + hidden], block_conv_ref(x, delta, base, slot))
        dbase, partial = torch.zeros_like(base), torch.empty(2, *base.shape, device=device)
        backward(dy, inner, both[:, 1], base, slot, dwide[:, 8 : 8 + hidden], dboth[:, 1], dbase, partial)
        dx, ddelta, want = block_conv_backward_ref(dy, x, delta, base, slot)
        torch.testing.assert_close(dwide[:, 8 : 8 + hidden], dx)
        torch.testing.assert_close(dboth[:, 1], ddelta)
        torch.testing.assert_close(dbase, want)
        for beside in (y[:, :8], y[:, 8 + hidden :], dwide[:, :8], dwide[:, 8 + hidden :], dboth[:, 0]):
            assert beside.isnan().all()


def test_the_first_tap_alone_is_the_identity(device):
    x, delta, base, slot, _ = case(SHAPES["blocks that end early"], device)
    base = torch.zeros_like(base)
    base[0] = 1
    y = torch.empty_like(x)
    for forward in (small_forward, block_conv):
        forward(x, torch.zeros_like(delta), base, slot, y)
        assert torch.equal(x, y)


def test_a_block_sees_no_other(device):
    """Another block's rows, NaN even, change nothing, forward and backward."""
    lengths, groups, group, taps = SHAPES["three taps"]
    x, delta, base, slot, dy = case((lengths, groups, group, taps), device)
    rows = slice(lengths[0], lengths[0] + lengths[1])
    outputs = []
    for clean in (True, False):
        ours = [t.clone() for t in (x, delta, dy)]
        if not clean:
            for t in ours:
                t[: rows.start], t[rows.stop :] = torch.nan, torch.nan
        for forward, backward in ((small_forward, small_backward), (block_conv, block_conv_backward)):
            y, dx, ddelta = torch.empty_like(x), torch.empty_like(x), torch.empty_like(delta)
            forward(ours[0], ours[1], base, slot, y)
            partial = torch.empty(2, *base.shape, device=device)
            backward(ours[2], ours[0], ours[1], base, slot, dx, ddelta, torch.zeros_like(base), partial)
            outputs.append([t[rows] for t in (y, dx, ddelta)])
    for k in range(2):
        for clean, beside in zip(outputs[k], outputs[2 + k], strict=True):
            assert torch.equal(clean, beside)


def test_the_plain_path_runs_in_float64():
    tensors = case(SHAPES["three taps"], "cpu", torch.float64)
    x, delta, base, slot, dy = tensors
    truth, gradients = truth_of(*tensors)
    y, dx, ddelta, dbase = torch.empty_like(x), torch.empty_like(x), torch.empty_like(delta), torch.zeros_like(base)
    block_conv(x, delta, base, slot, y)
    block_conv_backward(dy, x, delta, base, slot, dx, ddelta, dbase, base.new_empty(0))
    for ours, law in zip((y, dx, ddelta, dbase), (truth, *gradients), strict=True):
        torch.testing.assert_close(ours, law, rtol=1e-13, atol=1e-13)


def test_no_rows_are_no_work(device):
    x, delta, base, slot, dy = (t[:0] if k != 2 else t for k, t in enumerate(case(SHAPES["two taps"], device)))
    dbase = torch.zeros_like(base)
    block_conv(x, delta, base, slot, torch.empty_like(x))
    partial = torch.empty(1, *base.shape, device=device)
    block_conv_backward(dy, x, delta, base, slot, torch.empty_like(x), torch.empty_like(delta), dbase, partial)
    assert not dbase.any()


def test_errors_say_what_came():
    x, delta, base, slot, dy = case(SHAPES["two taps"], "cpu")
    y = torch.empty_like(x)
    with pytest.raises(ValueError, match=r"base is \(2, 63\).*\[2, 64\]"):
        block_conv(x, delta, base[:, :63].contiguous(), slot, y)
    with pytest.raises(ValueError, match=r"slot is \(15,\) torch.int32"):
        block_conv(x, delta, base, slot.int(), y)
    with pytest.raises(ValueError, match="delta has 3 groups for 64 channels"):
        block_conv(x, delta[:, :, :3].contiguous(), base, slot, y)
    with pytest.raises(ValueError, match=r"dbase is \(2, 64\) torch.float64"):
        block_conv_backward(dy, x, delta, base, slot, y, delta.clone(), base.double(), base)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("hidden, taps", [(4096, 2), (2880, 2), (576, 3)], ids=str)
def test_on_the_gpu(hidden, taps, dtype, device, three_way, poison):
    tensors = case(((16,) * 20 + (7, 1, 16), hidden // 16, 16, taps), device, dtype)
    check(block_conv, block_conv_backward, tensors, three_way, partials=256)
    x, delta, base, slot, dy = tensors
    twice = []
    for _ in range(2):
        dbase, dx, ddelta = torch.zeros(base.shape, device=device), torch.empty_like(x), torch.empty_like(delta)
        partial = torch.empty(256, *base.shape, device=device)
        block_conv_backward(dy, x, delta, base, slot, dx, ddelta, dbase, partial)
        twice.append((dx, ddelta, dbase))
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


@pytest.mark.gpu
def test_other_groups_and_dtypes_are_refused_on_the_gpu(device):
    x, delta, base, slot, _ = case(((4,), 4, 12, 2), device)
    with pytest.raises(ValueError, match="groups of a power of two of channels, these have 12"):
        block_conv(x, delta, base, slot, torch.empty_like(x))
    half = [t.half() for t in (x, delta, base)]
    with pytest.raises(ValueError, match=r"float16; use torch.bfloat16"):
        block_conv(*half, slot, torch.empty_like(half[0]))
