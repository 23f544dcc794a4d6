"""A target of which each process keeps 1/n of every layer, for targets that one GPU cannot hold.

FSDP2 stores the layers: before a layer runs it is gathered whole, while the layer before it still computes, and after it
has run it is let go. Nothing is trained, so there is no backward and no reduction, and the numbers are those of a whole
target bit for bit: gathering moves weights and computes nothing. What stands before the first layer and behind the last
(embedding, head, final norm) is whole on every process, because the draft's step reads it whole.

No process ever has the whole target in memory, and together they read each weight from the disk once: the model is built
empty, and each process reads its rows of each weight from the safetensors files. Where transformers makes a weight of
several that are on disk (the experts of a layer, stacked), its own conversion is called, on this process's part of them
where the parts are rows of the result, and otherwise on the whole.

A gathered layer is a meeting of all processes, so all must run the same number of forwards in the same order. `Lockstep`
takes care of it: a process that has nothing to run takes part with one token.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from fastdraft.dist.mesh import Axis


class Lockstep:
    """The same number of forwards on all processes that hold a target together.

    A process calls `enter` before each forward of its own, and `wait` when it has none and the others may: meanwhile it
    runs `idle` as often as they run theirs, until all are waiting. The agreement is one number over the hosts' network,
    and no GPU is waited for.
    """

    def __init__(self, axis: Axis, idle: Callable[[], None]):
        self.axis, self.idle = axis, idle

    def enter(self) -> None:
        self.axis.largest(1)

    def wait(self) -> None:
        while self.axis.largest(0):
            self.idle()


def shard_layers(decoder: nn.Module, blocks: nn.ModuleList, axis: Axis, device: torch.device) -> None:
    """Leaves this process its rows of every parameter of the blocks; what else the decoder has stays as it is."""
    mesh = axis.device_mesh(device)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = {p for p in decoder.parameters() if id(p) not in inside}
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=outside)


def own_rows(
    length: int,  # of a weight's first dimension
    axis: Axis,
) -> tuple[int, int]:
    """The first row of a sharded weight that this process keeps, and one past the last; FSDP2 cuts as torch.chunk does."""
    each = -(-length // axis.size)
    return min(axis.rank * each, length), min((axis.rank + 1) * each, length)


def local(weight: Tensor) -> Tensor:
    """This process's rows of a weight that is sharded; any other weight itself."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


class Piece(NamedTuple):
    """One tensor of a checkpoint on disk."""

    name: str
    file: Any  # an open safetensors file

    def rows(self, first: int, end: int) -> Tensor:
        return self.file.get_slice(self.name)[first:end]

    def whole(self) -> Tensor:
        return self.file.get_tensor(self.name)


def load_sharded(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    axis: Axis,
    layers_of: Callable[[PreTrainedModel], tuple[nn.Module, nn.ModuleList]],  # the decoder and its layers
) -> tuple[PreTrainedModel, list[str]]:  # and the names of weights that the files lack
    """The model of a local directory or hub name in eval mode, each process with its rows of the layers.

    Raises ValueError for a quantized checkpoint, or one that is not in safetensors.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    refuse_quantized(path, config)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model = model.eval().requires_grad_(False)
    _keep_in_float32(model, dtype)
    decoder, blocks = layers_of(model)
    shard_layers(decoder, blocks, axis, device)
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    model.tie_weights()
    missing = _fill(model, _checkpoint_files(path), axis)
    with contextlib.suppress(OSError):  # it has none, and the config's own fields count
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, missing


def refuse_quantized(path: str, config: PretrainedConfig) -> None:
    inner = config.get_text_config()
    if getattr(config, "quantization_config", None) or getattr(inner, "quantization_config", None):
        raise ValueError(
            f"target {path!r} is quantized, and quantized weights are not sharded; give a copy in bfloat16, or set "
            "dist.target=replicated if the target fits on one GPU as it is"
        )


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Some models name parameters that stay in fp32 whatever the others are in, as their loader does."""
    names = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    if dtype == torch.float32 or not names:
        return
    pattern = re.compile("|".join(name.replace("*", ".*") for name in names))
    for name, p in model.named_parameters():
        if pattern.search(name):
            p.data = p.data.float()


def _checkpoint_files(path: str) -> list[str]:
    """The safetensors files of a local directory or hub name, downloaded if they are not here."""
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        return get_checkpoint_shard_files(path, index)[0]
    single = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is None:
        folder = Path(path)
        there = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "what the hub has"
        raise ValueError(
            f"target {path!r} has no model.safetensors and no model.safetensors.index.json (there is {there}), and only "
            "such files are read in parts; save it as safetensors"
        )
    return [single]


def _fill(model: PreTrainedModel, files: list[str], axis: Axis) -> list[str]:
    """Reads this process's rows of every weight. The names of those that no file has."""
    state = model.state_dict(keep_vars=True)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}

    # First by the files' headers alone: which tensors on disk make which weight, and by which conversion.
    plain: dict[str, Piece] = {}
    made: dict[str, dict[str, list[Piece]]] = defaultdict(lambda: defaultdict(list))  # weight, pattern, pieces
    pieces = [Piece(name, opened) for opened in (safe_open(file, "pt") for file in files) for name in opened.keys()]  # noqa: SIM118
    for piece in sorted(pieces, key=lambda piece: dot_natural_key(piece.name)):
        name, pattern = rename_source_key(piece.name, renamings, converters, model.base_model_prefix, state)
        if name not in state and piece.name in state:
            name, pattern = piece.name, None
        if pattern is not None:
            made[name][pattern].append(piece)
        elif name in state:
            plain[name] = piece

    filled: set[int] = set()  # addresses: tied weights are filled together
    with torch.no_grad():
        for name, piece in plain.items():
            weight = state[name]
            own = local(weight)
            _copy(own, piece.whole() if own is weight else piece.rows(*own_rows(weight.shape[0], axis)), name)
            filled.add(id(weight))
        for first_name, sources in made.items():
            rule = of_pattern[next(iter(sources))]
            for name, values in _converted(rule, first_name, sources, state, model, axis):
                _copy(local(state[name]), values, name)
                filled.add(id(state[name]))
    ignored = model._keys_to_ignore_on_load_missing or ()
    return sorted(
        name
        for name, weight in state.items()
        if id(weight) not in filled and not any(re.search(pattern, name) for pattern in ignored)
    )


def _converted(
    rule: WeightConverter,
    first_name: str,  # of the weights that it makes
    sources: dict[str, list[Piece]],  # by the rule's patterns
    state: dict[str, Tensor],
    model: PreTrainedModel,
    axis: Axis,
) -> Iterator[tuple[str, Tensor]]:  # weights' names and this process's rows of them
    weight = state.get(first_name)
    first, end = 0, 0
    by_rows = weight is not None and local(weight) is not weight and _stacks_rows(rule)
    if by_rows:
        first, end = own_rows(weight.shape[0], axis)
        if first == end:
            yield first_name, local(weight)
            return
        sources = {pattern: pieces[first:end] for pattern, pieces in sources.items()}
    rule = copy.deepcopy(rule)
    for pattern, pieces in sources.items():
        for piece in pieces:
            values = piece.whole()
            rule.add_tensor(first_name, piece.name, pattern, values.to(weight.dtype) if weight is not None else values)
    for name, values in rule.convert(first_name, model=model, config=model.config).items():
        values = values[0] if isinstance(values, list) else values
        if name in state:
            if not by_rows and local(state[name]) is not state[name]:
                values = values[slice(*own_rows(state[name].shape[0], axis))]
            yield name, values


def _stacks_rows(rule: WeightConverter) -> bool:
    """Whether each tensor on disk is one row, along the first dimension, of the only weight that the rule makes."""
    stack, *others = rule.operations
    return (
        len(rule.target_patterns) == 1
        and isinstance(stack, MergeModulelist)
        and stack.dim == 0
        and all(
            (isinstance(op, Concatenate) and op.dim > 0) or (isinstance(op, Transpose) and min(op.dim0, op.dim1) > 0)
            for op in others
        )
    )


def _copy(own: Tensor, values: Tensor, name: str) -> None:
    if own.shape != values.shape:
        raise ValueError(
            f"the weight {name} is {list(values.shape)} in the files and {list(own.shape)} by config.json (this process's "
            "rows): they are of different models"
        )
    own.copy_(values)
