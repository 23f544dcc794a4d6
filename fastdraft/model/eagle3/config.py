"""The draft's shape: derived from a target's config.json, written to and read from the serving engines' config.json.

Layers are counted here as outputs from 0. The engines count boundaries: boundary b is the residual stream entering
layer b, so output l is boundary l + 1. Their config.json has two places for ids; SGLang reads the nested one and adds 1,
vLLM reads the top-level one first and takes it as it is.
"""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import PretrainedConfig

from fastdraft.model.target_config import (
    active_width,
    canonical_rope,
    default_layers,
    language_config,
    read_target_config,
    silent_layers,
    target_rope,
)

ARCHITECTURE = "LlamaForCausalLMEagle3"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


# serving fields that change an engine's forward, and the only value the draft here is trained for
TRAINED_AS: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "qkv_bias": False,
    "mlp_bias": False,
    "bias": False,
    "norm_before_residual": False,
    "logit_scale": 1.0,
    "quantization_config": None,
}

# what a serving field must be where it is given; a float may be written as an integer
SERVING_TYPES: dict[type, tuple[str, ...]] = {
    int: (
        "hidden_size",
        "target_hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "draft_vocab_size",
        "max_position_embeddings",
    ),
    float: ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "initializer_range"),
    bool: ("fc_norm", "use_aux_norm", "norm_before_fc", "norm_output"),
    str: ("dtype", "torch_dtype"),
    dict: ("rope_parameters", "rope_scaling", "eagle_config"),
    list: (LAYER_IDS, "layer_types"),
}


COUNTS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")  # that no target can lack
# What a draft of its own may have where a target has nothing of the kind.
EXAMPLES = {
    "rope_theta": "rope_parameters='{rope_theta: 10000.0}'",
    "rms_norm_eps": "rms_norm_eps=1.0e-5",
    "max_position_embeddings": "max_position_embeddings=4096",
}


class DraftConfig(BaseModel):
    """Shape of a draft. Field names follow transformers' Llama config; `layers` counts target layers' outputs from 0."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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
    initializer_range: float = Field(0.02, gt=0)
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @field_validator("rope_parameters")
    @classmethod
    def _rope_is_served_as_trained(cls, rope: dict[str, Any]) -> dict[str, Any]:
        return canonical_rope(rope)

    @model_validator(mode="after")
    def _fits(self) -> DraftConfig:
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} is larger than vocab_size {self.vocab_size}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.fc_norm and self.norm_before_fc:
            raise ValueError(
                "fc_norm (a norm for each of the three states) and norm_before_fc (one norm for all) are both true; "
                "a draft has one of them: take one out"
            )
        rotary_dim = int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))
        if rotary_dim % 2 or rotary_dim == 0:
            raise ValueError(
                f"RoPE turns channels in pairs, but head_dim {self.head_dim} and partial_rotary_factor "
                f"{self.rope_parameters.get('partial_rotary_factor', 1.0)} leave it {rotary_dim}; choose an even number"
            )
        low, mid, high = self.layers
        last = self.num_target_layers - 2  # SGLang captures where a layer begins, so never the output of the last one
        if not 0 <= low < mid < high <= last:
            raise ValueError(
                f"layers {list(self.layers)} must ascend and lie in 0..{last}, the outputs SGLang can capture"
                + ("; a target needs at least 7 layers for the defaults" if self.num_target_layers < 7 else "")
            )
        return self

    @property
    def uses_default_layers(self) -> bool:
        return self.layers == default_layers(self.num_target_layers)

    @property
    def feature_norms(self) -> int:
        """How many norms share the 3 Ht numbers that fc reads."""
        return 3 if self.fc_norm else int(self.norm_before_fc)

    def num_parameters(self) -> dict[str, int]:
        """How many are trained, and how many the frozen embedding has."""
        h, ht, inter = self.hidden_size, self.target_hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = 2 * h * (q + 2 * kv) + q * h + 3 * h * inter  # attention, MLP
        norms = 4 * h + (3 * ht if self.feature_norms else 0)
        return {"trainable": 3 * ht * h + layer + norms + self.draft_vocab_size * h, "embedding": self.vocab_size * h}

    @classmethod
    def from_target(cls, target_config: dict[str, Any] | PretrainedConfig, /, **overrides: Any) -> DraftConfig:
        """The draft's shape for a target: the target's own widths, heads, RoPE and norm epsilon unless overridden.

        `target_config` is a config.json as a dict (nested language model configs are found) or a transformers config.
        MLP width: the target's `intermediate_size`, also where that is the width of one expert (gpt-oss) or of dense
        layers beside the experts (Qwen3-MoE, where it equals the width active per token); a target that has only
        `moe_intermediate_size` gives that times `num_experts_per_tok`, the width active per token.
        draft_vocab_size is min(32000, vocab_size). num_key_value_heads and head_dim have their customary defaults
        (num_attention_heads, hidden_size / num_attention_heads); whatever else is missing is an error.
        Raises ValueError naming every missing field, unknown override or misfit.
        """
        for key in overrides:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(key, cls.model_fields, 1, 0)[0]
                raise ValueError(f"draft setting {key!r} does not exist; the nearest is {near!r}")
        target = language_config(target_config)
        given, missing = dict(overrides), []

        def read(key: str, *fallbacks: Any) -> Any:
            for value in (target.get(key), *fallbacks):
                if value is not None:
                    if key in COUNTS and (type(value) is not int or value < 1):
                        raise ValueError(
                            f"{key} is {value!r} in the target's config.json; it must be a whole number above 0"
                        )
                    return value
            missing.append(key)
            return None

        hidden, heads = read("hidden_size"), given.get("num_attention_heads") or read("num_attention_heads")
        facts = {
            "target_hidden_size": hidden,
            "vocab_size": read("vocab_size"),
            "num_target_layers": read("num_hidden_layers"),
        }
        for key in facts.keys() & given.keys():
            if given[key] != facts[key]:
                raise ValueError(f"{key} is {facts[key]} in the target's config.json and cannot be set to {given[key]}")
        derived = {
            "hidden_size": lambda: hidden,
            "intermediate_size": lambda: read("intermediate_size", active_width(target)),
            "num_attention_heads": lambda: heads,
            "num_key_value_heads": lambda: heads and read("num_key_value_heads", heads),
            "head_dim": lambda: hidden and heads and read("head_dim", _even_share(hidden, heads)),
            "draft_vocab_size": lambda: facts["vocab_size"] and min(32000, facts["vocab_size"]),
            "layers": lambda: facts["num_target_layers"] and default_layers(facts["num_target_layers"]),
            "rms_norm_eps": lambda: read("rms_norm_eps"),
            "rope_parameters": lambda: target_rope(target) or missing.append("rope_theta"),
            "max_position_embeddings": lambda: read("max_position_embeddings"),
            "initializer_range": lambda: target.get("initializer_range") or 0.02,
            "bos_token_id": lambda: target.get("bos_token_id"),
            "eos_token_id": lambda: target.get("eos_token_id"),
        }
        values = facts | {key: make() for key, make in derived.items() if key not in given} | given
        if missing:
            kind = target.get("model_type", "no model_type")
            said = f"the target's config.json ({kind}) does not say {', '.join(missing)}"
            if facts_missing := [key for key in COUNTS if key in missing]:
                raise ValueError(
                    f"{said}; of a target {', '.join(facts_missing)} must be known: it must be a decoder-only language "
                    "model whose config.json, or the text_config in it, names them so, as Llama's, Qwen3's and Gemma 3's "
                    "do. Complete it"
                )
            raise ValueError(
                f"{said}; complete it, or set what the draft may choose for itself, for example "
                + " ".join(f"draft.overrides.{EXAMPLES.get(key, f'{key}=...')}" for key in missing)
            )
        pictures = set(target.get("cross_attention_layers") or ())
        if pictures and (silent := [layer for layer in values["layers"] if layer in pictures]):
            ran = set(range(facts["num_target_layers"] - 1)) - pictures
            raise ValueError(silent_layers(silent, values["layers"], ran, f"this target ({target.get('model_type')})"))
        return _built(cls, values)

    def to_serving(self, dtype: torch.dtype) -> dict[str, Any]:
        """The config.json both engines read, for weights of `dtype`."""
        name = str(dtype).removeprefix("torch.")
        rope = self.rope_parameters
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rms_norm_eps": self.rms_norm_eps,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "tie_word_embeddings": False,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": dict(rope),
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "use_cache": True,
            "dtype": name,
            "torch_dtype": name,
        }
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if self.hidden_size != self.target_hidden_size:
            config["target_hidden_size"] = self.target_hidden_size
        config |= {key: True for key in ("fc_norm", "norm_before_fc", "norm_output") if getattr(self, key)}
        if self.norm_output:
            config["trained_by"] = "fastdraft"  # the flag has meant two things: `recurrence_notes` in serving.py
        if not self.uses_default_layers:
            config["eagle_config"] = {LAYER_IDS: list(self.layers)}
            config[LAYER_IDS] = [layer + 1 for layer in self.layers]
        return config

    @classmethod
    def from_serving(
        cls,
        config: dict[str, Any],
        num_target_layers: int,
        target_hidden_size: int | None = None,
        target_vocab_size: int | None = None,
    ) -> DraftConfig:
        """Reads an engine's config.json. The target's sizes, where known, must be what the checkpoint was made for.

        Raises ValueError, a sentence for each, where the checkpoint asks for a forward this trainer does not train, says
        one thing to SGLang and another to vLLM, is of another target, or lacks a field.
        """
        sizes = num_target_layers, target_hidden_size, target_vocab_size
        problems = serving_malformed(config) or serving_problems(config, *sizes)
        needed = (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "vocab_size",
            "draft_vocab_size",
            "rms_norm_eps",
            "max_position_embeddings",
        )
        problems += [f"{key} is missing." for key in needed if config.get(key) is None]
        if problems:
            raise ValueError("the draft's config.json does not fit: " + " ".join(problems))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return _built(
            cls,
            {key: config[key] for key in needed}
            | {
                "target_hidden_size": config.get("target_hidden_size") or hidden,
                "num_key_value_heads": config.get("num_key_value_heads") or heads,
                "head_dim": config.get("head_dim") or hidden // heads,
                "num_target_layers": num_target_layers,
                "layers": serving_layers(config, num_target_layers),
                "rope_parameters": serving_rope(config),
                "initializer_range": config.get("initializer_range") or 0.02,
                "fc_norm": config.get("fc_norm") or config.get("use_aux_norm") or False,
                "norm_before_fc": serving_norm_before_fc(config),
                "norm_output": config.get("norm_output") or False,
                "bos_token_id": config.get("bos_token_id"),
                "eos_token_id": config.get("eos_token_id"),
            },
        )


def _built(cls: type[DraftConfig], values: dict[str, Any]) -> DraftConfig:
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


def _even_share(hidden: Any, heads: Any) -> int | None:
    """The customary head_dim, None where heads do not divide hidden. What is no number gets 1: the validator names it."""
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0):
        return 1
    return hidden // heads if hidden % heads == 0 else None


# --- the engines' config.json ----------------------------------------------------------------------------------------


def serving_malformed(config: dict[str, Any]) -> list[str]:
    """Sentences on fields of a config.json that are of the wrong kind; empty when none is."""
    said = []
    for kind, keys in SERVING_TYPES.items():
        for key in keys:
            value = config.get(key)
            right = type(value) is kind or (kind is float and type(value) is int)
            if value is not None and (not right or (kind in (int, float) and value <= 0)):
                wanted = f"{kind.__name__} above 0" if kind in (int, float) else kind.__name__
                said.append(f"{key} is {json.dumps(value)}, it must be a {wanted}.")
    if not said:
        nested = (config.get("eagle_config") or {}).get("norm_before_fc")
        if nested is not None and type(nested) is not bool:
            said.append(f"eagle_config.norm_before_fc is {json.dumps(nested)}, it must be a bool.")
        nested = (config.get("eagle_config") or {}).get(LAYER_IDS)
        for key, ids in ((LAYER_IDS, config.get(LAYER_IDS)), (f"eagle_config.{LAYER_IDS}", nested)):
            if ids is not None and (type(ids) is not list or any(type(x) is not int for x in ids) or len(ids) != 3):
                said.append(f"{key} is {json.dumps(ids)}, it must be a list of three integers.")
    return said


def serving_problems(
    config: dict[str, Any],  # well-formed
    num_target_layers: int,
    target_hidden_size: int | None,  # None: any
    target_vocab_size: int | None,  # None: any
) -> list[str]:
    """Sentences on what a config.json asks of the engines that the draft here does not compute, says to each of them in
    another way, or says of another target; empty when nothing."""
    said = []
    if config.get("architectures") != [ARCHITECTURE]:
        said.append(f"architectures is {config.get('architectures')!r}; both engines need [{ARCHITECTURE!r}].")
    for key, only in TRAINED_AS.items():
        value = config.get(key)
        if value is not None and value != only:
            remedy = "leave it out" if only is None else f"it must be {json.dumps(only)}"
            said.append(f"{key} is {json.dumps(value)}, a draft this trainer neither trains nor exports; {remedy}.")
    if (config.get("eagle_config") or {}).get("use_aux_hidden_state") is False:
        said.append("eagle_config.use_aux_hidden_state is false, so three target layers are not read; it must be true.")
    nested, top = (config.get("eagle_config") or {}).get("norm_before_fc"), config.get("norm_before_fc")
    if nested is not None and top is not None and nested != top:
        said.append(
            f"eagle_config.norm_before_fc is {json.dumps(nested)} and norm_before_fc {json.dumps(top)}; both engines read "
            "the first: make them agree."
        )
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        said.append(f"layer_types is {config['layer_types']!r}; the draft attends to everything, leave it out.")
    try:
        serving_rope(config)
    except ValueError as error:
        said.append(f"{error}.")
    try:
        layers = serving_layers(config, num_target_layers)
        last = num_target_layers - 2  # SGLang captures where a layer begins
        if not 0 <= layers[0] < layers[1] < layers[2] <= last:
            said.append(
                f"layer ids name the outputs of target layers {list(layers)} (from 0); they must ascend and "
                f"stay within 0..{last}, the outputs SGLang can capture of {num_target_layers} layers."
            )
    except ValueError as error:
        said.append(f"{error}.")
    wide = config.get("target_hidden_size") or config.get("hidden_size")
    for key, value, law in (
        ("target_hidden_size (or hidden_size without it)", wide, target_hidden_size),
        ("vocab_size", config.get("vocab_size"), target_vocab_size),
    ):
        if law is not None and value is not None and value != law:
            said.append(f"{key} is {value}, the target's is {law}; the draft was made for another target.")
    return said


def serving_layers(config: dict[str, Any], num_target_layers: int) -> tuple[int, ...]:
    """Target layers (outputs, from 0) that both engines would feed the draft. Raises ValueError where they differ."""
    top, nested = config.get(LAYER_IDS), (config.get("eagle_config") or {}).get(LAYER_IDS)
    default = default_layers(num_target_layers)
    sglang = tuple(nested) if nested else default
    boundaries = top or nested
    vllm = tuple(b - 1 for b in boundaries) if boundaries else default
    if sglang != vllm:
        raise ValueError(
            f"layer ids disagree: SGLang would read the outputs of target layers {list(sglang)} and vLLM of {list(vllm)} "
            "(from 0). "
            + (
                "These are the default layers: leave both ids out"
                if default in (sglang, vllm) and not (top and nested)
                else f"For layers {list(sglang)} write eagle_config.{LAYER_IDS}: {list(sglang)} and, at top level, "
                f"{LAYER_IDS}: {[x + 1 for x in sglang]}"
            )
        )
    return sglang


def serving_norm_before_fc(config: dict[str, Any]) -> bool:
    """Both engines look into eagle_config first."""
    nested = (config.get("eagle_config") or {}).get("norm_before_fc")
    return bool(config.get("norm_before_fc") if nested is None else nested)


def serving_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The draft's RoPE. Raises ValueError when it is missing or its two spellings, where both are there, differ."""
    beside = ("rope_theta", "partial_rotary_factor")
    around = {key: config[key] for key in beside if config.get(key) is not None}
    new = {**around, **config["rope_parameters"]} if config.get("rope_parameters") else None
    old = {**around, **(config.get("rope_scaling") or {})} if config.get("rope_theta") is not None else None
    if new is None and old is None:
        raise ValueError("RoPE is missing: write rope_parameters, and rope_theta with rope_scaling for older engines")
    spelled = [canonical_rope(rope) for rope in (new, old) if rope is not None]
    if spelled[0] != spelled[-1]:
        raise ValueError(
            f"rope_parameters says {spelled[0]}, rope_theta with rope_scaling says {spelled[1]}; "
            "engines read one or the other, so they must agree"
        )
    return spelled[0]


# --- fastdraft init --------------------------------------------------------------------------------------------------


def init_config(target_dir: Path | str) -> str:
    """A draft's settings for a target as commented YAML, every line an override `from_target` takes. Ends in a newline."""
    target = read_target_config(target_dir)
    c = DraftConfig.from_target(target)
    count = c.num_parameters()
    head = (
        f"# Draft for {Path(target_dir).resolve().name} ({language_config(target).get('model_type')}): "
        f"{c.num_target_layers} layers of {c.target_hidden_size}, vocabulary {c.vocab_size}\n"
        f"# {count['trainable'] / 1e6:.1f} M trained parameters, {count['embedding'] / 1e6:.1f} M of embedding frozen\n"
    )
    comments = {
        "hidden_size": "width of the draft; other than the target's, the embedding is shipped with it",
        "intermediate_size": "MLP width",
        "num_attention_heads": "",
        "num_key_value_heads": "",
        "head_dim": "",
        "draft_vocab_size": f"most frequent target tokens the draft can propose, at most {c.vocab_size}",
        "layers": f"target layers whose outputs the draft reads, from 0, ascending, at most {c.num_target_layers - 2}",
        "fc_norm": "normalise each of the three states before fc (EAGLE-3.1)",
        "norm_before_fc": "normalise the three states as one before fc (gpt-oss drafts); not together with fc_norm",
        "norm_output": "feed the state after the final norm to the next step (EAGLE-3.1)",
        "rms_norm_eps": "",
        "rope_parameters": "of the target; for several by layer type, that of full attention",
        "max_position_embeddings": "longest context served; SGLang refuses longer ones, vLLM stops drafting",
        "initializer_range": "standard deviation of untrained weights",
    }
    lines = []
    for key, comment in comments.items():
        value = list(c.layers) if key == "layers" else getattr(c, key)
        flow = None if isinstance(value, (list, dict)) else False
        line = yaml.safe_dump({key: value}, default_flow_style=flow, sort_keys=False, width=math.inf).strip()
        lines.append(f"{line}  # {comment}" if comment else line)
    return head + "\n".join(lines) + "\n"
