"""The draft that a run trains, and the step that trains it: its shape, its first weights, what it takes from the target."""

from __future__ import annotations

from collections.abc import Hashable
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path

import torch
from datasets import Dataset
from pydantic import BaseModel
from torch import nn

from fastdraft.batch import Ends
from fastdraft.config import Config, OptimConfig, read_yaml
from fastdraft.data.vocab import token_counts
from fastdraft.dist import mesh
from fastdraft.dist.mesh import Axis
from fastdraft.dist.tensor import Parts
from fastdraft.files import json_checksum
from fastdraft.model.method import DraftStep, Method
from fastdraft.model.methods import method_of, named_method
from fastdraft.model.target_config import language_config
from fastdraft.optim import Matrix, matrices
from fastdraft.serving.export import serving_config, told_target
from fastdraft.target.hf import Target, load_target_config, load_tokenizer
from fastdraft.target.layers import target_layers


def draft_shape(config: Config) -> BaseModel:
    """The shape of the draft to train: the target's, changed by draft.config and draft.overrides; or draft.init_from's."""
    if config.draft.init_from is not None:
        _check_init_from(config)
        checkpoint = Path(config.draft.init_from)
        files = ((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(checkpoint.iterdir()))
        target = json_checksum(load_target_config(*config.target.files))
        return _shape_to_start_from(config.draft.method, checkpoint, config.target.files, target, *files)
    method = checked_method(config)
    facts = load_target_config(*config.target.files)
    changes = (read_yaml(config.draft.config, "draft.config:") if config.draft.config else {}) | config.draft.overrides
    if method.from_tokenizer is not None:
        tokenizer = load_tokenizer(*config.target.files)
        changes = method.from_tokenizer(tokenizer, language_config(facts).get("vocab_size") or 0) | changes
    return method.shape.from_target(facts, **changes)


def checked_method(config: Config) -> Method:
    """The config's method. Raises ValueError for a name that is none, and for settings that it does not have."""
    method = named_method(config.draft.method)
    method.check_config(config)
    return method


def _check_init_from(config: Config) -> Method:
    if config.draft.config or config.draft.overrides or config.draft.vocab_map:
        raise ValueError(
            "draft.init_from brings the draft's shape and vocabulary; take out draft.config, draft.overrides and "
            "draft.vocab_map"
        )
    serving_config(config.draft.init_from)
    return checked_method(config)


@lru_cache(maxsize=1)
def _shape_to_start_from(method: str, checkpoint: Path, target: tuple[str, bool], *_unchanged: Hashable) -> BaseModel:
    """The shape of a checkpoint, which is read whole, and refused where it is damaged. `_unchanged` is what it was read of:
    the same is not read twice."""
    return named_method(method).load(checkpoint, load_target_config(*target)).config


def new_draft(config: Config) -> nn.Module:
    """An fp32 draft of the configured shape, its vocabulary and embedding unset; or the warm start of draft.init_from."""
    if config.draft.init_from is not None:
        method = _check_init_from(config)
        return method.load(config.draft.init_from, load_target_config(*config.target.files)).float()
    draft = named_method(config.draft.method).draft(draft_shape(config))
    draft.init_weights(draft.config.initializer_range, torch.Generator().manual_seed(config.seed))
    return draft


def fit_to_target(draft: nn.Module, config: Config, target: Target | Ends, train_set: Dataset) -> list[str]:
    """Sets what a new draft takes from the target and the data, and says what it was; of draft.init_from, for which target
    it was trained, since one that was tuned may well start from its base's draft."""
    method, counts = method_of(draft), partial(token_counts, train_set, draft.config.vocab_size)
    lines = origin_lines(config) + method.fit(draft, config.draft, target, counts)
    return lines + method.start(draft, config.draft, partial(target_layers, *config.target.files))


def origin_lines(config: Config) -> list[str]:
    """For which target the checkpoint of draft.init_from, if there is one, was trained."""
    if config.draft.init_from is None:
        return []
    told = told_target(config.draft.init_from, config.target.path)
    others = [f"warning: {line} Training goes on from it all the same." for line in told.errors]
    return [f"draft.init_from: {line}" for line in others + told.warnings + told.notes]


def check_layout(config: Config, shape: BaseModel) -> None:
    """Raises ValueError, naming the setting, where processes cannot share a step as `dist` asks."""
    settings = {"dist.tensor": config.dist.tensor, "dist.sequence": config.dist.sequence}
    asked = " and ".join(f"{name}={size}" for name, size in settings.items() if size > 1)
    if not asked:
        return
    method = method_of(shape)
    if method.check_cut is None:
        raise ValueError(f"{asked}: the step of draft.method={config.draft.method} runs in one process; set them to 1")
    if config.step == "reference":
        raise ValueError(f"{asked}: step=reference runs in one process; set step=fused")
    if config.features.mode == "cache":
        raise ValueError(
            f"{asked}: each of the processes that share a step would fill the cache with the same documents; capture them "
            "first (fastdraft features capture) and set features.mode=read"
        )
    if config.features.on_bad_shard == "skip":
        raise ValueError(
            f"{asked}: features.on_bad_shard=skip leaves out documents that one process cannot read and another perhaps "
            "can, and those that share a step need the same ones; set features.on_bad_shard=error"
        )
    method.check_cut(shape, config.dist.tensor)


def named_optim(config: Config, draft: nn.Module) -> OptimConfig:
    """The config's optimizer. Where Muon is to choose its weights, they are named: the draft's matrices but its tables."""
    if config.optim.optimizer != "muon" or config.optim.muon_weights is not None:
        return config.optim
    tables = method_of(draft).tables
    names = [
        name
        for name, p in draft.trainable().items()
        if p.ndim == 2 and not any(fnmatchcase(name, pattern) for pattern in tables)
    ]
    return config.optim.model_copy(update={"muon_weights": names})


def muon_matrices(config: Config, shape: BaseModel) -> list[Matrix]:
    """The weights of a draft of this shape that Muon steps, with `dist.tensor` a process's parts of them; none with
    AdamW. ValueError as `optim.matrices`."""
    if config.optim.optimizer != "muon":
        return []
    with torch.device("meta"):
        draft = method_of(shape).draft(shape)
    whole = {name: p.shape for name, p in draft.trainable().items()}
    part, tensor = method_of(shape).part, config.dist.tensor
    shapes = whole if tensor == 1 else Parts(whole, part, Axis(0, tensor)).local_shapes
    return matrices(shapes, named_optim(config, draft), whole)


def make_step(config: Config, draft: nn.Module, target: Target | Ends, shared: bool = False) -> DraftStep:
    """With `shared`, the step that the processes of the tensor and sequence axes do together."""
    groups = (mesh.axis("tensor"), mesh.axis("sequence")) if shared else ()
    return method_of(draft).build_step(config, draft, target.head, target.device, *groups)
