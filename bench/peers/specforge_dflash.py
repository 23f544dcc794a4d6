"""SpecForge's DFlash or DSpark step on the same weights, inputs and anchors, from a checkout the user points to.

Its own trainer calls `OnlineDFlashModel` or `OnlineDSparkModel` with ids, features and loss mask, and steps its
`BF16Optimizer`; so does this file. It is
told our anchors where it would draw its own (`_sample_anchor_positions`), sorted and padded as it does. Differences:

- Documents. It has no packing: a batch is `batch_size` conversations padded to the longest. So a pack's conversations are
  cut into batches in the pack's order, one backward each, and one optimizer step follows. Padding is nobody's row.
- Short batches. PyTorch 2.11's flex_attention compiles for no fewer than 128 queries where shapes vary. A batch with fewer
  rows gets anchors that are not kept, which it has for conversations of unlike lengths anyway.
- Normalisation. The summed loss is what is differentiated, since its trainer divides by the whole optimizer step's weights.
  DSpark's model divides by them itself, and reads their sum back to do so; that is multiplied back.

Nothing is stubbed. On a CPU `--peer-attention sdpa` takes the place of flex_attention, and torch.compile is switched off.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bench.block_work import BlockWork, make_draft, make_embedding, make_head, qwen3_config
from bench.peers.specforge import find_checkout, split
from fastdraft.config import OptimConfig
from fastdraft.model.dspark.loss import DSparkLoss

# b conversations of a batch, S tokens of the longest, A anchors of the one that has most


FEWEST_ROWS = 128


class SpecForgeDFlash:
    """A provider (`bench.providers`)."""

    late_moments = True
    per_token_bytes = None

    def __init__(self, work: BlockWork, checkout: Path, attention: str, batch_size: int):
        find_checkout(checkout, work.device)
        from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel, OnlineDSparkModel
        from specforge.modeling.draft.dflash import DFlashDraftModel
        from specforge.modeling.draft.dspark import DSparkDraftModel
        from specforge.optimizer import BF16Optimizer

        c, loss, optim = work.config, work.loss, OptimConfig()
        self.loss, self.spark = loss, isinstance(loss, DSparkLoss)
        config = qwen3_config(c)
        config.block_size, config.num_target_layers = c.block_size, c.num_target_layers
        config.dflash_config = {"mask_token_id": c.mask_token_id, "target_layer_ids": list(c.layers)}
        if self.spark:
            heads = {"enable_confidence_head": True, "confidence_head_with_markov": True}
            config.dflash_config |= heads | {"projector_type": "dspark", "markov_rank": c.markov_rank}
        config._attn_implementation = attention
        with torch.device(work.device):
            draft = (DSparkDraftModel if self.spark else DFlashDraftModel)(config)
        draft = draft.to(work.dtype)
        state = make_draft(c, work.dtype, work.device).state_dict()
        missing, unknown = draft.load_state_dict(state, strict=False)
        if unknown or any("rotary" not in name for name in missing):
            raise ValueError(f"{checkout}'s draft lacks {unknown} and has {missing} besides; it is another version")
        del state
        head = frozen(
            nn.Linear(c.hidden_size, c.vocab_size, bias=False, device="meta"), make_head(c, work.dtype, work.device).weight
        )
        embedding = frozen(
            nn.Embedding(c.vocab_size, c.hidden_size, device="meta"), make_embedding(c, work.dtype, work.device)
        )
        self.draft = draft
        made = OnlineDSparkModel if self.spark else OnlineDFlashModel
        if self.spark:
            options = {
                "dspark_ce_loss_alpha": loss.ce_weight,
                "dspark_l1_loss_alpha": loss.l1_weight,
                "dspark_confidence_head_alpha": loss.confidence_weight,
            }
        else:
            options = {"loss_type": {"ce": "dflash", "dpace": "dpace"}[loss.kind], "dpace_alpha": loss.dpace_alpha}
        given = draft, head, embedding, c.mask_token_id, c.block_size, attention
        self.online = made(*given, loss_decay_gamma=loss.gamma, **options)
        self.online._sample_anchor_positions = lambda *_: self.chosen
        self.optimizer = BF16Optimizer(
            draft, lr=optim.lr, max_grad_norm=optim.clip, warmup_ratio=optim.warmup_ratio, total_steps=1000
        )
        self.own_inputs = 0
        self.packs = [self.batches(work, k, batch_size) for k in range(len(work.batches))]

    def batches(self, work: BlockWork, k: int, size: int) -> list[tuple[dict[str, Tensor], tuple[Tensor, Tensor]]]:
        """A pack as its trainer hands it over, batch by batch: inputs [b, S, ...], and anchors with their mask [b, A]."""
        batch, anchors, made, start = work.batches[k], work.anchors[k], [], 0
        for documents in split(batch, work.features[k], size):
            chosen = []
            for ids, _, _ in documents:
                inside = (anchors >= start) & (anchors < start + len(ids))
                chosen.append(anchors[inside] - start)
                start += len(ids)
            if not any(map(len, chosen)):
                continue
            stack = partial(padded, device=work.device)
            inputs = {
                "input_ids": stack([ids for ids, _, _ in documents]),
                "loss_mask": stack([mask.float() for _, mask, _ in documents]),
                "hidden_states": stack([x.g for _, _, x in documents]),
            }
            if self.spark:
                inputs["target_last_hidden_states"] = stack([x.f for _, _, x in documents])
            if len(documents) > 1:
                self.own_inputs += sum(x.nbytes for name, x in inputs.items() if name.endswith("hidden_states"))
            kept = stack([torch.ones(len(x), dtype=torch.bool) for x in chosen])
            more = (0, max(0, -(-FEWEST_ROWS // work.config.block_size) - kept.shape[1]))
            made.append((inputs, (F.pad(stack(chosen), more), F.pad(kept, more))))
        return made

    def model(self, k: int) -> None:
        """Forward and backward of pack k, batch by batch."""
        sums = []
        for inputs, chosen in self.packs[k]:
            self.chosen = chosen
            loss, _, metrics = self.online(**inputs)
            total, weights = self.summed(metrics)
            (loss * weights).backward()
            sums.append(total.detach().double())
        self.sums = torch.stack(sums).sum(0)

    def summed(self, metrics: dict) -> tuple[Tensor, Tensor]:  # the weighted sum of losses, and of weights
        if not self.spark:
            return metrics["loss_terms"]
        parts, loss = metrics["ratio_metrics"], self.loss
        terms = {"ce_loss": loss.ce_weight, "l1_loss": loss.l1_weight, "confidence_loss": loss.confidence_weight}
        return sum(weight * parts[name][0] for name, weight in terms.items()), parts["ce_loss"][1]

    def update(self) -> None:
        self.optimizer.step()

    def losses(self) -> Tensor:  # [1] the last pack's sum of weighted losses
        return self.sums[None]


def frozen(module: nn.Module, weight: Tensor) -> nn.Module:
    """The module with this weight and no gradient."""
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def padded(parts: list[Tensor], device: torch.device) -> Tensor:
    """[b, longest, ...]; a part alone is not copied."""
    return (pad_sequence(parts, batch_first=True) if len(parts) > 1 else parts[0][None]).to(device)
