"""Acceptance for GPU time: trains a small target's draft by several recipes and seeds, each for as many GPU seconds.

    python -m bench.quality --target DIR --answers answers.jsonl.gz --seconds 20 --recipes base:3,lr-2e-3

A recipe is a name and settings of `bench/quality.yaml`, or of another file of that form; with :3 it is trained with the
seeds 0, 1 and 2, which are those of its weights and of its order. Without --recipes all of the file are trained, with
--seeds 3 all with three seeds. A recipe may train on other answers: its data.paths are names in the folder of --answers.
Then --held-out must name conversations that none of the answers has, on which all recipes are measured.

All recipes run in this process, one after the other, by `fastdraft.train.train` itself: what is timed is what a user runs.
Of it four functions are wrapped here: what opens the source, so that the target is loaded once and its forwards are timed,
and the step, the evaluation and the checkpoint, so that the clock stands while held-out data are evaluated and while the
one checkpoint is written, at the end. What is decoded with is that checkpoint; the best is not kept.

A recipe's `then` is what changes when the share `after` of its steps is done: {after: 0.5, loss.kind: lk_alpha}. It is what
tells whether a setting of the run would be worth having: the same draft goes on with a second step, made for the changed
config.

With --steps a recipe has so many steps. With --seconds it has as many as take that long: a first run of TRIAL steps says
how fast it is. Either way the learning rate ends where the recipe lets it end.

--specforge DIR also trains SpecForge's own draft with its own optimizer (`bench/peers/specforge_recipe.py`), for
--peer-seconds, with each learning rate of --peer-lr and batch size of --peer-batch.

A row of bench/results/quality.jsonl:

provider, recipe, settings, seed    who trained, by what
steps, tokens                       optimizer steps, and tokens of all packs, trained on or not
seconds, target_seconds             of the loop, without evaluation and checkpoint; of these the target's forwards on the
                                    device
curve                               [steps, tokens, seconds, target_seconds, held-out tau_sim] at each evaluation
tau_sim, acceptance                 held-out at the end, over all steps; of each TTT step
chain, long_chain, tree             real decoding of held-out prompts, of seeds below --decode: accepted length, acceptance
                                    of each depth, seconds; what a method does not draft is left out
drawn_chain                         the same of a chain of 3 with tokens drawn at --temperature, where that is given
prompts, max_new_tokens             of how many prompts of the held-out data, how many tokens each

# T TTT steps
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import fastdraft.train
from bench.timing import append
from fastdraft import checkpoint
from fastdraft.batch import Batch, Features, Rows
from fastdraft.config import Config, load_config, read_yaml
from fastdraft.data.loader import eval_batches, eval_packs, read_pack
from fastdraft.data.prepare import Prepared
from fastdraft.decode import DecodeResult, generate, generate_batch
from fastdraft.dist.mesh import start_process
from fastdraft.evaluate import TauReport, evaluate_decode, evaluate_tau
from fastdraft.metrics import read_metrics
from fastdraft.model.method import DraftStep
from fastdraft.model.methods import METHODS, method_of
from fastdraft.model.proposal import DecodeSettings
from fastdraft.run.draft import draft_shape, fit_to_target, make_step, new_draft
from fastdraft.run.dtypes import check_precision, compute_dtype, name_dtypes
from fastdraft.run.finished import read_draft
from fastdraft.run.inputs import load_data, open_target
from fastdraft.target.hf import Target
from fastdraft.target.ragged import why_apart
from fastdraft.target.source import InProcess

HERE = Path(__file__).parent
TRIAL = 60  # steps of the run that says how long a step takes; the second half is timed
BLOCK = 5  # of which the median counts: whatever is compiled or recorded for the first time falls into few
POINTS = 6  # evaluations of a run
SAME_SPEED = (
    *("optim.lr", "optim.warmup_ratio", "optim.min_lr_ratio", "optim.schedule", "optim.wsd_decay", "optim.betas"),
    *("optim.clip", "optim.muon_lr", "loss.step_decay", "draft.init", "data.paths"),
)
# What no recipe sets: what all are measured on, and what the command line says.
SAME = ("target", "eval", "checkpoint", "seed", "max_steps", "run_dir")
SAME_SETTINGS = ("data.eval", "data.max_length", "data.train_on", "data.seed")
DECODED = {
    "chain": DecodeSettings(num_steps=3),
    "long_chain": DecodeSettings(num_steps=7),
    "tree": DecodeSettings(num_steps=3, eagle_topk=4, num_draft_tokens=16),  # as the demo's
}
DRAWN = "drawn_chain"
LONGEST_PROMPT = 512


class Clock:
    """Seconds of training, and of the target within them. It stands while something else is done."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._since = device, 0.0, None
        self._forwards: list[tuple[torch.cuda.Event, torch.cuda.Event] | float] = []
        self._target_seconds = 0.0

    def start(self) -> None:
        if self._since is None:
            self._wait()
            self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            self._wait()
            self.seconds += time.perf_counter() - self._since
            self._since = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward of the target, of which nothing waits for the end."""
        if self._since is None:  # of an evaluation
            yield
            return
        if self.device.type != "cuda":
            began = time.perf_counter()
            yield
            self._forwards.append(time.perf_counter() - began)
            return
        events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        events[0].record()
        yield
        events[1].record()
        self._forwards.append(events)

    @property
    def target_seconds(self) -> float:
        """While the clock stands."""
        for forward in self._forwards:
            self._target_seconds += forward if isinstance(forward, float) else forward[0].elapsed_time(forward[1]) / 1e3
        self._forwards.clear()
        return self._target_seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class KeptTarget(InProcess):
    """The source of all runs, whose target is loaded once."""

    def __init__(self, target: Target, clock: Clock | None = None):
        super().__init__(target)
        self.clock = clock

    def capture(self, batch: Batch) -> tuple[Batch, Features]:
        with self.clock.forward():
            return super().capture(batch)


@dataclass
class Timed:
    """A run's step. The clock goes from the beginning of a step to the next checkpoint or evaluation."""

    step_of_run: DraftStep
    clock: Clock
    trial: bool
    blocks: list[float] = field(default_factory=list)  # of a trial: seconds of BLOCK steps
    points: dict[int, tuple[float, float]] = field(default_factory=dict)  # by step: seconds, those of the target
    number: int = 0

    def begin(self, number: int) -> None:
        if self.trial and number > TRIAL // 2 and (number - TRIAL // 2 - 1) % BLOCK == 0:
            self.clock.stop()
            if number > TRIAL // 2 + 1:
                self.blocks.append(self.clock.seconds)
            self.clock.seconds = 0.0
        self.number = number
        self.clock.start()
        self.step_of_run.begin(number)

    def step(self, batch: Batch, features: Features, grads: dict[str, Tensor]) -> Rows:
        return self.step_of_run.step(batch, features, grads)

    def rows(self, batch: Batch, features: Features) -> Rows:
        return self.step_of_run.rows(batch, features)

    def pause(self) -> None:
        """Before a checkpoint is written, or an evaluation begins."""
        self.clock.stop()
        self.points[self.number] = self.clock.seconds, self.clock.target_seconds


class Replaced:
    """A run's step, and another in its place from an optimizer step on."""

    def __init__(self, first: DraftStep, second: DraftStep, after: int):
        self.now, self.second, self.after = first, second, after

    def begin(self, number: int) -> None:
        if number > self.after:
            self.now = self.second
        self.now.begin(number)

    def step(self, batch: Batch, features: Features, grads: dict[str, Tensor]) -> Rows:
        return self.now.step(batch, features, grads)

    def rows(self, batch: Batch, features: Features) -> Rows:
        return self.now.rows(batch, features)


@dataclass(frozen=True)
class Stick:
    """What all recipes are measured on: one target, one set of answers, one set of held-out prompts."""

    config: Config  # of `run` in the YAML file, its dtypes named
    target: Target
    data: Prepared
    prompts: list[list[int]]
    max_new_tokens: int
    plain: list[DecodeResult]  # the target's own output for the prompts
    folder: Path
    decoded: dict[str, DecodeSettings] = field(default_factory=lambda: DECODED)

    @property
    def device(self) -> torch.device:
        return self.target.device

    def judge(self, draft: nn.Module) -> dict[str, Any]:
        """Real decoding of the held-out prompts with a draft in the run's dtype."""
        found: dict[str, Any] = {"prompts": len(self.prompts), "max_new_tokens": self.max_new_tokens}
        for name, settings in self.decoded.items():
            try:
                method_of(draft).refuse_settings(draft.config, settings)
            except ValueError:  # a method that drafts no trees, or blocks of another length
                continue
            began = time.perf_counter()
            report = evaluate_decode(
                self.target, draft, self.prompts, settings, self.max_new_tokens, self.plain, len(self.prompts)
            )
            found[name] = {
                "accepted_length": report.accepted_length,
                "step_acceptance": report.step_acceptance,
                "seconds": time.perf_counter() - began,
                "num_equal": report.num_equal,
                "largest_logit_gap": report.largest_logit_gap,
            }
        return found


def open_stick(args: argparse.Namespace, folder: Path) -> Stick:
    config = recipe_config(args, {}, 0, folder / "none", 1)
    device = start_process(config.device)
    config, lines = name_dtypes(config, device)
    for line in lines:
        print(line, flush=True)
    target = open_target(config, draft_shape(config).layers, device)
    data = load_data(config, draft_shape(config))
    if not len(data.eval):
        raise ValueError("no conversation is held out; raise data.eval_fraction of the recipes' file, or give --held-out")
    prompts = held_out_prompts(data, config.data.pack_tokens, args.prompts)
    began = time.perf_counter()
    if why_apart(target) is None:
        plain = generate_batch(target, None, prompts, args.max_new_tokens, batch_size=len(prompts))
    else:
        plain = [generate(target, None, prompt, args.max_new_tokens) for prompt in prompts]
    print(f"the target alone: {sum(len(p.tokens) for p in plain)} tokens, {time.perf_counter() - began:.1f} s", flush=True)
    decoded = dict(DECODED)
    if args.temperature is not None:
        decoded[DRAWN] = DecodeSettings(num_steps=3, temperature=args.temperature)
    return Stick(config, target, data, prompts, args.max_new_tokens, plain, folder, decoded)


def held_out_prompts(data: Prepared, pack_tokens: int, count: int) -> list[list[int]]:
    """The tokens before a held-out conversation's first answer, of the first `count` conversations, the longest first."""
    prompts: list[list[int]] = []
    for batch in (read_pack(data.eval.with_format("arrow"), rows) for rows in eval_packs(data.eval, pack_tokens)):
        for ids, mask in zip(batch.input_ids.split(batch.lengths), batch.loss_mask.split(batch.lengths), strict=True):
            first = int(mask.long().argmax())
            if 0 < first <= LONGEST_PROMPT:
                prompts.append(ids[:first].tolist())
    return prompts[:count]


# --- our recipes ---------------------------------------------------------------------------------------------------------


def read_recipes(path: Path, names: str, seeds_of_all: int = 1) -> dict[str, tuple[dict[str, Any], int]]:
    """The settings of each recipe, with those of its method that it does not set itself, and how many seeds it has:
    `seeds_of_all` where it says nothing. ValueError for a name that is none, and for a part of the file that none reads."""
    tree, found = read_yaml(path), {}
    known, of_method = tree["recipes"], tree.get("of_method", {})
    if unknown := tree.keys() - {"run", "of_method", "recipes"}:
        raise ValueError(f"{path} has {min(unknown)!r}, which is neither run, of_method nor recipes")
    if unknown := of_method.keys() - METHODS.keys():
        raise ValueError(f"{path} has of_method {min(unknown)!r}, which is no method; there are {', '.join(METHODS)}")
    for wanted in names.split(",") if names else known:
        name, _, seeds = wanted.partition(":")
        if name not in known:
            raise ValueError(f"{path} has no recipe {name!r}; it has {', '.join(known)}")
        if seeds and not (seeds.isdigit() and int(seeds)):
            raise ValueError(f"{wanted!r} is not NAME:N with a number of seeds N")
        recipe = known[name] or {}
        found[name] = of_method.get(recipe.get("draft.method", "eagle3"), {}) | recipe, int(seeds or seeds_of_all)
    return found


def recipe_config(
    args: argparse.Namespace, recipe: dict[str, Any], seed: int, run_dir: Path, steps: int, points: int = POINTS
) -> Config:
    """A run's config, at its beginning. ValueError for a recipe that changes what all are measured on."""
    recipe = {key: value for key, value in recipe.items() if key != "then"}
    if moved := [key for key in recipe if key == "data" or key.startswith(SAME_SETTINGS) or key.split(".")[0] in SAME]:
        raise ValueError(f"a recipe sets {moved[0]}, which is the same for all recipes; take it out")
    tree = dict(read_yaml(args.config)["run"])
    tree["target"] = {"path": str(args.target)}
    tree["data"] = dict(tree.get("data", {})) | {"paths": [str(args.answers)], "num_workers": 0}
    if args.cache_dir is not None:
        tree["data"]["cache_dir"] = str(args.cache_dir)
    if args.held_out is not None:
        tree["data"]["eval_paths"] = [str(args.held_out)]
    tree |= {"run_dir": str(run_dir), "checkpoint": {"every": 10**6, "keep": 1}}
    settings = {**recipe, "seed": seed, "data.seed": seed, "max_steps": steps}
    if "data.paths" in recipe:
        settings["data.paths"] = other_answers(args, recipe["data.paths"])
    settings["eval.every"] = max(1, -(-steps // points))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(tree, file)
        file.flush()
        return load_config(file.name, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def changed_config(args: argparse.Namespace, recipe: dict[str, Any], seed: int, run_dir: Path, steps: int) -> Config | None:
    """What the run goes on with behind `after`; None for a recipe that never changes. ValueError for a change that no step
    alone can make."""
    if "then" not in recipe:
        return None
    then = dict(recipe["then"])
    if not 0 < then.pop("after", 0) < 1:
        raise ValueError("its `then` needs `after`, the share of the steps behind which it holds, between 0 and 1")
    if other := [key for key in then if key.split(".")[0] not in ("loss", "block")]:
        raise ValueError(f"its `then` sets {other[0]}, and only the loss can change on the way: loss.* or block.*")
    return recipe_config(args, recipe | then, seed, run_dir, steps)


def other_answers(args: argparse.Namespace, names: list[str]) -> list[str]:
    """Where the answers lie that a recipe trains on instead. ValueError where the held-out data would be others, too, and
    for a file that is not there."""
    paths = [args.answers.parent / name for name in names]
    if args.held_out is None:
        raise ValueError(
            f"it trains on {', '.join(names)}, of which other conversations would be held out; give all recipes the same "
            "with --held-out FILE, or leave it out of --recipes"
        )
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"it trains on {path}, which does not exist; make it by `fastdraft data regenerate --temperature` of the "
                f"prompts that {args.answers.name} answers, or leave it out of --recipes"
            )
    return [str(path) for path in paths]


def check_recipes(args: argparse.Namespace, recipes: dict[str, tuple[dict[str, Any], int]]) -> None:
    """Before anything long. ValueError names the recipe that cannot be trained here."""
    for name, (recipe, _) in recipes.items():
        try:
            for config in (
                recipe_config(args, recipe, 0, Path("none"), 1),
                changed_config(args, recipe, 0, Path("none"), 1),
            ):
                if config is not None:
                    METHODS[config.draft.method].check_config(config)
                    check_precision(config, start_process(config.device))
        except ValueError as error:
            raise ValueError(f"recipe {name}: {error}") from error


@contextmanager
def replaced(module: ModuleType, **functions: Callable) -> Iterator[None]:
    """Names of a module, while a run is timed."""
    before = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def train_timed(config: Config, stick: Stick, trial: bool = False, changed: Config | None = None, after: int = 0) -> Timed:
    """`train` of a config, from the beginning; behind step `after` with the step of `changed`."""
    clock, made = Clock(stick.device), []

    def timed_step(config: Config, *args: Any, **more: Any) -> Timed:
        step = make_step(config, *args, **more)
        if changed is not None:
            step = Replaced(step, make_step(changed, *args, **more), after)
        made.append(Timed(step, clock, trial))
        return made[-1]

    def kept_source(_config: Config, layers: tuple[int, ...], *_args: Any, **_more: Any) -> KeptTarget:
        if tuple(layers) != stick.target.layers:
            raise ValueError(f"the recipe reads layers {layers} of the target, all others {stick.target.layers}")
        return KeptTarget(stick.target, clock)

    def paused_evaluation(*args: Any, **more: Any) -> TauReport:
        made[-1].pause()
        return evaluate_tau(*args, **more)

    class PausedWriter(checkpoint.Writer):
        """Writes while nothing is timed, and no more than the checkpoints that the config asks for."""

        def save(self, *args: Any) -> None:
            made[-1].pause()
            super().save(*args)
            self.wait()

        def beats_best(self, tau_sim: float) -> bool:
            return False

    loop = {"make_step": timed_step, "open_source": kept_source, "evaluate_tau": paused_evaluation}
    with replaced(fastdraft.train, **loop), replaced(checkpoint, Writer=PausedWriter):
        fastdraft.train.train(config, fresh=True)
    clock.stop()
    return made[0]


def steps_for(args: argparse.Namespace, recipe: dict[str, Any], stick: Stick, known: dict[str, float]) -> int:
    """How many steps of a recipe take --seconds. `known` keeps the seconds of a step of recipes that are equally fast."""
    key = json.dumps({name: value for name, value in recipe.items() if name not in SAME_SPEED}, sort_keys=True)
    if key not in known:
        run_dir = stick.folder / "trial"
        timed = train_timed(recipe_config(args, recipe, 0, run_dir, TRIAL, points=1), stick, trial=True)
        shutil.rmtree(run_dir)
        known[key] = statistics.median(timed.blocks) / BLOCK
    return max(1, round(args.seconds / known[key]))


def run_recipe(args: argparse.Namespace, name: str, recipe: dict[str, Any], seed: int, steps: int, stick: Stick) -> dict:
    run_dir = stick.folder / f"{name}-{seed}"
    config = recipe_config(args, recipe, seed, run_dir, steps)
    changed = changed_config(args, recipe, seed, run_dir, steps)
    after = 0 if changed is None else round(recipe["then"]["after"] * steps)
    timed = train_timed(config, stick, changed=changed, after=after)
    evaluated = {line["step"]: line for line in read_metrics(run_dir) if "eval/tau_sim" in line}
    tokens = config.optim.packs_per_step * config.data.pack_tokens
    curve = [[step, step * tokens, *timed.points[step], line["eval/tau_sim"]] for step, line in sorted(evaluated.items())]
    _, draft = read_draft(run_dir, "last")
    shutil.rmtree(run_dir)
    draft.take_from_target(stick.target.embedding)
    draft.to(stick.device, compute_dtype(stick.config, stick.device))
    last = evaluated[max(evaluated)]
    judged = stick.judge(draft) if seed < args.decode else {}
    return row_of("fastdraft", name, recipe, seed, curve, last, judged)


def row_of(
    provider: str,
    name: str,
    settings: dict[str, Any],
    seed: int,
    curve: list[list[float]],
    last: dict[str, float],  # metrics of the last evaluation
    judged: dict[str, Any],
) -> dict[str, Any]:
    steps, tokens, seconds, target_seconds, tau = curve[-1]
    acceptance = [last[f"eval/a{i}"] for i in itertools.takewhile(lambda i: f"eval/a{i}" in last, itertools.count())]
    return {
        "provider": provider,
        "recipe": name,
        "settings": settings,
        "seed": seed,
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "target_seconds": target_seconds,
        "tau_sim": tau,
        "acceptance": acceptance,
        **judged,
        "curve": curve,
    }


# --- SpecForge's ---------------------------------------------------------------------------------------------------------


def run_peer(args: argparse.Namespace, lr: float, batch_size: int, seed: int, stick: Stick) -> dict:
    from bench.peers.specforge_recipe import SpecForgeRecipe

    make = lambda total: SpecForgeRecipe(  # noqa: E731
        stick, args.specforge, args.peer_attention, batch_size, lr, seed, total
    )
    trial, clock = make(1000), Clock(stick.device)
    for number in range(2 * args.peer_trial):
        if number == args.peer_trial:
            clock.start()
        trial.step(clock)
    clock.stop()
    steps = max(1, round(args.peer_seconds * args.peer_trial / clock.seconds))
    del trial

    peer, clock, curve, every = make(steps), Clock(stick.device), [], max(1, -(-steps // POINTS))
    tokens = 0
    for step in range(1, steps + 1):
        clock.start()
        tokens += peer.step(clock)
        if step % every == 0 or step == steps:
            clock.stop()
            report = held_out(stick, peer.as_ours())
            curve.append([step, tokens, clock.seconds, clock.target_seconds, report.overall.tau_sim])
    last = {f"eval/a{i}": a for i, a in enumerate(report.overall.acceptance)}
    settings = {"lr": lr, "batch_size": batch_size, "attention": args.peer_attention}
    name = f"lr {lr:g}, {batch_size} a batch"
    return row_of("specforge", name, settings, seed, curve, last, stick.judge(peer.as_ours()))


def held_out(stick: Stick, draft: nn.Module) -> TauReport:
    """What `train` says of held-out data, of any draft."""
    step = make_step(stick.config, draft, stick.target)
    batches = itertools.islice(eval_batches(stick.data.eval, stick.config.data.pack_tokens), stick.config.eval.max_packs)
    return evaluate_tau(
        lambda batch: step.rows(batch, stick.target.capture(batch.to(stick.device))),
        batches,
        len(method_of(draft).step_weights(stick.config, draft.config).weight),
    )


def fitted_draft(stick: Stick) -> nn.Module:
    """A draft with the vocabulary and embedding that all recipes have."""
    draft = new_draft(stick.config)
    fit_to_target(draft, stick.config, stick.target, stick.data.train)
    return draft.to(stick.device, compute_dtype(stick.config, stick.device))


# --- the program ---------------------------------------------------------------------------------------------------------


def numbers(text: str, kind: type = float) -> list:
    return [kind(x) for x in text.split(",") if x]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, type=Path, help="folder of the target")
    parser.add_argument("--answers", required=True, type=Path, help="its own answers, as data.paths")
    parser.add_argument("--config", type=Path, default=HERE / "quality.yaml")
    parser.add_argument(
        "--recipes", default="", help="names of the file, with commas, NAME:N for N seeds; none: all of the file"
    )
    parser.add_argument("--seeds", type=int, default=1, help="of each recipe for which --recipes says nothing else")
    parser.add_argument(
        "--held-out", type=Path, help="conversations held out for all recipes, instead of a part of --answers"
    )
    parser.add_argument("--temperature", type=float, help="decode a chain also with tokens drawn at this temperature")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, default=20.0, help="of a recipe's training loop")
    budget.add_argument("--steps", type=int, help="instead: optimizer steps of every recipe")
    parser.add_argument("--decode", type=int, default=10**6, help="decode with the drafts of so many seeds")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--specforge", type=Path, help="root of a SpecForge checkout")
    parser.add_argument("--no-ours", action="store_true", help="with --specforge: only it")
    parser.add_argument("--peer-lr", default="1e-4")
    parser.add_argument("--peer-batch", default="1", help="conversations of a batch; one number for all rates or one each")
    parser.add_argument("--peer-seconds", type=float, default=20.0)
    parser.add_argument("--peer-trial", type=int, default=15, help="steps that are timed, after as many others")
    parser.add_argument("--peer-attention", default="flex_attention", help="its default, or sdpa")
    parser.add_argument("--cache-dir", type=Path, help="of tokenised data")
    parser.add_argument("--work-dir", type=Path, help="for checkpoints, which are deleted; a tmpfs is quickest")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--commit", help="what to write in the rows where there is no git")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: a recipe is trained with one seed or more")
    if args.temperature is not None and args.temperature <= 0:
        raise ValueError(f"--temperature {args.temperature}: greedy decoding is measured anyway; give one above 0, or none")
    recipes = {} if args.no_ours else read_recipes(args.config, args.recipes, args.seeds)
    check_recipes(args, recipes)
    rates = numbers(args.peer_lr)
    batches = numbers(args.peer_batch, int)
    if len(batches) not in (1, len(rates)):
        raise ValueError(f"--peer-batch has {len(batches)} numbers for {len(rates)} learning rates; give one, or one each")
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        stick, known = open_stick(args, Path(folder)), {}
        if args.specforge is not None:
            for lr, batch_size in zip(rates, batches * (len(rates) // len(batches)), strict=True):
                say_and_write(run_peer(args, lr, batch_size, 0, stick), args)
        for seed in range(max((seeds for _, seeds in recipes.values()), default=0)):  # all recipes before any again
            for name, (recipe, seeds) in recipes.items():
                if seed < seeds:
                    steps = args.steps or steps_for(args, recipe, stick, known)
                    say_and_write(run_recipe(args, name, recipe, seed, steps, stick), args)


def say_and_write(row: dict[str, Any], args: argparse.Namespace) -> None:
    row = rounded(row) | {"target": args.target.name, "answers": args.answers.name}
    append("quality", row, args.commit, args.results)
    lengths = ", ".join(f"{name} {row[name]['accepted_length']:.3f}" for name in (*DECODED, DRAWN) if name in row)
    print(
        f"{row['provider']} {row['recipe']} seed {row['seed']}: {row['steps']} steps, {row['tokens']} tokens, "
        f"{row['seconds']:.1f} s ({row['target_seconds']:.1f} s the target's), tau_sim {row['tau_sim']:.4f}, {lengths}",
        flush=True,
    )


def rounded(x: Any) -> Any:
    """Floats with six digits."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


if __name__ == "__main__":
    main()
