"""What the feature store costs and gives: python -m bench.features --target DIR --data FILE.jsonl [--steps 160]

Appends rows to bench/results/features.jsonl:

  features/capture   tokens/s of a capture of several shards, the last one's way to the disk included, and of the target's
                     bare forward over the same runs of documents (nothing kept), before and after it; bytes a token
  features/read      GB/s of `StoreReader.read` over shuffled packs, shards in memory and not, beside plain reads of them
  features/fp8       held-out tau_sim of drafts trained alike from the store, the fp8 store, and with --online none

The data should be the target's own answers (`fastdraft data regenerate`); --steps 0 leaves the training out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.timing import RESULTS, append
from fastdraft.config import Config, parse_config
from fastdraft.data.loader import Loader
from fastdraft.dist.mesh import start_process
from fastdraft.features.store import Store, list_shards
from fastdraft.metrics import read_metrics
from fastdraft.run.draft import draft_shape
from fastdraft.run.inputs import load_data, open_target, run_meta
from fastdraft.target.capture import Pack, plan_capture, run_capture
from fastdraft.target.hf import Target
from fastdraft.target.identity import begin_store, target_fingerprint
from fastdraft.target.packed import Documents, packed
from fastdraft.target.source import InProcess
from fastdraft.target.stored import StoreReader
from fastdraft.train import train

Write = Callable[[str, dict], None]  # op, row
WARM = 3  # shards before those timed: the writer holds memory for so many, and pins it once


def settle(device: torch.device) -> float:
    """Seconds, once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def bare_forward(target: Target, packs: tuple[Pack, ...]) -> float:
    """Seconds of the decoder alone over packs, run as capture runs them."""
    start = settle(target.device)
    for pack in packs:
        for ids, lengths in target.packed_runs(pack.read()):
            documents = Documents.of(lengths, target.device)
            with packed(target.decoder.config, documents):
                target.decoder(input_ids=ids[None], position_ids=documents.position[None], use_cache=False)
    return settle(target.device) - start


def bench_capture(
    config: Config, target: Target, folders: dict[str, Path], shard_tokens: int, timed: int, write: Write
) -> None:
    """WARM shards, then `timed` in one go until the last is on the disk, between two bare forwards of their packs."""
    if target.apart is not None:
        raise ValueError(f"only targets whose documents run packed are timed: {target.apart}")
    data = load_data(config, draft_shape(config))
    wanted = run_meta(config, target.layers)
    for dtype, folder in folders.items():
        named = replace(wanted, dtype=wanted.target_dtype if dtype == "auto" else dtype)
        size = shard_tokens * sum(named.row_bytes.values())
        plan = plan_capture(data.train, data.eval, config.data.pack_tokens, config.data.seed, named, size)
        meta = begin_store(folder, named, target, target_fingerprint(target), data=plan.data, shards=len(plan.shards))
        packs = tuple(pack for shard in plan.shards[WARM : WARM + timed] for pack in shard)
        if not packs:
            raise ValueError(f"{len(plan.shards)} shards of {shard_tokens} tokens: more than {WARM} are needed to time one")
        source = InProcess(target)
        run_capture(source, replace(plan, shards=plan.shards[:WARM]), folder, meta)
        bare = [bare_forward(target, packs)]
        start = settle(target.device)
        run_capture(source, replace(plan, shards=plan.shards[: WARM + timed]), folder, meta)
        mine = settle(target.device) - start
        bare.append(bare_forward(target, packs))
        run_capture(source, plan, folder, meta)
        tokens = sum(pack.num_tokens for pack in packs)
        written = sum(plan.shard_bytes[WARM : WARM + timed])
        row = {
            "target": Path(config.target.path).name,
            "target_parameters": sum(p.numel() for p in target.model.parameters()),
            "dtype": meta.dtype,
            "tokens": plan.tokens,
            "trained_tokens": plan.trained,
            "timed_tokens": tokens,
            "tokens_per_s": round(tokens / mine, 1),
            "bare_tokens_per_s": round(2 * tokens / sum(bare), 1),
            "share_of_bare": round(sum(bare) / 2 / mine, 4),
            "share_of_each_bare": [round(seconds / mine, 4) for seconds in bare],
            "written_gb_per_s": round(written / mine / 1e9, 3),
            "bytes_per_token": round(sum(p.stat().st_size for p in list_shards(folder)) / plan.tokens, 1),
            "bytes_per_token_all_rows": sum(meta.row_bytes.values()),
        }
        write("features/capture", row)


def forget(folder: Path) -> None:
    """Takes the shards out of the system's file cache."""
    for path in list_shards(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_read(config: Config, device: torch.device, folder: Path, rounds: int, write: Write) -> None:
    data = load_data(config, draft_shape(config))
    loader = Loader(data.train, config.data.pack_tokens, 1, seed=7)
    batches = [next(loader)[0] for _ in range(min(64, loader.num_packs))]
    rates: dict[str, list[float]] = {"cold": [], "warm": [], "disk": [], "memory": []}
    for _ in range(rounds):
        for state in ("cold", "warm"):
            if state == "cold":
                forget(folder)
            reader, size = StoreReader(Store(folder), device), 0
            start = settle(device)
            for batch in batches:
                read = reader.read(batch)
                size += sum(x.numel() * x.element_size() for x in (read.features.g, read.features.f))
            rates[state].append(size / (settle(device) - start) / 1e9)
        for state in ("disk", "memory"):
            if state == "disk":
                forget(folder)
            size, into = 0, bytearray(1 << 24)
            start = time.perf_counter()
            for path in list_shards(folder):
                with path.open("rb", buffering=0) as file:
                    while count := file.readinto(into):
                        size += count
            rates[state].append(size / (time.perf_counter() - start) / 1e9)
    row = {"dtype": Store(folder).meta.dtype, "packs": len(batches)}
    write("features/read", row | {f"{name}_gb_per_s": round(statistics.median(x), 2) for name, x in rates.items()})


def bench_fp8(config: Config, folders: dict[str, Path], seeds: int, online: bool, write: Write) -> None:
    """Drafts that differ in where their features come from."""
    for source in (["online"] if online else []) + list(folders):
        taus, losses = [], []
        for seed in range(seeds):
            changes = {"seed": seed, "run_dir": f"{config.run_dir}/{source}-{seed}"}
            if source != "online":
                changes["features"] = config.features.model_copy(update={"path": str(folders[source])})
            train(config.model_copy(update=changes), fresh=True)
            last = [record for record in read_metrics(changes["run_dir"]) if "eval/tau_sim" in record][-1]
            taus.append(round(last["eval/tau_sim"], 4))
            losses.append(round(last["eval/loss"], 4))
        named = {"auto": run_meta(config, draft_shape(config).layers).dtype}.get(source, source)
        write("features/fp8", {"features": named, "steps": config.max_steps, "tau_sim": taus, "eval_loss": losses})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="directory of the target")
    parser.add_argument("--data", required=True, help="JSONL of its answers")
    parser.add_argument("--shard-tokens", type=int, default=4096, help="tokens of a shard")
    parser.add_argument("--timed-shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of reading")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of each training; 0 for none")
    parser.add_argument("--online", action="store_true", help="train one draft without a store, too")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pack-tokens", type=int, default=512)
    parser.add_argument("--folder", help="where stores and runs go; default: a temporary one")
    parser.add_argument("--commit", help="for machines without git")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()

    def write(op: str, row: dict) -> None:
        print(op, row, flush=True)
        append(op, row, asked.commit, asked.results)

    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        config = parse_config(
            {
                "target": {"path": asked.target, "dtype": "bf16"},
                "draft": {"overrides": {"draft_vocab_size": 8192}},
                "data": {
                    "paths": [asked.data],
                    "max_length": asked.pack_tokens,
                    "pack_tokens": asked.pack_tokens,
                    "eval_fraction": 0.1,
                    "cache_dir": f"{folder}/tokens",
                    "num_workers": 0,
                },
                "ttt_length": 3,
                "max_steps": max(asked.steps, 1),
                "precision": "bf16",
                "optim": {"optimizer": "adamw", "lr": 2e-3, "warmup_ratio": 0.05, "packs_per_step": 1},
                "eval": {"every": 10**6},
                "checkpoint": {"every": 10**6, "keep": 1},
                "metrics": {"tensorboard": False, "log_every": 20},
                "run_dir": f"{folder}/runs",
            },
            Config,
        )
        device = start_process(config.device)
        folders = {dtype: Path(folder) / dtype for dtype in ("auto", "fp8")}
        target = open_target(config, draft_shape(config).layers, device)
        bench_capture(config, target, folders, asked.shard_tokens, asked.timed_shards, write)
        del target
        for store in folders.values():
            bench_read(config, device, store, asked.rounds, write)
        if asked.steps:
            bench_fp8(config, folders, asked.seeds, asked.online, write)


if __name__ == "__main__":
    main()
