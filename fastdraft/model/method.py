"""What a draft method is: everything that training, evaluation, decoding and export ask of it, in one tuple.

A method is a package beside `eagle3` that fills a `Method`, and one line in `methods.py`. Nothing else in fastdraft asks
which method it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdraft.batch import Batch, Ends, Features, Rows, StepWeights, TargetHead, TargetLayers
from fastdraft.model.proposal import DecodeSettings, Proposals
from fastdraft.model.reading import Reading

if TYPE_CHECKING:
    import numpy as np
    from pydantic import BaseModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from fastdraft.config import Config, DraftSection

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # the files of a draft in serving format
Precision = Literal["fp32", "bf16", "fp8"]
StepKind = Literal["reference", "fused"]


@dataclass(frozen=True)
class Row:
    name: str
    size: int  # bytes, or FLOPs per token among `Plan.flops`
    short_lived: bool = False  # memory that is free again between two steps


class Findings(NamedTuple):
    """What `verify` found, a sentence each. Errors: an engine would fail or draft wrongly. Warnings: legal, but look."""

    errors: list[str]
    warnings: list[str]


class DraftStep(Protocol):
    """Runs training steps of a draft against a target's head."""

    def begin(self, number: int) -> None:
        """The optimizer step, from 1, whose batches follow; what a step draws at random depends on it."""

    def step(self, batch: Batch, features: Features, grads: dict[str, Tensor]) -> Rows:
        """Losses and acceptance of a batch, and the gradient of their weighted sum added to `grads`, by parameter name.

        The sum is not normalised: the optimizer divides once, by `StepWeights.count` of the global batch.
        """

    def rows(self, batch: Batch, features: Features) -> Rows:
        """The same without any gradient."""


class Drafter(Protocol):
    """A draft at work on B sequences at once, each as if it were alone."""

    draft_ids: Tensor  # [Vd] int64, the target id of each token that can be drafted

    def propose(
        self,
        token_ids: Tensor,  # [B, r] int64, the tokens after the positions that the target has run since the last call
        g: Tensor,  # [B, r, ...] the target's states at these positions
        counts: list[int],  # B numbers of them that are a sequence's own; what lies behind are fillers
        depths: list[int],  # B, the most tokens that may be drafted one after the other
        settings: DecodeSettings,
        generators: list[torch.Generator],  # B
    ) -> Proposals:
        """What the target is to verify next."""

    def select(self, rows: list[int]) -> None:
        """Keeps these sequences and forgets the others."""


class Readings(NamedTuple):
    """How a checkpoint could be read, as documented or with one fault, and what is drafted so (`serving/parity.py`)."""

    every: Callable[[nn.Module, int], list[Reading]]  # of a draft and the number of its target's layers; documented first
    # Of the draft `read_as` the reading, the reading, the target's head, ids [L], g [L, ...], tokens [L-1, S]: its choice
    # at every place and step, and how far the token is below it as a share of the largest logit.
    run: Callable[[nn.Module, Reading, TargetHead, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class GoldenCase(Protocol):
    """A small step with what must come out, a dataclass."""

    name: str

    def inputs(self, device: str, dtype: torch.dtype) -> GoldenCase:
        """The same case with what goes in rounded to dtype, on a device; what must come out stays."""


class GoldenCases(NamedTuple):
    """How a method reads and replays golden cases, for `fastdraft check --golden`."""

    load: Callable[[Path], Any]  # a GoldenCase; ValueError, or KeyError for what its config lacks
    errors: Callable[[Any, StepKind], dict[str, float]]  # of a case on a kind of step, by quantity; gradients "grad NAME"
    law: Callable[[Any], dict[str, Any]]  # what must come out of a case by the reference, by field of the case


MEASURED_WIDTH = 576  # of SmolLM2-135M's draft, for which rates were measured (docs/quality.md)


def rates_to_try(
    width: int,  # of the draft to train
    lr: float,  # AdamW's best at MEASURED_WIDTH; beside Muon the one that it had
    muon_lr: float | None = None,  # Muon's best there; None: AdamW alone
) -> str:
    """A sentence for `recipe`."""
    share = min(1.0, MEASURED_WIDTH / width)
    low, mid, high = (share * (lr if muon_lr is None else muon_lr) * times for times in (0.5, 1, 2))
    three = f"{low:.1e}, {mid:.1e} and {high:.1e}"
    tried = f"optim.lr {three}" if muon_lr is None else f"optim.lr {share * lr:.1e} with optim.muon_lr {three}"
    if width < MEASURED_WIDTH:  # 1 / width would soon be a rate at which nothing trains
        known = "What is good for a narrower draft was not measured, and higher rates may be too high"
    else:
        known = "Good rates usually go with 1 / width, which was not measured here"
    return f"{known}: for this one, {width} wide, try {tried}, each in a short run."


class Method(NamedTuple):
    """A draft method. `shape` and `draft` are classes; what they must offer is said beside them."""

    # A pydantic model with vocab_size, draft_vocab_size, hidden_size, target_hidden_size, layers (those of the target that
    # are read, outputs from 0), initializer_range, num_parameters(), to_serving(dtype), from_target(config, **changes),
    # init_config(target_dir), the commented YAML of `fastdraft init`, and of the class architecture, its name in the
    # engines' config.json.
    shape: type[BaseModel]
    # A module made of a shape, which it keeps as `config`, with trainable(), frozen() (what a checkpoint holds beside the
    # trained weights), init_weights(std, generator) and take_from_target(embedding) (what a checkpoint leaves to it).
    draft: type[nn.Module]
    build_step: Callable[..., DraftStep]  # of config, draft, head, device; where processes share a step: tensor, sequence
    fit: Callable[[nn.Module, DraftSection, Ends, Callable[[], np.ndarray]], list[str]]  # a new draft to target and data
    step_cost: Callable[..., tuple[tuple[Row, ...], tuple[Row, ...]]]  # bytes of a step, FLOPs a token: for --plan
    pair_cost: Callable[[BaseModel, int, Config], float]  # attention's share of a document's cost, for dealing packs
    drafter: Callable[
        [nn.Module, TargetHead, int, int], Drafter
    ]  # of a draft for its target: B, and room for so many tokens
    serving_tensors: Callable[[nn.Module, torch.dtype], dict[str, Tensor]]  # ValueError when it is not fit to export
    load: Callable[[Path, dict[str, Any] | PretrainedConfig], nn.Module]  # a checkpoint in serving format, for a target
    verify: Callable[[dict[str, Any], Path, Path], Findings]  # config.json of a checkpoint, its and a target's directory
    step_weights: Callable[[Config, BaseModel], StepWeights]  # of the T steps that `Rows` has, for a draft's shape
    check_config: Callable[[Config], None]  # ValueError for settings that are another method's, or that it cannot have
    engine_names: dict[str, str]  # what each engine calls the method: vllm, sglang
    # A config as its runs are compared: what the method does not read has its default, and where None is the method's own
    # choice, that stands there. So a default that changed for other methods stops no run.
    settled: Callable[[Config], Config] = lambda config: config
    # Fields of the shape that the target's tokenizer decides, from it and the size of the vocabulary.
    from_tokenizer: Callable[[PreTrainedTokenizerBase, int], dict[str, Any]] | None = None
    refuse_settings: Callable[[BaseModel, DecodeSettings], None] = lambda shape, settings: None  # ValueError where it must
    # The steps that an engine is asked for, of a draft's shape and what the user asked for; ValueError where it must.
    served_steps: Callable[[BaseModel, int | None], int] = lambda shape, asked: 3 if asked is None else asked
    cost_options: Callable[[Config], dict[str, Any]] = lambda config: {}  # more of a config that `step_cost` reads
    # Settings that a step's memory falls with, chunk_rows among them, and the lowest value of each that makes sense.
    lowest: tuple[tuple[str, int], ...] = (("chunk_rows", 1),)
    step_rows: Callable[[Config], float] = lambda config: 1.0  # live rows of step 0 that `step_cost` counts for a token
    recipe: Callable[[Config, BaseModel], list[str]] = lambda config, shape: []  # how a step trains it and why, for --plan
    # After `fit`, of the draft, settings and the target's layers that its files have: copies what a new draft starts from.
    # Then, of a shape, what it would say of it, for --plan.
    start: Callable[[nn.Module, DraftSection, Callable[[], TargetLayers]], list[str]] = lambda draft, settings, read: []
    start_lines: Callable[[BaseModel, DraftSection, Callable[[], TargetLayers]], list[str]] = lambda shape, draft, read: []
    golden: GoldenCases | None = None  # cases that say in their config which method they are of; None: there are none
    # Names of weights of two dimensions that are no matrix between states: they have a row for each token, or for a number
    # that is asked for; * stands for anything. Muon leaves them to AdamW.
    tables: tuple[str, ...] = ()
    # ValueError where none of the documents can train a draft: of the set's name and its pieces, each with token ids [M]
    # and loss mask [M] of documents end to end and their lengths [n].
    refuse_useless: Callable[[str, Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]], None] = lambda name, pieces: None
    mask_token: Callable[[Any], int | None] = lambda shape: None  # of a shape: a token that no document may have
    readings: Readings | None = None  # None: no engine serves the method, and `check --engine` has nothing to compare
    has_vocabulary_map: bool = True  # whether a checkpoint holds d2t and t2d
    # For processes that share a step (config section dist); None where they cannot. Where the part of a parameter lies in
    # the whole one, by its name, the whole shape, rank and size; what leaves a whole draft with a rank's parts; and the
    # check that a shape divides, a ValueError where not.
    part: Callable[[str, Sequence[int], int, int], tuple[slice, ...]] | None = None
    cut: Callable[[nn.Module, int, int], None] | None = None
    check_cut: Callable[[BaseModel, int], None] | None = None
