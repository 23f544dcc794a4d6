"""The block engine: DFlash's training step with explicit forward and backward, exact, in memory that N and V do not set.

Computes what `block_ref_step` computes (the specification) by five facts (docs/dflash.md):

1 The context's keys and values depend on the target's states alone, so blocks are independent of each other once they
  exist: chunks of blocks run through all layers, their losses and the backward at once. Kept for every token are fc's
  output and the context's K, V of each layer with their gradients; one product makes K and V of all layers.
2 Full-attention rows are read by all rows of their block, so every row runs the layers; but behind the keys and values of
  the last layer only live rows go on: its queries, its MLP and the head run for them alone.
3 All rows but a block's first read the mask token, so layer 0 normalises and multiplies C + 1 rows instead of C * B, and
  the gradients of the masked rows are summed before they go back through that product.
4 The head (`head.py`) is the target's and frozen. Losses and their gradient with respect to the states are made for as
  many rows as one buffer of logits holds; nothing has N * B * V numbers, and no logits are computed twice.
5 A loss against the data's tokens needs no teacher; another computes the teacher once for each token that some live rows of
  a part of a chunk are compared with.

Several processes can share a pack's tokens (`PackShare`); the group that does is given to the engine, and one of a single
process does nothing. Each computes the context's keys and values of its own rows, which are gathered once a pack and layer,
and runs its share of the blocks (`deal_anchors`). The gradients of the keys and values are summed and taken apart once.
What they send each other is allocated as it comes and is not in `memory.py`.

A method beside DFlash gives the engine another head, and may give it a mixer (`mixer.py`), with which 2 and 3 do not hold:
all rows then run all layers. Read `BlockStep.run` first: it is the table of contents. All memory is listed in `memory.py`
and taken once. The host reads nothing back from the device.

# N packed tokens, C blocks of a chunk, B rows of a block, R = C * B, K live rows, Q rows that a layer's queries have
# U = C + 1 distinct rows of layer 0, L layers, H hidden, Hq/Hkv heads, D head dim, E = Hq*D, kv = Hkv*D, W = E + 2 kv
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastdraft.batch import Alone, Batch, Features, Group, PackShare, Rows, TargetHead, to_device
from fastdraft.kernels.block_attention import (
    BlockRows,
    block_attention_bwd_kv,
    block_attention_bwd_q,
    block_attention_fwd,
    block_rows,
)
from fastdraft.kernels.dense_attention import (
    dense_attention_bwd,
    dense_attention_covers,
    dense_attention_fwd,
    dense_steps,
)
from fastdraft.kernels.head_norm import head_norm, head_norm_backward
from fastdraft.kernels.jit import compile_together
from fastdraft.kernels.matmul import add_outer, linear, linear_backward
from fastdraft.kernels.rms_norm import rms_norm, rms_norm_backward
from fastdraft.kernels.swiglu import swiglu, swiglu_backward_
from fastdraft.model.buffers import Buffers, end_to_end, flat_gradients, table_bytes
from fastdraft.model.dflash import memory
from fastdraft.model.dflash.blocks import BlockChunk, deal_anchors, plan_blocks, teacher_rows
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.head import BlockHead, TokenHead
from fastdraft.model.dflash.loss import StepLoss
from fastdraft.model.dflash.mixer import Branch, Mixer


@dataclass(frozen=True)
class LayerWeights:
    """A layer's tensors as the engine multiplies with them, or in the same places their gradient sums."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [W, H]
    q_norm: Tensor  # [D]
    k_norm: Tensor  # [D]
    out: Tensor  # [H, E]
    post_norm: Tensor  # [H]
    gate_up: Tensor  # [2I, H]
    down: Tensor  # [H, I]


@dataclass(frozen=True)
class BlockWeights:
    fc: Tensor  # [H, K*H]
    hidden_norm: Tensor  # [H]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [H]

    @classmethod
    def of(cls, named: dict[str, Tensor], num_layers: int, *, may_copy: bool) -> BlockWeights:
        """From tensors by parameter name. Q, K, V, and gate and up, become one tensor each: a view where they lie end to
        end, else a copy if `may_copy`; else ValueError."""

        def together(names: list[str]) -> Tensor:
            parts = [named[name] for name in names]
            whole = end_to_end(parts)
            if whole is None and not may_copy:
                raise ValueError(
                    "grads must lie end to end in one buffer: use FlatAdamW.grads or flat_gradients(parameters)"
                )
            return torch.cat(parts) if whole is None else whole

        def layer(at: str) -> LayerWeights:
            return LayerWeights(
                input_norm=named[f"{at}.input_layernorm.weight"],
                qkv=together([f"{at}.self_attn.{x}_proj.weight" for x in "qkv"]),
                q_norm=named[f"{at}.self_attn.q_norm.weight"],
                k_norm=named[f"{at}.self_attn.k_norm.weight"],
                out=named[f"{at}.self_attn.o_proj.weight"],
                post_norm=named[f"{at}.post_attention_layernorm.weight"],
                gate_up=together([f"{at}.mlp.{x}_proj.weight" for x in ("gate", "up")]),
                down=named[f"{at}.mlp.down_proj.weight"],
            )

        layers = tuple(layer(f"layers.{number}") for number in range(num_layers))
        return cls(named["fc.weight"], named["hidden_norm.weight"], layers, named["norm.weight"])


class BlockEngine:
    """Runs training steps of a DFlash draft against its target's head. Build it when the draft has its embedding."""

    def __init__(
        self,
        draft: DFlashDraft,
        head: TargetHead,
        loss: StepLoss,
        draw: Callable[[Batch, int], Tensor],  # anchors [A] of a batch on the host, at a step
        chunk_blocks: int | None = None,  # blocks at a time; None: as many as memory.CHUNK_BYTES hold
        head_type: Callable[[DFlashDraft, TargetHead, StepLoss], BlockHead] = TokenHead,
        mixer: Mixer | None = None,
        sequence: Group | None = None,  # who share a pack's tokens; None: this process alone
    ):
        if chunk_blocks is not None and chunk_blocks < 1:
            raise ValueError(f"chunk_rows is {chunk_blocks}; at least 1 block is needed")
        refuse_head(head, draft.config.title)
        self.draft = draft
        self.config = c = draft.config
        self.sequence: Group = sequence or Alone()
        self.loss = loss
        self.draw = draw
        self.number = 0
        self.head, self.mixer = head_type(draft, head, loss), mixer
        assert c.mixes == (mixer is not None), "the shape says whether the method has a mixer"
        device, dtype = draft.fc.weight.device, draft.fc.weight.dtype
        self.sizes = dtype, head.weight.dtype, device.type
        self.chunk_blocks = memory.pick_chunk_blocks(chunk_blocks, c, *self.sizes, self.head.needs_teacher)
        self.take = Buffers(device)
        self.compiled: set[tuple[bool, bool]] = set()  # kernels: with gradients or without, with a teacher or without

    def begin(self, number: int) -> None:
        """The optimizer step that follows, which anchors are drawn for."""
        self.number = number

    def reserve(self, tokens: int, with_teacher: bool) -> None:
        """Makes room for a pack. Raises ValueError where a GPU's free memory has none."""
        room = memory.room_for(max(self.take.table.get("context.0.k", (0,))[0], tokens))
        with_teacher |= "teacher.logits" in self.take.table
        pack = memory.pack_buffers(self.config, room, self.sizes[0], self.sequence.size)
        table = memory.chunk_buffers(self.config, self.chunk_blocks, *self.sizes, with_teacher) | pack
        if table == self.take.table:
            return
        device = self.take.device
        if device.type == "cuda":
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + cached + table_bytes(self.take.held_table)
            if table_bytes(table) > free:
                need, of_it, have = (f"{x / 2**30:.1f} GiB" for x in (table_bytes(table), table_bytes(pack), free))
                raise ValueError(
                    f"{self.chunk_blocks} blocks of a pack of {tokens} tokens need {need} ({of_it} of it not the "
                    f"chunk's), {have} of {device} are free; set chunk_rows={max(self.chunk_blocks // 2, 1)} or less, or "
                    "lower data.pack_tokens"
                )
        self.take.resize(table)

    def step(self, batch: Batch, features: Features, grads: dict[str, Tensor]) -> Rows:
        """Rows of a batch, and the gradient of the weighted sum of losses added to `grads` (float32, by parameter name).

        `batch` lies on the host, `features` on the draft's device, `grads` end to end in one buffer (`FlatAdamW.grads` or
        `flat_gradients`). Row (j, a) of the result is step j of the block at token a. Raises ValueError for token ids that
        do not fit, or memory that does not suffice.

        Where processes share a pack's tokens, all of them call it with the same batch. g is that of `PackShare.rows` and f
        that of `rows_and_halo`, with a halo of T; the rows of blocks that another runs are 0, and the gradients of all are
        still to be summed.
        """
        return self.run(batch, features, self.draw(batch, self.number), grads)

    def rows(self, batch: Batch, features: Features) -> Rows:
        """The same without any gradient, of blocks that are the same at every call. Where the features have the target's
        last state, acceptance and hits are against its distribution; else hits alone count, against the text."""
        return self.run(batch, features, self.draw(batch, 0), None)

    def run(
        self,
        batch: Batch,
        features: Features,
        anchors: Tensor,  # [A] int64 ascending, on the host
        grads: dict[str, Tensor] | None,
    ) -> Rows:
        self.check_ids(batch)
        with_teacher = self.wants_teacher(features, grads is not None)
        kind = grads is not None, with_teacher
        if self.take.device.type == "cuda" and kind not in self.compiled and len(anchors):
            rehearsed = BlockStep(self, batch.num_tokens, features, grads, with_teacher)
            compile_together(lambda: rehearsed.run(batch, anchors, rehearsal=True), self.take.device)
            self.compiled.add(kind)
        return BlockStep(self, batch.num_tokens, features, grads, with_teacher).run(batch, anchors)

    def wants_teacher(self, features: Features, training: bool) -> bool:
        """Whether a step computes the target's distribution. ValueError where it must and the features do not suffice."""
        wanted = self.head.needs_teacher or (not training and features.f is not None)
        if wanted and features.f is None:
            raise ValueError(f"loss {self.loss.kind} compares with the target's last state, which these features lack")
        return wanted

    def check_ids(self, batch: Batch) -> None:
        ids, c = batch.input_ids.numpy(), self.config
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= c.vocab_size:
            raise ValueError(f"token ids {low}..{high} do not fit the draft's vocabulary of {c.vocab_size}")
        if bool((ids == c.mask_token_id).any()):
            raise ValueError(
                f"a document has token {c.mask_token_id}, which is the draft's mask_token_id; choose an id that no text of "
                "yours has with draft.overrides.mask_token_id"
            )


def refuse_head(head: TargetHead, title: str = "DFlash") -> None:
    """Raises ValueError for a head that the engines do not give such a draft as it is."""
    odd = {"a bias": head.bias is not None, f"a scale of {head.scale}": head.scale != 1.0}
    odd[f"a soft-cap of {head.softcap}"] = head.softcap is not None
    if found := [name for name, there in odd.items() if there]:
        raise ValueError(
            f"the target's lm_head has {' and '.join(found)}, and the engines multiply a {title} draft's states with "
            f"the bare weight; {title} drafts are for targets whose head is a plain product"
        )


class BlockStep:
    """A batch through the engine: `run`, read from top to bottom."""

    def __init__(
        self,
        engine: BlockEngine,
        num_tokens: int,
        features: Features,
        grads: dict[str, Tensor] | None,
        with_teacher: bool,
    ):
        c = engine.config
        self.engine, self.config, self.take = engine, c, engine.take
        self.features, self.num_tokens, self.with_teacher = features, num_tokens, with_teacher
        sequence = engine.sequence
        shares = sequence.size > 1
        self.share = PackShare(num_tokens, sequence.rank, sequence.size, c.num_drafted) if shares else None
        self.num_own = num_tokens if self.share is None else len(self.share.rows)  # n, rows of g and of fc's output
        self.embedding = engine.draft.embedding  # [V, H], frozen
        self.named = {name: p.detach() for name, p in engine.draft.named_parameters()}
        self.named_grads = grads
        self.weights = BlockWeights.of(self.named, c.num_hidden_layers, may_copy=True)
        self.grads = None if grads is None else BlockWeights.of(grads, c.num_hidden_layers, may_copy=False)
        self.device, self.dtype = self.weights.fc.device, self.weights.fc.dtype
        self.stats = torch.promote_types(self.dtype, torch.float32)
        self.heads, self.kv_heads, self.dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_width, self.kv_width = self.heads * self.dim, self.kv_heads * self.dim
        self.rope = engine.draft.rope.freqs, engine.draft.rope.factor
        self.scale = self.dim**-0.5

        # What `run` returns, one row for each step of each token.
        size = c.num_drafted * num_tokens
        self.loss, self.acceptance = (torch.zeros(size, dtype=self.stats, device=self.device) for _ in range(2))
        self.hit, self.live = (torch.zeros(size, dtype=torch.bool, device=self.device) for _ in range(2))

    @torch.no_grad()
    def run(
        self,
        batch: Batch,
        anchors: Tensor,  # [A] int64 ascending, on the host
        rehearsal: bool = False,  # launch every kernel, for `compile_together`, in which none writes: two chunks have all
    ) -> Rows:
        """The whole step. The context's keys and values come first, then chunk after chunk of blocks, forward and backward;
        last the backward of the context."""
        chunks = self.plan(batch, anchors)
        if chunks is not None:
            if rehearsal:
                planned = list(chunks)
                chunks = iter(planned[:1] + planned[1:][-1:])
            position = batch.positions if self.share is None else batch.positions[self.share.rows]
            self.start_pack(to_device([position], self.device))
            for chunk in chunks:
                self.run_chunk(chunk.to(self.device))
            if self.grads is not None:
                self.finish_pack()
        return self.results(self.num_tokens)

    def results(self, num_tokens: int) -> Rows:
        """Of the pack's first tokens: steps of blocks by the tokens that they begin at."""
        shape = self.config.num_drafted, self.num_tokens
        found = (x.view(shape)[:, :num_tokens] for x in (self.loss, self.acceptance, self.hit, self.live))
        return Rows(*found, self.live.view(shape)[:, :num_tokens].clone())

    def plan(
        self,
        batch: Batch,
        anchors: Tensor,  # [A] int64 ascending, on the host
    ) -> Iterator[BlockChunk] | None:
        """The chunks of this process. None: no process has one of this pack; otherwise all of them start and finish it."""
        c, room = self.config, memory.head_room(self.config, self.dtype)
        if self.share is None:
            chunks = plan_blocks(batch, anchors, c, self.engine.chunk_blocks, room)
            first = next(chunks, None)
            return None if first is None else itertools.chain([first], chunks)
        if not len(anchors):
            return None
        mine = deal_anchors(anchors, batch, c, self.share.size)[self.share.rank]
        chunks = plan_blocks(batch, mine, c, self.engine.chunk_blocks, room)
        if not self.with_teacher:
            return chunks
        rows = teacher_rows(anchors, batch, c.num_drafted)
        self.features = Features(self.features.g, self.gather_states(rows))

        def among_these(chunk: BlockChunk) -> BlockChunk:
            place = np.searchsorted(rows.numpy(), chunk.teacher_pos.numpy())
            return replace(chunk, teacher_pos=torch.from_numpy(place))

        return map(among_these, chunks)

    def gather_states(
        self,
        rows: Tensor,  # [m] int64 ascending, of the pack, on the host
    ) -> Tensor:  # [m, H]
        """The target's last states of these rows, from their owners: a sum to which each gives its own and zeros."""
        slice_of = rows.numpy() // self.share.slice_rows
        own = np.isin(slice_of, (self.share.rank, 2 * self.share.size - 1 - self.share.rank)).nonzero()[0]
        at = np.searchsorted(self.share.rows_and_halo.numpy(), rows.numpy()[own])
        own, at = to_device([torch.from_numpy(own), torch.from_numpy(at)], self.device).view(2, len(own))
        f = self.features.f
        return self.engine.sequence.sum_(f.new_zeros(len(rows), f.shape[1]).index_copy_(0, own, f[at]))

    # --- the context: what every block reads, of the whole pack ---------------------------------------------------------

    def start_pack(
        self,
        position: Tensor,  # [n] int64, of this process's rows
    ) -> None:
        """c, K and V of every token and layer, and zeros where their gradients will be collected."""
        n, own, take, w = self.num_tokens, self.num_own, self.take, self.weights
        self.engine.reserve(n, self.with_teacher)
        self.position = position
        self.c0 = take("c0", own)
        # Keys and values of all layers come from one product. The keys are normed and rotated into buffers of their own.
        kv = take("context.kv", own)  # [n, L, 2, Hkv, D]
        self.context = [
            {"raw": kv[:, layer, 0].flatten(1), "v": kv[:, layer, 1], "k": take(f"context.{layer}.k", n)}
            for layer in range(len(w.layers))
        ]
        if self.grads is not None:
            for layer, kept in enumerate(self.context):
                kept |= {name: take(f"context.{layer}.{name}", n).zero_() for name in ("dk", "dv")}
        kv_weight = take("kv_weight")
        torch.cat([layer.qkv[self.q_width :] for layer in w.layers], out=kv_weight)
        for rows in self.pack_blocks():
            linear(self.features.g[rows].to(self.dtype), w.fc, self.c0[rows])
            linear(self.read_context(rows)[0], kv_weight, kv[rows].flatten(1))
        for number, (kept, layer) in enumerate(zip(self.context, w.layers, strict=True)):
            if self.share is None:
                self.norm_heads(kept["raw"], layer.k_norm, position, kept["k"])
            else:
                keys = torch.empty_like(kept["v"], memory_format=torch.contiguous_format)
                self.norm_heads(kept["raw"], layer.k_norm, position, keys)
                k, v = self.gather_keys(keys, kept["v"], kept["k"], take(f"context.{number}.v", n))
                kept |= {"own_v": kept["v"], "k": k, "v": v}

    def gather_keys(
        self,
        keys: Tensor,  # [n, Hkv, D] of this process's rows
        values: Tensor,  # [n, Hkv, D]
        k: Tensor,  # [N, Hkv, D] written, as v is
        v: Tensor,  # [N, Hkv, D]
    ) -> tuple[Tensor, Tensor]:  # k, v
        """A layer's keys and values of all rows, from the processes that share them."""
        own = keys.new_empty(2, 2 * self.share.slice_rows, *keys.shape[1:])  # Where rows are missing, noise is sent.
        own[0, : len(keys)], own[1, : len(keys)] = keys, values
        of_all = self.engine.sequence.gather(own).unflatten(0, (-1, 2))
        for rank, place, rows in self.share.pieces():
            k[rows], v[rows] = of_all[rank, :, place]
        return k, v

    def scatter_key_gradients(
        self,
        dk: Tensor,  # [N, Hkv, D] what this process has collected
        dv: Tensor,  # [N, Hkv, D]
    ) -> tuple[Tensor, Tensor]:  # [n, Hkv, D] each
        """A layer's gradients of this process's rows, summed over what all have collected."""
        if self.share is None:
            return dk, dv
        of_all = dk.new_zeros(self.share.size, 2, 2 * self.share.slice_rows, *dk.shape[1:])
        for rank, place, rows in self.share.pieces():
            of_all[rank, 0, place], of_all[rank, 1, place] = dk[rows], dv[rows]
        dk, dv = self.engine.sequence.sum_scatter(of_all.flatten(0, 1))
        return dk[: self.num_own], dv[: self.num_own]

    def pack_blocks(self) -> list[slice]:
        """This process's tokens of the pack, as many at a time as the pack's buffers have rows."""
        block = self.take.rows("pack.c")
        return [slice(first, min(first + block, self.num_own)) for first in range(0, self.num_own, block)]

    def read_context(self, rows: slice) -> tuple[Tensor, Tensor]:  # c [b, H], 1/rms [b]
        c0 = self.c0[rows]
        c, r = self.take("pack.c", len(c0)), self.take("pack.r", len(c0))
        rms_norm(c0, self.weights.hidden_norm, self.config.rms_norm_eps, c, r)
        return c, r

    def norm_heads(
        self,
        raw: Tensor,  # [m, heads * D]
        weight: Tensor,  # [D]
        position: Tensor,  # [n]
        out: Tensor,  # [n, heads, D] written
        rows: Tensor | None = None,  # [n] row of raw; None: j
    ) -> None:
        """The RMSNorm over each head, and RoPE."""
        head_norm(raw, weight, self.config.rms_norm_eps, position, *self.rope, out, rows)

    def norm_heads_backward(
        self,
        dout: Tensor,  # [n, heads, D]
        raw: Tensor,  # [m, heads * D]
        weight: Tensor,  # [D]
        position: Tensor,  # [n]
        draw: Tensor,  # [n, heads * D] written, may be raw where rows is None
        dweight: Tensor,  # [D] added to
        rows: Tensor | None = None,
    ) -> None:
        eps, partial = self.config.rms_norm_eps, self.take("partial_head")
        head_norm_backward(dout, raw, weight, eps, position, *self.rope, draw, dweight, partial, rows)

    def finish_pack(self) -> None:
        """From the collected gradients of the context's keys and values to those of K, V, the norms and fc."""
        w, grads, take = self.weights, self.grads, self.take
        kv, kv_weight, partial = take("context.kv", self.num_own), take("kv_weight"), take("partial")
        # The gradients take the products' places.
        for kept, layer, grad in zip(self.context, w.layers, grads.layers, strict=True):
            dk, dv = self.scatter_key_gradients(kept["dk"], kept["dv"])
            self.norm_heads_backward(dk, kept["raw"], layer.k_norm, self.position, kept["raw"], grad.k_norm)
            (kept["v"] if self.share is None else kept["own_v"]).copy_(dv)
        for rows in self.pack_blocks():
            c, r = self.read_context(rows)
            for layer, grad in enumerate(grads.layers):
                add_outer(grad.qkv[self.q_width :], kv[rows, layer].flatten(1), c)
            dc = take("pack.dc", len(c))
            linear_backward(kv[rows].flatten(1), kv_weight, dc)
            rms_norm_backward(dc, self.c0[rows], r, w.hidden_norm, dc, grads.hidden_norm, partial)
            add_outer(grads.fc, dc, self.features.g[rows].to(self.dtype))

    # --- a chunk of blocks ----------------------------------------------------------------------------------------------

    def run_chunk(self, chunk: BlockChunk) -> None:
        """The chunk's blocks through all layers, their losses, and the backward of both."""
        intervals = self.intervals(chunk)
        states = self.forward_blocks(chunk, intervals)
        dy = self.run_head(chunk, states)
        if self.grads is not None:
            self.backward_blocks(chunk, intervals, dy)

    def is_last(self, layer: int) -> bool:
        return layer == len(self.weights.layers) - 1

    def asking(self, chunk: BlockChunk, layer: int) -> tuple[Tensor | None, Tensor]:
        """The rows that have queries in a layer, None for all, and their RoPE positions [Q]."""
        if self.is_last(layer) and self.engine.mixer is None:
            return chunk.head_row, chunk.head_position
        return None, chunk.row_position

    def intervals(self, chunk: BlockChunk) -> list[BlockRows]:
        """The keys that each layer's rows see, counted from the first that `keys` gives."""
        found, anchor, start = [], chunk.anchor - chunk.context.start, chunk.start - chunk.context.start
        for layer, kind in enumerate(self.config.layer_types):
            sliding = kind == "sliding_attention"
            first = start
            if self.dense_rows(chunk, layer):
                first = start.clone()
                first[: chunk.first_rows // self.config.block_size] = chunk.first_keys
            found.append(
                block_rows(
                    anchor,
                    first,
                    self.config.block_size,
                    self.asking(chunk, layer)[0],
                    self.config.sliding_window if sliding else None,
                    causal=sliding,
                )
            )
        return found

    def forward_blocks(self, chunk: BlockChunk, intervals: list[BlockRows]) -> Tensor:  # [K, H] before the final norm
        """All layers; the buffers named by layer keep what the backward reads."""
        take, eps = self.take, self.config.rms_norm_eps
        rows, before, branch = len(chunk.row_position), None, None
        for layer, w in enumerate(self.weights.layers):
            kept = lambda name, n=None, layer=layer: take(f"{layer}.{name}", n)  # noqa: E731
            ask, position = self.asking(chunk, layer)
            q, k = kept("q", len(position)), kept("k", rows)
            if layer == 0 and self.engine.mixer is None:
                v = self.project_distinct(chunk, w, ask, q, k)
            else:
                # Layer 0 reads the embedding. The layer before leaves its MLP's branch to be added in the same pass as
                # this norm.
                n1, r1, read = kept("n1", rows), kept("r1", rows), chunk.row_id if layer == 0 else None
                source, total = (self.embedding, None) if layer == 0 else (before, kept("h", rows))
                rms_norm(source, w.input_norm, eps, n1, r1, rows=read, delta=branch, total=total)
                x1 = self.mix_in(layer, "attention", n1)
                v = self.project(layer, w, x1, ask, position, chunk.row_position, q, k)

            out, lse = kept("out", len(q)), kept("lse")[:, : len(q)]
            dense = self.dense_rows(chunk, layer)
            if dense:
                before = (x[: chunk.first_keys] for x in self.keys(chunk, layer))
                dense_attention_fwd(q[:dense], *before, self.scale, out[:dense], lse[:, :dense])
                out[dense:], lse[:, dense:] = 0, -torch.inf
            block_attention_fwd(q, *self.keys(chunk, layer), k, v, intervals[layer], self.scale, out, lse, dense > 0)
            branch = self.mix_out(layer, "attention", len(q), lambda y, out=out, w=w: linear(out.flatten(1), w.out, y))
            before, n2, r2 = kept("h_mid", len(q)), kept("n2", len(q)), kept("r2", len(q))
            h, residual = (self.embedding, self.read_by(chunk, ask)) if layer == 0 else (kept("h", rows), ask)
            rms_norm(h, w.post_norm, eps, n2, r2, rows=residual, delta=branch, total=before)
            gate_up, act = kept("gate_up", len(q)), take("act", len(q))
            linear(self.mix_in(layer, "mlp", n2), w.gate_up, gate_up)
            swiglu(gate_up, act)
            branch = self.mix_out(layer, "mlp", len(q), lambda y, act=act, w=w: linear(act, w.down, y))

        # Only live rows have a loss. With a mixer they are chosen here, else the last layer has no others.
        live, mixed = chunk.head_row, self.engine.mixer is not None
        if mixed:
            branch = torch.index_select(branch, 0, live, out=take("x_live", len(live)))
        y, x, r = take("y", len(live)), take("x", len(live)), take("r_x", len(live))
        rms_norm(before, self.weights.norm, eps, x, r, rows=live if mixed else None, delta=branch, total=y)
        return x

    def dense_rows(self, chunk: BlockChunk, layer: int) -> int:
        """How many of a layer's first queries leave the keys before the chunk to FlashAttention: they are a rectangle
        without a mask. None where it is not installed, where a window cuts the rectangle, or where it is small."""
        full = self.config.layer_types[layer] == "full_attention"
        if not full or not dense_attention_covers(self.dim, self.dtype, self.device.type):
            return 0
        rows = chunk.first_rows if self.asking(chunk, layer)[0] is None else chunk.first_live
        return rows * dense_steps((0, chunk.first_keys), (rows,))

    def keys(self, chunk: BlockChunk, layer: int) -> tuple[Tensor, Tensor]:  # [n, Hkv, D] each
        """The context's keys and values that the chunk's rows may see."""
        return self.context[layer]["k"][chunk.context], self.context[layer]["v"][chunk.context]

    def read_by(self, chunk: BlockChunk, ask: Tensor | None) -> Tensor:  # [Q] tokens
        return chunk.row_id if ask is None else chunk.row_id[ask]

    def mix_in(
        self,
        layer: int,
        branch: Branch,
        n: Tensor,  # [Q, H] normed rows
    ) -> Tensor:  # [Q, H] what the branch's products read
        if self.engine.mixer is None:
            return n
        x = self.take(f"{layer}.{branch}.x", len(n))
        self.engine.mixer.mix_in(self, layer, branch, n, x)
        return x

    def mix_out(
        self,
        layer: int,
        branch: Branch,
        rows: int,
        product: Callable[[Tensor], None],  # writes the branch's last product [Q, H]
    ) -> Tensor:  # [Q, H] what is added to the residual stream
        out = self.take("branch", rows)
        if self.engine.mixer is None:
            product(out)
            return out
        y = self.take(f"{layer}.{branch}.y", rows)
        product(y)
        self.engine.mixer.mix_out(self, layer, branch, self.normed(layer, branch, rows), y, out)
        return out

    def normed(self, layer: int, branch: Branch, rows: int) -> Tensor:  # [Q, H]
        return self.take(f"{layer}.{'n1' if branch == 'attention' else 'n2'}", rows)

    def mixed(self, layer: int, branch: Branch, rows: int) -> Tensor:  # [Q, H] as `mix_in` gave it
        if self.engine.mixer is None:
            return self.normed(layer, branch, rows)
        return self.take(f"{layer}.{branch}.x", rows)

    def mix_out_backward(
        self,
        layer: int,
        branch: Branch,
        dout: Tensor,  # [Q, H]
    ) -> Tensor:  # [Q, H] gradient of the branch's last product
        if self.engine.mixer is None:
            return dout
        rows, dy = len(dout), self.take("dmix", len(dout))
        n, y = self.normed(layer, branch, rows), self.take(f"{layer}.{branch}.y", rows)
        self.engine.mixer.mix_out_backward(self, layer, branch, n, y, dout, dy)
        return dy

    def mix_in_backward(
        self,
        layer: int,
        branch: Branch,
        dx: Tensor,  # [Q, H]
    ) -> Tensor:  # [Q, H] gradient of the normed rows
        if self.engine.mixer is None:
            return dx
        dn = self.take("dmix", len(dx))
        self.engine.mixer.mix_in_backward(self, layer, branch, self.normed(layer, branch, len(dx)), dx, dn)
        return dn

    def project(
        self,
        layer: int,
        w: LayerWeights,
        x: Tensor,  # [R, H] normed rows
        ask: Tensor | None,  # [Q] rows with queries; None: all
        ask_position: Tensor,  # [Q]
        position: Tensor,  # [R]
        q: Tensor,  # [Q, Hq, D] written, as k is
        k: Tensor,  # [R, Hkv, D]
    ) -> Tensor:  # [R, Hkv, D] values
        """A layer's queries, keys and values."""
        z = self.take(f"{layer}.z", len(x))
        z_q = z[: len(q), : self.q_width]
        if ask is None:
            linear(x, w.qkv, z)
        else:
            linear(torch.index_select(x, 0, ask, out=self.take("x_live", len(ask))), w.qkv[: self.q_width], z_q)
            linear(x, w.qkv[self.q_width :], z[:, self.q_width :])
        _, z_k, v = self.split(z)
        self.norm_heads(z_q, w.q_norm, ask_position, q)
        self.norm_heads(z_k, w.k_norm, position, k)
        return v

    def split(
        self,
        z: Tensor,  # [n, W]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [n, E], [n, kv], [n, Hkv, D]
        """Queries, keys and values of a product, or their gradients, where they lie."""
        q, k, v = z.split([self.q_width, self.kv_width, self.kv_width], 1)
        return q, k, v.unflatten(1, (-1, self.dim))

    def project_distinct(
        self,
        chunk: BlockChunk,
        w: LayerWeights,
        ask: Tensor | None,  # [Q] rows with queries; None: all
        q: Tensor,  # [Q, Hq, D] written, as k is
        k: Tensor,  # [R, Hkv, D]
    ) -> Tensor:  # [R, Hkv, D] values
        """Layer 0's projections of the C + 1 rows that differ, read by all rows: before the rotation masked rows are all
        alike."""
        take, few = self.take, len(chunk.read_id)
        n1, r1, z = take("0.n1", few), take("0.r1", few), take("0.z", few)
        rms_norm(self.embedding, w.input_norm, self.config.rms_norm_eps, n1, r1, rows=chunk.read_id)
        linear(n1, w.qkv, z)
        z_q, z_k, values = self.split(z)
        ask_position, ask_read = chunk.row_position, chunk.row_read
        if ask is not None:
            ask_position, ask_read = chunk.head_position, ask_read[ask]
        self.norm_heads(z_q, w.q_norm, ask_position, q, ask_read)
        self.norm_heads(z_k, w.k_norm, chunk.row_position, k, chunk.row_read)
        return torch.index_select(values, 0, chunk.row_read, out=take("0.v", len(k)))

    def run_head(
        self,
        chunk: BlockChunk,
        x: Tensor,  # [K, H] normed states of the live rows
    ) -> Tensor | None:  # [K, H] gradient of the states before the norm
        """Losses of the chunk's live rows into the results; their gradient."""
        out = chunk.head_out
        dx = None if self.grads is None else self.take("dx", len(x))
        self.engine.head.run(self, chunk, x, dx)
        self.live[out] = torch.ones_like(out, dtype=torch.bool)
        if dx is None:
            return None
        r, y, dy = self.take("r_x", len(x)), self.take("y", len(x)), self.take("dh", len(x))
        rms_norm_backward(dx, y, r, self.weights.norm, dy, self.grads.norm, self.take("partial"))
        return dy

    def report(
        self,
        out: Tensor,  # [n] int64 places of some live rows in the results, of `chunk.head_out`
        loss: Tensor,  # [n] without weights
        acceptance: Tensor,  # [n]
        hit: Tensor,  # [n] bool
    ) -> None:
        """Takes down what a head found of live rows."""
        self.loss[out], self.acceptance[out], self.hit[out] = loss.to(self.stats), acceptance.to(self.stats), hit

    def backward_blocks(
        self,
        chunk: BlockChunk,
        intervals: list[BlockRows],
        d_after: Tensor,  # [K, H] gradient of the last layer's output
    ) -> None:
        """The layers' backward, last first; gradients of the context's keys and values are collected for `finish_pack`."""
        take, partial = self.take, self.take("partial")
        rows, kv_first = len(chunk.row_position), self.q_width
        if self.engine.mixer is not None:
            d_after = take("branch", rows).zero_().index_copy_(0, chunk.head_row, d_after)
        for layer in reversed(range(len(self.weights.layers))):
            w, grads = self.weights.layers[layer], self.grads.layers[layer]
            kept = lambda name, n=None, layer=layer: take(f"{layer}.{name}", n)  # noqa: E731
            ask, position = self.asking(chunk, layer)
            n = len(position)
            h_mid, gate_up, out, act = kept("h_mid", n), kept("gate_up", n), kept("out", n), take("act", n)

            # The MLP's branch. act holds its gradient and then itself again, gate_up and h_mid become their gradients.
            dn, d_branch = take("dn", n), self.mix_out_backward(layer, "mlp", d_after)
            linear_backward(d_branch, w.down, act)
            swiglu_backward_(gate_up, act)
            add_outer(grads.down, d_branch, act)
            add_outer(grads.gate_up, gate_up, self.mixed(layer, "mlp", n))
            linear_backward(gate_up, w.gate_up, dn)
            dn = self.mix_in_backward(layer, "mlp", dn)
            rms_norm_backward(dn, h_mid, kept("r2", n), w.post_norm, h_mid, grads.post_norm, partial, add=(d_after,))
            d_mid = h_mid

            # Attention's branch, to what the projections gave.
            d_branch = self.mix_out_backward(layer, "attention", d_mid)
            add_outer(grads.out, d_branch, out.flatten(1))
            dout = take("dout", n)
            linear_backward(d_branch, w.out, dout.flatten(1))
            dz = self.backward_attention(chunk, layer, intervals[layer], dout)
            if layer == 0 and self.engine.mixer is None:
                self.backward_distinct(chunk, dz)
                return

            # The projections, into the gradient of the normed input. Rows without queries have only keys and values.
            x1, dn, d_before = self.mixed(layer, "attention", rows), take("dn", rows), take("dh", rows)
            if ask is None:
                add_outer(grads.qkv, dz, x1)
                linear_backward(dz, w.qkv, dn)
                dn = self.mix_in_backward(layer, "attention", dn)
                adds = {"add": (d_mid,)}
            else:
                dz_q, dz_kv = dz[:n, :kv_first], dz[:, kv_first:]
                add_outer(grads.qkv[:kv_first], dz_q, take("x_live", n))
                add_outer(grads.qkv[kv_first:], dz_kv, x1)
                linear_backward(dz_kv, w.qkv[kv_first:], dn)
                dx = take("dx", n)
                linear_backward(dz_q, w.qkv[:kv_first], dx)
                dn.index_add_(0, ask, dx)  # a row asks once, so nothing is added twice
                d_before.zero_().index_copy_(0, ask, d_mid)
                adds = {"add_dx": True}
            r1 = kept("r1", rows)
            if layer == 0:  # The embedding, which it reads, is frozen.
                ids = chunk.row_id
                rms_norm_backward(dn, self.embedding, r1, w.input_norm, None, grads.input_norm, partial, x_rows=ids)
                return
            rms_norm_backward(dn, kept("h", rows), r1, w.input_norm, d_before, grads.input_norm, partial, **adds)
            d_after = d_before

    def backward_attention(
        self,
        chunk: BlockChunk,
        layer: int,
        intervals: BlockRows,
        dout: Tensor,  # [Q, Hq, D]
    ) -> Tensor:  # [R, W] gradient of the layer's product; that of queries in its first Q rows
        """Attention's backward, the rotation's and the heads' norms'; the context's share is added to its sums."""
        take, context, n = self.take, self.context[layer], len(dout)
        w, grads = self.weights.layers[layer], self.grads.layers[layer]
        rows, (ask, ask_position) = len(chunk.row_position), self.asking(chunk, layer)
        distinct = layer == 0 and self.engine.mixer is None
        z = take(f"{layer}.z", len(chunk.read_id) if distinct else rows)
        z_q, z_k, v = self.split(z)
        read = ask_read = None
        if distinct:
            v, read = take("0.v", rows), chunk.row_read
            ask_read = read if ask is None else read[ask]
        dz = take("dz", rows)
        dz_q, dz_k, dv = self.split(dz)

        q, out, lse = take(f"{layer}.q", n), take(f"{layer}.out", n), take(f"{layer}.lse")[:, :n]
        k, dk, dq, delta = take(f"{layer}.k", rows), take("dk", rows), take("dq", n), take("delta")[:, :n]
        keys = self.keys(chunk, layer)
        sums = [context[name][chunk.context] for name in ("dk", "dv")]
        partial = take("partial_kv") if dout.is_cuda else None
        dense, dq_start = self.dense_rows(chunk, layer), None
        if dense:
            mine = dout[:dense], q[:dense], *(x[: chunk.first_keys] for x in keys), out[:dense], lse[:, :dense]
            dense_attention_bwd(*mine, self.scale, *(x[: chunk.first_keys] for x in sums), take)
            dq_start = take("dense.dq", n)
            dq_start[dense:].zero_()
        block_attention_bwd_q(dout, q, *keys, k, v, intervals, out, lse, self.scale, dk, dv, dq, delta, dq_start)
        block_attention_bwd_kv(dout, q, *keys, intervals, lse, delta, self.scale, *sums, partial)
        self.norm_heads_backward(dq, z_q, w.q_norm, ask_position, dz_q[:n], grads.q_norm, ask_read)
        self.norm_heads_backward(dk, z_k, w.k_norm, chunk.row_position, dz_k, grads.k_norm, read)
        return dz

    def backward_distinct(
        self,
        chunk: BlockChunk,
        dz: Tensor,  # [R, W] gradient of the products that rows read; that of queries in its first Q rows
    ) -> None:
        """Layer 0's projections: the rows that read the same token are added up first. The embedding is frozen."""
        take, w, grads = self.take, self.weights.layers[0], self.grads.layers[0]
        ask, _ = self.asking(chunk, 0)
        if ask is not None:
            dz_q = dz[:, : self.q_width]
            dz_q.copy_(torch.zeros_like(dz_q).index_copy_(0, ask, dz_q[: len(ask)]))
        blocks = dz.unflatten(0, (-1, self.config.block_size))
        masked = blocks[:, 1:].sum((0, 1), dtype=self.stats)
        dz, n1 = torch.cat([blocks[:, 0], masked[None].to(dz.dtype)]), take("0.n1", len(chunk.read_id))
        add_outer(grads.qkv, dz, n1)
        dn = torch.empty_like(n1)
        linear_backward(dz, w.qkv, dn)
        ids, partial = chunk.read_id, take("partial")
        rms_norm_backward(
            dn, self.embedding, take("0.r1", len(ids)), w.input_norm, None, grads.input_norm, partial, x_rows=ids
        )


def block_engine_step(
    draft: DFlashDraft,
    batch: Batch,
    features: Features,
    head: TargetHead,
    anchors: Tensor,  # [A] int64 ascending, on the host
    loss: StepLoss,
    chunk_blocks: int | None = None,
    head_type: Callable[[DFlashDraft, TargetHead, StepLoss], BlockHead] = TokenHead,
    mixer: Mixer | None = None,
) -> tuple[Rows, dict[str, Tensor]]:
    """One step with an engine of its own and fresh gradients: `block_ref_step`'s signature, for checks."""
    engine = BlockEngine(draft, head, loss, lambda batch, number: anchors, chunk_blocks, head_type, mixer)
    grads = flat_gradients(draft.trainable())
    return engine.step(batch, features, grads), grads
