"""DSpark's head in the block engine: Markov-corrected logits, the three terms, and the gradients of the head's own weights.

Of the live rows that one buffer of logits holds, with x their normed states, W the target's head and e = W1[token before]:

    z = x W^T + e W2^T                              two products into one buffer
    CE, alpha, dz                                   `kernels/ce_l1.py`, dz over z
    s = w [x; e] + b,  ds = c weight (sigmoid(s) - alpha)
    dx = dz W + ds w_x      de = dz W2 + ds w_e      dW2 += dz^T e      dW1[token before] += de      dw += ds [x; e]

The engines round x W^T to the compute dtype before they add the Markov head's part, and so does this. The confidence head
is computed in float32, as they compute it. Rows with the same token before are added up in a fixed order.

# n live rows of a part, K of a chunk, H hidden, V vocabulary, r rank of the Markov head
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdraft.batch import TargetHead
from fastdraft.kernels.ce_l1 import ce_l1_rows_
from fastdraft.kernels.jit import launch
from fastdraft.kernels.matmul import add_outer, linear, linear_backward
from fastdraft.model.dflash.blocks import BlockChunk, Part
from fastdraft.model.dflash.engine import block_engine_step
from fastdraft.model.dflash.head import TargetRows, padded_weights
from fastdraft.model.dspark.draft import DSparkDraft
from fastdraft.model.dspark.loss import DSparkLoss

if TYPE_CHECKING:
    from fastdraft.model.dflash.engine import BlockStep

W1, W2 = "markov_head.markov_w1.weight", "markov_head.markov_w2.weight"
PROJ, BIAS = "confidence_head.proj.weight", "confidence_head.proj.bias"


class DSparkHead:
    needs_teacher = True

    def __init__(self, draft: DSparkDraft, head: TargetHead, loss: DSparkLoss):
        self.target, self.loss, self.hidden = TargetRows(draft, head), loss, draft.config.hidden_size
        dtype, device = draft.fc.weight.dtype, draft.fc.weight.device
        self.step_weights = padded_weights(loss, draft.config.num_drafted, dtype).to(device)  # [T + 1]

    def run(
        self,
        step: BlockStep,
        chunk: BlockChunk,
        x: Tensor,  # [K, H]
        dx: Tensor | None,  # [K, H] written
    ) -> None:
        weight = self.step_weights[chunk.head_step]  # [K]
        for part in chunk.parts:
            self.run_part(step, chunk, part, x[part.rows], weight[part.rows], None if dx is None else dx[part.rows])

    def run_part(
        self,
        step: BlockStep,
        chunk: BlockChunk,
        part: Part,
        x: Tensor,  # [n, H]
        weight: Tensor,  # [n]
        dx: Tensor | None,  # [n, H] written
    ) -> None:
        loss, take, rows, named = self.loss, step.take, part.rows, step.named
        label, previous = chunk.label[rows], chunk.previous[rows]
        n, logits, e = len(label), take("logits", len(label)), take("markov.e", len(label))
        torch.index_select(named[W1], 0, previous, out=e)
        linear(x, self.target.weight, logits)
        launch(logits.addmm_, e, named[W2].T)
        teacher = self.target.teacher(step.features.f[chunk.teacher_pos[part.teacher]], take)
        terms = loss.ce_weight, loss.l1_weight
        found = ce_l1_rows_(logits, label, teacher, chunk.teacher_row[rows], weight, *terms, dx is not None)

        # The confidence, of the same state and the token before.
        read, proj = take("confidence.input", n), named[PROJ][0].to(step.stats)  # [n, H + r], [H + r]
        read[:, : self.hidden], read[:, self.hidden :] = x, e
        sure = torch.mv(read, proj) + named[BIAS].to(step.stats)  # [n]
        law = found.acceptance.clamp(max=1.0)
        bce = F.binary_cross_entropy_with_logits(sure, law, reduction="none")
        value = loss.ce_weight * found.ce + 2 * loss.l1_weight * (1 - found.acceptance) + loss.confidence_weight * bce
        step.report(chunk.head_out[rows], value, found.acceptance, found.hit)
        if dx is None:
            return

        d_sure = loss.confidence_weight * weight * (sure.sigmoid() - law)  # [n]
        linear_backward(logits, self.target.weight, dx)
        launch(dx.addr_, d_sure.to(dx.dtype), proj[: self.hidden].to(dx.dtype))
        de, grads = take("markov.de", n), step.named_grads
        linear_backward(logits, named[W2], de)
        add_outer(grads[W2], logits, e)
        d_read = torch.addr(de.to(step.stats), d_sure, proj[self.hidden :])  # [n, r]
        launch(grads[W1].index_put_, (previous,), d_read, accumulate=True)
        launch(grads[PROJ][0].addmv_, read.T, d_sure)
        launch(grads[BIAS].add_, d_sure.sum())


dspark_engine_step = partial(block_engine_step, head_type=DSparkHead)
