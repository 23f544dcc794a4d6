"""The run's configuration: one YAML file plus dotted overrides, checked by pydantic; unknown keys name their neighbour."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fastdraft.batch import LossKind
from fastdraft.data.config import DataConfig
from fastdraft.metrics import MetricsConfig

M = TypeVar("M", bound=BaseModel)
Beta = Annotated[float, Field(ge=0, lt=1)]

# Keys that older versions had. A config that still holds one is told what to do instead.
REMOVED = {
    "engine": "it is called step now, and is fused (as engine: auto was) or reference",
    "features.memory_gib": (
        "take it out; to keep features in host memory, write features: {path: DIR, mode: cache, max_gib: N} "
        "with DIR on a tmpfs such as /dev/shm"
    ),
}


class Section(BaseModel):
    """A section of the file, or a part of one. Keys that it does not have are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TargetConfig(Section):
    """The frozen target, and who runs it."""

    path: str  # local directory or hub name
    # The target is run in it. auto is bf16, but fp32 on a CPU that is slower in bf16. An export has the dtype that
    # the target's config.json names.
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    trust_remote_code: bool = False
    # Servers of `fastdraft serve-target` that run the target instead of this process (docs/served.md). dtype: auto is then
    # theirs, and `path` gives config, tokenizer, embedding and head.
    url: Annotated[list[str], BeforeValidator(lambda url: [url] if isinstance(url, str) else url)] = []
    timeout_s: float = Field(600.0, gt=0)  # with url: how long no server may give states before the run ends

    @property
    def files(self) -> tuple[str, bool]:
        """Where its files are, and whether the code among them may run."""
        return self.path, self.trust_remote_code


class DraftSection(Section):
    """The draft to train: its method, its shape, and what it starts from."""

    method: str = "eagle3"  # one of fastdraft.model.methods
    config: str | None = None  # YAML of `fastdraft init`; None: derived from the target
    vocab_map: str | None = None  # a SpecForge vocab_mapping.pt; None: the tokens trained on most often
    overrides: dict[str, Any] = {}  # DraftConfig fields, e.g. draft_vocab_size or layers; they win over `config`
    init_from: str | None = None  # warm start from an EAGLE-3 checkpoint in serving format, shape and vocabulary included
    # Of a new draft. target: what the method's `start.py` takes of the target, where their shapes allow it.
    init: Literal["target", "random"] = "target"


class LossConfig(Section):
    """The loss of EAGLE-3's chains (docs/mathematics.md)."""

    kind: LossKind = "kl"
    step_decay: float = Field(0.6, gt=0, le=1)  # weight of TTT step i is step_decay ** i
    lk_scale: float = Field(1.0, ge=0)  # of lk_lambda alone, as lk_decay
    lk_decay: float = Field(1.0, ge=0)


class BlockSection(Section):
    """How drafts that fill blocks are trained (docs/dflash.md, docs/dspark.md)."""

    # ce: the data's token; dpace: the same, weighed by what a server would accept; the others: the target's distribution.
    # Of DFlash, whose own is dpace, and DFlash2, whose own is ce; DSpark has its own three terms.
    loss: Literal["ce", "dpace", "kl", "lk_alpha", "lk_lambda"] | None = None
    anchors: int = Field(512, gt=0)  # blocks of a document at most, at every step others
    gamma: float | None = Field(None, gt=0)  # weight of step j is exp(-j / gamma); None: by block_size, 7 for 16
    dpace_alpha: float = Field(0.5, ge=0, lt=1)  # of dpace alone
    lk_scale: float = Field(1.0, ge=0)  # of lk_lambda alone, as lk_decay
    lk_decay: float = Field(1.0, ge=0)
    # The terms of DSpark's loss: cross entropy with the data's token, L1 distance from the target, the confidence head's.
    ce_weight: float = Field(0.1, ge=0)
    l1_weight: float = Field(0.9, ge=0)
    confidence_weight: float = Field(1.0, gt=0)  # above 0, because engines read the head whether it is trained or not
    selector_alpha: float = Field(1.0, ge=0)  # of the selector's loss beside the slots', of draft.method dflash2 alone


class FeaturesConfig(Section):
    """The feature store that a run reads or fills (docs/features.md)."""

    path: str | None = None  # the store's folder; None: the target runs in every epoch
    mode: Literal["read", "cache"] = "read"  # read: all was captured before; cache: filled as documents come
    max_gib: float | None = Field(None, gt=0, le=2**20)  # of disk for the cache
    on_bad_shard: Literal["error", "skip"] = "error"  # skip: documents of damaged shards are left out, with a count

    @model_validator(mode="after")
    def _one_source(self) -> FeaturesConfig:
        if self.path is None and (self.mode == "cache" or self.max_gib is not None):
            raise ValueError("features.mode and features.max_gib are of a store; name its folder as features.path")
        if (self.mode == "cache") != (self.max_gib is not None):
            raise ValueError("features.max_gib says how much of the disk mode: cache may fill; it needs both or neither")
        return self


class OptimConfig(Section):
    """Muon and AdamW, and how their rates go (docs/recipe.md)."""

    MUON_TIMES: ClassVar[int] = 4  # AdamW's rate: the best of five rates of Muon's for a draft 576 wide (docs/quality.md)

    lr: float = Field(1e-4, gt=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    warmup_ratio: float = Field(0.015, ge=0, le=1)  # share of all steps
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: the rate stays until it falls over the last wsd_decay of all steps
    wsd_decay: float | None = Field(None, gt=0, le=1)  # of wsd alone; None: 0.2 of all steps
    optimizer: Literal["adamw", "muon"] = "muon"  # for matrices; embeddings, heads and norms are AdamW's all the same
    muon_lr: float | None = Field(None, gt=0)  # of muon alone, as what follows; None: 4 lr. Both follow the schedule
    muon_momentum: float | None = Field(None, ge=0, lt=1)  # None: 0.95
    muon_weights: list[str] | None = None  # names, * stands for anything; None: all matrices but the method's tables
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(0.5, gt=0)  # global gradient norm after the division by N
    packs_per_step: int = Field(8, gt=0)  # the global batch, in packs of data.pack_tokens, over all GPUs; at most an epoch

    @model_validator(mode="after")
    def _settings_are_of_what_is_used(self) -> OptimConfig:
        if self.wsd_decay is not None and self.schedule != "wsd":
            raise ValueError(
                f"wsd_decay {self.wsd_decay} is of schedule: wsd, and schedule is {self.schedule}, which falls from "
                "the warm-up on; set schedule=wsd, or take it out"
            )
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_share > 1:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio} and wsd_decay {self.decay_share} are more than all steps together; "
                "lower one of them"
            )
        given = [name for name in ("muon_lr", "muon_momentum", "muon_weights") if getattr(self, name) is not None]
        if given and self.optimizer != "muon":
            raise ValueError(
                f"{given[0]} is of optimizer: muon, and optimizer is {self.optimizer}; set optimizer=muon, or take it out"
            )
        return self

    @property
    def decay_share(self) -> float:
        return 0.2 if self.wsd_decay is None else self.wsd_decay

    @property
    def muon_rate(self) -> float:
        return self.MUON_TIMES * self.lr if self.muon_lr is None else self.muon_lr

    @property
    def momentum(self) -> float:
        return 0.95 if self.muon_momentum is None else self.muon_momentum

    def named(self) -> OptimConfig:
        """With what is left open named, but Muon's weights, which are a draft's (`run/draft.py` `named_optim`)."""
        own = {"wsd_decay": self.decay_share} if self.schedule == "wsd" else {}
        if self.optimizer == "muon":
            own |= {"muon_lr": self.muon_rate, "muon_momentum": self.momentum}
        return self.model_copy(update=own)


class CheckpointConfig(Section):
    """How often a run is written down. The best checkpoint by held-out tau_sim stays besides the last ones."""

    every: int = Field(500, gt=0)  # optimizer steps
    keep: int = Field(2, gt=0)


class EvalConfig(Section):
    """How often, and on how many packs, a draft is measured on held-out data."""

    every: int = Field(500, gt=0)  # optimizer steps
    max_packs: int = Field(64, gt=0)  # of more, those that lie evenly from the longest documents to the shortest


class DistConfig(Section):
    """How the processes of torchrun share a run: world = data x sequence x tensor, and data is what is left."""

    sequence: int = Field(1, ge=1)  # GPUs that share the tokens of a pack
    tensor: int = Field(1, ge=1)  # GPUs that share the draft's weights
    # With replicated every GPU holds the whole target, with sharded each 1/n of every layer; auto shards what does not fit.
    target: Literal["auto", "replicated", "sharded"] = "auto"
    silent_s: float = Field(40.0, ge=5)  # seconds without a sign of life of a process, after which all others end
    # Seconds that a living process may take for a piece of work (a pack's forward, a step of the draft), or five times as
    # long as ever before, until all end. The first two pieces of a kind have timeout_s.
    stuck_s: float = Field(60.0, ge=5)
    disk_s: float = Field(600.0, ge=5)  # the same for a checkpoint to be written and data or features to be read
    timeout_s: float = Field(1800.0, gt=0)  # seconds that processes wait for one that lives and does not come


class Config(Section):
    """Everything a run depends on. `load_config` builds it from YAML and overrides."""

    target: TargetConfig
    data: DataConfig
    draft: DraftSection = DraftSection()
    features: FeaturesConfig = FeaturesConfig()
    loss: LossConfig = LossConfig()
    block: BlockSection = BlockSection()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    metrics: MetricsConfig = MetricsConfig()
    dist: DistConfig = DistConfig()
    run_dir: str = ""  # runs/ and the draft's method where it is left out
    ttt_length: int = Field(7, ge=1, le=12)
    # A chain that ran a step is trained on the next one with this probability, and that step's loss weighs as much more. So
    # the expected gradient is that of all steps, for less work. With 1 every chain runs all ttt_length steps.
    sampled_depth: float = Field(1.0, ge=0.1, le=1)
    epochs: int = Field(1, gt=0)
    max_steps: int | None = Field(None, gt=0, le=10**9)  # optimizer steps; wins over epochs
    step: Literal["fused", "reference"] = "fused"  # reference: the same step in plain PyTorch, slow and easy to read
    # The fused step runs so many chains, or blocks of a method that has them, at a time. None: as many as 3.75 GiB hold.
    chunk_rows: int | None = Field(None, gt=0)
    # The draft is computed in it. auto is as target.dtype's, chosen once and recorded, so that a run goes on in what it was
    # begun in. fp8 is bf16 with most products of a training step in float8, on GPUs of compute capability 8.9 or newer.
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(0, ge=0, lt=2**64)  # of the draft's first weights and what a step draws; data.seed is the order's

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Config:
        self.run_dir = self.run_dir or f"runs/{self.draft.method}"
        if self.precision == "fp8" and self.step == "reference":
            raise ValueError("precision: fp8 is the fused step's; set step=fused or precision=bf16")
        if self.sampled_depth < 1 and self.ttt_length == 1:
            raise ValueError(
                f"sampled_depth {self.sampled_depth} leaves out later steps of a chain, and ttt_length 1 has none; take it "
                "out, or raise ttt_length"
            )
        if self.target.url and self.features.mode == "cache":
            raise ValueError(
                "features.mode: cache keeps what a target in this process gives, and target.url names servers; fill a "
                "store with `fastdraft features capture`, or leave out features"
            )
        if self.target.url and self.dist.tensor * self.dist.sequence > 1 and self.features.path is None:
            raise ValueError(
                "processes that share a pack (dist.tensor, dist.sequence) need the same features bit for bit, and two "
                "answers of a server may differ in their last bits; leave both at 1, or fill a store with `fastdraft "
                "features capture`"
            )
        if self.data.streaming and self.max_steps is None:
            raise ValueError("data.streaming needs max_steps: how long a stream is, is not known before its end")
        if self.data.streaming and self.features.path is not None and self.features.mode != "cache":
            raise ValueError("data.streaming cannot read a store: it knows no document beforehand; set features.mode=cache")
        return self


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Reads YAML, applies `a.b=value` overrides (values are YAML), validates. Raises ValueError with one line per fault."""
    tree = read_yaml(path)
    for text in overrides:
        _override(tree, text)
    return parse_config(tree, Config)


class _Loader(yaml.SafeLoader):
    """YAML in which a key with two values is an error: PyYAML alone would take the last, and say nothing."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {key.value!r} has two values; leave one", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def read_yaml(path: str | Path, what: str = "config file") -> dict[str, Any]:
    """A YAML mapping from a file. Raises ValueError, which says what it is for, when it is missing or something else."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {path} is not YAML: {_place_of(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{what} {path} is nested too deeply") from error
    if not isinstance(tree, dict):
        found = "has no key" if tree is None else f"is {type(tree).__name__}"
        raise ValueError(f"{what} {path} must be a mapping of keys, it {found}")
    if strange := [key for key in tree if not isinstance(key, str)]:
        raise ValueError(f"{what} {path} has the key {strange[0]!r}; keys are words, put it in quotes if it is one")
    return tree


def _place_of(error: Exception) -> str:
    """PyYAML's sentence on one line, the place first."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark, said = error.problem_mark, ", ".join(part for part in (error.context, error.problem) if part)
    tabs = "; indent by spaces, since YAML takes no tabs there" if "'\\t'" in said else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {said}{tabs}"


def parse_config(tree: dict[str, Any], model: type[M]) -> M:
    """Validates a tree; every fault of the input becomes one line of a ValueError."""
    try:
        parsed = model.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(fault, model) for fault in error.errors())) from error
    idle = _idle(parsed) if isinstance(parsed, Config) else ()
    if faults := [*_misread(tree, model), *idle]:
        raise ValueError("\n".join(faults))
    return parsed


def without_removed(tree: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config without the keys of REMOVED, so that runs of older versions are still read."""
    tree = copy.deepcopy(tree)
    if tree.get("engine") == "reference":
        tree["step"] = "reference"
    for key in REMOVED:
        *parents, leaf = key.split(".")
        section = tree
        for name in parents:
            section = section.get(name, {})
        section.pop(leaf, None)
    return tree


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"override {text!r} is not of the form key.subkey=value")
    *parents, leaf = key.split(".")
    for name in parents:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise ValueError(f"override {text!r}: {name} is a value, not a section")
    try:
        tree[leaf] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {text!r}: the value is not YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"override {key!r}: the value is nested too deeply") from error


def _explain(fault: dict[str, Any], model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        if model is Config and where in REMOVED:
            return f"key {where!r} is no longer a setting; {REMOVED[where]}"
        known = _known_keys(model, fault["loc"][:-1])
        if hint := missing_space(str(fault["loc"][-1]), known):
            return f"unknown key {where!r}; {hint}"
        near = nearest_key(str(fault["loc"][-1]), known)
        hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {where!r}; {hint}"
    if fault["type"] == "missing":
        return f"missing key {where!r}"
    given = "" if isinstance(fault["input"], dict) else f" (given: {fault['input']!r})"
    message = fault["msg"].removeprefix("Value error, ")
    if model is Config and where == "epochs" and fault["type"] == "int_from_float":
        message = "the data are read a whole number of times; for a shorter run set max_steps, in optimizer steps"
    if fault["type"] == "model_type":
        example = f"{where}.{_known_keys(model, fault['loc'])[0]}"
        message = f"this is a section of settings, such as {example}, and no value"
    if fault["type"] == "list_type" and isinstance(fault["input"], str):
        message = f"this is a list, in brackets: [{fault['input']}]"
    return f"{where}: {message}{given}" if where else message


def missing_space(key: str, known: Collection[str]) -> str | None:
    """What is wrong with a key such as `lr:0.001`, which YAML reads as one word without a value."""
    name, colon, _ = key.partition(":")
    return f"YAML wants a space behind the colon of {name!r}" if colon and name in known else None


def nearest_key(key: str, known: Collection[str]) -> str | None:
    """The known key that an unknown one most likely means: one with all of its words or with just its letters, or one spelt
    much alike. None: no key is so near that naming it would help."""
    words = set(key.split("_"))
    whole = [name for name in known if words <= set(name.split("_")) or sorted(key) == sorted(name)]
    near = difflib.get_close_matches(key, whole or known, n=1, cutoff=0 if whole else 0.8)
    return near[0] if near else None


def _misread(tree: dict[str, Any], model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A sentence for each value that pydantic takes and no user means: a truth value as a number, where `true` would be 1,
    and an empty text, which as a path would be the current folder."""
    for name, value in tree.items():
        kind = model.model_fields[name].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _misread(value, kind, f"{prefix}{name}.") if isinstance(value, dict) else ()
        elif isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            yield f"{prefix}{name}: Input should be a number (given: {value})"
        elif value == "" or (isinstance(value, list) and "" in value):
            yield f"{prefix}{name} is empty; give it a value or leave it out"


def _idle(config: Config) -> Iterator[str]:
    """A sentence for each setting that was changed and that nothing reads beside the others. A validator would refuse it of
    a run that an older version began, too, which is still to be evaluated and exported."""
    if config.features.on_bad_shard != "error" and not reads_store(config):
        yield (
            "features.on_bad_shard is of a store that training reads; name its folder as features.path, with "
            "features.mode: read, or take it out"
        )
    for name in ("project", "run_name"):
        if not config.metrics.trackers and getattr(config.metrics, name) != type(config.metrics).model_fields[name].default:
            yield f"metrics.{name} is of metrics.trackers, which names none; name one of them, or take {name} out"


def _known_keys(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    for name in path:
        model = model.model_fields[str(name)].annotation
    return list(model.model_fields)


def reads_store(config: Config) -> bool:
    """Whether training has all features from a store, so that no layer of the target is run."""
    return config.features.path is not None and config.features.mode == "read"


def asks_servers(config: Config) -> bool:
    """Whether servers run the target, so that of it only embedding, head and final norm are loaded here."""
    return bool(config.target.url) and not reads_store(config)


def runs_target(config: Config) -> bool:
    """Whether this process runs the target's layers."""
    return not (reads_store(config) or asks_servers(config))
