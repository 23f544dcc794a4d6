"""Kernels run on a GPU where there is one, else in Triton's CPU interpreter, chosen here before Triton is imported."""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("something imported triton before tests/kernels/conftest.py; run pytest with TRITON_INTERPRET=1")
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import triton
except ImportError:
    triton = None


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU where kernels run interpreted; skips where Triton is missing."""
    if triton is None:
        pytest.skip("Triton is not installed (a CPU PyTorch comes without it): kernels cannot run, even interpreted")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def csrc() -> None:
    """Skips where csrc's kernels are not built."""
    from fastdraft.kernels import cuda

    if not cuda.built():
        pytest.skip("csrc is not built: python setup.py build_ext --inplace --force, with nvcc and a PyTorch for CUDA")


@pytest.fixture
def three_way():
    """The kernel rule: max|ours - truth| <= 2 max|plain - truth| + one ulp of the dtype at max|truth| (+ a named extra)."""

    def check(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str, extra: float = 0.0) -> None:
        assert ours.shape == truth.shape and not ours.isnan().any(), f"{what}: {tuple(ours.shape)} or NaN"
        ulp = torch.finfo(ours.dtype).eps * 2.0 ** math.floor(math.log2(max(float(truth.abs().max()), 1e-30)))
        error = float((ours.double() - truth).abs().max())
        ulps = 1 if truth.numel() >= 64 else 4  # of a handful of numbers plain may be right by luck
        bound = 2 * float((plain.double() - truth).abs().max()) + ulps * ulp + extra
        assert error <= bound, f"{what}: error {error:.3e} above {bound:.3e}"

    return check


@pytest.fixture
def poison(monkeypatch):
    """torch.empty, empty_like and new_empty give NaN (the largest value for integers), so what nobody wrote is seen."""

    def filled(make):
        def fill(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(torch.nan)
            return out.fill_(True if out.dtype == torch.bool else torch.iinfo(out.dtype).max)

        return fill

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
