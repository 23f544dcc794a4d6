"""The TTT engine: EAGLE-3's training step with explicit forward and backward, exact, in memory that T and S do not set.

Computes what `ttt_ref_step` computes (the specification) by four facts (docs/mathematics.md):

1 Once K^0, V^0 of the whole pack exist, a position's chain depends on no other: steps 0..T-1, all losses and the backward
  run for `chunk_rows` chains at a time (`model/chunks.py`). Kept for every token are h^0, K^0, V^0 and their gradients.
2 Row (t, i) is computed only while some step j >= i at t is trained on, its head only if (t, i) itself is.
3 The embedding's half of QKV depends on the token alone: a chunk computes it once for each token its rows read, step i
  reads the row of token t+1+i, and its gradient is collected once.
4 A chunk's weight gradients are one product per weight over the rows of all steps, added in float32.

`chunk_buffers` lists all memory a chunk needs, `fp8_buffers` what fp8 adds; it is taken once. Products are cuBLAS's, all
else the kernels of `kernels/`, which run as plain PyTorch on a CPU. The host reads nothing back from the device.

# N packed tokens, M chains of a chunk (M_i at step i, R = sum M_i), m tokens they read, K head rows, T TTT steps
# H hidden, Ht target hidden, Hq/Hkv heads, D head dim, E = Hq*D, W = (Hq + 2 Hkv)*D, I MLP width, Vd draft vocabulary
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastdraft.batch import Batch, Features, LossKind, Rows, TargetHead, to_device
from fastdraft.kernels.chain_attention import ChainAttention, attention_buffers
from fastdraft.kernels.chain_qkv import chain_qkv, chain_qkv_backward
from fastdraft.kernels.fp8 import FP8, Fp8Rows, Fp8Weight, quantize_columns, quantize_rows
from fastdraft.kernels.jit import compile_together, nothing_runs
from fastdraft.kernels.linear_kl import linear_kl_grad
from fastdraft.kernels.matmul import add_outer, linear, linear_backward
from fastdraft.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_partials
from fastdraft.kernels.swiglu import swiglu, swiglu_backward_
from fastdraft.kernels.teacher import PermutedHead, TeacherRows, permute_head, teacher
from fastdraft.model.chunks import Chunk, plan_chunks
from fastdraft.model.config import DraftConfig
from fastdraft.model.draft import Draft

CHUNK_BYTES = 3.75 * 2**30  # of a chunk's buffers, unless chunk_rows says otherwise: the 8B draft's 2048 chains at T 7
HEAD_BYTES = 2**29  # of student logits at a time: 8192 rows of the 8B draft

Table = dict[str, tuple[int, tuple[int, ...], torch.dtype]]  # by name: rows, shape of a row, dtype


# --- memory --------------------------------------------------------------------------------------------------------------


def chunk_buffers(
    c: DraftConfig,
    chunk_rows: int,
    steps: int,
    dtype: torch.dtype,  # of the draft
    target_dtype: torch.dtype,
    device: str,  # cpu, or a GPU's
) -> Table:
    """All buffers of a chunk of `chunk_rows` chains: what a step needs besides inputs and what is kept for every token."""
    h, width = c.hidden_size, (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    rows, tokens, stats = steps * chunk_rows, chunk_rows + steps, torch.promote_types(dtype, torch.float32)
    head_rows = min(max(HEAD_BYTES // (c.draft_vocab_size * dtype.itemsize) // 256 * 256, 256), rows)
    block = 2 * chunk_rows  # tokens at a time of what is done once for the pack
    stacked = {"y": h, "h_mid": h, "n2": h, "hn": h, "dy": h, "qkv": width, "gate_up": 2 * c.intermediate_size}
    table: Table = {name: (rows, (n,), dtype) for name, n in (stacked | {"act": c.intermediate_size}).items()}
    table |= {name: (chunk_rows, (h,), dtype) for name in ("branch", "dn")}
    table |= {name: (rows, (), stats) for name in ("r_n2", "r_hn")}
    table |= {"e": (tokens, (h,), dtype), "r_e": (tokens, (), stats), "de": (tokens, (width,), stats)}
    table |= {"e_qkv": (tokens, (width,), dtype), "d_e": (tokens, (h,), dtype)}
    table |= {"x": (head_rows, (h,), dtype), "dx": (head_rows, (h,), dtype), "r_x": (head_rows, (), stats)}
    table |= {"logits": (head_rows, (c.draft_vocab_size,), dtype)}
    teacher_stats = torch.promote_types(target_dtype, torch.float32)
    kinds = (teacher_stats, teacher_stats, torch.int64, torch.int64, teacher_stats)
    table |= {f"teacher.{name}": (tokens, (), kind) for name, kind in zip(TeacherRows._fields[1:], kinds, strict=True)}
    table |= {"teacher.logits": (tokens, (c.draft_vocab_size,), target_dtype)}
    columns = min(c.draft_vocab_size * head_rows // tokens // 256 * 256, 256 * -(-c.vocab_size // 256))
    if target_dtype != dtype or columns == 0:  # else the student's logits, which nobody needs yet
        table |= {"teacher.scratch": (tokens, (columns or 256,), target_dtype)}
    table |= attention_buffers(c.num_attention_heads, c.num_key_value_heads, c.head_dim, chunk_rows, steps, dtype, device)
    kv = 2 * c.num_key_value_heads * c.head_dim
    table |= {"pack.x": (block, (2 * h,), dtype), "pack.dx": (block, (2 * h,), dtype), "pack.kv": (block, (kv,), dtype)}
    table |= {"pack.r": (2 * block, (), stats)}
    if c.fc_norm:
        table |= {name: (block, (3 * c.target_hidden_size,), dtype) for name in ("pack.g", "pack.dg")}
        table |= {"pack.r_g": (3 * block, (), stats)}
        ht = c.target_hidden_size
        table |= {"pack.partial": (rms_norm_partials(ht, torch.device(device)), (ht,), stats)}
    return table | {"partial": (rms_norm_partials(h, torch.device(device)), (h,), stats)}


def pack_buffers(c: DraftConfig, tokens: int, dtype: torch.dtype) -> Table:
    """What a step keeps for every token besides the features."""
    stats, kv = torch.promote_types(dtype, torch.float32), (c.num_key_value_heads, c.head_dim)
    table: Table = {name: (tokens, (c.hidden_size,), dtype) for name in ("h0", "dh0")}
    table |= {name: (tokens, kv, dtype) for name in ("k0", "v0")}
    return table | {name: (tokens, kv, stats) for name in ("dk0", "dv0")}


def fp8_buffers(c: DraftConfig, chunk_rows: int, steps: int) -> Table:
    """What `precision: fp8` adds: both orientations of the weights below, and room for the other factor's rows."""
    table: Table = {}
    for name, (outputs, inputs) in fp8_shapes(c).items():
        for side, n, k in (("out", outputs, inputs), ("in", inputs, outputs)):
            table |= {f"fp8.{name}.{side}": (n, (k,), FP8), f"fp8.{name}.{side}_scale": (n, (), torch.float32)}
    longest = max(n for shape in fp8_shapes(c).values() for n in shape)
    room = max(2 * c.intermediate_size * chunk_rows, 256 * longest)  # longer rows go through in parts
    return table | {"fp8.q": (room, (), FP8), "fp8.scale": (steps * chunk_rows, (), torch.float32)}


def fp8_shapes(c: DraftConfig) -> dict[str, tuple[int, int]]:
    """Weights [out, in] of the products that run at every step of a chain. Bf16 stay those that run once a token and bring
    little (fc, the embedding's half of QKV, K^0 and V^0: what all chains read), and all weight gradients."""
    h, e = c.hidden_size, c.num_attention_heads * c.head_dim
    width, inner, vocab = e + 2 * c.num_key_value_heads * c.head_dim, c.intermediate_size, c.draft_vocab_size
    return {"qkv": (width, h), "out": (h, e), "gate_up": (2 * inner, h), "down": (h, inner), "head": (vocab, h)}


def table_bytes(table: Table) -> int:
    return sum(rows * math.prod(shape) * dtype.itemsize for rows, shape, dtype in table.values())


def fitting_chunk_rows(
    c: DraftConfig, steps: int, dtype: torch.dtype, target_dtype: torch.dtype, device: str, limit: float
) -> int:
    """Chains whose buffers take up to `limit` bytes: a power of two up to 16384 (2048 on a CPU, whose attention keeps
    scores); 0 where 64 need more."""
    sizes = (16384 >> k for k in range(3 if device == "cpu" else 0, 9))
    needs = ((m, table_bytes(chunk_buffers(c, m, steps, dtype, target_dtype, device))) for m in sizes)
    return next((m for m, need in needs if need <= limit), 0)


def pick_chunk_rows(
    asked: int | None, c: DraftConfig, steps: int, dtype: torch.dtype, target_dtype: torch.dtype, device: str
) -> int:
    """Chains at a time: what was asked for, else as many as CHUNK_BYTES hold."""
    return asked or fitting_chunk_rows(c, steps, dtype, target_dtype, device, CHUNK_BYTES) or 64


def buffer_rows(tokens: int, chunk_rows: int) -> tuple[int, int]:
    """Tokens of a pack and chains of a chunk that buffers are taken for: packs differ a little in length."""
    room = -(-tokens // 1024) * 1024
    return room, min(chunk_rows, room)


class Buffers:
    """Named buffers, each taken in full when first asked for."""

    def __init__(self, device: torch.device):
        self.device, self.table, self.held, self.resized = device, {}, {}, 0

    def resize(self, table: Table) -> None:
        """From now on these sizes. What a buffer of another size held is gone."""
        for name, spec in table.items():
            if self.table.get(name) != spec:
                self.held.pop(name, None)
        self.table = table
        self.resized += 1

    @property
    def held_table(self) -> Table:
        return {name: self.table[name] for name in self.held}

    def __call__(self, name: str, rows: int) -> Tensor:  # [rows, ...], what was last in it
        room, shape, dtype = self.table[name]
        if name not in self.held:
            self.held[name] = torch.empty(room, *shape, dtype=dtype, device=self.device)
        return self.held[name][:rows]


# --- weights -------------------------------------------------------------------------------------------------------------


def end_to_end(
    parts: list[Tensor],  # [n_j, width] each
) -> Tensor | None:  # [sum n_j, width]
    """One tensor over parts that lie one after the other in one buffer, as `FlatAdamW` has them; None where they do not."""
    first = parts[0]
    same = all(p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in parts)
    follows = all(b.storage_offset() == a.storage_offset() + a.numel() for a, b in pairwise(parts))
    if not (same and follows and all(p.is_contiguous() for p in parts)):
        return None
    return first.as_strided((sum(len(p) for p in parts), first.shape[1]), first.stride(), first.storage_offset())


QKV = tuple(f"midlayer.self_attn.{x}_proj.weight" for x in "qkv")
GATE_UP = tuple(f"midlayer.mlp.{x}_proj.weight" for x in ("gate", "up"))
DOWN, OUT = "midlayer.mlp.down_proj.weight", "midlayer.self_attn.o_proj.weight"
INPUT_NORM, HIDDEN_NORM = "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight"
HEAD, POST_NORM = "lm_head.weight", "midlayer.post_attention_layernorm.weight"


def flat_gradients(draft: Draft) -> dict[str, Tensor]:
    """Zero gradient sums by parameter name, views of one buffer as the engine wants them."""
    parameters = draft.trainable()
    stats = torch.promote_types(draft.fc.weight.dtype, torch.float32)
    flat = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=stats, device=draft.fc.weight.device)
    parts = flat.split([p.numel() for p in parameters.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}


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
        chunk_rows: int | None = None,  # chains at a time; None: as many as CHUNK_BYTES hold
        fp8: bool = False,  # products of `step`, not of `rows`, in float8 (`fp8_shapes`); the draft's dtype is bf16 then
    ):
        if not 1 <= len(step_weights) <= 12:
            raise ValueError(f"ttt_length {len(step_weights)} is not in 1..12")
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows is {chunk_rows}; at least 1 is needed")
        odd = [n for shape in fp8_shapes(draft.config).values() for n in shape if n % 16] if fp8 else []
        if odd:
            raise ValueError(f"fp8 products need widths in multiples of 16, the draft has {odd[0]}; use precision=bf16")
        self.draft, self.config, self.fp8 = draft, draft.config, fp8
        self.head: PermutedHead = permute_head(head, draft.draft_ids)
        self.step_weights, self.loss = step_weights, (kind, lk_scale, lk_decay)
        self.head_weights = torch.cat([step_weights, step_weights.new_zeros(1)])  # [T+1]; step T is padding
        device, dtype = draft.fc.weight.device, draft.fc.weight.dtype
        self.sizes = len(step_weights), dtype, head.weight.dtype, device.type  # of `chunk_buffers`
        self.chunk_rows = pick_chunk_rows(chunk_rows, self.config, *self.sizes)
        self.take = Buffers(device)
        self.compiled: set[bool] = set()  # kernels: True, those of `step`; False, those of `rows`

    def reserve(self, tokens: int) -> None:
        """Makes room for a pack. Raises ValueError where a GPU's free memory has none."""
        room, chains = buffer_rows(max(self.take.table.get("h0", (0,))[0], tokens), self.chunk_rows)
        pack = pack_buffers(self.config, room, self.sizes[1])
        if self.fp8:
            pack |= fp8_buffers(self.config, chains, self.sizes[0])
        table = chunk_buffers(self.config, chains, *self.sizes) | pack
        if table == self.take.table:
            return
        device = self.take.device
        if device.type == "cuda":
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + cached + table_bytes(self.take.held_table)
            if table_bytes(table) > free:
                fits = fitting_chunk_rows(self.config, *self.sizes, free - table_bytes(pack))
                need, of_it, have = (f"{x / 2**30:.1f} GiB" for x in (table_bytes(table), table_bytes(pack), free))
                raise ValueError(
                    f"{chains} chains of a pack of {tokens} tokens need {need} ({of_it} of it not the "
                    f"chunk's), {have} of {device} are free; "
                    + (f"set chunk_rows={fits}" if fits else "lower data.pack_tokens, or free memory on the GPU")
                )
        self.take.resize(table)

    def step(self, batch: Batch, features: Features, grads: dict[str, Tensor]) -> Rows:
        """Rows of a batch, and d(sum_i step_weights[i] * sum_t loss)/dw added to `grads` (float32, by parameter name).

        `batch` lies on the host, `features` on the draft's device, `grads` end to end in one buffer (`FlatAdamW.grads` or
        `flat_gradients`). The first call on a GPU compiles the kernels. Raises ValueError for token ids outside the
        vocabulary, or memory that does not suffice.
        """
        return self._run(batch, features, grads)

    def rows(self, batch: Batch, features: Features) -> Rows:
        """The same rows without any gradient; never in fp8: what a server will run is measured."""
        return self._run(batch, features, None)

    def _run(self, batch: Batch, features: Features, grads: dict[str, Tensor] | None) -> Rows:
        self.check_ids(batch)
        kind = grads is not None
        if self.take.device.type == "cuda" and kind not in self.compiled and batch.loss_mask.any():
            compile_together(lambda: Step(self, batch.num_tokens, features, grads).run(batch), self.take.device)
            self.compiled.add(kind)
        return Step(self, batch.num_tokens, features, grads).run(batch)

    def check_ids(self, batch: Batch) -> None:
        # NumPy's, as all planning on the host: PyTorch shares 32768 ids and more among threads, which wait for each other.
        ids, vocab = batch.input_ids.numpy(), self.config.vocab_size
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            raise ValueError(f"token ids {low}..{high} do not fit the draft's vocabulary of {vocab}")


class Step:
    """A batch of `num_tokens` through the engine: `run`, read from top to bottom."""

    def __init__(self, engine: TTTEngine, num_tokens: int, features: Features, grads: dict[str, Tensor] | None):
        self.engine, self.c, self.features, self.grads, self.take = engine, engine.config, features, grads, engine.take
        c, w = self.c, {name: p.detach() for name, p in engine.draft.named_parameters()}
        self.n, self.w, self.device, self.dtype = num_tokens, w, w["fc.weight"].device, w["fc.weight"].dtype
        self.stats = torch.promote_types(self.dtype, torch.float32)
        self.q_width, self.rope = c.num_attention_heads * c.head_dim, (engine.draft.rope.freqs, engine.draft.rope.factor)
        self.w_qkv, self.w_gu = (end_to_end(parts) for parts in ([w[name] for name in QKV], [w[name] for name in GATE_UP]))
        if self.w_qkv is None or self.w_gu is None:
            self.w_qkv, self.w_gu = torch.cat([w[name] for name in QKV]), torch.cat([w[name] for name in GATE_UP])
        self.w_e, self.w_h = self.w_qkv.split(c.hidden_size, 1)  # [W, H] read the embedding and the hidden state
        if grads is not None:
            self.dw_qkv, self.dw_gu = (end_to_end([grads[name] for name in names]) for names in (QKV, GATE_UP))
            if self.dw_qkv is None or self.dw_gu is None:
                raise ValueError("grads must lie end to end in one buffer: use FlatAdamW.grads or flat_gradients(draft)")
            self.dw_e, self.dw_h = self.dw_qkv.split(c.hidden_size, 1)

        rows = len(engine.step_weights) * num_tokens + 1  # the last is padding's
        self.loss, self.acceptance = (torch.zeros(rows, dtype=self.stats, device=self.device) for _ in range(2))
        self.hit, self.live, self.masked_in = (torch.zeros(rows, dtype=torch.bool, device=self.device) for _ in range(3))

    @property
    def results(self) -> list[Tensor]:  # [T * N + 1] each
        return [self.loss, self.acceptance, self.hit, self.live, self.masked_in]

    @torch.no_grad()
    def run(self, batch: Batch) -> Rows:
        t, started = len(self.engine.step_weights), False
        chunks = plan_chunks(batch, t, self.engine.chunk_rows)
        if nothing_runs():  # the first chunk, the last and the one whose rows look farthest back have every kernel
            chunks = list(chunks)
            far = max(chunks, key=lambda chunk: chunk.context[1] - chunk.context[0] if chunk.context else 0, default=None)
            chunks = [chunk for k, chunk in enumerate(chunks) if k in (0, len(chunks) - 1) or chunk is far]
        for chunk in chunks:
            if not started:
                started = True
                self.start_pack(to_device([pack_index(batch)], self.device).view(2, self.n))
            self.run_chunk(chunk.to(self.device))
        if started and self.grads is not None:
            self.finish_pack()
        return Rows(*(x[:-1].view(t, self.n) for x in self.results))

    # --- step 0's keys, values and hidden states of the whole pack: what every chain reads ----------------------------

    def start_pack(
        self,
        index: Tensor,  # [2, N] of `pack_index`
    ) -> None:
        n, take, grads = self.n, self.take, self.grads is not None
        self.engine.reserve(n)
        if self.engine.fp8 and grads:
            self.quantize_weights()
        self.h0, self.k0, self.v0 = (take(name, n) for name in ("h0", "k0", "v0"))
        if grads:
            self.dh0, self.dk0, self.dv0 = (take(name, n).zero_() for name in ("dh0", "dk0", "dv0"))
        self.next_id, self.position = index
        for rows in self.pack_blocks():
            linear(self.read_features(rows), self.w["fc.weight"], self.h0[rows])
            x, _, _ = self.read_pack(rows)
            kv = take("pack.kv", len(x))
            linear(x, self.w_qkv[self.q_width :], kv)
            chain_qkv(kv, None, None, self.position[rows], *self.rope, None, self.k0[rows], self.v0[rows])

    def quantize_weights(self) -> None:
        room = Fp8Rows(*(self.take(name, self.take.table[name][0]) for name in ("fp8.q", "fp8.scale")))

        def fp8(name: str, weight: Tensor) -> Fp8Weight:
            sides = zip(("out", "in"), weight.shape, strict=True)
            by_out, by_in = (
                Fp8Rows(self.take(f"fp8.{name}.{side}", n), self.take(f"fp8.{name}.{side}_scale", n)) for side, n in sides
            )
            quantize_rows(weight, by_out)
            quantize_columns(weight, by_in)
            return Fp8Weight(by_out, by_in, room, self.dtype)

        self.w_h, self.w_gu = fp8("qkv", self.w_h), fp8("gate_up", self.w_gu)
        self.w |= {key: fp8(name, self.w[key]) for name, key in (("out", OUT), ("down", DOWN), ("head", HEAD))}

    def pack_blocks(self) -> list[slice]:
        block = self.take.table["pack.x"][0]
        return [slice(first, min(first + block, self.n)) for first in range(0, self.n, block)]

    def read_features(self, rows: slice) -> Tensor:  # [b, 3*Ht] what fc reads
        g, c = self.features.g[rows].to(self.dtype), self.c
        if not c.fc_norm:
            return g
        out, r = self.take("pack.g", len(g)), self.take("pack.r_g", 3 * len(g))
        parts = zip(g.chunk(3, 1), out.chunk(3, 1), r.chunk(3), strict=True)
        for j, (part, normed, rj) in enumerate(parts):
            rms_norm(part, self.w[f"fc_norm.{j}.weight"], c.rms_norm_eps, normed, rj)
        return out

    def read_pack(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:  # [b, 2H] what K^0, V^0 read, 1/rms of its halves
        c, h0 = self.c, self.h0[rows]
        x = self.take("pack.x", len(h0))
        e, hn = x.split(c.hidden_size, 1)
        r_e, r_h = self.take("pack.r", 2 * len(h0)).chunk(2)
        rms_norm(self.w["embed_tokens.weight"], self.w[INPUT_NORM], c.rms_norm_eps, e, r_e, rows=self.next_id[rows])
        rms_norm(h0, self.w[HIDDEN_NORM], c.rms_norm_eps, hn, r_h)
        return x, r_e, r_h

    # --- a chunk of chains: steps 0..T-1, the head, and the backward ---------------------------------------------------

    def run_chunk(self, chunk: Chunk) -> None:
        w, eps, take, h0 = self.w, self.c.rms_norm_eps, self.take, self.h0
        steps, total, m, tokens = chunk.steps, len(chunk.row_pos), chunk.sizes[0], len(chunk.token_id)
        y, h_mid, n2, hn, gate_up, act = (take(name, total) for name in ("y", "h_mid", "n2", "hn", "gate_up", "act"))
        r_n2, r_hn, branch = take("r_n2", total), take("r_hn", total), take("branch", m)
        e, r_e, e_qkv = take("e", tokens), take("r_e", tokens), take("e_qkv", tokens)
        rms_norm(w["embed_tokens.weight"], w[INPUT_NORM], eps, e, r_e, rows=chunk.token_id)
        linear(e, self.w_e, e_qkv)
        d_context = (self.dk0, self.dv0) if self.grads is not None else None
        attention = ChainAttention(
            take, self.k0, self.v0, chunk.row_pos, chunk.row_start, chunk.sizes, chunk.context, d_context
        )
        pos = chunk.chain_pos

        for i, rows in enumerate(steps):
            n = chunk.sizes[i]
            if i == 0:
                h, h_rows = h0, pos
                rms_norm(h0, w[HIDDEN_NORM], eps, hn[rows], r_hn[rows], rows=pos)
            else:
                h, h_rows, before = y[steps[i - 1]], None, steps[i - 1]
                down = branch[: chunk.sizes[i - 1]]
                rms_norm(h_mid[before], w[HIDDEN_NORM], eps, hn[rows], r_hn[rows], delta=down, total=h)
            width = self.w_h.shape[0] if i else self.q_width
            z = take("qkv", total).view(-1)[: n * width].view(n, width)  # free until the backward
            linear(hn[rows], self.w_h[:width], z)
            chain_qkv(z, e_qkv, chunk.token_row[rows], chunk.row_position[rows], *self.rope, *attention.place(i))
            linear(attention.forward(i).flatten(1), w[OUT], branch[:n])
            rms_norm(h, w[POST_NORM], eps, n2[rows], r_n2[rows], rows=h_rows, delta=branch[:n], total=h_mid[rows])
            linear(n2[rows], self.w_gu, gate_up[rows])
            swiglu(gate_up[rows], act[rows])
            linear(act[rows], w[DOWN], branch[:n])
        rms_norm(h_mid[rows], w[HIDDEN_NORM], eps, None, None, delta=branch[:n], total=y[rows])

        dy = self.run_head(chunk, y)
        if self.grads is None:
            return
        grads, partial, dn = self.grads, take("partial", take.table["partial"][0]), take("dn", m)
        dqkv, de = take("qkv", total), take("de", tokens).zero_()
        for i in reversed(range(len(steps))):
            rows, n = steps[i], chunk.sizes[i]
            linear_backward(dy[rows], w[DOWN], act[rows])
            swiglu_backward_(gate_up[rows], act[rows])  # now gradients of gate | up, and act again
            linear_backward(gate_up[rows], self.w_gu, dn[:n])
            d_mid = h_mid[rows]  # its place, row by row
            rms_norm_backward(
                dn[:n], h_mid[rows], r_n2[rows], w[POST_NORM], d_mid, grads[POST_NORM], partial, add=(dy[rows],)
            )
            linear_backward(d_mid, w[OUT], attention.dout[rows].flatten(1))
            dq, dk, dv = attention.backward(i)
            width = self.w_h.shape[0] if i else self.q_width  # K^0, V^0 still collect from other chunks: `finish_pack`
            dz, row_position = dqkv[rows, :width], chunk.row_position[rows]
            chain_qkv_backward(dq, dk, dv, chunk.token_row[rows], row_position, *self.rope, dz, de)
            linear_backward(dz, self.w_h[:width], dn[:n])
            if i == 0:
                x, x_rows, dx, dx_rows, add = h0, pos, self.dh0, pos, (d_mid,)
            else:
                before = dy[steps[i - 1]][:n]
                x, x_rows, dx, dx_rows, add = y[steps[i - 1]][:n], None, before, None, (before, d_mid)
            rms_norm_backward(
                dn[:n],
                x,
                r_hn[rows],
                w[HIDDEN_NORM],
                dx,
                grads[HIDDEN_NORM],
                partial,
                rows=dx_rows,
                x_rows=x_rows,
                add=add,
            )
        attention.backward_context()
        add_outer(grads[DOWN], dy, act)
        add_outer(self.dw_gu, gate_up, n2)
        add_outer(grads[OUT], h_mid, attention.out.flatten(1))
        add_outer(self.dw_h[: self.q_width], dqkv[:m, : self.q_width], hn[:m])
        add_outer(self.dw_h, dqkv[m:], hn[m:])
        de_qkv, d_e = e_qkv.copy_(de), take("d_e", tokens)
        add_outer(self.dw_e, de_qkv, e)
        linear_backward(de_qkv, self.w_e, d_e)
        embedding = w["embed_tokens.weight"]
        rms_norm_backward(d_e, embedding, r_e, w[INPUT_NORM], None, grads[INPUT_NORM], partial, x_rows=chunk.token_id)

    def run_head(
        self,
        chunk: Chunk,
        y: Tensor,  # [R, H]
    ) -> Tensor:  # dy [R, H], zero rows where no logits are trained on
        """Losses of the chunk's head rows into the results; their gradient with respect to y."""
        c, w, take, head, grads = self.c, self.w, self.take, self.engine.head, self.grads
        m, room = len(chunk.teacher_pos), take.table["logits"][0]
        rows = TeacherRows(*(take(f"teacher.{name}", m) for name in TeacherRows._fields))
        scratch = "teacher.scratch" if "teacher.scratch" in take.table else "logits"
        scratch = take(scratch, take.table[scratch][0]).view(-1)
        rows = teacher(self.features.f[chunk.teacher_pos], head, (rows, scratch))
        live = rows.in_draft[chunk.teacher_row]
        weight = self.engine.head_weights[chunk.head_step].to(self.stats) * live
        self.live[chunk.head_out], self.masked_in[chunk.head_out] = live, torch.ones_like(live)
        dy = take("dy", len(y)).zero_()
        for first in range(0, len(live), room):
            part = slice(first, first + room)
            at, out = chunk.head_row[part], chunk.head_out[part]
            x, r = take("x", len(at)), take("r_x", len(at))
            rms_norm(y, w["norm.weight"], c.rms_norm_eps, x, r, rows=at)
            dx, dlm = (take("dx", len(at)), grads[HEAD]) if grads is not None else (None, None)
            logits, teacher_row = take("logits", len(at)), chunk.teacher_row[part]
            found = linear_kl_grad(x, w[HEAD], rows, teacher_row, weight[part], dx, dlm, logits, *self.engine.loss)
            self.loss[out], self.acceptance[out] = found.loss.to(self.stats), found.acceptance.to(self.stats)
            self.hit[out] = found.hit
            if grads is not None:
                partial = take("partial", take.table["partial"][0])
                rms_norm_backward(dx, y, r, w["norm.weight"], dy, grads["norm.weight"], partial, rows=at, x_rows=at)
        return dy

    # --- the backward of what every chain read -----------------------------------------------------------------------

    def finish_pack(self) -> None:
        c, w, grads, take = self.c, self.w, self.grads, self.take
        partial = take("partial", take.table["partial"][0])
        for rows in self.pack_blocks():
            x, r_e, r_h = self.read_pack(rows)
            dkv, dx, dh0 = take("pack.kv", len(x)), take("pack.dx", len(x)), self.dh0[rows]
            chain_qkv_backward(None, self.dk0[rows], self.dv0[rows], None, self.position[rows], *self.rope, dkv, None)
            add_outer(self.dw_qkv[self.q_width :], dkv, x)
            linear_backward(dkv, self.w_qkv[self.q_width :], dx)
            d_e, d_hn = dx.split(c.hidden_size, 1)
            rms_norm_backward(d_hn, self.h0[rows], r_h, w[HIDDEN_NORM], dh0, grads[HIDDEN_NORM], partial, add=(dh0,))
            embedding, ids = w["embed_tokens.weight"], self.next_id[rows]
            rms_norm_backward(d_e, embedding, r_e, w[INPUT_NORM], None, grads[INPUT_NORM], partial, x_rows=ids)
            add_outer(grads["fc.weight"], dh0, self.read_features(rows))
            if c.fc_norm:
                dg, r_g = take("pack.dg", len(x)), take("pack.r_g", 3 * len(x)).chunk(3)
                partial_g = take("pack.partial", take.table["pack.partial"][0])
                linear_backward(dh0, w["fc.weight"], dg)
                g = self.features.g[rows].to(self.dtype).chunk(3, 1)
                for j, d in enumerate(dg.chunk(3, 1)):
                    name = f"fc_norm.{j}.weight"
                    rms_norm_backward(d, g[j], r_g[j], w[name], None, grads[name], partial_g)


def pack_index(
    batch: Batch,  # on the host
) -> Tensor:  # [2, N] int64: next token's id, RoPE position
    row, following = np.arange(batch.num_tokens), np.minimum(np.arange(1, batch.num_tokens + 1), batch.doc_end.numpy() - 1)
    return torch.from_numpy(np.stack([batch.input_ids.numpy()[following], row - batch.doc_start.numpy()]))


def ttt_engine_step(
    draft: Draft,
    batch: Batch,
    features: Features,
    head: TargetHead,
    step_weights: Tensor,  # [T]
    kind: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
    chunk_rows: int | None = None,
    fp8: bool = False,
) -> tuple[Rows, dict[str, Tensor]]:
    """One step with an engine of its own and fresh gradients: `ttt_ref_step`'s signature, for checks."""
    engine, grads = TTTEngine(draft, head, step_weights, kind, lk_scale, lk_decay, chunk_rows, fp8), flat_gradients(draft)
    return engine.step(batch, features, grads), grads
