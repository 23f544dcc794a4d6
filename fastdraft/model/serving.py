"""What all methods' checkpoints in the serving engines' format have in common: RoPE in two spellings, and sound weights of
one dtype, the target's. Engines are silent about most of what is wrong with one, so it is said here."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastdraft.model.method import WEIGHTS
from fastdraft.model.precision import dtype_name
from fastdraft.model.target_config import canonical_rope, named_dtype, read_json, target_rope


def serving_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The draft's RoPE. Raises ValueError when it is missing or its two spellings, where both are there, differ."""
    beside = ("rope_theta", "partial_rotary_factor")
    around = {key: config[key] for key in beside if config.get(key) is not None}
    new = {**around, **config["rope_parameters"]} if config.get("rope_parameters") else None
    old = {**around, **(config.get("rope_scaling") or {})} if config.get("rope_theta") is not None else None
    if new is None and old is None:
        raise ValueError("RoPE is missing: write rope_parameters, and rope_theta with rope_scaling for older engines")
    spelled = [canonical_rope(rope) for rope in (new, old) if rope is not None]
    if spelled[0] != spelled[-1]:
        raise ValueError(
            f"rope_parameters says {spelled[0]}, rope_theta with rope_scaling says {spelled[1]}; "
            "engines read one or the other, so they must agree"
        )
    return spelled[0]


def rope_problems(config: dict[str, Any]) -> list[str]:
    try:
        serving_rope(config)
    except ValueError as error:
        return [f"{error}."]
    return []


def rope_notes(config: dict[str, Any], target: dict[str, Any]) -> list[str]:
    """A sentence where the draft's RoPE is another than its target's."""
    with suppress(ValueError, TypeError):  # what is wrong with the draft's own is said elsewhere
        rope = serving_rope(config)
        try:
            theirs: dict[str, Any] | str = canonical_rope(target_rope(target) or {})
        except ValueError as error:
            theirs = f"is not one a draft can have ({error})"
        if rope != theirs:
            return [
                f"The draft's RoPE is {rope}, the target's, as a draft has it, {theirs}; right only if the draft was "
                "trained so."
            ]
    return []


def dtype_notes(target: dict[str, Any]) -> list[str]:
    if named_dtype(target) is not None:
        return []
    return ["The target's config.json does not say its dtype, so the weights' dtype was not compared with it."]


def other_target(
    sizes: Mapping[str, tuple[Any, Any]],  # by name: what config.json says, and what the target has; None: not known
) -> list[str]:
    """A sentence for each size that is another target's."""
    return [
        f"{name} is {value}, the target's is {law}; the draft was made for another target."
        for name, (value, law) in sizes.items()
        if law is not None and value is not None and value != law
    ]


def load_weights(path: Path, own_name: Callable[[str], str]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory under the module's names: of model.safetensors, of its shards, or of
    pytorch_model.bin. ValueError when files are missing or damaged, or one name is there twice."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        for name, tensor in _read_file(file).items():
            own = own_name(name)
            if own in tensors:
                raise ValueError(f"{own} is there twice (again in {file.name} as {name}); keep one.")
            tensors[own] = tensor
    return tensors


def _weight_files(path: Path) -> list[Path]:
    index = path / f"{WEIGHTS}.index.json"
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    if index.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) and Path(name).name for name in named.values()):
            raise ValueError(f"{index.name} has no weight_map of tensors' files; copy the whole checkpoint.")
        files = sorted({path / Path(name).name for name in named.values()})
        if lost := [file.name for file in files if not file.exists()]:
            raise ValueError(f"{index.name} names {', '.join(lost)}, which the directory lacks; copy the whole checkpoint.")
        return files
    if shards := sorted(path.glob("*.safetensors")):  # engines read them without an index, too
        return shards
    if (path / "pytorch_model.bin").exists():
        return [path / "pytorch_model.bin"]
    raise ValueError(f"{path} has no {WEIGHTS}, {index.name} or pytorch_model.bin; give a checkpoint directory.")


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".bin":
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file.name} is damaged or holds more than tensors; convert it to {WEIGHTS}.") from error
        if not isinstance(loaded, dict) or not all(isinstance(x, str) and isinstance(t, Tensor) for x, t in loaded.items()):
            raise ValueError(f"{file.name} is not a dict of tensors; convert it to {WEIGHTS}.")
        return loaded
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} is truncated or damaged ({error}); copy or export it again.") from error


def module_shapes(make: Callable[[Any], nn.Module], shape: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a draft's state, none of which is made."""
    any_rope = {"rope_type": "default", "rope_theta": 1e4}  # no shape depends on it
    with torch.device("meta"):  # where scaled frequencies cannot be computed
        draft = make(shape.model_copy(update={"rope_parameters": any_rope}))
    return {name: tuple(t.shape) for name, t in draft.state_dict().items()}


def exported(draft: nn.Module, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a draft's state on the CPU, weights in `dtype`. ValueError for one that is not finite there."""
    state, tensors = draft.state_dict(), {}
    for name in names:
        t = state[name].detach().cpu()
        if t.is_floating_point():
            t = t.to(dtype)
            if not bool(t.isfinite().all()):
                raise ValueError(f"{name} has NaN or infinite values in {dtype_name(dtype)}; export an earlier checkpoint")
        tensors[name] = t.contiguous()
    return tensors


def weight_problems(
    tensors: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],  # of the weights, by name; what `tensors` lacks is not looked at
    dtypes: Container[torch.dtype],  # that a weight may have
) -> list[str]:
    """A sentence for each misshaped weight, wrong dtype, and NaN or infinity; and one where dtypes are mixed."""
    problems: list[str] = []
    found: dict[torch.dtype, str] = {}
    for name, shape in shapes.items():
        if name not in tensors:
            continue
        t = tensors[name]
        if tuple(t.shape) != shape:
            problems.append(f"{name} is {list(t.shape)}, config.json makes it {list(shape)}.")
        if t.dtype not in dtypes:
            problems.append(f"{name} is {dtype_name(t.dtype)}; weights must be bfloat16, float16 or float32.")
            continue
        found.setdefault(t.dtype, name)
        if not bool(t.isfinite().all()):
            problems.append(f"{name} has {int((~t.isfinite()).sum())} NaN or infinite values; export a sound checkpoint.")
    if len(found) > 1:
        mixed = ", ".join(f"{name} {dtype_name(dtype)}" for dtype, name in found.items())
        problems.append(f"weights are of several dtypes ({mixed}); all must be the target's.")
    return problems


def dtype_problems(tensors: dict[str, Tensor], config: dict[str, Any], target: dict[str, Any]) -> list[str]:
    """The weights' dtype against both spellings in config.json and against the target's."""
    weights = {dtype_name(t.dtype) for t in tensors.values() if t.is_floating_point()}
    theirs = named_dtype(target)
    said = [
        f"{key} is {config[key]}, the weights are {', '.join(sorted(weights))}; they must be the same."
        for key in ("dtype", "torch_dtype")
        if config.get(key) is not None and {config[key]} != weights
    ]
    if theirs is not None and {theirs} != weights:
        said.append(f"Weights are {', '.join(sorted(weights))}, the target's are {theirs}; export with the target's dtype.")
    return said
