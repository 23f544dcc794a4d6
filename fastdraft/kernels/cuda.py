"""The CUDA C++ kernels of csrc/, where they are built: setup.py does where nvcc and a GPU PyTorch are.

They are operators of one library, `torch.ops.fastdraft`, over PyTorch's stable ABI. Everything they do the Triton kernels
do too; each op's file says in one place which of the two takes what.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[1] / "_cuda.abi3.so"


@cache
def built() -> bool:
    """Whether the library is there; then it is loaded. ValueError where it is there and cannot be loaded."""
    if not LIBRARY.exists():
        return False
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise ValueError(
            f"{LIBRARY} does not load with PyTorch {torch.__version__}: {error.__cause__ or error}; build it again "
            "(python setup.py build_ext --inplace) or delete it, then Triton's kernels are used"
        ) from error
    return True


def takes(*tensors: Tensor) -> bool:
    """Whether kernels are built and these tensors are where and as they want them: a Hopper or data-centre Blackwell GPU,
    starting at a multiple of 16 bytes."""
    if not built() or torch.cuda.get_device_capability(tensors[0].device)[0] not in (9, 10):
        return False
    return all(x.data_ptr() % 16 == 0 for x in tensors)
