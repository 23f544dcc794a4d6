"""Student-against-teacher losses on draft-vocabulary logits, one row at a time.

With z the student's logits over the draft vocabulary, Q = softmax(z), P the target's distribution with its
full-vocabulary normaliser, P~ = P restricted to the draft vocabulary and renormalised there:

    kl         CE(P~, Q) = -sum_v P~(v) log Q(v)            (KL plus the constant entropy of P~)
    lk_alpha   -log alpha,  alpha = sum_v min(P(v), Q(v))
    lk_lambda  w * CE + (1 - w) * (1 - alpha),  w = lk_scale * exp(-lk_decay * alpha), no gradient through w

Source: EAGLE-3 (arXiv 2503.01840); LK losses, arXiv 2602.23881.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

LossKind = Literal["kl", "lk_alpha", "lk_lambda"]


def row_losses(
    student: Tensor,  # [n, Vd] draft logits
    teacher: Tensor,  # [n, V] target logits
    draft_ids: Tensor,  # [Vd] int64, target id of each draft token
    kind: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # loss [n], acceptance [n], hit [n] bool
    """Loss, acceptance and top-1 agreement of every row, in at least float32. Only the loss carries a gradient."""
    if kind not in get_args(LossKind):
        raise ValueError(f"loss {kind!r} is not one of {', '.join(get_args(LossKind))}")
    work = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(work), teacher.to(work)
    log_q = student.log_softmax(-1)
    on_draft = teacher[:, draft_ids]
    p = (on_draft - teacher.logsumexp(-1, keepdim=True)).exp()
    alpha = torch.minimum(p, log_q.exp()).sum(-1)
    hit = draft_ids[student.argmax(-1)] == teacher.argmax(-1)
    if kind == "lk_alpha":
        loss = -alpha.clamp_min(torch.finfo(work).tiny).log()  # a row nobody trains on may underflow to 0
    else:
        loss = -(on_draft.softmax(-1) * log_q).sum(-1)
        if kind == "lk_lambda":
            w = lk_scale * torch.exp(-lk_decay * alpha.detach())
            loss = w * loss + (1 - w) * (1 - alpha)
    return loss, alpha.detach(), hit
