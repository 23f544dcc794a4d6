"""SpecForge's EAGLE-3 trained from the beginning by its own model, loss and optimizer, from a checkout the user points to.

What its trainer does around them is done here as in `bench/peers/specforge.py`: ids and the teacher's states shifted left,
step losses weighed by 0.8^i, `BF16Optimizer` with its warm-up and cosine. Its weights begin as its own model draws them.
Chosen here, in its favour where there was a choice:

- The vocabulary and the embedding are those of our drafts, and the target runs packed, as for ours, in the same process.
- Conversations are shuffled anew in every epoch and taken `batch_size` at a time, padded to the longest; one optimizer step
  follows each batch. Its defaults are 1 a batch and a learning rate of 1e-4.
- Row t is marked by loss_mask[t + 2], the token that it predicts; its own data mark it by loss_mask[t].

`as_ours` is the same draft as our module: the names of the weights are the engines', and so are both trainers'.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bench.peers.specforge import find_checkout
from bench.quality import Clock, Stick, fitted_draft
from bench.work import llama_config
from fastdraft.batch import Batch
from fastdraft.config import OptimConfig
from fastdraft.data.loader import read_pack

# B conversations of a batch, L tokens of the longest, Ht target hidden


class SpecForgeRecipe:
    """A training run of SpecForge's draft; `step` takes the next batch."""

    def __init__(
        self, stick: Stick, checkout: Path, attention: str, batch_size: int, lr: float, seed: int, total_steps: int
    ):
        find_checkout(checkout, stick.device)
        from specforge.algorithms.eagle3.model import OnlineEagle3Model
        from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
        from specforge.optimizer import BF16Optimizer
        from specforge.utils import padding

        self.stick, self.padding, self.batch_size = stick, padding, batch_size
        self.ours = fitted_draft(stick)
        c, optim = self.ours.config, OptimConfig()
        config = llama_config(c, stick.config.data.max_length + 16)
        torch.manual_seed(seed)
        with torch.device(stick.device):
            draft = LlamaForCausalLMEagle3(config, attention_backend=attention)
        self.draft = draft.to(next(self.ours.parameters()).dtype)
        frozen = {name: x for name, x in self.ours.state_dict().items() if name in ("embed_tokens.weight", "d2t", "t2d")}
        self.draft.load_state_dict(frozen, strict=False)
        self.names = {*self.ours.trainable()}
        if lacks := self.names - {*self.draft.state_dict()}:
            raise ValueError(f"{checkout}'s draft lacks {', '.join(sorted(lacks))}; it is another version")
        self.draft.freeze_embedding()
        self.compact, self.head = c.draft_vocab_size < c.vocab_size, stick.target.head.weight
        self.step_weights = [stick.config.loss.step_decay**i for i in range(stick.config.ttt_length)]
        self.online = OnlineEagle3Model(self.draft, length=stick.config.ttt_length, attention_backend=attention)
        self.optimizer = BF16Optimizer(
            self.draft, lr=lr, max_grad_norm=optim.clip, warmup_ratio=optim.warmup_ratio, total_steps=total_steps
        )
        self.table = stick.data.train.with_format("arrow")
        self.order, self.random = np.empty(0, np.int64), np.random.default_rng(seed)

    def step(self, clock: Clock) -> int:  # tokens of its conversations
        """Forward and backward of one batch, and the optimizer's step."""
        if len(self.order) < self.batch_size:
            self.order = self.random.permutation(len(self.table))
        rows, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        batch = read_pack(self.table, rows)
        step_losses = self.online(**self.inputs(batch, clock))[0]
        sum(w * loss for w, loss in zip(self.step_weights, step_losses, strict=True)).backward()
        self.optimizer.step()
        return batch.num_tokens

    def inputs(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """As its trainer hands them to the model: ids [B, L], g [B, L, 3*Ht], f [B, L, Ht] shifted, masks."""
        device = self.stick.device
        with clock.forward():
            features = self.stick.target.capture(batch.to(device))
        stack = lambda x: pad_sequence(x.to(device).split(batch.lengths), batch_first=True)  # noqa: E731
        trained = [
            torch.cat([mask[2:], mask.new_zeros(min(2, len(mask)))]) for mask in batch.loss_mask.split(batch.lengths)
        ]
        f = self.padding(stack(features.f), left=False)
        teacher = {"target_hidden_for_compact": f, "target_head_weight": self.head, "target": None}
        return {
            "input_ids": self.padding(stack(batch.input_ids), left=False),
            "attention_mask": stack(torch.ones_like(batch.input_ids)),
            "loss_mask": stack(torch.cat(trained)).long()[..., None],
            "hidden_states": stack(features.g),
            **(teacher if self.compact else {"target": nn.functional.linear(f, self.head)}),
        }

    def as_ours(self) -> nn.Module:
        """Our draft with its weights, as they are now."""
        self.ours.load_state_dict({n: x for n, x in self.draft.state_dict().items() if n in self.names}, strict=False)
        return self.ours
