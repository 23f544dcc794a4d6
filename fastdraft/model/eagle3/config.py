"""The draft's shape: derived from a target's config.json, written to and read from the serving engines' config.json.

Layers are counted here as outputs from 0. The engines count boundaries: boundary b is the residual stream entering
layer b, so output l is boundary l + 1. Their config.json has two places for ids; SGLang reads the nested one and adds 1,
vLLM reads the top-level one first and takes it as it is.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from fastdraft.model import shape
from fastdraft.model.serving import other_target, rope_problems, serving_rope
from fastdraft.model.shape import DraftShape
from fastdraft.model.target_config import default_layers

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"

# The serving fields that change an engine's forward, and the only value that the draft here is trained for.
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

# What a serving field must be where it is given. A float may be written as an integer.
SERVING_TYPES: dict[type, tuple[str, ...]] = {
    int: (
        *("hidden_size", "target_hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "vocab_size", "draft_vocab_size", "max_position_embeddings"),
    ),
    float: ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "initializer_range"),
    bool: ("fc_norm", "use_aux_norm", "norm_before_fc", "norm_output"),
    str: ("dtype", "torch_dtype"),
    dict: ("rope_parameters", "rope_scaling", "eagle_config"),
    list: (LAYER_IDS, "layer_types"),
}

COMMENTS = {  # of `fastdraft init`, setting by setting
    "hidden_size": "width of the draft; other than the target's, the embedding is shipped with it",
    **shape.COMMENTS,
    "draft_vocab_size": "most frequent target tokens the draft can propose, at most its whole vocabulary",
    "layers": "target layers whose outputs the draft reads, from 0, ascending, but for the last",
    "fc_norm": "normalise each of the three states before fc (EAGLE-3.1)",
    "norm_before_fc": "normalise the three states as one before fc (gpt-oss drafts); not together with fc_norm",
    "norm_output": "feed the state after the final norm to the next step (EAGLE-3.1)",
    "max_position_embeddings": "longest context served; SGLang refuses longer ones, vLLM stops drafting",
}


class DraftConfig(DraftShape):
    """Shape of an EAGLE-3 draft. draft_vocab_size is min(32000, vocab_size) unless overridden."""

    title: ClassVar[str] = "EAGLE-3"
    architecture: ClassVar[str] = "LlamaForCausalLMEagle3"
    served_type: ClassVar[str] = "llama"
    facts: ClassVar[dict[str, str]] = {
        "target_hidden_size": "hidden_size",
        "vocab_size": "vocab_size",
        "num_target_layers": "num_hidden_layers",
    }
    fewest_layers: ClassVar[int] = 7
    comments: ClassVar[dict[str, str]] = COMMENTS

    target_hidden_size: int = Field(gt=0)
    draft_vocab_size: int = Field(gt=0)
    layers: tuple[int, int, int]
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False

    @model_validator(mode="after")
    def _vocabulary_and_norms_fit(self) -> DraftConfig:
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} is larger than vocab_size {self.vocab_size}")
        if self.fc_norm and self.norm_before_fc:
            raise ValueError(
                "fc_norm (a norm for each of the three states) and norm_before_fc (one norm for all) are both true; "
                "a draft has one of them: take one out"
            )
        return self

    @property
    def uses_default_layers(self) -> bool:
        return self.layers == default_layers(self.num_target_layers)

    @property
    def not_trained(self) -> str:
        return f", {self.num_parameters()['embedding'] / 1e6:.1f} M of embedding frozen"

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
    def own_defaults(cls, target: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        vocab_size, num_layers = target.get("vocab_size"), target.get("num_hidden_layers")
        return {
            "draft_vocab_size": min(32000, vocab_size or 1),
            "layers": default_layers(num_layers) if num_layers else (),
        }

    def to_serving(self, dtype: torch.dtype) -> dict[str, Any]:
        """The config.json both engines read, for weights of `dtype`."""
        config = self.serving_fields(dtype)
        config |= {"num_hidden_layers": 1, "mlp_bias": False, "draft_vocab_size": self.draft_vocab_size}
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
            *("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "draft_vocab_size"),
            *("rms_norm_eps", "max_position_embeddings"),
        )
        problems += [f"{key} is missing." for key in needed if config.get(key) is None]
        if problems:
            raise ValueError("the draft's config.json does not fit: " + " ".join(problems))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return cls.of(
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
    if config.get("architectures") != [DraftConfig.architecture]:
        said.append(f"architectures is {config.get('architectures')!r}; both engines need [{DraftConfig.architecture!r}].")
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
    said += rope_problems(config)
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
    name = "target_hidden_size (or hidden_size without it)"
    vocabulary = config.get("vocab_size"), target_vocab_size
    return said + other_target({name: (wide, target_hidden_size), "vocab_size": vocabulary})


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
