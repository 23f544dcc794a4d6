"""Times the whole draft step, forward, backward and optimizer: python -m bench.step --shape llama-3.1-8b --tokens 2048,8192

Each provider runs alone first: its first step, its memory, the kernels and host synchronisations of a warm step. Then all
that fit run interleaved. A sample is a burst of steps without a synchronisation between them, as in training, so launches
that the GPU waits for count. Rows go to bench/results/step.jsonl:

us_per_token, p20, p80   of the whole step; `model_us_per_token` is forward and backward alone
mfu, pct_of_gemm         `work.model_flops` a second, of forward and backward, over the GPU's dense bf16 peak (PEAK), and
                         over what an 8192^3 product reaches in the same process (`timing.roof`);
                         pct_of_sustained_gemm over what two seconds of them do (`timing.sustained_matrix_rate`)
tokens_per_s, useful_tokens_per_s   all tokens, and those whose step-0 row the loss mask trains on
memory                   bytes, disjoint: `weights_optimizer` (draft, frozen embedding, head as the provider keeps it,
                         masters, moments, gradient), `inputs` (g, f, ids of the largest pack), `per_token` (what the fused
                         engine holds for every token: the peak of a pack with one trained token, less that of 16 tokens),
                         `transient` (the peak above all these); `peak` is their sum; `transient_model` is without the
                         optimizer's step
first_step_s, first_step a provider's first step; "cold" in a fresh process with empty compile caches (--cold), "warm" in a
                         fresh process, "later" after another length in the same process
host_us_per_token        what the host takes to launch a step; where it is not below us_per_token the GPU waits
kernels, syncs           launched in a step by torch.profiler; `torch.cuda.set_sync_debug_mode` warnings (.item, nonzero, a
                         blocking copy), which know nothing of synchronize and cudaFree
csrc                     whether our engine ran with the CUDA C++ kernels (`fastdraft.kernels.cuda`)
loss_error               of a peer: largest relative difference of a TTT step's summed loss from ours at the same weights;
                         above AGREE the rows are written and the program fails

--precision bf16,fp8 runs our fused engine in each, as providers "fastdraft" and "fastdraft, fp8". FLOPs are then still
counted over the bf16 rates: mfu and pct_of_gemm of a row of dtype fp8 are shares of what bf16 could do.

Where flash-attn 4 is installed the fused engine's provider is "fastdraft, flash-attn": a row of its own, not the gate's.
A provider without the memory gets a row with `failed` and no times. On a CPU (--device cpu) there is nothing but times.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor

from bench.timing import RESULTS, append, roof, sustained_matrix_rate
from bench.work import CHATS, SHAPES, Work, chat_batches, live_batch, make_draft, make_head, make_work, model_flops
from fastdraft.batch import Batch, Features
from fastdraft.config import OptimConfig
from fastdraft.kernels import cuda, dense_attention
from fastdraft.model.eagle3.engine import TTTEngine
from fastdraft.model.eagle3.graph_engine import GraphEngine
from fastdraft.model.eagle3.ref import ReferenceEngine
from fastdraft.optim import FlatAdamW

PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}  # dense bf16, data sheets
BURST_S = 0.2  # steps of one sample run at least this long together
RATE = 250e12  # FLOPs a second, to guess beforehand how long a round will take
PROBE_S = 10.0  # above this guess kernels and synchronisations are not counted, and no round is for warming up
AGREE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
FLASH = ", flash-attn"
ONCE_S = 60.0  # above this guess the first step is the only one, and what is timed
TAIL = 8192  # tokens trained on of a long document: its memory is the whole document's, its time is not


class Ours:
    """An engine of the package with its optimizer. What a peer offers too: `model`, `update`, `losses`, `own_inputs`."""

    own_inputs = 0  # bytes of inputs in a layout of its own

    def __init__(self, work: Work, engine: str, chunk_rows: int | None, fp8: bool = False):
        self.work = work
        draft = make_draft(work.config, work.dtype, work.device)
        self.optimizer = FlatAdamW(draft.trainable(), OptimConfig(), 1000, work.dtype)
        made = {"fused": GraphEngine, "reference": ReferenceEngine}[engine]
        changes = {} if engine == "reference" else {"chunk_rows": chunk_rows, "fp8": fp8}
        self.engine = made(draft, make_head(work.config, work.dtype, work.device), work.step_weights, **changes)

    def model(self, k: int) -> None:
        """Forward and backward of pack k."""
        self.run(self.work.batches[k], self.work.features[k])

    def run(self, batch: Batch, features: Features) -> None:
        self.rows = self.engine.step(batch, features, self.optimizer.grads)

    def update(self) -> None:
        self.optimizer.step(self.rows.live[0].sum())

    def losses(self) -> Tensor:  # [T] sums over the last pack's live rows
        return self.rows.loss.sum(1)


class HostEvent:
    """A CUDA event's interface on a CPU."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.time - self.time) * 1e3


def synchronize(work: Work) -> None:
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


def peaks(provider, work: Work) -> tuple[int, int]:
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


def alone(make: Callable[[Work], object], work: Work, estimate_s: float, profile: bool) -> tuple[dict, Tensor]:
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
    if cuda and not isinstance(provider, Ours):  # torch's AdamW makes its moments in the first step
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
    own_inputs, fused = provider.own_inputs, isinstance(getattr(provider, "engine", None), TTTEngine)
    del provider
    per_token = per_token_bytes(make, work) if fused else 0
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


def per_token_bytes(make: Callable[[Work], Ours], work: Work) -> int:
    """Peak of the largest pack with one trained token, less that of its first 16 tokens."""
    k = max(range(len(work.batches)), key=lambda k: work.batches[k].num_tokens)
    batch, features, peaks = work.batches[k], work.features[k], []
    for n in (16, batch.num_tokens):
        free()
        provider = make(work)
        mask = torch.zeros(n, dtype=torch.bool)
        mask[-1] = True
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        provider.run(Batch(batch.input_ids[:n], mask, (n,)), Features(features.g[:n], features.f[:n]))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del provider
    return peaks[1] - peaks[0]


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
    providers: dict[str, object], work: Work, rounds: int, burst: int, warm_up: bool
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
    makes: dict[str, Callable[[Work], object]], work: Work, rows: dict[str, dict], args: argparse.Namespace, warm_up: bool
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


def peak_flops() -> float | None:
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in PEAK.items() if part in name), None)


def measure_work(makes: dict[str, Callable[[Work], object]], work: Work, args: argparse.Namespace, shape: dict) -> bool:
    """Runs every provider on the work and writes a row each. Whether all computed the same losses."""
    flops = sum(model_flops(work.config, batch, len(work.step_weights)) for batch in work.batches)
    estimate_s = flops / RATE
    rows, losses = {}, {}
    torch._dynamo.reset()  # a peer compiles for this length alone, as in a process of its own
    for name, make in makes.items():
        try:
            rows[name], losses[name] = alone(make, work, estimate_s, args.profile)
        except (RuntimeError, ValueError) as error:
            if not out_of_memory(error):
                raise
            rows[name] = {"failed": f"out of memory: {str(error).split('. ')[0]}"}
        free()
    running = {name: make for name, make in makes.items() if name in losses}
    if estimate_s > ONCE_S:
        samples = {name: [(1e6 * rows[name]["round_s"],) * 3] for name in running}
    elif running:
        samples = interleaved(running, work, rows, args, warm_up=estimate_s < PROBE_S)
    free()
    for name, row in rows.items():
        if name in losses:
            row |= rates(*zip(*samples[name], strict=True), work, flops)
        first = next(iter(makes))
        if name in losses and first in losses and name != first:
            ours, theirs = losses[first].double(), losses[name].double()
            row["loss_error"] = float(f"{((theirs - ours).abs() / ours.abs()).max():.2e}")
        row["first_step"] = args.first_step
        if name.startswith("fastdraft"):
            row["csrc"] = work.device.type == "cuda" and cuda.takes(work.step_weights)
        row.pop("round_s", None)
        dtype = "fp8" if name.endswith("fp8") else {torch.bfloat16: "bf16", torch.float32: "fp32"}[work.dtype]
        append("step", {"shape": shape, "dtype": dtype, "provider": name, **row}, args.commit, args.out)
        told = {k: v for k, v in row.items() if k not in ("interleaved_with", "memory")}
        memory = {k: f"{v / 2**30:.2f} GiB" for k, v in row.get("memory", {}).items()}
        print(shape, name, told, memory, flush=True)
    return all(row.get("loss_error", 0.0) <= AGREE[work.dtype] for row in rows.values())


def rates(model_us: Sequence[float], whole_us: Sequence[float], host_us: Sequence[float], work: Work, flops: int) -> dict:
    whole, model, n = sorted(whole_us), sorted(model_us), work.num_tokens
    at = lambda xs, share: xs[min(len(xs) - 1, int(len(xs) * share))]  # noqa: E731
    median, seconds = at(whole, 0.5), at(model, 0.5) / 1e6
    row = {
        "us_per_token": round(median / n, 3),
        "p20": round(at(whole, 0.2) / n, 3),
        "p80": round(at(whole, 0.8) / n, 3),
        "model_us_per_token": round(at(model, 0.5) / n, 3),
        "host_us_per_token": round(at(sorted(host_us), 0.5) / n, 3),
        "tokens_per_s": round(n / median * 1e6),
        "useful_tokens_per_s": round(work.num_trained / median * 1e6),
        "gflop_per_token": round(flops / n / 1e9, 3),
    }
    if work.device.type == "cuda":
        peak = peak_flops()
        row["mfu"] = round(flops / seconds / peak, 4) if peak else None
        row["pct_of_gemm"] = round(100 * flops / seconds / roof()[1], 1)
        row["pct_of_sustained_gemm"] = round(100 * flops / seconds / sustained_matrix_rate(), 1)
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default="2048,4096,8192", help="comma-separated packs' sizes")
    parser.add_argument("--pattern", default="live", help="comma-separated: live, chats, tail (the last 8192 tokens)")
    parser.add_argument("--chats", type=Path, default=CHATS, help="JSONL of [role, tokens] lists")
    parser.add_argument("--packs", type=int, default=4, help="of chats")
    parser.add_argument("--engine", default="fused", help="comma-separated: fused, reference; or none")
    parser.add_argument("--peer", choices=["specforge"])
    parser.add_argument("--specforge", type=Path, metavar="DIR", help="a checkout of SpecForge")
    parser.add_argument("--peer-batch", type=int, default=1, help="conversations the peer pads together, of chats")
    parser.add_argument("--peer-attention", default="flex_attention", help="flex_attention, sdpa, fa")
    parser.add_argument("--ttt", type=int, default=7)
    parser.add_argument("--chunk-rows", type=int, help="of the fused engine, if not its default")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--precision", default="bf16", help="comma-separated, of our engine with --dtype bf16: bf16, fp8")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0, help="to spend on the rounds of one length")
    parser.add_argument("--cold", action="store_true", help="empty compile caches, so that first_step_s is a new user's")
    parser.add_argument("--profile", action="store_true", help="print the kernels a step spends its time in")
    parser.add_argument("--commit", help="what to write in the rows where there is no git")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args(argv)
    if args.peer and not args.specforge:
        parser.error("--peer specforge needs --specforge DIR, a checkout of SpecForge")
    if args.cold:
        for cache in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"):
            os.environ[cache] = tempfile.mkdtemp()
    args.first_step = "cold" if args.cold else "warm"
    device, dtype = torch.device(args.device), {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]

    engines: dict[str, Callable[[Work], object]] = {}
    for engine in args.engine.split(","):
        if engine != "none":
            name = {"fused": "fastdraft" + FLASH * dense_attention.installed(), "reference": "reference"}[engine]
            engines[name] = lambda work, engine=engine: Ours(work, engine, args.chunk_rows)
    if "bf16" not in args.precision.split(","):
        engines.pop("fastdraft" + FLASH * dense_attention.installed(), None)
    if "fp8" in args.precision.split(","):
        engines["fastdraft, fp8"] = lambda work: Ours(work, "fused", args.chunk_rows, fp8=True)
    if args.peer:
        from bench.peers.specforge import SpecForge

        specforge = lambda work: SpecForge(work, args.specforge, args.peer_attention, args.peer_batch)  # noqa: E731
    agree = True
    for shape_name in args.shape.split(","):
        config = SHAPES[shape_name]
        for pattern in args.pattern.split(","):
            for tokens in map(int, args.tokens.split(",")):
                if pattern == "chats":
                    batches = chat_batches(config, tokens, args.chats, args.packs)
                else:
                    batches = [live_batch(config, tokens, TAIL if pattern == "tail" else None)]
                shape = {"model": shape_name, "tokens": tokens, "pattern": pattern, "T": args.ttt}
                makes = dict(engines)
                if args.peer:
                    makes["specforge" + (f", {args.peer_batch} a batch" if pattern == "chats" else "")] = specforge
                if args.chunk_rows:
                    shape["chunk_rows"] = args.chunk_rows
                agree &= measure_work(makes, make_work(config, batches, args.ttt, dtype, device), args, shape)
                args.first_step = "later"
                free()
    if not agree:
        sys.exit("the providers' losses differ by more than rounding (loss_error): they did not do the same work")


if __name__ == "__main__":
    main()
