"""Adds the CUDA C++ kernels of csrc/ to the package where nvcc and a PyTorch for CUDA are; all else is in pyproject.toml.

pip builds in an environment without PyTorch unless told not to: `pip install --no-build-isolation -e .`, or, in place,
`python setup.py build_ext --inplace`. Both take the setuptools that is installed, 77 or newer, which a fresh environment of
Python 3.11 does not have. Built is for Hopper, newer GPUs compile from its PTX; TORCH_CUDA_ARCH_LIST changes nothing. The
library is told the hash of csrc's files, which `fastdraft/kernels/cuda.py` compares when it loads it.
"""

import runpy
import shutil
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension
except ImportError:
    torch = CUDA_HOME = None

options = {}
if CUDA_HOME and torch.version.cuda and shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")):
    # By its path, because a build need not see the package.
    sources = runpy.run_path("fastdraft/kernels/cuda.py")["source_hash"](Path("csrc"))
    # USE_CUDA: the part of the stable ABI that is about streams. 2.11: the oldest PyTorch the built library loads with.
    flags = ["-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DFASTDRAFT_SOURCES={sources}"]
    hopper = ["-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_90,code=compute_90"]
    kernels = CUDAExtension(
        "fastdraft._cuda",
        sorted(str(path) for pattern in ("*.cu", "*.cpp") for path in Path("csrc").glob(pattern)),
        depends=["csrc/stable.h"],
        extra_compile_args={"cxx": flags, "nvcc": [*flags, *hopper]},
        py_limited_api=True,
    )
    options = {
        "ext_modules": [kernels],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }
setup(**options)
