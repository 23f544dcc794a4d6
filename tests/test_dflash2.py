"""A DFlash2 draft through the commands a user types: init, plan, train, resume, evaluate, export, check; bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_blocks import OVERRIDES, block_run, decode_all_ways, train_stop_and_resume
from small_runs import losses
from tiny import refusal, write_chats

from fastdraft.config import load_config
from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.target_config import read_target_config
from fastdraft.run.draft import muon_matrices

GOLDEN = Path(__file__).parent / "golden_methods"

BLOCKS = OVERRIDES["dflash2"]


@pytest.fixture
def run_yaml(tree, tmp_path):
    return block_run(tree, tmp_path, "dflash2")


def test_a_draft_goes_through_the_commands(run_yaml, runs, target_dir, tmp_path):
    run, prompts = tmp_path / "run", write_chats(tmp_path / "prompts.jsonl", 4, turns=1)
    init = runs("init", target_dir, "--method", "dflash2")
    assert "DFlash2 draft for" in init and yaml.safe_load(init)["selector_top_k"] == 16
    assert "draft's attention" in runs("train", run_yaml, "--plan")

    said, trained = train_stop_and_resume(runs, run_yaml, run)
    assert "blocks of 5 rows draft 4 tokens (fill_in labels) from the target's layers [1, 5]" in said
    decode_all_ways(runs, run, prompts)

    out = tmp_path / "out"
    runs("export", run, out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["DFlash2DraftModel"] and config["block_size"] == 5
    nested = {"target_layer_ids": [1, 5], "mask_token_id": 187, "block_size": 5, "conv_kernel_size": 2}
    assert config["dflash_config"] == nested | {"conv_group_size": 16, "selector_rank": 8, "selector_top_k": 6}
    tensors = load_file(out / "model.safetensors")
    assert tensors["layers.1.mlp_conv.base_kernel"].shape == (2, 2, 32)
    assert tensors["layers.0.attention_conv.kernel_projection.weight"].shape == (8, 32)
    assert tensors["candidate_selector.successor_codebook"].shape == (192, 8)
    assert "verified for SGLang and vLLM" in runs("check", "--checkpoint", out, "--target", target_dir)
    runs("train", run_yaml, "draft.overrides={}", f"draft.init_from={out}", f"run_dir={tmp_path / 'warm'}")
    warm = [record for record in losses(tmp_path / "warm") if "loss" in record]
    assert warm[0]["loss"] < trained[0]["loss"] - 0.1


def test_a_dflash_export_is_one_to_start_from(run_yaml, runs, tmp_path):
    """Step 1 from it has the loss of a DFlash run's, and the selector's beside it, which is then of logits alone."""
    plain = {"block_size": 5, "num_hidden_layers": 2}
    runs(
        "train", run_yaml, f"draft={json.dumps({'method': 'dflash', 'overrides': plain})}", f"run_dir={tmp_path / 'dflash'}"
    )
    runs("export", tmp_path / "dflash", tmp_path / "out")
    start = ("metrics.log_every=1", "max_steps=1", "seed=3", "block.loss=ce")
    found = {}
    for method, more in (("dflash", ()), ("dflash2", ("block.selector_alpha=0",)), ("dflash2", ())):
        name = f"{method}{len(more)}"
        draft = json.dumps({"method": method, "init_from": str(tmp_path / "out")})
        runs("train", run_yaml, f"draft={draft}", f"run_dir={tmp_path / name}", *start, *more)
        found[name] = next(record for record in losses(tmp_path / name) if "loss" in record)
    assert found["dflash21"]["loss"] == pytest.approx(found["dflash0"]["loss"], rel=1e-6)
    assert found["dflash21"]["a0"] == found["dflash0"]["a0"]
    assert found["dflash20"]["loss"] > found["dflash0"]["loss"] + 0.1


def test_muon_steps_all_matrices_but_the_codebooks(run_yaml, runs, tmp_path):
    muon = "optim.optimizer=muon"
    runs("train", run_yaml, muon, "max_steps=2")
    shape = DFlash2Config.from_target(read_target_config(load_config(run_yaml).target.path), mask_token_id=187, **BLOCKS)
    with torch.device("meta"):
        every = {name for name, p in DFlash2Draft(shape).trainable().items() if p.ndim == 2}
    stepped = {m.name for m in muon_matrices(load_config(run_yaml, [muon]), shape)}
    assert every - stepped == {f"candidate_selector.{name}_codebook" for name in ("predecessor", "successor")}


def test_the_plan_says_what_the_selector_learns(run_yaml, runs):
    said = runs("train", run_yaml, "--plan", "block.selector_alpha=0.5")
    assert "The loss ce compares a slot with the data's own token." in said
    candidates = BLOCKS.get("selector_top_k", 16)
    assert f"0.5 times the selector's cross entropy among the slot's {candidates} candidates" in said


def test_the_selectors_weight_is_no_other_methods(run_yaml, fastdraft):
    line = refusal(fastdraft("train", run_yaml, "draft={method: dflash}", "block.selector_alpha=0.5"))
    assert "block.selector_alpha is DFlash2's" in line


def test_check_replays_its_golden_case(runs, tmp_path):
    (tmp_path / "case.safetensors").write_bytes((GOLDEN / "dflash2.safetensors").read_bytes())
    for step in ("fused", "reference"):
        said = runs("check", "--golden", tmp_path, "--step", step)
        assert "dflash2 cpu fp64" in said and "row_loss" in said and "grad " in said
