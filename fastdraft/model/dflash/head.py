"""What stands behind the layers in the block engine: a head that takes a chunk's live rows to losses and their gradient.

`BlockHead` is what the engine asks of it; `TokenHead` is DFlash's. A method whose head has weights of its own brings
another, and the engine does not know which it runs.

# C blocks of a chunk, K live rows, H hidden, V vocabulary, T steps of a block
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdraft.batch import TargetHead
from fastdraft.kernels.linear_ce import ce_rows_
from fastdraft.kernels.linear_kl import kl_rows_
from fastdraft.kernels.matmul import linear, linear_backward
from fastdraft.kernels.teacher import PermutedHead, TeacherRows, teacher
from fastdraft.model.buffers import Buffers
from fastdraft.model.dflash.blocks import BlockChunk, Part
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.loss import BlockLoss, StepLoss, dpace_weights

if TYPE_CHECKING:
    from fastdraft.model.dflash.engine import BlockStep


class BlockHead(Protocol):
    """Built of a draft, its target's head and a loss."""

    needs_teacher: bool  # whether training compares with the target's distribution

    def run(
        self,
        step: BlockStep,
        chunk: BlockChunk,
        x: Tensor,  # [K, H] normed states of the live rows
        dx: Tensor | None,  # [K, H] written: the gradient of the weighted sum of losses; None: only losses are wanted
    ) -> None:
        """Loss, acceptance and hit of the live rows, to `step`'s at `chunk.head_out`. With `dx` the gradients of the head's
        own weights are added to `step.named_grads`. Buffers are `step.take`'s, and named in the shape's `extra_buffers`."""


class TargetRows:
    """The target's frozen head, as student and as teacher."""

    def __init__(self, draft: DFlashDraft, head: TargetHead):
        vocab_size = draft.config.vocab_size
        self.weight = head.weight.to(draft.fc.weight.dtype)  # [V, H]
        everything = torch.arange(vocab_size, device=head.weight.device)
        self.permuted = PermutedHead(head.weight, None, 1.0, None, everything, vocab_size)

    def teacher(
        self,
        f: Tensor,  # [m, H] states that the target's head reads
        take: Buffers,
    ) -> TeacherRows:
        buffers = TeacherRows(*(take(f"teacher.{name}", len(f)) for name in TeacherRows._fields))
        return teacher(f, self.permuted, (buffers, f.new_empty(0)))


def padded_weights(loss: StepLoss, num_steps: int, dtype: torch.dtype) -> Tensor:  # [T + 1]
    """w of each step, and 0 for step T, which rows of padding have."""
    return torch.tensor([*loss.weights(num_steps), 0.0], dtype=torch.promote_types(dtype, torch.float32))


class TokenHead:
    """DFlash's head: the target's alone, and one loss a row."""

    def __init__(self, draft: DFlashDraft, head: TargetHead, loss: BlockLoss):
        self.target = TargetRows(draft, head)
        self.loss, self.needs_teacher = loss, loss.needs_teacher
        self.num_steps = draft.config.num_drafted
        dtype, device = draft.fc.weight.dtype, draft.fc.weight.device
        self.step_weights = padded_weights(loss, self.num_steps, dtype).to(device)  # [T + 1]

    def run(self, step: BlockStep, chunk: BlockChunk, x: Tensor, dx: Tensor | None) -> None:
        weight = self.step_weights[chunk.head_step]  # [K]
        if self.loss.kind == "dpace":
            weight = torch.ones_like(weight)  # known only when all probabilities are
        for part in chunk.parts:
            self.run_part(step, chunk, part, x, weight, dx)
        if dx is not None and self.loss.kind == "dpace":
            dx *= self.dpace(step, chunk)[:, None].to(dx.dtype)

    def run_part(
        self,
        step: BlockStep,
        chunk: BlockChunk,
        part: Part,
        x: Tensor,  # [K, H]
        weight: Tensor,  # [K]
        dx: Tensor | None,  # [K, H] written at the part's rows
    ) -> None:
        """The head, the losses and their gradient, of as many live rows as one buffer of logits holds."""
        loss, rows, label = self.loss, part.rows, chunk.label[part.rows]
        out, w = chunk.head_out[rows], weight[rows]
        logits = step.take("logits", len(label))
        linear(x[rows], self.target.weight, logits)
        soft = None
        if step.with_teacher:
            known = self.target.teacher(step.features.f[chunk.teacher_pos[part.teacher]], step.take)
            kind = loss.kind if loss.needs_teacher else "kl"
            grad = loss.needs_teacher and dx is not None
            soft = kl_rows_(logits, known, chunk.teacher_row[rows], w, kind, loss.lk_scale, loss.lk_decay, grad)
        if loss.needs_teacher:
            value, hit, acceptance = soft.loss, soft.hit, soft.acceptance
        else:
            hard = ce_rows_(logits, label, w, dx is not None)
            value = hard.loss
            hit, acceptance = (hard.hit, hard.hit) if soft is None else (soft.hit, soft.acceptance)
        if dx is not None:
            linear_backward(logits, self.target.weight, dx[rows])
        step.report(out, value, acceptance, hit)

    def dpace(self, step: BlockStep, chunk: BlockChunk) -> Tensor:  # [K]
        """D-PACE's weights of the live rows, from the probabilities of their labels; 0 for step T, which is padding's."""
        steps = self.num_steps
        shape = len(chunk.anchor), steps + 1
        at = chunk.head_block * shape[1] + chunk.head_step
        q = step.loss.new_zeros(shape[0] * shape[1]).index_copy_(0, at, step.loss[chunk.head_out].neg().exp())
        live = torch.zeros_like(q, dtype=torch.bool).index_fill_(0, at, True)
        weights = dpace_weights(q.view(shape)[:, :steps], live.view(shape)[:, :steps], self.loss.dpace_alpha)
        return F.pad(weights, (0, 1)).flatten()[at]
