"""Triton's `jit`, where Triton is installed, and many kernels compiled at once.

Triton compiles a kernel when it is first launched, one after the other: 26 s of a first step with empty caches. So the
first time, a step runs once with nothing launched (`compile_together`): every launch hands its kernel to a pool of threads,
and the step itself finds them all ready. What is launched stays written in one place, the step. LLVM, ptxas and the C
compiler (Triton 3.6 builds a launcher in C for every signature) run without Python's lock, on as many cores as there are.
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a CPU PyTorch comes without Triton: there only the plain-torch paths run
    triton = tl = TensorDescriptor = None

_collecting = contextvars.ContextVar("collecting", default=False)

if triton:

    class _Kernel(triton.JITFunction):
        """Launched as ever, or inside `compile_together` only compiled."""

        def __getitem__(self, grid):
            return partial(self.warmup, grid=grid) if _collecting.get() else super().__getitem__(grid)


def jit(fn=None, **options):
    """`triton.jit`, as a decorator with or without options; without Triton the function as it is."""
    if fn is None:
        return partial(jit, **options)
    if triton is None:
        return fn
    return triton.jit(fn, **options) if triton.knobs.runtime.interpret else _Kernel(fn, **options)


def nothing_runs() -> bool:
    """Whether `compile_together` is calling: then no kernel writes anything, and what tensors hold is noise."""
    return _collecting.get()


class _Compilers(ThreadPoolExecutor):
    def submit(self, compile_kernel: Callable, /):
        """The compiled kernel, with its C launcher, in the GPU's memory."""

        def ready():
            kernel = compile_kernel()
            assert kernel.run  # asked for, it is built and loaded
            return kernel

        return super().submit(ready)


def compile_together(run: Callable[[], object], device: torch.device) -> None:
    """Compiles all kernels that `run` would launch on `device`, a GPU, and returns when they are ready.

    `run` is called, with noise in whatever a kernel would write. Raises what a compilation raises.
    """

    def collect() -> None:
        _collecting.set(True)
        with triton.AsyncCompileMode(pool):
            run()

    with _Compilers(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        contextvars.copy_context().run(collect)  # a context of its own: nothing stays set after an error
