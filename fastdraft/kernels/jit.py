"""Triton's `jit`, where Triton is installed, and many kernels compiled at once.

Triton compiles each kernel when it is first launched, one after the other. With empty caches that was 26 s of a first step.
So `compile_together` first calls the step with nothing launched: every launch hands its kernel to a pool of threads, and
the step itself finds all kernels ready. What is launched stays written in one place, the step. LLVM, ptxas and the C
compiler (Triton 3.6 builds a launcher in C for every signature) run without Python's lock, on as many cores as there are.

Only this module knows whether `compile_together` is calling. Triton kernels are launched as ever. What is no Triton kernel
and adds to what a tensor holds goes through `launch`.
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
except ImportError:  # A CPU PyTorch comes without Triton. There only the paths in plain torch run.
    triton = tl = TensorDescriptor = None

_collecting = contextvars.ContextVar("collecting", default=False)

if triton:

    class _Kernel(triton.JITFunction):
        """It is launched as ever, and inside `compile_together` only compiled."""

        def __getitem__(self, grid):
            return partial(self.warmup, grid=grid) if _collecting.get() else super().__getitem__(grid)


def jit(fn=None, **options):
    """`triton.jit`, a decorator with or without options. Without Triton it gives the function back as it is."""
    if fn is None:
        return partial(jit, **options)
    if triton is None:
        return fn
    return triton.jit(fn, **options) if triton.knobs.runtime.interpret else _Kernel(fn, **options)


def launch(op: Callable[..., object], /, *args, **options) -> None:
    """Calls `op`, which is no Triton kernel and leaves its result in one of its arguments.

    Inside `compile_together` it does nothing: there no kernel has written anything, so what the tensors hold is noise,
    which must not be added to a gradient, and a kernel of CUDA C++ needs no compilation.
    """
    if not _collecting.get():
        op(*args, **options)


class _Compilers(ThreadPoolExecutor):
    def submit(self, compile_kernel: Callable, /):
        """The future of the compiled kernel, with its C launcher, in the GPU's memory."""

        def ready():
            kernel = compile_kernel()
            assert kernel.run  # The property builds the launcher and loads the kernel.
            return kernel

        return super().submit(ready)


def compile_together(run: Callable[[], object], device: torch.device) -> None:
    """Compiles all kernels that `run` would launch on `device`, a GPU, and returns when they are ready.

    `run` is called, and finds noise in whatever a kernel would have written. Raises what a compilation raises.
    """

    def collect() -> None:
        _collecting.set(True)
        with triton.AsyncCompileMode(pool):
            run()

    with _Compilers(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        # The context is a copy, so that nothing stays set after an error.
        contextvars.copy_context().run(collect)
