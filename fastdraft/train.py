"""The training loop: packs of documents -> the target's features -> a TTT step -> one optimizer step, read top to bottom.
`_train` is the loop, `TrainingRun.take_step` a step of it.

One process per GPU, started alone or under torchrun. The global batch of an optimizer step is optim.packs_per_step packs
whatever the number of processes; each adds un-normalised gradient sums, and the optimizer divides once by the global
number of live step-0 rows.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
import yaml
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdraft import checkpoint
from fastdraft.batch import Batch, Features, PackShare, Rows, StepWeights, own_features, tau_sim
from fastdraft.config import Config
from fastdraft.data.loader import Ahead, Loader, eval_batches
from fastdraft.data.prepare import Stats
from fastdraft.dist import mesh
from fastdraft.dist.shard import SharedAdamW
from fastdraft.dist.tensor import Parts
from fastdraft.dist.watch import StoppedEarly
from fastdraft.evaluate import TauReport, evaluate_tau
from fastdraft.files import file_checksum, free_disk, json_checksum, write_file
from fastdraft.metrics import Metrics, read_metrics
from fastdraft.model.methods import method_of, named_method
from fastdraft.run.draft import check_layout, fit_to_target, make_step, named_optim, new_draft
from fastdraft.run.dtypes import check_precision, compute_dtype, name_run_dtypes, saved_dtypes, with_dtypes_of
from fastdraft.run.finished import saved_config
from fastdraft.run.inputs import documents_hash, load_data, open_source, trained_and_held_out
from fastdraft.run.plan import known_work, memory_lines
from fastdraft.target.hf import load_target_config, target_sizes
from fastdraft.target.served.ends import FILES
from fastdraft.target.source import InProcess

# Settings, or sections, that may differ between a run and its continuation. They do not change the result, or what they
# name, as the target's path does, is compared itself.
FREE_ON_RESUME = (
    *("checkpoint", "metrics", "eval", "device", "run_dir", "dist", "target.path", "data.cache_dir", "data.num_workers"),
    *("features.on_bad_shard", "features.max_gib", "target.url", "target.timeout_s"),
)

# Settings that may differ between the hosts of a run: where each of them keeps something, and for how long it waits.
FREE_BETWEEN_HOSTS = (
    *("target.path", "data.cache_dir", "data.num_workers"),
    *("dist.silent_s", "dist.stuck_s", "dist.disk_s", "dist.timeout_s"),
)

WRITE_FAILED = 256  # above all numbers of signals
STOP_S = 20.0  # after a signal, in which servers may still give a pack's states: torchrun kills after 30


@dataclass(frozen=True)
class TrainResult:
    """What a training came to: the steps that were done, and whether a signal ended it before the last one."""

    run_dir: Path
    steps: int
    stopped_by: int | None  # the signal that ended the run early


def train(config: Config, fresh: bool = False) -> TrainResult:
    """Runs to the last step, going on from the run folder's newest checkpoint unless `fresh`; processes that torchrun or
    Slurm started again after a failure go on all the same.

    A signal ends it after the step that is under way, with a checkpoint. Raises StoppedEarly for one that comes before.
    """
    device = mesh.start_process(config.device, config.dist.timeout_s)
    with mesh.ending_together(config.dist.silent_s), StopSignal(early=True) as stop:
        mesh.refuse_unlike(lambda: started_with(config, fresh))
        mesh.lay_out(config.dist.sequence, config.dist.tensor)
        # every rank computes in what rank 0 chose, though their CPUs may differ
        again = mesh.largest(times_started_again()) if fresh else 0
        fresh = fresh and not again
        named, dtype_lines = mesh.from_rank_0(name_run_dtypes(config, device, fresh))
        config = with_dtypes_of(named, config)
        check_precision(config, device)
        with checkpoint.alone_in(Path(config.run_dir)):
            if again:
                dtype_lines.append(f"warning: --fresh is left out, since the processes were started again ({again})")
            return _train(config, fresh, device, dtype_lines, stop)


def _train(config: Config, fresh: bool, device: torch.device, messages: list[str], stop: StopSignal) -> TrainResult:
    with ExitStack() as failing:
        run = TrainingRun(config, fresh, device, messages, stop, failing)
        failing.pop_all()  # from here on `begin` says what closes what
    with ExitStack() as stack:
        run.begin(stack)
        for step in range(run.first_step + 1, run.total_steps + 1):
            run.take_step(step)
            is_last = step == run.total_steps
            look = step % config.metrics.log_every == 0 or is_last
            keep = step % config.checkpoint.every == 0 or is_last
            hold_out = run.holds_out_after(step)
            stopping = run.agrees_to_stop()
            if look or hold_out or keep or stopping:
                mesh.begin("reading the numbers of its steps from its device", config.dist.stuck_s)
                run.finish_step()
                refuse_nan(run.recent, run.run_dir, mesh.rank())
            if look:
                run.log(step)
            if run.saved != step and (keep or stopping):  # before anything else can fail
                run.save(step)
            if hold_out:
                run.evaluate(step)
            if stopping:
                run.writer.wait()
                run.say(f"stopped by {signal.Signals(run.stop.number).name} after step {step}; its checkpoint is written")
                return TrainResult(run.run_dir, step, run.stop.number)
    return TrainResult(run.run_dir, run.total_steps, None)


class TrainingRun:
    """This process's part of a run: what it trains and on what, and what it has to tell of the steps since the last line of
    metrics."""

    def __init__(
        self,
        config: Config,
        fresh: bool,
        device: torch.device,
        messages: list[str],  # to be said once the run may begin
        stop: StopSignal,
        failing: ExitStack,  # closes what was opened here where the run may not begin
    ) -> None:
        self.config = config
        self.device = device
        self.stop = stop
        self.run_dir = Path(config.run_dir)
        self.data_axis = mesh.axis("data")
        self.replicas = mesh.axis("replicas")
        self.sequence = mesh.axis("sequence")
        tensor = mesh.axis("tensor")
        dtype = compute_dtype(config, device)
        torch.manual_seed(config.seed)
        if mesh.is_rank_0():  # said before anything is loaded, which may end the process
            for line in memory_lines(config, device):
                print(line, flush=True)

        draft = new_draft(config)
        check_layout(config, draft.config)
        method = method_of(draft)
        data = load_data(config, draft.config)
        if data.stream:
            failing.callback(data.stream.close)
        target_used = target_sizes(load_target_config(*config.target.files)).used
        loader = Loader(
            data.stream or data.train,
            config.data.pack_tokens,
            config.optim.packs_per_step,
            config.data.seed,
            self.data_axis.rank,
            self.data_axis.size,
            method.pair_cost(draft.config, target_used, config),
        )
        self.total_steps = config.max_steps or loader.num_steps(config.epochs)
        self.weights = method.step_weights(config, draft.config)
        self.ttt_length = len(self.weights.weight)  # T
        self.held_out_hash = documents_hash(data.eval)
        most = min(config.eval.max_packs, len(data.eval))
        self.measure = f"{most} packs of {self.held_out_hash}"  # of which a step's tau_sim is
        sets = [data.train, data.eval]
        source = open_source(config, draft.config.layers, device, sets, halo=self.ttt_length)
        failing.callback(source.close)
        mesh.refuse_unlike(lambda: found_in(data.stats, source.ends.fingerprint))
        self.messages = [*messages, *data.lines(), *trained_and_held_out(config, data), *loader.lines(), *source.notes]
        self.messages += fit_to_target(draft, config, source.ends, data.train)

        parts = None
        if tensor.size > 1:
            parts = Parts({name: p.shape for name, p in draft.trainable().items()}, method.part, tensor)
            method.cut(draft, tensor.rank, tensor.size)
        draft.to(device)
        self.count_rows = self.weights.to(device).count  # of numbers on the device
        self.optimizer = SharedAdamW(
            draft.trainable(), named_optim(config, draft), self.total_steps, dtype, self.replicas, parts, self.count_rows
        )
        draft.to(dtype)  # what is not trained; the trained weights are the optimizer's
        self.window = {  # since the last line of metrics
            "sums": torch.zeros(5, self.ttt_length, dtype=torch.float64, device=device),
            "skipped_steps": torch.zeros((), dtype=torch.int64, device=device),
        }
        fingerprint = source.ends.fingerprint
        self.first_step, told = resume(config, fresh, fingerprint, draft, self.optimizer, loader, self.window)
        self.messages += told
        if self.first_step >= self.total_steps:
            self.messages.append(f"all {self.total_steps} steps are done already; --fresh trains anew")
        self.trainer = make_step(config, draft, source.ends, shared=tensor.size * self.sequence.size > 1)
        self.work = known_work(config, device)
        self.draft = draft
        self.data = data
        self.loader = loader
        self.source = source
        self.recent: list[Recent] = []  # the steps since the last look at the device
        self.saved = self.first_step  # the step of the newest checkpoint

    def begin(self, stack: ExitStack) -> None:
        """Opens what `stack` closes: threads and files. A checkpoint of before is evaluated now where it was not."""
        config = self.config
        self.stop.early = False
        stack.callback(self.source.close)
        self.ahead = stack.enter_context(Ahead(self.loader, self.device.type == "cuda", announce=self.source.expect))
        if self.data.stream:
            stack.callback(self.data.stream.close)
        self.metrics = None
        self.say: Callable[[str], None] = lambda line: None
        self.source.while_waiting = ends_waiting(self.stop)
        if mesh.is_rank_0():
            write_run_files(config, self.draft.config)
            going_on = self.first_step or None
            metrics = Metrics(self.run_dir, config.metrics, self.total_steps, going_on, config.model_dump())
            self.metrics = stack.enter_context(metrics)
            self.say = metrics.say  # no method of the run: the writer, which keeps it, would keep the run's memory
            self.source.say = self.say
            for line in self.messages:
                self.say(line)
        stack.callback(mesh.begin, None)  # how long anything may take that ends here is not known
        forgotten = mesh.from_rank_0(checkpoint.forget_other_best(self.run_dir, self.measure) if mesh.is_rank_0() else None)
        if forgotten is not None:
            self.say(forgotten)
        self.writer = stack.enter_context(
            checkpoint.Writer(
                *(self.run_dir, config.checkpoint.keep, config.dist.disk_s, self.say, config.dist.timeout_s),
                measure=self.measure,
            )
        )
        self.clock = time.perf_counter()
        if self.first_step and self.holds_out_after(self.first_step):
            # The run may have been killed between this checkpoint and the end of its evaluation, or before it was marked.
            tau_sim = mesh.from_rank_0(held_out_tau(self.run_dir, self.first_step) if mesh.is_rank_0() else None)
            if tau_sim is None or forgotten is not None:
                self.evaluate(self.first_step)
            elif self.writer.beats_best(tau_sim):
                self.writer.mark_best(self.first_step, tau_sim)

    def take_step(self, step: int) -> None:
        """Runs target and draft over this process's packs, and begins the optimizer's step."""
        mesh.begin("reading data", self.config.dist.disk_s)
        batches = next(self.ahead)
        step_sums = torch.zeros_like(self.window["sums"])
        self.trainer.begin(step)
        for batch in batches:
            # The target needs no weight of the draft: its first forward hides what the processes still send each other.
            batch, features = self.capture(batch)
            mesh.begin("taking a training step of the draft", self.config.dist.stuck_s)
            self.finish_step()
            step_sums += self.trainer.step(batch, features, self.optimizer.grads).sums()
            step_sums[0].masked_fill_(~all_finite(features), torch.nan)
        self.source.meet()
        norm = self.optimizer.start(step_sums)
        self.recent.append(Recent(step, batches, norm, step_sums))

    def capture(self, batch: Batch) -> tuple[Batch, Features]:
        """The batch and what this process needs of its features: all, where it shares its packs with no other."""
        dist = self.config.dist
        if isinstance(self.source, InProcess):
            mesh.begin("running the target over a pack", dist.stuck_s)
        else:
            mesh.begin("reading a pack's features", max(dist.disk_s, self.config.target.timeout_s))
        batch, features = self.source.capture(batch)
        share = PackShare(batch.num_tokens, self.sequence.rank, self.sequence.size, halo=self.ttt_length)
        return batch, features if share.size == 1 or self.source.gives_share else own_features(features, share)

    def finish_step(self) -> None:
        """Ends the optimizer's step that is under way, if one is; then its sums are those of all processes."""
        if self.optimizer.under_way:
            self.source.meet()
        sums = self.optimizer.finish()
        if sums is not None:
            self.window["sums"] += sums
            self.window["skipped_steps"] += self.count_rows(sums[3]) == 0

    def agrees_to_stop(self) -> bool:
        """Whether any process got a signal. Raises what one's last checkpoint failed of."""
        met = time.perf_counter()
        stopping = self.stop.agreed(not self.writer.idle and self.writer.failed())
        if self.device.type == "cpu":  # where the slowest process is waited for here; a GPU has work meanwhile
            self.optimizer.waited += time.perf_counter() - met
        if self.stop.failed:
            self.writer.raise_failure()
        return stopping

    def log(self, step: int) -> None:
        """Writes a line of metrics of the steps since the last one, and begins to count anew."""
        mesh.begin("writing metrics", self.config.dist.disk_s)
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        own_tokens = sum(b.num_tokens for r in self.recent for b in r.batches)
        waited, all_tokens = zip(*mesh.from_all((self.optimizer.clock(), own_tokens)), strict=True)
        if self.metrics:
            sums = self.window["sums"]
            values = train_values(sums, self.weights)
            values["skipped_steps"] = int(self.window["skipped_steps"])
            values |= self.source.counts()
            values["lr"], values["grad_norm"] = self.optimizer.lr(step - 1), float(self.recent[-1].norm)
            # Processes that share a pack each count all of it.
            tokens = sum(all_tokens) * self.data_axis.size / mesh.world()
            values["tokens_per_s"] = tokens / seconds
            values |= of_several(tokens / seconds, [s / seconds for s in waited])
            if self.work is not None:
                done = sum(r.sums for r in self.recent)  # in these seconds; the window may be older, of a checkpoint
                values["mfu"] = self.work.flops(tokens, done) / (seconds * mesh.world() * self.work.peak)
            values["data_wait"] = (self.ahead.waited + self.source.waited) / seconds
            values["checkpoint_wait"] = self.writer.stood / seconds
            self.metrics.log(step, values)
        self.ahead.waited = self.source.waited = self.writer.stood = 0.0
        for numbers in self.window.values():
            numbers.zero_()
        self.recent.clear()

    def save(self, step: int) -> None:
        """Begins a checkpoint, which is written while training goes on."""
        self.writer.wait_for_last()
        mesh.begin("writing down the features of a checkpoint", self.config.dist.disk_s)
        self.source.flush()
        tensors = run_tensors(self.optimizer, self.draft, self.window)
        free_disk(self.run_dir, sum(tensor.nbytes for tensor in tensors.values()), f"the checkpoint of step {step}")
        state = {"step": step, "loader": self.ahead.state_dict(), "target": self.source.ends.fingerprint}
        state |= {"draft": self.draft.config.model_dump(), "config": self.config.model_dump()}
        state |= {"chosen": left_open(self.config, self.draft), "held_out": self.held_out_hash}
        self.writer.save(tensors, state)
        self.saved = step

    def holds_out_after(self, step: int) -> bool:
        return len(self.data.eval) > 0 and (step % self.config.eval.every == 0 or step == self.total_steps)

    def evaluate(self, step: int) -> None:
        """Evaluates on held-out data. The best step so far keeps its checkpoint, which is made if it has none."""
        began, waited, stood = time.perf_counter(), self.source.waited, self.writer.stood
        values = self.held_out()
        mesh.begin("writing down what an evaluation gave", self.config.dist.disk_s)
        if self.writer.beats_best(values["eval/tau_sim"]):
            if self.saved != step:
                self.save(step)
            self.writer.mark_best(step, values["eval/tau_sim"])
        if self.metrics:
            self.metrics.log(step, values)
        self.clock += time.perf_counter() - began  # the clock is of training alone, and so is the waiting
        self.source.waited, self.writer.stood = waited, stood

    def held_out(self) -> dict[str, float]:
        rank, size = self.data_axis.rank, self.data_axis.size
        batches = eval_batches(self.data.eval, self.config.data.pack_tokens, rank, size)

        def step_rows(batch: Batch) -> Rows:
            captured = self.capture(batch)
            mesh.begin("evaluating a pack", self.config.dist.stuck_s)
            return self.trainer.rows(*captured)

        def add_up(sums: Tensor) -> Tensor:
            self.source.meet()  # a process may have fewer packs than those that hold the target with it
            return self.replicas.sum_(sums)

        own = itertools.islice(batches, len(range(rank, self.config.eval.max_packs, size)))
        report = evaluate_tau(step_rows, own, self.ttt_length, reduce=add_up)
        return eval_values(report, self.weights)


# --- going on from a checkpoint -------------------------------------------------------------------------------------------


def run_tensors(optimizer: SharedAdamW, draft: nn.Module, window: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds besides its JSON. All but the optimizer's step count and the RNG states are the live ones."""
    shown = {f"window.{name}": numbers for name, numbers in window.items()}
    return optimizer.state_dict() | draft.frozen() | shown | checkpoint.rng_state(optimizer.grad.device)


def resume(
    config: Config,
    fresh: bool,
    fingerprint: str,
    draft: nn.Module,
    optimizer: SharedAdamW,
    loader: Loader,
    window: dict[str, Tensor],
) -> tuple[int, list[str]]:  # steps done, what to tell the user
    """Loads the newest readable checkpoint of the run folder in place; newer unreadable ones are renamed out of the way.

    Raises ValueError when it belongs to another run, or none is readable.
    """
    run_dir, told = Path(config.run_dir), []
    found = checkpoint.list_checkpoints(run_dir)
    if fresh:
        if mesh.is_rank_0() and (run_dir / "checkpoints").exists():
            shutil.rmtree(run_dir / "checkpoints")
        mesh.barrier()
        return 0, told
    live = run_tensors(optimizer, draft, window)
    damaged: list[Path] = []
    for path in reversed(found):
        tensors, failure = {name: tensor.clone() for name, tensor in live.items()}, None
        try:
            saved = checkpoint.read_state(path)
            refuse_other_run(saved, config, fingerprint, draft, optimizer.grad.device)
            whole = checkpoint.load_tensors(saved, tensors, "rng.cuda", share=(mesh.rank(), mesh.world()))
        except checkpoint.Unreadable as error:
            failure = str(error)
        # What one process cannot read, none goes on from.
        failure = next(filter(None, mesh.from_all(failure)), None)
        if failure is not None:
            told.append(f"{failure}; left aside")
            damaged.append(path)
            continue
        loader.load_state_dict(saved.state["loader"])
        for name in live.keys() - optimizer.state_dict().keys():
            live[name].copy_(tensors[name])
        optimizer.load_state_dict(tensors)
        checkpoint.set_rng_state(tensors)
        checkpoint.rewind(run_dir, saved.step, damaged)
        told.append(f"going on from {path}, step {saved.step}")
        if not whole:
            told.append("it was written without a GPU: this one's random numbers begin at the seed")
        return saved.step, told
    if found:
        raise ValueError(f"no checkpoint of {run_dir} is readable; start anew with --fresh. " + "; ".join(told))
    checkpoint.rewind(run_dir, 0, [])
    return 0, told


def times_started_again() -> int:
    """How often torchrun or Slurm started these processes again after a failure. torchrun does not count where only the
    hosts of a run changed."""
    return max(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def held_out_tau(run_dir: Path, step: int) -> float | None:
    """The held-out tau_sim of a step in metrics.jsonl. None: it has none."""
    found = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return next((record["eval/tau_sim"] for record in found if record["step"] == step and "eval/loss" in record), None)


def refuse_other_run(
    saved: checkpoint.Saved, config: Config, fingerprint: str, draft: nn.Module, device: torch.device
) -> None:
    """ValueError where a checkpoint was trained on other features, for another target, or with other settings than
    `config` has, each of which is named."""
    served, was_served = (name.startswith(FILES) for name in (fingerprint, saved.state["target"]))
    if served != was_served:
        then, now = ("a server's" if x else "those of a target in the process" for x in (was_served, served))
        raise ValueError(
            f"checkpoint {saved.path} was trained on features that were {then}, and now they would be {now}, whose last "
            f"bits differ; {'give' if was_served else 'leave out'} target.url, choose another run_dir, or start anew with "
            "--fresh"
        )
    # In another dtype the same target has another fingerprint, and the settings below say which it was.
    same_dtype = saved_dtypes(saved.state["config"], device)["target.dtype"] == config.target.dtype
    if saved.state["target"] != fingerprint and same_dtype:
        raise ValueError(
            f"checkpoint {saved.path} was trained for another target (fingerprint {saved.state['target']}, "
            f"{config.target.path} has {fingerprint}); use its target, or another run_dir"
        )
    settings = saved_config(saved)
    method = named_method(settings.draft.method)
    shape = method.shape.model_validate(saved.state["draft"])  # what is new has its default
    then = dotted(method.settled(settings).model_dump(mode="json"))
    then |= dotted({"draft's shape": shape.model_dump(mode="json")})
    then |= saved_dtypes(saved.state["config"], device)
    now = dotted(named_method(config.draft.method).settled(config).model_dump(mode="json"))
    now |= dotted({"draft's shape": draft.config.model_dump(mode="json")})
    # A checkpoint of before 2026-11-28 does not hold what was chosen, which was what is chosen today.
    today, chosen_now = left_open(settings, draft), left_open(config, draft)
    chosen = saved.state.get("chosen") or today
    for key, value in chosen.items():
        if now.get(key) is not None:
            then[key] = value
        elif value != today.get(key):  # of the same settings
            then[key], now[key] = value, chosen_now.get(key)
    now |= {key: value for key, value in chosen_now.items() if then.get(key) is not None}
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


def started_with(config: Config, fresh: bool) -> dict[str, Any]:
    """What all processes of a run must have alike, by name: the settings, and the code that they run."""
    settings = {name: x for name, x in dotted(config.model_dump(mode="json")).items() if name not in FREE_BETWEEN_HOSTS}
    package = Path(__file__).parent
    code = [(str(p.relative_to(package)), file_checksum(p)) for p in sorted(package.rglob("*.py"))]
    versions = {"PyTorch": torch.__version__, "transformers": transformers.__version__}
    return settings | versions | {"--fresh": fresh, "fastdraft's code": json_checksum(code)}


def left_open(config: Config, draft: nn.Module) -> dict[str, Any]:
    """The settings that a config leaves open, by name, as its method and optimizer choose them. A checkpoint holds them,
    since a later version may choose otherwise, and the run would go on as another."""
    settled = named_method(config.draft.method).settled(config)
    chosen = dotted(settled.model_copy(update={"optim": named_optim(config, draft).named()}).model_dump(mode="json"))
    given = dotted(config.model_dump(mode="json"))
    return {name: value for name, value in chosen.items() if given[name] is None and value is not None}


def found_in(data: Stats, fingerprint: str) -> dict[str, Any]:
    """What all processes of a run must have found in the places that their settings name, by name."""
    counts = f"{data.samples:,} samples, {data.tokens:,} tokens, {data.trained_tokens:,} of them trained"
    return {"what data.paths holds": counts, "the fingerprint of target.path": fingerprint}


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


def train_values(sums: Tensor, weights: StepWeights) -> dict[str, float]:
    """The weighted loss divided as the optimizer divides it, per-step acceptance and tau_sim from summed rows [5, T].

    The rows are those that were trained on. Where they are drawn, the loss is the estimate that the gradient is of, and an
    acceptance is the mean of a step's drawn rows; a step without any is left out, and tau_sim ends before it.
    """
    loss, acceptance, hits, live, masked_in = sums.cpu()
    alphas = acceptance / live.clamp_min(1)
    known = int((live > 0).cumprod(0).sum())  # steps before the first of which there was no row
    count = weights.count(live)
    mean = float((loss * weights.weight / weights.drawn).sum() / count) if count else 0.0
    values = {"loss": mean, "tau_sim": tau_sim(alphas[:known])}
    values["top1"] = float(hits[0] / masked_in[0].clamp_min(1))
    return values | {f"a{i}": float(a) for i, a in enumerate(alphas) if live[i]}


def of_several(tokens_per_s: float, waited: list[float]) -> dict[str, float]:
    """What is worth saying of a run of several processes, from the share of the time that each waited for the others."""
    if len(waited) == 1:
        return {}
    shortest = min(waited)  # of the slowest process: nobody kept it waiting
    mean = sum(waited) / len(waited)
    return {
        "tokens_per_s_gpu": tokens_per_s / len(waited),
        "wait_reduce": shortest,
        "wait_slowest": mean - shortest,
    }


def eval_values(report: TauReport, weights: StepWeights) -> dict[str, float]:
    means = report.overall
    known = [(i, loss, n) for i, (loss, n) in enumerate(zip(means.loss, means.num_live, strict=True)) if loss is not None]
    count = float(weights.count(torch.tensor(means.num_live, dtype=torch.float64)))
    total = sum(float(weights.weight[i]) * loss * n for i, loss, n in known) / count
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
    finite = features.g.isfinite().all()
    return finite if features.f is None else finite & features.f.isfinite().all()


class StopSignal:
    """Remembers SIGTERM or SIGINT instead of dying of it; `early`, before there is a step to end, it raises StoppedEarly. A
    second one of them does kill. Processes that are forked meanwhile die of the first."""

    failed = False

    def __init__(self, early: bool = False):
        self.early = early

    def __enter__(self) -> StopSignal:
        self.number: int | None = None
        self.since = math.inf  # time.monotonic() of the signal
        self._process = os.getpid()
        self._before = {s: signal.signal(s, self._remember) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.number, self.since = number, time.monotonic()
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != self._process:
            signal.raise_signal(number)
        if self.early:
            raise StoppedEarly(number)

    def agreed(self, failed: bool = False) -> bool:
        """True on every rank once any rank got a signal; so is `self.failed` once any has `failed`."""
        of_all = mesh.largest(WRITE_FAILED * failed + (self.number or 0))
        self.failed, number = of_all >= WRITE_FAILED, of_all % WRITE_FAILED
        if not number:  # but one may have come here meanwhile, which the next step tells the others
            return False
        self.number = number
        return True


def ends_waiting(stop: StopSignal) -> Callable[[float], None]:
    """What a process does each second while servers keep it waiting for states: it raises StoppedEarly where a signal came
    and the step cannot be ended in time."""

    def look(seconds: float) -> None:
        if stop.number is not None and min(seconds, time.monotonic() - stop.since) > STOP_S:
            raise StoppedEarly(
                stop.number,
                f"{signal.Signals(stop.number).name} came, and no server of target.url gave states for {STOP_S:g} s more, "
                "so the step under way was not ended; what came after the last checkpoint is lost",
            )

    return look


def write_run_files(config: Config, draft: BaseModel) -> None:
    run_dir = Path(config.run_dir)
    write_file(run_dir / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
    write_file(run_dir / "draft.json", json.dumps(draft.model_dump(mode="json"), indent=1).encode())
