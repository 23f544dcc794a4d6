"""Drafting with EAGLE-3: the draft's keys and values of one sequence, and the chain or tree of tokens it proposes.

With the target having run x_0 .. x_{n-1} and t = n-1, a round

    extends  K^0_s, V^0_s to the new positions s <= t from the target's own g_s and the token x_{s+1};
    drafts   step i = 0 .. num_steps-1, which reads the token drafted last (x_{t+1} at step 0) and h^i = y^{i-1}
             (norm(y^{i-1}) with norm_output; h^0 = fc(g_t)), has RoPE position t + i, and attends to K^0_s for s <= t
             and to its own branch's K^1 .. K^i (docs/mathematics.md).

The K^i of a round's proposals are thrown away after it. A chain takes the best token of each step or draws one. A tree
grows as SGLang grows it: each step takes the eagle_topk best children of each of the eagle_topk best nodes of the step
before; of all these candidates the num_draft_tokens - 1 with the largest product of draft probabilities are proposed.

# r rows, m drafted tokens, Ht / H target / draft hidden, Hq/Hkv draft heads, D head dim, V / Vd target / draft vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.proposal import DecodeSettings, Proposal, probabilities


class DraftState:
    """The draft's keys and values of one sequence: K^0, V^0 of `length` positions, then the round's proposals."""

    def __init__(self, draft: Draft, capacity: int):
        c, like = draft.config, draft.fc.weight
        self.draft = draft
        self.draft_ids = draft.draft_ids
        self.keys = like.new_empty(c.num_key_value_heads, capacity, c.head_dim)
        self.values = torch.empty_like(self.keys)
        self.length = 0
        self._end = 0  # rows in use, proposals included

    def extend(
        self,
        token_ids: Tensor,  # [r] int64, x_{t+1} of positions t = length .. length + r - 1
        g: Tensor,  # [r, 3*Ht] the target's states at these positions
    ) -> Tensor:  # [1, H] y^0 of the last position
        """Step 0 from true features; forgets the proposals. Only the last row is carried past its keys and values."""
        h = self.draft.combine(g.to(self.draft.fc.weight.dtype))
        q = self._append(self.length, token_ids, h, torch.arange(len(h), device=h.device) + self.length)
        self.length = self._end
        return self.draft.finish(h[-1:], self._attend(q[-1:], None))

    def step(
        self,
        token_ids: Tensor,  # [r] int64, the tokens drafted last
        y: Tensor,  # [r, H] of the step before
        i: int,
        sees: Tensor | None = None,  # [r, proposals, these rows included] bool: its own branch; None: all (a chain)
    ) -> Tensor:  # [r, H] y^i
        """Draft step i >= 1 at position t = length - 1."""
        h, positions = self.draft.fed_back(y), torch.full_like(token_ids, self.length - 1 + i)
        return self.draft.finish(h, self._attend(self._append(self._end, token_ids, h, positions), sees))

    def propose(
        self,
        token_ids: Tensor,  # [r] int64, as for `extend`
        g: Tensor,  # [r, 3*Ht]
        depth: int,  # draft steps
        settings: DecodeSettings,
        generator: torch.Generator,
    ) -> Proposal:
        """What to verify next, after the positions that the target has run since the last time."""
        return propose(self, self.extend(token_ids, g), depth, settings, generator)

    def log_q(
        self,
        y: Tensor,  # [r, H]
    ) -> Tensor:  # [r, Vd]
        return self.draft.logits(y).float().log_softmax(-1)

    def _append(self, start: int, token_ids: Tensor, h: Tensor, positions: Tensor) -> Tensor:  # q [r, Hq, D]
        q, k, v = self.draft.qkv(token_ids, h, positions)
        self._end = start + len(h)
        self.keys[:, start : self._end] = k.transpose(0, 1)
        self.values[:, start : self._end] = v.transpose(0, 1)
        return q

    def _attend(
        self,
        q: Tensor,  # [r, Hq, D]
        sees: Tensor | None,  # [r, proposals] bool
    ) -> Tensor:  # [r, Hq, D]
        rows, num_kv = q.shape[0], self.keys.shape[0]
        grouped = q.unflatten(1, (num_kv, -1)).permute(1, 2, 0, 3)  # [Hkv, group, r, D]: a group's heads are more rows
        mask = None
        if sees is not None:
            mask = F.pad(sees, (self.length, 0), value=True).repeat(grouped.shape[1], 1)
        out = F.scaled_dot_product_attention(
            grouped.flatten(1, 2)[None], self.keys[None, :, : self._end], self.values[None, :, : self._end], attn_mask=mask
        )
        return out[0].unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


def propose(state: DraftState, y: Tensor, depth: int, settings: DecodeSettings, generator: torch.Generator) -> Proposal:
    if settings.eagle_topk > 1:
        return _propose_tree(state, y, depth, settings.eagle_topk, settings.num_verified - 1)
    sample = settings.temperature > 0 and settings.sample_draft
    tokens, qs = [], []
    for i in range(depth):
        if i:
            y = state.step(tokens[-1], y, i)
        logits = state.draft.logits(y)
        if sample:
            qs.append(probabilities(logits, settings))
            tokens.append(state.draft_ids[torch.multinomial(qs[-1], 1, generator=generator)[0]])
        else:
            tokens.append(state.draft_ids[logits.argmax(-1)])
    return Proposal(torch.cat(tokens), list(range(depth)), torch.cat(qs) if sample else None)


def _propose_tree(state: DraftState, y: Tensor, depth: int, k: int, num_nodes: int) -> Proposal:
    """Candidates are numbered as they are found, so a parent's number is smaller than its children's."""
    own = torch.eye(k, dtype=torch.bool, device=y.device)
    score, token = (x[0] for x in state.log_q(y).topk(k))  # [k] of the nodes to expand next
    token = state.draft_ids[token]
    node = torch.arange(k, device=y.device)
    hidden, sees = y.expand(k, -1), own
    scores, tokens, parents = [score], [token], [torch.full_like(node, -1)]
    for i in range(1, depth):
        y = state.step(token, hidden, i, sees)
        best, ids = state.log_q(y).topk(k)  # [k, k]
        scores.append((score[:, None] + best).flatten())
        tokens.append(state.draft_ids[ids].flatten())
        parents.append(node.repeat_interleave(k))
        score, chosen = scores[-1].topk(k)
        token, row = tokens[-1][chosen], chosen // k
        node = k + (i - 1) * k * k + chosen
        hidden, sees = y[row], torch.cat([sees[row], own], 1)
    ranked = torch.cat(scores).sort(descending=True, stable=True).indices  # stable: a parent before its equal child
    kept = ranked[:num_nodes].sort().values
    number = {candidate: place + 1 for place, candidate in enumerate(kept.tolist())} | {-1: 0}
    return Proposal(torch.cat(tokens)[kept], [number[p] for p in torch.cat(parents)[kept].tolist()])
