"""The engine for drafts so small that the host cannot launch as fast as the GPU computes: whole packs as CUDA graphs.

SmolLM2's draft takes 220 launches for 4 ms of work on 2048 tokens. A graph replays them all at once, but has one shape, so
a pack is padded to one of few (`pad_batch`, `pad_chunk`): tokens to a multiple of ROOM and BEHIND more, chains to four
numbers an octave (`padded_chains`), every step as many rows. Where depths are drawn, a step has room for four standard
deviations more rows than are expected of so many chains, and a pack that has more yet takes the shape in which all steps
are full. The padding changes nothing but the order of sums. A shape's first pack runs without a graph, its second is
recorded, and from then on only what is new is copied into place: indices, g and f. What is recorded is `Step`.

# N tokens of a padded pack, M chains, T TTT steps
"""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from fastdraft.batch import Batch, Features, Rows, copy_into
from fastdraft.kernels.jit import compile_together
from fastdraft.model.buffers import end_to_end
from fastdraft.model.eagle3.chunks import Chunk, pad_batch, pad_chunk, plan_chunks
from fastdraft.model.eagle3.engine import GATE_UP, QKV, Step, TTTEngine, pack_index
from fastdraft.model.graph import GraphPool, Replay

GRAPH_FLOPS = 2e13  # of a pack; from there on a GPU takes longer than the host does for its launches
# BEHIND a multiple of ROOM lies the padding's document, which every pack needs: full packs have one shape so, whether they
# lack a token or none.
ROOM, BEHIND, CHAINS, STEP_ROWS = 256, 64, 512, 128


class GraphEngine(TTTEngine):
    """TTTEngine, and packs of little work on a GPU as graphs. Weights and gradients must stay where they are."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.packs: dict[tuple[int, ...], _Pack] = {}
        self.places: dict[int, Features] = {}  # by N, where graphs read g and f
        self.pool, self.resized = GraphPool(), 0
        self.work = 6 * len(self.step_weights) * sum(p.numel() for p in self.draft.trainable().values())  # FLOPs a token

    def covers(self, num_tokens: int) -> bool:
        """Whether packs of so many tokens run as graphs: one chunk, little work, and no copies of weights in it."""
        chains, w = _padded(num_tokens - 1, CHAINS), dict(self.draft.named_parameters())  # the last two tokens have none
        small = chains <= self.chunk_rows and num_tokens * self.work <= GRAPH_FLOPS
        in_place = all(end_to_end([w[name] for name in names]) is not None for names in (QKV, GATE_UP))
        alone = self.tensor.size == self.sequence.size == 1  # what processes say to each other is not recorded
        return self.take.device.type == "cuda" and small and in_place and alone and not self.fp8

    def _run(self, batch: Batch, features: Features, grads: dict[str, Tensor] | None) -> Rows:
        if self.covers(batch.num_tokens):
            return self.run_padded(batch, features, grads)
        return super()._run(batch, features, grads)

    @torch.no_grad()
    def run_padded(self, batch: Batch, features: Features, grads: dict[str, Tensor] | None) -> Rows:
        self.check_ids(batch)
        n, t = _padded(batch.num_tokens, ROOM) + BEHIND, len(self.step_weights)
        padded, drawn = pad_batch(batch, n), None if grads is None else self.drawn(batch)
        if drawn is not None:
            drawn = np.pad(drawn, (0, n - len(drawn)))
        chunk = next(plan_chunks(padded, t, self.chunk_rows, drawn=drawn), None)
        if chunk is None:
            return super()._run(batch, features, grads)
        self.reserve(n)
        if self.take.resized != self.resized:  # the graphs know where the buffers were
            self.packs.clear()
            self.places.clear()
            self.resized = self.take.resized
        sizes = self.padded_sizes(chunk, drawn is not None)
        where = [p.data_ptr() for p in self.draft.parameters()] + [g.data_ptr() for g in (grads or {}).values()]
        pack = self.packs.setdefault((n, *sizes, *where), _Pack(self, n, grads))
        pack.fill(padded, pad_chunk(chunk, n, sizes), features)
        pack.run()
        return pack.rows(batch.num_tokens)

    def padded_sizes(self, chunk: Chunk, is_drawn: bool) -> tuple[int, ...]:  # rows of each of T steps
        """Of the shape in which a chunk runs, one of few. Its first and last step have a row of padding."""
        t = len(self.step_weights)
        m = min(padded_chains(max(chunk.sizes[0], len(chunk.token_id) - t) + 1), self.chunk_rows)
        if is_drawn:
            expected = m * self.depth.shares(t)
            room = expected + 4 * np.sqrt(expected * (1 - expected / m)) + 1
            sizes = (m, *(min(m, _padded(math.ceil(x), STEP_ROWS)) for x in room[1:]))
            real = (*chunk.sizes, *[0] * (t - len(chunk.sizes)))
            if all(size <= place for size, place in zip(real, sizes, strict=True)) and real[-1] < sizes[-1]:
                return sizes
        return (m,) * t


def padded_chains(m: int) -> int:
    """The next multiple of CHAINS; of a quarter of the power of two below m, where that is more."""
    return _padded(m, max(CHAINS, 2 ** (m.bit_length() - 3)))


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class _Pack:
    """A padded pack's inputs and results, and the graph of what lies between."""

    def __init__(self, engine: GraphEngine, num_tokens: int, grads: dict[str, Tensor] | None):
        self.engine, self.n, self.grads = engine, num_tokens, grads
        self.step: Step | None = None
        self.replay = Replay(engine.pool, engine.take.device)

    def fill(self, batch: Batch, chunk: Chunk, features: Features) -> None:
        """Copies a pack into place; the host does not wait."""
        device = self.engine.take.device
        named = {field.name: getattr(chunk, field.name) for field in fields(chunk)}
        tensors = {"index": pack_index(batch), **{name: x for name, x in named.items() if torch.is_tensor(x)}}
        if self.step is None:
            self.indices = torch.empty(sum(x.numel() for x in tensors.values()), dtype=torch.int64, device=device)
            parts = self.indices.split([x.numel() for x in tensors.values()])
            views = {name: part.view(x.shape) for (name, x), part in zip(tensors.items(), parts, strict=True)}
            self.index, self.chunk = views.pop("index"), Chunk(**named | views)
            fresh = Features(*(x.new_zeros(self.n, x.shape[1]) for x in (features.g, features.f)))
            self.features = self.engine.places.setdefault(self.n, fresh)
            self.step = Step(self.engine, self.n, self.features, self.grads)
        copy_into(self.indices, list(tensors.values()))
        for place, x in ((self.features.g, features.g), (self.features.f, features.f)):
            place[: len(x)] = x
            place[len(x) :] = 0

    def run(self) -> None:
        device, kind = self.engine.take.device, self.grads is not None
        if device.type == "cuda" and kind not in self.engine.compiled:
            compile_together(self.launch, device)
            self.engine.compiled.add(kind)
        self.replay.run(self.launch)

    def launch(self) -> None:
        for x in self.step.results:
            x.zero_()
        self.step.start_pack(self.index)
        self.step.run_chunk(self.chunk)
        if self.grads is not None:
            self.step.finish_pack()

    def rows(self, num_tokens: int) -> Rows:
        """Copies: the next pack of this shape writes in the same place."""
        t = len(self.engine.step_weights)
        return Rows(*(x[:-1].view(t, self.n)[:, :num_tokens].clone() for x in self.step.results))
