"""The DFlash2 draft: DFlash's layers with a grouped dynamic causal convolution on either side of attention and of the MLP,
and a selector among the tokens that the target's head ranks highest in each slot.

For a branch (attention or MLP) with normed input n, of the residual stream h:

    delta = kernel_projection(n)            [2, T, G] of each row: its own part of both convolutions' coefficients
    h + conv(run(conv(n; base[0], delta[0])); base[1], delta[1])

`kernels/block_conv.py` says what conv is. With base 1 at the first tap and everything else 0 both are the identity, and the
draft is DFlash's. The context's keys and values are of the context as it is; only block rows are convolved.

    selector's score of candidate c in a slot, after token p = logit_c + <A[p] * hidden_projection(state), B[c]>

with A and B its codebooks. Parameter names are the serving engines' names, so the state dict is the checkpoint.

# n rows, H hidden, T taps, G groups, V vocabulary, K candidates, R rank
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from fastdraft.batch import TargetHead
from fastdraft.kernels.block_conv import block_conv_ref
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.mixer import Branch
from fastdraft.model.dflash2.config import DFlash2Config


class _Convolution(nn.Module):
    """Both sides of one branch."""

    def __init__(self, c: DFlash2Config):
        super().__init__()
        self.base_kernel = nn.Parameter(torch.empty(2, c.conv_kernel_size, c.hidden_size))
        self.kernel_projection = nn.Linear(c.hidden_size, 2 * c.conv_kernel_size * c.conv_groups, bias=False)
        self.be_identity()

    @torch.no_grad()
    def be_identity(self) -> None:
        self.base_kernel.zero_()[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def coefficients(
        self,
        n: Tensor,  # [n, H]
    ) -> Tensor:  # [n, 2, T, G]
        return self.kernel_projection(n).unflatten(-1, (2, self.base_kernel.shape[1], -1))


class _Selector(nn.Module):
    def __init__(self, c: DFlash2Config):
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(c.vocab_size, c.selector_rank))
        self.successor_codebook = nn.Parameter(torch.empty(c.vocab_size, c.selector_rank))
        self.hidden_projection = nn.Linear(c.hidden_size, c.selector_rank, bias=False)

    @torch.no_grad()
    def init(self, std: float, generator: torch.Generator) -> None:
        """With successors of 0 every score is its logit, so an untrained selector chooses what DFlash drafts."""
        for p in (self.predecessor_codebook, self.hidden_projection.weight):
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        self.successor_codebook.zero_()


class DFlash2Draft(DFlashDraft):
    """Build with `DFlash2Config`, then `take_from_target` before use."""

    config: DFlash2Config

    def __init__(self, config: DFlash2Config):
        super().__init__(config)
        for layer in self.layers:
            layer.attention_conv = _Convolution(config)
            layer.mlp_conv = _Convolution(config)
        self.candidate_selector = _Selector(config)

    @classmethod
    def of_dflash(cls, draft: DFlashDraft, **changes: int) -> Self:
        """A draft that drafts what a DFlash draft does: its weights, convolutions that are the identity, and a selector
        that adds nothing to a logit. `changes` are fields of the shape beside DFlash's."""
        mine = cls(DFlash2Config.of(draft.config.model_dump() | changes))
        mine.candidate_selector.init(draft.config.initializer_range, torch.Generator().manual_seed(0))
        mine.load_state_dict(draft.state_dict(), strict=False)
        mine.to(draft.fc.weight.dtype)
        return mine

    @torch.no_grad()
    def init_weights(self, std: float, generator: torch.Generator) -> None:
        """As DFlash's; the convolutions are the identity, and the selector adds nothing to a logit."""
        super().init_weights(std, generator)
        for layer in self.layers:
            layer.attention_conv.be_identity()
            layer.mlp_conv.be_identity()
        self.candidate_selector.init(std, generator)

    def candidates(
        self,
        states: Tensor,  # [..., H] after the final norm
        head: TargetHead,
    ) -> tuple[Tensor, Tensor, Tensor]:  # logits [..., K], ids [..., K], projected states [..., R]
        logits, ids = head.logits(states.to(head.weight.dtype)).topk(self.config.selector_top_k, -1)
        return logits, ids, self.candidate_selector.hidden_projection(states)

    def scores(
        self,
        logits: Tensor,  # [..., K] of candidates
        ids: Tensor,  # [..., K] int64
        query: Tensor,  # [..., R] projected states
        previous: Tensor,  # [...] int64 the token before
    ) -> Tensor:  # [..., K] in at least float32
        m, stats = self.candidate_selector, torch.promote_types(logits.dtype, torch.float32)
        pulled = (m.predecessor_codebook[previous] * query).to(stats)
        return logits.to(stats) + (m.successor_codebook[ids].to(stats) @ pulled[..., None])[..., 0]

    def logits(self, states: Tensor, previous: Tensor, head: TargetHead) -> Tensor:
        """The candidates' scores after the token before each row's own, and -inf for all other tokens."""
        logits, ids, query = self.candidates(states, head)
        scores = self.scores(logits, ids, query, previous)
        return scores.new_full((*ids.shape[:-1], self.config.vocab_size), -torch.inf).scatter(-1, ids, scores)

    def around(self, layer: int, branch: Branch, n: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        m: _Convolution = getattr(self.layers[layer], f"{branch}_conv")
        delta = m.coefficients(n)
        slot = torch.arange(len(n), device=n.device) % self.config.block_size
        y = run(block_conv_ref(n, delta[:, 0], m.base_kernel[0], slot))
        return block_conv_ref(y, delta[:, 1], m.base_kernel[1], slot)
