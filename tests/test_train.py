"""Whole runs on a tiny target: learning, stopping and going on, other processes, damage, bad numbers, warm start."""

from __future__ import annotations

import atexit
import errno
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from serving_forward import ServedDraft
from small_runs import at_step, by_two_ranks, losses, train_until
from tiny import save_target, write_chats

from fastdraft import checkpoint, cli
from fastdraft import train as training
from fastdraft.batch import Batch, Features
from fastdraft.checkpoint import list_checkpoints
from fastdraft.config import OptimConfig
from fastdraft.data.loader import Ahead, Loader
from fastdraft.data.stream import Stream
from fastdraft.metrics import read_metrics
from fastdraft.model.dflash import OWN_LOSS
from fastdraft.model.eagle3 import serving, start
from fastdraft.model.eagle3.draft import SURE
from fastdraft.model.eagle3.ref import attention_ref
from fastdraft.model.methods import METHODS, named_method
from fastdraft.run.draft import draft_shape
from fastdraft.run.finished import export_run, open_run
from fastdraft.run.inputs import load_data
from fastdraft.target.hf import Target
from fastdraft.train import StopSignal, dotted, train


def weights(run_dir) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint. Slices that several processes wrote are named after their files."""
    files = sorted(list_checkpoints(Path(run_dir))[-1].glob("*.safetensors"))
    if len(files) == 1:
        return load_file(files[0])
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def steps_kept(run_dir) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(Path(run_dir))]


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def came_out_as(config, run: tuple) -> bool:
    """Whether a run has the losses and the last tensors of another one (a tuple that `whole` gives, or a longer one)."""
    return losses(config.run_dir) == run[0] and same(weights(config.run_dir), run[1])


# --- a run ---------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_keeps_the_last_and_the_best(make_config):
    config = make_config(**{"max_steps": 30, "optim.lr": 5e-3, "checkpoint.every": 4, "eval.every": 10})
    result = train(config)
    assert (result.steps, result.stopped_by) == (30, None)
    lines = losses(config.run_dir)
    trained, held_out = ([r for r in lines if name in r] for name in ("loss", "eval/loss"))
    assert [r["step"] for r in trained] == list(range(2, 31, 2)) and [r["step"] for r in held_out] == [10, 20, 30]
    assert trained[-1]["loss"] < 0.9 * trained[0]["loss"] and trained[-1]["tau_sim"] > trained[0]["tau_sim"]
    assert all(0 < r["a0"] < 1 and r["skipped_steps"] == 0 and r["grad_norm"] > 0 for r in trained)
    waits = [r["data_wait"] for r in read_metrics(config.run_dir) if "loss" in r]
    assert len(waits) == 15 and all(0 <= wait < 1 for wait in waits)
    best = json.loads((Path(config.run_dir) / "checkpoints" / "best.json").read_text())
    assert best["tau_sim"] == max(r["eval/tau_sim"] for r in held_out)
    assert steps_kept(config.run_dir) == sorted({28, 30, best["step"]})
    assert {"config.yaml", "draft.json", "metrics.jsonl"} <= {p.name for p in Path(config.run_dir).iterdir()}


def test_the_schedule_counts_optimizer_steps(make_config):
    """Warm-up and cosine by step, whatever is accumulated within one."""
    seen = {}
    for packs in (1, 3):
        config = make_config(run_dir=str(make_config().run_dir) + str(packs), **{"optim.packs_per_step": packs})
        train(config)
        seen[packs] = [(r["step"], r["lr"]) for r in losses(config.run_dir) if "lr" in r]
    assert seen[1] == seen[3]
    assert seen[1][0] == (2, 1e-2) and seen[1][2][1] < seen[1][1][1] < 1e-2


def test_epochs_are_counted_in_packs(make_config):
    """A step that runs into the next epoch is not counted in both: 3 epochs of 7 packs are 6 steps of 4."""
    config = make_config(max_steps=None, epochs=3, **{"optim.packs_per_step": 4, "eval.every": 100})
    assert Loader(load_data(config, draft_shape(config)).train, config.data.pack_tokens, 1).num_packs == 7
    assert train(config).steps == 6


def test_accumulation_does_not_change_the_result(make_config, tmp_path):
    """Every step sees all the data, as one pack or as many: the same losses and weights up to fp32 rounding."""
    found = []
    for pack_tokens, packs in ((4096, 1), (64, None)):
        config = make_config(run_dir=str(tmp_path / str(pack_tokens)), **{"data.pack_tokens": pack_tokens})
        if packs is None:
            data = load_data(config, draft_shape(config)).train
            packs = Loader(data, pack_tokens, 1).num_packs
            assert packs > 5
        train(config.model_copy(update={"optim": config.optim.model_copy(update={"packs_per_step": packs})}))
        found.append((losses(config.run_dir), weights(config.run_dir)["master"]))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=2e-4)


def test_both_steps_train_alike(make_config, tmp_path):
    found = []
    for step in ("reference", "fused"):
        config = make_config(step=step, run_dir=str(tmp_path / step))
        train(config)
        found.append(losses(config.run_dir))
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


def test_masters_and_moments_are_fp32_under_bf16(make_config):
    config = make_config(precision="bf16")
    train(config)
    tensors = weights(config.run_dir)
    assert {tensors[name].dtype for name in ("master", "m", "v")} == {torch.float32}
    assert not torch.equal(tensors["master"], tensors["master"].bfloat16().float())
    assert losses(config.run_dir)[-1]["eval/tau_sim"] > 1


@pytest.mark.parametrize("changes", [{"loss.kind": "lk_alpha"}, {"loss.kind": "lk_lambda", "loss.lk_decay": 3.0}])
def test_lk_losses_train(make_config, changes):
    config = make_config(max_steps=12, **changes)
    train(config)
    lines = [r for r in losses(config.run_dir) if "loss" in r]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["tau_sim"] > lines[0]["tau_sim"]


def test_a_masked_step_is_skipped_with_a_count(make_config, monkeypatch):
    def masked(batches):
        return [Batch(b.input_ids, torch.zeros_like(b.loss_mask), b.lengths) for b in batches]

    config = make_config(
        max_steps=3, **{"eval.every": 9, "checkpoint.every": 1, "checkpoint.keep": 9, "metrics.log_every": 1}
    )
    at_step(monkeypatch, 2, masked)
    train(config)
    lines = [r for r in losses(config.run_dir) if "loss" in r]
    assert [r["skipped_steps"] for r in lines] == [0, 1, 0] and lines[1]["loss"] == lines[1]["grad_norm"] == 0
    first, second, third = (load_file(next(p.glob("*.safetensors"))) for p in list_checkpoints(Path(config.run_dir)))
    assert all(torch.equal(first[name], second[name]) for name in ("master", "m", "v"))
    assert not torch.equal(second["master"], third["master"]) and int(third["step_count"]) == 3


# --- stop and go on ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, tuple[list[dict], dict[str, torch.Tensor], dict | None]]:
    """What `whole` found, by the settings that were changed: several tests compare with the same uninterrupted run."""
    return {}


@pytest.fixture
def whole(make_config, tmp_path, whole_runs):
    """An uninterrupted run of 6 steps: its losses, its last tensors, and its best.json; all are for reading."""

    def run(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in whole_runs:
            config = make_config(run_dir=str(tmp_path / "whole"), **changes)
            train(config)
            best = Path(config.run_dir) / "checkpoints" / "best.json"
            of_best = json.loads(best.read_text()) if best.exists() else None
            whole_runs[key] = losses(config.run_dir), weights(config.run_dir), of_best
        return whole_runs[key]

    return run


STREAM = {"data.streaming": True, "data.block_conversations": 5, "data.vocab_samples": 20}
NARROW = {"draft.overrides": {"draft_vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2}}


@pytest.mark.parametrize(
    ("stops", "number", "changes"),
    [
        ((1,), signal.SIGTERM, {}),
        ((3,), signal.SIGTERM, {"precision": "bf16"}),
        ((3, 2), signal.SIGINT, NARROW),
        ((2, 3), signal.SIGTERM, STREAM),
        ((4,), signal.SIGTERM, {"sampled_depth": 0.6}),
        ((3,), signal.SIGTERM, {"optim.optimizer": "muon", "optim.schedule": "wsd", "precision": "bf16"}),
        ((5,), signal.SIGTERM, {"metrics.log_every": 4, "checkpoint.every": 5, "eval.every": 100}),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(make_config, whole, capsys, stops, number, changes):
    config, done = make_config(**changes), 0
    for stop in stops:
        result = train_until(stop, config, number)
        done += stop
        assert (result.steps, result.stopped_by) == (done, number)
        assert steps_kept(config.run_dir)[-1] == done
        assert f"stopped by {number.name} after step {done}; its checkpoint is written" in capsys.readouterr().out
    assert train(config).stopped_by is None
    assert f"step-{done:08d}, step {done}" in capsys.readouterr().out.replace("\n", "")
    assert came_out_as(config, whole(**changes))


def test_a_killed_run_goes_on_from_its_last_checkpoint(make_config, whole, monkeypatch):
    """Nothing of steps 5 and 6 was saved: their lines of metrics are cut and come again."""

    def die(_):
        raise KeyboardInterrupt

    changes = {"checkpoint.every": 4, "metrics.log_every": 1, "eval.every": 100}
    config = make_config(**changes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 6, die)
        train(config)
    assert steps_kept(config.run_dir) == [4] and losses(config.run_dir)[-1]["step"] == 5
    train(config)
    assert came_out_as(config, whole(**changes))


SELDOM = {"eval.every": 100}


def write_late(monkeypatch, step: int, write=checkpoint.save_file) -> None:
    """The first checkpoint is written (`write`) when training has begun that step, and not before."""
    begun, files = threading.Event(), itertools.count(1)
    at_step(monkeypatch, step, lambda _: begun.set())

    def late(*given):
        first = next(files) == 1
        assert not first or begun.wait(60)
        (write if first else checkpoint_file)(*given)

    checkpoint_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", late)


def no_room(*_given):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_training_goes_on_while_a_checkpoint_is_written_which_is_of_its_step(make_config, whole, monkeypatch):
    expected = whole(**SELDOM)
    write_late(monkeypatch, 4)
    config = make_config(**SELDOM, **{"checkpoint.keep": 9})
    train(config)
    assert steps_kept(config.run_dir) == [2, 4, 6]
    assert came_out_as(config, expected)
    for later in ("step-00000004", "step-00000006"):
        shutil.rmtree(Path(config.run_dir) / "checkpoints" / later)
    monkeypatch.undo()
    assert train(config).steps == 6
    assert came_out_as(config, expected)


def test_checkpoints_that_take_longer_than_the_steps_between_them(make_config, whole, monkeypatch):
    expected, write = whole(**SELDOM), checkpoint.save_file

    def slowly(*given):
        time.sleep(1.2)
        write(*given)

    monkeypatch.setattr(checkpoint, "save_file", slowly)
    config = make_config(**SELDOM, **{"checkpoint.every": 1, "checkpoint.keep": 9, "metrics.log_every": 2})
    train(config)
    assert steps_kept(config.run_dir) == [1, 2, 3, 4, 5, 6]
    assert came_out_as(config, expected)
    stood = [line["checkpoint_wait"] for line in read_metrics(config.run_dir) if "loss" in line]
    assert 0 <= stood[0] < 1 and min(stood[1:]) > 0.2


def test_a_disk_that_fills_while_training_goes_on_ends_it_with_a_sentence(make_config, whole, monkeypatch):
    expected, config = whole(**SELDOM), make_config(**SELDOM)
    with monkeypatch.context() as patch:
        write_late(patch, 4, no_room)
        with pytest.raises(
            ValueError, match=r"step-00000002 could not be written \(\[Errno 28\] No space left on device\)"
        ):
            train(config)
    assert steps_kept(config.run_dir) == [] and not list(Path(config.run_dir).glob("checkpoints/.writing*"))
    assert train(config).steps == 6
    assert came_out_as(config, expected)


def test_a_run_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before(make_config, whole):
    """Half of the file is there when the process is killed; training is further."""
    expected, config = whole(**SELDOM), make_config(**SELDOM)

    def run() -> None:
        write, files = checkpoint.save_file, itertools.count(1)
        further = threading.Event()
        at_step(pytest.MonkeyPatch(), 5, lambda _: further.set())

        def die(tensors, file, metadata):
            write(tensors, file, metadata)
            if next(files) == 2:
                os.truncate(file, file.stat().st_size // 2)
                assert further.wait(60)
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.save_file = die
        train(config)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in Path(config.run_dir).glob("checkpoints/*")) == [
        ".writing-step-00000004",
        "step-00000002",
    ]
    assert train(config).steps == 6 and steps_kept(config.run_dir) == [4, 6]
    assert came_out_as(config, expected)
    assert not list(Path(config.run_dir).glob("checkpoints/.writing*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "name", "call"),  # evaluations: steps 3 and 6; checkpoints: 2, 3 (the best), 4, 6; lines of metrics: 2, 3 ...
    [
        (training, "evaluate_tau", 1),
        (training, "evaluate_tau", 2),
        (checkpoint, "save_checkpoint", 2),
        (checkpoint, "mark_best", 1),
        (training.Metrics, "log", 2),
        (training.Metrics, "log", 5),
    ],
)
def test_a_run_killed_at_its_evaluation_still_makes_it(make_config, whole, monkeypatch, place, name, call):
    """The checkpoint of that step may be there already; its held-out numbers and the best one are not lost."""
    expected, config = whole(), make_config()
    original, calls = getattr(place, name), []

    def die(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, name, die)
        train(config)
    train(config)
    assert came_out_as(config, expected)
    assert json.loads((Path(config.run_dir) / "checkpoints" / "best.json").read_text()) == expected[2]


@pytest.mark.slow
def test_speed_and_wait_are_of_training_alone(make_config, monkeypatch):
    """An evaluation between two lines of metrics takes no time off them, and adds none."""
    original, evaluate, tokens, began, evaluated = Ahead.__next__, training.evaluate_tau, [], [], []

    def slow(self):
        began.append(time.perf_counter())
        batches = original(self)
        tokens.append(sum(b.num_tokens for b in batches))
        time.sleep(0.1)
        self.waited += 0.1
        return batches

    def slow_evaluation(*args, **kwargs):
        start = time.perf_counter()
        time.sleep(2)
        result = evaluate(*args, **kwargs)
        evaluated.append((start, time.perf_counter()))
        return result

    monkeypatch.setattr(Ahead, "__next__", slow)
    monkeypatch.setattr(training, "evaluate_tau", slow_evaluation)
    config = make_config(max_steps=4, **{"metrics.log_every": 4, "eval.every": 3, "checkpoint.every": 100})
    train(config)
    (line,) = [r for r in read_metrics(config.run_dir) if "loss" in r]
    between, after = evaluated  # of step 3, and of the last, which is behind the line of metrics
    alone = after[0] - began[0] - (between[1] - between[0])  # s, whatever else the machine does
    assert sum(tokens) / (alone + 0.5) < line["tokens_per_s"] < sum(tokens) / 0.4
    assert 0.4 / (alone + 0.5) < line["data_wait"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "no state", "garbage state"])
def test_a_damaged_checkpoint_is_said_and_the_previous_used(make_config, whole, capsys, damage):
    config, expected = make_config(**SELDOM, **{"checkpoint.keep": 1}), whole(**SELDOM)
    train(make_config(**SELDOM, **{"checkpoint.keep": 3}))
    newest = list_checkpoints(Path(config.run_dir))[-1]
    if damage == "cut":
        file = next(newest.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "no state":
        (newest / "state.json").unlink()
    else:
        (newest / "state.json").write_text('{"format": 1, "st')
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().out.replace("\n", "")
    assert "going on from" in said and "step-00000004, step 4" in said
    assert damage == "no state" or (
        "step-00000006 is unreadable" in said and "left aside" in said and "going on from" in said
    )
    assert came_out_as(config, expected)
    assert steps_kept(config.run_dir) == [6]
    assert damage == "no state" or newest.with_name(f"damaged-{newest.name}").is_dir()


def test_only_damaged_checkpoints_left(make_config):
    config = make_config()
    train(config)
    for path in list_checkpoints(Path(config.run_dir)):
        (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"no checkpoint of .* is readable; start anew with --fresh\. .*is unreadable"):
        train(config)
    before = losses(config.run_dir)
    train(config, fresh=True)
    assert losses(config.run_dir) == before


def test_a_finished_run_stays(make_config):
    config = make_config()
    train(config)
    before = losses(config.run_dir), weights(config.run_dir)
    assert train(config).steps == 6
    assert came_out_as(config, before)


def test_the_vocabulary_map_is_the_checkpoints_own(make_config, monkeypatch, whole):
    """It is never built anew on resume, even if that would give another."""
    train_until(3, make_config())
    monkeypatch.setattr(start, "build_vocab_map", lambda *_: torch.arange(64))
    train(make_config())
    monkeypatch.undo()
    ours, theirs = weights(make_config().run_dir), whole()[1]
    assert not torch.equal(theirs["d2t"], torch.zeros(64, dtype=torch.int64)) and same(ours, theirs)


def test_another_run_is_refused(make_config, target_dir, tmp_path):
    train(make_config())
    before = weights(make_config().run_dir)
    other = save_target(tmp_path / "other", seed=1)
    draft = tmp_path / "draft.yaml"
    draft.write_text("intermediate_size: 40\n")
    few = write_chats(tmp_path / "few.jsonl", 10)
    for changes, said in (
        ({"target.path": str(other)}, "was trained for another target"),
        ({"target.dtype": "bf16"}, r"Changed: target.dtype: fp32 -> bf16$"),
        ({"optim.lr": 1e-3}, r"other settings.*Changed: optim.lr: 0.01 -> 0.001$"),
        ({"sampled_depth": 0.8}, r"Changed: sampled_depth: 1.0 -> 0.8$"),
        ({"optim.optimizer": "adamw"}, r"Changed: optim.optimizer: muon -> adamw$"),
        ({"optim.schedule": "wsd"}, r"Changed: optim.schedule: cosine -> wsd$"),
        ({"max_steps": 9, "seed": 4}, r"Changed: max_steps: 6 -> 9; seed: 0 -> 4$"),
        ({"draft.overrides": {"draft_vocab_size": 80}}, r"draft's shape.draft_vocab_size: 64 -> 80"),
        ({"draft.config": str(draft)}, r"draft's shape.intermediate_size: 48 -> 40"),
        ({"data.paths": [str(few)]}, r"Changed: data.paths"),
    ):
        with pytest.raises(ValueError, match=said):
            train(make_config(**changes))
    assert same(weights(make_config().run_dir), before)


def train_as_before(config, change) -> None:
    """A run whose checkpoints have what an older version wrote: change(state) makes that of what is written today."""
    write = checkpoint.save_checkpoint

    def as_before(run_dir, tensors, state, keep, group):
        change(state)
        write(run_dir, tensors, state, keep, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", as_before)
        train(config)


@pytest.mark.parametrize(("engine", "step"), [("auto", "fused"), ("fused", "fused"), ("reference", "reference")])
def test_a_checkpoint_of_an_older_version_is_read_though_keys_were_removed(engine, step, make_config):
    def change(state):
        state["config"]["features"]["memory_gib"] = 1.0
        state["config"]["engine"] = engine
        del state["config"]["step"]

    train_as_before(make_config(step=step), change)
    assert train(make_config(step=step)).steps == 6
    config, _, _ = open_run(Path(make_config().run_dir))
    assert config == make_config(step=step)


def test_a_run_goes_on_whose_checkpoint_was_written_before_its_draft_could_be_of_eagle_3_1(make_config):
    def change(state):
        del state["draft"]["norm_before_fc"], state["draft"]["norm_output"]

    train_as_before(make_config(), change)
    assert train(make_config()).steps == 6
    with pytest.raises(ValueError, match=r"draft's shape\.norm_output: False -> True"):
        train(make_config(**{"draft.overrides": {"draft_vocab_size": 64, "norm_output": True}}))


def test_a_run_goes_on_whose_checkpoint_has_an_older_default_that_its_method_does_not_read(make_config):
    def change(state):
        state["config"]["block"]["loss"] = "ce"
        state["config"]["loss"]["step_decay"] = 0.8

    train_as_before(make_config(**{"loss.step_decay": 0.8}), change)
    assert train(make_config(**{"loss.step_decay": 0.8})).steps == 6
    with pytest.raises(ValueError, match=r"Changed: loss\.step_decay: 0\.8 -> 0\.6$"):
        train(make_config(**{"loss.step_decay": 0.6}))


def test_a_run_does_not_go_on_with_what_a_later_version_would_choose_where_its_config_leaves_it_open(
    make_config, monkeypatch
):
    changes = {"draft": {"method": "dflash2"}, "ttt_length": 7, "optim.schedule": "wsd", "max_steps": 2}
    taken_back = {"optim.muon_lr": 0.04, "optim.wsd_decay": 0.2, "block.loss": "ce"}
    train(make_config(**changes))
    monkeypatch.setattr(OptimConfig, "MUON_TIMES", 8)
    monkeypatch.setattr(OptimConfig, "decay_share", 0.3)
    monkeypatch.setitem(OWN_LOSS, "dflash2", "dpace")
    with pytest.raises(
        ValueError, match=r"Changed: block\.loss: ce -> dpace; optim\.muon_lr: 0\.04 -> 0\.08; .*decay: 0.2"
    ):
        train(make_config(**changes))
    assert train(make_config(**changes, **taken_back)).steps == 2
    monkeypatch.setitem(METHODS, "dflash2", named_method("dflash2")._replace(tables=()))
    with pytest.raises(ValueError, match=r"Changed: optim\.muon_weights: \[.*\] -> \[.*codebook"):
        train(make_config(**changes, **taken_back))


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("eagle3", {"loss.step_decay": (0.8, 0.6)}),
        ("dflash", {"block.loss": ("ce", "dpace")}),
        ("dflash2", {}),
        ("dspark", {}),
    ],
)
def test_runs_are_compared_by_what_their_method_reads(method, changed, make_config):
    """The defaults of an older version beside today's: those that a method reads differ, and no others do."""
    today = make_config(**{"draft.method": method, "loss.step_decay": 0.6})
    before = make_config(**{"draft.method": method, "loss.step_decay": 0.8, "block.loss": "ce"})
    settled = named_method(method).settled
    then, now = (dotted(settled(config).model_dump()) for config in (before, today))
    assert {key: (then[key], now[key]) for key in now if then[key] != now[key]} == changed
    read = "loss.kind" if method == "eagle3" else "block.anchors"
    other = make_config(**{"draft.method": method, read: "lk_alpha" if method == "eagle3" else 8})
    assert dotted(settled(other).model_dump())[read] == dotted(other.model_dump())[read] != dotted(today.model_dump())[read]


def test_changed_data_under_the_same_name_is_refused(make_config, tmp_path):
    path = write_chats(tmp_path / "mine.jsonl", 12)
    config = make_config(**{"data.paths": [str(path)]})
    train(config)
    write_chats(path, 12, seed=1)
    with pytest.raises(ValueError, match="cannot resume at the same place in the data"):
        train(config)


def test_what_does_not_change_the_result_may_change(make_config, target_dir, tmp_path, whole):
    train_until(3, make_config())
    shutil.copytree(target_dir, tmp_path / "moved")
    shutil.move(make_config().run_dir, tmp_path / "moved run")
    config = make_config(
        run_dir=str(tmp_path / "moved run"),
        **{"target.path": str(tmp_path / "moved"), "data.cache_dir": str(tmp_path / "cache"), "checkpoint.keep": 1},
    )
    train(config)
    assert came_out_as(config, whole())


@pytest.mark.parametrize("written_on", ["cpu", "cuda"])
def test_a_run_goes_on_with_and_without_a_gpu(make_config, monkeypatch, capsys, written_on):
    """The GPU is played: bf16, and a random state of its own in the checkpoint."""
    theirs, given = torch.arange(16, dtype=torch.uint8), []

    def on(device: str, patch) -> None:
        gpu = device == "cuda"
        patch.setattr(training, "compute_dtype", lambda *_: torch.bfloat16 if gpu else torch.float32)
        states = checkpoint.rng_state
        patch.setattr(checkpoint, "rng_state", lambda d: states(d) | ({"rng.cuda": theirs} if gpu else {}))
        patch.setattr(torch.cuda, "set_rng_state", given.append)

    config = make_config(**NARROW)
    with monkeypatch.context() as patch:
        on(written_on, patch)
        train_until(3, config)
    assert ("rng.cuda" in weights(config.run_dir)) == (written_on == "cuda")
    before = weights(config.run_dir)["embed_tokens.weight"]
    read_on = "cpu" if written_on == "cuda" else "cuda"
    with monkeypatch.context() as patch:
        on(read_on, patch)
        assert train(config).steps == 6
    said = capsys.readouterr().out
    assert "step-00000003, step 3" in said.replace("\n", "")
    assert ("written without a GPU" in said) == (read_on == "cuda") == bool(given)
    after = weights(config.run_dir)
    assert ("rng.cuda" in after) == (read_on == "cuda") and after["master"].isfinite().all()
    assert torch.equal(after["embed_tokens.weight"], before.to(after["embed_tokens.weight"].dtype))
    assert [r["step"] for r in losses(config.run_dir) if "loss" in r] == [2, 4, 6]


BEFORE_TRAINING = ("load_data", "open_source", "make_step", "resume")


@pytest.mark.parametrize(
    ("place", "number"), [*((place, signal.SIGTERM) for place in BEFORE_TRAINING), ("fit_to_target", signal.SIGINT)]
)
def test_a_signal_before_training_begins_ends_the_run_with_a_sentence(
    make_config, whole, tmp_path, fastdraft, monkeypatch, place, number
):
    """In a first start, and in one that goes on from a checkpoint: what comes then is the uninterrupted run."""
    config = make_config()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))

    def stopped(*given, **more):
        signal.raise_signal(number)
        raise AssertionError("it went on")

    said = (
        f"fastdraft: {number.name} came before training began, so no step is lost; the same command, given again, goes on"
    )
    for steps in (0, 3):
        if steps:
            assert train_until(steps, config).stopped_by == signal.SIGTERM
            assert steps_kept(config.run_dir)[-1] == 3
        before = steps_kept(config.run_dir) if steps else []
        with monkeypatch.context() as patch:
            patch.setattr(training, place, stopped)
            code, _, err = fastdraft("train", tmp_path / "run.yaml")
        assert code == 128 + number and err.strip() == said
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert [path.name for path in list_checkpoints(Path(config.run_dir))] == [f"step-{n:08d}" for n in before]
    assert fastdraft("train", tmp_path / "run.yaml")[0] == 0
    assert came_out_as(config, whole())


def test_a_forked_process_dies_of_a_signal_that_training_remembers():
    """Workers that read data are forked; whoever ends them sends SIGTERM."""
    forked = multiprocessing.get_context("fork")
    for early in (False, True):
        with StopSignal(early) as stop:
            works = forked.Event()
            worker = forked.Process(target=lambda works=works: (works.set(), time.sleep(60)))
            worker.start()
            assert works.wait(30)
            worker.terminate()
            worker.join(30)
        assert worker.exitcode == -signal.SIGTERM and stop.number is None


def test_stop_signal_restores_what_was_there():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with StopSignal() as stop:
        assert not stop.agreed()
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() and stop.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the second one kills
    assert {s: signal.getsignal(s) for s in before} == before


def test_a_signal_that_comes_while_the_others_are_asked_is_not_forgotten(monkeypatch):
    """It came too late to be told them; the next step tells it."""

    def asked(own: int) -> int:
        if not own:
            signal.raise_signal(signal.SIGTERM)
        return own

    monkeypatch.setattr(training.mesh, "largest", asked)
    with StopSignal() as stop:
        assert not stop.agreed() and stop.number == signal.SIGTERM
        assert stop.agreed() and stop.number == signal.SIGTERM


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_processes_that_are_started_again_go_on_in_spite_of_fresh(make_config, monkeypatch, capsys, name):
    config = make_config(**{"checkpoint.every": 2, "checkpoint.keep": 5})
    train_until(3, config)
    monkeypatch.setenv(name, "2")
    train(config, fresh=True)
    said = capsys.readouterr().out
    assert "warning: --fresh is left out, since the processes were started again (2)" in said
    assert "step-00000003, step 3" in said
    monkeypatch.setenv(name, "0")
    train(config, fresh=True)
    said = capsys.readouterr().out
    assert "warning: --fresh" not in said and "going on from" not in said


def test_the_mfu_of_a_resumed_run_counts_no_step_of_before(make_config, monkeypatch):
    """Its first line's loss is of all steps since the line before, its seconds are of those that it took itself."""
    monkeypatch.setattr("fastdraft.run.plan.peak_flops", lambda device: 1e12)
    changes = {"max_steps": 12, "metrics.log_every": 6, "checkpoint.every": 100, "eval.every": 100}
    config = make_config(**changes)
    train_until(5, config)
    train(config)
    first, second = (line["mfu"] / line["tokens_per_s"] for line in read_metrics(config.run_dir) if "mfu" in line)
    assert first == pytest.approx(second, rel=0.5)  # packs differ in what is trained of them


def best_of(config) -> dict:
    return json.loads((Path(config.run_dir) / "checkpoints" / "best.json").read_text())


def test_a_best_step_of_other_held_out_data_is_forgotten(make_config, capsys):
    """What counts as the best is compared on the same data only."""
    config = make_config(**{"eval.every": 2, "checkpoint.every": 2, "checkpoint.keep": 9})
    train_until(4, config)
    file = Path(config.run_dir) / "checkpoints" / "best.json"
    best = best_of(config)
    file.write_text(json.dumps(best | {"tau_sim": 9.0}))
    train(config)  # the same data: nothing beats it
    assert best_of(config)["tau_sim"] == 9.0
    shutil.rmtree(file.parent / "step-00000006")
    train(make_config(**{"eval.every": 2, "checkpoint.every": 2, "checkpoint.keep": 9, "eval.max_packs": 1}))
    assert best_of(config)["step"] == 6 and best_of(config)["tau_sim"] < 9
    said = f"step {best['step']} was the best, with a held-out tau_sim of 9.000 that was measured on other held-out data"
    assert said in capsys.readouterr().out


def test_a_best_step_without_a_checkpoint_is_forgotten(make_config):
    """Somebody made room; the next run's steps have the same numbers."""
    config = make_config(**{"eval.every": 2, "checkpoint.every": 2})
    for fresh in (True, False):
        train_until(3, config)
        file = Path(config.run_dir) / "checkpoints" / "best.json"
        file.write_text(json.dumps(best_of(config) | {"tau_sim": 9.0}))
        for path in list_checkpoints(file.parents[1]):
            shutil.rmtree(path)
        train(config, fresh=fresh)
        assert best_of(config)["tau_sim"] < 9
        train(config, fresh=True)


def test_a_refused_run_closes_what_it_opened(make_config, monkeypatch):
    """Its stream's thread would go on tokenising, and the process would not end before it."""
    config = make_config(**STREAM)
    train_until(2, config)
    closed = []
    monkeypatch.setattr(Stream, "close", lambda self: closed.append(self))
    with pytest.raises(ValueError, match=r"optim\.lr: "):
        train(make_config(**STREAM, **{"optim.lr": 1e-4}))
    assert len(closed) == 1


# --- two processes -------------------------------------------------------------------------------------------------------


def train_until_a_signal(file: Path) -> None:
    """`fastdraft train`, whose rank 1 gets SIGTERM in step 3."""
    at_step(pytest.MonkeyPatch(), 3, lambda _: os.environ["RANK"] == "1" and signal.raise_signal(signal.SIGTERM))
    sys.argv = ["fastdraft", "train", str(file)]
    cli.main()


@pytest.mark.slow
def test_two_processes_then_one_give_what_one_gives(make_config, tmp_path, whole):
    """A signal to either stops both after that step; one process goes on from their checkpoint."""
    changes = {"eval.max_packs": 1}
    config = make_config(**changes)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert by_two_ranks(train_until_a_signal, tmp_path / "two.yaml") == [128 + signal.SIGTERM] * 2
    assert steps_kept(config.run_dir)[-1] == 3
    train(config)
    ours, theirs = (losses(config.run_dir), weights(config.run_dir)), whole(**changes)
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine == pytest.approx(other, rel=2e-4)
    assert [r.get("lr") for r in ours[0]] == [r.get("lr") for r in theirs[0]]
    torch.testing.assert_close(ours[1]["master"], theirs[1]["master"], rtol=1e-3, atol=2e-4)


def train_until_a_kill(file: Path, module: str, name: str, number: int) -> None:
    """`fastdraft train`, whose rank `number` dies of SIGKILL where it first calls `name` of `module` after step 3."""

    def die(*_args, **_more) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    place, run_dir = pkgutil.resolve_name(module), Path(yaml.safe_load(file.read_text())["run_dir"])

    def begin_to_die(_batches) -> None:
        while not list_checkpoints(run_dir):  # it is written while training goes on
            time.sleep(0.01)
        if os.environ["RANK"] == str(number):
            setattr(place, name, die)

    at_step(pytest.MonkeyPatch(), 4, begin_to_die)
    sys.argv = ["fastdraft", "train", str(file)]
    with (file.parent / f"said by rank {os.environ['RANK']}").open("w") as sys.stderr:
        cli.main()


def kill_one_of_two(config, folder: Path, module: str, name: str, number: int, act=train_until_a_kill, **options) -> None:
    """Asserts that the other rank ends with a sentence, in time, and leaves a checkpoint."""
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    codes = by_two_ranks(act, file, module, name, number, **options)
    assert codes == ([-signal.SIGKILL, 1] if number == 0 else [1, -signal.SIGKILL])
    said = (folder / f"said by rank {1 - number}").read_text()
    assert f"fastdraft, rank {1 - number}: another process of this run has ended" in said and "Traceback" not in said
    assert steps_kept(config.run_dir)[-1] in (3, 5)


DEATHS = [
    ("fastdraft.train", "evaluate_tau", 0),
    ("fastdraft.checkpoint", "_write", 0),
    ("fastdraft.dist.shard:SharedAdamW", "start", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "number"), DEATHS)
def test_a_killed_process_ends_the_other_with_a_sentence_and_the_run_goes_on(make_config, tmp_path, module, name, number):
    """While it evaluates, writes a checkpoint, or adds up gradients; no process waits for ever."""
    config = make_config(**{"eval.max_packs": 1, "eval.every": 5, "checkpoint.every": 3})
    kill_one_of_two(config, tmp_path, module, name, number)
    whole = config.model_copy(update={"run_dir": str(tmp_path / "whole")})
    assert by_two_ranks(train, config) == by_two_ranks(train, whole) == [0, 0]
    assert losses(config.run_dir) == losses(whole.run_dir)
    assert same(weights(config.run_dir), weights(whole.run_dir))


def train_until_a_kill_and_never_end(*args) -> None:
    """Python's own end hangs, as where it frees what a GPU uses that waits for a process which is gone."""
    atexit.register(time.sleep, 1000)
    train_until_a_kill(*args)


@pytest.mark.slow
def test_a_process_whose_interpreter_cannot_end_is_ended(make_config, tmp_path):
    module, name, number = DEATHS[2]
    config = make_config(**{"eval.max_packs": 1, "eval.every": 5, "checkpoint.every": 3})
    kill_one_of_two(config, tmp_path, module, name, number, act=train_until_a_kill_and_never_end, start="spawn")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_between_two_looks_at_the_numbers_the_host_does_not_wait_for_the_gpu(make_config, monkeypatch):
    """PyTorch raises where a step of the loop would wait: at a copy from or to memory that is not page-locked, or a number
    that is read."""
    made = training.make_step

    def watched(*args, **more):
        step = made(*args, **more)
        begin = step.begin

        def begin_watched(number: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if 3 <= number < 8 else "default")
            begin(number)

        step.begin = begin_watched
        return step

    monkeypatch.setattr(training, "make_step", watched)
    try:
        seldom = {"metrics.log_every": 100, "eval.every": 100, "checkpoint.every": 100}
        result = train(make_config(max_steps=8, device="cuda", **seldom))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.steps == 8


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize(("module", "name", "number"), DEATHS)
def test_a_killed_process_ends_the_other_on_two_gpus(make_config, tmp_path, module, name, number):
    """NCCL adds up the gradients there, and the other rank's GPU may wait for ever in it: the host must not."""
    changes = {"device": "cuda", "precision": "fp32", "step": "reference"}  # the tiny draft is too narrow for the kernels
    config = make_config(**changes, **{"eval.max_packs": 1, "eval.every": 5, "checkpoint.every": 3})
    kill_one_of_two(config, tmp_path, module, name, number, start="spawn", seconds=280)
    assert by_two_ranks(train, config, start="spawn", seconds=280) == [0, 0]


LOST_PEERS = [
    RuntimeError(
        "NCCL error in: /pytorch/torch/csrc/c10d/NCCLUtils.cpp:94, remote process exited or there was a network "
        "error, NCCL version 2.27.5\nncclRemoteError: A call failed possibly due to a network error or a remote process "
        "exiting prematurely.\nLast error:\nsocketPollConnect: connect returned Connection refused"
    ),
    torch.distributed.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/c10d/NCCLUtils.cpp:94, unhandled system error, NCCL version 2.27.5\n"
        "ncclSystemError: System call (e.g. socket, malloc) or external library call failed.\nLast error:\n"
        "socketProgress: Connection closed by remote peer node-1<40662>"
    ),
    torch.distributed.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed."),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4242"),
]


@pytest.mark.parametrize("error", LOST_PEERS, ids=["NCCL", "NCCL's socket", "the store", "gloo"])
def test_a_lost_process_is_told_in_a_sentence_whichever_library_says_so(error):
    said = cli._one_line(error)
    assert said.startswith("another process of this run has ended, or cannot be reached (") and "\n" not in said
    assert said.endswith("; the same command, given again, goes on")


def test_an_error_of_nccl_that_is_no_lost_process_keeps_its_traceback():
    error = torch.distributed.DistBackendError("NCCL error in: x.cpp:94, invalid usage\nncclInvalidUsage: Duplicate GPU")
    assert cli._one_line(error) is None


def test_a_failed_evaluation_loses_no_step(make_config, monkeypatch):
    monkeypatch.setattr(training, "evaluate_tau", Mock(side_effect=ValueError("no live row")))
    config = make_config(**{"checkpoint.every": 3})
    with pytest.raises(ValueError, match="no live row"):
        train(config)
    assert steps_kept(config.run_dir) == [3]


def test_packs_that_ranks_cannot_share_are_refused(make_config):
    config = make_config(**{"optim.packs_per_step": 3})
    data = load_data(config, draft_shape(config)).train
    with pytest.raises(
        ValueError, match=r"optim\.packs_per_step 3 must be a positive multiple of the 2 ranks .*: set it to 4, or"
    ):
        Loader(data, config.data.pack_tokens, 3, rank=1, world_size=2)


# --- what can go wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", ["one NaN state", "too large states"])
def test_nan_stops_the_run_with_the_batch_saved(make_config, monkeypatch, poison):
    """At the latest before a checkpoint or an evaluation, however rarely metrics are looked at."""
    config = make_config(**{"metrics.log_every": 100, "checkpoint.every": 2, "eval.every": 3, "max_steps": 10})
    capture, batches = Target.capture, []

    def poisoned(self, batch):
        features = capture(self, batch)
        if batch.num_tokens and any(torch.equal(batch.input_ids, b.input_ids) for b in batches):
            if poison == "too large states":
                return Features(features.g * 1e38, features.f)
            features.f[5, 0] = torch.nan
        return features

    at_step(monkeypatch, 4, lambda handed: batches.extend(handed[:1]))
    monkeypatch.setattr(Target, "capture", poisoned)
    with pytest.raises(ValueError, match=r"step 4: loss sums .* are not all finite, or .*batches are in .*lower optim\.lr"):
        train(config)
    saved = load_file(Path(config.run_dir) / "not-finite-step-00000004-rank-0.safetensors")
    assert torch.equal(saved["0.input_ids"], batches[0].input_ids) and torch.equal(
        saved["0.loss_mask"], batches[0].loss_mask
    )
    assert saved["0.lengths"].tolist() == list(batches[0].lengths) and "1.input_ids" in saved
    assert steps_kept(config.run_dir)[-1] == 3
    assert all(t.isfinite().all() for name, t in weights(config.run_dir).items() if t.is_floating_point())


def test_a_full_disk_keeps_the_previous_checkpoint(make_config, monkeypatch):
    config = make_config(**{"eval.every": 100})
    calls = []

    def full(path, needed=0, what=""):
        calls.append(what)
        if len(calls) == 2:
            raise ValueError(f"{what} needs 1.00 GiB at {path}, which has 0.50 GiB free; free some space")
        return 1 << 40

    monkeypatch.setattr(training, "free_disk", full)
    with pytest.raises(ValueError, match="the checkpoint of step 4 needs 1"):
        train(config)
    assert steps_kept(config.run_dir) == [2]
    train(config)
    assert steps_kept(config.run_dir) == [4, 6]


def test_bad_runs_are_sentences(make_config, target_dir, tmp_path):
    user_only = tmp_path / "user.jsonl"
    user_only.write_text(json.dumps({"messages": [{"role": "user", "content": "ba be bi"}]}) + "\n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [}\n')
    numbered = tmp_path / "numbered.yaml"
    numbered.write_text("1: 2\n")
    for changes, said in (
        ({"data.paths": [str(tmp_path / "none.jsonl")]}, r"none\.jsonl"),
        ({"data.paths": [str(user_only)]}, "no trained token"),
        ({"data.paths": [str(bad)]}, r"bad\.jsonl:1"),
        ({"target.path": str(tmp_path / "none")}, "has no readable config.json"),
        ({"draft.overrides": {"draft_vocab_size": 500}}, "draft_vocab_size 500 is larger than vocab_size 192"),
        ({"draft.overrides": {"hiden_size": 16}}, "'hiden_size' does not exist; the nearest is 'hidden_size'"),
        ({"draft.overrides": {"layers": [1, 2, 7]}}, r"must ascend and lie in 0\.\.6"),
        ({"draft": {"init_from": str(target_dir)}}, "is not a draft to start from"),
        ({"draft.init_from": "x", "draft.overrides": {"fc_norm": True}}, "take out draft.config, draft.overrides"),
        ({"draft.config": str(tmp_path / "none.yaml")}, r"none\.yaml cannot be read"),
        ({"draft.config": str(numbered)}, r"numbered\.yaml has the key 1; keys are words"),
        ({"draft.overrides": {"target_config": 1}}, "'target_config' does not exist; those of EAGLE-3 are hidden_size, "),
        ({"draft.overrides": {"cls": 1}}, "'cls' does not exist; those of EAGLE-3 are hidden_size, .*norm_output$"),
        ({"draft.overrides": {"num_layers": 1}}, "'num_layers' does not exist; those of EAGLE-3 are hidden_size, "),
        ({"draft.overrides": {"initializer_range": math.inf}}, r"initializer_range: .*finite number \(got inf\)"),
        ({"draft.overrides": {"rope_parameters": {"rope_theta": math.inf}}}, "rope_theta is inf; it must be a number"),
        ({"precision": "fp8"}, "precision: fp8 needs a GPU of compute capability 8.9 or newer"),
        ({"device": "cuda"}, "PyTorch sees no CUDA GPU"),
    ):
        if changes.keys() & {"device", "precision"} and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=said):
            train(make_config(**changes))


# --- overfit, export, warm start -----------------------------------------------------------------------------------------


def step_logits(draft, target, ids: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Our draft's logits at every row t of steps 0 .. steps-1 of one document, read teacher-forced."""
    batch = Batch(ids, torch.ones(len(ids), dtype=torch.bool), (len(ids),))
    h, keys, values, found = draft.combine(target.capture(batch).g), [], [], []
    for i in range(steps):
        tokens = ids[(torch.arange(len(ids)) + 1 + i).clamp_max(len(ids) - 1)]
        q, k, v = draft.qkv(tokens, h, batch.positions + i)
        keys.append(k)
        values.append(v)
        h = draft.finish(h, attention_ref(q, keys, values, batch.lengths))
        found.append(draft.logits(h))
    return found


@pytest.mark.slow
@torch.no_grad()
def test_overfit_export_and_an_independent_forward(make_config, tmp_path):
    """One conversation: the loss reaches its floor, the teacher's entropy, and the export gives our logits elsewhere."""
    data = write_chats(tmp_path / "one.jsonl", 1, seed=3)
    config = make_config(
        max_steps=150,
        **{"data.paths": [str(data)], "draft.overrides": {}, "optim.packs_per_step": 1, "metrics.log_every": 50},
    )
    with torch.enable_grad():
        train(config)
    last = losses(config.run_dir)[-1]
    prepared = load_data(config, draft_shape(config))
    sample = prepared.train[0]
    ids, mask = torch.tensor(sample["input_ids"]), torch.tensor(sample["loss_mask"])
    _, target, draft = open_run(Path(config.run_dir))
    p = target.head.logits(target.capture(Batch(ids, mask, (len(ids),))).f).double().softmax(-1)
    entropy = -(p * p.log()).sum(-1)  # [L]
    weighed = sum(
        config.loss.step_decay**i * entropy[u] for i in range(3) for u in range(1 + i, len(ids) - 1) if mask[u + 1]
    )
    floor = float(weighed / mask[2:].sum())
    assert floor - 1e-3 <= last["loss"] < floor + 0.02
    assert min(last[f"a{i}"] for i in range(3)) > 0.95 and last["top1"] > 0.9 and last["tau_sim"] > 3.7

    said = export_run(Path(config.run_dir), tmp_path / "out", "last", overwrite=False)
    assert said[-1].endswith("verified for SGLang and vLLM")
    served = ServedDraft(tmp_path / "out", target.embedding)
    assert served.captured_layers is None
    ours = step_logits(draft, target, ids, 3)
    g = target.capture(Batch(ids, mask, (len(ids),))).g
    for t in (0, 1, 7, len(ids) - 4):
        theirs = [
            served.prefill(g[: t + 1], ids[1 : t + 2])[-1],
            served.step(int(ids[t + 2])),
            served.step(int(ids[t + 3])),
        ]
        for i in range(3):
            torch.testing.assert_close(ours[i][t], theirs[i], rtol=1e-4, atol=1e-4)


EAGLE_3_1 = {"draft.overrides": {"draft_vocab_size": 64, "norm_before_fc": True, "norm_output": True}}


@pytest.mark.parametrize("changes", [{}, NARROW, EAGLE_3_1])
def test_a_warm_start_continues_where_the_export_was(make_config, tmp_path, changes):
    config = make_config(**changes)
    train(config)
    export_run(Path(config.run_dir), tmp_path / "draft", "last", overwrite=False)
    warm = make_config(
        run_dir=str(tmp_path / "warm"),
        max_steps=1,
        **{"draft": {"init_from": str(tmp_path / "draft")}, "optim.lr": 1e-30, "checkpoint.every": 1},
    )
    train(warm)
    assert losses(warm.run_dir)[-1]["eval/tau_sim"] == losses(config.run_dir)[-1]["eval/tau_sim"]
    for name in ("master", "d2t", "t2d"):
        assert torch.equal(weights(warm.run_dir)[name], weights(config.run_dir)[name]), name


def test_a_checkpoint_to_start_from_is_read_once_for_its_shape(make_config, tmp_path, monkeypatch):
    """And again where it, or the target, is another than before."""
    train(make_config(max_steps=1))
    export_run(Path(make_config().run_dir), tmp_path / "draft", "last", overwrite=False)
    config, reads = make_config(draft={"init_from": str(tmp_path / "draft")}), []
    original = serving.load_weights
    monkeypatch.setattr(serving, "load_weights", lambda *given: reads.append(given) or original(*given))
    shapes = [draft_shape(config) for _ in range(3)]
    assert shapes[0] == shapes[1] == shapes[2] and shapes[0].draft_vocab_size == 64 and len(reads) == 1
    file = tmp_path / "draft" / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"draft_vocab_size": 32}))
    with pytest.raises(ValueError, match=r"is not a draft to start from: .*config\.json makes it"):
        draft_shape(config)
    file.write_text(json.dumps(fields))
    assert draft_shape(config) == shapes[0] and len(reads) == 3
    target = shutil.copytree(config.target.path, tmp_path / "target")
    elsewhere = config.model_copy(update={"target": config.target.model_copy(update={"path": str(target)})})
    assert draft_shape(elsewhere) == shapes[0] and len(reads) == 4
    facts = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(facts | {"vocab_size": 200}))
    with pytest.raises(ValueError, match="is not a draft to start from"):
        draft_shape(elsewhere)


def test_a_warm_start_from_a_checkpoint_of_another_trainer_says_what_its_flag_may_mean(make_config, tmp_path, capsys):
    train(make_config(**EAGLE_3_1))
    export_run(Path(make_config().run_dir), tmp_path / "draft", "last", overwrite=False)
    said = []
    for name in ("ours", "theirs"):
        capsys.readouterr()
        train(make_config(run_dir=str(tmp_path / name), max_steps=1, draft={"init_from": str(tmp_path / "draft")}))
        said.append("warning: draft.init_from: norm_output is true" in capsys.readouterr().out)
        file = tmp_path / "draft" / "config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "trained_by"}))
    assert said == [False, True]


def test_a_run_opens_as_it_was_trained(make_config):
    """Also where H != Ht: the embedding is the run's own, not one projected anew."""
    config = make_config(**NARROW)
    train(config)
    _, _, draft = open_run(Path(config.run_dir), "last")
    saved = checkpoint.read_state(checkpoint.checkpoints_of_run(Path(config.run_dir), "last")[0])
    assert torch.equal(draft.embed_tokens.weight, weights(config.run_dir)["embed_tokens.weight"])
    assert saved.step == 6 and torch.equal(draft.t2d.nonzero().flatten(), draft.draft_ids)
    flat = torch.cat([p.flatten() for p in draft.trainable().values()])
    assert torch.equal(flat, weights(config.run_dir)["master"])


def test_a_damaged_best_checkpoint_is_passed_over(make_config, tmp_path):
    """Export takes the newest readable one and says so; a step asked for by its number is not replaced."""
    config = make_config(**{"checkpoint.every": 2, "checkpoint.keep": 3})
    train(config)
    run_dir = Path(config.run_dir)
    asked, instead, *_ = checkpoint.checkpoints_of_run(run_dir)
    (tensors,) = asked.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=rf"{asked.name} is unreadable.*; {instead.name} is used instead"):
        export_run(run_dir, tmp_path / "out", "best", overwrite=False)
    with pytest.raises(ValueError, match=f"{asked.name} is unreadable"):
        open_run(run_dir, str(int(asked.name[5:])))


def test_init_from_the_target_copies_its_head_and_passes_its_high_state(make_config, tmp_path):
    for init in ("target", "random"):
        config = make_config(run_dir=str(tmp_path / init), max_steps=1, **{"draft.init": init, "optim.lr": 1e-9})
        train(config)
        _, target, draft = open_run(Path(config.run_dir))
        high = torch.randn(5, target.hidden_size)
        g = torch.cat([torch.randn(5, 2 * target.hidden_size), high], -1)
        from_target = (
            torch.allclose(draft.lm_head.weight, target.head.weight[draft.draft_ids], atol=1e-6),
            torch.allclose(draft.norm.weight, SURE * target.final_norm, atol=1e-6),
            torch.allclose(draft.combine(g), high, atol=1e-4),
        )
        assert from_target == (init == "target",) * 3
