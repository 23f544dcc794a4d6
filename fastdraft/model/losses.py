"""Student-against-teacher losses on draft-vocabulary logits, one row at a time.

With z the student's logits over the draft vocabulary, Q = softmax(z), P the target's distribution with its
full-vocabulary normaliser, P~ = P restricted to the draft vocabulary and renormalised there:

    kl         CE(P~, Q) = -sum_v P~(v) log Q(v)            (KL plus the constant entropy of P~)
    lk_alpha   -log alpha,  alpha = sum_v min(P(v), Q(v))
    lk_lambda  w * CE + (1 - w) * (1 - alpha),  w = lk_scale * exp(-lk_decay * alpha), no gradient through w

Source: EAGLE-3 (arXiv 2503.01840); LK losses, arXiv 2602.23881.

# n rows, V target vocabulary, Vd draft vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

LossKind = Literal["kl", "lk_alpha", "lk_lambda"]


@dataclass(frozen=True)
class Teacher:
    """What the losses need of the target's distribution, row by row."""

    logits: Tensor  # [n, Vd] target logits of the draft-vocabulary tokens
    lse: Tensor  # [n] log-sum-exp over the whole target vocabulary
    top: Tensor  # [n] int64, target id of the most likely token

    def __getitem__(self, rows: Tensor) -> Teacher:
        return Teacher(self.logits[rows], self.lse[rows], self.top[rows])


def teacher_ref(
    logits: Tensor,  # [n, V] target logits
    draft_ids: Tensor,  # [Vd] int64, target id of each draft token
) -> Teacher:
    """In at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return Teacher(logits[:, draft_ids], logits.logsumexp(-1), logits.argmax(-1))


def kl_rows_ref(
    student: Tensor,  # [n, Vd] draft logits
    teacher: Teacher,  # n rows
    draft_ids: Tensor,  # [Vd] int64
    kind: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # loss [n], acceptance [n], hit [n] bool
    """Loss, acceptance and top-1 agreement of every row, in at least float32. Only the loss carries a gradient."""
    if kind not in get_args(LossKind):
        raise ValueError(f"loss {kind!r} is not one of {', '.join(get_args(LossKind))}")
    work = torch.promote_types(student.dtype, torch.float32)
    student = student.to(work)
    log_q = student.log_softmax(-1)
    p = (teacher.logits - teacher.lse[:, None]).exp()
    alpha = torch.minimum(p, log_q.exp()).sum(-1)
    hit = draft_ids[student.argmax(-1)] == teacher.top
    if kind == "lk_alpha":
        loss = -alpha.clamp_min(torch.finfo(work).tiny).log()  # a row nobody trains on may underflow to 0
    else:
        loss = -(teacher.logits.softmax(-1) * log_q).sum(-1)
        if kind == "lk_lambda":
            w = lk_scale * torch.exp(-lk_decay * alpha.detach())
            loss = w * loss + (1 - w) * (1 - alpha)
    return loss, alpha.detach(), hit


def row_losses(
    student: Tensor,  # [n, Vd] draft logits
    teacher: Tensor,  # [n, V] target logits
    draft_ids: Tensor,  # [Vd] int64
    kind: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # loss [n], acceptance [n], hit [n] bool
    """`kl_rows_ref` against plain target logits."""
    return kl_rows_ref(student, teacher_ref(teacher, draft_ids), draft_ids, kind, lk_scale, lk_decay)
