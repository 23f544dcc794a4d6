"""Attention of a chunk of chains, step by step and back: the engine's view of `ttt_attention`.

Step i's rows are the first sizes[i] chains. Forward appends the step's diagonal K^i, V^i; backward runs the steps in
reverse, so that a diagonal's gradient is complete when its own step is reached; the gradient of K^0, V^0 comes last, from
the stacked rows of all steps at once. CUDA tensors run the kernels, CPU tensors the reference and its autograd.

# M chains, R = sum(sizes) stacked rows, N packed tokens, Hq/Hkv heads, D head dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdraft.kernels.ttt_attention import (
    _config,
    _ttt_attention_bwd_kv,
    _ttt_attention_bwd_q,
    _ttt_attention_fwd,
    ttt_attention_ref,
)


class ChainAttention:
    """Holds queries, outputs and diagonals of one chunk; `out` [R, Hq, D] is what the steps gave."""

    def __init__(
        self,
        k0: Tensor,  # [N, Hkv, D] rotated
        v0: Tensor,  # [N, Hkv, D]
        pos: Tensor,  # [M] int64, row of each chain in k0
        doc_start: Tensor,  # [M] int64
        sizes: tuple[int, ...],  # rows of each step, not growing
        num_heads: int,
        backward: bool,  # whether `backward` will be called
    ):
        self.k0, self.v0, self.pos, self.doc_start, self.sizes, self.keep = k0, v0, pos, doc_start, sizes, backward
        kv_heads, dim = k0.shape[1:]
        self.scale = dim**-0.5
        total = sum(sizes)
        self.steps = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        self.q, self.out, self.dout = (k0.new_empty(total, num_heads, dim) for _ in range(3))
        diagonal = (len(sizes) - 1, sizes[1] if len(sizes) > 1 else 0, kv_heads, dim)
        self.k_diag, self.v_diag = k0.new_empty(diagonal), k0.new_empty(diagonal)
        stats = torch.promote_types(k0.dtype, torch.float32)
        if backward:
            self.dk_diag, self.dv_diag = (torch.zeros(diagonal, dtype=stats, device=k0.device) for _ in range(2))
        self.cuda = k0.is_cuda
        if self.cuda:
            self.config = _config(self.q, k0)  # ValueError where no kernel covers the shape, dtype or GPU
            self.lse, self.delta = (k0.new_empty(num_heads, total, dtype=torch.float32) for _ in range(2))
        elif backward:
            self.graphs: list[tuple[Tensor, tuple[Tensor, ...]]] = []
            self.dk0, self.dv0 = (torch.zeros_like(x, dtype=stats) for x in (k0, v0))

    def forward(
        self,
        i: int,
        q: Tensor,  # [M_i, Hq, D] rotated
        k: Tensor | None,  # [M_i, Hkv, D] rotated; None at step 0
        v: Tensor | None,  # [M_i, Hkv, D]
    ) -> Tensor:  # [M_i, Hq, D]
        rows, n = self.steps[i], self.sizes[i]
        if i > 0:
            self.k_diag[i - 1, :n], self.v_diag[i - 1, :n] = k, v
        self.q[rows] = q
        if self.cuda:
            _ttt_attention_fwd(
                self.q[rows],
                self.k0,
                self.v0,
                self.k_diag[:i],
                self.v_diag[:i],
                self.pos[:n],
                self.doc_start[:n],
                self.scale,
                self.out[rows],
                self.lse[:, rows],
                self.config,
            )
            return self.out[rows]
        inputs = tuple(x.detach() for x in (q, self.k0, self.v0, self.k_diag[:i, :n], self.v_diag[:i, :n]))
        with torch.set_grad_enabled(self.keep):
            if self.keep:  # the diagonals are written again by later steps, so the graph gets copies
                inputs = tuple(x.clone().requires_grad_() for x in inputs)
            out = ttt_attention_ref(*inputs, self.pos[:n], self.doc_start[:n], self.scale)
        if self.keep:
            self.graphs.append((out, inputs))
        self.out[rows] = out.detach()
        return self.out[rows]

    def backward(
        self,
        i: int,
        dout: Tensor,  # [M_i, Hq, D]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # dq [M_i, Hq, D]; dk, dv [M_i, Hkv, D], None at step 0
        rows, n = self.steps[i], self.sizes[i]
        if self.cuda:
            self.dout[rows] = dout
            dq, _ = _ttt_attention_bwd_q(
                self.dout[rows],
                self.q[rows],
                self.k0,
                self.v0,
                self.k_diag[:i],
                self.v_diag[:i],
                self.pos[:n],
                self.doc_start[:n],
                self.out[rows],
                self.lse[:, rows],
                self.scale,
                self.dk_diag[:i],
                self.dv_diag[:i],
                delta=self.delta[:, rows],
                config=self.config,
            )
        else:
            out, inputs = self.graphs.pop()
            dq, dk0, dv0, dk, dv = torch.autograd.grad(out, inputs, dout, materialize_grads=True)
            self.dk0 += dk0
            self.dv0 += dv0
            self.dk_diag[:i, :n] += dk
            self.dv_diag[:i, :n] += dv
        if i == 0:
            return dq, None, None
        return dq, self.dk_diag[i - 1, :n].to(dq.dtype), self.dv_diag[i - 1, :n].to(dq.dtype)

    def backward_context(
        self,
        dk0: Tensor,  # [N, Hkv, D] float32, added to
        dv0: Tensor,  # [N, Hkv, D] float32, added to
    ) -> None:
        """Call once after the last `backward`."""
        if not self.cuda:
            dk0 += self.dk0
            dv0 += self.dv0
            return
        pos, doc_start = (torch.cat([x[:n] for n in self.sizes]) for x in (self.pos, self.doc_start))
        _ttt_attention_bwd_kv(
            self.dout,
            self.q,
            self.k0,
            self.v0,
            pos,
            doc_start,
            self.lse,
            self.delta,
            self.scale,
            dk0,
            dv0,
            config=self.config,
        )
