"""Attention of a chunk of chains, step by step and back: the engine's view of `ttt_attention`.

Step i's rows are the first sizes[i] chains, one slice of the stack. The caller writes their rotated q, and at i >= 1 their
own k, v, where `place` says, then runs `forward`; writes the output's gradient into `dout` and runs `backward`, steps in
reverse, so that a diagonal's gradient is complete when its own step is reached. The gradient of K^0, V^0 comes last, from
the stacked rows of all steps at once. CUDA tensors run the kernels, CPU tensors the reference and its autograd. Where
`dense_attention` covers the keys that all rows see, it goes before the kernels, which then see the keys after them alone.

# M chains, M1 of them with a step 1, R = sum(sizes) stacked rows, N packed tokens, Hq/Hkv heads, D head dim, T steps
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdraft.kernels.dense_attention import (
    Take,
    dense_attention_bwd,
    dense_attention_covers,
    dense_attention_fwd,
    dense_buffers,
    dense_steps,
)
from fastdraft.kernels.ttt_attention import (
    _config,
    _ttt_attention_bwd_kv,
    _ttt_attention_bwd_q,
    _ttt_attention_fwd,
    ttt_attention_ref,
)


def attention_buffers(
    heads: int, kv_heads: int, dim: int, chunk_rows: int, steps: int, dtype: torch.dtype, device: str
) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:  # by name: rows, shape of a row, dtype
    """What `ChainAttention` takes for up to `chunk_rows` chains."""
    rows, stats = steps * chunk_rows, torch.promote_types(dtype, torch.float32)
    diagonal = (steps - 1, (chunk_rows, kv_heads, dim))
    table = {name: (rows, (heads, dim), dtype) for name in ("q", "out", "dout")}
    table |= {"dq": (chunk_rows, (heads, dim), dtype)}
    table |= {"k_diag": (*diagonal, dtype), "v_diag": (*diagonal, dtype)}
    table |= {"dk_diag": (*diagonal, stats), "dv_diag": (*diagonal, stats)}
    if device != "cpu":
        table |= {"lse": (heads, (rows,), torch.float32), "delta": (heads, (rows,), torch.float32)}
    if dense_attention_covers(dim, dtype, device):
        table |= dense_buffers(heads, kv_heads, dim, chunk_rows, dtype)
    return table


class ChainAttention:
    """The attention of one chunk; `out` [R, Hq, D] is what the steps gave."""

    def __init__(
        self,
        take: Take,
        k0: Tensor,  # [N, Hkv, D] rotated
        v0: Tensor,  # [N, Hkv, D]
        row_pos: Tensor,  # [R] int64, row in k0
        row_start: Tensor,  # [R] int64
        sizes: tuple[int, ...],  # rows of each step, not growing
        context: tuple[int, int] | None,  # of the chunk: keys [doc_start, first) that all its rows see
        d_context: tuple[Tensor, Tensor] | None,  # gradients of k0, v0 [N, Hkv, D] float32, added to; None: no `backward`
    ):
        backward = d_context is not None
        self.take, self.k0, self.v0, self.row_pos, self.keep, self.d_context = take, k0, v0, row_pos, backward, d_context
        self.scale, total, longest = k0.shape[2] ** -0.5, len(row_pos), sizes[1] if len(sizes) > 1 else 0
        self.sizes, self.steps = sizes, [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        self.q, self.out, self.dout = (take(name, total) for name in ("q", "out", "dout"))
        self.k_diag, self.v_diag = (take(name, len(sizes) - 1)[:, :longest] for name in ("k_diag", "v_diag"))
        if backward:
            self.dq = take("dq", sizes[0])
            diagonals = (take(name, len(sizes) - 1)[:, :longest] for name in ("dk_diag", "dv_diag"))
            self.dk_diag, self.dv_diag = (x.zero_() for x in diagonals)
        if k0.is_cuda:
            self.config = _config(self.q, k0)
            heads = self.q.shape[1]
            self.lse, self.delta = (take(name, heads)[:, :total] for name in ("lse", "delta"))
            covered = dense_attention_covers(k0.shape[2], k0.dtype, "cuda")
            self.dense_steps = dense_steps(context, sizes) if covered else 0
            if self.dense_steps:
                self.context, row_start = slice(*context), row_start.clone()
                row_start[: sum(sizes[: self.dense_steps])] = context[1]
        elif backward:
            self.graphs: list[tuple[Tensor, tuple[Tensor, ...]]] = []
            stats = torch.promote_types(k0.dtype, torch.float32)
            self.dk0, self.dv0 = (torch.zeros_like(x, dtype=stats) for x in (k0, v0))
        self.row_start = row_start

    def place(self, i: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Where step i's q [M_i, Hq, D], k, v [M_i, Hkv, D] go. At step 0 its rows read K^0, V^0 alone."""
        n = self.sizes[i]
        if i == 0:
            return self.q[self.steps[0]], None, None
        return self.q[self.steps[i]], self.k_diag[i - 1, :n], self.v_diag[i - 1, :n]

    def forward(self, i: int) -> Tensor:  # [M_i, Hq, D]
        rows, n = self.steps[i], self.sizes[i]
        if self.k0.is_cuda:
            out, lse, dense = self.out[rows], self.lse[:, rows], i < self.dense_steps
            if dense:
                dense_attention_fwd(self.q[rows], self.k0[self.context], self.v0[self.context], self.scale, out, lse)
            _ttt_attention_fwd(
                self.q[rows],
                self.k0,
                self.v0,
                self.k_diag[:i],
                self.v_diag[:i],
                self.row_pos[rows],
                self.row_start[rows],
                self.scale,
                out,
                lse,
                self.config,
                started=dense,
            )
            return out
        inputs = tuple(x.detach() for x in (self.q[rows], self.k0, self.v0, self.k_diag[:i, :n], self.v_diag[:i, :n]))
        with torch.set_grad_enabled(self.keep):
            if self.keep:  # the diagonals are written again by later steps, so the graph gets copies
                inputs = tuple(x.clone().requires_grad_() for x in inputs)
            out = ttt_attention_ref(*inputs, self.row_pos[rows], self.row_start[rows], self.scale)
        if self.keep:
            self.graphs.append((out, inputs))
        self.out[rows] = out.detach()
        return self.out[rows]

    def backward(self, i: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """dq [M_i, Hq, D], and from step 1 on dk, dv [M_i, Hkv, D] float32: valid until the next call."""
        rows, n = self.steps[i], self.sizes[i]
        if self.k0.is_cuda:
            dout, q, out, lse = self.dout[rows], self.q[rows], self.out[rows], self.lse[:, rows]
            dq_start = None
            if i < self.dense_steps:
                k0, v0, *d_context = (x[self.context] for x in (self.k0, self.v0, *self.d_context))
                dq_start = dense_attention_bwd(dout, q, k0, v0, out, lse, self.scale, *d_context, self.take)
            _ttt_attention_bwd_q(
                dout,
                q,
                self.k0,
                self.v0,
                self.k_diag[:i],
                self.v_diag[:i],
                self.row_pos[rows],
                self.row_start[rows],
                out,
                lse,
                self.scale,
                self.dk_diag[:i],
                self.dv_diag[:i],
                self.dq[:n],
                self.delta[:, rows],
                self.config,
                dq_start,
            )
        else:
            out, inputs = self.graphs.pop()
            dq, dk0, dv0, dk, dv = torch.autograd.grad(out, inputs, self.dout[rows], materialize_grads=True)
            self.dq[:n] = dq
            self.dk0 += dk0
            self.dv0 += dv0
            self.dk_diag[:i, :n] += dk
            self.dv_diag[:i, :n] += dv
        if i == 0:
            return self.dq[:n], None, None
        return self.dq[:n], self.dk_diag[i - 1, :n], self.dv_diag[i - 1, :n]

    def backward_context(self) -> None:
        """The rest of the gradient of K^0, V^0. Call once after the last `backward`."""
        dk0, dv0 = self.d_context
        if not self.k0.is_cuda:
            dk0 += self.dk0
            dv0 += self.dv0
            return
        _ttt_attention_bwd_kv(
            self.dout,
            self.q,
            self.k0,
            self.v0,
            self.row_pos,
            self.row_start,
            self.lse,
            self.delta,
            self.scale,
            dk0,
            dv0,
            config=self.config,
        )
