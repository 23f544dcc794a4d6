"""SpecForge's EAGLE-3 step on the same weights and inputs: `OnlineEagle3Model` from a checkout the user points to.

What its own trainer does around the model is done here by calling its code: ids and the teacher's states shifted left by
`utils.padding`, the compact teacher (the cheaper of its two) where the draft vocabulary is smaller than the target's, step
losses weighed by 0.8^i, and its `BF16Optimizer` (fp32 masters, AdamW, clipping). Differences that were chosen:

- The loss mask. Its offline data marks row t by loss_mask[t], which belongs to the token two before the one the row
  predicts. Here row t is marked by loss_mask[t + 2], so that both train on the same rows and losses can be compared.
- Documents. Its EAGLE-3 trainer has no packing: a batch is `batch_size` conversations padded to the longest, 1 in its
  defaults. So a pack's conversations are cut into batches of --peer-batch in the pack's order, one backward each, and one
  optimizer step follows, as for ours. Tokens are counted as ours are: padding is nobody's token.
- Its loss is a mean over a batch's rows, padding included; `losses` multiplies that back into a sum.

Nothing is stubbed: its imports need torch, triton, transformers and huggingface_hub alone (flash_attn is optional there).
On a CPU its Triton loss runs under TRITON_INTERPRET=1, with `--peer-attention sdpa`; there
torch.compile is switched off.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.work import Work, llama_config, make_draft, make_head
from fastdraft.batch import Batch, Features
from fastdraft.config import OptimConfig

# B conversations of a batch, L tokens of the longest


def find_checkout(checkout: Path, device: torch.device) -> None:
    """Makes SpecForge importable from its checkout. ValueError where it is none."""
    if not (checkout / "specforge").is_dir():
        raise ValueError(f"{checkout} has no folder specforge; --specforge needs the root of a SpecForge checkout")
    if device.type == "cpu":
        torch._dynamo.config.disable = True
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))


class SpecForge:
    """`bench.step`'s provider: `model` runs forward and backward of a pack, `update` the optimizer."""

    late_moments = True
    per_token_bytes = None

    def __init__(self, work: Work, checkout: Path, attention: str, batch_size: int):
        find_checkout(checkout, work.device)
        from specforge.algorithms.eagle3.model import OnlineEagle3Model
        from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
        from specforge.optimizer import BF16Optimizer
        from specforge.utils import padding

        c, optim = work.config, OptimConfig()
        longest = max(max(batch.lengths) for batch in work.batches)
        config = llama_config(c, longest + 16)
        with torch.device(work.device):
            draft = LlamaForCausalLMEagle3(config, attention_backend=attention)
        draft = draft.to(work.dtype)
        state = make_draft(c, work.dtype, work.device).state_dict()
        missing, unknown = draft.load_state_dict(state, strict=False)
        if unknown or any("rotary" not in name for name in missing):
            raise ValueError(f"{checkout}'s draft lacks {unknown} and has {missing} besides; it is another version")
        del state
        draft.freeze_embedding()
        self.draft, self.attention, self.compact = draft, attention, c.draft_vocab_size < c.vocab_size
        self.head = make_head(c, work.dtype, work.device).weight
        self.online = OnlineEagle3Model(draft, length=len(work.step_weights), attention_backend=attention)
        self.optimizer = BF16Optimizer(
            draft, lr=optim.lr, max_grad_norm=optim.clip, warmup_ratio=optim.warmup_ratio, total_steps=1000
        )
        self.step_weights = work.step_weights.tolist()
        self.own_inputs = 0
        self.packs = [
            [self.padded(part, padding) for part in split(batch, features, batch_size)]
            for batch, features in zip(work.batches, work.features, strict=True)
        ]

    def padded(self, documents: list[tuple[Tensor, Tensor, Features]], padding) -> dict[str, Tensor]:
        """One batch as the trainer hands it to the model: ids [B, L], g [B, L, 3*Ht], f [B, L, Ht] shifted, masks."""
        device = documents[0][2].f.device
        stack = lambda parts: (pad_sequence(parts, batch_first=True) if len(parts) > 1 else parts[0][None]).to(device)  # noqa: E731
        ids = stack([ids for ids, _, _ in documents])
        trained = [torch.cat([mask[2:], mask.new_zeros(min(2, len(mask)))]) for _, mask, _ in documents]
        f = padding(stack([x.f for _, _, x in documents]), left=False)
        self.own_inputs += f.nbytes
        g = stack([x.g for _, _, x in documents])
        if len(documents) > 1:
            self.own_inputs += g.nbytes
        target = {"target_hidden_for_compact": f, "target_head_weight": self.head, "target": None}
        return {
            "input_ids": padding(ids, left=False),
            "attention_mask": stack([torch.ones(len(ids), dtype=torch.int64) for ids, _, _ in documents]),
            "loss_mask": stack(trained).long()[..., None],
            "hidden_states": g,
            **(target if self.compact else {"target": f}),
        }

    def model(self, k: int) -> None:
        """Forward and backward of pack k, batch by batch."""
        sums = []
        for inputs in self.packs[k]:
            if not self.compact:
                inputs = inputs | {"target": torch.nn.functional.linear(inputs["target"], self.head)}
            step_losses = self.online(**inputs)[0]
            sum(w * loss for w, loss in zip(self.step_weights, step_losses, strict=True)).backward()
            rows = inputs["input_ids"].numel()
            sums.append(rows * torch.stack([loss.detach().double() for loss in step_losses]))
        self.sums = torch.stack(sums).sum(0)

    def update(self) -> None:
        self.optimizer.step()

    def losses(self) -> Tensor:  # [T] sums over the last pack's live rows
        return self.sums


def split(batch: Batch, features: Features, batch_size: int) -> list[list[tuple[Tensor, Tensor, Features]]]:
    """A pack's documents (ids, loss mask, features), `batch_size` at a time."""
    parts = [x.split(batch.lengths) for x in (batch.input_ids, batch.loss_mask, features.g, features.f)]
    documents = [(ids, mask, Features(g, f)) for ids, mask, g, f in zip(*parts, strict=True)]
    return [documents[i : i + batch_size] for i in range(0, len(documents), batch_size)]
