"""DSpark's losses of live rows in plain PyTorch: the specification that the engine's head is tested against.

Everything before them is DFlash's reference (`model/dflash/ref.py`), with shifted labels and blocks whose live rows end at
the first that has no label. Training is teacher-forced: the token before is the data's, not what the draft would say.

# n live rows, H hidden, V vocabulary
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdraft.batch import TargetHead
from fastdraft.kernels.ce_l1 import ce_l1_losses_ref
from fastdraft.kernels.teacher import teacher_ref
from fastdraft.model.dflash.ref import LiveRows, block_ref_step
from fastdraft.model.dspark.draft import DSparkDraft
from fastdraft.model.dspark.loss import DSparkLoss


def dspark_losses_ref(
    draft: DSparkDraft, rows: LiveRows, head: TargetHead, loss: DSparkLoss
) -> tuple[Tensor, Tensor, Tensor]:  # loss with its autograd graph, acceptance, hit [n]
    """The three terms of each row, added up."""
    teacher = teacher_ref(rows.f, head, torch.arange(draft.config.vocab_size, device=rows.label.device))
    logits = draft.logits(rows.states, rows.previous, head)  # [n, V]
    value, found = ce_l1_losses_ref(logits, rows.label, teacher, loss.ce_weight, loss.l1_weight)
    sure = draft.confidence(rows.states, rows.previous)
    value = value + loss.confidence_weight * F.binary_cross_entropy_with_logits(
        sure, found.acceptance.to(sure.dtype).clamp(max=1.0), reduction="none"
    )
    return value, found.acceptance, found.hit


dspark_ref_step = partial(block_ref_step, row_losses=dspark_losses_ref)
