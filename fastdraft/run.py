"""What a run is made of, from its config: process, data, target or feature store, draft, engine; a finished run's draft,
its evaluation and export, from the run's folder; and feature stores filled for runs to come."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import filelock
import torch
import yaml
from datasets import Dataset
from pydantic import BaseModel
from rich.console import Console
from torch import Tensor, nn
from transformers.utils import cached_file

from fastdraft import checkpoint
from fastdraft.batch import Ends
from fastdraft.config import Config, FeaturesConfig, read_yaml, without_removed
from fastdraft.cost import Plan, peak_flops, plan, render
from fastdraft.data.loader import eval_batches
from fastdraft.data.prepare import Prepared, prepare, read_template
from fastdraft.data.prompts import prompt_ids, read_prompts
from fastdraft.data.samples import longest_sample
from fastdraft.data.stream import open_stream
from fastdraft.data.vocab import token_counts
from fastdraft.decode import BATCH_SIZE
from fastdraft.dist import fleet, mesh
from fastdraft.evaluate import DecodeReport, TauReport, evaluate_decode, evaluate_tau
from fastdraft.features.meta import COMPARED, Meta, read_meta, refuse_other
from fastdraft.features.store import SHARD_BYTES, Store, census
from fastdraft.files import GIB, free_disk
from fastdraft.model.method import DraftStep, Method, Row
from fastdraft.model.methods import method_of, named_method
from fastdraft.model.precision import DTYPES, auto_line, bf16_is_slow, pick_dtype, slow_line, speed
from fastdraft.model.proposal import DecodeSettings
from fastdraft.model.target_config import language_config, longest_context, named_dtype, read_target_config
from fastdraft.serving.export import export_draft, verify
from fastdraft.target.cached import StoreCache
from fastdraft.target.capture import missing_bytes, plan_capture, run_capture
from fastdraft.target.hf import (
    RUN_TOKENS,
    Target,
    count_target_parameters,
    load_target,
    load_target_config,
    load_tokenizer,
    target_sizes,
)
from fastdraft.target.identity import begin_store, expected_meta, stop_ids, target_fingerprint
from fastdraft.target.served.ends import FILES, load_ends
from fastdraft.target.served.source import ServedSource, Wanted, served_dtype
from fastdraft.target.source import InProcess, Source, ends_of
from fastdraft.target.specforge import import_bytes, import_dumps, list_dumps
from fastdraft.target.stored import StoreReader, check_documents


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
    runs_target = not (reads_store(config) or asks_servers(config))
    return name_dtypes(config, device, begun, store, runs_target, plans=plans)


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


def open_target(
    config: Config,
    layers: tuple[int, ...],
    device: torch.device,
    holders: mesh.Axis | None = None,  # `choose_holders`; None: it is whole here
    sequence: mesh.Axis | None = None,  # who share a pack's tokens; None: each process has packs of its own
) -> Target:
    dtype, path = target_dtype(config, device), config.target.path
    more = {"holders": holders, "sequence": sequence}
    return load_target(path, dtype, device, layers, config.target.trust_remote_code, **more)


def choose_holders(config: Config, device: torch.device) -> tuple[mesh.Axis | None, list[str]]:
    """The processes that hold the target together with this one (None: it holds it alone), and what to tell the user.

    All processes call it, and rank 0 chooses.
    `auto` shards a target that does not fit on a GPU beside the draft's training, as far as `fleet_plan` tells. A host's
    GPUs share it if they can hold it, because their links are fast; otherwise those of several hosts do.
    """
    if mesh.world() == 1 or config.dist.target == "replicated" or (config.dist.target == "auto" and device.type == "cpu"):
        return None, []
    size, told = mesh.from_rank_0(_choose_holders(config, device) if mesh.is_rank_0() else None)
    return mesh.holders(size) if size > 1 else None, told


def _choose_holders(config: Config, device: torch.device) -> tuple[int, list[str]]:
    host, auto = mesh.host_size(), config.dist.target == "auto"
    choices = list(fleet.holder_choices(mesh.world(), host))
    if device.type == "cpu":  # of its memory nothing is known; processes of one host share it anyway
        return choices[0], [_sharded_line(choices[0])]
    gpu_gib = torch.cuda.get_device_properties(device).total_memory / GIB
    planned = fleet_planner(config, fleet.Hardware(gpu_gib=gpu_gib, host=host))
    axes = (mesh.world(), config.dist.sequence, config.dist.tensor)
    whole = planned(fleet.Layout(*axes, 1))
    if auto and whole.fits:
        return 1, []
    fitting = [n for n in choices if planned(fleet.Layout(*axes, n)).fits]
    told = [_sharded_line((fitting or choices[-1:])[0])]
    if auto:
        told[0] += f"; whole it would need {whole.memory_bytes / GIB:.0f} of the {gpu_gib:.0f} GiB of a GPU"
    if not fitting:
        need = planned(fleet.Layout(*axes, choices[-1])).memory_bytes / GIB
        told.append(f"by prediction it does not fit even so, with {need:.0f} GiB a GPU: see --plan --world {mesh.world()}")
    return (fitting or choices[-1:])[0], told


def _sharded_line(holders: int) -> str:
    return f"the target is sharded: each of {holders} processes holds 1/{holders} of every layer"


def reads_store(config: Config) -> bool:
    """Whether training has all features from a store, so that no layer of the target is run."""
    return config.features.path is not None and config.features.mode == "read"


def asks_servers(config: Config) -> bool:
    """Whether servers run the target, so that of it only embedding, head and final norm are loaded here."""
    return bool(config.target.url) and not reads_store(config)


def target_parameters(config: Config) -> int:
    return count_target_parameters(load_target_config(config.target.path, config.target.trust_remote_code))


def open_source(
    config: Config,
    layers: tuple[int, ...],
    device: torch.device,
    sets: list[Dataset],
    halo: int = 0,  # rows behind its own that a process needs of a pack whose tokens it shares
) -> Source:
    """Where the features of a run come from. A store is checked against the run: ValueError names each field that differs.

    On a CPU where bf16 is slow a store's bf16 numbers are widened to fp32, which loses nothing.
    """
    if asks_servers(config):
        return open_served(config, layers, device)
    if config.features.path is None:
        holders, told = choose_holders(config, device)
        target = open_target(config, layers, device, holders, mesh.axis("sequence"))
        source = InProcess(target, halo)
        source.notes = told + source.notes
        return source
    folder = Path(config.features.path)
    wanted = run_meta(config, layers)
    if config.features.mode == "cache":
        holders, told = choose_holders(config, device)
        target = open_target(config, layers, device, holders)
        fingerprint = target_fingerprint(target) if target.holders.size > 1 else None  # they take it together
        if mesh.is_rank_0():
            begin_store(folder, wanted, ends_of(target, fingerprint))
        mesh.barrier()
        cache = StoreCache(target, Store(folder), int(config.features.max_gib * GIB), mesh.rank(), mesh.world())
        cache.notes = told + cache.notes
        mesh.barrier()  # nobody writes before all have counted
        return cache
    store = Store(folder)
    refuse_other(folder, store.meta, wanted, COMPARED)
    notes = check_documents(store, [x for x in sets if len(x)], config.features.on_bad_shard)
    dtype = torch.float32 if bf16_is_slow(device) else DTYPES[store.meta.target_dtype]
    reader = StoreReader(store, device, config.features.on_bad_shard, dtype)
    reader.notes += notes
    return reader


def open_served(config: Config, layers: tuple[int, ...], device: torch.device, widened: bool = True) -> ServedSource:
    """The servers of target.url, compared with the files of target.path and proven. ValueError where one cannot be used.

    Where bf16 is slow on this CPU, features are `widened` to fp32, in which training computes faster.
    """
    dtype = torch.float32 if widened and bf16_is_slow(device) else target_dtype(config, device)
    meta = run_meta(config, layers)
    ends = load_ends(config.target.path, dtype, device, config.target.trust_remote_code)
    wanted = Wanted(
        weights=meta.weights,
        config=meta.config,
        layers=layers,
        num_layers=ends.num_layers,
        hidden_size=ends.ends.hidden_size,
        dtype=config.target.dtype,
        max_length=config.data.max_length,
    )
    return ServedSource(config.target.url, ends, wanted, first=mesh.rank(), timeout_s=config.target.timeout_s)


def run_meta(config: Config, layers: tuple[int, ...], dtype: Literal["auto", "fp8"] = "auto") -> Meta:
    """What a store for this run says of the target, as far as files and a config of `name_dtypes` tell. `dtype` is that of
    its rows, auto what the target runs in."""
    assert config.target.dtype != "auto"
    meta = expected_meta(config.target.path, config.target.trust_remote_code, layers, config.target.dtype)
    return replace(meta, dtype="fp8") if dtype == "fp8" else meta


def load_data(config: Config, vocab_size: int) -> Prepared:
    """The tokenised train and held-out sets; the latter may be empty. One rank fills the cache while the others wait.

    With data.streaming, the stream and sets made of a sample of it. ValueError where the target has too few positions.
    """
    check_target(config)
    target = config.target.path, config.target.trust_remote_code
    tokenizer, stops = load_tokenizer(*target), stop_ids(*target)
    if config.data.streaming:
        return open_stream(config.data, tokenizer, vocab_size, stops, mesh.machine_share())
    data = prepare(config.data, tokenizer, vocab_size, stops)
    longest = max(map(longest_sample, (data.train, data.eval)))
    refuse_too_long(config, longest, f"a document has {longest} tokens")
    return data


def draft_shape(config: Config) -> BaseModel:
    """The shape of the draft to train: the target's, changed by draft.config and draft.overrides; or draft.init_from's."""
    if config.draft.init_from is not None:
        return _init_from(config).config
    method = checked_method(config)
    facts = load_target_config(config.target.path, config.target.trust_remote_code)
    changes = (read_yaml(config.draft.config) if config.draft.config else {}) | config.draft.overrides
    if method.from_tokenizer is not None:
        tokenizer = load_tokenizer(config.target.path, config.target.trust_remote_code)
        changes = method.from_tokenizer(tokenizer, language_config(facts).get("vocab_size") or 0) | changes
    return method.shape.from_target(facts, **changes)


def checked_method(config: Config) -> Method:
    """The config's method. Raises ValueError for a name that is none, and for settings that it does not have."""
    method = named_method(config.draft.method)
    method.check_config(config)
    return method


def _init_from(config: Config) -> nn.Module:
    if config.draft.config or config.draft.overrides or config.draft.vocab_map:
        raise ValueError(
            "draft.init_from brings the draft's shape and vocabulary; take out draft.config, draft.overrides and "
            "draft.vocab_map"
        )
    facts = load_target_config(config.target.path, config.target.trust_remote_code)
    return checked_method(config).load(config.draft.init_from, facts)


def new_draft(config: Config) -> nn.Module:
    """An fp32 draft of the configured shape, its vocabulary and embedding unset; or the warm start of draft.init_from."""
    if config.draft.init_from is not None:
        return _init_from(config).float()
    draft = named_method(config.draft.method).draft(draft_shape(config))
    draft.init_weights(draft.config.initializer_range, torch.Generator().manual_seed(config.seed))
    return draft


def fit_to_target(draft: nn.Module, config: Config, target: Target | Ends, train_set: Dataset) -> list[str]:
    """Sets what a new draft takes from the target and the data, and says what it was."""
    return method_of(draft).fit(draft, config.draft, target, partial(token_counts, train_set, draft.config.vocab_size))


def check_layout(config: Config, shape: BaseModel) -> None:
    """Raises ValueError, naming the setting, where processes cannot share a step as `dist` asks."""
    settings = {"dist.tensor": config.dist.tensor, "dist.sequence": config.dist.sequence}
    asked = " and ".join(f"{name}={size}" for name, size in settings.items() if size > 1)
    if not asked:
        return
    method = method_of(shape)
    if method.check_cut is None:
        raise ValueError(f"{asked}: the step of draft.method={config.draft.method} runs in one process; set them to 1")
    if config.step == "reference":
        raise ValueError(f"{asked}: step=reference runs in one process; set step=fused")
    if config.features.mode == "cache":
        raise ValueError(
            f"{asked}: each of the processes that share a step would fill the cache with the same documents; capture them "
            "first (fastdraft features capture) and set features.mode=read"
        )
    if config.features.on_bad_shard == "skip":
        raise ValueError(
            f"{asked}: features.on_bad_shard=skip leaves out documents that one process cannot read and another perhaps "
            "can, and those that share a step need the same ones; set features.on_bad_shard=error"
        )
    method.check_cut(shape, config.dist.tensor)


def make_step(config: Config, draft: nn.Module, target: Target | Ends, shared: bool = False) -> DraftStep:
    """With `shared`, the step that the processes of the tensor and sequence axes do together."""
    groups = (mesh.axis("tensor"), mesh.axis("sequence")) if shared else ()
    return method_of(draft).build_step(config, draft, target.head, target.device, *groups)


# --- a finished run ------------------------------------------------------------------------------------------------------


def open_run(run_dir: Path, which: str = "best") -> tuple[Config, Target, nn.Module]:
    """A run's config, its target, and its draft from checkpoint `which` (best, last or a step), ready to decode.

    A target that was run in bf16 has the same weights here. On a CPU where bf16 is slow they are computed with in fp32.
    ValueError when servers ran the target: then it may not fit here, or be another in its last bits.
    """
    saved, draft = read_draft(run_dir, which)
    if was_served(saved):
        raise ValueError(f"{saved.path} was trained on what servers gave, and their target is not loaded into this process")
    config = saved_config(saved)
    device = mesh.start_process(config.device)
    config, _ = name_dtypes(config, device, begun=saved_dtypes(saved.state["config"], device))
    holders, _ = choose_holders(config, device)
    target = load_target(
        config.target.path,
        target_dtype(config, device),
        device,
        draft.config.layers,
        config.target.trust_remote_code,
        run_in=torch.float32 if bf16_is_slow(device) else None,
        holders=holders,
    )
    refuse_other_target(saved, target_fingerprint(target), config)
    draft.take_from_target(target.embedding)
    return config, target, draft.to(device)


def was_served(saved: checkpoint.Saved) -> bool:
    """Whether servers ran the target of a checkpoint's features, those of a store included."""
    return saved.state["target"].startswith(FILES)


def saved_config(saved: checkpoint.Saved) -> Config:
    """A checkpoint's settings. Those that are new since it was written have their defaults."""
    return Config.model_validate(without_removed(saved.state["config"]))


def read_draft(run_dir: Path, which: str) -> tuple[checkpoint.Saved, nn.Module]:
    """The draft of a run's checkpoint; where best or last is damaged, of the newest one that is not, with a warning."""
    paths = checkpoint.checkpoints_of_run(run_dir, which)
    for path, following in zip(paths, [*paths[1:], None], strict=True):
        try:
            saved = checkpoint.read_state(path)
            method = named_method(saved_config(saved).draft.method)
            draft = method.draft(method.shape.model_validate(saved.state["draft"]))
            parameters = list(draft.trainable().values())
            sizes = [p.numel() for p in parameters]
            tensors = {"master": torch.empty(sum(sizes))} | draft.frozen()
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
    run_dir: Path,
    which: str,
    prompts: Path | None,
    max_prompts: int,
    max_new_tokens: int,
    settings: DecodeSettings,
    say: Callable[[str], None] = lambda line: None,
    urls: Sequence[str] = (),  # servers of the target, where they are others than the run's
    own_steps: bool = False,  # draft as many steps as the draft's method serves, and not settings.num_steps
    batch_size: int = BATCH_SIZE,  # prompts decoded at once
) -> Evaluation:
    """Simulated acceptance on the run's held-out data, and real speculative decoding of `prompts` (JSONL) if given.

    `say` is told why prompts are decoded one at a time, where the target or the method cannot decode several together.

    Target and draft are computed in the run's dtypes. On a CPU where bf16 is slow their bf16 weights are computed with in
    fp32, and `say` is told. Where servers ran the target, they or the run's store give the held-out features, and
    decoding is the engine's: ValueError for `prompts`.
    """
    saved, draft = read_draft(run_dir, which)
    if was_served(saved):
        if prompts is not None:
            raise ValueError(
                f"{run_dir} was trained on what servers gave, and their target is not loaded into this process to decode "
                "with; export the draft and let the engine decode: `fastdraft check --checkpoint OUT --target DIR --engine "
                "vllm --engine-alone --prompts FILE`, or `fastdraft bench serve` against a server that has the draft"
            )
        return Evaluation(f"{run_dir} ({which})", evaluate_served(saved, draft, say, urls), None)
    if urls:
        raise ValueError(f"--url names servers of the target, and {run_dir} was trained with its target in the process")
    config, target, draft = open_run(run_dir, which)
    if own_steps:
        settings = replace(settings, num_steps=method_of(draft).served_steps(draft.config, None))
    draft.to(compute_dtype(config, target.device))
    in_bf16 = torch.bfloat16 in (target_dtype(config, target.device), compute_dtype(config, target.device))
    if in_bf16 and bf16_is_slow(target.device):
        say(f"the run's bf16 weights are computed with in fp32 on this machine, {speed(target.device)}")
        draft.float()
        config = config.model_copy(update={"precision": "fp32"})
    ids = None
    if prompts is not None:  # read before anything long: they may be bad
        tokenizer = load_tokenizer(config.target.path, config.target.trust_remote_code)
        tokenizer.chat_template = read_template(config.data) or tokenizer.chat_template
        asked, kwargs = read_prompts(prompts)[:max_prompts], config.data.chat_template_kwargs
        ids = prompt_ids(asked, tokenizer, config.data.template_date, **kwargs)
    eval_set = load_data(config, draft.config.vocab_size).eval
    held_out = decoded = None
    if len(eval_set):
        held_out = evaluate_held_out(config, target, draft, eval_set)
    elif prompts is None:
        raise ValueError(f"{run_dir} has no held-out data; give --prompts, or the run an eval_fraction above 0")
    if ids is not None:
        decoded = evaluate_decode(target, draft, ids, settings, max_new_tokens, None, batch_size)
        if decoded is not None and decoded.one_at_a_time is not None:
            say(f"prompts were decoded one at a time: {decoded.one_at_a_time}")
    return Evaluation(f"{run_dir} ({which})", held_out, decoded)


def evaluate_held_out(config: Config, target: Target, draft: nn.Module, eval_set: Dataset) -> TauReport:
    """Simulated acceptance on the run's held-out data, by a draft in the run's compute dtype. Processes share the packs."""
    rank, world = mesh.rank(), mesh.world()
    batches = eval_batches(eval_set, config.data.pack_tokens, rank, world)
    step = make_step(config, draft, target)

    def reduce(sums: Tensor) -> Tensor:
        target.meet()
        return mesh.axis("replicas").sum_(sums)

    return evaluate_tau(
        lambda batch: step.rows(batch, target.capture(batch.to(target.device))),
        itertools.islice(batches, len(range(rank, config.eval.max_packs, world))),
        method_of(draft).num_steps(config, draft.config),
        reduce=reduce,
    )


def evaluate_served(
    saved: checkpoint.Saved, draft: nn.Module, say: Callable[[str], None], urls: Sequence[str] = ()
) -> TauReport:
    """`evaluate_held_out` of a run whose target servers run: features come from them, or from the run's store."""
    config = saved_config(saved)
    device = mesh.start_process(config.device)
    config, _ = name_dtypes(config, device, begun=saved_dtypes(saved.state["config"], device))
    if urls:
        target = config.target.model_copy(update={"url": list(urls)})
        config = config.model_copy(update={"target": target, "features": FeaturesConfig()})
    if compute_dtype(config, device) == torch.bfloat16 and bf16_is_slow(device):
        say(f"the run's bf16 weights are computed with in fp32 on this machine, {speed(device)}")
        config = config.model_copy(update={"precision": "fp32"})
    eval_set = load_data(config, draft.config.vocab_size).eval
    if not len(eval_set):
        raise ValueError(f"{saved.path} is of a run without held-out data; give the run an eval_fraction above 0")
    source = open_source(config, draft.config.layers, device, [eval_set])
    try:
        for line in source.notes:
            say(line)
        refuse_other_target(saved, source.ends.fingerprint, config)
        draft.take_from_target(source.ends.embedding)
        step = make_step(config, draft.to(device, compute_dtype(config, device)), source.ends)
        batches = list(itertools.islice(eval_batches(eval_set, config.data.pack_tokens), config.eval.max_packs))
        source.expect(batches)
        return evaluate_tau(
            lambda batch: step.rows(*source.capture(batch)), batches, method_of(draft).num_steps(config, draft.config)
        )
    finally:
        source.close()


def refuse_other_target(saved: checkpoint.Saved, fingerprint: str, config: Config) -> None:
    if fingerprint != saved.state["target"]:
        raise ValueError(f"checkpoint {saved.path} was trained for another target than {config.target.path} now holds")


def export_run(run_dir: Path, out: Path, which: str, overwrite: bool) -> list[str]:
    """Writes the run's draft in serving format in the target's dtype, verifies it, and says what was done.

    The dtype is the one that the target's config.json names, whatever training ran the target in.
    """
    saved, draft = read_draft(run_dir, which)
    if was_served(saved):
        config = saved_config(saved)
        device = mesh.start_process(config.device)
        config, _ = name_dtypes(config, device, begun=saved_dtypes(saved.state["config"], device))
        target = load_ends(config.target.path, target_dtype(config, device), device, config.target.trust_remote_code).ends
        refuse_other_target(saved, target.fingerprint, config)
        draft.take_from_target(target.embedding)
    else:
        config, target, draft = open_run(run_dir, which)
    if not mesh.is_rank_0():  # it holds a part of the target, of which the draft takes what every process has
        return []
    target_dir = Path(cached_file(config.target.path, "config.json")).parent
    dtype = own_dtype(read_target_config(target_dir)) or target.dtype
    export_draft(draft, out, dtype, overwrite)
    findings = verify(out, target_dir)
    if findings.errors:
        raise ValueError(f"{out} was written but does not verify: " + " ".join(findings.errors))
    return [*findings.warnings, f"{out}: {which} checkpoint of {run_dir}, {dtype}; verified for SGLang and vLLM"]


def own_dtype(facts: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a target's config.json names, if it does. ValueError for one that no draft is served in."""
    named = named_dtype(language_config(facts))
    dtype = getattr(torch, named) if named else None
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(
            f"the target's config.json names the dtype {named}, in which no draft is served; write what its layers compute "
            "in: bfloat16, float16 or float32"
        )
    return dtype


def check_target(config: Config) -> None:
    """Raises ValueError, from the target's config.json alone, where its draft could not be exported, or where a stream may
    bring documents that are longer than it has positions."""
    own_dtype(load_target_config(config.target.path, config.target.trust_remote_code))
    if config.data.streaming:
        refuse_too_long(config, config.data.max_length, "a stream may bring documents as long as that")


def refuse_too_long(config: Config, longest: int, documents: str) -> None:
    """ValueError where the target has fewer positions than `longest`: learned ones end there, and RoPE goes on into angles
    that the target never saw."""
    most = longest_context(language_config(load_target_config(config.target.path, config.target.trust_remote_code)))
    if most is not None and longest > most:
        raise ValueError(
            f"data.max_length is {config.data.max_length}, and the target has {most} positions (max_position_embeddings in "
            f"its config.json), while {documents}: set data.max_length={most} or less, which cuts longer documents, or, if "
            "the target was extended, raise max_position_embeddings to what it was extended to"
        )


def predict(config: Config, device: torch.device) -> Plan:
    """What a run will need. Reads the target's config.json, not its weights."""
    check_target(config)
    facts = load_target_config(config.target.path, config.target.trust_remote_code)
    widened = (reads_store(config) or asks_servers(config)) and bf16_is_slow(device)
    return plan(
        draft_shape(config),
        target_params=count_target_parameters(facts),
        target_dtype=torch.float32 if widened else target_dtype(config, device),
        pack_tokens=config.data.pack_tokens,
        ttt_length=config.ttt_length,
        precision="fp8" if config.precision == "fp8" else pick_dtype(config.precision, device),
        document_tokens=config.data.max_length,
        keep=config.checkpoint.keep,
        loss=config.loss.kind,
        step=config.step,
        chunk_rows=config.chunk_rows,
        device=device.type,
        stored=reads_store(config) or asks_servers(config),
        export_dtype=own_dtype(facts),
        cache_bytes=int((config.features.max_gib or 0) * GIB),
        options=named_method(config.draft.method).cost_options(config),
        replicas=max(1, mesh.world() // config.dist.tensor),
    )


def fleet_planner(config: Config, hardware: fleet.Hardware) -> Callable[[fleet.Layout], fleet.FleetPlan]:
    """`fleet_plan` of a config as a function of the layout; GPUs are planned for, whatever this machine has."""
    device = torch.device("cuda")
    shape, method = draft_shape(config), named_method(config.draft.method)
    target = target_sizes(load_target_config(config.target.path, config.target.trust_remote_code))
    precision: Any = {"auto": "bf16"}.get(config.precision, config.precision)

    def step_cost(part: BaseModel, tokens: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
        return method.step_cost(
            part,
            pack_tokens=tokens,
            document_tokens=min(config.data.max_length, tokens),
            ttt_length=config.ttt_length,
            precision=precision,
            target_dtype=DTYPES["fp32" if config.target.dtype == "fp32" else "bf16"],
            loss=config.loss.kind,
            step=config.step,
            chunk_rows=config.chunk_rows,
            device=device.type,
            **method.cost_options(config),
        )

    return lambda layout: fleet.fleet_plan(
        layout,
        hardware,
        target,
        shape,
        step_cost,
        pack_tokens=config.data.pack_tokens,
        document_tokens=config.data.max_length,
        run_tokens=RUN_TOKENS,
        packs_per_step=config.optim.packs_per_step,
        sums=4 * method.num_steps(config, shape),  # after o and after down, forward and backward
        target_bytes=4 if config.target.dtype == "fp32" else 2,
        draft_bytes=4 if precision == "fp32" else 2,
    )


def print_fleet_plan(config: Config, world: int, hardware: fleet.Hardware, console: Console) -> None:
    """What one GPU of `world` needs in the config's layout, and in every other one. ValueError where that layout divides
    processes, packs or heads unevenly."""
    check_target(config)
    planned = fleet_planner(config, hardware)
    axes = (world, config.dist.sequence, config.dist.tensor)
    choices = {
        "replicated": [1],
        "sharded": list(fleet.holder_choices(world, hardware.host)) or [1],
        "auto": [1, *fleet.holder_choices(world, hardware.host)],
    }
    plans = [planned(fleet.Layout(*axes, n)) for n in choices[config.dist.target]]
    chosen = next((p for p in plans if p.fits), plans[-1])
    others = []
    for layout in fleet.layouts(world, hardware.host):
        with contextlib.suppress(ValueError):  # it does not divide this run
            others.append(planned(layout))
    fleet.render_fleet(chosen, others, hardware, console)


@dataclass(frozen=True)
class Work:
    """What a training step computes, and what its GPU could: for the share of it that is used (MFU)."""

    target_flops: int  # of a packed token
    draft_flops: int  # of a packed token that is trained on
    peak: float  # FLOP/s of one GPU

    def flops(
        self,
        tokens: int,
        sums: Tensor,  # [5, T] of `Rows.sums`
    ) -> float:
        """Those of `tokens`, of which the sums say how many were trained on. What the draft does for the others (fc, keys
        and values) is not counted, nor the target's attention."""
        return tokens * self.target_flops + float(sums[4, 0]) * self.draft_flops


def known_work(config: Config, device: torch.device) -> Work | None:
    """None where it is not known: on a CPU, on a GPU that is not in `PEAK_FLOPS`, and for a target with experts, of which
    some run."""
    peak = peak_flops(device)
    facts = language_config(load_target_config(config.target.path, config.target.trust_remote_code))
    if peak is None or any("expert" in name and value for name, value in facts.items()):
        return None
    predicted, shape = predict(config, device), draft_shape(config)
    forward = 0 if reads_store(config) or asks_servers(config) else 2 * predicted.target_params
    # The plan counts every parameter. An embedding is looked up, and the head's product is counted with the draft's step.
    ends = shape.vocab_size * shape.target_hidden_size * (1 if facts.get("tie_word_embeddings") else 2)
    return Work(max(0, forward - 2 * ends), predicted.flops_per_token - forward, peak)


def print_plan(config: Config, console: Console) -> None:
    """The resolved config and `predict` of it; `device: cuda` is predicted for without a GPU, too. No document is read."""
    device = mesh.planned_device(config.device)
    config, told = name_run_dtypes(config, device, plans=True)
    if device.type == "cpu" or torch.cuda.is_available():
        check_precision(config, device)
    check_layout(config, draft_shape(config))
    predicted = predict(config, device)
    try:
        refuse_too_long(config, config.data.max_length, "training refuses documents that are longer than these")
    except ValueError as warning:
        told.append(str(warning))
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    console.print(resolved, markup=False, highlight=False, soft_wrap=True)
    for line in told:
        console.print(f"# {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"# predicted for one {device.type} device and the {config.step} step")
    render(predicted, console)


# --- features on the disk -------------------------------------------------------------------------------------------------


def capture_features(
    config: Config,
    out: Path,
    dtype: Literal["auto", "fp8"] = "auto",  # auto: what the target runs in
    part: tuple[int, int] = (0, 1),  # (i, n): every n-th shard from i on
    plan_only: bool = False,
    say: Callable[[str], None] = lambda line: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fills the store `out` with the features of a run's documents, going on where an earlier call was stopped.

    ValueError when the disk is too small, `out` is another capture's, a server of target.url cannot be used, or features
    are not finite.
    """
    config = config.model_copy(update={"features": FeaturesConfig()})  # what training will read is what is made here
    shape, served = draft_shape(config), bool(config.target.url)
    device = mesh.planned_device(config.device)
    config, told = name_dtypes(config, device, store=out, runs_target=not served, trains=False, plans=plan_only)
    for line in told:
        say(line)
    wanted = run_meta(config, shape.layers, dtype)
    if config.data.streaming:
        raise ValueError(
            "features capture needs the data whole; set data.streaming=false, or fill a cache: features.mode=cache"
        )
    data = load_data(config, shape.vocab_size)
    capture = plan_capture(data.train, data.eval, config.data.pack_tokens, config.data.seed, wanted, shard_bytes)
    ends_bytes = 2 * shape.vocab_size * wanted.hidden_size * DTYPES[wanted.target_dtype].itemsize  # at most
    needed_bytes = missing_bytes(capture, out, part) + ends_bytes
    for line in capture.lines(wanted):
        say(line)
    free = free_disk(out, needed_bytes, "the feature store")
    say(f"at most {needed_bytes / GIB:.3f} GiB to write, target.safetensors with it; {free / GIB:.3f} GiB free at {out}")
    if plan_only:
        return
    device = mesh.start_process(config.device)
    holders = None
    if served:
        source = open_served(config, shape.layers, device, widened=False)
    else:
        holders, told = choose_holders(config, device)
        source = InProcess(open_target(config, shape.layers, device, holders))
        source.notes = told + source.notes
    try:
        for line in source.notes:
            say(line)
        out.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out / ".start.lock"):
            meta = begin_store(out, wanted, source.ends, data=capture.data, shards=len(capture.shards))
        run_capture(source, capture, out, meta, part, say, holders)
    finally:
        source.close()
    (out / ".start.lock").unlink(missing_ok=True)
    found = census(Store(out))
    say(f"{out}: {found.documents:,} documents in {found.shards} of {meta.shards} shards, {found.num_bytes / GIB:.3f} GiB")


def import_specforge(
    config: Config,
    folder: Path,
    out: Path,
    dtype: Literal["auto", "fp8"] = "auto",  # auto: target.dtype
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Makes a store of the dumps of SpecForge's prepare_hidden_states in `folder`, after running the target over the first
    of them to see that they are its. ValueError names the file and the fault, or the fields in which `out` is another's.

    A dump is of a target that ran in bf16, unless target.dtype says fp32; what this machine is fast at does not matter.
    """
    shape = draft_shape(config)
    if config.target.dtype == "auto":
        config = config.model_copy(update={"target": config.target.model_copy(update={"dtype": "bf16"})})
    wanted = run_meta(config, shape.layers, dtype)
    dumps = list_dumps(folder)
    free_disk(out, import_bytes(dumps, wanted), "the feature store")
    target = open_target(config, shape.layers, mesh.start_process(config.device))
    out.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out / ".start.lock"):  # one import at a time
        import_dumps(dumps, target, out, begin_store(out, wanted, ends_of(target)), say)
