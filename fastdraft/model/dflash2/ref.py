"""DFlash2's losses in plain PyTorch: the specification of the selector's head. `model/dflash/ref.py` has the rest of the
step, `DFlash2Draft.around` the convolutions.

A slot's candidates are the K tokens with the largest logits of the target's head. What the slot drafts is the candidate
with the largest score after the token before, and what it samples from is the softmax of the candidates' scores. In
training the token before is the data's. Acceptance and hit are therefore those of the draft as it is served, while all
before it in its block was accepted.

# n live rows, V vocabulary, K candidates, R rank
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastdraft.batch import TargetHead
from fastdraft.kernels.selector import candidates_ref, selected_ref
from fastdraft.kernels.teacher import teacher_ref
from fastdraft.model.dflash.ref import LiveRows, block_ref_step, losses_of_logits
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.dflash2.loss import SelectorLoss


def selector_losses_ref(
    draft: DFlash2Draft, rows: LiveRows, head: TargetHead, loss: SelectorLoss
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss with its graph, acceptance, hit and unary loss of each row [n]. Without a teacher acceptance and hit are of the
    text."""
    selector, logits = draft.candidate_selector, head.logits(rows.states.to(head.weight.dtype))
    unary, _, _ = losses_of_logits(logits, rows, head, loss)
    found = candidates_ref(logits, rows.label, draft.config.selector_top_k)
    tables = selector.predecessor_codebook, selector.successor_codebook
    h, teacher, index = selector.hidden_projection(rows.states), None, None
    if rows.f is not None:
        teacher = teacher_ref(rows.f, head, torch.arange(draft.config.vocab_size, device=logits.device))
        index = torch.arange(len(logits), device=logits.device)
    selected = selected_ref(found, h, rows.previous, *tables, teacher, index)
    hit = selected.choice == (rows.label if teacher is None else teacher.argmax)
    acceptance = hit.to(selected.acceptance.dtype) if teacher is None else selected.acceptance
    return unary + loss.selector_alpha * selected.loss, acceptance, hit, unary


# `block_ref_step` of a DFlash2 draft.
selector_ref_step = partial(block_ref_step, row_losses=selector_losses_ref)
