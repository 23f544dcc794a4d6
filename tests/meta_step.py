"""A step of the TTT engine on meta tensors: the bytes and shapes it makes at a real draft's size, without data.

The code is the engine's own. Replaced are the kernels inside (all but the products) by nothing: on the CPU they are
references that hold what the CUDA kernels do not, such as the attention's [M, Hq, N] scores.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.kernels import linear_kl, matmul, teacher
from fastdraft.kernels.teacher import PermutedHead
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.eagle3 import attention, memory, shard
from fastdraft.model.eagle3 import engine as ttt
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.draft import Draft


def flop_counter() -> FlopCounterMode:
    """torch's counter with `addmm_`, which its table lacks and weight gradients are added with."""
    addmm = lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]  # noqa: E731
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm})


class LiveBytes(TorchDispatchMode):
    """Bytes of a device's tensors alive that were made inside, their peak, and every shape made."""

    def __init__(self, inputs, device="meta"):
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.known = {id(x.untyped_storage()) for x in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == self.device:
                self._see(x)
        return out

    def _see(self, x):
        storage = x.untyped_storage()
        if id(storage) in self.known:
            return
        self.shapes.add(tuple(x.shape))
        self.known.add(id(storage))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, id(storage), storage.nbytes())

    def _forget(self, key, size):
        self.known.discard(key)
        self.live -= size


class _KernelAttention(attention.ChainAttention):
    """Takes the buffers of a GPU's, computes nothing."""

    def __init__(self, take, k0, v0, row_pos, row_start, sizes, context, d_context):
        super().__init__(take, k0, v0, row_pos, row_start, sizes, context, None)
        if d_context is not None:
            self.dq = take("dq", sizes[0])
            for name in ("dk_diag", "dv_diag"):
                setattr(self, name, take(name, len(sizes) - 1)[:, : self.k_diag.shape[1]])
        for name in ("lse", "delta"):
            take(name, self.q.shape[1])

    def forward(self, i):
        return self.out[self.steps[i]]

    def backward(self, i):
        n = self.sizes[i]
        return (self.dq[:n], None, None) if i == 0 else (self.dq[:n], self.dk_diag[i - 1, :n], self.dv_diag[i - 1, :n])

    def backward_context(self):
        pass


@contextmanager
def _kernels_replaced():
    def loss_rows(z, *_):
        return linear_kl.KLRows(
            *(torch.empty(len(z), dtype=d, device=z.device) for d in (torch.float32,) * 2 + (torch.bool,))
        )

    def permuted(head, draft_ids):
        ids = torch.empty(len(head.weight), dtype=torch.int64, device="meta")
        return PermutedHead(torch.empty_like(head.weight), None, 1.0, None, ids, len(draft_ids))

    def nothing(*_, **__):
        pass

    def product(dw, dz, x):  # counted, and takes no memory
        if dz.dtype == dw.dtype:
            torch.mm(dz.T, x, out=dw)

    def buffers(c, chunk_rows, steps, dtype, target_dtype, _device):
        return table(c, chunk_rows, steps, dtype, target_dtype, "cuda")

    table = memory.chunk_buffers
    with ExitStack() as stack:
        for owner, name, value in (
            (ttt, "ChainAttention", _KernelAttention),
            (memory, "chunk_buffers", buffers),
            (shard, "permute_head", permuted),
            *((ttt, name, nothing) for name in ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward_")),
            *((ttt, name, nothing) for name in ("chain_qkv", "chain_qkv_backward")),
            (ttt, "add_outer", product),
            (linear_kl, "add_outer", product),
            (linear_kl, "kl_rows_", loss_rows),
            (matmul, "multiply", nothing),
            *((ttt, name, nothing) for name in ("quantize_rows", "quantize_columns")),
            (teacher, "_teacher_rows_cpu", nothing),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def meta_step(
    config: DraftConfig,
    batch: Batch,
    ttt_length: int,
    chunk_rows: int | None,
    dtype: torch.dtype = torch.bfloat16,
    target_dtype: torch.dtype | None = None,
    modes: tuple = (),  # other dispatch modes to run the step under
    fp8: bool = False,
) -> LiveBytes:
    """What one engine and one step make, gradients included."""
    target_dtype = target_dtype or dtype
    with torch.device("meta"):
        draft = Draft(config).to(dtype)
        parameters = list(draft.trainable().values())  # end to end, as the optimizer has them
        flat = torch.empty(sum(p.numel() for p in parameters), dtype=dtype)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.data = part.view(p.shape)
        n, width = batch.num_tokens, config.target_hidden_size
        features = Features(torch.empty(n, 3 * width, dtype=target_dtype), torch.empty(n, width, dtype=target_dtype))
        head = TargetHead(torch.empty(config.vocab_size, width, dtype=target_dtype))
        grads = flat_gradients(draft.trainable())
        weights = torch.empty(ttt_length)
    inputs = [*draft.parameters(), *draft.buffers(), features.g, features.f, head.weight, weights]
    alive = LiveBytes([*inputs, *grads.values()])
    with ExitStack() as stack:
        stack.enter_context(_kernels_replaced())
        for mode in (alive, *modes):
            stack.enter_context(mode)
        ttt.TTTEngine(draft, head, weights, chunk_rows=chunk_rows, fp8=fp8).step(batch, features, grads)
    return alive
