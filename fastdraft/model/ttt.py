"""The TTT engine: EAGLE-3's training step with explicit forward and backward, exact, in memory that T and S do not set.

Computes what `ttt_ref_step` computes (the specification) by four facts (docs/mathematics.md):

1 Once K^0, V^0 of the whole pack exist, a position's chain depends on no other: steps 0..T-1, all losses and the backward
  run for `chunk_rows` chains at a time. Per token g, f, h^0, the embedding's share of QKV, K^0, V^0 and gradients are kept.
2 Row (t, i) is computed only while some step j >= i at t is trained on, its head only if (t, i) itself is. Chains of a
  chunk are sorted by depth, deepest first, so step i's rows are a prefix of step i-1's and everything is a slice.
3 The embedding's half of QKV depends on the token alone: computed once for the pack, step i reads its row t+1+i, and its
  gradient is collected once.
4 A chunk's weight gradients are one product per weight over the rows of all steps, added in float32.

Which rows are needed follows from the loss mask, so it is planned on the host; whether the target's choice is a
draft-vocabulary token is known on the device only and becomes a zero weight.

# N packed tokens, M chains of a chunk (M_i at step i, R = sum M_i), K head rows, H hidden, Hq/Hkv heads, D head dim
# T TTT steps, Vd draft vocabulary, W = (Hq + 2 Hkv) * D
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdraft.batch import Batch, Features, Rows, TargetHead
from fastdraft.kernels.chain_attention import ChainAttention
from fastdraft.kernels.linear_kl import linear_kl_grad
from fastdraft.kernels.matmul import add_outer
from fastdraft.kernels.teacher import PermutedHead, permute_head, teacher
from fastdraft.model.draft import Draft, rms_norm
from fastdraft.model.losses import LossKind
from fastdraft.model.rope import rotate

CHUNK_ROWS = 4096


# --- which rows a batch needs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Chains to run together, deepest first. A row of a step is an index into `pos`; head rows index the stacked steps."""

    pos: Tensor  # [M] int64, token row of each chain
    sizes: tuple[int, ...]  # M_i, rows of step i
    head_row: Tensor  # [K] int64, stacked row whose logits are trained on
    head_step: Tensor  # [K] int64, its step
    head_pos: Tensor  # [K] int64, its token row
    teacher_pos: Tensor  # [m] int64, token rows whose target distribution is needed
    teacher_row: Tensor  # [K] int64, index into teacher_pos

    def to(self, device: torch.device) -> Chunk:
        moved = {name: x.to(device, non_blocking=True) for name, x in vars(self).items() if torch.is_tensor(x)}
        return Chunk(sizes=self.sizes, **moved)


def plan_chunks(batch: Batch, ttt_length: int, chunk_rows: int) -> list[Chunk]:
    """The chains of a batch on the host, `chunk_rows` at a time. Empty when nothing is trained on."""
    end, row = batch.doc_end, torch.arange(batch.num_tokens)
    wanted = torch.zeros(ttt_length, batch.num_tokens, dtype=torch.bool)  # (i, t) is trained on, as far as the mask says
    depth = torch.zeros(batch.num_tokens, dtype=torch.int64)  # steps the chain must run
    for i in range(ttt_length):
        label = row + 2 + i
        wanted[i] = (label < end) & batch.loss_mask[label.clamp_max(batch.num_tokens - 1)]
        depth[wanted[i]] = i + 1
    chunks = []
    trained = depth.nonzero()[:, 0]
    for pos in trained.split(chunk_rows) if len(trained) else ():
        pos = pos[depth[pos].argsort(descending=True, stable=True)]
        sizes = tuple(int((depth[pos] > i).sum()) for i in range(ttt_length))
        sizes = tuple(m for m in sizes if m)
        rows = [wanted[i, pos[:m]].nonzero()[:, 0] for i, m in enumerate(sizes)]
        steps = torch.cat([torch.full_like(r, i) for i, r in enumerate(rows)])
        head_pos = torch.cat([pos[r] for r in rows])
        teacher_pos, teacher_row = torch.unique(head_pos + 1 + steps, return_inverse=True)
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        head_row = torch.cat([r + offset for r, offset in zip(rows, offsets, strict=True)])
        chunks.append(Chunk(pos, sizes, head_row, steps, head_pos, teacher_pos, teacher_row))
    return chunks


# --- the layer's parts, forward and backward -----------------------------------------------------------------------------


def rms_norm_backward(
    dy: Tensor,  # [n, H]
    x: Tensor,  # [n, H]
    r: Tensor,  # [n, 1] of the forward
    weight: Tensor,  # [H]
    dweight: Tensor,  # [H] added to
) -> Tensor:  # dx [n, H]
    normed, dy = x.to(r.dtype) * r, dy.to(r.dtype)
    dweight += (dy * normed).sum(0)
    dy = dy * weight.to(r.dtype)
    return (r * (dy - normed * (dy * normed).mean(-1, keepdim=True))).to(x.dtype)


def swiglu_backward(
    dact: Tensor,  # [n, I]
    gate: Tensor,  # [n, I]
    up: Tensor,  # [n, I]
) -> Tensor:  # [n, 2*I] gradients of gate | up
    work = torch.promote_types(gate.dtype, torch.float32)
    g, dact = gate.to(work), dact.to(work)
    s = g.sigmoid()
    return torch.cat([dact * up.to(work) * s * (1 + g * (1 - s)), dact * g * s], -1).to(gate.dtype)


class TTTEngine:
    """Runs TTT steps of a draft against a target's head. Build it after the draft's vocabulary map is set."""

    def __init__(
        self,
        draft: Draft,
        head: TargetHead,
        step_weights: Tensor,  # [T] weight of each step's loss
        kind: LossKind = "kl",
        lk_scale: float = 1.0,
        lk_decay: float = 1.0,
        chunk_rows: int = CHUNK_ROWS,
    ):
        if not 1 <= len(step_weights) <= 12:
            raise ValueError(f"ttt_length {len(step_weights)} is not in 1..12")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows is {chunk_rows}; at least 1 is needed")
        self.draft, self.config = draft, draft.config
        self.head: PermutedHead = permute_head(head, draft.draft_ids)
        self.step_weights, self.loss, self.chunk_rows = step_weights, (kind, lk_scale, lk_decay), chunk_rows

    def step(self, batch: Batch, features: Features, grads: dict[str, Tensor]) -> Rows:
        """Rows of a batch, and d(sum_i step_weights[i] * sum_t loss)/dw added to `grads` (float32, by parameter name).

        `batch` lies on the host, `features` on the draft's device. Raises ValueError for token ids outside the vocabulary.
        """
        return _Step(self, batch, features, grads).run()

    def rows(self, batch: Batch, features: Features) -> Rows:
        """The same rows without any gradient."""
        return _Step(self, batch, features, None).run()


class _Step:
    """One batch through the engine: `run`, read from top to bottom."""

    def __init__(self, engine: TTTEngine, batch: Batch, features: Features, grads: dict[str, Tensor] | None):
        self.engine, self.c, self.features, self.grads = engine, engine.config, features, grads
        ids = batch.input_ids
        if int(ids.min()) < 0 or int(ids.max()) >= self.c.vocab_size:
            raise ValueError(
                f"token ids {int(ids.min())}..{int(ids.max())} do not fit the draft's vocabulary of {self.c.vocab_size}"
            )
        device = engine.draft.fc.weight.device
        self.chunks = [c.to(device) for c in plan_chunks(batch, len(engine.step_weights), engine.chunk_rows)]
        self.batch = batch.to(device)
        self.w = {name: p.detach() for name, p in engine.draft.named_parameters()}
        attn = [self.w[f"midlayer.self_attn.{x}_proj.weight"] for x in "qkv"]
        h = self.c.hidden_size
        self.w_e = torch.cat([w[:, :h] for w in attn])  # [W, H] reads the embedding
        self.w_h = torch.cat([w[:, h:] for w in attn])  # [W, H] reads the hidden state
        self.w_gu = torch.cat([self.w["midlayer.mlp.gate_proj.weight"], self.w["midlayer.mlp.up_proj.weight"]])
        if grads is not None:
            stats = grads["fc.weight"].dtype
            self.dw_e, self.dw_h = (torch.zeros_like(w, dtype=stats) for w in (self.w_e, self.w_h))
            self.dw_gu = torch.zeros_like(self.w_gu, dtype=stats)

    @torch.no_grad()
    def run(self) -> Rows:
        t, n = len(self.engine.step_weights), self.batch.num_tokens
        stats = torch.promote_types(self.w["fc.weight"].dtype, torch.float32)
        device = self.batch.input_ids.device
        self.loss, self.acceptance = (torch.zeros(t * n, dtype=stats, device=device) for _ in range(2))
        self.hit, self.live, self.masked_in = (torch.zeros(t * n, dtype=torch.bool, device=device) for _ in range(3))
        if self.chunks:
            self.forward_pack()
            for chunk in self.chunks:
                self.run_chunk(chunk)
            if self.grads is not None:
                self.backward_pack()
        return Rows(*(x.view(t, n) for x in (self.loss, self.acceptance, self.hit, self.live, self.masked_in)))

    # --- step 0 of the whole pack: what every chain reads ------------------------------------------------------------

    def forward_pack(self) -> None:
        c, w, eps = self.c, self.w, self.c.rms_norm_eps
        dtype = w["fc.weight"].dtype
        g = self.features.g.to(dtype)
        if c.fc_norm:
            parts = [rms_norm(x, w[f"fc_norm.{j}.weight"], eps) for j, x in enumerate(g.chunk(3, -1))]
            self.g, self.g_in, self.g_r = torch.cat([y for y, _ in parts], -1), g, [r for _, r in parts]
        else:
            self.g = g
        self.h0 = self.g @ w["fc.weight"].T  # [N, H]
        hn, _ = rms_norm(self.h0, w["midlayer.hidden_norm.weight"], eps)
        self.e = w["embed_tokens.weight"][self.batch.input_ids].to(dtype)
        self.e_normed, self.e_r = rms_norm(self.e, w["midlayer.input_layernorm.weight"], eps)
        self.e_qkv = self.e_normed @ self.w_e.T  # [N, W]
        self.last = self.batch.doc_end - 1
        q_width = c.num_attention_heads * c.head_dim
        next_token = torch.minimum(torch.arange(len(g), device=g.device) + 1, self.last)
        kv = hn @ self.w_h[q_width:].T + self.e_qkv[next_token, q_width:]
        k, v = kv.unflatten(-1, (2, c.num_key_value_heads, c.head_dim)).unbind(1)
        self.k0, self.v0 = rotate(k, *self.rope(self.batch.positions)).contiguous(), v.contiguous()
        if self.grads is not None:
            stats = self.dw_h.dtype
            self.dh0, self.de_qkv = torch.zeros_like(self.h0, dtype=stats), torch.zeros_like(self.e_qkv, dtype=stats)
            self.dq0 = self.h0.new_zeros(len(g), q_width)
            self.dk0, self.dv0 = (torch.zeros_like(x, dtype=stats) for x in (self.k0, self.v0))

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.engine.draft.rope(positions, self.h0.dtype)

    # --- a chunk of chains: steps 0..T-1, the head, and the backward ---------------------------------------------------

    def run_chunk(self, chunk: Chunk) -> None:
        c, w, eps = self.c, self.w, self.c.rms_norm_eps
        sizes, m, total = chunk.sizes, len(chunk.pos), sum(chunk.sizes)
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        steps = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        new = self.h0.new_empty
        h_in, hn, h_mid, n2, y = (new(total, c.hidden_size) for _ in range(5))
        gate_up, act = new(total, 2 * c.intermediate_size), new(total, c.intermediate_size)
        r_hn, r_n2 = (new(total, 1, dtype=self.loss.dtype) for _ in range(2))
        attention = ChainAttention(
            self.k0, self.v0, chunk.pos, self.batch.doc_start[chunk.pos], sizes, heads, self.grads is not None
        )
        position = self.batch.positions[chunk.pos]

        for i, rows in enumerate(steps):
            n = sizes[i]
            h_in[rows] = self.h0[chunk.pos] if i == 0 else y[steps[i - 1]][:n]
            hn[rows], r_hn[rows] = rms_norm(h_in[rows], w["midlayer.hidden_norm.weight"], eps)
            token = torch.minimum(chunk.pos[:n] + 1 + i, self.last[chunk.pos[:n]])
            cos_sin = self.rope(position[:n] + i)
            if i == 0:
                q = hn[rows] @ self.w_h[: heads * dim].T + self.e_qkv[token, : heads * dim]
                q, k, v = rotate(q.unflatten(-1, (heads, dim)), *cos_sin), None, None
            else:
                qkv = (hn[rows] @ self.w_h.T + self.e_qkv[token]).unflatten(-1, (-1, dim))
                q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
                q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
            out = attention.forward(i, q, k, v)
            h_mid[rows] = h_in[rows] + out.flatten(1) @ w["midlayer.self_attn.o_proj.weight"].T
            n2[rows], r_n2[rows] = rms_norm(h_mid[rows], w["midlayer.post_attention_layernorm.weight"], eps)
            torch.mm(n2[rows], self.w_gu.T, out=gate_up[rows])
            gate, up = gate_up[rows].chunk(2, -1)
            torch.mul(F.silu(gate), up, out=act[rows])
            y[rows] = h_mid[rows] + act[rows] @ w["midlayer.mlp.down_proj.weight"].T

        dy = self.run_head(chunk, y)
        if self.grads is None:
            return
        grads = self.grads
        dqkv, d_mid = new(total, self.w_h.shape[0]), new(total, c.hidden_size)
        d_gu = new(total, 2 * c.intermediate_size)
        for i in reversed(range(len(sizes))):
            rows, n = steps[i], sizes[i]
            gate, up = gate_up[rows].chunk(2, -1)
            d_gu[rows] = swiglu_backward(dy[rows] @ w["midlayer.mlp.down_proj.weight"], gate, up)
            d_mid[rows] = dy[rows] + rms_norm_backward(
                d_gu[rows] @ self.w_gu,
                h_mid[rows],
                r_n2[rows],
                w["midlayer.post_attention_layernorm.weight"],
                grads["midlayer.post_attention_layernorm.weight"],
            )
            dout = (d_mid[rows] @ w["midlayer.self_attn.o_proj.weight"]).unflatten(-1, (heads, dim))
            dq, dk, dv = attention.backward(i, dout)
            cos, sin = self.rope(position[:n] + i)
            token = torch.minimum(chunk.pos[:n] + 1 + i, self.last[chunk.pos[:n]])
            dq = rotate(dq, cos, -sin).flatten(1)
            if i == 0:  # K^0, V^0 still collect gradients from other chunks: backward_pack goes on from here
                self.dq0[chunk.pos] = dq
                self.dh0[chunk.pos] += d_mid[rows]
                continue
            dqkv[rows] = torch.cat([dq, rotate(dk, cos, -sin).flatten(1), dv.flatten(1)], -1)
            self.de_qkv[token] += dqkv[rows]
            dh = d_mid[rows] + rms_norm_backward(
                dqkv[rows] @ self.w_h,
                h_in[rows],
                r_hn[rows],
                w["midlayer.hidden_norm.weight"],
                grads["midlayer.hidden_norm.weight"],
            )
            dy[steps[i - 1]][:n] += dh
        attention.backward_context(self.dk0, self.dv0)
        add_outer(grads["midlayer.mlp.down_proj.weight"], dy, act)
        add_outer(self.dw_gu, d_gu, n2)
        add_outer(grads["midlayer.self_attn.o_proj.weight"], d_mid, attention.out.flatten(1))
        add_outer(self.dw_h, dqkv[m:], hn[m:])

    def run_head(
        self,
        chunk: Chunk,
        y: Tensor,  # [R, H]
    ) -> Tensor:  # dy [R, H], zero rows where no logits are trained on
        """Losses of the chunk's head rows into the results; their gradient with respect to y."""
        c, w, t = self.c, self.w, self.batch.num_tokens
        rows = teacher(self.features.f[chunk.teacher_pos], self.engine.head)
        live = rows.in_draft[chunk.teacher_row]
        weight = self.engine.step_weights[chunk.head_step].to(self.loss.dtype) * live
        x = y[chunk.head_row]
        xn, r = rms_norm(x, w["norm.weight"], c.rms_norm_eps)
        dxn = torch.empty_like(xn) if self.grads is not None else None
        dlm = self.grads["lm_head.weight"] if self.grads is not None else None
        out = linear_kl_grad(xn, w["lm_head.weight"], rows, chunk.teacher_row, weight, dxn, dlm, *self.engine.loss)
        at = chunk.head_step * t + chunk.head_pos
        self.loss[at], self.acceptance[at] = out.loss.to(self.loss.dtype), out.acceptance.to(self.loss.dtype)
        self.hit[at], self.live[at], self.masked_in[at] = out.hit, live, torch.ones_like(live)
        dy = torch.zeros_like(y)
        if self.grads is not None:
            dy[chunk.head_row] = rms_norm_backward(dxn, x, r, w["norm.weight"], self.grads["norm.weight"])
        return dy

    # --- the backward of what every chain read -----------------------------------------------------------------------

    def backward_pack(self) -> None:
        c, w, grads, eps = self.c, self.w, self.grads, self.c.rms_norm_eps
        dtype, n = self.h0.dtype, self.batch.num_tokens
        cos, sin = self.rope(self.batch.positions)
        dk = rotate(self.dk0.to(dtype), cos, -sin).flatten(1)
        dqkv = torch.cat([self.dq0, dk, self.dv0.to(dtype).flatten(1)], -1)  # [N, W] of step 0
        next_token = torch.minimum(torch.arange(n, device=dqkv.device) + 1, self.last)
        self.de_qkv.index_add_(0, next_token, dqkv.to(self.de_qkv.dtype))
        hn, r = rms_norm(self.h0, w["midlayer.hidden_norm.weight"], eps)
        add_outer(self.dw_h, dqkv, hn)
        self.dh0 += rms_norm_backward(
            dqkv @ self.w_h, self.h0, r, w["midlayer.hidden_norm.weight"], grads["midlayer.hidden_norm.weight"]
        )
        dh0, de_qkv = self.dh0.to(dtype), self.de_qkv.to(dtype)
        add_outer(grads["fc.weight"], dh0, self.g)
        if c.fc_norm:
            dg = (dh0 @ w["fc.weight"]).chunk(3, -1)
            for j, (d, x) in enumerate(zip(dg, self.g_in.chunk(3, -1), strict=True)):
                rms_norm_backward(d, x, self.g_r[j], w[f"fc_norm.{j}.weight"], grads[f"fc_norm.{j}.weight"])
        add_outer(self.dw_e, de_qkv, self.e_normed)
        rms_norm_backward(
            de_qkv @ self.w_e,
            self.e,
            self.e_r,
            w["midlayer.input_layernorm.weight"],
            grads["midlayer.input_layernorm.weight"],
        )
        h, start = c.hidden_size, 0
        for name in "qkv":
            grad = grads[f"midlayer.self_attn.{name}_proj.weight"]
            grad[:, :h] += self.dw_e[start : start + len(grad)]
            grad[:, h:] += self.dw_h[start : start + len(grad)]
            start += len(grad)
        gate, up = self.dw_gu.chunk(2)
        grads["midlayer.mlp.gate_proj.weight"] += gate
        grads["midlayer.mlp.up_proj.weight"] += up


def ttt_engine_step(
    draft: Draft,
    batch: Batch,
    features: Features,
    head: TargetHead,
    step_weights: Tensor,  # [T]
    kind: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Rows, dict[str, Tensor]]:
    """One step with an engine of its own and fresh gradients: `ttt_ref_step`'s signature, for checks."""
    engine = TTTEngine(draft, head, step_weights, kind, lk_scale, lk_decay, chunk_rows)
    stats = torch.promote_types(draft.fc.weight.dtype, torch.float32)
    grads = {name: torch.zeros_like(p, dtype=stats) for name, p in draft.trainable().items()}
    return engine.step(batch, features, grads), grads
