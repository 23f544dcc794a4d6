"""Drafts for SGLang and vLLM: a directory with config.json and model.safetensors, written, read back, verified.

What stands in the two files is the method's; here is that they appear whole or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig

from fastdraft.model.method import CONFIG, WEIGHTS, Findings, Method
from fastdraft.model.methods import METHODS, method_of
from fastdraft.model.target_config import read_json
from fastdraft.target.identity import Origin, origin

TRAINED_FOR = "trained_for"  # the field of an export's config.json that tells its target


def export_draft(
    draft: nn.Module,
    out_dir: Path | str,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    trained_for: Origin | None = None,  # None: config.json says nothing of the target
) -> Path:
    """Writes the draft for SGLang and vLLM, weights in `dtype` (the target's). The directory appears whole or not at all.

    What tells the target stands in config.json, where engines keep fields that they do not know and read none of them.
    Raises ValueError when `out_dir` exists (with `overwrite`: when it holds anything but an export), the vocabulary map is
    not set or a weight is NaN or infinite in `dtype`; OSError when the place is full or cannot be written.
    """
    out = Path(out_dir)
    if out.is_symlink():
        out = out.resolve()  # what it names is written; the link stays
    _check_free(out, overwrite)
    tensors = method_of(draft).serving_tensors(draft, dtype)
    fields = draft.config.to_serving(dtype)
    if trained_for is not None:
        fields[TRAINED_FOR] = asdict(trained_for)
    config = json.dumps(fields, indent=2) + "\n"
    fresh, old = (out.parent / f".{out.name}.{os.getpid()}.{kind}" for kind in ("new", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / CONFIG).write_text(config, encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            with open(fresh / name, "rb") as file:
                os.fsync(file.fileno())
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    except (OSError, SafetensorError) as error:
        if old.exists() and not out.exists():
            old.rename(out)
        needed = sum(t.numel() * t.element_size() for t in tensors.values())
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        raise OSError(
            f"{out} was not written: {reason}; it takes {needed / 1e6:.1f} MB and nothing was left behind. "
            "Free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return out


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ValueError(f"{out} exists; choose another directory or ask to overwrite it")
    foreign = sorted({entry.name for entry in out.iterdir()} - {CONFIG, WEIGHTS}) if out.is_dir() else [out.name]
    if foreign:
        raise ValueError(f"{out} holds {', '.join(foreign[:3])}, which no export wrote; choose another directory")


def load_draft(path: Path | str, target: dict[str, Any] | PretrainedConfig) -> nn.Module:
    """Reads a serving-format checkpoint in its own dtype, for a warm start or to decode with; `Method.load` says more."""
    return _method_of(serving_config(path)).load(path, target)


def serving_config(path: Path | str) -> dict[str, Any]:
    """The config.json of a checkpoint in serving format. Raises ValueError where there is none."""
    if (Path(path) / "checkpoints").is_dir() and not (Path(path) / CONFIG).exists():
        raise ValueError(f"{path} is a run folder: write its draft with `fastdraft export {path} OUT`, and name OUT")
    return read_json(Path(path) / CONFIG)


def verify(path: Path | str, target_dir: Path | str) -> Findings:
    """Everything that would make SGLang or vLLM fail, or draft wrongly without a word, for this checkpoint and target.

    Reads every weight once. Raises ValueError only when the target's own config.json cannot be used.
    """
    try:
        config = serving_config(path)
    except ValueError as error:
        return Findings([f"{error}."], [])
    found, told = _method_of(config).verify(config, Path(path), target_dir), told_target(path, target_dir)
    return Findings(found.errors + told.errors, found.warnings + told.warnings)


class ToldTarget(NamedTuple):
    """What a checkpoint's config.json says of the target that it was trained for, beside the target at hand; a sentence
    each, and one of them in all."""

    errors: list[str]  # it is another model
    warnings: list[str]  # it has the same embedding and head, and other layers
    notes: list[str]  # it is the same, or nothing tells


def told_target(path: Path | str, target_dir: Path | str) -> ToldTarget:
    """Whether a checkpoint was trained for this target and not for another one of its sizes. Nothing is raised."""
    try:
        said = read_json(Path(path) / CONFIG).get(TRAINED_FOR)
        theirs = Origin(**said) if isinstance(said, dict) else None
    except (ValueError, TypeError):  # it is no checkpoint of ours; what else is wrong with it is said by `verify`
        theirs = None
    untold = "Whether the draft was trained for this target or another one of its sizes cannot be told"
    if theirs is None:
        return ToldTarget([], [], [f"{untold}: {CONFIG} has no {TRAINED_FOR}, which a fastdraft export has."])
    try:
        ours = origin(str(target_dir))
    except ValueError as error:
        return ToldTarget([], [], [f"{untold}: {error}."])
    if ours.weights == theirs.weights:
        return ToldTarget([], [], [f"The draft was trained for this very target ({theirs.name})."])
    trained = f"The draft was trained for {theirs.name}, and {target_dir} "
    if theirs.ends is not None and theirs.ends == ours.ends:
        return ToldTarget([], [f"{trained}has its embedding and head with other layers: quantised, or tuned?"], [])
    if theirs.ends is None or ours.ends is None:
        why = "its weights are others, and no embedding in both tells whether it is a quantised copy"
        return ToldTarget([], [f"{trained}is perhaps another model: {why}."], [])
    return ToldTarget([f"{trained}is another model of the same sizes: its embedding, head and layers are others."], [], [])


def _method_of(config: dict[str, Any]) -> Method:
    """By its architecture. One that no method writes is left to the first of them, which says what it must be."""
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    methods = list(METHODS.values())
    return next((method for method in methods if method.shape.architecture in named), methods[0])
