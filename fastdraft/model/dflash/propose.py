"""Drafting with DFlash: the context's keys and values of sequences, and the blocks of tokens it proposes.

With the target having run x_0 .. x_{n-1} and x_n chosen, a round

    extends  K_u, V_u of every layer to the new positions u < n from the target's own g_u;
    drafts   one block of B rows at positions n .. n + B - 1: the first reads x_n, the others the mask token. Slot k drafts
             x_{n+k} (fill-in labels) or x_{n+k+1} (shifted).

All B rows run whatever depth is asked for, because a draft was trained on whole blocks. The slots are independent of each
other given the context, so a sampled chain draws each token from its own distribution. The block's keys and values are
thrown away after the round.

Sequences have lengths of their own: what lies past one's own positions is written over, and nobody sees it.

# S sequences, r tokens, m drafted tokens, B rows of a block, H hidden, Hq/Hkv heads, D head dim, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdraft.batch import TargetHead
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.proposal import DecodeSettings, Proposals, draw_each, probabilities


def refuse_settings(config: DFlashConfig, settings: DecodeSettings) -> None:
    """Raises ValueError for a way to decode that a block does not have."""
    if settings.eagle_topk > 1:
        raise ValueError(
            f"a {config.title} draft proposes a chain, not a tree of eagle_topk {settings.eagle_topk}; set eagle_topk 1"
        )
    if settings.num_steps > config.num_drafted:
        raise ValueError(
            f"num_steps {settings.num_steps} is more than the {config.num_drafted} tokens that a block of "
            f"{config.block_size} rows drafts; lower it"
        )


class BlockDrafter:
    """The draft's context of S sequences: K, V of `length` positions in each layer."""

    def __init__(self, draft: DFlashDraft, head: TargetHead, batch: int, capacity: int):
        c, like = draft.config, draft.fc.weight
        self.draft, self.head = draft, head
        self.draft_ids = torch.arange(c.vocab_size, device=like.device)
        shape = c.num_hidden_layers, batch, c.num_key_value_heads, capacity + c.block_size, c.head_dim
        # Zeros: what is masked counts nothing, and nothing times NaN would be NaN.
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.length = torch.zeros(batch, dtype=torch.int64, device=like.device)

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.length.device)
        self.keys, self.values, self.length = self.keys[:, index], self.values[:, index], self.length[index]

    def extend(
        self,
        g: Tensor,  # [S, r, K*H] the target's states at positions length .. length + r - 1
        counts: list[int],  # rows of each sequence that are no fillers
    ) -> None:
        context = self.draft.context(g.flatten(0, 1))
        places = self.length[:, None] + torch.arange(g.shape[1], device=g.device)
        for layer in range(self.draft.config.num_hidden_layers):
            self._write(layer, context, places)
        self.length = self.length + torch.tensor(counts, device=g.device)

    def block(
        self,
        roots: Tensor,  # [S] int64, the tokens at each sequence's position `length`
    ) -> Tensor:  # [S, B, H] states after the final norm
        draft, c = self.draft, self.draft.config
        slots = torch.arange(c.block_size, device=roots.device)
        shape = len(roots), c.block_size
        h = draft.embedding[torch.where(slots == 0, roots[:, None], c.mask_token_id)].flatten(0, 1)
        places = self.length[:, None] + slots
        width = int(self.length.max()) + c.block_size
        column = torch.arange(width, device=roots.device)
        whole = (column < self.length[:, None, None] + c.block_size).expand(*shape, width)
        near = (column <= places[:, :, None]) & (column >= places[:, :, None] - ((c.sliding_window or 0) - 1))
        for number in range(c.num_hidden_layers):
            mask = whole if c.layer_types[number] == "full_attention" else near
            h = draft.through_layer(number, h, partial(self._attend, number, places, mask))
        return draft.norm(h).unflatten(0, shape)

    def _attend(
        self,
        layer: int,
        places: Tensor,  # [S, B] int64
        mask: Tensor,  # [S, B, width] bool
        x: Tensor,  # [S * B, H]
    ) -> Tensor:  # [S * B, Hq, D]
        q = self.draft.queries(layer, x, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
        self._write(layer, x, places)
        keys, values = (own[layer, :, :, : mask.shape[2]] for own in (self.keys, self.values))
        out = F.scaled_dot_product_attention(q, keys, values, mask[:, None], enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def propose(
        self,
        token_ids: Tensor,  # [S, r] int64, the tokens after the positions of g; a sequence's last is its root
        g: Tensor,  # [S, r, K*H]
        counts: list[int],
        depths: list[int],
        settings: DecodeSettings,
        generators: list[torch.Generator],
    ) -> Proposals:
        self.extend(g, counts)
        first, depth = self.draft.config.first_slot, max(depths)
        last = torch.tensor(counts, device=g.device) - 1
        roots = token_ids.gather(1, last[:, None])[:, 0]
        tokens, q = self.draw(self.block(roots)[:, first : first + depth], roots, depths, settings, generators)
        return Proposals(tokens, torch.arange(depth).repeat(len(depths), 1), depths, q)

    def draw(
        self,
        states: Tensor,  # [S, m, H] of the slots that draft
        roots: Tensor,  # [S] int64
        depths: list[int],
        settings: DecodeSettings,
        generators: list[torch.Generator],
    ) -> tuple[Tensor, Tensor | None]:  # [S, m] int64; what each was drawn from [S, m, V], None where it was not drawn
        """The tokens of all slots at once: they do not know of each other."""
        logits = self.draft.logits(states, roots[:, None].expand(states.shape[:2]), self.head)
        if settings.draws_chain:
            q = probabilities(logits.flatten(0, 1), settings).unflatten(0, logits.shape[:2])
            return draw_each(q, generators, depths), q
        return logits.argmax(-1), None

    def _write(
        self,
        layer: int,
        x: Tensor,  # [S * n, H]
        places: Tensor,  # [S, n] int64
    ) -> None:
        k, v = (y.unflatten(0, places.shape).transpose(1, 2) for y in self.draft.keys_values(layer, x, places.flatten()))
        place = places[:, None, :, None].expand(k.shape)
        self.keys[layer].scatter_(2, place, k)
        self.values[layer].scatter_(2, place, v)


class WalkingDrafter(BlockDrafter):
    """A drafter whose slots are drafted one after the other, each given the token before it; the root is before slot 0."""

    def choices(
        self,
        states: Tensor,  # [S, m, H]
    ) -> Callable[[int, Tensor], tuple[Tensor, Tensor | None]]:
        """Of a slot and the tokens before it [S]: logits [S, K], and the tokens that they are of, None for all of V."""
        raise NotImplementedError

    def draw(
        self,
        states: Tensor,  # [S, m, H]
        roots: Tensor,  # [S] int64
        depths: list[int],
        settings: DecodeSettings,
        generators: list[torch.Generator],
    ) -> tuple[Tensor, Tensor | None]:
        token, tokens, drawn_from, choices = roots, [], [], self.choices(states)
        for slot in range(states.shape[1]):
            logits, ids = choices(slot, token)
            if settings.draws_chain:
                p = probabilities(logits, settings)
                place = draw_each(p[:, None], generators, [int(slot < depth) for depth in depths])[:, 0]
                whole = p if ids is None else p.new_zeros(len(p), len(self.draft_ids)).scatter(1, ids, p)
                drawn_from.append(whole)
            else:
                place = logits.argmax(-1)
            token = place if ids is None else ids.gather(1, place[:, None])[:, 0]
            tokens.append(token)
        return torch.stack(tokens, 1), torch.stack(drawn_from, 1) if drawn_from else None
