"""What holds of every method that fills blocks, through the commands a user types."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file
from small_blocks import OVERRIDES, block_run
from small_runs import at_step, by_two_ranks, losses

from fastdraft.checkpoint import list_checkpoints
from fastdraft.config import Config, parse_config


@pytest.fixture(params=OVERRIDES)
def run_yaml(request, tree, tmp_path):
    return block_run(tree, tmp_path, request.param)


def losses_alone(run_dir) -> list[float]:
    return [record["loss"] for record in losses(run_dir) if "loss" in record]


def _train(tree):
    from fastdraft.train import train

    train(parse_config(tree, Config))


def test_two_ranks_train_what_one_does(tree, run_yaml, tmp_path):
    tree |= {"max_steps": 4, "block": {"anchors": 3}, "metrics": {"log_every": 1, "tensorboard": False}}
    _train(tree | {"run_dir": str(tmp_path / "one")})
    assert by_two_ranks(_train, tree | {"run_dir": str(tmp_path / "two")}) == [0, 0]
    assert losses_alone(tmp_path / "one") == pytest.approx(losses_alone(tmp_path / "two"), rel=1e-4)


def test_the_engines_train_alike(run_yaml, runs, tmp_path):
    for engine in ("fused", "reference"):
        runs("train", run_yaml, f"step={engine}", f"run_dir={tmp_path / engine}", "optim.lr=1e-3")
    assert losses_alone(tmp_path / "fused") == pytest.approx(losses_alone(tmp_path / "reference"), rel=1e-4)


def test_a_store_feeds_it_as_the_target_does(run_yaml, runs, tmp_path):
    store = tmp_path / "store"
    runs("features", "capture", run_yaml, store)
    runs("train", run_yaml)
    runs("train", run_yaml, f"features.path={store}", f"run_dir={tmp_path / 'stored'}")
    assert losses_alone(tmp_path / "stored") == pytest.approx(losses_alone(tmp_path / "run"), rel=1e-5)


def test_muon_trains_it_is_stopped_goes_on_and_is_exported(run_yaml, runs, fastdraft, tmp_path, monkeypatch):
    """Bit for bit as without a stop, also in bf16; the plan says what Muon steps and at which rates."""
    muon = ("optim.optimizer=muon", "optim.muon_lr=0.04", "precision=bf16")
    assert "at a rate of 0.04" in runs("train", run_yaml, *muon, "--plan")
    runs("train", run_yaml, *muon, f"run_dir={tmp_path / 'whole'}")
    runs("train", run_yaml, "optim.optimizer=adamw", "precision=bf16", f"run_dir={tmp_path / 'adamw'}")
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda _: signal.raise_signal(signal.SIGTERM))
        assert fastdraft("train", run_yaml, *muon)[0] == 128 + signal.SIGTERM
    assert "step-00000003, step 3" in runs("train", run_yaml, *muon).replace("\n", "")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    states = [
        load_file(next(list_checkpoints(tmp_path / name)[-1].glob("*.safetensors"))) for name in ("run", "whole", "adamw")
    ]
    assert all(torch.equal(states[0][name], x) for name, x in states[1].items())
    assert not torch.equal(states[2]["master"], states[0]["master"])
    assert "verified" in runs("export", tmp_path / "run", tmp_path / "out")
