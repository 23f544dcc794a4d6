"""DFlash's training step in plain PyTorch: the specification the engine is tested against.

A block at anchor a of a document with tokens x_0 .. x_{L-1} has rows k = 0 .. B-1:

    token read      x_a (k = 0), the mask token (k >= 1)
    RoPE position   a + k, also past the document's end
    context         c_u = hidden_norm(fc(g_u)), and in each layer K_u = rope(k_norm(Wk c_u), u), V_u = Wv c_u
    attention       row k sees K_u, V_u for u < a of its document, and the rows of its own block: all of them in a layer of
                    full attention; in a sliding one rows <= k, and of the context only u >= a + k - (W - 1)
    student         Q = softmax(lm_head(norm(h))), the target's own head
    labels, losses  as `loss.py` says; the teacher of label x_v is P = softmax(target_logits(f_{v-1}))

Runs in any dtype; float64 is the truth. Memory is O(A * B * (V + N)): for tests and small drafts.
Source: DFlash (arXiv 2602.06036), sections 3 and 4.

# N packed tokens, A blocks, B rows of a block, T steps (slots that predict), V vocabulary, Hq/Hkv heads, D head dim
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastdraft.batch import Batch, Features, Rows, TargetHead
from fastdraft.kernels.linear_kl import row_losses_ref
from fastdraft.kernels.teacher import teacher_ref
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.loss import BlockLoss, dpace_weights


def block_states_ref(
    draft: DFlashDraft,
    batch: Batch,
    features: Features,
    anchors: Tensor,  # [A] int64 rows of the pack
) -> Tensor:  # [A, B, H] after the final norm
    c = draft.config
    slots = torch.arange(c.block_size, device=anchors.device)
    positions = (batch.positions[anchors, None] + slots).flatten()
    ids = torch.where(slots == 0, batch.input_ids[anchors, None], c.mask_token_id).flatten()
    context = draft.context(features.g)
    h = draft.embedding[ids]
    for number, layer in enumerate(draft.layers):
        x = layer.input_layernorm(h)
        window = c.sliding_window if c.layer_types[number] == "sliding_attention" else None
        attention = attend_in_blocks(
            draft.queries(number, x, positions),
            *draft.keys_values(number, context, batch.positions),
            *draft.keys_values(number, x, positions),
            anchors,
            batch.doc_start[anchors],
            window,
        )
        h = draft.finish(number, h, attention)
    return draft.norm(h).unflatten(0, (len(anchors), c.block_size))


def attend_in_blocks(
    q: Tensor,  # [A*B, Hq, D] rotated
    k_context: Tensor,  # [N, Hkv, D] rotated
    v_context: Tensor,  # [N, Hkv, D]
    k_block: Tensor,  # [A*B, Hkv, D] rotated
    v_block: Tensor,  # [A*B, Hkv, D]
    anchors: Tensor,  # [A] int64
    starts: Tensor,  # [A] int64, first row of each anchor's document
    window: int | None,  # W of a sliding layer
) -> Tensor:  # [A*B, Hq, D]
    blocks, rows = len(anchors), len(q) // len(anchors)
    group = q.shape[1] // k_block.shape[1]
    keys, values = (torch.cat(x).repeat_interleave(group, 1) for x in ((k_context, k_block), (v_context, v_block)))
    u = torch.arange(len(k_context), device=q.device)
    slot = torch.arange(rows, device=q.device)
    before = (u >= starts[:, None]) & (u < anchors[:, None])  # [A, N]
    sees = before[:, None].expand(blocks, rows, -1)
    own = torch.ones(rows, rows, dtype=torch.bool, device=q.device)
    if window is not None:
        sees = sees & (u >= (anchors[:, None] + slot)[..., None] - (window - 1))
        own = own.tril()
    same = torch.eye(blocks, dtype=torch.bool, device=q.device)
    sees = torch.cat([sees.flatten(0, 1), torch.kron(same, own)], 1)  # [A*B, N + A*B]
    scores = torch.einsum("qhd,khd->hqk", q, keys) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~sees, -torch.inf)
    p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("hqk,khd->qhd", p, values)


def block_rows_ref(
    draft: DFlashDraft,
    batch: Batch,
    features: Features,
    head: TargetHead,
    anchors: Tensor,  # [A] int64 ascending
    loss: BlockLoss,
    measure: bool = True,  # acceptance against the target's distribution where features.f is there
) -> tuple[Rows, Tensor]:  # rows whose loss carries the autograd graph; the weighted sum of losses
    """Row (j, a) of the result is step j of the block at token a. Without a teacher acceptance and hit are of the text:
    whether the draft's first choice is the token that stands there."""
    c = draft.config
    steps, first = c.num_drafted, c.first_slot
    label_at = anchors[:, None] + 1 + torch.arange(steps, device=anchors.device)  # [A, T]
    inside = label_at < batch.doc_end[anchors, None]
    at = label_at.minimum(batch.doc_end[anchors, None] - 1)
    live = inside & batch.loss_mask[at]
    states = block_states_ref(draft, batch, features, anchors)[:, first:]
    logits = head.logits(states[live].to(head.weight.dtype))  # [n, V]
    stats = torch.promote_types(logits.dtype, torch.float32)
    label = batch.input_ids[at[live]]
    ce = -logits.to(stats).log_softmax(-1).gather(1, label[:, None])[:, 0]
    hit = logits.argmax(-1) == label
    value, acceptance = ce, hit.to(stats)
    if loss.needs_teacher or (measure and features.f is not None):
        everything = torch.arange(c.vocab_size, device=anchors.device)
        teacher = teacher_ref(features.f[at[live] - 1], head, everything)
        kind = loss.kind if loss.needs_teacher else "kl"
        soft, acceptance, hit = row_losses_ref(logits, teacher, kind, loss.lk_scale, loss.lk_decay)
        value = soft if loss.needs_teacher else ce
    weight = torch.tensor(loss.weights(steps), dtype=stats, device=anchors.device).expand(len(anchors), -1)
    if loss.kind == "dpace":
        q = torch.zeros(live.shape, dtype=stats, device=anchors.device).index_put((live,), ce.detach().neg().exp())
        weight = dpace_weights(q, live, loss.dpace_alpha)
    total = (value * weight[live]).sum()

    def laid(values: Tensor) -> Tensor:  # [T, N]
        out = values.new_zeros(batch.num_tokens, steps)
        block = torch.zeros(live.shape, dtype=values.dtype, device=values.device).index_put((live,), values)
        return out.index_put((anchors,), block).T

    on = torch.ones_like(hit)
    return Rows(laid(value), laid(acceptance.detach()), laid(hit), laid(on), laid(on)), total


def block_ref_step(
    draft: DFlashDraft,
    batch: Batch,
    features: Features,
    head: TargetHead,
    anchors: Tensor,  # [A] int64
    loss: BlockLoss,
) -> tuple[Rows, dict[str, Tensor]]:
    """Rows, and the gradient of the weighted sum of losses for every trainable parameter, by name."""
    names, parameters = zip(*draft.trainable().items(), strict=True)
    if not len(anchors):
        return _no_rows(draft, batch, features), {n: torch.zeros_like(p) for n, p in draft.trainable().items()}
    with torch.enable_grad():
        rows, total = block_rows_ref(draft, batch, features, head, anchors, loss, measure=False)
        grads = torch.autograd.grad(total, parameters)
    return replace(rows, loss=rows.loss.detach()), dict(zip(names, grads, strict=True))


def _no_rows(draft: DFlashDraft, batch: Batch, features: Features) -> Rows:
    shape = draft.config.num_drafted, batch.num_tokens
    numbers = (features.g.new_zeros(shape, dtype=torch.float32) for _ in range(2))
    flags = (torch.zeros(shape, dtype=torch.bool, device=features.g.device) for _ in range(3))
    return Rows(*numbers, *flags)


class BlockReferenceEngine:
    """The reference behind the fused engine's interface (`fastdraft.model.dflash.engine.BlockEngine`)."""

    def __init__(self, draft: DFlashDraft, head: TargetHead, loss: BlockLoss, draw: Callable[[Batch, int], Tensor]):
        self.draft, self.head, self.loss, self.draw = draft, head, loss, draw
        self.number = 0

    def begin(self, number: int) -> None:
        self.number = number

    def step(self, batch: Batch, features: Features, grads: dict[str, Tensor]) -> Rows:
        anchors = self.draw(batch, self.number).to(features.g.device)
        batch = batch.to(features.g.device)
        rows, found = block_ref_step(self.draft, batch, features, self.head, anchors, self.loss)
        for name, grad in found.items():
            grads[name] += grad
        return rows

    @torch.no_grad()
    def rows(self, batch: Batch, features: Features) -> Rows:
        anchors = self.draw(batch, 0).to(features.g.device)
        batch = batch.to(features.g.device)
        if not len(anchors):
            return _no_rows(self.draft, batch, features)
        return block_rows_ref(self.draft, batch, features, self.head, anchors, self.loss)[0]
