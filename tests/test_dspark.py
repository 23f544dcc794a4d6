"""A DSpark draft through the commands a user types: init, plan, train, resume, evaluate, export, check; bad input."""

from __future__ import annotations

import json

import pytest
import yaml
from safetensors.torch import load_file
from small_blocks import block_run, decode_all_ways, train_stop_and_resume
from small_runs import losses
from tiny import refusal, write_chats


@pytest.fixture
def run_yaml(tree, tmp_path):
    return block_run(tree, tmp_path, "dspark")


def test_a_draft_goes_through_the_commands(run_yaml, runs, target_dir, tmp_path):
    run, prompts = tmp_path / "run", write_chats(tmp_path / "prompts.jsonl", 4, turns=1)
    init = runs("init", target_dir, "--method", "dspark")
    assert "# DSpark draft for" in init and "labels" not in yaml.safe_load(init)
    assert yaml.safe_load(init)["markov_rank"] == 256 and yaml.safe_load(init)["block_size"] == 7
    assert "draft's attention" in runs("train", run_yaml, "--plan")

    said, trained = train_stop_and_resume(runs, run_yaml, run)
    assert "blocks of 4 rows draft 4 tokens (shifted labels) from the target's layers [1, 5]" in said
    assert "not exported" not in said
    decode_all_ways(runs, run, prompts)

    out = tmp_path / "out"
    runs("export", run, out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"] and config["model_type"] == "qwen3"
    at_root = {
        "block_size": 4,
        "target_layer_ids": [1, 5],
        "mask_token_id": 187,
        "markov_rank": 8,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": True,
    }
    assert {name: config[name] for name in at_root} == at_root
    assert config["dflash_config"] == {"target_layer_ids": [1, 5]}  # all that vLLM 0.26 looks for there
    shapes = {name: list(t.shape) for name, t in load_file(out / "model.safetensors").items()}
    assert not {"embed_tokens.weight", "lm_head.weight"} & shapes.keys()
    heads = {name: shape for name, shape in shapes.items() if "head" in name}
    assert heads == {
        "markov_head.markov_w1.weight": [192, 8],
        "markov_head.markov_w2.weight": [192, 8],
        "confidence_head.proj.weight": [1, 40],
        "confidence_head.proj.bias": [1],
    }
    assert "verified for SGLang and vLLM" in runs("check", "--checkpoint", out, "--target", target_dir)
    warm = ("draft.overrides={}", f"draft.init_from={out}", f"run_dir={tmp_path / 'warm'}", "optim.lr=1e-5")
    runs("train", run_yaml, *warm)
    assert losses(tmp_path / "warm")[0]["loss"] < trained[0]["loss"] - 0.1


def test_a_run_is_kept_under_its_methods_name(run_yaml):
    from fastdraft.config import load_config

    tree = yaml.safe_load(run_yaml.read_text())
    del tree["run_dir"]
    run_yaml.write_text(yaml.safe_dump(tree))
    assert load_config(run_yaml).run_dir == "runs/dspark"
    assert load_config(run_yaml, ["draft={}"]).run_dir == "runs/eagle3"
    assert load_config(run_yaml, ["run_dir=mine"]).run_dir == "mine"


def test_the_plan_says_what_dsparks_loss_is(run_yaml, runs):
    said = runs("train", run_yaml, "--plan", "block.ce_weight=0.2")
    law = (
        "A slot's loss is 0.2 times the cross entropy with the data's own token, 0.9 times the L1 distance from the "
        "target's distribution, and 1 times the confidence head's. Drafted token j = 0, 1, ... of a block weighs "
        "exp(-j / 4)"
    )
    assert law in said and "The loss ce" not in said


def test_dsparks_settings_are_not_dflashs(run_yaml, fastdraft):
    line = refusal(fastdraft("train", run_yaml, "draft={method: dflash}", "block.ce_weight=0.3"))
    assert "block.ce_weight is DSpark's, and draft.method is dflash" in line
