"""What the shapes of all drafts have in common: derived from a target's config.json, written for the engines.

Layers are counted here as outputs from 0. A method's shape adds its own fields and checks (`model/eagle3/config.py`,
`model/dflash/config.py`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import PretrainedConfig

from fastdraft.config import missing_space, nearest_key
from fastdraft.model.precision import dtype_name
from fastdraft.model.target_config import (
    active_width,
    canonical_rope,
    language_config,
    read_target_config,
    silent_layers,
    target_rope,
)

COUNTS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")  # that no target can lack
# What a draft of its own may have where a target has nothing of the kind.
EXAMPLES = {
    "rope_theta": "rope_parameters='{rope_theta: 10000.0}'",
    "rms_norm_eps": "rms_norm_eps=1.0e-5",
    "max_position_embeddings": "max_position_embeddings=4096",
}
WRITTEN = (  # fields that an engine's config.json has under the same name
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("vocab_size", "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id"),
)
COMMENTS = {  # of `fastdraft init`, setting by setting
    "intermediate_size": "MLP width",
    "num_attention_heads": "",
    "num_key_value_heads": "",
    "head_dim": "",
    "rms_norm_eps": "",
    "rope_parameters": "of the target; for several by layer type, that of full attention",
    "initializer_range": "standard deviation of untrained weights",
}


class DraftShape(BaseModel):
    """Field names follow transformers' Llama and Qwen3 configs; `layers` counts target layers' outputs from 0."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # What a method says of itself.
    title: ClassVar[str]
    architecture: ClassVar[str]  # in the engines' config.json
    served_type: ClassVar[str]  # its model_type there: whose layers the draft's are
    facts: ClassVar[dict[str, str]]  # fields that are the target's and cannot be chosen, by their names in its config.json
    fewest_layers: ClassVar[int]  # of a target that the default layers are taken from
    comments: ClassVar[dict[str, str]]  # of `fastdraft init`, setting by setting

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    num_target_layers: int = Field(gt=0)
    layers: tuple[int, ...] = Field(min_length=1)
    rms_norm_eps: float = Field(gt=0)
    rope_parameters: dict[str, Any]
    max_position_embeddings: int = Field(gt=0)
    initializer_range: float = Field(0.02, gt=0)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @field_validator("rope_parameters")
    @classmethod
    def _rope_is_served_as_trained(cls, rope: dict[str, Any]) -> dict[str, Any]:
        return canonical_rope(rope)

    @model_validator(mode="after")
    def _heads_and_layers_fit(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        factor = self.rope_parameters.get("partial_rotary_factor", 1.0)
        rotary_dim = int(self.head_dim * factor)
        if rotary_dim % 2 or rotary_dim == 0:
            raise ValueError(
                f"RoPE turns channels in pairs, but head_dim {self.head_dim} and partial_rotary_factor {factor} leave it "
                f"{rotary_dim}; choose an even number"
            )
        last = self.num_target_layers - 2  # SGLang captures where a layer begins, so never the output of the last one
        if list(self.layers) != sorted(set(self.layers)) or not 0 <= self.layers[0] <= self.layers[-1] <= last:
            few = self.num_target_layers < self.fewest_layers
            raise ValueError(
                f"layers {list(self.layers)} must ascend and lie in 0..{last}, the outputs SGLang can capture of "
                f"{self.num_target_layers} layers"
                + (f"; a target needs at least {self.fewest_layers} layers for the defaults" if few else "")
            )
        return self

    @classmethod
    def refuse_unknown(cls, overrides: dict[str, Any]) -> None:
        """ValueError for a setting that such a draft has not."""
        for key in overrides:
            if key not in cls.model_fields:
                chosen = [name for name in cls.model_fields if name not in cls.facts]
                if hint := missing_space(key, chosen):
                    raise ValueError(f"draft setting {key!r} does not exist; {hint}")
                near = nearest_key(key, chosen)
                hint = f"the nearest is {near!r}" if near else f"those of {cls.title} are {', '.join(chosen)}"
                raise ValueError(f"draft setting {key!r} does not exist; {hint}")

    @classmethod
    def own_defaults(cls, target: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        """The method's own fields of a draft for a target's `language_config`, of which counts may be missing: then
        `from_target` names them, whatever these are. ValueError for what only the user can choose."""
        raise NotImplementedError

    @classmethod
    def from_target(cls, target_config: dict[str, Any] | PretrainedConfig, /, **overrides: Any) -> Self:
        """The draft's shape for a target: the target's own widths, heads, RoPE and norm epsilon unless overridden.

        `target_config` is a config.json as a dict (nested language model configs are found) or a transformers config.
        MLP width: the target's `intermediate_size`, also where that is the width of one expert (gpt-oss) or of dense
        layers beside the experts (Qwen3-MoE, where it equals the width active per token); a target that has only
        `moe_intermediate_size` gives that times `num_experts_per_tok`, the width active per token.
        num_key_value_heads and head_dim have their customary defaults (num_attention_heads, hidden_size /
        num_attention_heads); whatever else is missing is an error.
        Raises ValueError naming every missing field, unknown override or misfit.
        """
        cls.refuse_unknown(overrides)
        target = language_config(target_config)
        for key in COUNTS:
            value = target.get(key)
            chosen = key == "num_attention_heads" and key in overrides
            if value is not None and not chosen and (type(value) is not int or value < 1):
                raise ValueError(f"{key} is {value!r} in the target's config.json; it must be a whole number above 0")
        facts = {name: target.get(key) for name, key in cls.facts.items()}
        for key in facts.keys() & overrides.keys():
            if overrides[key] != facts[key]:
                why = "; the target's embedding and head are used as they are" if key == "hidden_size" else ""
                raise ValueError(
                    f"{key} is {facts[key]} in the target's config.json and cannot be set to {overrides[key]}{why}"
                )
        hidden = target.get("hidden_size")
        heads = overrides.get("num_attention_heads") or target.get("num_attention_heads")
        derived = {
            "hidden_size": hidden,
            "intermediate_size": target.get("intermediate_size") or active_width(target),
            "num_attention_heads": heads,
            "num_key_value_heads": target.get("num_key_value_heads") or heads or 1,
            "head_dim": target.get("head_dim") or _even_share(hidden, heads),
            "rms_norm_eps": target.get("rms_norm_eps"),
            "rope_parameters": None if "rope_parameters" in overrides else target_rope(target),
            "max_position_embeddings": target.get("max_position_embeddings"),
            "initializer_range": target.get("initializer_range") or 0.02,
            "bos_token_id": target.get("bos_token_id"),
            "eos_token_id": target.get("eos_token_id"),
        }
        values = facts | derived | cls.own_defaults(target, overrides) | overrides
        missing = [name for name, field in cls.model_fields.items() if field.is_required() and values.get(name) is None]
        if emptied := [name for name in missing if name in overrides]:
            raise ValueError(
                f"{', '.join(emptied)} of the draft is null; give a value, or take the key out of draft.config and "
                "draft.overrides"
            )
        if missing:
            raise ValueError(cls._does_not_say(missing, target.get("model_type", "no model_type")))
        pictures = set(target.get("cross_attention_layers") or ())
        if pictures and (silent := [layer for layer in values["layers"] if layer in pictures]):
            ran = set(range(values["num_target_layers"] - 1)) - pictures
            raise ValueError(silent_layers(silent, values["layers"], ran, f"this target ({target.get('model_type')})"))
        return cls.of(values)

    @classmethod
    def _does_not_say(cls, missing: list[str], kind: str) -> str:
        """A sentence on fields that neither a target's config.json nor an override gives, by their names there."""
        names = cls.facts | {"rope_parameters": "rope_theta"}
        missing = list(dict.fromkeys(names.get(name, name) for name in missing))
        said = f"the target's config.json ({kind}) does not say {', '.join(missing)}"
        if known := [key for key in COUNTS if key in missing]:
            return (
                f"{said}; of a target {', '.join(known)} must be known: it must be a decoder-only language model whose "
                "config.json, or the text_config in it, names them so, as Llama's, Qwen3's and Gemma 3's do. Complete it"
            )
        return f"{said}; complete it, or set what the draft may choose for itself, for example " + " ".join(
            f"draft.overrides.{EXAMPLES.get(key, f'{key}=...')}" for key in missing
        )

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

    def serving_fields(self, dtype: torch.dtype) -> dict[str, Any]:
        """What the engines' config.json says of every draft, for weights of `dtype`."""
        name, rope = dtype_name(dtype), self.rope_parameters
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        config = {"architectures": [self.architecture], "model_type": self.served_type}
        config |= {key: getattr(self, key) for key in WRITTEN}
        config |= {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "use_cache": True}
        config |= {"rope_parameters": dict(rope), "rope_theta": rope["rope_theta"]}
        config |= {"rope_scaling": None if rope["rope_type"] == "default" else scaling, "dtype": name, "torch_dtype": name}
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        return config

    @property
    def not_trained(self) -> str:
        """What `fastdraft init` says behind the number of trained parameters."""
        raise NotImplementedError

    @classmethod
    def init_config(cls, target_dir: Path | str, **chosen: Any) -> str:
        """A draft's settings for a target as commented YAML, every line an override that `from_target` takes. Ends in a
        newline. `chosen` are settings that no config.json says."""
        target = read_target_config(target_dir)
        c, kind = cls.from_target(target, **chosen), language_config(target).get("model_type")
        lines = [
            f"# {c.title} draft for {Path(target_dir).resolve().name} ({kind}): {c.num_target_layers} layers of "
            f"{c.target_hidden_size}, vocabulary {c.vocab_size}",
            f"# {c.num_parameters()['trainable'] / 1e6:.1f} M trained parameters{c.not_trained}",
        ]
        for key, comment in c.comments.items():
            value = getattr(c, key)
            value = list(value) if isinstance(value, tuple) else value
            flow = None if isinstance(value, (list, dict)) else False
            line = yaml.safe_dump({key: value}, default_flow_style=flow, sort_keys=False, width=math.inf).strip()
            lines.append(f"{line}  # {comment}" if comment else line)
        return "\n".join(lines) + "\n"


def _even_share(hidden: Any, heads: Any) -> int | None:
    """The customary head_dim, None where heads do not divide hidden. What is no number gets 1: the validator names it."""
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0):
        return 1
    return hidden // heads if hidden % heads == 0 else None
