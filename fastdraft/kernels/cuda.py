"""The CUDA C++ kernels of csrc/, where they are built: setup.py does where nvcc and a GPU PyTorch are.

They are operators of one library, `torch.ops.fastdraft`, over PyTorch's stable ABI. The Triton kernels can do everything
that they do, and each op's file says in one place which of the two takes what. The library holds a hash of the sources it
was built from. In a checkout the sources lie beside the package, and there a library of other sources is refused, because
nothing else would tell that what runs is not what csrc/ says.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[1] / "_cuda.abi3.so"
SOURCES = Path(__file__).parents[2] / "csrc"
BUILD = "python setup.py build_ext --inplace --force"  # Without --force setuptools goes by dates, which a copy may keep.


@cache
def built() -> bool:
    """Whether the library is there, and loads it. Raises ValueError where it does not load or is of other sources."""
    if not LIBRARY.exists():
        return False
    again = f"build it again ({BUILD}) or delete it, then Triton's kernels are used"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise ValueError(
            f"{LIBRARY} does not load with PyTorch {torch.__version__}: {error.__cause__ or error}; {again}"
        ) from error
    if (SOURCES / "stable.h").exists() and library_sources() != source_hash(SOURCES):
        raise ValueError(f"{LIBRARY} was built from other sources than those in {SOURCES}; {again}")
    return True


def library_sources() -> str | None:
    """The hash of the sources that the loaded library was built from, or None for a library without one."""
    try:
        return torch.ops.fastdraft.sources()
    except AttributeError:
        return None


def source_hash(folder: Path) -> str:
    """Sixteen hexadecimal digits over names and contents of the sources in `folder`. setup.py gives them to the library."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".cu", ".cpp", ".h")):
        text = path.read_bytes()
        digest.update(f"{path.name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels are built and take these tensors, which must start at a multiple of 16 bytes and lie on a Hopper
    or data-centre Blackwell GPU."""
    if not built() or torch.cuda.get_device_capability(tensors[0].device)[0] not in (9, 10):
        return False
    return all(x.data_ptr() % 16 == 0 for x in tensors)
