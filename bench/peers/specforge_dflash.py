"""SpecForge's DFlash step on the same weights, inputs and anchors: `OnlineDFlashModel` from a checkout the user points to.

Its own trainer calls this model with ids, features and loss mask, and steps its `BF16Optimizer`; so does this file. It is
told our anchors where it would draw its own (`_sample_anchor_positions`), sorted and padded as it does. Differences:

- Documents. It has no packing: a batch is `batch_size` conversations padded to the longest. So a pack's conversations are
  cut into batches in the pack's order, one backward each, and one optimizer step follows. Padding is nobody's row.
- Short batches. PyTorch 2.11's flex_attention compiles for no fewer than 128 queries where shapes vary. A batch with fewer
  rows gets anchors that are not kept, which it has for conversations of unlike lengths anyway.
- Normalisation. The summed loss is what is differentiated, since its trainer divides by the whole optimizer step's weights.

Nothing is stubbed. On a CPU `--peer-attention sdpa` takes the place of flex_attention, and torch.compile is switched off.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config

from bench.block_work import BlockWork, make_draft, make_embedding, make_head
from bench.peers.specforge import split
from fastdraft.config import OptimConfig

# b conversations of a batch, S tokens of the longest, A anchors of the one that has most


FEWEST_ROWS = 128


class SpecForgeDFlash:
    """A provider (`bench.providers`)."""

    late_moments = True
    per_token_bytes = None

    def __init__(self, work: BlockWork, checkout: Path, attention: str, batch_size: int):
        if not (checkout / "specforge").is_dir():
            raise ValueError(f"{checkout} has no folder specforge; --specforge needs the root of a SpecForge checkout")
        if work.device.type == "cpu":
            torch._dynamo.config.disable = True
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
        from specforge.modeling.draft.dflash import DFlashDraftModel
        from specforge.optimizer import BF16Optimizer

        c, optim = work.config, OptimConfig()
        config = Qwen3Config(
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            vocab_size=c.vocab_size,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", **c.rope_parameters},
            max_position_embeddings=c.max_position_embeddings,
            layer_types=list(c.layer_types),
            sliding_window=c.sliding_window,
            use_sliding_window=c.sliding_window is not None,
            attention_bias=False,
        )
        config.block_size, config.num_target_layers = c.block_size, c.num_target_layers
        config.dflash_config = {"mask_token_id": c.mask_token_id, "target_layer_ids": list(c.layers)}
        config._attn_implementation = attention
        with torch.device(work.device):
            draft = DFlashDraftModel(config)
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
        self.online = OnlineDFlashModel(
            draft,
            head,
            embedding,
            c.mask_token_id,
            c.block_size,
            attention,
            loss_decay_gamma=work.loss.gamma,
            loss_type={"ce": "dflash", "dpace": "dpace"}[work.loss.kind],
            dpace_alpha=work.loss.dpace_alpha,
        )
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
            if len(documents) > 1:
                self.own_inputs += inputs["hidden_states"].nbytes
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
            total, weights = metrics["loss_terms"]
            (loss * weights).backward()
            sums.append(total.detach().double())
        self.sums = torch.stack(sums).sum(0)

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
