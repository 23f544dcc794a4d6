"""DFlash2's head in the block engine: the target's lm_head with one loss a row, and the selector among its candidates.

# K live rows of a chunk, H hidden, V vocabulary, R rank of the selector's tables, M candidates and the label
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdraft.batch import Batch, Features, Rows, TargetHead
from fastdraft.kernels.linear_ce import ce_rows_
from fastdraft.kernels.linear_kl import kl_rows_
from fastdraft.kernels.matmul import add_outer, linear, linear_backward
from fastdraft.kernels.selector import Candidates, SelectorGrads, add_rows_, candidates, select_rows_
from fastdraft.model.dflash.blocks import BlockChunk, Part
from fastdraft.model.dflash.engine import block_engine_step
from fastdraft.model.dflash.head import TokenHead
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dflash2.mixer import ConvolutionMixer

if TYPE_CHECKING:
    from fastdraft.model.dflash.engine import BlockStep

TABLES = "candidate_selector.predecessor_codebook", "candidate_selector.successor_codebook"
PROJECTION = "candidate_selector.hidden_projection.weight"


class SelectorHead(TokenHead):
    """The candidates' gradient joins that of the logits, part after part. The selector's own weights get theirs once for
    the chunk: only then are D-PACE's weights known, which are of the unary loss, and each table is added to once."""

    loss: SelectorLoss

    def __init__(self, draft: DFlash2Draft, head: TargetHead, loss: SelectorLoss):
        super().__init__(draft, head, loss)
        self.alpha = loss.selector_alpha

    def run(self, step: BlockStep, chunk: BlockChunk, x: Tensor, dx: Tensor | None) -> None:
        rows = len(x)
        linear(x, step.named[PROJECTION], step.take("selector.h", rows))
        weight = self.step_weights[chunk.head_step]  # [K]
        if self.loss.kind == "dpace":
            weight = torch.ones_like(weight)  # known only when all probabilities are
        for part in chunk.parts:
            self.run_part(step, chunk, part, x, weight, dx)
        if dx is not None:
            kept = self.kept(step, slice(0, rows))
            if self.loss.kind == "dpace":
                share = self.dpace(step, chunk)[:, None]
                for gradient in (dx, kept.place, kept.pull, kept.state):
                    gradient *= share.to(gradient.dtype)
            self.add_gradients(step, chunk, kept, x, dx)
        step.loss[chunk.head_out] += self.alpha * step.take("selector.loss", rows)

    def found(self, step: BlockStep, rows: slice) -> Candidates:
        return Candidates(*(step.take(f"selector.{name}", rows.stop)[rows] for name in Candidates._fields))

    def kept(self, step: BlockStep, rows: slice) -> SelectorGrads:
        return SelectorGrads(*(step.take(f"selector.{name}", rows.stop)[rows] for name in SelectorGrads._fields))

    def run_part(
        self,
        step: BlockStep,
        chunk: BlockChunk,
        part: Part,
        x: Tensor,  # [K, H]
        weight: Tensor,  # [K]
        dx: Tensor | None,  # [K, H] written at the part's rows
    ) -> None:
        """Candidates are found before the loss makes the logits their own gradient, and add theirs to it after."""
        loss, rows, label = self.loss, part.rows, chunk.label[part.rows]
        w, found = weight[rows], self.found(step, rows)
        logits = step.take("logits", len(label))
        linear(x[rows], self.target.weight, logits)
        candidates(logits, label, found)
        known, index = None, None
        if step.with_teacher:
            known = self.target.teacher(step.features.f[chunk.teacher_pos[part.teacher]], step.take)
            index = chunk.teacher_row[rows]
        if loss.needs_teacher:
            value = kl_rows_(logits, known, index, w, loss.kind, loss.lk_scale, loss.lk_decay, dx is not None).loss
        else:
            value = ce_rows_(logits, label, w, dx is not None).loss
        mine = (None, None, None) if dx is None else (w * self.alpha, logits, self.kept(step, rows))
        tables = (step.named[name] for name in TABLES)
        h = step.take("selector.h", rows.stop)[rows]
        selected = select_rows_(found, h, chunk.previous[rows], *tables, *mine, known, index)
        if dx is not None:
            linear_backward(logits, self.target.weight, dx[rows])
        hit = selected.choice == (label if known is None else known.argmax[index])
        acceptance = hit if known is None else selected.acceptance
        step.take("selector.loss", rows.stop)[rows] = selected.loss
        step.report(chunk.head_out[rows], value, acceptance, hit)

    def add_gradients(self, step: BlockStep, chunk: BlockChunk, kept: SelectorGrads, x: Tensor, dx: Tensor) -> None:
        """What the selector's weights get, and the states through its projection."""
        before, after = (step.named_grads[name] for name in TABLES)
        add_rows_(after, self.found(step, slice(0, len(x))).ids, kept.query, kept.place)
        add_rows_(before, chunk.previous, kept.pull)
        add_outer(step.named_grads[PROJECTION], kept.state, x)
        torch.addmm(dx, kept.state, step.named[PROJECTION], out=dx)


def selector_engine_step(
    draft: DFlash2Draft,
    batch: Batch,
    features: Features,
    head: TargetHead,
    anchors: Tensor,  # [A] int64 ascending, on the host
    loss: SelectorLoss,
    chunk_blocks: int | None = None,
) -> tuple[Rows, dict[str, Tensor]]:
    """`block_engine_step` of a DFlash2 draft, for checks."""
    args = draft, batch, features, head, anchors, loss, chunk_blocks
    return block_engine_step(*args, SelectorHead, ConvolutionMixer(draft))
