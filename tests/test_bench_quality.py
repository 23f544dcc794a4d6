"""The stick that recipes are measured with, in tiny form: its rows, its clock, what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import save_target, write_chats

import bench.quality
import fastdraft.train
from bench.gate import load
from bench.quality import (
    BLOCK,
    HERE,
    Clock,
    changed_config,
    check_recipes,
    main,
    parse,
    read_recipes,
    recipe_config,
    steps_for,
)
from bench.quality_plot import draw, long_runs, table
from fastdraft import checkpoint
from fastdraft.model.methods import METHODS

SHAPE = {"num_hidden_layers": 1, "block_size": 8, "layers": [1, 3, 4], "mask_token_id": 0}
BLOCKS = {
    name: {"ttt_length": 7, "draft.method": method, "draft.overrides": SHAPE | changes}
    for name, method, changes in [
        ("dflash", "dflash", {}),
        ("dspark", "dspark", {"block_size": 7, "markov_rank": 8}),
        ("dflash2", "dflash2", {"selector_rank": 8}),
        ("other layers", "dflash", {"layers": [1, 2]}),
    ]
}
RECIPES = {
    "run": {
        "draft": {"overrides": {"draft_vocab_size": 96}},
        "data": {"max_length": 64, "pack_tokens": 128, "eval_fraction": 0.2},
        "optim": {"lr": 5e-3, "packs_per_step": 1},
        "ttt_length": 3,
    },
    "recipes": {
        "base": {},
        **BLOCKS,
        "slow": {"optim.lr": 1e-6},
        "drawn": {"data.paths": ["drawn.jsonl"]},
        "missing": {"data.paths": ["nowhere.jsonl"]},
        "fp8": {"precision": "fp8"},
        "other target": {"target.dtype": "fp32"},
        "typo": {"optim.rl": 1},
        "then the same": {"then": {"after": 0.5, "loss.kind": "kl"}},
        "then lk": {"then": {"after": 0.5, "loss.kind": "lk_alpha"}},
        "then a rate": {"then": {"after": 0.5, "optim.lr": 1e-3}},
        "then never": {"then": {"loss.kind": "lk_alpha"}},
    },
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


def test_a_loss_is_replaced_on_the_way(place, tmp_path):
    """From the named step on and not before; and a replacement that changes nothing gives the same draft."""
    names = "base,then the same,then lk"
    base, same, lk = measure(place, tmp_path, "--recipes", names, "--steps", 12, "--decode", 0)
    taus = [[point[-1] for point in row["curve"]] for row in (base, same, lk)]
    steps = [point[0] for point in base["curve"]]
    assert steps == [2, 4, 6, 8, 10, 12]
    assert taus[0] == taus[1]
    assert taus[0][:3] == taus[2][:3]
    assert all(a != b for a, b in zip(taus[0][3:], taus[2][3:], strict=True))
    assert lk["settings"] == {"then": {"after": 0.5, "loss.kind": "lk_alpha"}}
    for name, said in (("then a rate", r"sets optim\.lr, and only the loss can change"), ("then never", "needs `after`")):
        with pytest.raises(ValueError, match=f"recipe {name}: its `then` {said}"):
            measure(place, tmp_path, "--recipes", name, "--steps", 2)


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


def test_recipes_of_every_method_stand_side_by_side(place, tmp_path):
    rows = measure(place, tmp_path, "--recipes", "base,dflash,dspark,dflash2", "--steps", 2)
    assert [row["recipe"] for row in rows] == ["base", "dflash", "dspark", "dflash2"]
    for row in rows:
        for name in ("chain", "long_chain"):
            assert row[name]["accepted_length"] >= 1 and row[name]["num_equal"] == row["prompts"]
        assert len(row["curve"]) == 2 and len(row["long_chain"]["step_acceptance"]) == 7
        assert len(row["acceptance"]) == (3 if row["recipe"] == "base" else 7)
        assert ("tree" in row) == (row["recipe"] == "base")  # a block is a chain
    with pytest.raises(ValueError, match=r"reads layers \(1, 2\) of the target, all others \(1, "):
        measure(place, tmp_path, "--recipes", "other layers", "--steps", 1)


def test_recipes_have_what_their_method_has_and_they_do_not_set(tmp_path):
    tree = {"run": {}, "of_method": {"eagle3": {"loss.step_decay": 0.8}, "dflash": {"block.loss": "ce"}}}
    blocks = {"draft.method": "dflash"}
    tree["recipes"] = {
        "base": None,
        "even": {"loss.step_decay": 1.0},
        "blocks": blocks,
        "others": {"draft.method": "dspark"},
    }
    path = tmp_path / "recipes.yaml"
    path.write_text(yaml.safe_dump(tree))
    found = {name: recipe for name, (recipe, _) in read_recipes(path, "").items()}
    assert found["base"] == {"loss.step_decay": 0.8} and found["even"] == {"loss.step_decay": 1.0}
    assert found["blocks"] == blocks | {"block.loss": "ce"} and found["others"] == {"draft.method": "dspark"}
    path.write_text(yaml.safe_dump(tree | {"of_methods": {}}))
    with pytest.raises(ValueError, match="has 'of_methods', which is neither run, of_method nor recipes"):
        read_recipes(path, "")
    path.write_text(yaml.safe_dump(tree | {"of_method": {"eagle": {"loss.step_decay": 0.8}}}))
    with pytest.raises(ValueError, match="has of_method 'eagle', which is no method; there are eagle3, dflash"):
        read_recipes(path, "")


@pytest.mark.parametrize(
    "setting",
    [
        *({"seed": 3}, {"data.seed": 3}, {"max_steps": 7}, {"run_dir": "x"}, {"eval.every": 1}, {"eval": {"max_packs": 1}}),
        *({"eval.max_packs": 1}, {"checkpoint.every": 1}, {"data.max_length": 32}, {"data.train_on": "last_answer"}),
        *({"target.dtype": "fp32"}, {"data.eval_fraction": 0.5}, {"data": {"max_length": 32}}),
    ],
    ids=str,
)
def test_no_recipe_sets_what_all_have_alike(place, setting):
    """A row would show a seed or a number of steps that it had not, or be measured otherwise than its neighbours."""
    args = parse(["--target", str(place / "target"), "--answers", str(place / "answers.jsonl")])
    with pytest.raises(ValueError, match=f"recipe own: a recipe sets {min(setting)}, which is the same for all recipes"):
        check_recipes(args, {"own": (setting, 1)})


def test_the_committed_recipes_are_runs(place, monkeypatch):
    """Those of the committed file, which are for SmolLM2: the target's size is all that is not checked here. Every setting
    of the issue's levers that there is has its recipe, and each changes the run that it belongs to."""
    recipes = read_recipes(HERE / "quality.yaml", "")
    args = parse(
        ["--target", str(place / "target"), "--answers", str(place / "answers.jsonl"), "--held-out", "held_out.jsonl"]
    )
    monkeypatch.setattr(bench.quality.Path, "exists", lambda _: True)  # of the answers that a recipe names
    monkeypatch.setattr(bench.quality, "check_precision", lambda *_: None)  # fp8 is for GPUs
    check_recipes(args, recipes)
    configs = {name: recipe_config(args, recipe, 0, place / "none", 1) for name, (recipe, _) in recipes.items()}
    for name, (recipe, _) in recipes.items():
        assert changed_config(args, recipe, 0, place / "none", 1) != configs[name]
    base = configs["base"].model_dump()
    assert [name for name, config in configs.items() if config.model_dump() == base] == ["base"]
    changed = {key for recipe, _ in recipes.values() for key in recipe}
    assert changed >= {
        *("optim.lr", "optim.warmup_ratio", "optim.schedule", "optim.wsd_decay", "optim.betas", "optim.clip"),
        *("data.pack_tokens", "optim.packs_per_step", "sampled_depth", "ttt_length", "loss.step_decay", "loss.kind"),
        *("optim.optimizer", "optim.muon_lr", "draft.init", "draft.overrides", "draft.method", "block.loss", "precision"),
        "data.paths",
    }
    assert {config.draft.method for config in configs.values()} == set(METHODS)
    assert read_recipes(HERE / "quality.yaml", "base,lr-2e-3:2", 3)["base"] == ({"loss.step_decay": 0.8}, 3)
    assert read_recipes(HERE / "quality.yaml", "base,lr-2e-3:2", 3)["lr-2e-3"][1] == 2


def test_a_recipe_of_other_answers_is_measured_on_the_same_held_out_ones(place, tmp_path):
    write_chats(place / "held_out.jsonl", 6)
    write_chats(place / "drawn.jsonl", 20)
    evaluated = []
    held_out = bench.quality.evaluate_tau

    def noted(rows, batches, *more, **settings):
        batches = list(batches)
        evaluated.append([batch.input_ids.tolist() for batch in batches])
        return held_out(rows, batches, *more, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.quality, "evaluate_tau", noted)
        more = ["--held-out", place / "held_out.jsonl", "--temperature", 1.0, "--seeds", 1]
        base, drawn = measure(place, tmp_path, "--recipes", "base,drawn", "--steps", 2, *more)
    assert evaluated and all(batches == evaluated[0] for batches in evaluated)
    assert base["curve"] != drawn["curve"] and drawn["settings"] == {"data.paths": ["drawn.jsonl"]}
    for row in (base, drawn):
        assert row["drawn_chain"]["accepted_length"] >= 1 and row["drawn_chain"]["num_equal"] is None
        assert row["chain"]["num_equal"] == row["prompts"]


def test_seconds_become_steps(place, tmp_path, monkeypatch):
    """By the median of a trial's blocks, tried once for recipes that are equally fast."""
    tried, args = [], SimpleNamespace(seconds=30.0)
    monkeypatch.setattr("bench.quality.recipe_config", lambda args, recipe, *_, **__: recipe)
    monkeypatch.setattr("bench.quality.shutil.rmtree", lambda _: None)

    def trial(recipe, stick, trial):
        tried.append(recipe)
        return SimpleNamespace(blocks=[9.0, 0.5, 0.6, 0.4, 0.5])

    monkeypatch.setattr("bench.quality.train_timed", trial)
    stick, known = SimpleNamespace(folder=tmp_path), {}
    recipes = {}, {"optim.lr": 2e-3}, {"ttt_length": 3}
    assert [steps_for(args, recipe, stick, known) for recipe in recipes] == [30 / (0.5 / BLOCK)] * 3
    assert tried == [{}, {"ttt_length": 3}]


def test_a_trial_is_timed_in_blocks(place, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.quality.TRIAL", 8)
    monkeypatch.setattr("bench.quality.BLOCK", 2)
    steps = []
    monkeypatch.setattr("bench.quality.statistics.median", lambda blocks: steps.append(list(blocks)) or 2.0)
    (row,) = measure(place, tmp_path, "--recipes", "base", "--seconds", 3.0, "--decode", 0)
    assert row["steps"] == 3 and len(steps) == 1
    assert len(steps[0]) == 1 and steps[0][0] > 0  # steps 5 and 6; what follows is the last block, which has no end


def test_the_clock_stands_while_the_checkpoint_is_written(place, tmp_path, monkeypatch):
    def slow(*args):
        time.sleep(3.0)
        saved(*args)

    saved = checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    row = measure(place, tmp_path, "--recipes", "base", "--steps", 3, "--decode", 0)[0]
    before_the_last, last = (point[2] for point in row["curve"][-2:])
    assert row["steps"] == 3 and last - before_the_last < 2.5


def test_the_clock_counts_training_alone():
    clock = Clock(torch.device("cpu"))
    clock.start()
    with clock.forward():
        time.sleep(0.02)
    clock.stop()
    with clock.forward():  # of an evaluation
        time.sleep(0.5)
    clock.start()
    clock.start()
    time.sleep(0.01)
    clock.stop()
    clock.stop()
    assert 0.03 <= clock.seconds < 0.5 and 0.02 <= clock.target_seconds < 0.5


@pytest.mark.parametrize(
    ("recipes", "says"),
    [
        ("other target", "sets target.dtype, which is the same for all recipes"),
        ("typo", "did you mean 'lr'"),
        (
            "nothing",
            "has no recipe 'nothing'; it has base, dflash, dflash2, drawn, dspark, fp8, missing, other layers, "
            "other target, slow, then a rate, then lk, then never, then the same, typo",
        ),
        ("base:0", "not NAME:N"),
        ("base,drawn", "recipe drawn: it trains on drawn.jsonl, of which other .* with --held-out FILE"),
        ("base,fp8", "recipe fp8: precision: fp8 needs a GPU"),
    ],
)
def test_recipes_that_cannot_be(place, tmp_path, recipes, says):
    with pytest.raises(ValueError, match=says):
        measure(place, tmp_path, "--recipes", recipes, "--steps", 1)
    with pytest.raises(ValueError, match="2 numbers for 3 learning rates"):
        measure(place, tmp_path, "--recipes", "base", "--steps", 1, "--peer-lr", "1,2,3", "--peer-batch", "1,2")
    with pytest.raises(ValueError, match=r"recipe missing: it trains on .*nowhere.jsonl, which does not exist"):
        measure(place, tmp_path, "--recipes", "missing", "--steps", 1, "--held-out", place / "answers.jsonl")
    with pytest.raises(ValueError, match=r"--temperature 0.0: greedy"):
        measure(place, tmp_path, "--recipes", "base", "--steps", 1, "--temperature", 0)
    with pytest.raises(ValueError, match="--seeds 0"):
        measure(place, tmp_path, "--recipes", "base", "--steps", 1, "--seeds", 0)


def test_the_page_says_what_the_rows_say(tmp_path):
    root = Path(__file__).parents[1]
    rows = [row for row in load(root / "bench/results/quality.jsonl") if row["gpu"]]
    page = (root / "docs/quality.md").read_text().splitlines()
    assert [line for line in table(rows) if line not in page] == []
    draw(rows, 7, tmp_path / "drawn.svg")
    for picture in (tmp_path / "drawn.svg", root / "docs/img/quality.svg"):
        text = picture.read_text()
        assert all(row["recipe"] in text for row in long_runs([row for row in rows if len(row["acceptance"]) == 7]))
    with pytest.raises(ValueError, match="no row has 6 TTT steps"):
        draw(rows, 6, tmp_path / "none.svg")


def test_a_line_of_the_table_is_one_recipe_with_all_its_seeds():
    about = {"provider": "fastdraft", "recipe": "a", "commit": "c", "steps": 2, "tokens": 8, "seconds": 4.0}
    about["gpu"] = "NVIDIA H100 80GB HBM3"
    runs = [about | {"target_seconds": 1.0, "seed": seed, "tau_sim": 1.5 + seed / 10} for seed in range(3)]
    runs[0]["chain"] = {"accepted_length": 1.25}
    other = runs[1] | {"steps": 3, "tau_sim": 2.0, "seconds": 1.9}
    lines = table([*runs, other, runs[0] | {"gpu": "NVIDIA H200"}])[2:]
    assert lines.pop().startswith("| fastdraft | a | H200 | 1 | 2 |")
    assert lines[0] == "| fastdraft | a | H100 | 3 | 2 | 8 | 4.0 | 1.0 | 1.600 (1.500 to 1.700) | 1.25 |  |  |"
    assert lines[1] == "| fastdraft | a | H100 | 1 | 3 | 8 | 1.9 | 1.0 | 2.000 |  |  |  |"
    assert long_runs([*runs, other]) == runs
