"""Small runs of drafts that fill blocks, what the commands' tests of each such method do with one, and golden cases."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from small_runs import losses

from fastdraft.model.dflash.golden import BlockGolden

# Blocks that draft four tokens by two layers.
OVERRIDES = {
    "dflash": {"block_size": 5, "num_hidden_layers": 2},
    "dspark": {"block_size": 4, "num_hidden_layers": 2, "markov_rank": 8},
    "dflash2": {"block_size": 5, "num_hidden_layers": 2, "selector_rank": 8, "selector_top_k": 6},
}


def block_run(tree: dict, folder: Path, method: str) -> Path:
    """Writes the settings of `tree`, changed in place to a run of the method, and returns the file."""
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
