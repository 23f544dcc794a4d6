"""The stick that recipes are measured with, in tiny form: its rows, its clock, what it refuses."""

from __future__ import annotations

import json
import time

import pytest
import torch
import yaml
from tiny import save_target, write_chats

import fastdraft.train
from bench.quality import Clock, main

RECIPES = {
    "run": {
        "draft": {"overrides": {"draft_vocab_size": 96}},
        "data": {"max_length": 64, "pack_tokens": 128, "eval_fraction": 0.2},
        "optim": {"lr": 5e-3, "packs_per_step": 1},
        "ttt_length": 3,
    },
    "recipes": {"base": {}, "slow": {"optim.lr": 1e-6}, "other target": {"target.dtype": "fp32"}, "typo": {"optim.rl": 1}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    save_target(folder / "target")
    write_chats(folder / "answers.jsonl", 40)
    (folder / "recipes.yaml").write_text(yaml.safe_dump(RECIPES))
    return folder


def measure(place, results, *more) -> list[dict]:
    files = ["--target", place / "target", "--answers", place / "answers.jsonl", "--config", place / "recipes.yaml"]
    dirs = ["--cache-dir", place / "cache", "--work-dir", results, "--results", results]
    main([str(x) for x in [*files, *dirs, "--prompts", 3, "--max-new-tokens", 6, "--commit", "here", *more]])
    path = results / "quality.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_recipes_and_seeds(place, tmp_path, monkeypatch):
    loaded, load = [], fastdraft.target.hf.load_target
    monkeypatch.setattr("fastdraft.run.inputs.load_target", lambda *a, **k: loaded.append(a) or load(*a, **k))
    before = dict(vars(fastdraft.train))
    rows = measure(place, tmp_path, "--recipes", "base:2,slow", "--steps", 6, "--decode", 1)
    assert len(loaded) == 1
    assert dict(vars(fastdraft.train)) == before  # the loop is itself again
    assert [(r["recipe"], r["seed"]) for r in rows] == [("base", 0), ("slow", 0), ("base", 1)]
    base, slow, again = rows
    for row in rows:
        assert (row["provider"], row["steps"], row["tokens"]) == ("fastdraft", 6, 6 * 128)
        assert [point[0] for point in row["curve"]] == [1, 2, 3, 4, 5, 6]
        assert row["curve"][-1][-1] == row["tau_sim"] == max(row["tau_sim"], 1.0) and len(row["acceptance"]) == 3
        seconds = [point[2] for point in row["curve"]]
        assert seconds == sorted(seconds) and 0 < row["target_seconds"] < row["seconds"]
    for row in (base, slow):
        assert row["prompts"] == 3 and row["chain"]["num_equal"] == 3
        assert row["chain"]["accepted_length"] >= 1 and row["tree"]["accepted_length"] >= 1
    assert "chain" not in again and "prompts" not in again
    assert base["tau_sim"] > slow["tau_sim"]  # it learned, and the recipe's settings were its own
    assert base["tau_sim"] != again["tau_sim"]
    assert not [path for path in tmp_path.iterdir() if path.name != "quality.jsonl"]  # no checkpoint is left


def test_seconds_become_steps(place, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.quality.TRIAL", 4)
    monkeypatch.setattr("bench.quality.BLOCK", 1)
    (row,) = measure(place, tmp_path, "--recipes", "base", "--seconds", 1.0)
    assert row["steps"] > 4 and 0.2 < row["seconds"] < 5


def test_the_clock_counts_training_alone():
    clock = Clock(torch.device("cpu"))
    clock.start()
    with clock.forward():
        time.sleep(0.02)
    clock.stop()
    with clock.forward():  # of an evaluation
        time.sleep(0.05)
    clock.start()
    clock.start()
    time.sleep(0.01)
    clock.stop()
    clock.stop()
    assert 0.03 <= clock.seconds < 0.05 and 0.02 <= clock.target_seconds < 0.03


@pytest.mark.parametrize(
    ("recipes", "says"),
    [
        ("other target", "sets target.dtype, which is the same for all recipes"),
        ("typo", "did you mean 'lr'"),
        ("nothing", "has no recipe 'nothing'; it has base, other target, slow, typo"),
        ("base:0", "not NAME:N"),
    ],
)
def test_recipes_that_cannot_be(place, tmp_path, recipes, says):
    with pytest.raises(ValueError, match=says):
        measure(place, tmp_path, "--recipes", recipes, "--steps", 1)
    with pytest.raises(ValueError, match="2 numbers for 3 learning rates"):
        measure(place, tmp_path, "--recipes", "base", "--steps", 1, "--peer-lr", "1,2,3", "--peer-batch", "1,2")
