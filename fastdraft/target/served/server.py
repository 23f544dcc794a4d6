"""The command that starts a user's own vLLM with our connector, which nothing of vLLM is changed for."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from fastdraft.model.target_config import default_layers, language_config
from fastdraft.target.hf import load_target_config
from fastdraft.target.identity import expected_meta
from fastdraft.target.served.connector import fastdraft_handover
from fastdraft.target.served.feature_server import is_tested, tested

SHARED_MEMORY = "/dev/shm"
# What the command sets itself, and what would make the served model another than the files say or take a check away.
OWN_FLAGS = {
    "--model": "the target is the first argument",
    "--speculative-config": "it keeps the states, so this server cannot speculate",
    "-sc": "it keeps the states, so this server cannot speculate",
    "--spec-method": "it keeps the states, so this server cannot speculate",
    "--spec-model": "it keeps the states, so this server cannot speculate",
    "--spec-tokens": "it keeps the states, so this server cannot speculate",
    "--kv-transfer-config": "it hands the states over",
    "--revision": "give a folder, or a name that the cache has in one revision",
    "--hf-overrides": "a trainer could not see that the model is another; change the folder's config.json",
    "--hf-config-path": "a trainer could not see that the model is another; change the folder's config.json",
    "--model-impl": "vLLM then looks there for the model that keeps the states, too, and does not start; a target that has "
    "no model of vLLM's own runs by transformers' modules anyway",
    "--config": "its file may set what is refused here; write the file's flags on the command line",
    "--skip-tokenizer-init": "without a tokenizer vLLM does not check token ids, and a wrong one ends the engine",
}


@dataclass(frozen=True)
class ServeCommand:
    """A process to start: its arguments, and what its environment has besides this one's."""

    arguments: list[str]
    environment: dict[str, str]
    url: str
    folder: str
    layers: tuple[int, ...]


def serve_command(
    python: str,  # that has vLLM
    target: str,  # local directory, or a hub name whose files are fetched if they are not in the cache
    flags: list[str],  # vLLM's own
    layers: tuple[int, ...] | None = None,  # whose outputs are handed over, from 0; None: those of a draft by default
    folder: str | None = None,  # None: one in shared memory, by the port
    pythonpath: str | None = None,
    states_port: int | None = None,  # where trainers on other hosts are given states; None: nowhere
) -> ServeCommand:
    """The vLLM server that a trainer can use. ValueError where a flag or a layer cannot be."""
    _refuse_own(flags)
    if not Path(target).is_dir():  # as vLLM would; what is served is then known by its files
        target = snapshot_download(
            target, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
        )
    trust_remote_code = "--trust-remote-code" in flags
    facts = language_config(load_target_config(target, trust_remote_code))
    n = facts["num_hidden_layers"]
    layers = default_layers(n) if layers is None else layers
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < n:
        raise ValueError(f"--layers {','.join(map(str, layers))} must ascend and lie in 0..{n - 1}, the target's layers")
    meta = expected_meta(target, trust_remote_code, layers, "bf16")
    port = _value(flags, "--port") or "8000"
    folder = folder or f"{SHARED_MEMORY}/fastdraft-{os.getuid()}-{port}"
    boundaries = sorted({layer + 1 for layer in layers} | {n})
    told = {
        "folder": folder,
        "instance": secrets.token_hex(8),
        "identity": {"weights": meta.weights, "config": meta.config},
    }
    environment = {}
    host = _value(flags, "--host") or "localhost"
    if states_port is not None:
        if _value(flags, "--data-parallel-size", "-dp") not in (None, "1"):
            raise ValueError(
                "--states-port is one port, and each of vLLM's data-parallel ranks hands over its own states; start a "
                "server for each rank, and name all of them in target.url"
            )
        # The same addresses as vLLM's own port: by default all of this host.
        told |= {"states_host": _value(flags, "--host") or "", "states_port": states_port}
        environment["FASTDRAFT_STATES_TOKEN"] = secrets.token_hex(16)
    arguments = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    arguments += [*_states_flags(boundaries, told), *flags]
    own = str(Path(fastdraft_handover.__file__).parent)
    paths = [own, *filter(None, [pythonpath])]
    url = f"http://{'localhost' if host in ('0.0.0.0', '::') else host}:{port}"
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return ServeCommand(arguments, environment, url, folder, layers)


def _refuse_own(flags: list[str]) -> None:
    """ValueError for one of OWN_FLAGS, as vLLM reads it: `--a.b V` sets a part of `--a`, an underscore is a dash, and a
    name's beginning is the name."""
    for flag in flags:
        given = flag.split("=", 1)[0]
        name = given.split(".", 1)[0].replace("_", "-")
        if not name.startswith("-") or not name.strip("-"):
            continue
        for own, why in OWN_FLAGS.items():
            if own.startswith(name):
                of = "" if own == name else f", which is of {own}"
                raise ValueError(f"serve-target does not take vLLM's {given}{of}: {why}")


def _states_flags(boundaries: list[int], told: dict[str, Any]) -> list[str]:
    """vLLM's flags that make it keep the states at these boundaries, and give them to our connector, which is `told` where
    to hand them over."""
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": boundaries}},
    }
    connector = {
        "kv_connector": "FastdraftStates",
        "kv_connector_module_path": "fastdraft_states",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": told,
    }
    return ["--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(connector)]


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers as the command line names them, such as 1,15,28. ValueError for anything else."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--layers {text} is no list of layers; write for example --layers 1,15,28") from None


def refuse_other_version(version: str) -> None:
    """ValueError for a vLLM outside the tested range."""
    if not is_tested(version):
        raise ValueError(
            f"vLLM {version} is outside of the versions that the connector was tested with, {tested()}; its interface for "
            "connectors is experimental and changes between versions, so no other is started: install one of these, and "
            "name its Python with --engine-python"
        )


def _value(flags: list[str], *names: str) -> str | None:
    """The value of a flag, given as `--port 1` or `--port=1`; the last one counts."""
    value = None
    for i, flag in enumerate(flags):
        if flag in names and i + 1 < len(flags):
            value = flags[i + 1]
        elif flag.split("=", 1)[0] in names and "=" in flag:
            value = flag.split("=", 1)[1]
    return value
