"""DFlash drafts in the serving engines' format: tensors and config.json, read back for a warm start, verified.

Tensors carry the module's own names, without a prefix, and the target's dtype. Embedding and lm_head are left out: both
engines take the target's. What an engine reads otherwise than it was trained is an error here, because engines are silent
about it: layer ids, the mask token, a block that is causal, labels that are shifted, RoPE.

# H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from fastdraft.model.dflash.config import MASK_TOKEN, DFlashConfig, reserved_tokens
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.method import CONFIG, Findings
from fastdraft.model.serving import (
    dtype_notes,
    dtype_problems,
    exported,
    load_weights,
    module_shapes,
    other_target,
    rope_notes,
    rope_problems,
    serving_rope,
    weight_problems,
)
from fastdraft.model.target_config import language_config, read_json, read_target_config

# Serving fields that change an engine's forward, and the only value that the draft here is trained for.
TRAINED_AS: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "quantization_config": None,
    "d2t": None,
}
COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings"),
)
# Fields with which an engine computes something else than is trained here, and the value that changes nothing; at the root
# of config.json and in dflash_config. Engines follow them without a word.
OTHERWISE: dict[str, dict[str, Any]] = {
    "": {
        "is_neox_style": True,
        "rope_is_neox_style": True,
        "attention_sink_bias": False,
        "add_swa_attention_sink_bias": False,
        "logit_scale": 1.0,
        "projector_type": "dflash",
        "speculators_config": None,
        "speculators_model_type": None,
    },
    "dflash_config.": {
        "attention_sink_bias": False,
        "attention_value_scale": 1.0,
        "output_multiplier": 1.0,
        "input_embedding_scale": 1.0,
        "final_logit_softcapping": 0.0,
        "projector_type": "dflash",
    },
}
MASK_EMBEDDING = "mask_embedding.pt"  # beside the weights: what both engines embed mask rows with
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Format:
    """How a method with this backbone is written in config.json."""

    shape: type[DFlashConfig]
    draft: type[DFlashDraft]
    where: str  # what stands before target_layer_ids, mask_token_id and block_size in sentences
    block: Callable[[dict[str, Any]], dict[str, Any] | None]  # the section that has these three; None: it is missing
    # What the method alone has: sentences on what is wrong, of config.json and the section; and fields of its shape.
    problems: Callable[[dict[str, Any], dict[str, Any]], list[str]]
    fields: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}


def serving_shapes(config: DFlashConfig, draft_type: type[DFlashDraft] = DFlashDraft) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a serving checkpoint."""
    return module_shapes(draft_type, config)


def serving_tensors(draft: DFlashDraft, dtype: torch.dtype) -> dict[str, Tensor]:
    draft.config.to_serving(dtype)  # refuses what no engine serves
    return exported(draft, draft.state_dict(), dtype)


def dflash_section(config: dict[str, Any]) -> dict[str, Any] | None:
    nested = config.get("dflash_config")
    return nested if isinstance(nested, dict) else None


def dflash_problems(config: dict[str, Any], nested: dict[str, Any]) -> list[str]:
    """What is said beside dflash_config in another way, and labels that are shifted."""
    said, mask, beside = [], nested.get("mask_token_id"), config.get("mask_token_id")
    if nested.get("block_size", config.get("block_size")) != config.get("block_size", nested.get("block_size")):
        said.append(
            f"block_size is {config.get('block_size')!r} and dflash_config.block_size {nested.get('block_size')!r}; SGLang "
            "reads the second first: write the same number in both."
        )
    if beside is not None and beside != mask:
        said.append(f"mask_token_id is {beside} and dflash_config.mask_token_id {mask}; write the second alone.")
    if "target_layer_ids" in config and config["target_layer_ids"] != nested.get("target_layer_ids"):
        said.append(
            f"target_layer_ids is {config['target_layer_ids']!r} beside dflash_config.target_layer_ids "
            f"{nested.get('target_layer_ids')!r}; engines differ, leave it out."
        )
    for where, section in {"": config, "dflash_config.": nested}.items():
        if section.get("sample_from_anchor"):
            said.append(
                f"{where}sample_from_anchor is true: its labels are shifted by one slot, which DFlash in the engines is "
                "not; leave it out."
            )
    return said


DFLASH = Format(DFlashConfig, DFlashDraft, "dflash_config.", dflash_section, dflash_problems)


def load_draft(path: Path | str, target: dict[str, Any] | PretrainedConfig, written: Format = DFLASH) -> DFlashDraft:
    """Reads a serving-format checkpoint in its own dtype, for a warm start or to decode with.

    `target` is the target's config, checked against the draft's; the embedding is NaN until `take_from_target`. Raises
    ValueError naming what config.json says otherwise than such a draft here is trained, and every missing, unknown or
    misshaped tensor.
    """
    path = Path(path)
    config, facts = read_json(path / CONFIG), language_config(target)
    try:
        if problems := config_problems(config, facts, written) + _file_problems(path):
            raise ValueError(" ".join(problems))
        c = _shape(config, facts, written)
        tensors = load_weights(path, _own_name)
        if problems := _tensor_problems(tensors, c, written):
            raise ValueError(" ".join(problems))
    except ValueError as error:
        raise ValueError(f"{path} is not a draft to start from: {error}") from error
    draft = written.draft(c).to(tensors["fc.weight"].dtype)
    draft.load_state_dict(tensors)
    return draft


def verify(config: dict[str, Any], path: Path, target_dir: Path | str, written: Format = DFLASH) -> Findings:
    """`serving.export.verify` of a directory with this config.json."""
    facts = language_config(read_target_config(target_dir))
    errors = config_problems(config, facts, written) + _file_problems(path)
    token_errors, warnings = _token_problems(written.block(config) or {}, target_dir, facts)
    errors += token_errors
    warnings += _notes(config, facts)
    try:
        tensors = load_weights(path, _own_name)
        c = _shape(config, facts, written)
    except ValueError as error:
        return Findings([*errors, f"Tensors were not compared with config.json: {str(error).rstrip('.')}."], warnings)
    errors += _tensor_problems(tensors, c, written) + dtype_problems(tensors, config, facts)
    return Findings(list(dict.fromkeys(errors)), warnings)


def config_problems(config: dict[str, Any], facts: dict[str, Any], written: Format = DFLASH) -> list[str]:
    """What config.json lacks, says twice in different ways, or says of another draft or target; a sentence each."""
    said = [
        f"{key} is {config.get(key)!r}; it must be a whole number above 0."
        for key in COUNTS
        if type(config.get(key)) is not int or config[key] < 1
    ]
    title, architecture = written.shape.title, written.shape.architecture
    if architecture not in (config.get("architectures") or []):
        said.append(f"architectures is {config.get('architectures')!r}; it must be [{architecture!r}].")
    for key, law in TRAINED_AS.items():
        if config.get(key, law) != law:
            said.append(f"{key} is {config[key]!r}; a {title} draft here is trained with {law!r}.")
    eps = config.get("rms_norm_eps")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
        said.append(f"rms_norm_eps is {eps!r}; it must be a number above 0.")
    block = written.block(config)
    if block is None:
        name = written.where.rstrip(".")
        return [*said, f"{name} is {config.get(name)!r}; it must hold target_layer_ids and mask_token_id."]
    said += other_target({key: (config.get(key), facts.get(key)) for key in ("hidden_size", "vocab_size")})
    if config.get("draft_vocab_size", config.get("vocab_size")) != config.get("vocab_size"):
        said.append(
            f"draft_vocab_size is {config['draft_vocab_size']} of a vocabulary of {config.get('vocab_size')}; SGLang "
            f"serves a {title} draft with the target's whole vocabulary only."
        )
    said += _layer_problems(config, block, facts, written.where) + _block_problems(config, block, facts, written.where)
    said += _read_otherwise(config, title)
    return said + written.problems(config, block) + rope_problems(config)


def _read_otherwise(config: dict[str, Any], title: str) -> list[str]:
    sections = {"": config, "dflash_config.": dflash_section(config) or {}}
    return [
        f"{where}{name} is {sections[where][name]!r}, with which engines compute something else; a {title} draft here is "
        f"trained with {law!r}: leave it out."
        for where, laws in OTHERWISE.items()
        for name, law in laws.items()
        if sections[where].get(name) not in (None, law)
    ]


def _file_problems(path: Path) -> list[str]:
    if not (path / MASK_EMBEDDING).exists():
        return []
    return [
        f"{MASK_EMBEDDING} is there: both engines embed the mask rows with it, and a draft here is trained with the "
        "target's own row of mask_token_id; such a draft cannot be read."
    ]


def _layer_problems(config: dict[str, Any], block: dict[str, Any], facts: dict[str, Any], where: str) -> list[str]:
    said, ids, n = [], block.get("target_layer_ids"), facts.get("num_hidden_layers")
    if not isinstance(ids, list) or not ids or not all(type(x) is int for x in ids):
        said.append(f"{where}target_layer_ids is {ids!r}; it must list layers of the target, outputs from 0.")
    elif n is not None and (ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] > n - 2):
        said.append(
            f"{where}target_layer_ids {ids} must ascend and lie in 0..{n - 2}, the outputs SGLang can capture of "
            f"{n} layers."
        )
    if "eagle_aux_hidden_state_layer_ids" in config:
        theirs = config["eagle_aux_hidden_state_layer_ids"]
        said.append(
            f"eagle_aux_hidden_state_layer_ids is {theirs!r}, which vLLM takes as boundaries, one more than outputs, and "
            f"before {where}target_layer_ids {ids!r}; engines differ, leave it out."
        )
    if config.get("num_target_layers", n) != n:
        said.append(
            f"num_target_layers is {config['num_target_layers']}, the target has {n}; it is another target's draft."
        )
    return said


def _block_problems(config: dict[str, Any], block: dict[str, Any], facts: dict[str, Any], where: str) -> list[str]:
    said = []
    size, mask = block.get("block_size", config.get("block_size")), block.get("mask_token_id")
    if type(size) is not int or not 2 <= size <= 32:
        said.append(
            f"{where}block_size is {size!r}; SGLang guesses 16 where it is missing: write the number of a block's rows, "
            "2 to 32."
        )
    if type(mask) is not int or not 0 <= mask < (facts.get("vocab_size") or 2**31):
        said.append(
            f"{where}mask_token_id is {mask!r}; it must be an id of the target's vocabulary of "
            f"{facts.get('vocab_size')}, which engines embed."
        )
    nested, kinds, count = dflash_section(config) or {}, config.get("layer_types"), config.get("num_hidden_layers")
    for name, flag in {"is_causal": config.get("is_causal"), "dflash_config.causal": nested.get("causal")}.items():
        if flag:
            said.append(
                f"{name} is true, with which engines make the block causal; it is trained so that each row sees all: "
                "leave it out."
            )
        if flag is False and "sliding_attention" in (kinds or ()):
            said.append(
                f"{name} is false, with which engines let a row of a sliding layer see later rows of its block; here it is "
                "trained to see none: leave it out."
            )
    if nested.get("use_swa") and "sliding_attention" not in (kinds or ()):
        said.append(
            "dflash_config.use_swa is true beside layers of full attention: vLLM then gives each a sliding window, SGLang "
            "none; leave it out, and name sliding layers in layer_types."
        )
    if kinds is not None and (
        not isinstance(kinds, list)
        or len(kinds) != count
        or not set(map(str, kinds)) <= {"full_attention", "sliding_attention"}
    ):
        said.append(
            f"layer_types is {kinds!r}; it must name full_attention or sliding_attention for each of {count} layers."
        )
    elif kinds and "sliding_attention" in kinds and type(config.get("sliding_window")) is not int:
        said.append(f"sliding_window is {config.get('sliding_window')!r}; a sliding layer needs a whole number.")
    window = nested.get("swa_window_size")
    if window is not None and window != config.get("sliding_window"):
        said.append(
            f"dflash_config.swa_window_size is {window}, sliding_window {config.get('sliding_window')}; vLLM reads the "
            "first, SGLang the second: leave the first out."
        )
    return said


def _token_problems(
    block: dict[str, Any], target_dir: Path | str, facts: dict[str, Any]
) -> tuple[list[str], list[str]]:  # errors, warnings
    """The mask token against what the target's tokenizer and config.json use."""
    mask = block.get("mask_token_id")
    if type(mask) is not int:
        return [], []
    errors = []
    for name in ("eos", "bos", "pad"):
        ids = facts.get(f"{name}_token_id")
        if mask in (ids if isinstance(ids, list) else [ids]):
            errors.append(
                f"mask_token_id {mask} is the target's {name} token, which texts have: the draft cannot tell a masked row "
                "from it; train with a token that no text has."
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(target_dir), local_files_only=True)
    except Exception:  # of a tokenizer's own code, which may raise anything
        return errors, ["The target's tokenizer could not be read, so the mask token was not looked up in it."]
    vocabulary = tokenizer.get_vocab()
    if vocabulary.get(MASK_TOKEN, mask) != mask:
        errors.append(
            f"the target's tokenizer has {MASK_TOKEN} as {vocabulary[MASK_TOKEN]}; SGLang refuses mask_token_id {mask}."
        )
    if mask == tokenizer.pad_token_id and not errors:
        errors.append(
            f"mask_token_id {mask} is the tokenizer's pad token ({tokenizer.pad_token}); train with one that no text has."
        )
    named = [name for name, id in vocabulary.items() if id == mask]
    if named and named[0] != MASK_TOKEN and mask not in reserved_tokens(vocabulary, len(vocabulary)) and not errors:
        return errors, [f"mask_token_id {mask} is {named[0]!r} in the target's tokenizer; right only if no text has it."]
    return errors, []


def _notes(config: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """Legal, and worth a look."""
    notes = dtype_notes(facts)
    kinds = set(config.get("layer_types") or ())
    if len(kinds) > 1:
        notes.append("layer_types mixes full and sliding attention: vLLM serves that with its second model runner only.")
    if config.get("dspark_draft_topk") is not None:
        notes.append(
            f"dspark_draft_topk is {config['dspark_draft_topk']}: vLLM then chooses among so many tokens of a slot, where "
            "the draft was trained to choose among all."
        )
    notes += rope_notes(config, facts)
    longest, needed = config.get("max_position_embeddings"), facts.get("max_position_embeddings")
    if type(longest) is int and type(needed) is int and longest < needed:
        notes.append(
            f"max_position_embeddings is {longest}, the target's {needed}; engines stop drafting or refuse beyond it."
        )
    return notes


def _shape(config: dict[str, Any], facts: dict[str, Any], written: Format) -> DFlashConfig:
    """The shape that a config.json without problems describes. Raises ValueError where its fields do not fit together."""
    block = written.block(config) or {}
    count = config.get("num_hidden_layers")
    given = {key: config.get(key) for key in (*COUNTS, "rms_norm_eps")}
    own = ("bos_token_id", "eos_token_id", "pad_token_id")
    kinds = config.get("layer_types") or ["full_attention"] * (count if isinstance(count, int) else 0)
    return written.shape.of(
        given
        | {key: config.get(key) for key in own}
        | {
            "num_target_layers": facts.get("num_hidden_layers"),
            "layers": block.get("target_layer_ids") or (),
            "block_size": block.get("block_size") or config.get("block_size"),
            "mask_token_id": block.get("mask_token_id"),
            "layer_types": kinds,
            "sliding_window": config.get("sliding_window") if "sliding_attention" in kinds else None,
            "rope_parameters": serving_rope(config),
            "initializer_range": config.get("initializer_range") or 0.02,
        }
        | written.fields(config)
    )


def _own_name(name: str) -> str:
    """A leading `model.` is taken off, as engines do."""
    return name.removeprefix("model.")


def _tensor_problems(tensors: dict[str, Tensor], c: DFlashConfig, written: Format) -> list[str]:
    """Missing, unknown and misshaped tensors, dtypes and NaN."""
    shapes, problems = serving_shapes(c, written.draft), []
    if missing := [name for name in shapes if name not in tensors]:
        problems.append(f"missing: {', '.join(missing)}; engines would leave them untrained.")
    for name in tensors.keys() - shapes.keys():
        why = {
            "embed_tokens.weight": "both engines take the target's embedding",
            "lm_head.weight": "both engines take the target's head",
            "d2t": f"SGLang knows no vocabulary map for {c.title}",
        }.get(name, f"no {c.title} draft has it")
        problems.append(f"{name} is there: {why}; leave it out.")
    return problems + weight_problems(tensors, shapes, FLOATS)
