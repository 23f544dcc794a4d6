"""The TTT engine: EAGLE-3's training step with explicit forward and backward, exact, in memory that T and S do not set.

Computes what `ttt_ref_step` computes (the specification) by four facts (docs/mathematics.md):

1 Once K^0, V^0 of the whole pack exist, a position's chain depends on no other: steps 0..T-1, all losses and the backward
  run for `chunk_rows` chains at a time (`chunks.py`). Kept for every token are h^0, K^0, V^0 and their gradients.
2 Row (t, i) is computed only while some step j >= i at t is trained on, its head only if (t, i) itself is. With drawn
  depths (`chunks.py`) a training step has fewer such rows; `rows` always has all.
3 The embedding's half of QKV depends on the token alone: a chunk computes it once for each token its rows read, step i
  reads the row of token t+1+i, and its gradient is collected once.
4 A chunk's weight gradients are one product per weight over the rows of all steps, added in float32.

Read `Step.run` first: it is the table of contents. All memory is listed in `memory.py` and taken once. Products are
cuBLAS's, all else the kernels of `kernels/`, which run as plain PyTorch on a CPU. The host reads nothing back from the
device.

Several processes can share a step, in two ways that go together; the groups that do are given to the engine, and one of a
single process does nothing. Of `tensor` each has a part of the weights (`shard.py`): the states are whole on all of them,
what o and down add to them is summed, and so is what goes back through gate, up and QKV. Two chunks then go on in turns, so
that one computes while the other's sum is on its way. Of `sequence` each has some of a pack's rows (`PackShare`) and runs
the chains that begin there, or as much work of other rows where a mask makes that uneven (`deal_chains`): K^0 and V^0 are
gathered once a pack, and their gradients summed and taken apart once. What they send each other is allocated as it comes
and is not in `memory.py`.

# N packed tokens, M chains of a chunk (M_i at step i, R = sum M_i), m tokens they read, K head rows, T TTT steps
# H hidden, Ht target hidden, Hq/Hkv heads, D head dim, E = Hq*D, W = (Hq + 2 Hkv)*D, I MLP width, Vd draft vocabulary
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastdraft.batch import Alone, Batch, Features, Group, LossKind, PackShare, Rows, TargetHead, to_device
from fastdraft.kernels.chain_qkv import chain_qkv, chain_qkv_backward
from fastdraft.kernels.fp8 import Fp8Rows, Fp8Weight, quantize_columns, quantize_rows
from fastdraft.kernels.jit import compile_together, launch
from fastdraft.kernels.linear_kl import linear_kl_grad
from fastdraft.kernels.matmul import add_outer, linear, linear_backward
from fastdraft.kernels.rms_norm import rms_norm, rms_norm_backward
from fastdraft.kernels.split_kl import join_teacher_, split_kl_grad
from fastdraft.kernels.swiglu import swiglu, swiglu_backward_
from fastdraft.kernels.teacher import PermutedHead, TeacherRows, teacher
from fastdraft.model.buffers import Buffers, end_to_end, flat_gradients, table_bytes
from fastdraft.model.eagle3 import memory
from fastdraft.model.eagle3.attention import ChainAttention
from fastdraft.model.eagle3.chunks import Chunk, Fetched, SampledDepth, deal_chains, plan_chunks
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.shard import cut_head, local_config

QKV = tuple(f"midlayer.self_attn.{x}_proj.weight" for x in "qkv")
GATE_UP = tuple(f"midlayer.mlp.{x}_proj.weight" for x in ("gate", "up"))
LEAST_IN_TURNS = 1024  # chains of a chunk that takes turns with another, unless the pack or chunk_rows has fewer


@dataclass(frozen=True)
class Weights:
    """The draft's tensors as the engine multiplies with them, or in the same places their gradient sums."""

    fc: Tensor  # [H, 3*Ht]
    feature_norms: tuple[Tensor, ...]  # before fc: three of [Ht], with norm_before_fc one of [3*Ht], or none
    input_norm: Tensor  # [H] of the embedding
    hidden_norm: Tensor  # [H] of the hidden state
    qkv: Tensor  # [W, 2H]
    qkv_embedding: Tensor  # [W, H], the half of qkv that reads the embedding
    qkv_hidden: Tensor | Fp8Weight  # [W, H], the half that reads the hidden state
    out: Tensor | Fp8Weight  # [H, E]
    post_norm: Tensor  # [H]
    gate_up: Tensor | Fp8Weight  # [2I, H]
    down: Tensor | Fp8Weight  # [H, I]
    norm: Tensor  # [H]
    head: Tensor | Fp8Weight  # [Vd, H]

    @classmethod
    def of(cls, named: dict[str, Tensor], *, may_copy: bool) -> Weights:
        """From tensors by parameter name. Q, K, V, and gate and up, become one tensor each: a view where they lie end to
        end, else a copy if `may_copy`; else ValueError."""
        together = []
        for names in (QKV, GATE_UP):
            parts = [named[name] for name in names]
            whole = end_to_end(parts)
            if whole is None and not may_copy:
                raise ValueError(
                    "grads must lie end to end in one buffer: use FlatAdamW.grads or flat_gradients(parameters)"
                )
            together.append(torch.cat(parts) if whole is None else whole)
        qkv, gate_up = together
        feature_norms = (*(f"fc_norm.{j}.weight" for j in range(3)), "input_norm.weight")
        qkv_embedding, qkv_hidden = qkv.chunk(2, 1)
        return cls(
            fc=named["fc.weight"],
            feature_norms=tuple(named[name] for name in feature_norms if name in named),
            input_norm=named["midlayer.input_layernorm.weight"],
            hidden_norm=named["midlayer.hidden_norm.weight"],
            qkv=qkv,
            qkv_embedding=qkv_embedding,
            qkv_hidden=qkv_hidden,
            out=named["midlayer.self_attn.o_proj.weight"],
            post_norm=named["midlayer.post_attention_layernorm.weight"],
            gate_up=gate_up,
            down=named["midlayer.mlp.down_proj.weight"],
            norm=named["norm.weight"],
            head=named["lm_head.weight"],
        )


@dataclass(frozen=True)
class Stack:
    """What a chunk's chains compute, all steps one under the other: step i owns the rows `chunk.steps[i]` of R.

    The backward reads what the forward left, and three buffers then change their meaning: a row of `h_mid` becomes its own
    gradient once its norm's backward has read it, `gate_up` becomes its own gradient in place, and `act` holds d act until
    the same kernel puts act back for the weight gradient. `qkv` serves one step at a time in the forward, from its first
    row on, and holds the gradients of all rows in the backward.
    """

    hn: Tensor  # [R, H] the normed hidden state, which QKV reads
    r_hn: Tensor  # [R] its 1/rms
    qkv: Tensor  # [R, W]
    h_mid: Tensor  # [R, H] the residual stream after attention
    n2: Tensor  # [R, H] the same, normed, which the MLP reads
    r_n2: Tensor  # [R] its 1/rms
    gate_up: Tensor  # [R, 2I]
    act: Tensor  # [R, I]
    y: Tensor  # [R, H] the layer's output: what the head norms, and (normed, with norm_output) the next step reads
    embedding: Tensor  # [m, H] normed embeddings of the tokens that the rows read
    r_embedding: Tensor  # [m] their 1/rms
    embedding_qkv: Tensor  # [m, W] their half of QKV; in the backward its gradient in the compute dtype

    @classmethod
    def take(cls, buffers: Buffers, chunk: Chunk) -> Stack:
        rows, tokens = len(chunk.row_pos), len(chunk.token_id)
        stacked = ("hn", "r_hn", "qkv", "h_mid", "n2", "r_n2", "gate_up", "act", "y")
        return cls(
            **{name: buffers(name, rows) for name in stacked},
            embedding=buffers("e", tokens),
            r_embedding=buffers("r_e", tokens),
            embedding_qkv=buffers("e_qkv", tokens),
        )


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
        chunk_rows: int | None = None,  # chains at a time; None: as many as memory.CHUNK_BYTES hold
        fp8: bool = False,  # products of `step`, not of `rows`, in float8 (`fp8_shapes`); the draft's dtype is bf16 then
        tensor: Group | None = None,  # who share the draft's weights, which `cut_draft` has cut; None: this process alone
        sequence: Group | None = None,  # who share a pack's tokens; None: this process alone
        depth: SampledDepth | None = None,  # of the chains that `step` trains; None: all steps of all
    ):
        if not 1 <= len(step_weights) <= 12:
            raise ValueError(f"ttt_length {len(step_weights)} is not in 1..12")
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows is {chunk_rows}; at least 1 is needed")
        self.tensor: Group = tensor or Alone()
        self.sequence: Group = sequence or Alone()
        self.config = local_config(draft.config, self.tensor.size)  # of this process's part
        # A row's products take 6 FLOPs a weight, forward and backward, and each key it sees 14 a number of its queries.
        heads_width = draft.config.num_attention_heads * draft.config.head_dim
        self.pair_cost = 14 * heads_width / (6 * draft.config.num_parameters()["trainable"])
        if len(draft.lm_head.weight) != self.config.draft_vocab_size:
            raise ValueError(
                f"lm_head has {len(draft.lm_head.weight)} rows, one of {self.tensor.size} processes has "
                f"{self.config.draft_vocab_size}; cut the draft with cut_draft for as many processes as the engine is given"
            )
        odd = [n for shape in memory.fp8_shapes(self.config).values() for n in shape if n % 16] if fp8 else []
        if odd:
            raise ValueError(f"fp8 products need widths in multiples of 16, the draft has {odd[0]}; use precision=bf16")
        self.draft = draft
        self.fp8 = fp8
        self.head: PermutedHead = cut_head(head, draft.draft_ids, self.tensor.rank, self.tensor.size)
        self.loss = kind, lk_scale, lk_decay
        self.step_weights = step_weights
        self.depth, self.number = depth, 0
        of_rows = step_weights if depth is None else depth.weigh(step_weights)
        self.head_weights = torch.cat([of_rows, of_rows.new_zeros(1)])  # [T+1]; step T is padding
        device, dtype = draft.fc.weight.device, draft.fc.weight.dtype
        self.sizes = len(step_weights), dtype, head.weight.dtype, device.type  # of `memory.chunk_buffers`
        self.chunk_rows = memory.pick_chunk_rows(chunk_rows, self.config, *self.sizes)
        # A chunk's buffers, twice where one chunk computes while another waits; those of the pack lie beside the first.
        self.lanes = [Buffers(device) for _ in range(memory.num_lanes(self.tensor.size))]
        self.take = self.lanes[0]
        self.compiled: set[bool] = set()  # kernels: True, those of `step`; False, those of `rows`

    def begin(self, number: int) -> None:
        """The optimizer step that follows, which depths are drawn for."""
        self.number = number

    def drawn(self, batch: Batch) -> np.ndarray | None:  # [N] int64, steps of each token's chain that are trained
        return None if self.depth is None else self.depth.draw(batch, self.number, len(self.step_weights))

    def reserve(self, tokens: int) -> None:
        """Makes room for a pack. Raises ValueError where a GPU's free memory has none."""
        room, chains = memory.buffer_rows(max(self.take.table.get("k0", (0,))[0], tokens), self.chunk_rows)
        pack = memory.pack_buffers(self.config, room, self.sizes[1], self.sequence.size)
        if self.fp8:
            pack |= memory.fp8_buffers(self.config, chains, self.sizes[0])
        of_chunk = memory.chunk_buffers(self.config, chains, *self.sizes)
        table = of_chunk | pack
        if table == self.take.table:
            return
        device, lanes = self.take.device, len(self.lanes)
        needed = table_bytes(pack) + lanes * table_bytes(of_chunk)
        if device.type == "cuda":
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + cached + sum(table_bytes(take.held_table) for take in self.lanes)
            if needed > free:
                fits = memory.fitting_chunk_rows(self.config, *self.sizes, (free - table_bytes(pack)) / lanes)
                need, of_it, have = (f"{x / 2**30:.1f} GiB" for x in (needed, table_bytes(pack), free))
                raise ValueError(
                    f"{chains} chains of a pack of {tokens} tokens need {need} ({of_it} of it not the "
                    f"chunk's), {have} of {device} are free; "
                    + (f"set chunk_rows={fits}" if fits else "lower data.pack_tokens, or free memory on the GPU")
                )
        self.take.resize(table)
        for take in self.lanes[1:]:
            take.resize(of_chunk)

    def step(self, batch: Batch, features: Features, grads: dict[str, Tensor]) -> Rows:
        """Rows of a batch, and d(sum_i step_weights[i] * sum_t loss)/dw added to `grads` (float32, by parameter name).

        With `depth` both have only the rows that were drawn for `begin`'s step, and the gradient has this expectation.

        `batch` lies on the host, `features` on the draft's device, `grads` end to end in one buffer (`FlatAdamW.grads` or
        `flat_gradients`). The first call on a GPU compiles the kernels. Raises ValueError for token ids outside the
        vocabulary, or memory that does not suffice.

        Where processes share a step, all of a group call it with the same batch. With `tensor` each gets all rows, and the
        gradients of its part of the weights. With `sequence` g is that of `PackShare.rows` and f that of `rows_and_halo`,
        with a halo of T; the rows of another's tokens are 0, and the gradients of all are still to be summed.
        """
        return self._run(batch, features, grads)

    def rows(self, batch: Batch, features: Features) -> Rows:
        """The same rows without any gradient; never in fp8: what a server will run is measured."""
        return self._run(batch, features, None)

    def _run(self, batch: Batch, features: Features, grads: dict[str, Tensor] | None) -> Rows:
        self.check_ids(batch)
        kind = grads is not None
        if self.take.device.type == "cuda" and kind not in self.compiled and batch.loss_mask.any():
            compile_together(lambda: Step(self, batch.num_tokens, features, grads).rehearse(batch), self.take.device)
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
        self.engine = engine
        self.config = engine.config
        self.eps = engine.config.rms_norm_eps
        self.take = engine.take
        self.features = features
        self.num_tokens = num_tokens
        named = {name: p.detach() for name, p in engine.draft.named_parameters()}
        self.embedding = named["embed_tokens.weight"]  # [V, H], frozen
        self.weights = Weights.of(named, may_copy=True)
        self.grads = self.whole_grads = None if grads is None else Weights.of(grads, may_copy=False)
        self.tensor = engine.tensor
        sequence = engine.sequence
        steps = len(engine.step_weights)
        self.share = PackShare(num_tokens, sequence.rank, sequence.size, steps) if sequence.size > 1 else None
        self.num_own = num_tokens if self.share is None else len(self.share.rows)  # n, rows of g, h^0 and its gradient
        self.device, self.dtype = self.embedding.device, self.weights.fc.dtype
        self.stats = torch.promote_types(self.dtype, torch.float32)
        self.q_width = self.config.num_attention_heads * self.config.head_dim
        self.rope = engine.draft.rope.freqs, engine.draft.rope.factor

        # What `run` returns, one row for each step of each token. The row behind them all takes what padding writes.
        rows = len(engine.step_weights) * num_tokens + 1
        self.loss, self.acceptance = (torch.zeros(rows, dtype=self.stats, device=self.device) for _ in range(2))
        self.hit, self.live, self.masked_in = (torch.zeros(rows, dtype=torch.bool, device=self.device) for _ in range(3))

    @property
    def results(self) -> list[Tensor]:  # [T * N + 1] each
        return [self.loss, self.acceptance, self.hit, self.live, self.masked_in]

    @torch.no_grad()
    def run(self, batch: Batch) -> Rows:
        """The whole step. What all chains read comes first, then chunk after chunk of chains, forward and backward; last
        the backward of what all chains have read."""
        chunks = self.plan(batch)
        if chunks is not None:
            self.start_pack(self.index(batch))
            while some := list(itertools.islice(chunks, len(self.engine.lanes))):
                self.run_in_turns([chunk.to(self.device) for chunk in some])
            if self.grads is not None:
                self.finish_pack()
        return Rows(*(x[:-1].view(-1, self.num_tokens) for x in self.results))

    def plan(self, batch: Batch) -> Iterator[Chunk] | None:
        """The chunks of this process. None: no process has one of this pack; otherwise all of them start and finish it."""
        steps, chains = len(self.engine.step_weights), self.engine.chunk_rows
        # A short pack is divided among the lanes, too, though into no chunks that a GPU is slow on.
        if len(self.engine.lanes) > 1:
            chains = min(chains, max(-(-self.num_own // len(self.engine.lanes)), LEAST_IN_TURNS))
        drawn = None if self.grads is None else self.engine.drawn(batch)
        if self.share is not None:
            self.deal = deal_chains(batch, steps, self.share, self.engine.pair_cost, drawn)
            return None if self.deal is None else plan_chunks(batch, steps, chains, self.deal, drawn)
        chunks = plan_chunks(batch, steps, chains, drawn=drawn)
        first = next(chunks, None)
        return None if first is None else itertools.chain([first], chunks)

    def index(self, batch: Batch) -> Tensor:  # [2, n] of `pack_index`, of this process's rows, on the device
        whole = pack_index(batch)
        own = whole if self.share is None else whole[:, self.share.rows]
        return to_device([own], self.device).view(2, self.num_own)

    @torch.no_grad()
    def rehearse(self, batch: Batch) -> None:
        """Launches every kernel that `run` would, for `compile_together`, in which nothing is written. Three chunks have
        them all: the first, the last, and the one whose rows look farthest back."""
        planned = self.plan(batch)
        if planned is None:
            return
        chunks = list(planned)
        far = max(chunks, key=lambda chunk: chunk.context[1] - chunk.context[0] if chunk.context else 0, default=None)
        self.start_pack(self.index(batch))
        for k, chunk in enumerate(chunks):
            if k in (0, len(chunks) - 1) or chunk is far:
                self.run_chunk(chunk.to(self.device))
        if self.grads is not None:
            self.finish_pack()

    # --- what every chain reads: hidden states, keys and values of step 0, of the whole pack ---------------------------

    def start_pack(
        self,
        index: Tensor,  # [2, n] of `pack_index`, of this process's rows
    ) -> None:
        """h^0, K^0 and V^0 of every token, and zeros where their gradients will be collected."""
        n, own, take = self.num_tokens, self.num_own, self.take
        self.engine.reserve(n)
        if self.engine.fp8 and self.grads is not None:
            self.quantize_weights()
        self.h0, self.k0, self.v0 = take("h0", own), take("k0", n), take("v0", n)
        if self.grads is not None:
            self.dh0, self.dk0, self.dv0 = take("dh0", own).zero_(), take("dk0", n).zero_(), take("dv0", n).zero_()
            self.start_norm_sums()
        self.next_id, self.position = index
        k0, v0 = (self.k0, self.v0) if self.share is None else take("own_kv").chunk(2, 1)
        for rows in self.pack_blocks():
            self.combine(rows)
            x, _, _ = self.read_pack(rows)
            kv = take("pack.kv", len(x))
            linear(x, self.weights.qkv[self.q_width :], kv)
            chain_qkv(kv, None, None, self.position[rows], *self.rope, None, k0[rows], v0[rows])
        self.chain_h0, self.chain_f = self.h0, self.features.f
        if self.share is not None:
            self.gather_keys()
            self.chain_h0, self.chain_f = self.dealt(self.h0, self.deal.h), self.dealt(self.features.f, self.deal.f)
        if self.grads is not None:
            self.chain_dh0 = self.dh0 if self.chain_h0 is self.h0 else torch.zeros_like(self.chain_h0)

    def dealt(
        self,
        own: Tensor,  # [n, ...] of this process's tokens
        fetched: Fetched,
    ) -> Tensor:  # [m, ...] of the tokens whose chains it runs
        """What this process's chains read, from the owners of their tokens."""
        if fetched.send is None:
            return own
        rows = to_device([fetched.send], self.device)
        return self.engine.sequence.exchange(own[rows], fetched.sends, fetched.gets)

    def return_dealt(self) -> None:
        """The gradient of h^0 goes back to the owners of the tokens. Each has one chain, which one process has run."""
        if self.chain_dh0 is self.dh0:
            return
        fetched = self.deal.h
        rows = to_device([fetched.send], self.device)
        self.dh0[rows] = self.engine.sequence.exchange(self.chain_dh0, fetched.gets, fetched.sends)

    def combine(self, rows: slice) -> None:
        """h^0 = fc(g). Where the weights are shared, a process computes its columns of it and gets the others'."""
        g, h0 = self.read_features(rows), self.h0[rows]
        if self.tensor.size == 1:
            linear(g, self.weights.fc, h0)
            return
        part = h0.new_empty(len(h0), len(self.weights.fc))
        linear(g, self.weights.fc, part)
        parts = self.tensor.gather(part).view(self.tensor.size, *part.shape)
        h0.view(len(h0), self.tensor.size, -1).copy_(parts.transpose(0, 1))

    @property
    def own_columns(self) -> slice:
        """The columns of h^0 that this process's part of fc gives."""
        width = len(self.weights.fc)
        return slice(self.tensor.rank * width, (self.tensor.rank + 1) * width)

    def start_norm_sums(self) -> None:
        """Where the weights are shared, the norms before QKV's embedding half and before fc get from this process only what
        its part of those weights sends back. It is collected apart, to be summed when the pack is finished."""
        if self.tensor.size == 1:
            return
        whole = self.grads = self.whole_grads
        weights = whole.input_norm, *whole.feature_norms
        self.norm_sums = torch.zeros(sum(map(len, weights)), dtype=self.stats, device=self.device)
        input_norm, *feature_norms = self.norm_sums.split([len(x) for x in weights])
        self.grads = replace(whole, input_norm=input_norm, feature_norms=tuple(feature_norms))

    def finish_norm_sums(self) -> None:
        if self.tensor.size == 1:
            return
        weights = self.whole_grads.input_norm, *self.whole_grads.feature_norms
        sums = self.tensor.sum_(self.norm_sums).split([len(x) for x in weights])
        for weight, part in zip(weights, sums, strict=True):
            launch(weight.add_, part)

    def gather_keys(self) -> None:
        """K^0 and V^0 of all rows, from the processes that share them."""
        own = self.take("own_kv", 2 * self.share.slice_rows)  # Where a process has fewer rows, noise is sent with them.
        of_all = self.engine.sequence.gather(own).view(self.share.size, *own.shape)
        for kv, rows in self.slices_in(of_all):
            k, v = kv.chunk(2, 1)
            self.k0[rows] = k
            self.v0[rows] = v

    def slices_in(
        self,
        of_all: Tensor,  # [size, room, ...] what all processes have, each its own rows in order
    ) -> Iterator[tuple[Tensor, slice]]:
        """Each slice of the pack as it lies there, and its rows."""
        for rank, rows_of_one in enumerate(of_all):
            first = 0
            for start, end in replace(self.share, rank=rank).slices:
                yield rows_of_one[first : first + end - start], slice(start, end)
                first += end - start

    def scatter_key_gradients(self) -> tuple[Tensor, Tensor]:  # [n, Hkv, D] each
        """The gradients of this process's rows of K^0 and V^0, summed over what all have collected."""
        if self.share is None:
            return self.dk0, self.dv0
        kv_heads, dim = self.dk0.shape[1:]
        of_all = self.dk0.new_zeros(self.share.size, 2 * self.share.slice_rows, 2 * kv_heads, dim)
        for d_kv, rows in self.slices_in(of_all):
            dk, dv = d_kv.chunk(2, 1)
            dk.copy_(self.dk0[rows])
            dv.copy_(self.dv0[rows])
        return self.engine.sequence.sum_scatter(of_all.flatten(0, 1)).chunk(2, 1)

    def quantize_weights(self) -> None:
        """The weights of `fp8_shapes` in float8, scaled by output for the forward and by input for the backward."""
        room = Fp8Rows(self.take("fp8.q"), self.take("fp8.scale"))

        def in_fp8(name: str, weight: Tensor) -> Fp8Weight:
            by_out, by_in = (
                Fp8Rows(self.take(f"fp8.{name}.{side}", n), self.take(f"fp8.{name}.{side}_scale", n))
                for side, n in zip(("out", "in"), weight.shape, strict=True)
            )
            quantize_rows(weight, by_out)
            quantize_columns(weight, by_in)
            return Fp8Weight(by_out, by_in, room, self.dtype)

        w = self.weights
        self.weights = replace(
            w,
            qkv_hidden=in_fp8("qkv", w.qkv_hidden),
            out=in_fp8("out", w.out),
            gate_up=in_fp8("gate_up", w.gate_up),
            down=in_fp8("down", w.down),
            head=in_fp8("head", w.head),
        )

    def pack_blocks(self) -> list[slice]:
        """The pack's tokens, as many at a time as the pack's buffers have rows."""
        block = self.take.rows("pack.x")
        return [slice(first, min(first + block, self.num_own)) for first in range(0, self.num_own, block)]

    def read_features(self, rows: slice) -> Tensor:  # [b, 3*Ht] what fc reads
        g = self.features.g[rows].to(self.dtype)
        k = self.config.feature_norms
        if not k:
            return g
        out, r = self.take("pack.g", len(g)), self.take("pack.r_g", k * len(g))
        parts = zip(g.chunk(k, 1), self.weights.feature_norms, out.chunk(k, 1), r.chunk(k), strict=True)
        for part, weight, normed, r_part in parts:
            rms_norm(part, weight, self.eps, normed, r_part)
        return out

    def read_pack(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:  # [b, 2H] what K^0, V^0 read, 1/rms of its halves
        h0 = self.h0[rows]
        x = self.take("pack.x", len(h0))
        embedding, hidden = x.chunk(2, 1)
        r_e, r_h = self.take("pack.r", 2 * len(h0)).chunk(2)
        rms_norm(self.embedding, self.weights.input_norm, self.eps, embedding, r_e, rows=self.next_id[rows])
        rms_norm(h0, self.weights.hidden_norm, self.eps, hidden, r_h)
        return x, r_e, r_h

    # --- a chunk of chains ----------------------------------------------------------------------------------------------

    def run_in_turns(self, chunks: list[Chunk]) -> None:
        """Chunks of which each goes on until it has to wait for a sum over the parts of the weights, and then lets the next
        go on. They have buffers of their own, and add to the same gradients one after the other."""
        lanes = []
        for take, chunk in zip(self.engine.lanes, chunks, strict=False):
            lane = copy.copy(self)
            lane.take = take
            lanes.append(lane.parts_of_chunk(chunk))
        while lanes:
            lanes = [lane for lane in lanes if next(lane, "done") != "done"]

    def run_chunk(self, chunk: Chunk) -> None:
        self.run_in_turns([chunk])

    def summed(self, x: Tensor) -> Iterator[None]:
        """Adds up what the parts of the weights gave for x, in place. Meanwhile another chunk may go on."""
        if self.tensor.size > 1:
            under_way = self.tensor.start_sum(x)
            yield
            under_way.wait()

    def parts_of_chunk(self, chunk: Chunk) -> Iterator[None]:
        """All steps of the chunk's chains, their losses, and the backward of both. It stops wherever it would wait."""
        stack = Stack.take(self.take, chunk)
        d_context = None if self.grads is None else (self.dk0, self.dv0)
        attention = ChainAttention(
            self.take, self.k0, self.v0, chunk.row_pos, chunk.row_start, chunk.sizes, chunk.context, d_context
        )
        yield from self.forward_chains(chunk, stack, attention)
        dy = self.run_head(chunk, stack.y)
        if self.grads is not None:
            dqkv, d_embedding_qkv = yield from self.backward_chains(chunk, stack, attention, dy)
            self.add_weight_gradients(chunk, stack, attention, dy, dqkv, d_embedding_qkv)

    def qkv_width(self, i: int) -> int:
        """Columns of QKV that step i computes: at step 0 only Q, since K^0 and V^0 are there already."""
        return self.weights.qkv.shape[0] if i else self.q_width

    def forward_chains(self, chunk: Chunk, stack: Stack, attention: ChainAttention) -> Iterator[None]:
        """Steps 0..T-1 of every chain; `stack` keeps what the backward reads."""
        w, eps = self.weights, self.eps
        branch = self.take("branch", chunk.sizes[0])  # [M, H] what attention or the MLP adds to the residual stream

        # The embedding's half of QKV, once for each token, whatever number of rows reads it.
        rms_norm(self.embedding, w.input_norm, eps, stack.embedding, stack.r_embedding, rows=chunk.token_id)
        linear(stack.embedding, w.qkv_embedding, stack.embedding_qkv)

        for i, rows in enumerate(chunk.steps):
            n = chunk.sizes[i]
            # The hidden state is h^0 at step 0. Later it is the output of the step before, whose last addition, the MLP's
            # branch, is made in the same pass as the norm. Chains that end there get their output, too.
            if i == 0:
                h, h_rows = self.chain_h0, chunk.chain_pos
                rms_norm(h, w.hidden_norm, eps, stack.hn[rows], stack.r_hn[rows], rows=h_rows)
            else:
                before = chunk.steps[i - 1]
                h, h_rows, down = stack.y[before], None, branch[: chunk.sizes[i - 1]]
                if self.config.norm_output:
                    # The pass that adds the branch makes the normed state, which is then the hidden state itself.
                    fed, r_fed = self.take("fed", n), self.take("r_fed", n)
                    rms_norm(stack.h_mid[before], w.norm, eps, fed, r_fed, delta=down, total=h)
                    rms_norm(fed, w.hidden_norm, eps, stack.hn[rows], stack.r_hn[rows])
                    h = fed
                else:
                    rms_norm(stack.h_mid[before], w.hidden_norm, eps, stack.hn[rows], stack.r_hn[rows], delta=down, total=h)

            # Q, K, V: the hidden state's half, plus the embedding's, rotated and written where attention reads.
            width = self.qkv_width(i)
            z = stack.qkv.view(-1)[: n * width].view(n, width)
            linear(stack.hn[rows], w.qkv_hidden[:width], z)
            token_row, position = chunk.token_row[rows], chunk.row_position[rows]
            chain_qkv(z, stack.embedding_qkv, token_row, position, *self.rope, *attention.place(i))

            # Attention's branch is added in the same pass as the norm before the MLP.
            linear(attention.forward(i).flatten(1), w.out, branch[:n])
            yield from self.summed(branch[:n])
            rms_norm(
                h,
                w.post_norm,
                eps,
                stack.n2[rows],
                stack.r_n2[rows],
                rows=h_rows,
                delta=branch[:n],
                total=stack.h_mid[rows],
            )
            linear(stack.n2[rows], w.gate_up, stack.gate_up[rows])
            swiglu(stack.gate_up[rows], stack.act[rows])
            linear(stack.act[rows], w.down, branch[:n])
            yield from self.summed(branch[:n])

        # The last step's output has no norm behind it that would add its branch.
        rms_norm(stack.h_mid[rows], w.hidden_norm, eps, None, None, delta=branch[:n], total=stack.y[rows])

    def run_head(
        self,
        chunk: Chunk,
        y: Tensor,  # [R, H]
    ) -> Tensor:  # dy [R, H], zero rows where no logits are trained on
        """Losses of the chunk's head rows into the results; their gradient with respect to y."""
        w, take, grads = self.weights, self.take, self.grads

        # The teacher, once for each token row that some step of some chain is compared with.
        m = len(chunk.teacher_pos)
        rows = TeacherRows(*(take(f"teacher.{name}", m) for name in TeacherRows._fields))
        scratch = take("teacher.scratch" if "teacher.scratch" in take.table else "logits")
        rows = teacher(self.chain_f[chunk.teacher_pos], self.engine.head, (rows, scratch.view(-1)))
        first_column, shared = self.tensor.rank * self.config.draft_vocab_size, self.tensor.size > 1
        if shared:
            join_teacher_(rows, first_column, self.tensor)

        # A row is live where the target's choice is a token that the draft has; elsewhere its weight is 0.
        live = rows.in_draft[chunk.teacher_row]
        weight = self.engine.head_weights[chunk.head_step].to(self.stats) * live
        self.live[chunk.head_out], self.masked_in[chunk.head_out] = live, torch.ones_like(live)

        # The student's logits exist for `room` rows at a time; their gradient overwrites them and is used at once.
        dy = take("dy", len(y)).zero_()
        room = take.rows("logits")
        for first in range(0, len(live), room):
            part = slice(first, first + room)
            at, out = chunk.head_row[part], chunk.head_out[part]
            x, r, logits = take("x", len(at)), take("r_x", len(at)), take("logits", len(at))
            rms_norm(y, w.norm, self.eps, x, r, rows=at)
            dx, d_head = (None, None) if grads is None else (take("dx", len(at)), grads.head)
            teacher_row = chunk.teacher_row[part]
            args = x, w.head, rows, teacher_row, weight[part], dx, d_head, logits
            if shared:
                losses = split_kl_grad(*args, first_column, self.tensor, *self.engine.loss)
            else:
                losses = linear_kl_grad(*args, *self.engine.loss)
            self.loss[out], self.acceptance[out] = losses.loss.to(self.stats), losses.acceptance.to(self.stats)
            self.hit[out] = losses.hit
            if grads is not None:
                rms_norm_backward(dx, y, r, w.norm, dy, grads.norm, take("partial"), rows=at, x_rows=at)
        return dy

    def backward_chains(
        self,
        chunk: Chunk,
        stack: Stack,
        attention: ChainAttention,
        dy: Tensor,  # [R, H] the head's gradient; each step adds what the next one reads of y, through the same norm or not
    ) -> Generator[None, None, tuple[Tensor, Tensor]]:  # dQKV [R, W], and of the tokens' half [m, W] float32
        """The chains' backward, last step first; the gradients of h^0, K^0 and V^0 are collected for `finish_pack`."""
        w, grads, partial = self.weights, self.grads, self.take("partial")
        dqkv, dn = stack.qkv, self.take("dn", chunk.sizes[0])
        d_embedding_qkv = self.take("de", len(chunk.token_id)).zero_()
        for i in reversed(range(len(chunk.sizes))):
            rows, n = chunk.steps[i], chunk.sizes[i]
            dy_i, h_mid = dy[rows], stack.h_mid[rows]

            # The MLP's branch. Its residual passes dy on: the gradient of h_mid takes h_mid's place.
            linear_backward(dy_i, w.down, stack.act[rows])
            swiglu_backward_(stack.gate_up[rows], stack.act[rows])
            linear_backward(stack.gate_up[rows], w.gate_up, dn[:n])
            yield from self.summed(dn[:n])
            rms_norm_backward(dn[:n], h_mid, stack.r_n2[rows], w.post_norm, h_mid, grads.post_norm, partial, add=(dy_i,))
            d_mid = h_mid

            # Attention's branch, through the rotation to what QKV gave. Step 0's keys and values still collect gradients
            # from other chunks, so only its queries go on here.
            linear_backward(d_mid, w.out, attention.dout[rows].flatten(1))
            dq, dk, dv = attention.backward(i)
            width = self.qkv_width(i)
            dz, token_row, position = dqkv[rows, :width], chunk.token_row[rows], chunk.row_position[rows]
            chain_qkv_backward(dq, dk, dv, token_row, position, *self.rope, dz, d_embedding_qkv)
            linear_backward(dz, w.qkv_hidden[:width], dn[:n])
            yield from self.summed(dn[:n])

            # The norm of the hidden state: into h^0's gradient at step 0, else onto the output of the step before, with
            # norm_output through the norm between them. What that norm gave is computed again: to keep it for all rows
            # would cost a buffer of [R, H].
            r_hn = stack.r_hn[rows]
            if i == 0:
                at = chunk.chain_pos
                rms_norm_backward(
                    *(dn[:n], self.chain_h0, r_hn, w.hidden_norm, self.chain_dh0, grads.hidden_norm, partial),
                    rows=at,
                    x_rows=at,
                    add=(d_mid,),
                )
            else:
                before = slice(chunk.steps[i - 1].start, chunk.steps[i - 1].start + n)  # of the chains that went on
                y, dy_before = stack.y[before], dy[before]
                if self.config.norm_output:
                    fed, r_fed, d_fed = self.take("fed", n), self.take("r_fed", n), dn[:n]
                    rms_norm(y, w.norm, self.eps, fed, r_fed)
                    rms_norm_backward(d_fed, fed, r_hn, w.hidden_norm, d_fed, grads.hidden_norm, partial, add=(d_mid,))
                    rms_norm_backward(d_fed, y, r_fed, w.norm, dy_before, grads.norm, partial, add_dx=True)
                else:
                    rms_norm_backward(
                        *(dn[:n], y, r_hn, w.hidden_norm, dy_before, grads.hidden_norm, partial),
                        add_dx=True,
                        add=(d_mid,),
                    )
        attention.backward_context()
        return dqkv, d_embedding_qkv

    def add_weight_gradients(
        self,
        chunk: Chunk,
        stack: Stack,  # as the backward left it: h_mid and gate_up are gradients
        attention: ChainAttention,
        dy: Tensor,  # [R, H]
        dqkv: Tensor,  # [R, W], of step 0's rows the first q_width columns
        d_embedding_qkv: Tensor,  # [m, W] float32
    ) -> None:
        """One product per weight over the rows of all steps."""
        grads, m = self.grads, chunk.sizes[0]
        add_outer(grads.down, dy, stack.act)
        add_outer(grads.gate_up, stack.gate_up, stack.n2)
        add_outer(grads.out, stack.h_mid, attention.out.flatten(1))
        add_outer(grads.qkv_hidden[: self.q_width], dqkv[:m, : self.q_width], stack.hn[:m])
        add_outer(grads.qkv_hidden, dqkv[m:], stack.hn[m:])

        # The tokens' half, and through its norm the weight of that norm; the embedding itself is frozen.
        de_qkv, d_e = stack.embedding_qkv.copy_(d_embedding_qkv), self.take("d_e", len(chunk.token_id))
        add_outer(grads.qkv_embedding, de_qkv, stack.embedding)
        linear_backward(de_qkv, self.weights.qkv_embedding, d_e)
        rms_norm_backward(
            *(
                d_e,
                self.embedding,
                stack.r_embedding,
                self.weights.input_norm,
                None,
                grads.input_norm,
                self.take("partial"),
            ),
            x_rows=chunk.token_id,
        )

    # --- the backward of what every chain has read -----------------------------------------------------------------------

    def finish_pack(self) -> None:
        """From the collected gradients of K^0, V^0 and h^0 to those of QKV, the norms and fc, block by block."""
        w, grads, take = self.weights, self.grads, self.take
        partial = take("partial")
        dk0, dv0 = self.scatter_key_gradients()
        self.return_dealt()
        for rows in self.pack_blocks():
            # What `start_pack` computed on the way is computed again rather than kept for every token.
            x, r_e, r_h = self.read_pack(rows)
            dkv, dx, dh0 = take("pack.kv", len(x)), take("pack.dx", len(x)), self.dh0[rows]
            chain_qkv_backward(None, dk0[rows], dv0[rows], None, self.position[rows], *self.rope, dkv, None)
            add_outer(grads.qkv[self.q_width :], dkv, x)
            linear_backward(dkv, w.qkv[self.q_width :], dx)
            d_e, d_hn = dx.chunk(2, 1)
            if self.tensor.size > 1:
                d_hn = self.tensor.sum_(d_hn.contiguous())
            rms_norm_backward(d_hn, self.h0[rows], r_h, w.hidden_norm, dh0, grads.hidden_norm, partial, add_dx=True)
            ids = self.next_id[rows]
            rms_norm_backward(d_e, self.embedding, r_e, w.input_norm, None, grads.input_norm, partial, x_rows=ids)
            dh0 = dh0[:, self.own_columns]
            add_outer(grads.fc, dh0, self.read_features(rows))
            if self.config.feature_norms:
                self.finish_feature_norms(rows, dh0)
        self.finish_norm_sums()

    def finish_feature_norms(
        self,
        rows: slice,
        dh0: Tensor,  # [b, H], of this process's outputs of fc
    ) -> None:
        """The weight gradients of the norms before fc; the features themselves are the target's."""
        k = self.config.feature_norms
        dg, r_g = self.take("pack.dg", len(dh0)), self.take("pack.r_g", k * len(dh0)).chunk(k)
        linear_backward(dh0, self.weights.fc, dg)
        g = self.features.g[rows].to(self.dtype).chunk(k, 1)
        for j, d in enumerate(dg.chunk(k, 1)):
            weight, d_weight = self.weights.feature_norms[j], self.grads.feature_norms[j]
            rms_norm_backward(d, g[j], r_g[j], weight, None, d_weight, self.take("pack.partial"))


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
    engine = TTTEngine(draft, head, step_weights, kind, lk_scale, lk_decay, chunk_rows, fp8)
    grads = flat_gradients(draft.trainable())
    return engine.step(batch, features, grads), grads
