"""`fastdraft check`: what this machine can do, golden cases on an engine, a serving checkpoint against its target."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from fastdraft.golden import RunStep, load_golden, worst_errors
from fastdraft.model.ttt import ttt_engine_step
from fastdraft.model.ttt_ref import ttt_ref_step

ENGINES: dict[str, RunStep] = {"reference": ttt_ref_step, "fused": ttt_engine_step}
TOLERANCE = 1e-5  # relative, in float64: the cases' norms and softmax round through float32
VERSIONS = ("fastdraft", "torch", "triton", "transformers", "safetensors", "datasets", "gguf", "wandb", "trackio", "mlflow")


def check_golden(folder: Path, engine: str) -> list[tuple[str, str, float, bool]]:  # case, worst quantity, error, good
    """Every golden case of a folder on an engine. Raises ValueError when there is none or no such engine."""
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not one of {', '.join(ENGINES)}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no golden cases (*.safetensors)")
    found = []
    for file in files:
        case = load_golden(file)
        errors = worst_errors(case, ENGINES[engine])
        worst = max(errors, key=errors.__getitem__)
        found.append((case.name, worst, errors[worst], errors[worst] <= TOLERANCE))
    return found


def environment() -> list[tuple[str, str]]:
    """What is here, as (name, value) rows."""
    rows = [("python", platform.python_version()), ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    for name in VERSIONS:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            memory = f"{p.total_memory / 2**30:.0f} GiB"
            rows.append((f"gpu {index}", f"{p.name}, {memory}, compute capability {p.major}.{p.minor}"))
    else:
        rows.append(("gpu", "none that PyTorch sees; everything runs on the CPU"))
    return rows
