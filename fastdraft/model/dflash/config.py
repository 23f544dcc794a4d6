"""The shape of a DFlash draft: derived from a target's config.json, written to and read from the engines' config.json.

Layers of the target are counted as outputs from 0, and the engines' `target_layer_ids` count them so too; both add 1 where
they hook the model. A draft has the target's width, because it has no embedding and no head of its own: it reads the
target's embedding and writes through the target's lm_head.

# L draft layers, K captured target layers, B rows of a block, n target layers, V vocabulary
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fastdraft.model.buffers import Table
from fastdraft.model.target_config import (
    active_width,
    canonical_rope,
    language_config,
    read_target_config,
    silent_layers,
    target_rope,
)

ARCHITECTURE = "DFlashDraftModel"
MASK_TOKEN = "<|MASK|>"  # SGLang refuses another id where a tokenizer has this token
LayerType = Literal["full_attention", "sliding_attention"]
Labels = Literal["fill_in", "shifted"]
DRAFTS: dict[Labels, str] = {"fill_in": "x_{a+k}", "shifted": "x_{a+k+1}"}  # what slot k of a block at anchor a drafts


COMMENTS = {  # of `fastdraft init`, setting by setting
    "num_hidden_layers": "draft layers",
    "intermediate_size": "MLP width",
    "num_attention_heads": "",
    "num_key_value_heads": "",
    "head_dim": "",
    "layers": "target layers whose outputs the draft reads, from 0, ascending; any number of them",
    "block_size": "rows of a block, the anchor's included: it drafts one token less",
    "mask_token_id": "stands where a token is to be drafted; no text may have it",
    "labels": "fill_in: slot k predicts x_{a+k}, as the engines serve DFlash; shifted: x_{a+k+1}",
    "layer_types": "full_attention or sliding_attention, one for each layer",
    "sliding_window": "of the sliding layers, at least a block; null without any",
    "rms_norm_eps": "",
    "rope_parameters": "of the target; for several by layer type, that of full attention",
    "max_position_embeddings": "longest context served",
    "initializer_range": "standard deviation of untrained weights",
}


class DFlashConfig(BaseModel):
    """Field names follow transformers' Qwen3 config. `layers` counts target layers' outputs from 0.

    labels: "fill_in", slot k of a block at anchor a predicts x_{a+k} and slot 0 nothing, as the engines serve DFlash;
    "shifted", slot k predicts x_{a+k+1}.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # What a method with this backbone and another head says of itself.
    title: ClassVar[str] = "DFlash"
    architecture: ClassVar[str] = ARCHITECTURE  # in the engines' config.json
    served_labels: ClassVar[Labels] = "fill_in"  # as the engines read a block
    live_prefix: ClassVar[bool] = False  # whether a block's live rows end at the first that has no label
    mixes: ClassVar[bool] = False  # whether the engine is given a mixer (`mixer.py`)
    comments: ClassVar[dict[str, str]] = COMMENTS  # of `fastdraft init`, setting by setting

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(5, gt=0, le=64)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    num_target_layers: int = Field(gt=0)
    layers: tuple[int, ...] = Field(min_length=1)
    block_size: int = Field(16, ge=2, le=32)
    mask_token_id: int = Field(ge=0)
    labels: Labels = "fill_in"
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None = Field(None, gt=0)
    rms_norm_eps: float = Field(gt=0)
    rope_parameters: dict[str, Any]
    max_position_embeddings: int = Field(gt=0)
    initializer_range: float = Field(0.02, gt=0)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @field_validator("rope_parameters")
    @classmethod
    def _rope_is_served_as_trained(cls, rope: dict[str, Any]) -> dict[str, Any]:
        return canonical_rope(rope)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        rotary_dim = int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))
        if rotary_dim % 2 or rotary_dim == 0:
            raise ValueError(
                f"RoPE turns channels in pairs, but head_dim {self.head_dim} and partial_rotary_factor "
                f"{self.rope_parameters.get('partial_rotary_factor', 1.0)} leave it {rotary_dim}; choose an even number"
            )
        last = self.num_target_layers - 2  # SGLang captures where a layer begins, so never the output of the last one
        if list(self.layers) != sorted(set(self.layers)) or not 0 <= self.layers[0] <= self.layers[-1] <= last:
            raise ValueError(
                f"layers {list(self.layers)} must ascend and lie in 0..{last}, the outputs SGLang can capture of "
                f"{self.num_target_layers} layers"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers {self.num_hidden_layers}; "
                "give one for each layer"
            )
        if ("sliding_attention" in self.layer_types) != (self.sliding_window is not None):
            raise ValueError(
                f"sliding_window is {self.sliding_window} and layer_types is {list(self.layer_types)}; a window needs a "
                "sliding_attention layer, and such a layer a window"
            )
        if self.sliding_window is not None and self.sliding_window < self.block_size:
            raise ValueError(
                f"sliding_window {self.sliding_window} is less than block_size {self.block_size}, where the engines differ "
                "in what a row sees of its own block; choose a window of at least a block"
            )
        self._check_mask_token()
        return self

    def _check_mask_token(self) -> None:
        mask = self.mask_token_id
        if mask >= self.vocab_size:
            raise ValueError(
                f"mask_token_id {mask} lies outside the target's vocabulary of {self.vocab_size}, whose embedding has no "
                "row for it; choose an id that no text has"
            )
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        used = {"eos": ends, "bos": [self.bos_token_id], "pad": [self.pad_token_id]}
        if names := [name for name, ids in used.items() if mask in ids]:
            raise ValueError(
                f"mask_token_id {mask} is the target's {' and '.join(names)} token, which texts have, so a block could not "
                "be told from them; choose an id that no text has"
            )

    @property
    def target_hidden_size(self) -> int:
        return self.hidden_size

    @property
    def draft_vocab_size(self) -> int:
        return self.vocab_size

    @property
    def own_head_weights(self) -> int:
        """Numbers of trained matrices behind the layers that each live row is multiplied with."""
        return 0

    @property
    def own_layer_weights(self) -> int:
        """The same of each block row in a layer."""
        return 0

    @property
    def first_slot(self) -> int:
        """The first slot of a block that predicts a token."""
        return 1 if self.labels == "fill_in" else 0

    @property
    def num_drafted(self) -> int:
        """T, the tokens that a block predicts."""
        return self.block_size - self.first_slot

    def num_parameters(self) -> dict[str, int]:
        """How many are trained, and how many the frozen embedding has."""
        h = self.hidden_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = h * (2 * q + 2 * kv) + 3 * h * self.intermediate_size + 2 * h + 2 * self.head_dim
        trained = len(self.layers) * h * h + 2 * h + self.num_hidden_layers * layer
        return {"trainable": trained, "embedding": self.vocab_size * h}

    def extra_buffers(
        self,
        rows: int,  # of a chunk
        room: int,  # live rows that the head takes at a time
        dtype: torch.dtype,  # of the draft
    ) -> Table:
        """Buffers of a chunk that a method's own head and mixer take beside those of `memory.py`."""
        del rows, room, dtype
        return {}

    @classmethod
    def from_target(cls, target_config: dict[str, Any] | PretrainedConfig, /, **overrides: Any) -> Self:
        """The draft's shape for a target: the target's own widths, heads, RoPE and norm epsilon unless overridden.

        `target_config` is a config.json as a dict (nested language model configs are found) or a transformers config.
        MLP width: the target's `intermediate_size`, or the width active per token where it has only experts.
        num_hidden_layers is 5 and block_size 16, as published drafts have them; layers are the engines' default for the
        number of draft layers. Raises ValueError naming every missing field, unknown override or misfit.
        """
        _refuse_unknown(overrides, cls)
        target = language_config(target_config)
        facts = {
            "hidden_size": target.get("hidden_size"),
            "vocab_size": target.get("vocab_size"),
            "num_target_layers": target.get("num_hidden_layers"),
        }
        for key, value in facts.items():
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"{key.replace('num_target', 'num_hidden')} is {value!r} in the target's config.json; it must be a "
                    "whole number above 0"
                )
            if key in overrides and overrides[key] != value:
                why = "; the target's embedding and head are used as they are" if key == "hidden_size" else ""
                raise ValueError(f"{key} is {value} in the target's config.json and cannot be set to {overrides[key]}{why}")
        hidden, heads = facts["hidden_size"], overrides.get("num_attention_heads", target.get("num_attention_heads"))
        num_layers = overrides.get("num_hidden_layers", cls.model_fields["num_hidden_layers"].default)
        derived = {
            "intermediate_size": target.get("intermediate_size") or active_width(target),
            "num_attention_heads": heads,
            "num_key_value_heads": target.get("num_key_value_heads") or heads,
            "head_dim": target.get("head_dim") or (hidden // heads if heads and hidden % heads == 0 else None),
            "rms_norm_eps": target.get("rms_norm_eps"),
            "rope_parameters": None if "rope_parameters" in overrides else target_rope(target),
            "max_position_embeddings": target.get("max_position_embeddings"),
            "initializer_range": target.get("initializer_range") or 0.02,
            "layers": _layers(num_layers, facts["num_target_layers"]),
            "layer_types": ("full_attention",) * num_layers if isinstance(num_layers, int) else None,
        }
        derived |= {key: target.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        values = facts | derived | overrides
        needed = [name for name, field in cls.model_fields.items() if field.is_required() and values.get(name) is None]
        if "mask_token_id" in needed:
            raise ValueError(
                "the draft has no mask_token_id, the id that stands in a block where a token is to be drafted; set "
                "draft.overrides.mask_token_id to an id below the target's vocabulary size "
                f"({facts['vocab_size']}) that no text has"
            )
        if needed:
            raise ValueError(
                f"the target's config.json ({target.get('model_type', 'no model_type')}) does not say {', '.join(needed)}; "
                "complete it, or set " + " ".join(f"draft.overrides.{name}=..." for name in needed)
            )
        pictures = set(target.get("cross_attention_layers") or ())
        if pictures and (silent := [layer for layer in values["layers"] if layer in pictures]):
            ran = set(range(facts["num_target_layers"] - 1)) - pictures
            raise ValueError(silent_layers(silent, values["layers"], ran, f"this target ({target.get('model_type')})"))
        return cls.of(values)

    def block_fields(self) -> dict[str, Any]:
        """What the engines' config.json says of the block, where they look for it."""
        block = {
            "target_layer_ids": list(self.layers),
            "mask_token_id": self.mask_token_id,
            "block_size": self.block_size,
        }
        return {"dflash_config": block}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """A shape of these fields. Raises ValueError with a sentence for each that does not fit."""
        try:
            return cls(**values)
        except ValidationError as error:
            said = [
                (".".join(str(x) for x in e["loc"]) + ": " if e["loc"] else "")
                + e["msg"].removeprefix("Value error, ")
                + (f" (got {e['input']!r})" if e["loc"] and e["type"] != "value_error" else "")
                for e in error.errors()
            ]
            raise ValueError("the draft's shape does not fit: " + "; ".join(said)) from error

    def to_serving(self, dtype: torch.dtype) -> dict[str, Any]:
        """The config.json both engines read, for weights of `dtype`. Raises ValueError for what no engine serves."""
        if self.labels != self.served_labels:
            raise ValueError(
                f"labels: {self.labels} is a training of slot k on {DRAFTS[self.labels]}; the engines read a {self.title} "
                f"block as {self.served_labels} (slot k drafts {DRAFTS[self.served_labels]}), so this draft cannot be "
                f"exported: train with draft.overrides.labels={self.served_labels}"
            )
        name, rope = str(dtype).removeprefix("torch."), self.rope_parameters
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": "qwen3",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "rms_norm_eps": self.rms_norm_eps,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": False,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": dict(rope),
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "block_size": self.block_size,
            "num_target_layers": self.num_target_layers,
            "layer_types": list(self.layer_types),
            **self.block_fields(),
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
            "dtype": name,
            "torch_dtype": name,
        }
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if self.sliding_window is not None:
            config |= {"sliding_window": self.sliding_window, "use_sliding_window": True}
        return config


def evenly_spread_layers(num_draft_layers: int, num_target_layers: int) -> tuple[int, ...]:
    """The engines' default layers (outputs, from 0): one for each draft layer, from 1 to n - 3; n // 2 for a single one."""
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    return tuple(round(1 + i * (num_target_layers - 4) / (num_draft_layers - 1)) for i in range(num_draft_layers))


def choose_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, int]:
    """{"mask_token_id": id} where the tokenizer tells an id that no text can have, else nothing.

    That is the token <|MASK|>, which SGLang asks for where it exists, or the first id behind the tokenizer's last, which a
    target has whose embedding is padded.
    """
    vocabulary = tokenizer.get_vocab()
    if MASK_TOKEN in vocabulary:
        return {"mask_token_id": vocabulary[MASK_TOKEN]}
    behind = max(vocabulary.values(), default=-1) + 1
    return {"mask_token_id": behind} if behind < vocab_size else {}


def reserved_tokens(vocabulary: dict[str, int], vocab_size: int) -> list[int]:
    """Ids inside the vocabulary that texts hardly have, ascending: tokens whose names say that they are kept for later."""
    kept = ("reserved", "unused", "<|extra_", "<extra_id", "<|dummy")
    return sorted(id for name, id in vocabulary.items() if id < vocab_size and any(word in name.lower() for word in kept))


def _layers(num_draft_layers: Any, num_target_layers: int) -> tuple[int, ...] | None:
    if not isinstance(num_draft_layers, int) or num_draft_layers < 1 or num_target_layers < 4:
        return None
    return tuple(dict.fromkeys(evenly_spread_layers(num_draft_layers, num_target_layers)))


def _refuse_unknown(overrides: dict[str, Any], shape: type[DFlashConfig]) -> None:
    for key in overrides:
        if key == "draft_vocab_size":
            raise ValueError(
                f"a {shape.title} draft has no draft_vocab_size: it speaks through the target's own lm_head, so its "
                "vocabulary is the target's (SGLang serves no other); take it out"
            )
        if key == "target_hidden_size":
            raise ValueError(f"a {shape.title} draft has no target_hidden_size: it is as wide as its target; take it out")
        if key not in shape.model_fields:
            near = difflib.get_close_matches(key, list(shape.model_fields), 1, 0)[0]
            raise ValueError(f"draft setting {key!r} does not exist; the nearest is {near!r}")


def init_config(target_dir: Path | str, shape: type[DFlashConfig] = DFlashConfig) -> str:
    """A draft's settings for a target as commented YAML, every line an override `from_target` takes. Ends in a newline."""
    from transformers import AutoTokenizer

    target = read_target_config(target_dir)
    vocab_size = language_config(target).get("vocab_size") or 0
    tokenizer = AutoTokenizer.from_pretrained(str(target_dir), local_files_only=True)
    chosen = choose_mask_token(tokenizer, vocab_size)
    if not chosen:
        raise ValueError(no_mask_token(tokenizer, vocab_size))
    c = shape.from_target(target, **chosen)
    count = c.num_parameters()
    head = (
        f"# {c.title} draft for {Path(target_dir).resolve().name} ({language_config(target).get('model_type')}): "
        f"{c.num_target_layers} layers of {c.hidden_size}, vocabulary {c.vocab_size}\n"
        f"# {count['trainable'] / 1e6:.1f} M trained parameters; embedding and head are the target's\n"
    )
    lines = []
    for key, comment in c.comments.items():
        value = getattr(c, key)
        value = list(value) if isinstance(value, tuple) else value
        flow = None if isinstance(value, (list, dict)) else False
        line = yaml.safe_dump({key: value}, default_flow_style=flow, sort_keys=False, width=10**6).strip()
        lines.append(f"{line}  # {comment}" if comment else line)
    return head + "\n".join(lines) + "\n"


def no_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """A sentence on a tokenizer that leaves no id free, with the reserved ones among its tokens."""
    reserved = reserved_tokens(tokenizer.get_vocab(), vocab_size)
    shown = ", ".join(map(str, reserved[:8])) + (f" and {len(reserved) - 8} more" if len(reserved) > 8 else "")
    choose = f"reserved by their names are {shown}" if reserved else "none of its tokens is reserved by its name"
    return (
        f"the target's tokenizer has a token for each of the {vocab_size} ids, so none is free for the mask by itself; set "
        f"draft.overrides.mask_token_id to a token that your data never has ({choose})"
    )
