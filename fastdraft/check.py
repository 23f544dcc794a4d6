"""`fastdraft check`: what this machine can do, and golden cases on an engine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import replace
from pathlib import Path

import torch

from fastdraft.golden import Golden, RunStep, load_golden, worst_errors
from fastdraft.kernels.ttt_attention import ttt_attention_config
from fastdraft.model.ttt import ttt_engine_step
from fastdraft.model.ttt_ref import ttt_ref_step
from fastdraft.train import engine_kind

ENGINES: dict[str, RunStep] = {"reference": ttt_ref_step, "fused": ttt_engine_step}
TOLERANCE = 1e-5  # relative, in float64 and float32; the cases' own norms round through float32
DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
VERSIONS = ("fastdraft", "torch", "triton", "transformers", "safetensors", "datasets", "gguf", "wandb", "trackio", "mlflow")


def check_golden(folder: Path, engine: str) -> list[tuple[str, str, float, float]]:  # case, quantity, its error, allowed
    """Every golden case of a folder on an engine: step losses, acceptance, counts, and the worst of all gradients.

    In float64 on the CPU; the fused engine in float32 too, and where a GPU is, there in float32 and in bfloat16. Raises
    ValueError when there is no case or no such engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not one of {', '.join(ENGINES)}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no golden cases (*.safetensors)")
    places = [("cpu", torch.float64)]
    if engine == "fused":
        places += [("cpu", torch.float32)]
        if torch.cuda.is_available():
            places += [("cuda", torch.float32), ("cuda", torch.bfloat16)]
    found = []
    for file in files:
        try:
            case = load_golden(file)
        except KeyError as error:
            raise ValueError(f"{file} is not a golden case: it has no {error}") from error
        for device, dtype in places:
            if dtype == torch.bfloat16:
                errors, allowed = bf16_errors(case, device, ENGINES[engine])
            else:
                errors = worst_errors(case.inputs(device, dtype), ENGINES[engine])
                allowed = dict.fromkeys(errors, TOLERANCE)
            worst = max((name for name in errors if name.startswith("grad ")), key=lambda n: errors[n] / allowed[n])
            shown = [name for name in errors if not name.startswith("grad ")] + [worst]
            found += [(f"{case.name} {device} {DTYPES[dtype]}", name, errors[name], allowed[name]) for name in shown]
    return found


def bf16_errors(
    case: Golden, device: str, run_step: RunStep
) -> tuple[dict[str, float], dict[str, float]]:  # errors, allowed
    """The kernel rule on a whole step: off from the float64 reference of the rounded inputs by at most twice what the bf16
    reference is off, and one bf16 rounding."""
    rounded = case.inputs(device, torch.bfloat16)
    exact = rounded.inputs("cpu", torch.float64)
    rows, grads = ttt_ref_step(exact.draft, exact.batch, exact.features, exact.head, exact.step_weights, case.kind)
    loss, acceptance, hits, live, masked_in = rows.sums()
    law = dict(step_loss=loss, acceptance=acceptance / live, hits=hits, masked_in=masked_in, grads=grads)
    rounded = replace(rounded, **law)
    plain = worst_errors(replace(rounded.inputs("cpu", torch.bfloat16), **law), ttt_ref_step)
    return worst_errors(rounded, run_step), {name: 2 * error + 2**-8 for name, error in plain.items()}


def environment() -> list[tuple[str, str]]:
    """What is here and what training would use of it, as (name, value) rows."""
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
    rows.append(("Triton kernels", kernels()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [*rows, ("training engine", f"{engine_kind('auto')} on {device} (engine: auto)")]


def kernels() -> str:
    """Whether the Triton kernels can run here, and why not."""
    if not torch.cuda.is_available():
        return "cannot run without a CUDA GPU; plain PyTorch computes the same"
    if importlib.util.find_spec("triton") is None:
        return "cannot run: Triton is not installed (pip install triton)"
    try:
        ttt_attention_config(128, 4, torch.bfloat16, torch.cuda.get_device_capability())
    except ValueError as error:
        return f"cannot run: {error}"
    return "can run"
