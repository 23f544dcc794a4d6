"""The dtypes of a run: what `auto` means on this machine, and what a run, a store or a server that is there has settled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastdraft import checkpoint
from fastdraft.config import Config, asks_servers, runs_target
from fastdraft.features.meta import read_meta
from fastdraft.model.precision import DTYPES, auto_line, bf16_is_slow, pick_dtype, slow_line
from fastdraft.target.served.feature_server import served_dtype


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """What the draft is computed in; `precision: fp8` keeps bf16 weights."""
    return DTYPES[pick_dtype("bf16" if config.precision == "fp8" else config.precision, device)]


def target_dtype(config: Config, device: torch.device) -> torch.dtype:
    return DTYPES[pick_dtype(config.target.dtype, device)]


def name_dtypes(
    config: Config,
    device: torch.device,
    begun: dict[str, str] | None = None,  # `saved_dtypes` of the run that goes on
    store: Path | None = None,  # the feature store that is read or filled
    runs_target: bool = True,  # False: its features are all stored
    trains: bool = True,  # False: nothing is computed in `precision`, which stays as it is
    plans: bool = False,  # True: no server is asked, and one that would be counts as running in bf16
) -> tuple[Config, list[str]]:  # the config, what to tell the user
    """The config with target.dtype and precision named where they say auto.

    A run goes on in the dtypes it was begun in, with a feature store the target's dtype is the store's, and with servers
    theirs: only what is new is chosen by this machine. Raises ValueError when the store is damaged, or no server answers.
    """
    asked = {"target.dtype": config.target.dtype} | ({"precision": config.precision} if trains else {})
    settled: dict[str, tuple[str, str]] = {}  # the dtype, and who has settled it
    if asks_servers(config) and config.target.dtype == "auto" and "target.dtype" not in (begun or {}):
        known = "bf16" if plans else served_dtype(config.target.url[0], config.target.timeout_s)
        settled["target.dtype"] = known, "its servers run it so"
    if store is not None and (store / "meta.json").exists():
        settled["target.dtype"] = read_meta(store).target_dtype, f"the feature store {store} has it so"
    for name, dtype in (begun or {}).items():
        settled[name] = dtype, "this run was begun so"
    here, named, told = pick_dtype("auto", device), {}, []
    for name, value in asked.items():
        named[name] = value if value != "auto" else settled[name][0] if name in settled else here
        if value == "auto" and name == "target.dtype" and plans and asks_servers(config) and name not in (begun or {}):
            told.append("target.dtype: auto is what the servers run, which a plan does not ask; planned for bf16")
        elif value == "auto" and named[name] != here:
            told.append(f"{name}: auto is {named[name]}, because {settled[name][1]}")
    chosen = [name for name, value in asked.items() if value == "auto" and name not in settled]
    if chosen and device.type == "cpu":
        told.append(auto_line(chosen, device))
    computed = [name for name in named if runs_target or name != "target.dtype"]
    slow = [name for name in computed if named[name] == "bf16"]
    if slow and bf16_is_slow(device):
        adopted = any(asked[name] == "auto" for name in slow)
        what_to_do = "what is begun here, in another folder, is in fp32" if adopted else "leave it out, auto is fp32 here"
        told.append(slow_line(slow, what_to_do))
    target = config.target.model_copy(update={"dtype": named["target.dtype"]})
    return config.model_copy(update={"target": target, "precision": named.get("precision", config.precision)}), told


def name_run_dtypes(
    config: Config, device: torch.device, fresh: bool = False, plans: bool = False
) -> tuple[Config, list[str]]:
    """`name_dtypes` of a training in config.run_dir, which goes on there unless `fresh`."""
    begun = {} if fresh else begun_dtypes(Path(config.run_dir), device)
    store = None if config.features.path is None else Path(config.features.path)
    return name_dtypes(config, device, begun, store, runs_target(config), plans=plans)


def with_dtypes_of(named: Config, config: Config) -> Config:
    """The config in the dtypes of another, which may be another host's; all else stays as it is."""
    target = config.target.model_copy(update={"dtype": named.target.dtype})
    return config.model_copy(update={"target": target, "precision": named.precision})


def saved_dtypes(settings: dict[str, Any], device: torch.device) -> dict[str, str]:
    """target.dtype and precision of a checkpoint's settings, by name.

    A checkpoint of before 2026-11-27 can say auto. The target ran in bf16 then, the draft in bf16 on a GPU and in fp32 on
    a CPU.
    """
    target, precision = settings["target"]["dtype"], settings["precision"]
    draft = "bf16" if device.type == "cuda" else "fp32"
    return {
        "target.dtype": "bf16" if target == "auto" else target,
        "precision": draft if precision == "auto" else precision,
    }


def begun_dtypes(run_dir: Path, device: torch.device) -> dict[str, str]:
    """`saved_dtypes` of the run's newest readable checkpoint; empty when it has none."""
    for path in reversed(checkpoint.list_checkpoints(run_dir)):
        try:
            return saved_dtypes(checkpoint.read_state(path).state["config"], device)
        except checkpoint.Unreadable:
            continue
    return {}


def check_precision(config: Config, device: torch.device) -> None:
    """Raises ValueError where training in fp8 would bring nothing."""
    if config.precision == "fp8" and (device.type == "cpu" or torch.cuda.get_device_capability(device) < (8, 9)):
        name = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        raise ValueError(f"precision: fp8 needs a GPU of compute capability 8.9 or newer, not {name}; set precision=bf16")
