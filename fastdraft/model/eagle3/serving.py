"""EAGLE-3 drafts in the serving engines' format: tensors and config.json, read back for a warm start, verified.

Tensors carry the module's own names and the target's dtype; d2t [Vd] int64 is an offset (target id - draft id) and t2d [V]
bool marks the target ids the draft can propose. Left out: d2t where Vd == V (vLLM fails on it), embed_tokens where H == Ht
(the engines share the target's). Both engines are silent about a missing tensor and SGLang about an unknown one, so names,
shapes and completeness are checked here.

# H draft hidden, Ht target hidden, V target vocabulary, Vd draft vocabulary
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastdraft.model.eagle3.config import (
    DraftConfig,
    serving_layers,
    serving_malformed,
    serving_norm_before_fc,
    serving_problems,
)
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.method import CONFIG, Findings
from fastdraft.model.precision import dtype_name
from fastdraft.model.serving import (
    dtype_notes,
    dtype_problems,
    exported,
    load_weights,
    module_shapes,
    rope_notes,
    weight_problems,
)
from fastdraft.model.target_config import default_layers, language_config, read_json, read_target_config

MANDATORY = (
    *("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "attention_bias", "rms_norm_eps", "vocab_size"),
    *("draft_vocab_size", "tie_word_embeddings", "max_position_embeddings", "rope_parameters", "rope_theta"),
    *("dtype", "torch_dtype"),
)
SIZES = {"hidden_size", "target_hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "vocab_size"}
MAP_DTYPES = {"d2t": torch.int64, "t2d": torch.bool}
MAPS = {
    "d2t": "engines would take draft ids for target ids",
    "t2d": "engines read d2t alone, but without it nothing tells whether that is the map of these weights; write it",
}
OLD_NAMES = {f"aux_norm_{part}.weight": f"fc_norm.{j}.weight" for j, part in enumerate(("low", "mid", "high"))}  # SGLang's


def serving_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a serving checkpoint. Raises ValueError where no tensor can be so large."""
    try:
        shapes = module_shapes(Draft, config)
    except (RuntimeError, TypeError) as error:  # sizes beyond 64 bits
        raise ValueError(f"no tensor can have the sizes in config.json: {config.model_dump(include=SIZES)}") from error
    if config.draft_vocab_size == config.vocab_size:
        del shapes["d2t"]
    if config.hidden_size == config.target_hidden_size:
        del shapes["embed_tokens.weight"]
    return shapes


def serving_tensors(draft: Draft, dtype: torch.dtype) -> dict[str, Tensor]:
    c, state = draft.config, draft.state_dict()
    if problems := _map_problems(state["d2t"].cpu(), state["t2d"].cpu(), c):
        raise ValueError("the draft's vocabulary map is not fit to export: " + " ".join(problems))
    return exported(draft, serving_shapes(c), dtype)


def _map_problems(
    d2t: Tensor | None,  # [Vd] int64, None: Vd == V
    t2d: Tensor,  # [V] bool
    c: DraftConfig,
) -> list[str]:
    if d2t is None:
        d2t = torch.zeros(c.draft_vocab_size, dtype=torch.int64)
    ids = d2t + torch.arange(c.draft_vocab_size)
    problems = []
    if c.draft_vocab_size < c.vocab_size and torch.equal(t2d.nonzero().flatten(), d2t):
        problems.append("d2t holds the target ids themselves; it must be an offset, target id minus draft id.")
    elif int(ids.min()) < 0 or int(ids.max()) >= c.vocab_size:
        worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        problems.append(
            f"d2t maps to target id {worst}, outside the vocabulary of {c.vocab_size}; "
            "d2t must be target id minus draft id."
        )
    elif not bool((ids[1:] > ids[:-1]).all()):
        first = int((ids[1:] <= ids[:-1]).nonzero()[0])
        problems.append(
            f"d2t maps draft ids {first} and {first + 1} to target ids {int(ids[first])} and {int(ids[first + 1])}, "
            "which must ascend; d2t must be target id minus draft id, of ascending ids."
        )
    elif not torch.equal(t2d.nonzero().flatten(), ids):
        problems.append(
            f"t2d marks {int(t2d.sum())} target tokens and they are not the {len(ids)} that d2t maps to; "
            "both must come from the run's one vocabulary map."
        )
    return problems


def load_draft(path: Path | str, target: dict[str, Any] | PretrainedConfig) -> Draft:
    """Reads a serving-format checkpoint in its own dtype, for a warm start or to decode with.

    `target` is the target's config, checked against the draft's. Reads model.safetensors, its shards, or
    pytorch_model.bin (tensors only). For H == Ht the embedding is NaN until `Draft.set_embedding`: an export is served with
    the target's, so one that the checkpoint ships all the same is not used. Raises ValueError naming every missing, unknown
    or misshaped tensor, a vocabulary map that contradicts itself, and a checkpoint of another target.
    """
    path = Path(path)
    config = read_json(path / CONFIG)
    try:
        facts = _target_facts(target)
        c = DraftConfig.from_serving(config, facts["num_hidden_layers"], facts["hidden_size"], facts["vocab_size"])
        tensors = _with_t2d({OLD_NAMES.get(name, name): t for name, t in load_weights(path, _own_name).items()}, c)
        problems = _tensor_problems(tensors, c, lenient=True)
        if problems := problems or _map_problems(tensors.get("d2t"), tensors["t2d"], c):
            raise ValueError(" ".join(problems))
    except ValueError as error:
        raise ValueError(f"{path} is not a draft to start from: {error}") from error
    draft = Draft(c).to(tensors["fc.weight"].dtype)
    if c.hidden_size == c.target_hidden_size:
        tensors["embed_tokens.weight"] = torch.full_like(draft.embed_tokens.weight, torch.nan)
    tensors.setdefault("d2t", torch.zeros(c.draft_vocab_size, dtype=torch.int64))
    draft.load_state_dict(tensors)
    return draft


def _with_t2d(tensors: dict[str, Tensor], c: DraftConfig) -> dict[str, Tensor]:
    """The tensors with t2d, derived from d2t where it is missing: engines read d2t alone, so such a draft lacks nothing.

    Without d2t, too, the draft must have the whole vocabulary. A d2t that is no map is left for others to refuse. Raises
    ValueError for one that may hold target ids themselves, which a t2d would tell from offsets.
    """
    d2t = tensors.get("d2t", torch.zeros(c.draft_vocab_size, dtype=torch.int64))
    given = "d2t" in tensors or c.draft_vocab_size == c.vocab_size
    if "t2d" in tensors or not given or tuple(d2t.shape) != (c.draft_vocab_size,) or d2t.dtype != torch.int64:
        return tensors
    if "d2t" in tensors and len(d2t) > 1 and bool((d2t[1:] > d2t[:-1]).all()):
        raise ValueError(
            "t2d is missing, and d2t rises from every draft id to the next, as target ids do and offsets hardly ever; "
            "write t2d, bool, true at the target ids that the draft can propose."
        )
    ids = d2t + torch.arange(c.draft_vocab_size)
    t2d = torch.zeros(c.vocab_size, dtype=torch.bool)
    t2d[ids[(ids >= 0) & (ids < c.vocab_size)]] = True
    return tensors | {"t2d": t2d}


def _target_facts(target: dict[str, Any] | PretrainedConfig) -> dict[str, Any]:
    """The target's fields a draft must agree with. Raises ValueError naming what config.json lacks."""
    config = language_config(target)
    names = ("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings")
    if missing := [name for name in names if config.get(name) is None]:
        raise ValueError(f"the target's config.json does not say {', '.join(missing)}; complete it")
    return {name: config[name] for name in names}


def _own_name(name: str) -> str:
    """`layers.0.` is `midlayer.` here."""
    return "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _tensor_problems(tensors: dict[str, Tensor], c: DraftConfig, lenient: bool) -> list[str]:
    """Missing, unknown and misshaped tensors, dtypes and NaN. `lenient`: what only ought to be left out is accepted."""
    shapes = serving_shapes(c)
    allowed = dict(shapes)
    if lenient:
        allowed = {"d2t": (c.draft_vocab_size,), "embed_tokens.weight": (c.vocab_size, c.hidden_size)} | shapes
    problems = []
    if missing := [name for name in shapes if name not in tensors and name not in MAPS]:
        problems.append(f"missing: {', '.join(missing)}; engines would silently leave them untrained.")
    problems += [f"missing: {name}; {why}." for name, why in MAPS.items() if name in shapes and name not in tensors]
    for name in tensors:
        if name in allowed:
            continue
        why = {
            "d2t": "draft_vocab_size equals vocab_size, where vLLM fails on it; leave it out",
            "embed_tokens.weight": "hidden_size is the target's, whose embedding SGLang takes instead; leave it out",
            **{old: f"SGLang's old name, which vLLM does not know; call it {new}" for old, new in OLD_NAMES.items()},
        }.get(name, "unknown: SGLang ignores it and vLLM fails on it; leave it out")
        problems.append(f"{name} is there, {why}.")
    for name, law in MAP_DTYPES.items():
        if name not in tensors or name not in allowed:
            continue
        t, shape = tensors[name], allowed[name]
        if tuple(t.shape) != shape:
            problems.append(f"{name} is {list(t.shape)}, config.json makes it {list(shape)}.")
        if t.dtype != law:
            problems.append(f"{name} is {dtype_name(t.dtype)}, it must be {dtype_name(law)}.")
    weights = {name: shape for name, shape in allowed.items() if name not in MAP_DTYPES}
    return problems + weight_problems(tensors, weights, (torch.float16, torch.bfloat16, torch.float32, torch.float64))


def verify(config: dict[str, Any], path: Path, target_dir: Path | str) -> Findings:
    """`serving.export.verify` of a directory with this config.json."""
    target = language_config(read_target_config(target_dir))
    facts = _target_facts(target)
    if malformed := serving_malformed(config):
        return Findings(malformed, ["Nothing else was checked, config.json must be well-formed first."])
    errors, warnings = _field_problems(config, facts), _notes(config, target)
    try:
        tensors = load_weights(path, _own_name)
    except ValueError as error:
        return Findings([*errors, str(error)], warnings)
    try:
        c = _shape_only(config)
        serving_shapes(c)
    except ValueError as error:
        return Findings([*errors, f"Tensors were not compared with config.json: {str(error).rstrip('.')}."], warnings)
    errors += _tensor_problems(tensors, c, lenient=False)
    warnings += recurrence_notes(config, tensors.get("norm.weight"))
    if _map_is_whole(tensors, c):
        errors += _map_problems(tensors["d2t"] if c.draft_vocab_size < c.vocab_size else None, tensors["t2d"], c)
    return Findings(errors + dtype_problems(tensors, config, target), warnings)


def _field_problems(config: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """What config.json lacks, says twice in different ways, or says of another target."""
    said = [f"{key} is missing; write it, engines guess otherwise." for key in MANDATORY if config.get(key) is None]
    said += serving_problems(config, facts["num_hidden_layers"], facts["hidden_size"], facts["vocab_size"])
    if config.get("use_aux_norm"):
        said.append("use_aux_norm is true, SGLang's old name, which vLLM does not know; write fc_norm instead.")
    if "rope_theta" not in (config.get("rope_parameters") or {"rope_theta": None}):
        said.append("rope_parameters has no rope_theta; write it there too, it is read before the one beside it.")
    longest, needed = config.get("max_position_embeddings"), facts["max_position_embeddings"]
    if longest is not None and longest < needed:
        said.append(
            f"max_position_embeddings is {longest}, the target's {needed}; SGLang refuses longer contexts and vLLM stops "
            f"drafting there: write at least {needed}."
        )
    return said


def _notes(config: dict[str, Any], target: dict[str, Any]) -> list[str]:
    """Legal, and worth a look: RoPE other than the target's, layer ids that say only the default."""
    notes, default = dtype_notes(target), default_layers(target["num_hidden_layers"])
    with suppress(ValueError):  # an error of _field_problems
        if config.get("eagle_config") and serving_layers(config, target["num_hidden_layers"]) == default:
            notes.append("eagle_config names the default layers; it can be left out.")
    return notes + rope_notes(config, target)


def recurrence_notes(
    config: dict[str, Any],
    norm: Tensor | None,  # [H] norm.weight
) -> list[str]:
    """Warnings where a draft may have been trained with another recurrence than engines will run.

    SpecForge read norm_output from 2026-05-27 to 2026-09-15 (pull requests 568 and 879) as whether lm_head reads through
    the norm. With true, its default, it fed back the state before the norm; with false it trained no norm at all.
    """
    if config.get("trained_by") == "fastdraft":
        return []
    then = "SpecForge of 2026-05-27 to 2026-09-15"
    if config.get("norm_output") is True:
        return [
            f"norm_output is true, so the state after the final norm goes to the next step. {then} wrote it for drafts "
            "that were trained on the state before the norm: if this is one of them, take norm_output out and it is served "
            "as trained. `fastdraft check` with --engine tells which of the two it was trained for."
        ]
    if config.get("norm_output") is False and norm is not None and bool((norm == 1).all()):
        return [
            f"norm_output is false and norm.weight is all 1: {then} wrote that for drafts whose lm_head was trained "
            "without the norm before it, which no engine serves. If this is one of them, train it on with draft.init_from."
        ]
    return []


def _shape_only(config: dict[str, Any]) -> DraftConfig:
    """The sizes in config.json, whatever the rest of it says. Raises ValueError when they are missing or do not fit."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    fields = {key: config.get(key) for key in (*sizes, "draft_vocab_size", "rms_norm_eps", "max_position_embeddings")}
    plain = {"architectures": [DraftConfig.architecture], "rope_parameters": {"rope_theta": 1e4}}
    read = ("target_hidden_size", "fc_norm", "use_aux_norm")
    rest = {key: config[key] for key in read if config.get(key) is not None}
    rest["norm_before_fc"] = serving_norm_before_fc(config)
    return DraftConfig.from_serving(fields | plain | rest, num_target_layers=7)


def _map_is_whole(tensors: dict[str, Tensor], c: DraftConfig) -> bool:
    return all(
        name in tensors and tuple(tensors[name].shape) == shape and tensors[name].dtype == MAP_DTYPES[name]
        for name, shape in serving_shapes(c).items()
        if name in MAP_DTYPES
    )
