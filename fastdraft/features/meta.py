"""Whose features a store holds: meta.json and the parts of the target that training needs.

# Ht target hidden, V target vocabulary
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastdraft.files import file_checksum, json_checksum, publish, write_file

FORMAT = 1
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Meta:
    """What features depend on, and how they are stored."""

    target: str  # `target_fingerprint`
    weights: str  # `checkpoint_fingerprint`
    config: str  # hash of the target's config.json
    tokenizer: str  # hash of the tokenizer
    layers: tuple[int, ...]
    hidden_size: int  # Ht
    target_dtype: str  # bf16 or fp32: what the target ran in
    dtype: str  # of the rows: as the target's, or fp8
    ends: str = ""  # xxh3-128 of target.safetensors
    head_scale: float = 1.0
    head_softcap: float | None = None
    data: str | None = None  # hash of all documents that are to be captured; None: whatever comes
    shards: int | None = None  # shards of a complete store; None: open-ended
    format: int = FORMAT

    @property
    def identity(self) -> str:
        """Names whose features these are and how they are stored, the data left out. 16 hex digits."""
        facts = {k: v for k, v in asdict(self).items() if k not in ("data", "shards")}
        return json_checksum(facts)

    @property
    def widths(self) -> dict[str, int]:
        """Layers side by side in a row of g and in a row of f."""
        return {"g": len(self.layers), "f": 1}

    @property
    def row_bytes(self) -> dict[str, int]:
        """Bytes of a row of g and of a row of f, scales included."""
        size = DTYPES[self.dtype].itemsize * self.hidden_size + (4 if self.dtype == "fp8" else 0)
        return {name: layers * size for name, layers in self.widths.items()}


COMPARED = ("config", "weights", "tokenizer", "layers", "hidden_size", "target_dtype")  # a run against a store
SAID = {
    "format": "store format",
    "target": "target weights",
    "weights": "target weights",
    "config": "target config.json",
    "layers": "captured layers",
    "target_dtype": "target.dtype",
}


def refuse_other(
    store: Path, meta: Meta, wanted: Meta, fields_compared: Iterable[str], than: str = "this run needs"
) -> None:
    """Raises ValueError naming every field in which the store is of another target, tokenizer or format."""
    wrong = {}
    for name in fields_compared:
        ours, theirs = getattr(wanted, name), getattr(meta, name)
        if ours != theirs:
            wrong.setdefault(SAID.get(name, name), f"{theirs} there, {ours} here")
    if wrong:
        named = "; ".join(f"{name}: {values}" for name, values in wrong.items())
        raise ValueError(f"feature store {store} holds other features than {than} ({named}); capture them anew")


def refuse_file(folder: Path) -> None:
    """ValueError where a file is named in place of a store's folder."""
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file, and a feature store is a folder; name the one that `fastdraft features capture` has "
            "filled, or is to fill"
        )


def read_meta(folder: Path) -> Meta:
    """Raises ValueError when the folder holds no store, a damaged one, or one of another format."""
    refuse_file(folder)
    try:
        found = json.loads((folder / "meta.json").read_text())
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no feature store (no meta.json); `fastdraft features capture` makes one"
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder}/meta.json is damaged ({error}); capture into another folder") from None
    if found.get("format") != FORMAT:
        raise ValueError(
            f"feature store {folder} has format {found.get('format')!r}, this version of fastdraft reads {FORMAT}; "
            "use the version that wrote it, or capture anew"
        )
    names = {field.name for field in fields(Meta)}
    if found.keys() != names:
        raise ValueError(f"{folder}/meta.json lacks or adds {sorted(found.keys() ^ names)}; it is damaged")
    return Meta(**found | {"layers": tuple(found["layers"])})


def start_store(folder: Path, meta: Meta, ends: dict[str, Tensor]) -> Meta:
    """Writes meta.json and target.safetensors, or checks that they are of the same capture. Raises ValueError if not."""
    refuse_file(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".writing-target-{os.getpid()}"
    try:
        save_file(ends, aside)
        meta = replace(meta, ends=file_checksum(aside))
        if (folder / "meta.json").exists():
            found = read_meta(folder)
            if (found.data is None) != (meta.data is None):
                raise ValueError(
                    f"{folder} was filled by a capture, which takes no other documents; set features.mode=read, or name "
                    "another folder"
                    if meta.data is None
                    else f"{folder} is a cache, an import or a merged store; capture into another folder"
                )
            refuse_other(folder, found, meta, [field.name for field in fields(Meta)])
            return found
        if any(folder.glob("shard-*")):
            raise ValueError(f"{folder} has shards but no meta.json: it is damaged; capture into another folder")
        publish(aside, folder / "target.safetensors")
    finally:
        aside.unlink(missing_ok=True)
    write_meta(folder, meta)
    return meta


def write_meta(folder: Path, meta: Meta) -> None:
    write_file(folder / "meta.json", (json.dumps(asdict(meta), indent=1) + "\n").encode())
