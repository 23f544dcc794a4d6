"""The `data:` section of a training config."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# What rendering a conversation sets itself; continue_final_message would leave out the end of the last turn.
RENDERED_WITH = (
    *("messages", "conversation", "conversations", "tools", "chat_template", "tokenize", "add_generation_prompt"),
    *("continue_final_message", "return_assistant_tokens_mask", "return_dict", "return_tensors", "strftime_now"),
)
# The day that templates are told is today (Llama 3, gpt-oss). It is a setting and no clock, because a run's parts must see
# the same text: what was prepared, captured or stopped yesterday, or in another time zone, is gone on with today.
TEMPLATE_DATE = "2026-01-01"
# Ways to write a date or a time, of which %s, seconds since 1970, is left out: it depends on the time zone.
DIRECTIVES = [f"%{x}" for x in ("-d", "-m", "-y", "-H", "-I", "-M", "-S", "-j")]
DIRECTIVES += [f"%{x}" for x in "aAbBcCdDeFfgGhHIjklmMnpPrRStTuUVwWxXyYzZ"]

DATE_MACRO = "{% macro strftime_now(format) %}"


def checked_date(date: str) -> str:
    """ValueError: no date as 2026-01-31."""
    try:
        return datetime.datetime.strptime(date, "%Y-%m-%d").date().isoformat()
    except ValueError as error:
        raise ValueError(f"template_date must be a date such as {TEMPLATE_DATE}, got {date!r}") from error


def writes_date(template: str) -> bool:
    return "strftime_now" in template


def with_date(template: str, date: str) -> str:
    """The template, in which `strftime_now` writes a given day, at midnight, instead of reading the clock.

    transformers gives templates that function and lets nobody replace it, but a macro of the same name at the template's
    beginning comes before it. The macro takes a line of its own, whose end Jinja trims.
    """
    if not writes_date(template):
        return template
    day = datetime.datetime.fromisoformat(date)
    percent = "\ue000"  # stands for %% meanwhile, so that %%d is no day
    written = [("%%", percent), *((x, day.strftime(x)) for x in DIRECTIVES), (percent, "%")]
    replaced = "".join(f"|replace({directive!r},{text!r})" for directive, text in written)
    return f"{DATE_MACRO}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


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
    # passed to the template, e.g. enable_thinking: false
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(checked_template_kwargs)] = {}
    # what a template that writes today's date (strftime_now) is told, YYYY-MM-DD; YAML reads one without quotes as a date
    template_date: Annotated[str, BeforeValidator(lambda date: checked_date(str(date)))] = TEMPLATE_DATE

    @model_validator(mode="after")
    def _packs_hold_samples(self) -> DataConfig:
        if self.max_length > self.pack_tokens:
            raise ValueError(
                f"max_length {self.max_length} is more than pack_tokens {self.pack_tokens}: a sample must fit one pack; "
                f"lower data.max_length or raise data.pack_tokens"
            )
        return self
