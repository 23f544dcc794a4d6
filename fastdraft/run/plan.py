"""What a run will need, and whether its target can be trained for, as its config and the target's config.json tell."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import BaseModel
from rich.console import Console
from torch import Tensor

from fastdraft.config import Config, runs_target
from fastdraft.cost import Layout, Plan, TargetSizes, Training, peak_flops, plan, render
from fastdraft.data.loader import Loader
from fastdraft.data.prepare import find_prepared
from fastdraft.dist import fleet, mesh
from fastdraft.files import GIB
from fastdraft.model.method import Row
from fastdraft.model.methods import method_of, named_method
from fastdraft.model.precision import bf16_is_slow, pick_dtype
from fastdraft.model.target_config import language_config, longest_context, named_dtype
from fastdraft.run.draft import check_layout, draft_shape, muon_matrices
from fastdraft.run.dtypes import check_precision, name_run_dtypes, target_dtype
from fastdraft.target.hf import RUN_TOKENS, load_target_config, load_tokenizer, target_sizes
from fastdraft.target.identity import stop_ids
from fastdraft.target.layers import target_layers

GPU = torch.device("cuda")


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
    own_dtype(load_target_config(*config.target.files))
    if config.data.streaming:
        refuse_too_long(config, config.data.max_length, "a stream may bring documents as long as that")


def refuse_too_long(config: Config, longest: int, documents: str) -> None:
    """ValueError where the target has fewer positions than `longest`: learned ones end there, and RoPE goes on into angles
    that the target never saw."""
    most = longest_context(language_config(load_target_config(*config.target.files)))
    if most is not None and longest > most:
        raise ValueError(
            f"data.max_length is {config.data.max_length}, and the target has {most} positions (max_position_embeddings in "
            f"its config.json), while {documents}: set data.max_length={most} or less, which cuts longer documents, or, if "
            "the target was extended, raise max_position_embeddings to what it was extended to"
        )


def predict(config: Config, device: torch.device, gib: float | None = None) -> Plan:
    """What a process of this run will need, or of one on GPUs of `gib`. Reads the target's config.json, not its weights."""
    known = _read(config)
    return plan(
        _training(config, device, known.shape),
        known.target,
        _own_layout(config, device, layout_memory(config, device, known), gib),
        keep=config.checkpoint.keep,
        stored=not runs_target(config),
        export_dtype=own_dtype(known.facts),
        cache_bytes=int((config.features.max_gib or 0) * GIB),
    )


class _Known(NamedTuple):
    """What the target's config.json says, which is read once for configs that differ in settings of the step alone."""

    facts: dict[str, Any]
    shape: BaseModel  # the draft's
    target: TargetSizes


def _read(config: Config) -> _Known:
    check_target(config)
    facts = load_target_config(*config.target.files)
    return _Known(facts, draft_shape(config), target_sizes(facts))


def layout_memory(config: Config, device: torch.device, known: _Known | None = None) -> Callable[[Layout], tuple[Row, ...]]:
    """What one process needs, as a function of the layout."""
    known = known or _read(config)
    training, stored = _training(config, device, known.shape), not runs_target(config)
    return lambda layout: training.memory(known.target, layout, stored)


def choose_layout(
    config: Config,
    world: int,
    host: int,
    device: torch.device,
    fits: Callable[[Layout], bool],
) -> Layout:
    """The config's. Where that leaves it open who holds the target, the first choice that fits, or the last; on a CPU, of
    whose memory nothing is known, the first."""
    shared = list(fleet.holder_choices(world, host)) or [1]
    held = config.dist.target if runs_target(config) else "replicated"
    choices = {"replicated": [1], "sharded": shared, "auto": [1, *shared]}[held]
    layouts = [Layout(world, config.dist.sequence, config.dist.tensor, n) for n in choices]
    if device.type == "cpu":
        return layouts[0]
    return next((layout for layout in layouts if fits(layout)), layouts[-1])


def _own_layout(
    config: Config, device: torch.device, memory: Callable[[Layout], tuple[Row, ...]], gib: float | None
) -> Layout:
    """Of this run, or of as few GPUs as its `dist` asks for: a plan may be made by one process."""
    world = max(mesh.world(), config.dist.sequence * config.dist.tensor)
    limit = _memory_of(device) if gib is None else gib * GIB
    fits = lambda layout: limit is None or fleet.fits(memory(layout), limit / GIB)  # noqa: E731
    return choose_layout(config, world, _host(world), device, fits)


def _host(world: int) -> int:
    """GPUs of a host of this run, or of one that is planned."""
    return mesh.host_size() if mesh.world() > 1 else world


def _training(config: Config, device: torch.device, shape: BaseModel) -> Training:
    widened = not runs_target(config) and bf16_is_slow(device)
    of_all = {"ttt_length": config.ttt_length, "loss": config.loss.kind, "step": config.step}
    own = named_method(config.draft.method).cost_options(config)
    return Training(
        draft=shape,
        target_dtype=torch.float32 if widened else target_dtype(config, device),
        pack_tokens=config.data.pack_tokens,
        document_tokens=config.data.max_length,
        precision="fp8" if config.precision == "fp8" else pick_dtype(config.precision, device),
        device=device.type,
        run_tokens=RUN_TOKENS,
        muon=lambda tensor: muon_matrices(_with(config, "dist.tensor", tensor), shape),
        step=of_all | {"chunk_rows": config.chunk_rows} | own,
    )


def memory_lines(config: Config, device: torch.device, gib: float | None = None) -> list[str]:
    """A sentence where a process would need more memory than its device has, and which setting to lower; none where it
    fits. `gib`: of a GPU that this machine lacks."""
    limit = _memory_of(device) if gib is None else gib * GIB
    if limit is None:
        return ["no GPU is here to compare this with: --gpu-gib says how much memory it has"]
    known = _read(config)

    def memory(config: Config) -> tuple[Row, ...]:
        of_layout = layout_memory(config, device, known)
        return of_layout(_own_layout(config, device, of_layout, gib))

    rows = memory(config)
    needed, largest = sum(row.size for row in rows), max(rows, key=lambda row: row.size)
    on_gpu = device.type == "cuda"
    room = limit * (1 - fleet.UNCOUNTED) if on_gpu else limit  # as a plan of several GPUs has it
    if needed <= room:
        return []
    world = max(mesh.world(), config.dist.sequence * config.dist.tensor)
    gpu = "the GPU" if world == 1 else "each GPU"
    where = gpu if on_gpu else "this machine"
    processes = (
        f" for each of {mesh.machine_share()} processes" if device.type == "cpu" and mesh.machine_share() > 1 else ""
    )
    settings = _lower(config, lambda lowered: sum(row.size for row in memory(lowered)) <= room)
    if not settings and on_gpu:
        settings = _fitting_layout(config, limit / GIB, world)
    left = f", and {fleet.UNCOUNTED:.0%} of a GPU is left to what is not counted" if on_gpu else ""
    remedy = (
        f"it would fit with {' and '.join(settings)}"
        if settings
        else "no setting of the step makes it fit: it takes a smaller target or draft, fewer bytes a weight (target.dtype, "
        "precision), or several GPUs (--plan --world N)"
    )
    return [
        f"warning: a step needs {needed / GIB:,.1f} GiB by prediction, and {where} has "
        f"{limit / GIB:,.1f} GiB{processes}; the most is {largest.name}, {largest.size / GIB:,.1f} GiB{left}: {remedy}"
    ]


def planned_gpu_gib() -> tuple[float, str]:
    """The memory in GiB of the GPUs that `--world` plans for where the user gave none, and where the number is from."""
    memory = _memory_of(GPU)
    if memory is not None:
        return memory / GIB, "the GPUs have this machine's memory; --gpu-gib plans for others"
    gib = fleet.Hardware.gpu_gib
    return gib, f"no GPU is here to go by, so they have {gib:g} GiB; --gpu-gib plans for others"


def _every_plan(
    config: Config, planned: Callable[[Layout], fleet.FleetPlan], world: int, host: int
) -> list[fleet.FleetPlan]:
    """Of each layout of so many GPUs that divides this run."""
    plans = []
    for layout in fleet.layouts(world, host):
        with contextlib.suppress(ValueError):
            if layout.holders == 1 or runs_target(config):
                plans.append(planned(layout))
    return plans


def _fitting_layout(config: Config, gpu_gib: float, world: int) -> list[str]:
    """The settings of the fastest layout of as many GPUs that fits; none where there is none."""
    planned = fleet_planner(config, fleet.Hardware(gpu_gib=gpu_gib, host=_host(world)))
    plans = _every_plan(config, planned, world, _host(world))
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return []
    layout = max(fitting, key=lambda plan: plan.tokens_per_s).layout
    wanted = {"sequence": layout.sequence, "tensor": layout.tensor}
    if config.dist.target != "auto":  # which finds by itself who holds the target
        wanted["target"] = "replicated" if layout.holders == 1 else "sharded"
    return [f"dist.{name}={value}" for name, value in wanted.items() if getattr(config.dist, name) != value]


def _memory_of(device: torch.device) -> float | None:
    """Bytes for a process: of its GPU, or its share of the machine's memory. None: a GPU that is not here."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, if it has one
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory / mesh.machine_share()


def _lower(config: Config, fits: Callable[[Config], bool]) -> list[str]:
    """Settings with which a step fits: one alone, or the fewest that do together when each of them but the last is as low
    as makes sense. None where it never does. chunk_rows comes first, since it changes no result."""
    own = dict(named_method(config.draft.method).lowest)
    lowest = {"chunk_rows": own["chunk_rows"], "data.pack_tokens": 256} | own
    so_far, told = config, []
    for together in (False, True):
        for name, least in lowest.items():
            now = operator.attrgetter(name)(config) or 16384  # chunk_rows may be left to the step
            values = [value for value in (2**k for k in range(40, -1, -1)) if least <= value < now]
            for value in values:
                if fits(_with(so_far, name, value)):
                    return [*told, *_assigned(config, name, value)]
            if together and values:
                so_far, told = _with(so_far, name, values[-1]), [*told, *_assigned(config, name, values[-1])]
    return []


def _assigned(config: Config, name: str, value: int) -> list[str]:
    """What is to be written for `_with`; a document must fit into a pack."""
    shorter = name == "data.pack_tokens" and value < config.data.max_length
    return [f"{name}={value}", *([f"data.max_length={value}"] if shorter else [])]


def _with(config: Config, name: str, value: int) -> Config:
    section, _, key = name.rpartition(".")
    changes = {key: value}
    if name == "data.pack_tokens":
        changes["max_length"] = min(value, config.data.max_length)
    if not section:
        return config.model_copy(update=changes)
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def fleet_planner(config: Config, hardware: fleet.Hardware) -> Callable[[Layout], fleet.FleetPlan]:
    """`fleet_plan` of a config as a function of the layout, whatever this machine has; a ValueError names the setting where
    a layout does not divide what it is to divide."""
    _, shape, target = _read(config)
    training = _training(config, GPU, shape)
    packs, stored = config.optim.packs_per_step, not runs_target(config)
    sums = 4 * len(named_method(config.draft.method).step_weights(config, shape).weight)  # after o and down, both ways

    def planned(layout: Layout) -> fleet.FleetPlan:
        dist = config.dist.model_copy(update={"sequence": layout.sequence, "tensor": layout.tensor})
        fleet.refuse_uneven(layout, packs, None if stored else target.apart)
        check_layout(config.model_copy(update={"dist": dist}), shape)
        return fleet.fleet_plan(layout, hardware, target, training, packs_per_step=packs, sums=sums, stored=stored)

    return planned


@dataclass(frozen=True)
class Work:
    """What a training step computes, and what its GPU could: for the share of it that is used (MFU)."""

    target_flops: int  # of a packed token
    draft_flops: float  # of a live row of step 0: EAGLE-3's trained tokens, the blocks of other methods
    peak: float  # FLOP/s of one GPU

    def flops(
        self,
        tokens: int,
        sums: Tensor,  # [5, T] of `Rows.sums`
    ) -> float:
        """Those of `tokens`, and of as many chains or blocks as the sums say. What the draft does for tokens without
        one (fc, keys and values) is not counted, nor the target's attention."""
        return tokens * self.target_flops + float(sums[4, 0]) * self.draft_flops


def known_work(config: Config, device: torch.device) -> Work | None:
    """None where it is not known: on a CPU, on a GPU that is not in `PEAK_FLOPS`, and for a target whose config.json does
    not tell how many of its experts a token goes through."""
    peak = peak_flops(device)
    if peak is None:
        return None
    facts = language_config(load_target_config(*config.target.files))
    predicted, shape = predict(config, device), draft_shape(config)
    if predicted.target.idle is None:
        return None
    forward, draft = _flops(config, predicted)
    # The plan counts both ends. An embedding is looked up, and the head's product is counted with the draft's step.
    ends = shape.vocab_size * shape.target_hidden_size * (1 if facts.get("tie_word_embeddings") else 2)
    return Work(max(0, forward - 2 * ends), draft, peak)


def _flops(config: Config, predicted: Plan) -> tuple[int, float]:
    """Of the target's forward for a token, and of the draft for a live row of step 0."""
    forward = 2 * predicted.target.used if runs_target(config) else 0
    return forward, (predicted.flops_per_token - forward) / named_method(config.draft.method).step_rows(config)


def imbalance_line(config: Config, groups: int) -> str:
    """How unequal the work of `groups` of processes is that have packs of their own, in an epoch of the documents and masks
    of the prepared data. Nothing is tokenised."""
    if config.draft.method != "eagle3" or config.data.streaming:
        return "how unequal the processes' packs are is predicted for EAGLE-3 drafts on data that are not streamed"
    shape = draft_shape(config)
    try:
        tokenizer, stops = load_tokenizer(*config.target.files), stop_ids(*config.target.files)
        data = find_prepared(config.data, tokenizer, shape.vocab_size, stops)
    except (OSError, ValueError) as error:  # the run would end with it; a plan needs no data
        return f"how unequal the processes' packs are is not known: {str(error).splitlines()[0]}"
    if data is None:
        return "how unequal the processes' packs are is not known before `fastdraft data prepare`"
    predicted, method = predict(config, torch.device("cuda")), named_method(config.draft.method)
    token, row = _flops(config, predicted)
    pairs = method.pair_cost(shape, predicted.target.used, config)
    sizes = config.data.pack_tokens, config.optim.packs_per_step, config.data.seed
    try:
        work = Loader(data.train, *sizes, world_size=groups, pair_cost=pairs).work(token, row)
    except ValueError as error:
        return f"training would be refused: {error}"
    slowest = work.max(axis=1).sum() / work.mean(axis=1).sum()
    return (
        f"the {groups} groups of processes that have packs of their own wait for the slowest of them, whose work is "
        f"{slowest:.3f} times the mean: counted over the {len(work)} whole steps of an epoch, with the documents and loss "
        "masks of the prepared data"
    )


def print_plan(config: Config, console: Console, gib: float | None = None, fresh: bool = False) -> None:
    """The resolved config and `predict` of it, and what does not fit; `device: cuda` is predicted for without a GPU, too,
    and so is `auto` for one of `gib`, the memory of a GPU that need not be here. No document is read. `fresh`: the run
    does not go on from the checkpoints in its folder. ValueError: `gib` for a run on the CPU."""
    if gib is not None and config.device == "cpu":
        raise ValueError("--gpu-gib is the memory of a GPU, and device is cpu; set device=cuda, or leave --gpu-gib out")
    device = mesh.planned_device(config.device if gib is None else "cuda")
    config, told = name_run_dtypes(config, device, fresh, plans=True)
    if device.type == "cpu" or (gib is None and torch.cuda.is_available()):
        check_precision(config, device)
    shape = draft_shape(config)
    check_layout(config, shape)
    predicted = predict(config, device, gib)
    try:
        refuse_too_long(config, config.data.max_length, "training refuses documents that are longer than these")
    except ValueError as warning:
        told.append(str(warning))
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    console.print(resolved, markup=False, highlight=False, soft_wrap=True)
    recipe = ["the recipe, and why (docs/recipe.md)", *recipe_lines(config, shape)]
    world = max(mesh.world(), config.dist.sequence * config.dist.tensor)
    of_one = f"predicted for one {device.type} device{f' of {world}' if world > 1 else ''} and the {config.step} step"
    for line in [*told, *recipe, of_one]:
        console.print(f"# {line}", markup=False, highlight=False, soft_wrap=True)
    render(predicted, console)
    for line in memory_lines(config, device, gib):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def recipe_lines(config: Config, shape: BaseModel) -> list[str]:
    """What a run of this draft's shape would train with, and why. ValueError where its optimizer cannot have the draft."""
    optim, tokens = config.optim, config.optim.packs_per_step * config.data.pack_tokens
    packs = "one pack" if optim.packs_per_step == 1 else f"{optim.packs_per_step} packs"
    batch = (
        f"An optimizer step takes {packs} of up to {config.data.pack_tokens:,} tokens, {tokens:,} in all, however many "
        "GPUs share them. The gradient is a sum over all of them, which is divided once."
    )
    method = method_of(shape)
    start = method.start_lines(shape, config.draft, partial(target_layers, *config.target.files))
    return [batch, _optimizer(config, shape), _schedule(config), *method.recipe(config, shape), *start]


def _optimizer(config: Config, shape: BaseModel) -> str:
    optim, stepped = config.optim, muon_matrices(config, shape)
    clipped = f"Gradients are clipped to a norm of {optim.clip:g}, so that one odd batch moves the weights little."
    if not stepped:
        return f"AdamW steps all weights at a rate of {optim.lr:.2g}. {clipped}"
    share = sum(math.prod(m.whole) for m in stepped) / shape.num_parameters()["trainable"]
    return (
        f"Muon steps {len(stepped)} matrices, {share:.0%} of the trained weights, at a rate of "
        f"{optim.muon_rate:.2g}: such a step is as large along every direction of a matrix, and on the whole as "
        f"large as AdamW's usually is at the same rate. AdamW steps the rest at {optim.lr:.2g}. {clipped}"
    )


def _schedule(config: Config) -> str:
    optim = config.optim
    last = f"{optim.min_lr_ratio:g} of that" if optim.min_lr_ratio else "0"
    begin = f"The rate rises over the first {optim.warmup_ratio:.1%} of the steps"
    if optim.schedule == "wsd":
        return f"{begin}, stays, and falls to {last} over the last {optim.decay_share:.0%}: it is high for most of the run."
    return f"{begin}, then falls to {last} by a cosine. Its end is the run's: half of a long run is no short run."


def print_fleet_plan(config: Config, world: int, hardware: fleet.Hardware, console: Console) -> None:
    """What one GPU of `world` needs in the config's layout, and in every other one; how unequal the processes' work is, if
    the data are prepared. ValueError where that layout divides processes, packs or heads unevenly."""
    planned = fleet_planner(config, hardware)
    fits = lambda layout: planned(layout).fits  # noqa: E731
    chosen = planned(choose_layout(config, world, hardware.host, GPU, fits))
    fleet.render_fleet(chosen, _every_plan(config, planned, world, hardware.host), hardware, console)
    for row in _training(config, GPU, draft_shape(config)).copies(chosen.layout):
        console.print(f"host memory of rank 0's process: {row.size / GIB:.3f} GiB, {row.name}", soft_wrap=True)
    if chosen.layout.data > 1:
        console.print(imbalance_line(config, chosen.layout.data), soft_wrap=True)
