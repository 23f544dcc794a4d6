"""Which rows of a batch the TTT engine computes: planned on the host, from the loss mask alone.

Row (i, t) is TTT step i of the chain at token row t. It is trained on when x_{t+2+i} exists in the document and the loss
mask has it; it is computed when some (j, t), j >= i, is trained on. A chunk takes up to `chunk_rows` chains in order of t
and sorts them by depth, deepest first, so that step i's rows are a prefix of step i-1's and every step is a slice of the
stack. A chunk's rows read at most M + T - 1 tokens, and as many teacher rows: a token read by step i of one chain is read
by step 0 of another, save at the chunk's end.

Whether the target's choice is a draft-vocabulary token is known on the device only; such rows get weight 0 there.

The planning is NumPy's, on one thread: on PyTorch's threads its small steps wait for each other wherever a core is busy,
and then the GPU waits for them (LOG.md).

# N packed tokens, M chains of a chunk (M_i at step i), R = sum M_i stacked rows, K head rows, T TTT steps
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fastdraft.batch import Batch, PackShare, to_device


@dataclass(frozen=True)
class Chunk:
    """Chains to run together. Every tensor is int64; the rows of step 0, the first M, are the chains themselves."""

    sizes: tuple[int, ...]  # M_i
    context: tuple[int, int] | None  # tokens [doc_start, first) before the chunk that all rows see; None: no such tokens
    chain_pos: Tensor  # [M] row of each chain among the rows of h^0: its token row t, where this process has all of them
    row_pos: Tensor  # [R] the same for each stacked row; -1 is padding
    row_start: Tensor  # [R] first token row of its document
    row_position: Tensor  # [R] RoPE position, the step's shift included
    token_id: Tensor  # [m] tokens the rows read, one for each token row read
    token_row: Tensor  # [R] index into token_id
    head_row: Tensor  # [K] stacked rows whose logits are trained on, ascending
    head_step: Tensor  # [K]
    head_out: Tensor  # [K] i * N + t
    teacher_pos: Tensor  # [m'] rows of f whose target distribution is needed, ascending; token rows like those of h^0
    teacher_row: Tensor  # [K] index into teacher_pos

    @property
    def steps(self) -> list[slice]:
        """Each step's rows in the stack."""
        return [slice(sum(self.sizes[:i]), sum(self.sizes[: i + 1])) for i in range(len(self.sizes))]

    def to(self, device: torch.device) -> Chunk:
        """One copy, from pinned memory to a GPU, so that the host does not wait."""
        if device.type != "cuda":
            return self
        names = [field.name for field in fields(self) if field.name not in ("sizes", "context")]
        tensors = [getattr(self, name) for name in names]
        moved = to_device(tensors, device).split([len(x) for x in tensors])
        return Chunk(self.sizes, self.context, **dict(zip(names, moved, strict=True)))


def plan_chunks(
    batch: Batch,  # on the host
    ttt_length: int,
    chunk_rows: int,
    share: PackShare | None = None,  # the rows whose chains are planned, its halo as long as a chain; None: all
) -> Iterator[Chunk]:
    """The chains of a batch on the host, `chunk_rows` at a time. Nothing when nothing is trained on.

    With a share no chunk has chains of both slices: all of a chunk's chains then see the keys before its first one.
    """
    n = batch.num_tokens
    ids, start = batch.input_ids.numpy(), batch.doc_start.numpy()
    wanted, depth = _wanted(batch, ttt_length)
    chains = depth.nonzero()[0]
    for pos, h_shift, f_shift in _pieces(chains, chunk_rows, share):
        first, begin = int(pos[0]), int(start[pos[0]])
        context = (begin, first) if begin < first and begin == start[pos[-1]] else None
        pos = pos[np.argsort(-depth[pos], kind="stable")]
        deep = np.bincount(depth[pos], minlength=ttt_length + 1)[::-1].cumsum()[::-1]  # chains at least so deep
        sizes = tuple(int(m) for m in deep[1:] if m)
        row_pos, row_step = np.concatenate([pos[:m] for m in sizes]), np.repeat(np.arange(len(sizes)), sizes)
        row_start = start[row_pos]
        tokens, token_row = _distinct(row_pos + 1 + row_step)
        head_row = wanted[row_step, row_pos].nonzero()[0]
        head_pos, head_step = row_pos[head_row], row_step[head_row]
        teacher_pos, teacher_row = _distinct(head_pos + 1 + head_step)
        planned = (
            *(pos + h_shift, row_pos, row_start, row_pos - row_start + row_step, ids[tokens], token_row),
            *(head_row, head_step, head_step * n + head_pos, teacher_pos + f_shift, teacher_row),
        )
        yield Chunk(sizes, context, *map(torch.from_numpy, planned))


def has_chains(batch: Batch, ttt_length: int) -> bool:
    """Whether `plan_chunks` of the whole batch gives anything."""
    return bool(_wanted(batch, ttt_length)[1].any())


def _wanted(batch: Batch, ttt_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether (i, t) is trained on, as far as the mask says [T, N] bool, and how many steps each chain must run [N]."""
    n = batch.num_tokens
    mask, end = batch.loss_mask.numpy(), batch.doc_end.numpy()
    wanted = np.zeros((ttt_length, n), dtype=bool)
    depth = np.zeros(n, dtype=np.int64)
    for i in range(min(ttt_length, n - 2)):
        rows = slice(0, n - 2 - i)
        wanted[i, rows] = mask[2 + i :] & (np.arange(2 + i, n) < end[rows])
        depth[wanted[i]] = i + 1
    return wanted, depth


def _pieces(
    chains: np.ndarray,  # token rows, ascending
    chunk_rows: int,
    share: PackShare | None,
) -> Iterator[tuple[np.ndarray, int, int]]:
    """The chains of each chunk, and what is added to a token row for its row of h^0 and for its row of f."""
    slices = [(chains, 0, 0)]
    if share is not None:
        (a, b), (c, d) = share.slices
        low, high = (chains[(chains >= first) & (chains < end)] for first, end in share.slices)
        before = len(share.rows_and_halo) - (min(d + share.halo, share.num_tokens) - c)  # rows of f before the high slice
        slices = [(low, -a, -a), (high, b - a - c, before - c)]
    for mine, h_shift, f_shift in slices:
        for k in range(0, len(mine), chunk_rows):
            yield mine[k : k + chunk_rows], h_shift, f_shift


def pad_batch(batch: Batch, num_tokens: int) -> Batch:
    """The batch and one more document that nothing is trained on: `num_tokens` in all, more than the batch has."""
    more = num_tokens - batch.num_tokens
    ids, mask = (torch.from_numpy(np.pad(x.numpy(), (0, more))) for x in (batch.input_ids, batch.loss_mask))
    return Batch(ids, mask, (*batch.lengths, more))


def pad_chunk(
    chunk: Chunk,  # of a batch from `pad_batch`
    num_tokens: int,  # N of that batch
    ttt_length: int,
    chains: int,  # more than the chunk has
) -> Chunk:
    """The same work in a shape that `chains` alone sets: M = chains rows at each of T steps, T * M head rows, M + T tokens
    and teacher rows. Padding rows stand at the last token, which no chain owns, see nothing, read the last of the tokens,
    which no row reads (its gradient has one adder a launch), have head weight 0 (step T) and their results go behind those
    of all rows."""
    t, m = ttt_length, chains
    real = np.concatenate([np.arange(size) + i * m for i, size in enumerate(chunk.sizes)])

    def spread(x: Tensor, fill: int) -> Tensor:
        wide = np.full(t * m, fill)
        wide[real] = x.numpy()
        return torch.from_numpy(wide)

    def lengthened(x: Tensor, size: int, fill: int) -> Tensor:
        return torch.from_numpy(np.pad(x.numpy(), (0, size - len(x)), constant_values=fill))

    return Chunk(
        sizes=(m,) * t,
        context=None,
        chain_pos=lengthened(chunk.chain_pos, m, num_tokens - 1),
        row_pos=spread(chunk.row_pos, -1),
        row_start=spread(chunk.row_start, 0),
        row_position=spread(chunk.row_position, 0),
        token_id=lengthened(chunk.token_id, m + t, 0),
        token_row=spread(chunk.token_row, m + t - 1),
        head_row=lengthened(torch.from_numpy(real[chunk.head_row.numpy()]), t * m, t * m - 1),
        head_step=lengthened(chunk.head_step, t * m, t),
        head_out=lengthened(chunk.head_out, t * m, t * num_tokens),
        teacher_pos=lengthened(chunk.teacher_pos, m + t, 0),
        teacher_row=lengthened(chunk.teacher_row, t * m, 0),
    )


def _distinct(
    values: np.ndarray,  # [n] int64, n >= 1
) -> tuple[np.ndarray, np.ndarray]:  # distinct values ascending, and where each value lies among them [n]
    """np.unique without its sort: the values span little more than a chunk."""
    low = values.min()
    there = np.zeros(values.max() - low + 1, dtype=bool)
    there[values - low] = True
    return there.nonzero()[0] + low, there.cumsum()[values - low] - 1
