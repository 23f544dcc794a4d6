"""The shape of a DSpark draft: DFlash's backbone with shifted labels, a Markov head and a confidence head.

The engines look for what is DSpark's at the root of config.json. SGLang's parser would find it elsewhere too, but builds
the head from the root alone. The layers stand in dflash_config as well, for an older vLLM.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from fastdraft.model.buffers import Table
from fastdraft.model.dflash.config import COMMENTS, DFlashConfig, Labels


class DSparkConfig(DFlashConfig):
    """`block_size` is B, the tokens that a block drafts: slot k of a block at anchor a drafts x_{a+k+1}."""

    title: ClassVar[str] = "DSpark"
    architecture: ClassVar[str] = "Qwen3DSparkModel"
    served_labels: ClassVar[Labels] = "shifted"
    live_prefix: ClassVar[bool] = True
    comments: ClassVar[dict[str, str]] = {
        **{name: text for name, text in COMMENTS.items() if name != "labels"},
        "block_size": "rows of a block, the anchor's included: each drafts the token after its own place",
        "markov_rank": "width of the Markov head, which corrects a row's logits by the token before",
    }

    block_size: int = Field(7, ge=2, le=32)
    labels: Literal["shifted"] = "shifted"
    markov_rank: int = Field(256, gt=0)
    markov_head_type: str = "vanilla"

    @field_validator("markov_head_type")
    @classmethod
    def _is_served(cls, kind: str) -> str:
        if kind != "vanilla":
            raise ValueError(
                f"a Markov head of type {kind!r} is not made here, and vLLM builds vanilla ones only; set "
                "markov_head_type to vanilla"
            )
        return kind

    def num_parameters(self) -> dict[str, int]:
        count = super().num_parameters()
        heads = 2 * self.vocab_size * self.markov_rank + self.hidden_size + self.markov_rank + 1
        return count | {"trainable": count["trainable"] + heads}

    @property
    def own_head_weights(self) -> int:
        return self.vocab_size * self.markov_rank + self.hidden_size + self.markov_rank

    def extra_buffers(self, rows: int, room: int, dtype: torch.dtype) -> Table:
        del rows
        stats = torch.promote_types(dtype, torch.float32)
        return {
            "markov.e": (room, (self.markov_rank,), dtype),
            "markov.de": (room, (self.markov_rank,), dtype),
            "confidence.input": (room, (self.hidden_size + self.markov_rank,), stats),
        }

    def block_fields(self) -> dict[str, Any]:
        layers = list(self.layers)
        return {
            "target_layer_ids": layers,
            # vLLM 0.26 counts the states that fc reads here alone; where they are missing it takes one a draft layer.
            "dflash_config": {"target_layer_ids": layers},
            "mask_token_id": self.mask_token_id,
            "markov_rank": self.markov_rank,
            "markov_head_type": self.markov_head_type,
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,  # without it SGLang takes it for true and vLLM for false
            "sample_from_anchor": True,
        }
