"""What a whole step is measured with, whichever method's: some providers on the same work, alone and interleaved.

A work has `batches`, `features`, `dtype`, `device`, `input_bytes`, `flops` of a round, `unit` (the name and number of what
times are divided by) and `rates` (what a row says besides). A provider has `model(k)` (forward and backward of pack k),
`update()` (the optimizer's step), `losses()` (what providers of the same work must agree in), `own_inputs` (bytes of inputs
in a layout of its own), `late_moments` (whether its optimizer makes its moments in the first step) and `per_token_bytes`
(None, or a function of its maker and the work: bytes that it keeps for every token of a pack, whatever is trained on).
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor

from bench.timing import RESULTS, append, roof, sustained_matrix_rate
from bench.work import CHATS
from fastdraft.cost import peak_flops

BURST_S = 0.2  # steps of one sample run at least this long together
RATE = 250e12  # FLOPs a second, to guess beforehand how long a round will take
PROBE_S = 10.0  # above this guess kernels and synchronisations are not counted, and no round is for warming up
AGREE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
MEMORY = "out of memory"
ONCE_S = 60.0  # above this guess the first step is the only one, and what is timed

Make = Callable[[object], object]  # of a work, a provider


class HostEvent:
    """A CUDA event's interface on a CPU."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.time - self.time) * 1e3


def synchronize(work) -> None:
    if work.device.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- one provider alone --------------------------------------------------------------------------------------------------


def out_of_memory(error: Exception) -> bool:
    """PyTorch's, cuBLAS's, or the engine's, which sees it before the step."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(x in str(error) for x in ("ALLOC_FAILED", "GiB of cuda"))


def peaks(provider, work) -> tuple[int, int]:
    """Largest allocated bytes during `model`, and during `update`."""
    model = update = 0
    for k in range(len(work.batches)):
        torch.cuda.reset_peak_memory_stats()
        provider.model(k)
        model = max(model, torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        provider.update()
        update = max(update, torch.cuda.max_memory_allocated())
    torch.cuda.synchronize()
    return model, update


def alone(make: Make, work, estimate_s: float, profile: bool) -> tuple[dict, Tensor]:
    """What a row says beside its times, `round_s` among it; and the first pack's losses at the first weights."""
    cuda = work.device.type == "cuda"
    free()
    before = torch.cuda.memory_allocated() if cuda else 0
    provider = make(work)
    synchronize(work)
    built = torch.cuda.memory_allocated() - before - provider.own_inputs if cuda else 0
    start = time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    provider.model(0)
    losses = provider.losses().clone()
    provider.update()
    synchronize(work)
    first_s = time.perf_counter() - start
    if cuda and provider.late_moments:
        built = torch.cuda.memory_allocated() - before - provider.own_inputs
    if not cuda:
        return {"round_s": first_s * len(work.batches)}, losses
    if estimate_s > ONCE_S:
        round_s, model = first_s, torch.cuda.max_memory_allocated()
        update = model
    else:
        for _ in range(2 if estimate_s < PROBE_S else 1):  # the first round may compile for other lengths
            start = time.perf_counter()
            model, update = peaks(provider, work)
            round_s = time.perf_counter() - start
    counts = {"kernels": None, "syncs": None}
    if estimate_s < PROBE_S:
        counts = {"kernels": count_kernels(provider, profile), "syncs": count_syncs(provider)}
    own_inputs, kept = provider.own_inputs, provider.per_token_bytes
    del provider
    per_token = kept(make, work) if kept else 0
    fixed = before + own_inputs + built + per_token
    memory = {
        "weights_optimizer": built,
        "inputs": work.input_bytes,
        "per_token": per_token,
        "transient": max(model, update) - fixed,
        "transient_model": model - fixed,
    }
    memory["peak"] = sum(memory.values()) - memory["transient_model"]
    return {"first_step_s": round(first_s, 2), "round_s": round_s, "memory": memory, **counts}, losses


def count_kernels(provider, show: bool) -> int:
    """Kernels, not copies, of one pack's step; `show` prints where the time goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        provider.model(0)
        provider.update()
        torch.cuda.synchronize()
    if show:
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=70))
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)


def count_syncs(provider) -> int:
    """Of one pack's step."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            provider.model(0)
            provider.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


# --- all providers together ----------------------------------------------------------------------------------------------


def times(
    providers: dict[str, object], work, rounds: int, burst: int, warm_up: bool
) -> dict[str, list[tuple[float, float, float]]]:  # by name: microseconds of model, of both, and until all was launched;
    # a round of all packs each
    event = HostEvent if work.device.type == "cpu" else lambda: torch.cuda.Event(enable_timing=True)
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in providers}
    for r in range(-warm_up, rounds):
        for name, provider in providers.items():
            synchronize(work)
            start = time.perf_counter()
            marks = [event()]
            marks[0].record()
            for _ in range(burst):
                for k in range(len(work.batches)):
                    for part in (lambda p=provider, k=k: p.model(k), provider.update):
                        part()
                        marks.append(event())
                        marks[-1].record()
            host_s = time.perf_counter() - start
            synchronize(work)
            model_ms = sum(a.elapsed_time(b) for a, b in zip(marks[0::2], marks[1::2], strict=False))
            if r >= 0:
                samples[name].append(
                    (1e3 * model_ms / burst, 1e3 * marks[0].elapsed_time(marks[-1]) / burst, 1e6 * host_s / burst)
                )
    return samples


def interleaved(
    makes: dict[str, Make], work, rows: dict[str, dict], args: argparse.Namespace, warm_up: bool
) -> dict[str, list[tuple[float, float, float]]]:
    """Samples of all providers together, or, where they do not fit together, of one after the other."""
    try:
        providers = {name: make(work) for name, make in makes.items()}
        round_s = [rows[name]["round_s"] for name in makes]
        burst = max(1, round(BURST_S / max(round_s)))
        rounds = int(min(args.rounds, max(1, args.seconds / (burst * sum(round_s)))))
        samples = times(providers, work, rounds, burst, warm_up)
        for name in makes:
            rows[name] |= {"rounds": rounds, "interleaved_with": [other for other in makes if other != name]}
        return samples
    except (RuntimeError, ValueError) as error:
        if not out_of_memory(error) or len(makes) == 1:
            raise
    providers = None
    free()
    return {name: interleaved({name: make}, work, rows, args, warm_up)[name] for name, make in makes.items()}


def measure_work(
    op: str,  # what the rows are of
    makes: dict[str, Make],  # by provider's name; ours begins with "fastdraft"
    work,
    args: argparse.Namespace,
    shape: dict,
    about_ours: dict,  # what a row of ours says besides
) -> bool:
    """Runs every provider on the work and writes a row each. Whether all that the memory sufficed for computed the same
    losses."""
    estimate_s = work.flops / RATE
    rows, losses = {}, {}
    torch._dynamo.reset()  # a peer compiles for this length alone, as in a process of its own
    for name, make in makes.items():
        try:
            rows[name], losses[name] = alone(make, work, estimate_s, args.profile)
        except Exception as error:  # a peer may raise anything, and the others' rows are worth having
            if not out_of_memory(error) and name.startswith(("fastdraft", "reference")):
                raise
            what = MEMORY if out_of_memory(error) else type(error).__name__
            if what != MEMORY:
                traceback.print_exc()
            rows[name] = {"failed": f"{what}: {str(error).split('. ')[0][:300]}"}
        free()
    running = {name: make for name, make in makes.items() if name in losses}
    if estimate_s > ONCE_S:
        samples = {name: [(1e6 * rows[name]["round_s"],) * 3] for name in running}
    elif running:
        samples = interleaved(running, work, rows, args, warm_up=estimate_s < PROBE_S)
    free()
    for name, row in rows.items():
        if name in losses:
            row |= rates(*zip(*samples[name], strict=True), work)
        first = next(iter(makes))
        if name in losses and first in losses and name != first:
            ours, theirs = losses[first].double(), losses[name].double()
            row["loss_error"] = float(f"{((theirs - ours).abs() / ours.abs()).max():.2e}")
        row["first_step"] = args.first_step
        if name.startswith("fastdraft"):
            row |= about_ours
        row.pop("round_s", None)
        dtype = "fp8" if name.endswith("fp8") else {torch.bfloat16: "bf16", torch.float32: "fp32"}[work.dtype]
        append(op, {"shape": shape, "dtype": dtype, "provider": name, **row}, args.commit, args.out)
        told = {k: v for k, v in row.items() if k not in ("interleaved_with", "memory")}
        memory = {k: f"{v / 2**30:.2f} GiB" for k, v in row.get("memory", {}).items()}
        print(shape, name, told, memory, flush=True)
    return all(
        row.get("loss_error", 0.0) <= AGREE[work.dtype] and row.get("failed", MEMORY).startswith(MEMORY)
        for row in rows.values()
    )


def rates(model_us: Sequence[float], whole_us: Sequence[float], host_us: Sequence[float], work) -> dict:
    """Times of a round by the work's unit, and what share of the GPU they are."""
    whole, model = sorted(whole_us), sorted(model_us)
    unit, n = work.unit
    at = lambda xs, share: xs[min(len(xs) - 1, int(len(xs) * share))]  # noqa: E731
    median, seconds = at(whole, 0.5), at(model, 0.5) / 1e6
    row = {
        f"us_per_{unit}": round(median / n, 3),
        "p20": round(at(whole, 0.2) / n, 3),
        "p80": round(at(whole, 0.8) / n, 3),
        f"model_us_per_{unit}": round(at(model, 0.5) / n, 3),
        f"host_us_per_{unit}": round(at(sorted(host_us), 0.5) / n, 3),
        **work.rates(median, at(model, 0.5)),
        f"gflop_per_{unit}": round(work.flops / n / 1e9, 3),
    }
    if work.device.type == "cuda":
        peak = peak_flops(work.device)
        row["mfu"] = round(work.flops / seconds / peak, 4) if peak else None
        row["pct_of_gemm"] = round(100 * work.flops / seconds / roof()[1], 1)
        row["pct_of_sustained_gemm"] = round(100 * work.flops / seconds / sustained_matrix_rate(), 1)
    return row


def arguments(description: str | None, op: str) -> argparse.ArgumentParser:
    """What every benchmark of a step is asked on the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="2048,4096,8192", help="comma-separated packs' sizes")
    parser.add_argument("--chats", type=Path, default=CHATS, help="JSONL of [role, tokens] lists")
    parser.add_argument("--packs", type=int, default=4, help="of chats")
    parser.add_argument("--specforge", type=Path, metavar="DIR", help="a checkout of SpecForge")
    parser.add_argument("--peer-batch", type=int, default=1, help="conversations SpecForge pads together, of chats")
    parser.add_argument("--peer-attention", default="flex_attention", help="SpecForge's: flex_attention, sdpa, fa")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0, help="to spend on the rounds of one length")
    parser.add_argument("--cold", action="store_true", help="empty compile caches, so that first_step_s is a new user's")
    parser.add_argument("--profile", action="store_true", help="print the kernels a step spends its time in")
    parser.add_argument("--commit", help="what to write in the rows where there is no git")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {op}.jsonl")
    return parser


def begin(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Empties compile caches where --cold asks for it. Call it before anything is compiled."""
    if args.cold:
        for cache in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"):
            os.environ[cache] = tempfile.mkdtemp()
    args.first_step = "cold" if args.cold else "warm"
    return torch.device(args.device), {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]


def end(agree: bool) -> None:
    if not agree:
        sys.exit(
            "a peer failed (its traceback is above), or the providers' losses differ by more than rounding (loss_error): "
            "then they did not do the same work"
        )
