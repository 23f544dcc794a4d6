"""What holds of every method that fills blocks, through the commands a user types."""

from __future__ import annotations

import pytest
from small_blocks import OVERRIDES, block_run
from small_runs import by_two_ranks, losses

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
