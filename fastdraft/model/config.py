"""The draft's shape: derived from a target's config.json, written to and read from the serving engines' config.json."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


def default_layers(num_target_layers: int) -> tuple[int, int, int]:
    """Layers whose outputs feed the draft when nobody chooses: 1, n//2 - 1, n - 4, counted from 0."""
    return 1, num_target_layers // 2 - 1, num_target_layers - 4


class DraftConfig(BaseModel):
    """Shape of a draft. Field names follow transformers' Llama config; `layers` counts target layers' outputs from 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = Field(gt=0)
    target_hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    draft_vocab_size: int = Field(gt=0)
    num_target_layers: int = Field(gt=0)
    layers: tuple[int, int, int]
    rms_norm_eps: float = Field(gt=0)
    rope_parameters: dict[str, Any]
    max_position_embeddings: int = Field(gt=0)
    initializer_range: float = 0.02
    fc_norm: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @model_validator(mode="after")
    def _fits(self) -> DraftConfig:
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} is larger than vocab_size {self.vocab_size}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if "rope_theta" not in self.rope_parameters:
            raise ValueError(f"rope_parameters needs rope_theta; it has {sorted(self.rope_parameters)}")
        low, mid, high = self.layers
        if not 0 <= low < mid < high < self.num_target_layers:
            raise ValueError(
                f"layers {list(self.layers)} must ascend and lie in 0..{self.num_target_layers - 1}"
                + ("; a target needs at least 7 layers for the defaults" if self.num_target_layers < 7 else "")
            )
        return self

    @property
    def uses_default_layers(self) -> bool:
        return self.layers == default_layers(self.num_target_layers)
