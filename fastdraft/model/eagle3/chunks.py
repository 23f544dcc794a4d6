"""Which rows of a batch the TTT engine computes: planned on the host, from the loss mask and the drawn depths alone.

Row (i, t) is TTT step i of the chain at token row t. It is trained on when x_{t+2+i} exists in the document and the loss
mask has it, and, where depths are drawn (`SampledDepth`), the chain's is more than i; it is computed when some (j, t),
j >= i, is trained on. A chunk takes up to `chunk_rows` chains in order of t and sorts them by depth, deepest first: step
i's rows are a prefix of step i-1's and every step is a slice of the stack. A chunk's rows read at most `chunk_rows` + T - 1
tokens, and as many teacher rows. Where all steps are run, a token read by step i of one chain is read by step 0 of another,
save at the chunk's end. Drawn depths may leave that other chain out, so there a chunk also ends where it has read enough.

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
from fastdraft.model.draws import token_uniforms


@dataclass(frozen=True)
class SampledDepth:
    """How many steps of a chain are trained where `sampled_depth` is p < 1: step i is run with probability p^i, and its
    loss weighs 1 / p^i more. A row's loss does not depend on which other rows are run, so the gradient is expected to be
    that of all rows, for sum_i p^i of the work of T. What is measured on held-out data is never sampled."""

    p: float  # a chain that ran a step runs the next one with this probability, 0 < p < 1
    seed: int  # of the run

    def shares(self, ttt_length: int) -> np.ndarray:  # [T] float64, of the chains that run each step
        return np.cumprod([1.0] + [self.p] * (ttt_length - 1))

    def weigh(
        self,
        step_weights: Tensor,  # [T]
    ) -> Tensor:  # [T] of the rows that are run
        return step_weights / torch.from_numpy(self.shares(len(step_weights))).to(step_weights)

    def draw(
        self,
        batch: Batch,  # on the host
        step: int,  # of the optimizer, from 1
        ttt_length: int,
    ) -> np.ndarray:  # [N] int64, steps that the chain of each token runs, 1..T
        """One number u of (0, 1] for each token of a document; step i is run where u <= p^i."""
        u = token_uniforms(batch, self.seed, step)
        return ttt_length - np.searchsorted(self.shares(ttt_length)[::-1], u, side="left")


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
    deal: Deal | None = None,  # of `deal_chains`: the chains of this process; None: all
    drawn: np.ndarray | None = None,  # [N] int64, steps that each chain is to run; None: all
) -> Iterator[Chunk]:
    """The chains of a batch on the host, `chunk_rows` at a time. Nothing when nothing is trained on."""
    n = batch.num_tokens
    ids, start = batch.input_ids.numpy(), batch.doc_start.numpy()
    wanted, depth = _wanted(batch, ttt_length, drawn)
    pieces = [depth.nonzero()[0]] if deal is None else deal.pieces
    for pos in (part for piece in pieces for part in _cut(piece, depth, chunk_rows, drawn is not None)):
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
        if deal is not None:
            teacher_pos = deal.f.place[teacher_pos]
        chain_pos = pos if deal is None else deal.h.place[pos]
        planned = (
            *(chain_pos, row_pos, row_start, row_pos - row_start + row_step, ids[tokens], token_row),
            *(head_row, head_step, head_step * n + head_pos, teacher_pos, teacher_row),
        )
        yield Chunk(sizes, context, *map(torch.from_numpy, planned))


def _cut(
    chains: np.ndarray,  # [m] token rows, ascending
    depth: np.ndarray,  # [N] by token row
    chunk_rows: int,
    counts_tokens: bool,
) -> Iterator[np.ndarray]:
    """The chains of each chunk: `chunk_rows` of them, or, where tokens count, fewer that read `chunk_rows` tokens which no
    chain before has read, beside up to T - 1 which one has."""
    if not counts_tokens:
        yield from (chains[k : k + chunk_rows] for k in range(0, len(chains), chunk_rows))
        return
    end = chains + depth[chains]  # the last token of each
    read_before = np.maximum.accumulate(np.concatenate([[-1], end[:-1]]))
    read = np.maximum(end - np.maximum(chains, read_before), 0).cumsum()
    first = 0
    while first < len(chains):
        known = read[first - 1] if first else 0
        last = min(first + chunk_rows, int(np.searchsorted(read, known + chunk_rows, side="right")))
        last = max(last, first + 1)
        yield chains[first:last]
        first = last


def _wanted(batch: Batch, ttt_length: int, drawn: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Whether (i, t) is trained on, as far as the mask and the drawn depths say [T, N] bool, and how many steps each chain
    must run [N]."""
    n = batch.num_tokens
    mask, end = batch.loss_mask.numpy(), batch.doc_end.numpy()
    wanted = np.zeros((ttt_length, n), dtype=bool)
    depth = np.zeros(n, dtype=np.int64)
    for i in range(min(ttt_length, n - 2)):
        rows = slice(0, n - 2 - i)
        wanted[i, rows] = mask[2 + i :] & (np.arange(2 + i, n) < end[rows])
        if drawn is not None:
            wanted[i] &= drawn > i
        depth[wanted[i]] = i + 1
    return wanted, depth


@dataclass(frozen=True)
class Fetched:
    """The rows of h^0 or f that a process's chains read, and how it comes by them."""

    place: np.ndarray  # [N] int64 by token row, where the row lies among those that the process has or gets
    send: Tensor | None = None  # [s] int64 rows of the process's own, by who needs them; None: nothing goes to others
    sends: tuple[int, ...] = ()  # how many go to each process
    gets: tuple[int, ...] = ()  # how many come from each


@dataclass(frozen=True)
class Deal:
    """The chains that one of several processes runs, of a pack whose rows they share."""

    pieces: tuple[np.ndarray, ...]  # token rows, ascending; what a chunk's rows all see is large where they lie together
    h: Fetched  # rows of h^0, and of its gradient, where the way is back
    f: Fetched


# Chains go to other processes where the one with the most would have so many times the mean's work.
UNEVEN = 1.1


def deal_chains(
    batch: Batch,  # on the host
    ttt_length: int,
    share: PackShare,  # its halo as long as a chain
    pair_cost: float,  # of a key that a row sees, where a row's other work costs 1
    drawn: np.ndarray | None = None,  # [N] int64, steps that each chain is to run; None: all
) -> Deal | None:  # None: nothing is trained on
    """Each chain to the owner of its token; or, where a mask makes that uneven, to the processes in parts of equal cost.

    Every process computes the same deal. h^0 and f of a token then go from its owner to who runs its chain.
    """
    wanted, depth = _wanted(batch, ttt_length, drawn)
    chains = depth.nonzero()[0]
    if not len(chains):
        return None
    own_place, own_f_place = (np.zeros(batch.num_tokens, dtype=np.int64) for _ in range(2))
    own_place[share.rows.numpy()] = np.arange(len(share.rows))
    own_f_place[share.rows_and_halo.numpy()] = np.arange(len(share.rows_and_halo))

    slice_of = np.arange(batch.num_tokens) // share.slice_rows
    owner = np.minimum(slice_of, 2 * share.size - 1 - slice_of)
    cost = depth[chains] * (1 + pair_cost * (chains - batch.doc_start.numpy()[chains]))
    of_each = np.bincount(owner[chains], weights=cost, minlength=share.size)
    if of_each.max() <= UNEVEN * of_each.mean():
        pieces = tuple(chains[(chains >= first) & (chains < end)] for first, end in share.slices)
        return Deal(pieces, Fetched(own_place), Fetched(own_f_place))

    worker = np.minimum((cost.cumsum() - cost / 2) / cost.sum() * share.size, share.size - 1).astype(np.int64)
    of_workers = [chains[worker == rank] for rank in range(share.size)]
    teachers = []
    for mine in of_workers:
        step, of = wanted[:, mine].nonzero()
        teachers.append(np.unique(mine[of] + 1 + step))
    return Deal(
        (of_workers[share.rank],),
        _fetched(of_workers, owner, own_place, share.rank),
        _fetched(teachers, owner, own_f_place, share.rank),
    )


def _fetched(
    rows: list[np.ndarray],  # token rows that each process needs
    owner: np.ndarray,  # [N] who has a token row
    own_place: np.ndarray,  # [N] where it lies there, of this process's rows
    rank: int,
) -> Fetched:
    """What every process sends to every other, as one of them sees it. Rows come by owner, and ascend within each."""
    sent = [of_one[owner[of_one] == rank] for of_one in rows]
    got = rows[rank][np.argsort(owner[rows[rank]], kind="stable")]
    place = np.zeros(len(owner), dtype=np.int64)
    place[got] = np.arange(len(got))
    gets = np.bincount(owner[got], minlength=len(rows))
    return Fetched(place, torch.from_numpy(own_place[np.concatenate(sent)]), tuple(map(len, sent)), tuple(gets.tolist()))


def pad_batch(batch: Batch, num_tokens: int) -> Batch:
    """The batch and one more document that nothing is trained on: `num_tokens` in all, more than the batch has."""
    more = num_tokens - batch.num_tokens
    ids, mask = (torch.from_numpy(np.pad(x.numpy(), (0, more))) for x in (batch.input_ids, batch.loss_mask))
    return Batch(ids, mask, (*batch.lengths, more))


def pad_chunk(
    chunk: Chunk,  # of a batch from `pad_batch`
    num_tokens: int,  # N of that batch
    sizes: tuple[int, ...],  # rows of each of T steps: not growing, none less than the chunk has, first and last more
) -> Chunk:
    """The same work in a shape that `sizes` alone set: R = sum(sizes) rows, as many head rows, and M + T tokens and teacher
    rows, where M = sizes[0]. Padding rows stand at the last token, which no chain owns, see nothing, read the last of the
    tokens, which no row reads (its gradient has one adder a launch), have head weight 0 (step T) and their results go
    behind those of all rows."""
    t, m, total = len(sizes), sizes[0], sum(sizes)
    first = np.cumsum(sizes) - sizes
    real = np.concatenate([np.arange(size) + first[i] for i, size in enumerate(chunk.sizes)])

    def spread(x: Tensor, fill: int) -> Tensor:
        wide = np.full(total, fill)
        wide[real] = x.numpy()
        return torch.from_numpy(wide)

    def lengthened(x: Tensor, size: int, fill: int) -> Tensor:
        return torch.from_numpy(np.pad(x.numpy(), (0, size - len(x)), constant_values=fill))

    return Chunk(
        sizes=sizes,
        context=None,
        chain_pos=lengthened(chunk.chain_pos, m, num_tokens - 1),
        row_pos=spread(chunk.row_pos, -1),
        row_start=spread(chunk.row_start, 0),
        row_position=spread(chunk.row_position, 0),
        token_id=lengthened(chunk.token_id, m + t, 0),
        token_row=spread(chunk.token_row, m + t - 1),
        head_row=lengthened(torch.from_numpy(real[chunk.head_row.numpy()]), total, total - 1),
        head_step=lengthened(chunk.head_step, total, t),
        head_out=lengthened(chunk.head_out, total, t * num_tokens),
        teacher_pos=lengthened(chunk.teacher_pos, m + t, 0),
        teacher_row=lengthened(chunk.teacher_row, total, 0),
    )


def _distinct(
    values: np.ndarray,  # [n] int64, n >= 1
) -> tuple[np.ndarray, np.ndarray]:  # distinct values ascending, and where each value lies among them [n]
    """np.unique without its sort: the values span little more than a chunk."""
    low = values.min()
    there = np.zeros(values.max() - low + 1, dtype=bool)
    there[values - low] = True
    return there.nonzero()[0] + low, there.cumsum()[values - low] - 1
