"""The library of csrc's kernels: absent it is silent, broken or built from other sources it is an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

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


def test_the_hash_is_of_names_and_contents(tmp_path):
    def put(**texts: str) -> str:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        for name, text in texts.items():
            (tmp_path / f"{name}.cu").write_text(text)
        (tmp_path / "a.cu~").write_text("An editor's copy is no source.")
        return cuda.source_hash(tmp_path)

    first = put(a="1", b="2")
    assert put(b="2", a="1") == first
    assert len({first, put(a="1"), put(a="1", c="2"), put(a="12", b=""), put(a="1", b="3")}) == 5


LOADS = """
import shutil, sys
from pathlib import Path
from fastdraft.kernels import cuda

cuda.LIBRARY, without, cuda.SOURCES = map(Path, sys.argv[1:])
library, built = cuda.LIBRARY, cuda.built.__wrapped__

def refused():
    try:
        return built() and False
    except ValueError as error:
        return f"{cuda.LIBRARY} was built from other sources" in str(error) and cuda.BUILD in str(error)

cuda.LIBRARY = without  # of the time before libraries had a hash
assert refused()
cuda.LIBRARY = library
assert built() and cuda.library_sources() == cuda.source_hash(cuda.SOURCES)
with (cuda.SOURCES / "stable.h").open("a") as file:
    file.write("// changed")
assert refused()
shutil.rmtree(cuda.SOURCES)  # as where a wheel was installed
assert built()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_library_of_other_sources_is_an_error(tmp_path):
    """csrc's real file with the hash, built for the CPU; in a process of its own, whose operators nobody else sees."""
    sources = Path(shutil.copytree("csrc", tmp_path / "csrc"))
    (tmp_path / "empty.cpp").touch()
    torch_lib = Path(torch.__file__).parent / "lib"
    common = ["c++", "-shared", "-fPIC", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    common += [
        *(f"-I{path}" for path in include_paths()),
        f"-L{torch_lib}",
        f"-DFASTDRAFT_SOURCES={cuda.source_hash(sources)}",
    ]
    for name, source in (("with.so", sources / "sources.cpp"), ("without.so", tmp_path / "empty.cpp")):
        subprocess.run([*common, source, "-ltorch_cpu", "-ltorch", "-o", tmp_path / name], check=True)
    command = [sys.executable, "-c", LOADS, tmp_path / "with.so", tmp_path / "without.so", sources]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
