"""EAGLE-3 training-time test in plain PyTorch: the specification every engine is tested against.

Step i = 0 .. T-1 at token t of a document with tokens x_0 .. x_{L-1}:

    token read      x_{t+1+i}
    hidden read     h^0_t = fc(g_t),  h^i_t = y^{i-1}_t  (the layer's output before the final norm),
                    with norm_output h^i_t = norm(y^{i-1}_t)
    RoPE position   t + i
    attention       query (t, i) sees K^0_s, V^0_s for s <= t, and K^j_t, V^j_t for 1 <= j <= i
    student         Q = softmax(lm_head(norm(y^i_t)))            over the draft vocabulary
    teacher         P = softmax(target_logits(f_u)), u = t+1+i   the distribution of x_{u+1}
    live            x_{u+1} exists in the document, loss_mask[u+1] = 1, argmax P is a draft-vocabulary token, and the
                    chain runs so many steps where its number of steps was drawn (`chunks.py`)

Runs in any dtype; float64 is the truth. Memory is O(T * N * V): for tests and small drafts.
Sources: EAGLE-3 (arXiv 2503.01840), section 3; norm_output: EAGLE-3.1 (arXiv 2605.09992).

# N packed tokens, H heads (Hq query, Hkv key/value), D head dim, T TTT steps
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastdraft.batch import Batch, Features, LossKind, Rows, TargetHead
from fastdraft.kernels.linear_kl import row_losses_ref
from fastdraft.kernels.teacher import teacher_ref
from fastdraft.model.eagle3.chunks import SampledDepth
from fastdraft.model.eagle3.draft import Draft


def ttt_ref(
    draft: Draft,
    batch: Batch,
    features: Features,
    head: TargetHead,
    ttt_length: int,
    kind: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
    drawn: Tensor | None = None,  # [N] int64, steps of each token's chain that count (`chunks.py`); None: all
) -> Rows:
    """All T steps over a batch; `Rows.loss` carries the autograd graph. The caller weighs the steps and sums."""
    row = torch.arange(batch.num_tokens, device=batch.input_ids.device)
    last = batch.doc_end - 1
    teacher = teacher_ref(features.f, head, draft.draft_ids)
    steps, keys, values = [], [], []
    h = draft.combine(features.g.to(draft.fc.weight.dtype))
    for i in range(ttt_length):
        u = row + 1 + i
        q, k, v = draft.qkv(batch.input_ids[u.minimum(last)], h, batch.positions + i)
        keys.append(k)
        values.append(v)
        y = draft.finish(h, attention_ref(q, keys, values, batch.lengths))
        h = draft.fed_back(y)

        masked_in = (u + 1 <= last) & batch.loss_mask[(u + 1).minimum(last)]
        if drawn is not None:
            masked_in &= drawn > i
        rows = teacher.at(u.minimum(last))
        live = masked_in & rows.in_draft
        loss, alpha, hit = row_losses_ref(draft.logits(y), rows, kind, lk_scale, lk_decay)
        steps.append((loss.where(live, 0.0), alpha.where(live, 0.0), hit & masked_in, live, masked_in))
    return Rows(*(torch.stack(x) for x in zip(*steps, strict=True)))


def ttt_ref_step(
    draft: Draft,
    batch: Batch,
    features: Features,
    head: TargetHead,
    step_weights: Tensor,  # [T]
    kind: LossKind = "kl",
    lk_scale: float = 1.0,
    lk_decay: float = 1.0,
    drawn: Tensor | None = None,  # [N] int64, steps of each token's chain that count; None: all
) -> tuple[Rows, dict[str, Tensor]]:
    """Rows, and the gradient of sum_i step_weights[i] * sum_t loss(t, i) for every trainable parameter, by name."""
    rows = ttt_ref(draft, batch, features, head, len(step_weights), kind, lk_scale, lk_decay, drawn)
    names, parameters = zip(*draft.trainable().items(), strict=True)
    total = (rows.loss.sum(1) * step_weights.to(rows.loss)).sum()
    grads = torch.autograd.grad(total, parameters)
    return replace(rows, loss=rows.loss.detach()), dict(zip(names, grads, strict=True))


class ReferenceEngine:
    """The reference behind the fused engine's interface (`fastdraft.model.eagle3.engine.TTTEngine`)."""

    def __init__(
        self,
        draft: Draft,
        head: TargetHead,
        step_weights: Tensor,  # [T]
        kind: LossKind = "kl",
        lk_scale: float = 1.0,
        lk_decay: float = 1.0,
        depth: SampledDepth | None = None,  # of the chains that `step` trains; None: all steps of all
    ):
        self.draft, self.head, self.step_weights, self.loss = draft, head, step_weights, (kind, lk_scale, lk_decay)
        self.depth, self.number = depth, 0

    def begin(self, number: int) -> None:
        """The optimizer step that follows, which depths are drawn for."""
        self.number = number

    def step(self, batch: Batch, features: Features, grads: dict[str, Tensor]) -> Rows:
        weights, drawn = self.step_weights, None
        if self.depth is not None:
            weights = self.depth.weigh(weights)
            drawn = torch.from_numpy(self.depth.draw(batch, self.number, len(weights))).to(features.f.device)
        batch = batch.to(features.f.device)
        rows, found = ttt_ref_step(self.draft, batch, features, self.head, weights, *self.loss, drawn)
        for name, grad in found.items():
            grads[name] += grad
        return rows

    @torch.no_grad()
    def rows(self, batch: Batch, features: Features) -> Rows:
        batch = batch.to(features.f.device)
        return ttt_ref(self.draft, batch, features, self.head, len(self.step_weights), *self.loss)


def attention_ref(
    q: Tensor,  # [N, Hq, D] step i's queries, rotated
    keys: list[Tensor],  # i+1 of [N, Hkv, D]; the first is K^0
    values: list[Tensor],  # i+1 of [N, Hkv, D]
    lengths: tuple[int, ...],
) -> Tensor:  # [N, Hq, D]
    """Causal attention over K^0, V^0 inside each document, plus the row's own K^1..K^i, V^1..V^i."""
    group = q.shape[1] // keys[0].shape[1]
    per_doc = zip(
        q.split(lengths),
        *(torch.stack(x).repeat_interleave(group, 2).split(lengths, 1) for x in (keys, values)),
        strict=True,
    )
    return torch.cat([_document_attention(*doc) for doc in per_doc])


def _document_attention(
    q: Tensor,  # [L, Hq, D]
    k: Tensor,  # [i+1, L, Hq, D]
    v: Tensor,  # [i+1, L, Hq, D]
) -> Tensor:  # [L, Hq, D]
    length, scale = q.shape[0], q.shape[-1] ** -0.5
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    context = torch.einsum("qhd,khd->hqk", q, k[0]).masked_fill(future, -torch.inf)
    own = torch.einsum("qhd,jqhd->hqj", q, k[1:])
    p = (torch.cat([context, own], -1) * scale).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    p = p.to(q.dtype)
    return torch.einsum("hqk,khd->qhd", p[..., :length], v[0]) + torch.einsum("hqj,jqhd->qhd", p[..., length:], v[1:])
