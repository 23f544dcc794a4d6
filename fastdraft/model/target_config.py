"""What a target's config.json says: its language model's fields, its dtype, its positions and its RoPE.

RoPE is kept as transformers 5 spells it (`rope_parameters`: rope_theta, rope_type and that type's fields), and only in
variants that transformers, SGLang and vLLM compute alike. longrope and dynamic choose their frequencies by the length
served, each in another way, and YaRN's attention_factor and mscale are read by some and ignored by others: these are
refused, because a draft trained with one reading would be served with another. A draft does without its target's mscale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# By rope_type the fields that it needs, and those it may have, beside rope_theta and partial_rotary_factor.
ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("factor", "original_max_position_embeddings"), ("beta_fast", "beta_slow", "truncate")),
}

TOO_DEEP = "nested too deeply to be read; it is no file of a model"


TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")


def read_target_config(target_dir: Path | str) -> dict[str, Any]:
    """The target's config.json with the defaults its own model class defines, or as written when transformers has no such
    class. No code of the target runs. Raises ValueError when there is none or it is not JSON."""
    config = read_json(Path(target_dir) / "config.json")
    refuse_strange_dtype(config)
    if config.get("model_type") in CONFIG_MAPPING:
        try:
            return AutoConfig.from_pretrained(str(target_dir), local_files_only=True).to_dict()
        except RecursionError as error:
            raise ValueError(f"{target_dir}/config.json is {TOO_DEEP}") from error
        except Exception as error:  # of its model type's own class, which may raise anything
            raise ValueError(f"{target_dir}/config.json cannot be used: {first_line(error)}") from error
    return config


def refuse_strange_dtype(config: dict[str, Any]) -> None:
    """ValueError where a config.json, or a config inside it, names a dtype that PyTorch has not."""
    for key in ("dtype", "torch_dtype"):
        named = config.get(key)
        if named is not None and not (isinstance(named, str) and isinstance(getattr(torch, named, None), torch.dtype)):
            raise ValueError(
                f"{key} is {named!r} in its config.json, which is no dtype of PyTorch; write the one that the weights "
                "have: bfloat16, float16 or float32"
            )
    for key, inner in config.items():
        if isinstance(inner, dict) and key.endswith("_config") and key != "quantization_config":
            refuse_strange_dtype(inner)


def first_line(error: Exception) -> str:
    """What an exception of a library says, for a sentence of ours."""
    if isinstance(error, StrictDataclassError):  # its second line says what is wrong
        return " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "its JSON is nested too deeply"
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if said.startswith("Couldn't instantiate the backend tokenizer"):  # the first line of a list, in a folder without one
        return "its folder has no tokenizer.json, nor what one could be made of; put it there, with tokenizer_config.json"
    plain = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)  # the others say no more than a name
    return said if isinstance(error, plain) or said == type(error).__name__ else f"{type(error).__name__}: {said}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError naming the file when it is missing, unreadable or something else."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a model directory that holds it") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is {TOO_DEEP}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not a JSON object")
    return config


def language_config(target_config: dict[str, Any] | PretrainedConfig) -> dict[str, Any]:
    """The decoder's own fields: nested configs of multimodal targets opened, outer token ids and dtype first. What its
    model type calls otherwise (GPT-2: n_embd) is there under the usual name, too."""
    config = target_config if isinstance(target_config, dict) else target_config.to_dict()
    inner = next((config[key] for key in TEXT_KEYS if isinstance(config.get(key), dict)), None)
    if inner is None:
        kind = config.get("model_type")
        usual = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
        return config | {name: config[own] for name, own in usual.items() if config.get(name) is None and own in config}
    outer = ("bos_token_id", "eos_token_id", "dtype", "torch_dtype")
    return language_config(inner) | {key: config[key] for key in outer if config.get(key) is not None}


def named_dtype(decoder: dict[str, Any]) -> str | None:
    """The dtype that a target's `language_config` names in either spelling, such as "bfloat16", if it does."""
    named = decoder.get("dtype") or decoder.get("torch_dtype")
    return str(named).removeprefix("torch.") if named else None


def canonical_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope` with only the fields that mean something, in one order. Raises ValueError where the engines would differ.

    M-RoPE becomes plain RoPE: on text its three axes carry the same position.
    """
    fields = {k: v for k, v in rope.items() if v is not None and k not in ("mrope_section", "mrope_interleaved")}
    old_type = fields.pop("type", "default")
    kind = fields.pop("rope_type", old_type)
    kind = "default" if kind == "mrope" else kind
    if kind not in ROPE_FIELDS:
        raise ValueError(
            f"rope_type {kind!r} is not computed alike by transformers, SGLang and vLLM; give the draft one of "
            f"{', '.join(ROPE_FIELDS)}, for example rope_parameters: "
            f"{{rope_type: default, rope_theta: {rope.get('rope_theta', 10000.0)}}}"
        )
    if "rope_theta" not in fields:
        raise ValueError(f"rope_parameters needs rope_theta; it has {sorted(rope)}")
    if fields.get("partial_rotary_factor") == 1:
        del fields["partial_rotary_factor"]
    needed, optional = ROPE_FIELDS[kind]
    for key in ("rope_theta", "partial_rotary_factor", *needed):
        if key in fields and (
            isinstance(fields[key], bool) or not isinstance(fields[key], (int, float)) or not 0 < fields[key] < math.inf
        ):
            raise ValueError(f"rope_parameters.{key} is {fields[key]!r}; it must be a number above 0")
    if fields.get("partial_rotary_factor", 1) > 1:
        raise ValueError(f"partial_rotary_factor is {fields['partial_rotary_factor']}; it must be at most 1")
    if lacking := [key for key in needed if key not in fields]:
        raise ValueError(f"rope_type {kind!r} needs {', '.join(lacking)}; rope_parameters has {sorted(rope)}")
    if kind == "yarn":
        usual = 0.1 * math.log(fields["factor"]) + 1.0
        without_effect = {"attention_factor": usual, "attn_factor": 1.0, "extrapolation_factor": 1.0}
        for key, value in without_effect.items():
            if key in fields and math.isclose(fields[key], value, rel_tol=1e-6):
                del fields[key]
    order = ("rope_theta", "partial_rotary_factor", *needed, *optional)
    if unknown := [key for key in fields if key not in order]:
        raise ValueError(
            f"rope_parameters of type {kind!r} has {', '.join(f'{k} = {fields[k]!r}' for k in unknown)}, which "
            "transformers, SGLang and vLLM do not all read; give the draft rope_parameters of its own with only "
            + ", ".join(order)
        )
    return {"rope_type": kind} | {key: fields[key] for key in order if key in fields}


def target_rope(target: dict[str, Any]) -> dict[str, Any] | None:
    """The target's RoPE from either spelling, as its draft has it; None without rope_theta. Of several by layer type it is
    full attention's."""
    rope = target.get("rope_parameters")
    if rope and any(isinstance(value, dict) for value in rope.values()):
        full = rope.get("full_attention") or rope.get("global")
        if not full:
            raise ValueError(
                f"rope_parameters is given for {', '.join(rope)} and none of them is full_attention; "
                "set the draft's rope_parameters"
            )
        rope = full
    rope = dict(rope or target.get("rope_scaling") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is None and target.get(key) is not None:
            rope[key] = target[key]
    if rope.get("rope_theta") is None:
        return None
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("yarn", "llama3"):
        pretrained = target.get("original_max_position_embeddings") or target.get("max_position_embeddings")
        rope.setdefault("original_max_position_embeddings", pretrained)
    if kind == "yarn":
        # DeepSeek's scale of its scores. Not all engines read it, and no draft needs it.
        rope.pop("mscale", None)
        rope.pop("mscale_all_dim", None)
    return rope


def longest_context(target: dict[str, Any]) -> int | None:
    """The positions that a target's `language_config` says it has, None where it names none (Mamba, ALiBi).

    That is max_position_embeddings, and with YaRN no less than the length it was extended from times its factor, which
    many a config.json that was edited by hand leaves out there.
    """
    most = target.get("max_position_embeddings")
    if type(most) is not int:
        return None
    with suppress(ValueError):  # RoPE of several kinds
        rope = target_rope(target) or {}
        if rope.get("rope_type", rope.get("type")) == "yarn" and rope.get("factor"):
            return max(most, int(rope["original_max_position_embeddings"] * rope["factor"]))
    return most


def default_layers(num_target_layers: int) -> tuple[int, int, int]:
    """Layers whose outputs feed the draft when nobody chooses: 1, n//2 - 1, n - 4, counted from 0."""
    return 1, num_target_layers // 2 - 1, num_target_layers - 4


def silent_layers(silent: list[int], layers: Iterable[int], ran: Iterable[int], model: str) -> str:
    """A sentence on chosen layers that give no state for a text, with others near them."""
    near = sorted({min(ran, key=lambda x: (abs(x - layer), x)) for layer in layers})
    use = f"for example draft.overrides.layers='{near}'" if len(near) == 3 else f"of {sorted(ran)}"
    return (
        f"the layers {silent} of {model} give no state for a text (layers that attend to pictures are left out then), so "
        f"no draft can read them; choose other layers, {use}"
    )


def active_width(target: dict[str, Any]) -> int | None:
    """MLP width of the experts that one token goes through; None for a target without experts."""
    width, active = target.get("moe_intermediate_size"), target.get("num_experts_per_tok")
    return width * active if width and active else None
