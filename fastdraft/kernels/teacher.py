"""The target's head over a chunk of rows, with nothing of size [n, V].

For rows f [n, Ht] and the head's logits t = cap(scale * (f W^T + b)), cap(x) = softcap * tanh(x / softcap), t [n, V]:

    logits        t over the Vd draft-vocabulary tokens       [n, Vd], kept: all T steps of a chunk read it
    lse_draft     log sum_{v in draft vocabulary} exp t_v     [n] float32
    lse_full      log sum_v exp t_v                           [n] float32
    argmax        the lowest target id with the largest t     [n] int64, and its draft id or -1

`permute_head` orders the head's rows once, draft vocabulary first. cuBLAS writes a block of columns [n, B] into one reused
buffer, and a row kernel folds it into a running (max, sum of exponentials, argmax). Both halves of the permutation ascend,
so inside a block the lowest column is the lowest target id. Between blocks the ids are compared.

Precision: the GEMM accumulates in float32 and rounds to the features' dtype. Bias, scale, cap and reductions are float32.
Every statistic is taken of the logit as it is stored, so that exp(logits - lse_full) never sums above 1.
Bytes: every logit is written once and read once, those beyond the draft vocabulary in the buffer. The head is read once.
Every reduction has a fixed order, so two runs are bitwise equal.

# n rows, Ht target hidden, V target vocabulary, Vd draft vocabulary, B columns of one GEMM block
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastdraft.batch import TargetHead
from fastdraft.kernels.check import AtLeast, check, check_covered
from fastdraft.kernels.jit import jit, tl

# On an H100 with n 4096, V 128256 and H 4096, 16384 is 1 % slower. One block of all is 4 % faster and takes 530 MB more.
MAX_BLOCK = 32768


@dataclass(frozen=True)
class PermutedHead:
    """A TargetHead with the rows of the draft vocabulary first and then the rest, both in ascending order."""

    weight: Tensor  # [V, Ht]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None
    target_ids: Tensor  # [V] int64, the target id of each row; the first num_draft are the draft vocabulary
    num_draft: int

    @property
    def plain(self) -> bool:
        """Whether the GEMM's output is the logit."""
        return self.bias is None and self.scale == 1.0 and self.softcap is None


class TeacherRows(NamedTuple):
    """What `teacher` gives back, and the buffers it fills."""

    logits: Tensor  # [n, Vd] over the draft vocabulary, dtype of f
    lse_draft: Tensor  # [n] float32 (float64 for float64 logits)
    lse_full: Tensor  # [n] the same
    argmax: Tensor  # [n] int64 target id
    draft_argmax: Tensor  # [n] int64 draft id of argmax, -1 where it lies outside the draft vocabulary
    peak: Tensor  # [n] the largest logit, dtype of lse_full

    @property
    def in_draft(self) -> Tensor:  # [n] bool
        """Whether the target's choice is a token of the draft vocabulary."""
        return self.draft_argmax >= 0

    def first(self, n: int) -> TeacherRows:
        """A view of the first n rows."""
        return TeacherRows(*(x[:n] for x in self))

    def at(
        self,
        rows: Tensor,  # [n] int64
    ) -> TeacherRows:
        """A copy of those rows."""
        return TeacherRows(*(x[rows] for x in self))


def permute_head(
    head: TargetHead,
    draft_ids: Tensor,  # [Vd] int64, ascending target ids
) -> PermutedHead:
    """Reorders a head's rows once (a copy of the weight). Raises ValueError when the ids do not fit the head."""
    vocab = head.weight.shape[0]
    ids = draft_ids.to(device=head.weight.device, dtype=torch.int64)
    if ids.ndim != 1 or not 0 < len(ids) <= vocab:
        raise ValueError(f"draft_ids is {tuple(ids.shape)}; the head has {vocab} tokens, so 1..{vocab} ids are needed")
    if int(ids[0]) < 0 or int(ids[-1]) >= vocab or not bool((ids[1:] > ids[:-1]).all()):
        raise ValueError(
            f"draft_ids must ascend without repeats inside 0..{vocab - 1}; first {int(ids[0])}, last {int(ids[-1])}"
        )
    rest = torch.ones(vocab, dtype=torch.bool, device=ids.device)
    rest[ids] = False
    order = torch.cat([ids, rest.nonzero()[:, 0]])
    bias = None if head.bias is None else head.bias[order]
    return PermutedHead(head.weight[order], bias, float(head.scale), head.softcap, order, len(ids))


def teacher_ref(
    f: Tensor,  # [n, Ht]
    head: TargetHead,
    draft_ids: Tensor,  # [Vd] int64
) -> TeacherRows:
    """The specification, in any dtype. It holds all [n, V] logits at once."""
    logits = head.logits(f)
    stats = logits.to(torch.promote_types(logits.dtype, torch.float32))
    on_draft, best = stats[:, draft_ids], logits.argmax(-1)
    is_draft = best[:, None] == draft_ids
    draft_argmax = torch.where(is_draft.any(-1), is_draft.int().argmax(-1), -1)
    return TeacherRows(
        logits[:, draft_ids], on_draft.logsumexp(-1), stats.logsumexp(-1), best, draft_argmax, stats.amax(-1)
    )


@dataclass(frozen=True)
class TeacherConfig:
    block: int  # B, columns of one GEMM beyond the draft vocabulary
    tile: int  # columns the row kernel holds at a time
    num_warps: int


@cache
def teacher_config(
    block: int,
    itemsize: int,
) -> TeacherConfig:
    """Each thread of a small program holds eight bf16: the fastest of seven tiles on an H100, at Vd 8192 and 32000."""
    return TeacherConfig(block, 1024 * 2 // itemsize, num_warps=4)


@jit
def _tanh(x):
    # Below 0.6, where 1 - exp(-2x) would cancel, a polynomial is used: a least-squares fit with a relative error of 3e-9.
    s = x * x
    p = ((((-0.005893897 * s + 0.02079458) * s - 0.05378328) * s + 0.13331915) * s - 0.33333297) * s
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    big = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.6, x + x * p, tl.where(x < 0, -big, big))


# The next three functions read a row tile by tile and find its maximum, the column of it, and the sum of the exponentials.
# Each lane keeps a maximum and a sum of its own, so that there is no reduction until the row is read. They take one
# exponential an element, because of exp(old - new) and exp(z - new) one is always 1.


@jit
def lanes_start(TILE: tl.constexpr):
    """What lanes know before the first tile: their maximum, their sum, and the first column of the maximum's tile."""
    # The maximum starts finite: a lane that never sees a column must not compute inf - inf.
    return tl.full([TILE], -3e38, tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.int32)


@jit
def lanes_add(peaks, sums, starts, z, start):
    """Adds the tile z, whose first column is `start`."""
    higher = z > peaks  # An equal number in a later tile does not count, since its column is higher.
    e = tl.exp(-tl.abs(z - peaks))
    sums = tl.where(higher, sums * e + 1.0, sums + e)
    starts = tl.where(higher, start, starts)
    return tl.maximum(peaks, z), sums, starts


@jit
def lanes_reduce(peaks, sums, starts, lanes, width):
    """The row's maximum, the lowest column that has it, and the sum of exp(z - maximum)."""
    top = tl.max(peaks, 0)
    best = tl.min(tl.where(peaks == top, starts + lanes, width - 1), 0)
    return top, best, tl.sum(sums * tl.exp(peaks - top), 0)


@jit
def _teacher_rows_kernel(
    z_ptr,  # [n, width] GEMM output of consecutive permuted columns; where DRAFT, overwritten by the logits
    bias_ptr,  # [width]
    ids_ptr,  # [width] int64 target ids
    peak_ptr,  # [n] running max
    lse_draft_ptr,  # [n]
    lse_full_ptr,  # [n] running sum of exp(t - max); its log-sum-exp after the last block
    argmax_ptr,  # [n] int64
    draft_argmax_ptr,  # [n] int64
    width,
    scale,
    softcap,
    DRAFT: tl.constexpr,  # this is the first block, which starts the running values
    LAST: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * width
    lanes = tl.arange(0, TILE)

    # The block's logits are finished, stored where they are kept, and reduced.
    peaks, sums, starts = lanes_start(TILE)
    for start in range(0, width, TILE):
        cols = start + lanes
        inside = cols < width
        t = tl.load(z_ptr + cols, mask=inside, other=-3e38 if PLAIN else 0.0).to(tl.float32)
        if not PLAIN:
            if HAS_BIAS:
                t += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            t *= scale
            if HAS_CAP:
                t = softcap * _tanh(t / softcap)
            stored = t.to(z_ptr.dtype.element_ty)
            if DRAFT:
                tl.store(z_ptr + cols, stored, mask=inside)
            t = tl.where(inside, stored.to(tl.float32), -3e38)
        peaks, sums, starts = lanes_add(peaks, sums, starts, t, start)
    top, best, total = lanes_reduce(peaks, sums, starts, lanes, width)

    # The block is folded into the running values, which the first block starts.
    target_id = tl.load(ids_ptr + best)
    if DRAFT:
        tl.store(lse_draft_ptr + row, top + tl.log(total))
        tl.store(argmax_ptr + row, target_id)
        tl.store(draft_argmax_ptr + row, best.to(tl.int64))
    else:
        old_top = tl.load(peak_ptr + row)
        old_id = tl.load(argmax_ptr + row)
        take = (top > old_top) | ((top == old_top) & (target_id < old_id))
        tl.store(argmax_ptr + row, target_id, mask=take)
        tl.store(draft_argmax_ptr + row, tl.full([], -1, tl.int64), mask=take)
        new_top = tl.maximum(top, old_top)
        total = total * tl.exp(top - new_top) + tl.load(lse_full_ptr + row) * tl.exp(old_top - new_top)
        top = new_top
    tl.store(peak_ptr + row, top)
    if LAST:
        tl.store(lse_full_ptr + row, top + tl.log(total))
    else:
        tl.store(lse_full_ptr + row, total)


def _teacher_rows(
    z: Tensor,  # [n, width] contiguous
    first: int,  # permuted column of z[:, 0]
    head: PermutedHead,
    out: TeacherRows,
    config: TeacherConfig,
) -> None:
    n, width = z.shape
    _teacher_rows_kernel[(n,)](
        z,
        None if head.bias is None else head.bias[first : first + width],
        head.target_ids[first : first + width],
        out.peak,
        out.lse_draft,
        out.lse_full,
        out.argmax,
        out.draft_argmax,
        width,
        head.scale,
        1.0 if head.softcap is None else head.softcap,
        DRAFT=first == 0,
        LAST=first + width == head.weight.shape[0],
        PLAIN=head.plain,
        HAS_BIAS=head.bias is not None,
        HAS_CAP=head.softcap is not None,
        TILE=config.tile,
        num_warps=config.num_warps,
    )


def _teacher_rows_cpu(
    z: Tensor,  # [n, width]
    first: int,
    head: PermutedHead,
    out: TeacherRows,
    config: TeacherConfig,
) -> None:
    """The row kernel's step in plain torch. It keeps the same running values in the same places."""
    width = z.shape[1]
    if not head.plain:
        if head.bias is not None:
            z += head.bias[first : first + width]
        z *= head.scale
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
    t = z.to(out.lse_full.dtype)
    top = t.amax(-1)
    best = (t == top[:, None]).int().argmax(-1)  # The lowest index of the maximum, which torch.max does not promise.
    target_id = head.target_ids[first + best]
    total = (t - top[:, None]).exp().sum(-1)
    if first == 0:
        out.lse_draft.copy_(top + total.log())
        out.argmax.copy_(target_id)
        out.draft_argmax.copy_(best)
    else:
        take = (top > out.peak) | ((top == out.peak) & (target_id < out.argmax))
        out.argmax.copy_(torch.where(take, target_id, out.argmax))
        out.draft_argmax.masked_fill_(take, -1)
        new_top = top.maximum(out.peak)
        total = total * (top - new_top).exp() + out.lse_full * (out.peak - new_top).exp()
        top = new_top
    out.peak.copy_(top)
    out.lse_full.copy_(top + total.log() if first + width == head.weight.shape[0] else total)


def _teacher(
    f: Tensor,  # [n, Ht]
    head: PermutedHead,
    out: TeacherRows,
    scratch: Tensor,  # [>= n * B]
    config: TeacherConfig,
    rows: Callable[[Tensor, int, PermutedHead, TeacherRows, TeacherConfig], None],  # the row step
) -> None:
    n, vocab = f.shape[0], head.weight.shape[0]
    torch.mm(f, head.weight[: head.num_draft].T, out=out.logits)
    rows(out.logits, 0, head, out, config)
    for first, width in _blocks(head, config.block):
        z = scratch[: n * width].view(n, width)
        torch.mm(f, head.weight[first : min(first + width, vocab)].T, out=z)
        rows(z, first, head, out, config)


def _blocks(head: PermutedHead, block: int) -> list[tuple[int, int]]:
    """(first column, width <= block) of the blocks beyond the draft vocabulary, as even as multiples of 256 allow."""
    vocab = head.weight.shape[0]
    rest = vocab - head.num_draft
    if rest == 0:
        return []
    even = -(-rest // -(-rest // block))
    width = min(-(-even // 256) * 256, block)
    return [(first, min(width, vocab - first)) for first in range(head.num_draft, vocab, width)]


def teacher_buffers(
    n: int,
    head: PermutedHead,
    dtype: torch.dtype,
) -> tuple[TeacherRows, Tensor]:
    """Result buffers for n rows and scratch for one column block, on the head's device: n * (Vd + B) numbers of `dtype`.

    Any other scratch of n * 256 numbers or more serves too, such as the buffer of the student's logits, which are computed
    later. B is then what fits.
    """
    device = head.weight.device
    stats = torch.promote_types(dtype, torch.float32)
    rows = TeacherRows(
        torch.empty(n, head.num_draft, dtype=dtype, device=device),
        torch.empty(n, dtype=stats, device=device),
        torch.empty(n, dtype=stats, device=device),
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(n, dtype=stats, device=device),
    )
    widest = max((width for _, width in _blocks(head, MAX_BLOCK)), default=0)
    return rows, torch.empty(n * (-(-widest // 256) * 256), dtype=dtype, device=device)


@torch.no_grad()
def teacher(
    f: Tensor,  # [n, Ht] the state the target's lm_head reads, bf16 or fp32 on a GPU, any float dtype on the CPU
    head: PermutedHead,  # of f's dtype and device
    buffers: tuple[TeacherRows, Tensor] | None = None,  # of `teacher_buffers(m, ...)`, m >= n; fresh ones without
) -> TeacherRows:
    """Teacher rows of f. With `buffers` nothing is allocated and the result is a view of their first n rows.

    On CPU tensors the row step is plain torch. Raises ValueError for shapes, dtypes or buffers that do not fit.
    """
    check("f", f, (AtLeast(1), head.weight.shape[1]), head.weight.dtype, head.weight.device)
    check_covered("teacher", f=f)
    n = f.shape[0]
    rows, scratch = buffers or teacher_buffers(n, head, f.dtype)
    check("buffers' logits", rows.logits, (AtLeast(n), head.num_draft), f.dtype)
    block = min(scratch.numel() // rows.logits.shape[0], MAX_BLOCK) // 256 * 256
    if scratch.dtype != f.dtype or not scratch.is_contiguous() or (block == 0 and head.num_draft < head.weight.shape[0]):
        raise ValueError(
            f"scratch holds {scratch.numel()} of {scratch.dtype}; {256 * rows.logits.shape[0]} or more of {f.dtype}, "
            "contiguous, are needed"
        )
    config = teacher_config(block, f.element_size())
    out = rows.first(n)
    _teacher(f, head, out, scratch.view(-1), config, _teacher_rows if f.is_cuda else _teacher_rows_cpu)
    return out
