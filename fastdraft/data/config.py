"""The `data:` section of a training config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# What rendering a conversation sets itself; continue_final_message would leave out the end of the last turn.
RENDERED_WITH = (
    *("messages", "conversation", "conversations", "tools", "chat_template", "tokenize", "add_generation_prompt"),
    *("continue_final_message", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
)


def checked_template_kwargs(kwargs: Any) -> dict[str, Any]:
    """Further names for a chat template. ValueError: no mapping, or with names that are not for the template."""
    if not isinstance(kwargs, dict):
        raise ValueError(f"chat_template_kwargs must be a mapping of names, got {kwargs!r}")
    if taken := sorted(kwargs.keys() & set(RENDERED_WITH)):
        raise ValueError(f"chat_template_kwargs must not hold {', '.join(taken)}: rendering a conversation sets it")
    return kwargs


class DataConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    paths: list[str] = Field(min_length=1)  # JSONL (.jsonl, .json, .ndjson, also .gz) or .parquet; globs; streaming: URLs
    eval_paths: list[str] = []
    eval_fraction: float = Field(0.05, ge=0, lt=1)  # of conversations, by content hash; used when eval_paths is empty
    max_length: int = Field(4096, ge=3)  # tokens of one sample; three is the least that can train anything
    on_too_long: Literal["split", "truncate"] = "split"
    on_bad_line: Literal["error", "skip"] = "error"
    train_on: Literal["all", "last_turn"] = "all"  # which assistant turns
    pack_tokens: int = 4096  # token budget of one pack
    seed: int = Field(0, ge=0)  # of the order
    cache_dir: str | None = None  # None: ~/.cache/fastdraft
    num_workers: int | None = Field(None, ge=0)  # None: one per core, but none below 32 MB of input; 0: no processes
    streaming: bool = False  # read and tokenise while training, a block at a time; needs max_steps
    block_conversations: int = Field(20_000, gt=0)  # streaming: shuffled and packed together
    vocab_samples: int = Field(100_000, gt=0)  # streaming: conversations for the vocabulary map and held-out data
    chat_template: str | None = None  # path of a Jinja file used instead of the tokenizer's template
    chat_template_kwargs: dict[str, Any] = {}  # passed to the template, e.g. enable_thinking: false

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_for_the_template(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        return checked_template_kwargs(kwargs)

    @model_validator(mode="after")
    def _packs_hold_samples(self) -> DataConfig:
        if self.max_length > self.pack_tokens:
            raise ValueError(
                f"max_length {self.max_length} is more than pack_tokens {self.pack_tokens}: a sample must fit one pack; "
                f"lower data.max_length or raise data.pack_tokens"
            )
        return self
