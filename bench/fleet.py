"""What more GPUs bring: python -m bench.fleet [--worlds 1 2 4] [--parts data target ...] [--rounds 5] [--tiny]

Every part does the same work with one GPU and with several of one host, in one call, and a row of
bench/results/fleet.jsonl says how often as fast several are. Models are random and of an 8B's or 70B's shape; nothing is
read from the disk. Parts:

  data      an online training step of 16 packs of 4096 tokens: target, draft, sharded optimizer; goal 1.97 and 3.9 times
  target    a 70B-shaped target, of which each GPU holds its share, over 16384 tokens a GPU; the ratio is to what one GPU's
            rate on 8 of its layers predicts for all of them; goal 0.85
  capture   the 8B target over one document of 131072 tokens, whose tokens the GPUs share; goal 3.4 of 4
  sequence  the draft's step over one document of 131072 tokens, all trained on, whose tokens the GPUs share; goal 3.6 of 4
  tensor    the draft's step over 8192 tokens, whose weights the GPUs share; goal 1.8 and 3.3

Of a part there are --rounds timed runs after one that warms up, or as many as --part-seconds allow, and at least one. One
more run of it is traced, unless it is of one GPU and long: a row `fleet/trace` of each process says where its GPU's time
went (bench/trace.py). `--no-trace` leaves that out.

Where a host's GPUs are to be used at once, several calls run side by side, each with GPUs of its own
(CUDA_VISIBLE_DEVICES), and share with `--notes` the folder in which the rates of one GPU are kept: the parts of one GPU
first, each on another, and then those of several.

`--tiny` runs the same code with tiny shapes on CPUs over gloo, to see that it runs; its rows are no measurement and go
where --out says. After --seconds no further part begins.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench.timing import RESULTS, append
from bench.trace import traced
from bench.work import SHAPES, live_batch, make_draft, make_head, make_work, random_target, target_config
from fastdraft.batch import Batch, PackShare, own_features
from fastdraft.config import Config, parse_config
from fastdraft.dist import mesh
from fastdraft.dist.shard import SharedAdamW
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.methods import method_of
from fastdraft.target.hf import Target
from fastdraft.target.sharded import shard_layers

GIB = 2**30
LONG_S = 5.0  # of a run of one GPU, which is not traced then


class Sizes(NamedTuple):
    draft: str  # of bench.work.SHAPES
    large: dict[str, int]  # a target's shape, of the part `target`
    layers: int  # of an 8B's target
    packs: int
    pack_tokens: int
    target_tokens: int  # a GPU, of the part `target`
    one_layers: int  # of the large target, those that one GPU runs
    document: int
    tensor_tokens: int
    rounds: int = 5
    chunk_rows: int | None = None  # of the draft's step; None: its own choice


FULL = Sizes(
    "llama-3.1-8b",
    {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    *(32, 16, 4096, 16384, 8, 131072, 8192),
)
TINY = Sizes(
    "tiny",
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 10, "num_attention_heads": 4},
    *(8, 4, 48, 32, 8, 96, 48),
)


class Work(NamedTuple):
    run: Callable[[], object]  # what is timed
    tokens: int  # over all processes
    scale: float = 1.0  # of the whole work, the part that `run` does
    finish: Callable[[], object] = lambda: None  # after the last run


# --- models --------------------------------------------------------------------------------------------------------------


def make_target(sizes: Sizes, device: torch.device, sequence: mesh.Axis | None = None) -> Target:
    """The 8B target, or the tiny one."""
    model = random_target(target_config(SHAPES[sizes.draft], sizes.layers), compute_dtype(device), device)
    return Target(model, sequence=sequence)


def random_large(sizes: Sizes, device: torch.device, layers: int, holders: mesh.Axis) -> Target:
    """The large target with so many layers, of which each of `holders` gets its rows."""
    config = target_config(SHAPES[sizes.draft], layers, **sizes.large | {"num_hidden_layers": layers})
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype(device)).eval().requires_grad_(False)
    if holders.size > 1:
        shard_layers(model.model, model.model.layers, holders, device)
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            own: Tensor = p.to_local() if hasattr(p, "to_local") else p
            own.fill_(1.0) if p.ndim == 1 else own.normal_(0.0, 0.02, generator=generator)
    return Target(model, holders=holders)


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def run_config(sizes: Sizes, device: torch.device) -> Config:
    tree = {"target": {"path": "random"}, "data": {"paths": ["random"]}, "chunk_rows": sizes.chunk_rows}
    tree["optim"] = {"optimizer": "adamw"}
    return parse_config(tree | {"precision": "bf16" if device.type == "cuda" else "fp32"}, Config)


# --- parts ---------------------------------------------------------------------------------------------------------------


def part_data(sizes: Sizes, device: torch.device) -> Work:
    mesh.lay_out()
    config, target, replicas = run_config(sizes, device), make_target(sizes, device), mesh.axis("replicas")
    draft = make_draft(SHAPES[sizes.draft], torch.float32, device)
    optimizer = SharedAdamW(draft.trainable(), config.optim, 1000, compute_dtype(device), replicas)
    draft.to(compute_dtype(device))
    engine = method_of(draft).build_step(config, draft, target.head, device)
    batches = [live_batch(draft.config, sizes.pack_tokens) for _ in range(sizes.packs // mesh.world())]

    def step() -> None:
        sums: Any = 0
        for batch in batches:
            features = target.capture(batch.to(device))
            optimizer.finish()
            sums = sums + engine.step(batch, features, optimizer.grads).sums()
        optimizer.start(sums)

    return Work(step, sizes.packs * sizes.pack_tokens, finish=optimizer.finish)


def part_target(sizes: Sizes, device: torch.device) -> Work:
    mesh.lay_out()
    whole = sizes.large["num_hidden_layers"]
    layers = whole if mesh.world() > 1 else sizes.one_layers
    target = random_large(sizes, device, layers, mesh.holders(mesh.world()))
    batch = live_batch(SHAPES[sizes.draft], sizes.target_tokens).to(device)
    return Work(lambda: target.capture(batch), sizes.target_tokens * mesh.world(), layers / whole, target.meet)


def part_capture(sizes: Sizes, device: torch.device) -> Work:
    mesh.lay_out(sequence=mesh.world())
    target = make_target(sizes, device, mesh.axis("sequence"))
    batch = live_batch(SHAPES[sizes.draft], sizes.document)
    run = (lambda: target.capture_share(batch, 7)) if mesh.world() > 1 else (lambda: target.capture(batch.to(device)))
    return Work(run, sizes.document)


def part_sequence(sizes: Sizes, device: torch.device) -> Work:
    mesh.lay_out(sequence=mesh.world())
    return draft_step(sizes, device, sizes.document)


def part_tensor(sizes: Sizes, device: torch.device) -> Work:
    mesh.lay_out(tensor=mesh.world())
    return draft_step(sizes, device, sizes.tensor_tokens)


def draft_step(sizes: Sizes, device: torch.device, tokens: int) -> Work:
    """One pack through the draft's step, forward and backward, by all processes together."""
    dtype, config = compute_dtype(device), run_config(sizes, device)
    tensor, sequence = mesh.axis("tensor"), mesh.axis("sequence")
    shape = SHAPES[sizes.draft]
    draft: nn.Module = make_draft(shape, dtype, device)
    method = method_of(draft)
    if tensor.size > 1:
        method.cut(draft, tensor.rank, tensor.size)
    groups = (tensor, sequence) if mesh.world() > 1 else ()
    engine = method.build_step(config, draft, make_head(shape, dtype, device), device, *groups)
    grads = flat_gradients(draft.trainable())
    work = make_work(shape, [live_batch(shape, tokens)], config.ttt_length, dtype, device)
    batch: Batch = work.batches[0]
    features = work.features.pop()
    if sequence.size > 1:
        features = own_features(features, PackShare(tokens, sequence.rank, sequence.size, config.ttt_length))
    return Work(lambda: engine.step(batch, features, grads), tokens)


PARTS: dict[str, Callable[[Sizes, torch.device], Work]] = {
    "data": part_data,
    "target": part_target,
    "capture": part_capture,
    "sequence": part_sequence,
    "tensor": part_tensor,
}


def timed(run: Callable[[], object], rounds: int, limit: float, device: torch.device) -> list[float]:
    """Seconds of the slowest process in each round after one that warms up. A round begins while they are below `limit`."""
    times: list[float] = []
    while len(times) <= rounds and (len(times) < 2 or sum(times[1:]) < limit):
        mesh.barrier()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(mesh.largest(int(1e6 * (time.perf_counter() - start))) / 1e6)
    return times[1:]


# --- processes -----------------------------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    """One of the processes of a world: all parts, one after the other, and on rank 0 their rows."""
    device = mesh.start_process("cpu" if args.tiny else "cuda")
    sizes = (TINY if args.tiny else FULL)._replace(rounds=args.rounds, chunk_rows=args.chunk_rows)
    for name in args.parts:
        if mesh.from_rank_0(time.time()) > args.until:
            break
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        work = PARTS[name](sizes, device)
        times = timed(work.run, sizes.rounds, args.part_seconds, device)
        seconds = statistics.median(times)
        peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
        peak = mesh.largest(int(1000 * peak)) / 1000
        if mesh.is_rank_0():
            write_row(name, work, times, peak, args)
        if args.trace and device.type == "cuda" and (mesh.world() > 1 or seconds < LONG_S):
            mesh.barrier()
            of_all = mesh.from_all(traced(work.run).rounded())
            for rank, summary in enumerate(of_all) if mesh.is_rank_0() else ():
                row = {"part": name, "gpus": mesh.world(), "rank": rank} | summary
                append("fleet/trace", row, args.commit, Path(args.out))
                print(json.dumps(row), flush=True)
        work.finish()
        del work
    mesh.end_process()


def write_row(name: str, work: Work, times: list[float], peak: float, args: argparse.Namespace) -> None:
    """One part's row, on rank 0."""
    seconds = statistics.median(times)
    one = Path(args.notes) / name  # what one GPU does in a second
    rate = work.tokens / seconds * work.scale  # tokens a second through the whole model
    row = {"part": name, "gpus": mesh.world(), "seconds": round(seconds, 6), "tokens_per_s": round(rate, 1)}
    row["rounds"] = len(times)
    row |= {} if args.chunk_rows is None else {"chunk_rows": args.chunk_rows}
    row["peak_gib"] = peak
    if mesh.world() == 1:
        one.write_text(repr(rate))
    elif one.exists():
        share = mesh.world() if name == "target" else 1  # of what so many GPUs would do by themselves
        row["ratio_to_one"] = round(rate / float(one.read_text()) / share, 4)
    append("fleet", row, args.commit, Path(args.out))
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="numbers of GPUs, one first")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on CPUs")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each part, after one that warms up")
    parser.add_argument("--part-seconds", type=float, default=60, help="no further round of a part begins after so long")
    parser.add_argument("--chunk-rows", type=int, help="of the draft's step, if not its default")
    parser.add_argument("--no-trace", dest="trace", action="store_false", help="no run of each part is traced")
    parser.add_argument("--seconds", type=float, default=500, help="after so long no further part begins")
    parser.add_argument("--commit", help="what to write in the rows where there is no git")
    parser.add_argument("--out", default=str(RESULTS), help="folder of fleet.jsonl")
    parser.add_argument("--notes", help="folder of the rates of one GPU, where several calls share it")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.until is not None:
        child(args)
        return
    if args.tiny and args.out == str(RESULTS):
        raise SystemExit("--tiny measures nothing: name a folder with --out")
    until = time.time() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        notes = args.notes or folder
        Path(notes).mkdir(parents=True, exist_ok=True)
        more = ["--notes", notes, "--until", str(until), "--out", args.out, "--parts", *args.parts]
        more += ["--rounds", str(args.rounds), "--part-seconds", str(args.part_seconds)]
        more += [] if args.chunk_rows is None else ["--chunk-rows", str(args.chunk_rows)]
        more += (
            ["--tiny"] * args.tiny + ["--no-trace"] * (not args.trace) + (["--commit", args.commit] if args.commit else [])
        )
        for world in args.worlds:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            subprocess.run([*launch, "-m", "bench.fleet", *more], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
