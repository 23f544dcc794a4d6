"""The block engine for drafts so small that the host cannot launch as fast as the GPU computes: chunks as CUDA graphs.

A graph has one shape. So a pack's tokens are padded as its buffers are, to a multiple of 1024, and by SPARE, among
which is the token where padding stands. Its blocks are dealt evenly to as few chunks as hold them, and each chunk is
padded (`pad_blocks`) to one of few shapes: blocks in sixteenths of the largest chunk, live rows in thirty-seconds, a
part's teacher rows to a multiple of TEACHER. Packs of 8192 tokens of chats have 16 such shapes, 23 with a teacher, and
4 % more work by count. Padding has weight 0 and is seen by nothing, so it changes nothing but the order of sums. What
is done for the pack's context before and after its chunks are two graphs of their own.

A graph's first run is without one, its second is recorded, and from then on only what is new is copied into place: indices,
g and f. What is recorded is `BlockStep`.

# N tokens of a padded pack, C blocks of a padded chunk, K its live rows
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from fastdraft.batch import Batch, Features, Rows, copy_into
from fastdraft.kernels.jit import compile_together
from fastdraft.model.buffers import end_to_end
from fastdraft.model.dflash import memory
from fastdraft.model.dflash.blocks import BlockChunk, pad_blocks, plan_blocks
from fastdraft.model.dflash.engine import BlockEngine, BlockStep
from fastdraft.model.graph import GraphPool, Replay

GRAPH_FLOPS = 1e13  # of a chunk; from there on a GPU takes longer than the host does for its launches
SPARE = 64
TEACHER = 1024


class GraphBlockEngine(BlockEngine):
    """BlockEngine, and chunks of little work on a GPU as graphs. Weights and gradients must stay where they are."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        c = self.config
        self.packs: dict[tuple[int, ...], _Pack] = {}
        self.places: dict[tuple[int, bool], Features] = {}  # by N and whether a teacher is wanted, where graphs read g, f
        self.pool, self.resized = GraphPool(), 0
        layers = sum(p.numel() for name, p in self.draft.trainable().items() if name.startswith("layers."))
        self.work = self.chunk_blocks * c.block_size * (6 * layers + 4 * c.vocab_size * c.hidden_size)  # FLOPs of a chunk

    def covers(self) -> bool:
        """Whether chunks run as graphs: little work, room for padding, no copies of weights in it, and no other process
        that shares a pack's tokens, for what processes say to each other is not recorded."""
        named = dict(self.draft.named_parameters())
        parts = ([f"self_attn.{x}_proj.weight" for x in "qkv"], [f"mlp.{x}_proj.weight" for x in ("gate", "up")])
        in_place = all(
            end_to_end([named[f"layers.{layer}.{name}"] for name in names]) is not None
            for layer in range(self.config.num_hidden_layers)
            for names in parts
        )
        fits = self.chunk_blocks > 1 and self.work <= GRAPH_FLOPS and self.sequence.size == 1
        return self.take.device.type == "cuda" and fits and in_place

    def run(
        self,
        batch: Batch,
        features: Features,
        anchors: Tensor,  # [A] int64 ascending, on the host
        grads: dict[str, Tensor] | None,
    ) -> Rows:
        if len(anchors) and self.covers():
            return self.run_padded(batch, features, anchors, grads)
        return super().run(batch, features, anchors, grads)

    @torch.no_grad()
    def run_padded(self, batch: Batch, features: Features, anchors: Tensor, grads: dict[str, Tensor] | None) -> Rows:
        self.check_ids(batch)
        with_teacher = self.wants_teacher(features, grads is not None)
        n = memory.room_for(batch.num_tokens) + SPARE
        self.reserve(n, with_teacher)
        if self.take.resized != self.resized:  # the graphs know where the buffers were
            self.packs.clear()
            self.places.clear()
            self.resized = self.take.resized
        where = [p.data_ptr() for p in self.draft.parameters()] + [g.data_ptr() for g in (grads or {}).values()]
        key = (n, with_teacher, *where)
        if key not in self.packs:
            self.packs[key] = _Pack(self, n, features, grads, with_teacher)
        pack = self.packs[key]
        pack.run(_with_padding(batch, n), features, anchors, self.even_chunks(anchors))
        rows = pack.step.results(batch.num_tokens)
        return replace(rows, **{field.name: getattr(rows, field.name).clone() for field in fields(rows)})

    def even_chunks(self, anchors: Tensor) -> int:
        """Blocks of a chunk, so that all of a pack's chunks are about as large and leave room for padding."""
        most = self.chunk_blocks - self.share(32)
        return -(-len(anchors) // -(-len(anchors) // most))

    def share(self, parts: int) -> int:
        """Blocks of a part of the largest chunk."""
        return max(self.chunk_blocks // parts, 1)

    def padded(self, chunk: BlockChunk, num_tokens: int, with_teacher: bool) -> BlockChunk:
        """The chunk in one of few shapes."""
        t, room = self.config.num_drafted, memory.head_room(self.config, self.sizes[0])
        live = _multiple(len(chunk.head_row), self.share(32) * t)
        blocks = len(chunk.anchor) + -(-(live - len(chunk.head_row)) // t)
        blocks = min(_multiple(blocks, self.share(16)), self.chunk_blocks)
        most = max(part.teacher.stop - part.teacher.start for part in chunk.parts)
        teacher = min(_multiple(most, TEACHER), room, self.take.rows("teacher.logits")) if with_teacher else 0
        return pad_blocks(chunk, self.config, num_tokens, blocks, live, teacher, room)


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def _with_padding(batch: Batch, num_tokens: int) -> Batch:
    """The batch and one more document, of which nothing is trained on."""
    more = num_tokens - batch.num_tokens
    ids, mask = (torch.from_numpy(np.pad(x.numpy(), (0, more))) for x in (batch.input_ids, batch.loss_mask))
    return Batch(ids, mask, (*batch.lengths, more))


class _Chunk:
    """Where the indices of chunks of one shape lie, and what runs with them."""

    def __init__(self, pack: _Pack, chunk: BlockChunk):
        sizes = {name: len(x) for name, x in _indices(chunk).items()}
        self.indices = torch.empty(sum(sizes.values()), dtype=torch.int64, device=pack.engine.take.device)
        views = self.indices.split([*sizes.values()])
        self.chunk = replace(chunk, **dict(zip(sizes, views, strict=True)))
        self.pack, self.replay = pack, Replay(pack.engine.pool, pack.engine.take.device)

    def fill(self, chunk: BlockChunk) -> None:
        """Copies a chunk into place; the host does not wait."""
        copy_into(self.indices, [*_indices(chunk).values()])

    def run(self) -> None:
        self.replay.run(self.launch)

    def launch(self) -> None:
        self.pack.step.run_chunk(self.chunk)


def _indices(chunk: BlockChunk) -> dict[str, Tensor]:
    named = {field.name: getattr(chunk, field.name) for field in fields(chunk)}
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}


class _Pack:
    """A padded pack's inputs and results, and the graphs of what lies between."""

    def __init__(
        self,
        engine: GraphBlockEngine,
        num_tokens: int,
        features: Features,
        grads: dict[str, Tensor] | None,
        with_teacher: bool,
    ):
        self.engine, self.n, self.with_teacher = engine, num_tokens, with_teacher
        place = num_tokens, with_teacher
        if place not in engine.places:
            wanted = (features.g, features.f if with_teacher else None)
            engine.places[place] = Features(*(x if x is None else x.new_zeros(num_tokens, x.shape[1]) for x in wanted))
        self.features = engine.places[place]
        self.step = BlockStep(engine, num_tokens, self.features, grads, with_teacher)
        self.position = torch.empty(num_tokens, dtype=torch.int64, device=engine.take.device)
        self.chunks: dict[tuple[int, ...], _Chunk] = {}
        self.begin, self.finish = (Replay(engine.pool, engine.take.device) for _ in range(2))

    def run(self, batch: Batch, features: Features, anchors: Tensor, chunk_blocks: int) -> None:
        """The step of a padded batch, whose features have rows for its real tokens."""
        engine = self.engine
        copy_into(self.position, [batch.positions])
        for place, x in ((self.features.g, features.g), (self.features.f, features.f)):
            if place is not None:
                place[: len(x)] = x
                place[len(x) :] = 0
        plan = plan_blocks(batch, anchors, engine.config, chunk_blocks, memory.head_room(engine.config, engine.sizes[0]))
        started = False
        for planned in plan:
            chunk = engine.padded(planned, self.n, self.with_teacher)
            shape = len(chunk.anchor), len(chunk.head_row), len(chunk.teacher_pos)
            if shape not in self.chunks:
                self.chunks[shape] = _Chunk(self, chunk)
            place = self.chunks[shape]
            place.fill(chunk)
            if not started:
                self.compile(place)
                self.begin.run(self.start_pack)
                started = True
            place.run()
        if started:
            self.finish.run(self.finish_pack)

    def compile(self, place: _Chunk) -> None:
        """Once for each kind of step, all its kernels together."""
        kind, device = (self.step.grads is not None, self.with_teacher), self.engine.take.device
        if device.type != "cuda" or kind in self.engine.compiled:
            return

        def launch() -> None:
            self.start_pack()
            place.launch()
            self.finish_pack()

        compile_together(launch, device)
        self.engine.compiled.add(kind)

    def start_pack(self) -> None:
        for x in (self.step.loss, self.step.acceptance, self.step.hit, self.step.live):
            x.zero_()
        self.step.start_pack(self.position)

    def finish_pack(self) -> None:
        if self.step.grads is not None:
            self.step.finish_pack()
