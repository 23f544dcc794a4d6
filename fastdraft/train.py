"""The training loop: packs of documents -> the target's features -> a TTT step -> one optimizer step, read top to bottom.

One process per GPU, started alone or under torchrun. The global batch of an optimizer step is optim.packs_per_step packs
whatever the number of processes; each adds un-normalised gradient sums, and the optimizer divides once by the global
number of live step-0 rows.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
import yaml
from datasets import Dataset
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from fastdraft import checkpoint
from fastdraft.batch import Batch, Features, tau_sim
from fastdraft.config import Config, read_yaml
from fastdraft.cost import GIB, free_disk, pair_cost, plan, render
from fastdraft.data.loader import Ahead, Loader, eval_batches
from fastdraft.data.prepare import Prepared, prepare
from fastdraft.data.prompts import prompt_ids, read_prompts
from fastdraft.data.stream import open_stream
from fastdraft.data.vocab import build_vocab_map, coverage, token_counts
from fastdraft.decode import DecodeSettings
from fastdraft.evaluate import DecodeReport, TauReport, evaluate_decode, evaluate_tau
from fastdraft.export import export_draft, load_draft, verify
from fastdraft.features.memory import FeatureCache
from fastdraft.features.meta import COMPARED, Meta, capture_meta, expected_meta, refuse_other, start_store, target_ends
from fastdraft.features.read import StoreCache, StoredTarget, StoreReader, check_documents, stored_target
from fastdraft.features.specforge import read_vocab_mapping
from fastdraft.features.store import Store
from fastdraft.metrics import Metrics
from fastdraft.model.config import DraftConfig, language_config, read_target_config
from fastdraft.model.draft import Draft
from fastdraft.model.ttt import TTTEngine
from fastdraft.model.ttt_ref import ReferenceEngine
from fastdraft.optim import FlatAdamW
from fastdraft.target.hf import (
    Target,
    count_target_parameters,
    load_target,
    load_target_config,
    load_tokenizer,
    target_fingerprint,
)

# settings, or sections, that may differ between a run and its continuation: they do not change the result, or (the target's
# path) what they name is compared itself
FREE_ON_RESUME = (
    *("checkpoint", "metrics", "eval", "device", "run_dir", "target.path", "data.cache_dir", "data.num_workers"),
    *("features.on_bad_shard", "features.max_gib"),
)


@dataclass(frozen=True)
class TrainResult:
    run_dir: Path
    steps: int
    stopped_by: int | None  # the signal that ended the run early


def train(config: Config, fresh: bool = False) -> TrainResult:
    """Runs to the last step, going on from the run folder's newest checkpoint unless `fresh`."""
    device, rank, world = start_process(config.device)
    dtype = compute_dtype(config, device)
    run_dir = Path(config.run_dir)
    torch.manual_seed(config.seed)

    draft = new_draft(config)
    data = load_data(config, draft.config.vocab_size)
    train_set, eval_set = data.train, data.eval
    pairs = pair_cost(draft.config, target_parameters(config), config.ttt_length)
    loader = Loader(
        data.stream or train_set, config.data.pack_tokens, config.optim.packs_per_step, config.data.seed, rank, world, pairs
    )
    total_steps = config.max_steps or config.epochs * loader.steps_per_epoch
    target, reader, heard = open_features(config, draft.config.layers, device, [train_set, eval_set])
    known = [*data.lines(), *loader.lines(), *heard, *fit_to_target(draft, config, target, train_set)]
    draft.to(device)
    optimizer = FlatAdamW(draft.trainable(), config.optim, total_steps, dtype)
    draft.embed_tokens.to(dtype)
    fingerprint = target.fingerprint if isinstance(target, StoredTarget) else target_fingerprint(target)
    window = {  # since the last line of metrics
        "sums": torch.zeros(5, config.ttt_length, dtype=torch.float64, device=device),
        "skipped_steps": torch.zeros((), dtype=torch.int64, device=device),
    }
    first_step, told = resume(config, fresh, fingerprint, draft, optimizer, loader, window)
    if first_step >= total_steps:
        told.append(f"all {total_steps} steps are done already; --fresh trains anew")
    engine = build_engine(config, draft, target)
    cache = FeatureCache(target, config.features.memory_gib) if config.features.memory_gib else None

    def capture(batch: Batch) -> tuple[Batch, Features]:
        if reader:
            return reader.capture(batch)
        return batch, cache.capture(batch) if cache else target.capture(batch.to(device))

    def save(step: int) -> None:
        if isinstance(reader, StoreCache):
            reader.flush()
        free_disk(run_dir, 12 * optimizer.master.numel(), f"the checkpoint of step {step}")
        state = {"step": step, "loader": ahead.state_dict(), "target": fingerprint, "draft": draft.config.model_dump()}
        checkpoint.save_checkpoint(
            run_dir, run_tensors(optimizer, draft, window), state | {"config": config.model_dump()}, config.checkpoint.keep
        )

    def held_out() -> dict[str, float]:
        batches = eval_batches(eval_set, config.data.pack_tokens, rank, world)
        report = evaluate_tau(
            lambda batch: engine.rows(*capture(batch)),
            itertools.islice(batches, len(range(rank, config.eval.max_packs, world))),
            config.ttt_length,
            reduce=all_sum,
        )
        return eval_values(report, config.loss.step_decay)

    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        if reader:
            stack.callback(reader.close)
        ahead = stack.enter_context(Ahead(loader, device.type == "cuda", announce=reader.expect if reader else None))
        if data.stream:
            stack.callback(data.stream.close)
        metrics = None
        if rank == 0:
            write_run_files(config, draft.config)
            metrics = stack.enter_context(
                Metrics(run_dir, config.metrics, total_steps, resume_step=first_step or None, settings=config.model_dump())
            )
            for line in [*known, *told]:
                metrics.say(line)
        recent: list[Recent] = []  # the steps since the last look at the device
        saved, clock = first_step, time.perf_counter()

        for step in range(first_step + 1, total_steps + 1):
            batches = next(ahead)
            step_sums = torch.zeros_like(window["sums"])
            for batch in batches:
                batch, features = capture(batch)
                step_sums += engine.step(batch, features, optimizer.grads).sums()
                step_sums[0].masked_fill_(~all_finite(features), torch.nan)
            all_sum(optimizer.grad)
            all_sum(step_sums)
            norm = optimizer.step(step_sums[3, 0])
            window["sums"] += step_sums
            window["skipped_steps"] += step_sums[3, 0] == 0
            recent.append(Recent(step, batches, norm, step_sums))

            is_last = step == total_steps
            look = step % config.metrics.log_every == 0 or is_last
            hold_out = len(eval_set) > 0 and (step % config.eval.every == 0 or is_last)
            keep = step % config.checkpoint.every == 0 or is_last
            stopping = (look or world == 1) and stop.agreed()
            if look or hold_out or keep or stopping:
                refuse_nan(recent, run_dir, rank)
            if look:
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                if metrics:
                    values = train_values(window["sums"], config.loss.step_decay)
                    values["skipped_steps"] = int(window["skipped_steps"])
                    if reader and reader.skipped + reader.run_again:
                        values["skipped_documents"], values["damaged_documents"] = reader.skipped, reader.run_again
                    values["lr"], values["grad_norm"] = optimizer.lr(step - 1), float(norm)
                    values["tokens_per_s"] = world * sum(b.num_tokens for r in recent for b in r.batches) / seconds
                    values["data_wait"] = (ahead.waited + (reader.waited if reader else 0.0)) / seconds
                    metrics.log(step, values)
                ahead.waited = 0.0
                if reader:
                    reader.waited = 0.0
                for numbers in window.values():
                    numbers.zero_()
                recent.clear()
            if saved != step and (keep or stopping):  # before anything else can fail
                save(step)
                saved = step
            if hold_out:
                values = held_out()
                if metrics:
                    metrics.log(step, values)
                if checkpoint.beats_best(run_dir, values["eval/tau_sim"]):
                    if saved != step:
                        save(step)
                        saved = step
                    checkpoint.mark_best(run_dir, step, values["eval/tau_sim"], config.checkpoint.keep)
                clock = time.perf_counter()
            if stopping:
                if metrics:
                    metrics.say(
                        f"stopped by {signal.Signals(stop.number).name} after step {step}; its checkpoint is written"
                    )
                return TrainResult(run_dir, step, stop.number)
    return TrainResult(run_dir, total_steps, None)


# --- what a run is made of -----------------------------------------------------------------------------------------------


def start_process(device: str) -> tuple[torch.device, int, int]:  # device, rank, number of ranks
    """Joins the process group when torchrun started this process. Raises ValueError for a device this machine lacks."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: cuda, but PyTorch sees no CUDA GPU here; set device=cpu or install a CUDA build of PyTorch"
        )
    cuda = device != "cpu" and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    found = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(found)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=found if cuda else None)
    return found, (dist.get_rank() if dist.is_initialized() else 0), (dist.get_world_size() if dist.is_initialized() else 1)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def open_target(config: Config, layers: tuple[int, int, int], device: torch.device) -> Target:
    dtype = torch.float32 if config.target.dtype == "fp32" else torch.bfloat16
    return load_target(config.target.path, dtype, device, layers, config.target.trust_remote_code)


def target_parameters(config: Config) -> int:
    return count_target_parameters(load_target_config(config.target.path, config.target.trust_remote_code))


def open_features(
    config: Config, layers: tuple[int, int, int], device: torch.device, sets: list[Dataset]
) -> tuple[Target | StoredTarget, StoreReader | None, list[str]]:  # target, reader of the store if any, what to tell
    """The target, or of a store that has all features only its embedding, head and norm. The store is checked against the
    run: ValueError names each field that differs."""
    if config.features.path is None:
        return open_target(config, layers, device), None, []
    folder = Path(config.features.path)
    wanted = run_meta(config, layers)
    if config.features.mode == "cache":
        target = open_target(config, layers, device)
        if checkpoint.is_rank_0():
            start_store(folder, capture_meta(wanted, target, target_fingerprint(target)), target_ends(target))
        checkpoint.barrier()
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        cache = StoreCache(target, Store(folder), int(config.features.max_gib * GIB), rank, world)
        checkpoint.barrier()  # nobody writes before all have counted
        return target, cache, [f"{reason}; its documents are run again" for reason in cache.store.damaged.values()]
    store = Store(folder)
    refuse_other(folder, store.meta, wanted, COMPARED)
    told = check_documents(store, [x for x in sets if len(x)], config.features.on_bad_shard)
    return stored_target(store, device), StoreReader(store, device, config.features.on_bad_shard), told


def run_meta(config: Config, layers: tuple[int, int, int]) -> Meta:
    """What a store for this run says of the target, as far as config and files tell."""
    dtype = "fp32" if config.target.dtype == "fp32" else "bf16"
    return expected_meta(config.target.path, config.target.trust_remote_code, layers, dtype)


def load_data(config: Config, vocab_size: int) -> Prepared:
    """The tokenised train and held-out sets; the latter may be empty. One rank fills the cache while the others wait.

    With data.streaming, the stream and sets made of a sample of it.
    """
    tokenizer = load_tokenizer(config.target.path, config.target.trust_remote_code)
    return (open_stream if config.data.streaming else prepare)(config.data, tokenizer, vocab_size)


def draft_shape(config: Config) -> DraftConfig:
    """The shape of the draft to train: the target's, changed by draft.config and draft.overrides; or draft.init_from's."""
    facts = load_target_config(config.target.path, config.target.trust_remote_code)
    if config.draft.init_from is not None:
        if config.draft.config or config.draft.overrides or config.draft.vocab_map:
            raise ValueError(
                "draft.init_from brings the draft's shape and vocabulary; take out draft.config, draft.overrides and "
                "draft.vocab_map"
            )
        return load_draft(config.draft.init_from, facts).config
    shape = (read_yaml(config.draft.config) if config.draft.config else {}) | config.draft.overrides
    return DraftConfig.from_target(facts, **shape)


def new_draft(config: Config) -> Draft:
    """An fp32 draft of the configured shape, its vocabulary and embedding unset; or the warm start of draft.init_from."""
    shape = draft_shape(config)
    if config.draft.init_from is not None:
        return load_draft(config.draft.init_from, shape.num_target_layers).float()
    draft = Draft(shape)
    draft.init_weights(draft.config.initializer_range, torch.Generator().manual_seed(config.seed))
    return draft


def fit_to_target(
    draft: Draft, config: Config, target: Target | StoredTarget, train_set: Dataset
) -> list[str]:  # what to tell the user
    """Sets what a new draft takes from the target and the data: vocabulary map, embedding, and where to start from."""
    told, size = [], draft.config.draft_vocab_size
    if config.draft.init_from is None:
        counts = token_counts(train_set, draft.config.vocab_size)
        if config.draft.vocab_map is not None:
            ids = read_vocab_mapping(Path(config.draft.vocab_map), draft.config.vocab_size)
            share = counts[ids.numpy()].sum() / counts.sum()
            told.append(
                f"vocabulary map of {config.draft.vocab_map}: its {len(ids):,} tokens are {share:.2%} of all trained"
            )
        else:
            ids = build_vocab_map(counts, size)
            told.append(
                f"vocabulary map: the {size:,} most trained tokens are {coverage(counts, [size])[size]:.2%} of all trained"
            )
        draft.set_vocab(ids)
        if config.draft.init == "target" and draft.config.hidden_size == target.hidden_size:
            if target.final_norm is None:
                raise ValueError(f"{config.target.path} has no final RMSNorm to start from; set draft.init=random")
            draft.start_from_target(target.head.weight, target.final_norm)
    if config.draft.init_from is None or bool(draft.embed_tokens.weight.isnan().any()):
        draft.set_embedding(target.embedding.float().cpu())
    return told


def frozen_tensors(draft: Draft) -> dict[str, Tensor]:
    """What a draft needs besides its trained weights and its target: the vocabulary map, and where its embedding is not
    the target's own, that too."""
    own = {"embed_tokens.weight": draft.embed_tokens.weight.data}
    return {"d2t": draft.d2t, "t2d": draft.t2d} | (own if has_own_embedding(draft.config) else {})


def has_own_embedding(shape: DraftConfig) -> bool:
    return shape.hidden_size != shape.target_hidden_size


def engine_kind(engine: Literal["auto", "fused", "reference"]) -> Literal["fused", "reference"]:
    return "fused" if engine == "auto" else engine


def build_engine(config: Config, draft: Draft, target: Target | StoredTarget) -> TTTEngine | ReferenceEngine:
    weights = config.loss.step_decay ** torch.arange(config.ttt_length, dtype=torch.float32, device=target.device)
    args = draft, target.head, weights, config.loss.kind, config.loss.lk_scale, config.loss.lk_decay
    return TTTEngine(*args, config.chunk_rows) if engine_kind(config.engine) == "fused" else ReferenceEngine(*args)


def run_tensors(optimizer: FlatAdamW, draft: Draft, window: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds besides its JSON. All but the optimizer's step count and the RNG states are the live ones."""
    shown = {f"window.{name}": numbers for name, numbers in window.items()}
    return optimizer.state_dict() | frozen_tensors(draft) | shown | checkpoint.rng_state(draft.d2t.device)


def resume(
    config: Config,
    fresh: bool,
    fingerprint: str,
    draft: Draft,
    optimizer: FlatAdamW,
    loader: Loader,
    window: dict[str, Tensor],
) -> tuple[int, list[str]]:  # steps done, what to tell the user
    """Loads the newest readable checkpoint of the run folder in place; newer unreadable ones are renamed out of the way.

    Raises ValueError when it belongs to another run, or none is readable.
    """
    run_dir, told = Path(config.run_dir), []
    found = checkpoint.list_checkpoints(run_dir)
    if fresh:
        if found and checkpoint.is_rank_0():
            shutil.rmtree(run_dir / "checkpoints")
        checkpoint.barrier()
        return 0, told
    live = run_tensors(optimizer, draft, window)
    damaged: list[Path] = []
    for path in reversed(found):
        tensors = {name: tensor.clone() for name, tensor in live.items()}
        try:
            saved = checkpoint.read_state(path)
            refuse_other_run(saved, config, fingerprint, draft.config)
            checkpoint.load_tensors(saved, tensors)
        except checkpoint.Unreadable as error:
            told.append(f"{error}; left aside")
            damaged.append(path)
            continue
        loader.load_state_dict(saved.state["loader"])
        for name in live.keys() - optimizer.state_dict().keys():
            live[name].copy_(tensors[name])
        optimizer.load_state_dict(tensors)
        checkpoint.set_rng_state(tensors)
        checkpoint.rewind(run_dir, saved.step, damaged)
        return saved.step, [*told, f"going on from {path}, step {saved.step}"]
    if found:
        raise ValueError(f"no checkpoint of {run_dir} is readable; start anew with --fresh. " + " ".join(told))
    return 0, told


def refuse_other_run(saved: checkpoint.Saved, config: Config, fingerprint: str, shape: DraftConfig) -> None:
    if saved.state["target"] != fingerprint:
        raise ValueError(
            f"checkpoint {saved.path} was trained for another target (fingerprint {saved.state['target']}, "
            f"{config.target.path} has {fingerprint}); use its target, or another run_dir"
        )
    then = dotted(saved.state["config"]) | dotted({"draft's shape": saved.state["draft"]})
    now = dotted(config.model_dump(mode="json")) | dotted({"draft's shape": shape.model_dump(mode="json")})
    changed = [
        f"{key}: {then.get(key)} -> {now.get(key)}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in FREE_ON_RESUME)
    ]
    if changed:
        raise ValueError(
            f"checkpoint {saved.path} was made with other settings, so going on would not give its result; take them back, "
            "choose another run_dir, or start anew with --fresh. Changed: " + "; ".join(changed)
        )


def dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as {section.key: value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# --- numbers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recent:
    """A step whose numbers still lie on the device."""

    step: int
    batches: list[Batch]  # this rank's, on the CPU
    norm: Tensor  # scalar
    sums: Tensor  # [5, T], all ranks'


def train_values(sums: Tensor, step_decay: float) -> dict[str, float]:
    """Loss per live step-0 row, per-step acceptance and tau_sim from summed rows [5, T]."""
    loss, acceptance, hits, live, masked_in = sums.cpu()
    alphas = acceptance / live.clamp_min(1)
    decay = step_decay ** torch.arange(len(loss), dtype=torch.float64)
    values = {"loss": float((loss * decay).sum() / live[0].clamp_min(1)), "tau_sim": tau_sim(alphas)}
    values["top1"] = float(hits[0] / masked_in[0].clamp_min(1))
    return values | {f"a{i}": float(a) for i, a in enumerate(alphas)}


def eval_values(report: TauReport, step_decay: float) -> dict[str, float]:
    means = report.overall
    known = [(i, loss, n) for i, (loss, n) in enumerate(zip(means.loss, means.num_live, strict=True)) if loss is not None]
    total = sum(step_decay**i * loss * n for i, loss, n in known) / means.num_live[0]
    alphas = {f"eval/a{i}": a for i, a in enumerate(means.acceptance) if a is not None}
    return {"eval/loss": total, "eval/tau_sim": means.tau_sim, **alphas}


def refuse_nan(recent: list[Recent], run_dir: Path, rank: int) -> None:
    """Stops at the first step whose loss or gradient is not finite, with that step's batches saved for inspection."""
    for r in recent:
        if bool(torch.isfinite(r.sums[0]).all()) and bool(torch.isfinite(r.norm)):
            continue
        file = run_dir / f"not-finite-step-{r.step:08d}-rank-{rank}.safetensors"
        tensors = {}
        for i, batch in enumerate(r.batches):
            tensors |= {f"{i}.input_ids": batch.input_ids, f"{i}.loss_mask": batch.loss_mask}
            tensors[f"{i}.lengths"] = torch.tensor(batch.lengths)
        where = f"are in {file}"
        try:
            save_file(tensors, file)
        except (OSError, SafetensorError) as error:
            where = f"could not be written to {file} ({error})"
        raise ValueError(
            f"step {r.step}: loss sums {r.sums[0].tolist()} and gradient norm {float(r.norm)} are not all finite, or the "
            f"target's states were not; training stopped. The step's batches {where}, the last checkpoint is good: "
            "lower optim.lr, or look at the batch"
        )


def all_finite(features: Features) -> Tensor:  # scalar bool
    """A teacher of NaN has no argmax, so its row would pass for one that is not live."""
    return features.g.isfinite().all() & features.f.isfinite().all()


def all_sum(x: Tensor) -> Tensor:
    """Adds up all ranks, in place."""
    if dist.is_initialized():
        if x.device.type == "cpu" and dist.get_backend() == "nccl":
            x.copy_(all_sum(x.cuda()))
        else:
            dist.all_reduce(x)
    return x


class StopSignal:
    """Remembers SIGTERM or SIGINT instead of dying of it; a second one of them does kill."""

    def __enter__(self) -> StopSignal:
        self.number: int | None = None
        self._before = {s: signal.signal(s, self._remember) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> bool:
        """True on every rank once any rank got a signal."""
        number = int(all_max(self.number or 0))
        self.number = number or None
        return number != 0


def all_max(value: int) -> int:
    if not dist.is_initialized():
        return value
    x = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return int(x)


def write_run_files(config: Config, draft: DraftConfig) -> None:
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    (run_dir / "draft.json").write_text(json.dumps(draft.model_dump(mode="json"), indent=1))


# --- a finished run ------------------------------------------------------------------------------------------------------


def open_run(run_dir: Path, which: str = "best") -> tuple[Config, Target, Draft]:
    """A run's config, its target, and its draft from checkpoint `which` (best, last or a step), ready to decode."""
    saved, draft = read_draft(run_dir, which)
    config = Config.model_validate(saved.state["config"])
    device, _, _ = start_process(config.device)
    target = open_target(config, draft.config.layers, device)
    if target_fingerprint(target) != saved.state["target"]:
        raise ValueError(f"checkpoint {saved.path} was trained for another target than {config.target.path} now holds")
    if not has_own_embedding(draft.config):
        draft.set_embedding(target.embedding.float().cpu())
    return config, target, draft.to(device)


def read_draft(run_dir: Path, which: str) -> tuple[checkpoint.Saved, Draft]:
    """The draft of a run's checkpoint; where best or last is damaged, of the newest one that is not, with a warning."""
    paths = checkpoint.checkpoints_of_run(run_dir, which)
    for path, following in zip(paths, [*paths[1:], None], strict=True):
        try:
            saved = checkpoint.read_state(path)
            draft = Draft(DraftConfig.model_validate(saved.state["draft"]))
            parameters = list(draft.trainable().values())
            sizes = [p.numel() for p in parameters]
            tensors = {"master": torch.empty(sum(sizes))} | frozen_tensors(draft)
            checkpoint.load_tensors(saved, tensors)
        except checkpoint.Unreadable as error:
            if following is None:
                raise
            warnings.warn(f"{error}; {following.name} is used instead", stacklevel=2)
            continue
        for p, values in zip(parameters, tensors["master"].split(sizes), strict=True):
            p.data.copy_(values.view_as(p))
        return saved, draft
    raise AssertionError("a run has a checkpoint or checkpoints_of_run raises")


@dataclass(frozen=True)
class Evaluation:
    """`held_out` is None when the run has no held-out data, `decode` when no prompts were given."""

    checkpoint: str
    held_out: TauReport | None
    decode: DecodeReport | None


def evaluate_run(
    run_dir: Path, which: str, prompts: Path | None, max_prompts: int, max_new_tokens: int, settings: DecodeSettings
) -> Evaluation:
    """Simulated acceptance on the run's held-out data, and real speculative decoding of `prompts` (JSONL) if given."""
    config, target, draft = open_run(run_dir, which)
    dtype = compute_dtype(config, target.device)
    draft.to(dtype)
    eval_set = load_data(config, draft.config.vocab_size).eval
    held_out = decoded = None
    if len(eval_set):
        held_out = evaluate_held_out(config, target, draft, eval_set)
    elif prompts is None:
        raise ValueError(f"{run_dir} has no held-out data; give --prompts, or the run an eval_fraction above 0")
    if prompts is not None:
        tokenizer = load_tokenizer(config.target.path, config.target.trust_remote_code)
        if config.data.chat_template is not None:
            tokenizer.chat_template = Path(config.data.chat_template).expanduser().read_text(encoding="utf-8")
        ids = prompt_ids(read_prompts(prompts)[:max_prompts], tokenizer, **config.data.chat_template_kwargs)
        decoded = evaluate_decode(target, draft, ids, settings, max_new_tokens)
    return Evaluation(f"{run_dir} ({which})", held_out, decoded)


def evaluate_held_out(config: Config, target: Target, draft: Draft, eval_set: Dataset) -> TauReport:
    """Simulated acceptance on the run's held-out data, by a draft in the run's compute dtype."""
    batches = itertools.islice(eval_batches(eval_set, config.data.pack_tokens), config.eval.max_packs)
    engine = build_engine(config, draft, target)
    return evaluate_tau(
        lambda batch: engine.rows(batch, target.capture(batch.to(target.device))), batches, config.ttt_length
    )


def export_run(run_dir: Path, out: Path, which: str, overwrite: bool) -> list[str]:
    """Writes the run's draft in serving format in the target's dtype, verifies it, and says what was done.

    The dtype is the one that the target's config.json names, whatever training ran the target in.
    """
    config, target, draft = open_run(run_dir, which)
    target_dir = Path(cached_file(config.target.path, "config.json")).parent
    facts = language_config(read_target_config(target_dir))
    named = facts.get("dtype") or facts.get("torch_dtype")
    dtype = getattr(torch, str(named).removeprefix("torch.")) if named else target.dtype
    export_draft(draft, out, dtype, overwrite)
    findings = verify(out, target_dir)
    if findings.errors:
        raise ValueError(f"{out} was written but does not verify: " + " ".join(findings.errors))
    return [*findings.warnings, f"{out}: {which} checkpoint of {run_dir}, {dtype}; verified for SGLang and vLLM"]


def print_plan(config: Config, console: Console) -> None:
    """The resolved config, parameter counts, predicted memory and disk. Reads the target's config.json, not its weights.

    `device: cuda` is predicted for without a GPU, too.
    """
    facts = load_target_config(config.target.path, config.target.trust_remote_code)
    shape = draft_shape(config)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    console.print(resolved, markup=False, highlight=False, soft_wrap=True)
    predicted = plan(
        shape,
        target_params=count_target_parameters(facts),
        target_dtype=torch.float32 if config.target.dtype == "fp32" else torch.bfloat16,
        pack_tokens=config.data.pack_tokens,
        ttt_length=config.ttt_length,
        precision="bf16" if compute_dtype(config, device) == torch.bfloat16 else "fp32",
        document_tokens=config.data.max_length,
        keep=config.checkpoint.keep,
        loss=config.loss.kind,
        engine=engine_kind(config.engine),
        chunk_rows=config.chunk_rows,
        device=device.type,
        stored=config.features.path is not None and config.features.mode == "read",
    )
    console.print(f"# predicted for one {device.type} device and the {engine_kind(config.engine)} engine")
    render(predicted, console)
