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
from typing import NamedTuple

import torch
from torch import Tensor

from fastdraft.batch import Batch, Features, Rows, TargetHead
from fastdraft.kernels.linear_kl import row_losses_ref
from fastdraft.kernels.teacher import teacher_ref
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.loss import BlockLoss, StepLoss, dpace_weights


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
    for number in range(c.num_hidden_layers):

        def attend(x: Tensor, number: int = number) -> Tensor:
            return attend_in_blocks(
                draft.queries(number, x, positions),
                *draft.keys_values(number, context, batch.positions),
                *draft.keys_values(number, x, positions),
                anchors,
                batch.doc_start[anchors],
                c.sliding_window if c.layer_types[number] == "sliding_attention" else None,
            )

        h = draft.through_layer(number, h, attend)
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


class LiveRows(NamedTuple):
    """The rows that have a loss, in the order of blocks and then of steps."""

    states: Tensor  # [n, H] after the final norm
    label: Tensor  # [n] int64
    previous: Tensor  # [n] int64 the token before the label
    f: Tensor | None  # [n, H] the target's state that predicts the label, where a teacher is wanted


# (draft, rows, target's head, loss) -> loss with its autograd graph, acceptance and hit of each row [n], and where the loss
# is more than minus the log-probability of the label, that too
RowLosses = Callable[[DFlashDraft, LiveRows, TargetHead, StepLoss], tuple[Tensor, ...]]


def token_losses_ref(
    draft: DFlashDraft, rows: LiveRows, head: TargetHead, loss: BlockLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """DFlash's: the loss that `BlockLoss` names, of the target's head. Without a teacher acceptance and hit are of the
    text: whether the draft's first choice is the token that stands there."""
    return losses_of_logits(draft.logits(rows.states, rows.previous, head), rows, head, loss)


def losses_of_logits(
    logits: Tensor,  # [n, V]
    rows: LiveRows,
    head: TargetHead,
    loss: BlockLoss,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = torch.promote_types(logits.dtype, torch.float32)
    ce = -logits.to(stats).log_softmax(-1).gather(1, rows.label[:, None])[:, 0]
    hit = logits.argmax(-1) == rows.label
    if rows.f is None:
        return ce, hit.to(stats), hit
    teacher = teacher_ref(rows.f, head, torch.arange(logits.shape[1], device=logits.device))
    kind = loss.kind if loss.needs_teacher else "kl"
    soft, acceptance, hit = row_losses_ref(logits, teacher, kind, loss.lk_scale, loss.lk_decay)
    return soft if loss.needs_teacher else ce, acceptance, hit


def live_steps(
    batch: Batch,
    anchors: Tensor,  # [A] int64
    config: DFlashConfig,
) -> tuple[Tensor, Tensor]:  # rows of the pack that the steps predict [A, T], kept inside the document; live [A, T] bool
    label_at = anchors[:, None] + 1 + torch.arange(config.num_drafted, device=anchors.device)
    end = batch.doc_end[anchors, None]
    at = label_at.minimum(end - 1)
    live = (label_at < end) & batch.loss_mask[at]
    return at, live.long().cumprod(1).bool() if config.live_prefix else live


def block_rows_ref(
    draft: DFlashDraft,
    batch: Batch,
    features: Features,
    head: TargetHead,
    anchors: Tensor,  # [A] int64 ascending
    loss: StepLoss,
    measure: bool = True,  # acceptance against the target's distribution where features.f is there
    row_losses: RowLosses = token_losses_ref,
) -> tuple[Rows, Tensor]:  # rows whose loss carries the autograd graph; the weighted sum of losses
    """Row (j, a) of the result is step j of the block at token a."""
    steps, first = draft.config.num_drafted, draft.config.first_slot
    at, live = live_steps(batch, anchors, draft.config)
    states = block_states_ref(draft, batch, features, anchors)[:, first:]
    if loss.needs_teacher and features.f is None:
        raise ValueError(f"loss {loss.kind} compares with the target's last state, which these features lack")
    compares = loss.needs_teacher or (measure and features.f is not None)
    label_at = at[live]
    rows = LiveRows(
        states[live],
        batch.input_ids[label_at],
        batch.input_ids[label_at - 1],
        features.f[label_at - 1] if compares else None,
    )
    value, acceptance, hit, *surprise = row_losses(draft, rows, head, loss)
    weight = torch.tensor(loss.weights(steps), dtype=value.dtype, device=anchors.device).expand(len(anchors), -1)
    if loss.kind == "dpace":
        (surprise,) = surprise or (value,)
        q = value.new_zeros(live.shape).index_put((live,), surprise.detach().neg().exp())
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
    loss: StepLoss,
    row_losses: RowLosses = token_losses_ref,
) -> tuple[Rows, dict[str, Tensor]]:
    """Rows, and the gradient of the weighted sum of losses for every trainable parameter, by name."""
    names, parameters = zip(*draft.trainable().items(), strict=True)
    if not len(anchors):
        return _no_rows(draft, batch, features), {n: torch.zeros_like(p) for n, p in draft.trainable().items()}
    with torch.enable_grad():
        rows, total = block_rows_ref(draft, batch, features, head, anchors, loss, False, row_losses)
        grads = torch.autograd.grad(total, parameters)
    return replace(rows, loss=rows.loss.detach()), dict(zip(names, grads, strict=True))


def _no_rows(draft: DFlashDraft, batch: Batch, features: Features) -> Rows:
    shape = draft.config.num_drafted, batch.num_tokens
    numbers = (features.g.new_zeros(shape, dtype=torch.float32) for _ in range(2))
    flags = (torch.zeros(shape, dtype=torch.bool, device=features.g.device) for _ in range(3))
    return Rows(*numbers, *flags)


class BlockReferenceEngine:
    """The reference behind the fused engine's interface (`fastdraft.model.dflash.engine.BlockEngine`)."""

    def __init__(
        self,
        draft: DFlashDraft,
        head: TargetHead,
        loss: StepLoss,
        draw: Callable[[Batch, int], Tensor],
        row_losses: RowLosses = token_losses_ref,
    ):
        self.draft, self.head, self.loss, self.draw, self.row_losses = draft, head, loss, draw, row_losses
        self.number = 0

    def begin(self, number: int) -> None:
        self.number = number

    @property
    def config(self) -> DFlashConfig:
        return self.draft.config

    check_ids = BlockEngine.check_ids  # what no draft can be trained on, its step refuses whichever it is

    def step(self, batch: Batch, features: Features, grads: dict[str, Tensor]) -> Rows:
        self.check_ids(batch)
        anchors = self.draw(batch, self.number).to(features.g.device)
        batch = batch.to(features.g.device)
        rows, found = block_ref_step(self.draft, batch, features, self.head, anchors, self.loss, self.row_losses)
        for name, grad in found.items():
            grads[name] += grad
        return rows

    @torch.no_grad()
    def rows(self, batch: Batch, features: Features) -> Rows:
        self.check_ids(batch)
        anchors = self.draw(batch, 0).to(features.g.device)
        batch = batch.to(features.g.device)
        if not len(anchors):
            return _no_rows(self.draft, batch, features)
        args = self.draft, batch, features, self.head, anchors, self.loss
        return block_rows_ref(*args, row_losses=self.row_losses)[0]
