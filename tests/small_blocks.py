"""Small runs of drafts that fill blocks, what the commands' tests of each such method do with one, drafts that are briefly
trained, and golden cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from small_runs import losses
from test_decode import prompts
from tiny import tiny_llama
from torch import nn

from bench.block_work import block_engine
from fastdraft.batch import Batch
from fastdraft.decode import generate
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.golden import BlockGolden
from fastdraft.model.dflash.loss import StepLoss
from fastdraft.model.methods import METHODS
from fastdraft.target.hf import Target

# Blocks that draft four tokens by two layers.
OVERRIDES = {
    "dflash": {"block_size": 5, "num_hidden_layers": 2},
    "dspark": {"block_size": 4, "num_hidden_layers": 2, "markov_rank": 8},
    "dflash2": {"block_size": 5, "num_hidden_layers": 2, "selector_rank": 8, "selector_top_k": 6},
}


MASK = 190  # of a draft that `train_briefly` makes


class Trained(NamedTuple):
    target: Target
    draft: nn.Module
    prompts: list[list[int]]
    texts: list[list[int]]  # the target's own answers


def train_briefly(
    method: str,
    fields: dict[str, Any],  # of the draft's shape
    loss: StepLoss,
    steps: int,
    std: float = 0.1,  # of untrained weights
    start: Callable[[nn.Module], None] = lambda draft: None,  # changes them
    facts: dict[str, Any] | None = None,  # that the draft is told of its target besides
) -> Trained:
    """A draft, of two layers where `fields` say nothing else, that gets about half of its target's text right."""
    model = tiny_llama(0, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, initializer_range=0.15)
    fields = {"mask_token_id": MASK, "num_hidden_layers": 2} | fields
    shape = METHODS[method].shape.from_target(model.config.to_dict() | (facts or {}), **fields)
    target, draft = Target(model, shape.layers), METHODS[method].draft(shape)
    draft.init_weights(std, torch.Generator().manual_seed(0))
    start(draft)
    draft.take_from_target(target.embedding)
    asked = prompts()
    texts = [generate(target, None, prompt, 40).tokens for prompt in asked]
    ids = [torch.tensor(prompt + text) for prompt, text in zip(asked, texts, strict=True)]
    mask = torch.cat([torch.arange(len(x)) >= len(prompt) for x, prompt in zip(ids, asked, strict=True)])
    batch = Batch(torch.cat([x.where(x != MASK, MASK - 1) for x in ids]), mask, tuple(map(len, ids)))
    features = target.capture(batch)
    engine = block_engine(draft, target.head, loss, lambda batch, step: draw_anchors(batch, 64, 0, step))
    optimizer = torch.optim.AdamW(draft.trainable().values(), lr=5e-3)
    for step in range(1, steps + 1):
        grads = flat_gradients(draft.trainable())
        engine.begin(step)
        rows = engine.step(batch, features, grads)
        for name, p in draft.trainable().items():
            p.grad = grads[name] / rows.live.sum()
        optimizer.step()
    return Trained(target, draft, asked, texts)


def block_run(tree: dict, folder: Path, method: str) -> Path:
    """Writes the settings of `tree`, changed in place to a run of the method, and returns the file. Those of EAGLE-3 are
    left as they are."""
    if method != "eagle3":
        del tree["ttt_length"]
        tree["draft"] = {"method": method, "overrides": OVERRIDES[method]}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def train_stop_and_resume(runs, run_yaml: Path, run: Path) -> tuple[str, list[dict]]:
    """What training said, and its records with a loss: it learns, and stopped at half its steps it goes on as if it had
    not been."""
    said = runs("train", run_yaml, "max_steps=30", "checkpoint.every=15", "checkpoint.keep=9")
    records = losses(run)
    trained = [record for record in records if "loss" in record]
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.1 and "a3" in trained[0] and "a4" not in trained[0]
    for path in (run / "checkpoints").glob("step-*30"):
        path.rename(path.with_name("aside"))
    assert "going on from" in runs("train", run_yaml, "max_steps=30", "checkpoint.every=15", "checkpoint.keep=9")
    assert losses(run) == records
    return said, trained


def decode_all_ways(runs, run: Path, prompts: Path) -> None:
    """Held-out acceptance, and real decoding: drawn tokens verified one by one and as a block, and greedy."""
    for decoding in ((), ("--temperature", 1), ("--temperature", 1, "--verify", "block")):
        more = ("--max-prompts", 2, "--max-new-tokens", 12, "--num-steps", 4, *decoding)
        report = json.loads(runs("evaluate", run, "--prompts", prompts, *more))
    assert report["decode"]["settings"]["verify"] == "block"
    assert len(report["held_out"]["overall"]["acceptance"]) == 4 and report["decode"]["num_tokens"] == 24
    greedy = json.loads(runs("evaluate", run, "--prompts", prompts, "--max-prompts", 2, "--max-new-tokens", 12))
    assert greedy["decode"]["num_equal"] == 2


def in_float64(case: BlockGolden) -> BlockGolden:
    """The case with float64 frequencies, as its trainer had them; a draft's are float32, as transformers makes them."""
    dim = case.draft.config.head_dim
    case.draft.rope.freqs = 1.0 / (10000.0 ** (torch.arange(0, dim, 2).double() / dim))
    return case
