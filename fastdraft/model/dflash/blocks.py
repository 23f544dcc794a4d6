"""Where blocks begin, and which of their rows the engine computes: planned on the host, from tokens and masks alone.

An anchor is a token x_a, a >= 1, that is itself trained on and whose next token is: the last token that a server has
verified, where an answer is written. A document has as many as its loss mask has room for, up to a limit, drawn anew at
every optimizer step. The draw depends on the run's seed, the step and the document's own tokens and mask, so it is the same
whatever packs, chunks and processes the document meets, and a resumed run draws what the whole one drew.

A chunk takes some blocks in ascending order of their anchors. Its rows are block after block, B rows each. A slot is live
where its label exists (`loss.py`); blocks that run past their document's end keep all rows, because a server would have
them too. The head takes a part of the live rows at a time, with the teacher rows that the part needs.

Processes that share a pack's tokens share its blocks, too: each takes a run of them, all of about equal work. What a block
reads of other tokens, keys and values and the target's last states, comes from their owners, whoever runs it.

# N packed tokens, A anchors, C blocks of a chunk, B rows of a block, R = C * B, K live rows, T steps of a block
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from fastdraft.batch import Batch, to_device
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.draws import document_generator


def draw_anchors(
    batch: Batch,  # on the host
    limit: int,  # of anchors in a document
    seed: int,  # of the run
    step: int,  # of the optimizer, from 1; 0 for measuring
) -> Tensor:  # [A] int64 rows of the pack, ascending
    """Anchors of every document, uniform and without repeats among its places; as many as there are where they are few."""
    ids, mask = batch.input_ids.numpy(), batch.loss_mask.numpy()
    found, begin = [], 0
    for length in batch.lengths:
        part = slice(begin, begin + length)
        inside = mask[part]
        places = 1 + (inside[1:-1] & inside[2:]).nonzero()[0]
        if len(places) > limit:
            chosen = document_generator(ids[part], inside, seed, step)
            places = np.sort(chosen.choice(places, limit, replace=False, shuffle=False))
        found.append(begin + places)
        begin += length
    return torch.from_numpy(np.concatenate(found).astype(np.int64))


def deal_anchors(
    anchors: Tensor,  # [A] int64 ascending, of a batch on the host
    batch: Batch,
    config: DFlashConfig,
    size: int,
) -> list[Tensor]:  # of each of `size` processes, ascending
    """The anchors in runs of about equal work: a block's rows go through the same products, and see as many keys as lie
    before their anchor, or in the window of a sliding layer. Every process computes the same."""
    c, trained = config, config.num_parameters()["trainable"]
    products = c.block_size * 6 * trained + c.num_drafted * 4 * c.hidden_size * c.vocab_size
    pair = 14 * c.block_size * c.num_attention_heads * c.head_dim  # FLOPs of a key in one layer, forward and backward
    before = (anchors - batch.doc_start[anchors]).numpy()
    cost = np.full(len(before), products, dtype=np.float64)
    for kind in c.layer_types:
        cost += pair * (np.minimum(before, c.sliding_window) if kind == "sliding_attention" else before)
    worker = np.minimum((cost.cumsum() - cost / 2) / max(cost.sum(), 1) * size, size - 1).astype(np.int64)
    return [anchors[worker == rank] for rank in range(size)]


def teacher_rows(
    anchors: Tensor,  # [A] int64 ascending, of a batch on the host
    batch: Batch,
    steps: int,  # T
) -> Tensor:  # [m] int64 ascending
    """Rows of the pack whose target distribution some slot of a block may be compared with: those of tokens whose
    successor is in the document."""
    at = anchors.numpy()[:, None] + np.arange(steps)
    return torch.from_numpy(np.unique(at[at + 1 < batch.doc_end.numpy()[anchors.numpy()][:, None]]))


@dataclass(frozen=True)
class Part:
    """Live rows that go through the head together, and the teacher rows that they are compared with."""

    rows: slice  # of K
    teacher: slice  # of m


@dataclass(frozen=True)
class BlockChunk:
    """Blocks to run together. Every tensor is int64; row k of block c is row c * B + k."""

    parts: tuple[Part, ...]
    context: slice  # rows of the pack that some block sees
    first_keys: int  # rows of the context before the first anchor, which all blocks of its document see
    first_rows: int  # how many of the rows are that document's: the first ones
    first_live: int  # how many of the live rows
    anchor: Tensor  # [C] row of the pack
    start: Tensor  # [C] first row of its document
    row_position: Tensor  # [R] RoPE position
    row_id: Tensor  # [R] token that the row reads
    row_read: Tensor  # [R] index of that token in read_id
    read_id: Tensor  # [C + 1] tokens that rows read: each block's own, and last the mask token
    head_row: Tensor  # [K] live rows, ascending
    head_position: Tensor  # [K] their RoPE positions
    head_step: Tensor  # [K]
    head_block: Tensor  # [K] block of the row
    head_out: Tensor  # [K] step * N + anchor
    label: Tensor  # [K] token
    previous: Tensor  # [K] the token before the label
    teacher_pos: Tensor  # [m] rows of f, as planned those of the pack, that the teacher reads, ascending in each part
    teacher_row: Tensor  # [K] index into the part's teacher rows

    def to(self, device: torch.device) -> BlockChunk:
        """One copy, from pinned memory to a GPU, so that the host does not wait."""
        if device.type != "cuda":
            return self
        names = [field.name for field in fields(self) if isinstance(getattr(self, field.name), Tensor)]
        tensors = [getattr(self, name) for name in names]
        moved = to_device(tensors, device).split([len(x) for x in tensors])
        return replace(self, **dict(zip(names, moved, strict=True)))


def plan_blocks(
    batch: Batch,  # on the host
    anchors: Tensor,  # [A] int64 ascending, on the host
    config: DFlashConfig,
    chunk_blocks: int,
    room: int,  # live rows that the head takes at a time
) -> Iterator[BlockChunk]:
    """The blocks at these anchors, `chunk_blocks` at a time, without chunks that have no live row."""
    n, rows, steps = batch.num_tokens, config.block_size, config.num_drafted
    ids, mask, start, end = (x.numpy() for x in (batch.input_ids, batch.loss_mask, batch.doc_start, batch.doc_end))
    for first in range(0, len(anchors), chunk_blocks):
        anchor = anchors[first : first + chunk_blocks].numpy()
        label_at = anchor[:, None] + 1 + np.arange(steps)  # [C, T]
        inside = label_at < end[anchor][:, None]
        live = inside & mask[np.where(inside, label_at, 0)]
        if config.live_prefix:
            live = np.logical_and.accumulate(live, axis=1)
        block, step = live.nonzero()
        if not len(block):
            continue
        position = anchor - start[anchor]
        row_position = (position[:, None] + np.arange(rows)).ravel()
        head_row = block * rows + step + config.first_slot
        parts, teacher_pos, teacher_row, taken = [], [], [], 0
        for begin in range(0, len(block), room):
            part = slice(begin, min(begin + room, len(block)))
            distinct, index = np.unique(label_at[block[part], step[part]] - 1, return_inverse=True)
            parts.append(Part(part, slice(taken, taken + len(distinct))))
            teacher_pos.append(distinct)
            teacher_row.append(index)
            taken += len(distinct)
        read_id = np.append(ids[anchor], config.mask_token_id)
        row_read = np.full((len(anchor), rows), len(anchor))
        row_read[:, 0] = np.arange(len(anchor))
        row_read = row_read.ravel()
        # Anchors ascend, so the first document begins first.
        context = slice(int(start[anchor[0]]), int(anchor[-1]))
        first_blocks = int((start[anchor] == context.start).sum())
        of_first = int(anchor[0]) - context.start, first_blocks * rows, int((block < first_blocks).sum())
        planned = (
            *(anchor, start[anchor], row_position, read_id[row_read], row_read, read_id),
            *(head_row, row_position[head_row], step, block, step * n + anchor[block]),
            *(ids[label_at[block, step]], ids[label_at[block, step] - 1]),
            *(np.concatenate(teacher_pos), np.concatenate(teacher_row)),
        )
        tensors = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)) for x in planned)
        yield BlockChunk(tuple(parts), context, *of_first, *tensors)


def pad_blocks(
    chunk: BlockChunk,  # on the host, of a batch whose last token belongs to no real document
    config: DFlashConfig,
    num_tokens: int,  # N of that batch
    blocks: int,  # C
    live: int,  # K
    teacher: int,  # rows of each part; 0 where no teacher is wanted
    room: int,  # live rows that the head takes at a time, as `plan_blocks` was told
) -> BlockChunk:
    """The same work in a shape that the four numbers set. Blocks of padding follow the real ones. They stand at the batch's
    last token, as a document of it alone: they see no context, and no real block sees them. The live rows that are missing
    are theirs, so `blocks` must leave them room. Their step is T, which has weight 0, and they report at the last token."""
    b, t, last = config.block_size, config.num_drafted, num_tokens - 1
    here, there = len(chunk.anchor), len(chunk.head_row)
    assert live - there <= (blocks - here) * t, "the live rows of padding need blocks of padding"
    more = np.arange(live - there)
    slot = more % t + config.first_slot
    read_id = np.concatenate([chunk.read_id[:-1].numpy(), np.full(blocks - here + 1, config.mask_token_id)])
    row_read = np.full((blocks, b), blocks)
    row_read[:, 0] = np.arange(blocks)
    row_read = row_read.ravel()

    def longer(x: Tensor, fill: int | np.ndarray, size: int) -> np.ndarray:
        return np.concatenate([x.numpy(), np.broadcast_to(fill, size - len(x))])

    parts, teacher_pos = [], [np.empty(0, np.int64)]
    for number, begin in enumerate(range(0, live, room)):
        parts.append(Part(slice(begin, min(begin + room, live)), slice(number * teacher, (number + 1) * teacher)))
        if teacher:
            real = chunk.parts[number].teacher if number < len(chunk.parts) else slice(0, 0)
            teacher_pos.append(longer(chunk.teacher_pos[real], last, teacher))
    planned = {
        "anchor": longer(chunk.anchor, last, blocks),
        "start": longer(chunk.start, last, blocks),
        "row_position": longer(chunk.row_position, np.tile(np.arange(b), blocks - here), blocks * b),
        "row_id": read_id[row_read],
        "row_read": row_read,
        "read_id": read_id,
        "head_row": longer(chunk.head_row, (here + more // t) * b + slot, live),
        "head_position": longer(chunk.head_position, slot, live),
        "head_step": longer(chunk.head_step, t, live),
        "head_block": longer(chunk.head_block, here + more // t, live),
        "head_out": longer(chunk.head_out, last, live),
        "label": longer(chunk.label, 0, live),
        "previous": longer(chunk.previous, 0, live),
        "teacher_pos": np.concatenate(teacher_pos),
        "teacher_row": longer(chunk.teacher_row, 0, live),
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)) for name, x in planned.items()}
    return BlockChunk(tuple(parts), slice(0, num_tokens), 0, 0, 0, **tensors)
