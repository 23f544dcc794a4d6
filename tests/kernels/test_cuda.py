"""The library of csrc's kernels: absent it is silent, broken it is an error."""

from __future__ import annotations

import pytest

from fastdraft import check
from fastdraft.kernels import cuda


def test_absence_is_silent(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_cuda.abi3.so")
    assert not cuda.built.__wrapped__()
    assert check.cuda_kernels().startswith("not built")


def test_a_broken_library_is_an_error(monkeypatch, tmp_path):
    library = tmp_path / "_cuda.abi3.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(cuda, "LIBRARY", library)
    with pytest.raises(ValueError, match=r"_cuda\.abi3\.so does not load with PyTorch .*build it again"):
        cuda.built.__wrapped__()
