"""DFlash2 drafts in the serving engines' format: DFlash's, with tensors and fields of the convolutions and the selector.

The four fields stand in `dflash_config`. Engines take a pair that is missing for a draft without that part,
and say nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fastdraft.model.dflash import serving
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.serving import Format, dflash_problems, dflash_section
from fastdraft.model.dflash2.config import NESTED, DFlash2Config
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.method import CONFIG
from fastdraft.model.target_config import read_json


def selector_problems(config: dict[str, Any], nested: dict[str, Any]) -> list[str]:
    """DFlash's, and fields of the convolutions and the selector that are missing or of another draft."""
    said = dflash_problems(config, nested)
    return said + [
        f"dflash_config.{name} is {nested.get(name)!r}; it must be a whole number above 0, without which engines leave out "
        + ("the convolutions." if name.startswith("conv") else "the selector.")
        for name in NESTED
        if type(nested.get(name)) is not int or nested[name] < 1
    ]


def selector_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {name: (dflash_section(config) or {}).get(name) for name in NESTED}


DFLASH2 = Format(DFlash2Config, DFlash2Draft, "dflash_config.", dflash_section, selector_problems, selector_fields)


def load_or_widen(path: Path | str, target: dict[str, Any] | PretrainedConfig) -> DFlash2Draft:
    """Reads a checkpoint as `load_draft` does. A DFlash checkpoint is one to start from, too: its convolutions begin as the
    identity, and its selector chooses what DFlash drafts. Raises ValueError for what is neither."""
    config = read_json(Path(path) / CONFIG)
    if DFlashConfig.architecture in (config.get("architectures") or []):
        return DFlash2Draft.of_dflash(serving.load_draft(path, target))
    return serving.load_draft(path, target, DFLASH2)
