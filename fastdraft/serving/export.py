"""Drafts for SGLang and vLLM: a directory with config.json and model.safetensors, written, read back, verified.

What stands in the two files is the method's; here is that they appear whole or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig

from fastdraft.model.method import CONFIG, WEIGHTS, Findings, Method
from fastdraft.model.methods import METHODS, method_of
from fastdraft.model.target_config import read_json


def export_draft(
    draft: nn.Module, out_dir: Path | str, dtype: torch.dtype = torch.bfloat16, overwrite: bool = False
) -> Path:
    """Writes the draft for SGLang and vLLM, weights in `dtype` (the target's). The directory appears whole or not at all.

    Raises ValueError when `out_dir` exists (with `overwrite`: when it holds anything but an export), the vocabulary map is
    not set or a weight is NaN or infinite in `dtype`; OSError when the place is full or cannot be written.
    """
    out = Path(out_dir)
    if out.is_symlink():
        out = out.resolve()  # what it names is written; the link stays
    _check_free(out, overwrite)
    tensors = method_of(draft).serving_tensors(draft, dtype)
    config = json.dumps(draft.config.to_serving(dtype), indent=2) + "\n"
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
    return _method_of(read_json(Path(path) / CONFIG)).load(path, target)


def verify(path: Path | str, target_dir: Path | str) -> Findings:
    """Everything that would make SGLang or vLLM fail, or draft wrongly without a word, for this checkpoint and target.

    Reads every weight once. Raises ValueError only when the target's own config.json cannot be used.
    """
    try:
        config = read_json(Path(path) / CONFIG)
    except ValueError as error:
        return Findings([f"{error}."], [])
    return _method_of(config).verify(config, Path(path), target_dir)


def _method_of(config: dict[str, Any]) -> Method:
    """By its architecture. One that no method writes is left to the first of them, which says what it must be."""
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    methods = list(METHODS.values())
    return next((method for method in methods if method.shape.architecture in named), methods[0])
