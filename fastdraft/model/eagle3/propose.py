"""Drafting with EAGLE-3: the draft's keys and values of sequences, and the chains or trees of tokens it proposes.

With the target having run x_0 .. x_{n-1} and t = n-1, a round

    extends  K^0_s, V^0_s to the new positions s <= t from the target's own g_s and the token x_{s+1};
    drafts   step i = 0 .. num_steps-1, which reads the token drafted last (x_{t+1} at step 0) and h^i = y^{i-1}
             (norm(y^{i-1}) with norm_output; h^0 = fc(g_t)), has RoPE position t + i, and attends to K^0_s for s <= t
             and to its own branch's K^1 .. K^i (docs/mathematics.md).

The K^i of a round's proposals are thrown away after it. A chain takes the best token of each step or draws one. A tree
grows as SGLang grows it: each step takes the eagle_topk best children of each of the eagle_topk best nodes of the step
before; of all these candidates the num_draft_tokens - 1 with the largest product of draft probabilities are proposed.

Sequences have lengths of their own: what lies past one's own rows is written over, and nobody sees it.

# B sequences, r rows, m drafted tokens, P rows proposed in this round, Ht / H target / draft hidden, Hq/Hkv draft heads,
# D head dim, V / Vd target / draft vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.proposal import DecodeSettings, Proposals, draw_each, probabilities


class DraftState:
    """The draft's keys and values of B sequences: K^0, V^0 of `length` positions, then the round's proposals."""

    def __init__(self, draft: Draft, batch: int, capacity: int):
        c, like = draft.config, draft.fc.weight
        self.draft = draft
        self.draft_ids = draft.draft_ids
        # Zeros: what is masked counts nothing, and nothing times NaN would be NaN.
        self.keys = like.new_zeros(batch, c.num_key_value_heads, capacity, c.head_dim)
        self.values = torch.zeros_like(self.keys)
        self.length = torch.zeros(batch, dtype=torch.int64, device=like.device)  # positions whose K^0, V^0 are kept
        self._longest = 0
        self._proposed = 0  # P, rows behind them

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.length.device)
        self.keys, self.values, self.length = self.keys[index], self.values[index], self.length[index]
        self._longest = int(self.length.max())

    def extend(
        self,
        token_ids: Tensor,  # [B, r] int64
        g: Tensor,  # [B, r, 3*Ht]
        counts: list[int],  # rows of each sequence that are no fillers
    ) -> Tensor:  # [B, 1, H] y^0 of each sequence's last position
        """Step 0 from true features; forgets the proposals. Only the last row is carried past its keys and values."""
        b, r = token_ids.shape
        h = self.draft.combine(g.flatten(0, 1).to(self.draft.fc.weight.dtype)).view(b, r, -1)
        places = self.length[:, None] + torch.arange(r, device=h.device)
        count = torch.tensor(counts, device=h.device)
        q = self._write(token_ids, h, places, places)
        self.length, self._proposed = self.length + count, 0
        self._longest = int(self.length.max())
        last = torch.arange(b, device=h.device), count - 1
        return self._finish(h[last][:, None], q[last][:, None], None)

    def step(
        self,
        token_ids: Tensor,  # [B, r] int64, the tokens drafted last
        y: Tensor,  # [B, r, H] of the step before
        i: int,
        sees: Tensor | None = None,  # [B, r, P, these rows included] bool: its own branch; None: all (a chain)
    ) -> Tensor:  # [B, r, H] y^i
        """Draft step i >= 1 at position t = length - 1."""
        h, (b, r) = self.draft.fed_back(y), token_ids.shape
        places = self.length[:, None] + self._proposed + torch.arange(r, device=h.device)
        positions = (self.length - 1 + i)[:, None].expand(b, r)
        self._proposed += r
        return self._finish(h, self._write(token_ids, h, positions, places), sees)

    def propose(
        self,
        token_ids: Tensor,  # [B, r] int64
        g: Tensor,  # [B, r, 3*Ht]
        counts: list[int],
        depths: list[int],
        settings: DecodeSettings,
        generators: list[torch.Generator],
    ) -> Proposals:
        y = self.extend(token_ids, g, counts)
        if settings.eagle_topk > 1:
            return _propose_trees(self, y, depths, settings.eagle_topk, settings.num_verified - 1)
        return _propose_chains(self, y, depths, settings, generators)

    def log_q(
        self,
        y: Tensor,  # [B, r, H]
    ) -> Tensor:  # [B, r, Vd]
        return self.draft.logits(y).float().log_softmax(-1)

    def _write(self, token_ids: Tensor, h: Tensor, positions: Tensor, places: Tensor) -> Tensor:  # q [B, r, Hq, D]
        b, r = token_ids.shape
        q, k, v = (
            x.unflatten(0, (b, r)) for x in self.draft.qkv(token_ids.flatten(), h.flatten(0, 1), positions.flatten())
        )
        place = places[:, None, :, None].expand(b, k.shape[2], r, k.shape[3])
        self.keys.scatter_(2, place, k.transpose(1, 2))
        self.values.scatter_(2, place, v.transpose(1, 2))
        return q

    def _finish(
        self,
        h: Tensor,  # [B, r, H]
        q: Tensor,  # [B, r, Hq, D]
        sees: Tensor | None,  # [B, r, P] bool
    ) -> Tensor:  # [B, r, H]
        (b, r), num_kv, width = h.shape[:2], self.keys.shape[1], self._longest + self._proposed
        column, length = torch.arange(width, device=h.device), self.length[:, None, None]
        if sees is None:
            mask = (column < length + self._proposed).expand(b, r, width)
        else:
            own = length + torch.arange(self._proposed, device=h.device)
            mask = (column < length).repeat(1, r, 1).scatter(2, own.expand(b, r, -1), sees)
        grouped = q.unflatten(2, (num_kv, -1)).permute(
            0, 2, 3, 1, 4
        )  # [B, Hkv, group, r, D]: a group's heads are more rows
        group = grouped.shape[2]
        out = F.scaled_dot_product_attention(
            grouped.flatten(2, 3), self.keys[:, :, :width], self.values[:, :, :width], mask.repeat(1, group, 1)[:, None]
        )
        attention = out.unflatten(2, (group, r)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return self.draft.finish(h, attention)


def _propose_chains(
    state: DraftState,
    y: Tensor,  # [B, 1, H]
    depths: list[int],
    settings: DecodeSettings,
    generators: list[torch.Generator],
) -> Proposals:
    depth, tokens, qs = max(depths), [], []
    for i in range(depth):
        if i:
            y = state.step(tokens[-1], y, i)
        logits = state.draft.logits(y)
        if settings.draws_chain:
            qs.append(probabilities(logits.flatten(0, 1), settings)[:, None])
            drawn = draw_each(qs[-1], generators, [int(i < own) for own in depths])
        else:
            drawn = logits.argmax(-1)
        tokens.append(state.draft_ids[drawn])
    parents = torch.arange(depth).repeat(len(depths), 1)
    return Proposals(torch.cat(tokens, 1), parents, depths, torch.cat(qs, 1) if qs else None)


def _propose_trees(state: DraftState, y: Tensor, depths: list[int], k: int, num_nodes: int) -> Proposals:
    """Candidates are numbered as they are found, so a parent's number is smaller than its children's. Those below a
    sequence's depth have no chance, so they come last."""
    b, device = len(depths), y.device
    depth = torch.tensor(depths, device=device)[:, None]
    own = torch.eye(k, dtype=torch.bool, device=device).expand(b, k, k)
    score, token = (x[:, 0] for x in state.log_q(y).topk(k))  # [B, k] of the nodes to expand next
    token = state.draft_ids[token]
    node = torch.arange(k, device=device).expand(b, k)
    hidden, sees = y.expand(-1, k, -1), own
    scores, tokens, parents = [score], [token], [torch.full_like(node, -1)]
    for i in range(1, max(depths)):
        y = state.step(token, hidden, i, sees)
        best, ids = state.log_q(y).topk(k)  # [B, k, k]
        scores.append((score[:, :, None] + best).flatten(1).masked_fill(depth <= i, -torch.inf))
        tokens.append(state.draft_ids[ids].flatten(1))
        parents.append(node.repeat_interleave(k, 1))
        score, chosen = scores[-1].topk(k)
        token, row = tokens[-1].gather(1, chosen), chosen // k
        node = k + (i - 1) * k * k + chosen
        hidden = y.gather(1, row[:, :, None].expand(y.shape))
        sees = torch.cat([sees.gather(1, row[:, :, None].expand(sees.shape)), own], 2)
    tokens, parents = torch.cat(tokens, 1), torch.cat(parents, 1)
    ranked = torch.cat(scores, 1).sort(descending=True, stable=True).indices  # stable: a parent before its equal child
    kept = ranked[:, :num_nodes].sort(1).values
    number = torch.zeros(b, tokens.shape[1] + 1, dtype=torch.int64, device=device)  # by candidate + 1; 0 is the root's
    number.scatter_(1, kept + 1, torch.arange(1, kept.shape[1] + 1, device=device).expand(kept.shape))
    counts = [min(num_nodes, k + (own_depth - 1) * k * k) for own_depth in depths]
    return Proposals(tokens.gather(1, kept), number.gather(1, parents.gather(1, kept) + 1).cpu(), counts)
