"""Which target this is: fingerprints of its weights, and what a feature store and a run must have in common.

# Ht target hidden, V target vocabulary
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from fastdraft.batch import Ends
from fastdraft.dist.mesh import Axis
from fastdraft.features.meta import Meta, start_store
from fastdraft.files import json_checksum
from fastdraft.model.target_config import first_line, language_config, read_json
from fastdraft.target.hf import Target, load_target_config, load_tokenizer
from fastdraft.target.sharded import local, own_rows

PADDING = 1024  # rows that an embedding may have beyond the vocabulary, at most
IDLE_FACTS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")  # of config.json


def target_fingerprint(target: Target) -> str:
    """Names a target by what a draft depends on: its shape fields and 64 values of every weight. 16 hex digits."""
    fields = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers", "rope_parameters")
    config = target.config.to_dict()
    digest = hashlib.sha256(json.dumps({k: config.get(k) for k in fields}, sort_keys=True, default=str).encode())
    weights = list(target.model.parameters())
    samples = [_samples(weight.detach(), target.holders) for weight in weights]
    if target.holders.size > 1:  # each process has some of the values, and zeros for the others
        bits = torch.cat([values.view(torch.int32) for values in samples])
        places = bits.new_tensor([local(weight) is not weight for weight in weights]).repeat_interleave(
            bits.new_tensor([len(values) for values in samples])
        )
        summed = target.holders.sum_(bits * places)
        samples = [(summed + bits * (1 - places)).view(torch.float32)]
    for values in samples:
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _samples(weight: Tensor, holders: Axis) -> Tensor:  # at most 64 numbers in float32
    """Every so many-th value of a weight; of a sharded one zeros where another process has them."""
    every = -(-weight.numel() // 64)
    if local(weight) is weight:
        return weight.flatten()[::every].float()
    row = math.prod(weight.shape[1:])
    first, end = (place * row for place in own_rows(weight.shape[0], holders))
    places = torch.arange(0, weight.numel(), every, device=local(weight).device)
    inside = (places >= first) & (places < end)
    values = torch.zeros(len(places), device=places.device)
    values[inside] = local(weight).flatten()[places[inside] - first].float()
    return values


def local_folder(path: str) -> Path:
    """Where a target's files lie on this machine, whose config.json was read before."""
    return Path(cached_file(path, "config.json")).parent


def checkpoint_fingerprint(path: str) -> str:
    """Names a checkpoint on disk without loading it: every tensor's name, shape and first 64 values, however they are
    spread over files. 16 hex digits. Raises ValueError when it is not in safetensors."""
    found: dict[str, bytes] = {}
    for file in _weight_files(local_folder(path)):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                part = opened.get_slice(name)
                shape = part.get_shape()
                values = part[(*(slice(0, 1) for _ in shape[:-1]), slice(0, 64))] if shape else opened.get_tensor(name)
                found[name] = json.dumps([name, shape, values.float().flatten().tolist()]).encode()
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()[:16]


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"target {str(folder)!r} has no *.safetensors files to tell its weights by; save it as safetensors"
        )
    return files


def ends_fingerprint(path: str) -> str | None:
    """Names the embedding and head in a checkpoint on disk by values of 64 rows of each, whatever they are called, however
    they are spread over files, and whether they are in bf16 or fp32: so a quantised copy has those of its original. 16 hex
    digits; None where no tensor has a row for each token. Raises ValueError as `checkpoint_fingerprint`."""
    folder = local_folder(path)
    facts = language_config(read_json(folder / "config.json"))
    vocab, hidden = facts.get("vocab_size"), facts.get("hidden_size")
    found: set[bytes] = set()  # a tied head is the embedding, also where both are there
    for file in _weight_files(folder):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                part = opened.get_slice(name)
                shape = part.get_shape()
                if len(shape) != 2 or shape[1] != hidden or not vocab or not vocab <= shape[0] < vocab + PADDING:
                    continue
                rows = range(0, vocab, -(-vocab // 64))
                values = torch.cat([part[row : row + 1, :16] for row in rows])
                if values.is_floating_point():
                    found.add(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()[:16] if found else None


@dataclass(frozen=True)
class Origin:
    """Which target a draft was trained for, as an export says it in its config.json."""

    name: str  # for people
    weights: str  # `checkpoint_fingerprint`
    ends: str | None  # `ends_fingerprint`


def origin(path: str) -> Origin:
    """What tells the target at `path` from others. Of a local folder the name is its own alone, since an export may be
    published. Raises ValueError where its files do not tell."""
    name = Path(path).resolve().name if Path(path).is_dir() else path
    try:
        return Origin(name, checkpoint_fingerprint(path), ends_fingerprint(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"target {path!r} has weights that cannot be read: {first_line(error)}") from error


def stop_ids(path: str, trust_remote_code: bool = False) -> frozenset[int]:
    """Tokens at which an engine that serves this target ends an answer; as `Target.eos_ids`, without its weights.

    They are the eos ids of generation_config.json, or where it names none those of config.json. ValueError: it cannot be
    read.
    """
    named = None
    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, TypeError, ValueError) as error:
        if (Path(path) / "generation_config.json").exists():
            raise ValueError(f"target {path!r} has no readable generation_config.json: {first_line(error)}") from error
    if named is None:
        named = language_config(load_target_config(path, trust_remote_code)).get("eos_token_id")
    return frozenset([named] if isinstance(named, int) else named or [])


def expected_meta(
    path: str,  # of the target
    trust_remote_code: bool,
    layers: tuple[int, ...],
    target_dtype: str,  # bf16 or fp32
) -> Meta:
    """The `Meta` of a run, as far as it is known without the target's weights in memory: `COMPARED`."""
    facts = load_target_config(path, trust_remote_code)
    written = read_json(local_folder(path) / "config.json")  # without defaults, which change with transformers
    return Meta(
        target="",
        weights=checkpoint_fingerprint(path),
        config=json_checksum({k: v for k, v in written.items() if k not in IDLE_FACTS}),
        tokenizer=_tokenizer_hash(load_tokenizer(path, trust_remote_code)),
        layers=layers,
        hidden_size=language_config(facts)["hidden_size"],
        target_dtype=target_dtype,
        dtype=target_dtype,
    )


def begin_store(folder: Path, wanted: Meta, ends: Ends, **changes: Any) -> Meta:
    """`start_store` of a target's features: a run's `expected_meta`, and what only the target tells. `changes` win."""
    head = {"head_scale": ends.head.scale, "head_softcap": ends.head.softcap}
    meta = replace(wanted, target=ends.fingerprint, hidden_size=ends.hidden_size, **head | changes)
    return start_store(folder, meta, _tensors(ends))


def _tensors(ends: Ends) -> dict[str, Tensor]:
    """What training needs of a target besides its features: embedding, lm_head, final norm."""
    named = {"embedding": ends.embedding, "head.weight": ends.head.weight, "head.bias": ends.head.bias}
    named["final_norm"] = ends.final_norm
    if ends.head.weight.data_ptr() == ends.embedding.data_ptr():
        del named["head.weight"]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items() if tensor is not None}


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json_checksum(backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()))
