"""A tiny target on disk, chats, and run configs, for every test that trains or loads something."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

# Without a GPU kernels run interpreted, which Triton must know before transformers imports it.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
# The command line's console keeps the width that COLUMNS names when it is made, and pytest-xdist names one to its workers.
os.environ.pop("COLUMNS", None)

from tiny import save_target, write_chats

from fastdraft import cli
from fastdraft.config import Config, parse_config
from fastdraft.model import precision

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped without one, whichever folder is run."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 24)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tree(target_dir, chats, cache_dir, tmp_path) -> dict:
    """The settings of a run of 6 steps in `tmp_path`/run, as a YAML file would hold them."""
    return {
        "target": {"path": str(target_dir), "dtype": "fp32"},
        "draft": {"overrides": {"draft_vocab_size": 64}},
        "data": {
            "paths": [str(chats)],
            "eval_fraction": 0.2,
            "max_length": 64,
            "pack_tokens": 96,
            "cache_dir": str(cache_dir),
            "num_workers": 0,
        },
        "optim": {"lr": 1e-2, "packs_per_step": 2, "warmup_ratio": 0.2},
        "checkpoint": {"every": 2, "keep": 2},
        "eval": {"every": 3},
        "metrics": {"log_every": 2, "tensorboard": False},
        "run_dir": str(tmp_path / "run"),
        "ttt_length": 3,
        "max_steps": 6,
        "precision": "fp32",
        "device": "cpu",
    }


@pytest.fixture
def make_config(tree):
    """A Config from `tree` with dotted changes: make_config(**{"optim.lr": 1e-3})."""

    def make(**changes) -> Config:
        mine = json.loads(json.dumps(tree))
        for key, value in changes.items():
            *parents, leaf = key.split(".")
            section = mine
            for name in parents:
                section = section.setdefault(name, {})
            section[leaf] = value
        return parse_config(mine, Config)

    return make


@pytest.fixture
def fastdraft(monkeypatch, capsys):
    """fastdraft("train", "x.yaml") -> exit code, standard output, standard error."""

    monkeypatch.setattr(cli, "threads_beside_others", dict)  # what a busy machine adds would stay for later tests

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastdraft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return (exit.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def cpu(monkeypatch):
    """cpu(factor): from now on this CPU takes so many times as long in bf16 as in fp32."""
    return lambda factor: monkeypatch.setattr(precision, "bf16_slowdown", lambda: factor)


@pytest.fixture
def runs(fastdraft):
    """Calls a command that must succeed; what it printed."""

    def run(*arguments) -> str:
        code, out, err = fastdraft(*arguments)
        assert code == 0, out + err
        return out

    return run
