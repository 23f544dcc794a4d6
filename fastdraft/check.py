"""`fastdraft check`: what this machine can do, and golden cases on an engine."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import platform
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from safetensors import safe_open

from fastdraft.batch import Batch, Features, LossKind, TargetHead
from fastdraft.kernels import cuda
from fastdraft.kernels.dense_attention import MIN_KEYS, dense_attention_covers
from fastdraft.kernels.ttt_attention import ttt_attention_config
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.engine import ttt_engine_step
from fastdraft.model.eagle3.ref import ttt_ref_step
from fastdraft.model.method import GoldenCase, GoldenCases, StepKind
from fastdraft.model.methods import METHODS
from fastdraft.model.precision import pick_dtype, speed

TOLERANCE = 1e-5  # relative, in float64 and float32; the cases' own norms round through float32
DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
VERSIONS = ("fastdraft", "torch", "triton", "flash-attn-4", "transformers", "safetensors", "datasets")
VERSIONS += ("gguf", "wandb", "trackio", "mlflow")


def check_golden(folder: Path, step: str) -> list[tuple[str, str, float, float]]:  # case, quantity, its error, allowed
    """Every golden case of a folder on a kind of step: losses, acceptance, counts, and the worst of all gradients.

    A case's config names its method; one that names none is EAGLE-3's. In float64 on the CPU; the fused step in float32
    too, and where a GPU is, there in float32 and in bfloat16. Raises ValueError when there is no case or no such step.
    """
    if step not in get_args(StepKind):
        raise ValueError(f"step {step!r} is not one of {', '.join(get_args(StepKind))}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no golden cases (*.safetensors)")
    places = [("cpu", torch.float64)]
    if step == "fused":
        places += [("cpu", torch.float32)]
        if torch.cuda.is_available():
            places += [("cuda", torch.float32), ("cuda", torch.bfloat16)]
    found = []
    for file in files:
        golden = _golden_of(file)
        try:
            case = golden.load(file)
        except KeyError as error:
            raise ValueError(f"{file} is not a golden case: it has no {error}") from error
        for device, dtype in places:
            where = f"{case.name} {device} {DTYPES[dtype]}"
            if dtype == torch.bfloat16:
                errors, allowed = bf16_errors(golden, case, device, step)
            else:
                errors = golden.errors(case.inputs(device, dtype), step)
                allowed = dict.fromkeys(errors, TOLERANCE)
            worst = max((name for name in errors if name.startswith("grad ")), key=lambda n: errors[n] / allowed[n])
            shown = [name for name in errors if not name.startswith("grad ")] + [worst]
            found += [(where, name, errors[name], allowed[name]) for name in shown]
    return found


def _golden_of(file: Path) -> GoldenCases:
    """The cases of the method that a file names. What is no case at all is left to EAGLE-3's, which say so."""
    name = "eagle3"
    with suppress(Exception), safe_open(file, "pt") as opened:
        name = json.loads(opened.metadata()["config"]).get("method", name)
    method = METHODS.get(name)
    if method is None or method.golden is None:
        known = ", ".join(name for name, method in METHODS.items() if method.golden is not None)
        raise ValueError(f"{file} is a golden case of {name!r}; those of {known} can be run")
    return method.golden


def bf16_errors(
    golden: GoldenCases, case: GoldenCase, device: str, step: StepKind
) -> tuple[dict[str, float], dict[str, float]]:  # errors, allowed
    """The kernel rule on a whole step: off from the float64 reference of the rounded inputs by at most twice what the bf16
    reference is off, and one bf16 rounding."""
    rounded = case.inputs(device, torch.bfloat16)
    law = golden.law(rounded.inputs("cpu", torch.float64))
    plain = golden.errors(replace(rounded.inputs("cpu", torch.bfloat16), **law), "reference")
    return golden.errors(replace(rounded, **law), step), {name: 2 * error + 2**-8 for name, error in plain.items()}


PROVED = {  # shapes whose kernels are taken differently: head dims, groups, norms
    "head dim 64, group 3, EAGLE-3.1": dict(
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, fc_norm=True, norm_output=True
    ),
    "head dim 128, group 4": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=128),
}


def prove_kernels(
    device: str, tokens: int = 1024, hidden: int = 576, vocab: int = 16000
) -> list[tuple[str, str, float, float]]:  # shape, quantity, error, allowed
    """A bf16 step of the fused engine by the kernel rule: against the reference in float64 no more than twice as far off
    as the reference in bf16 and one rounding more. Packed documents, a patchy loss mask, several chunks, each loss kind;
    one long document where FlashAttention 4 does a part of it."""
    packed = (tokens // 2 + 3, 5, tokens - tokens // 2 - 8)
    cases = [(name, shape, packed, tokens // 3, get_args(LossKind)) for name, shape in PROVED.items()]
    if dense_attention_covers(128, torch.bfloat16, device):
        shape, long = dict(num_attention_heads=4, num_key_value_heads=1, head_dim=128), (MIN_KEYS + 2048,)
        cases.append(("head dim 128, group 4, FlashAttention 4", shape, long, 1024, ("kl",)))
    found = []
    for number, (name, shape, lengths, chunk_rows, kinds) in enumerate(cases):
        tokens = sum(lengths)
        generator = torch.Generator().manual_seed(number)
        normal = lambda *size, g=generator: torch.randn(*size, generator=g)  # noqa: E731
        config = DraftConfig(
            hidden_size=hidden,
            target_hidden_size=hidden,
            intermediate_size=2 * hidden,
            vocab_size=vocab,
            draft_vocab_size=vocab // 4,
            num_target_layers=8,
            layers=(1, 3, 4),
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 1e4},
            max_position_embeddings=max(4096, tokens),
            **shape,
        )
        draft = Draft(config)
        draft.init_weights(hidden**-0.5, generator)
        draft.embed_tokens.weight.data = normal(vocab, hidden)
        draft.set_vocab(torch.arange(0, vocab, 4)[: config.draft_vocab_size])
        draft = draft.to(device, torch.bfloat16)
        mask = torch.rand(tokens, generator=generator) < 0.7
        batch = Batch(torch.randint(vocab, (tokens,), generator=generator), mask, lengths)
        weight = normal(vocab, hidden).to(device, torch.bfloat16)
        chosen = 4 * torch.randint(config.draft_vocab_size, (tokens,), generator=generator)  # by far: no near-ties
        f = (weight[chosen.to(device)].float() / 24 + normal(tokens, hidden).to(device) / 24).bfloat16()
        features, head = Features(normal(tokens, 3 * hidden).to(device, torch.bfloat16), f), TargetHead(weight)
        weights = 0.8 ** torch.arange(5, dtype=torch.float32, device=device)
        exact = Features(features.g.double(), features.f.double()), TargetHead(weight.double()), weights.double()
        for kind in kinds:
            args = batch, features, head, weights, kind
            ours = ttt_engine_step(draft, *args, chunk_rows=chunk_rows)
            plain = ttt_ref_step(draft, batch.to(device), *args[1:])
            truth = ttt_ref_step(copy.deepcopy(draft).double(), batch.to(device), *exact, kind)
            same = float(not torch.equal(ours[0].live, truth[0].live))
            shown = [("live rows differ", same, 0.0)]
            pairs = {what: [getattr(rows, what) for rows, _ in (ours, plain, truth)] for what in ("loss", "acceptance")}
            pairs |= {f"grad {what}": [grads[what] for _, grads in (ours, plain, truth)] for what in truth[1]}
            errors = []
            for what, (got, rough, law) in pairs.items():
                scale = float(law.abs().max())
                error, allowed = (float((x.double() - law).abs().max()) / scale for x in (got, rough))
                errors.append((what, error, 2 * allowed + 2**-8))
            worst = max(errors[2:], key=lambda e: e[1] / e[2])
            found += [(f"{name}, {kind}", *row) for row in (*shown, *errors[:2], worst)]
    return found


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
    rows += [("Triton kernels", kernels()), ("CUDA kernels", cuda_kernels())]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cpu = torch.device("cpu")
    rows.append(("dtype auto on the CPU", f"{pick_dtype('auto', cpu)} on this machine, {speed(cpu)}"))
    return [*rows, ("training step", f"fused on {device}")]


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


def cuda_kernels() -> str:
    """Whether the CUDA C++ kernels are built and can run here, and why not."""
    if not cuda.LIBRARY.exists():
        return "not built (nvcc, a PyTorch for CUDA and pip install --no-build-isolation make them); nothing needs them"
    if not torch.cuda.is_available():
        return "built; cannot run without a CUDA GPU"
    try:
        usable = cuda.takes(torch.empty(1, device="cuda"))
    except ValueError as error:
        return f"cannot run: {error}"
    return "used for the rows of losses" if usable else "built, for Hopper and newer; Triton's are used"
