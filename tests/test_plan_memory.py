"""What does not fit is said, by --plan and before a run loads anything, with a setting that makes it fit."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from small_blocks import OVERRIDES, block_run
from small_runs import losses
from tiny import refusal

from fastdraft.config import load_config
from fastdraft.dist import mesh
from fastdraft.files import GIB
from fastdraft.run import plan
from fastdraft.run.plan import memory_lines, predict

CPU = torch.device("cpu")


@pytest.fixture(params=["eagle3", *OVERRIDES])
def run_yaml(request, tree, tmp_path):
    if request.param != "eagle3":
        return block_run(tree, tmp_path, request.param)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


def advised(line: str) -> list[str]:
    return re.search(r"it would fit with (.*)$", line)[1].split(" and ")


@pytest.mark.parametrize(
    "absurd",
    [
        ("chunk_rows=1000000000", "data.pack_tokens=4000000"),
        ("data.pack_tokens=400000000", "data.max_length=400000000"),
        ("step=reference", "data.pack_tokens=8000000", "data.max_length=8000000", "block.anchors=4000000"),
    ],
    ids=["chunk_rows", "pack_tokens", "reference"],
)
def test_what_is_advised_fits_and_twice_as_much_does_not(run_yaml, runs, absurd, request):
    if "eagle3" in request.node.name:
        absurd = [setting for setting in absurd if not setting.startswith("block.")]
    out = runs("train", run_yaml, *absurd, "--plan")
    line = out.strip().splitlines()[-1]
    assert re.match(
        r"warning: a step needs [\d,]+\.\d GiB by prediction, and this machine has [\d.]+ GiB; the most is ", line
    )
    settings = advised(line)
    assert "it would fit" not in runs("train", run_yaml, *absurd, *settings, "--plan")
    more = [f"{name}={2 * int(value)}" for name, value in (setting.split("=") for setting in settings)]
    assert "it would fit" in runs("train", run_yaml, *absurd, *more, "--plan")


def test_settings_that_fit_together_are_named_together(tree, run_yaml, monkeypatch):
    config = load_config(run_yaml, ["data.pack_tokens=65536", "data.max_length=65536", "chunk_rows=65536"])
    small = load_config(run_yaml, ["data.pack_tokens=512", "data.max_length=512", "chunk_rows=64"])
    limit = predict(small, CPU).memory_bytes
    monkeypatch.setattr(plan, "_memory_of", lambda device: limit)
    (line,) = memory_lines(config, CPU)
    lowered = load_config(run_yaml, ["data.pack_tokens=65536", "data.max_length=65536", *advised(line)])
    assert predict(lowered, CPU).memory_bytes <= limit and memory_lines(lowered, CPU) == []
    assert "data.pack_tokens=" in line and "data.max_length=" in line
    monkeypatch.setattr(plan, "_memory_of", lambda device: 1000.0)
    assert "no setting of the step makes it fit: it takes a smaller target or draft" in memory_lines(config, CPU)[0]


def test_a_run_says_it_first_and_trains(run_yaml, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "_memory_of", lambda device: 1000.0)
    assert runs("train", run_yaml, "max_steps=1").startswith("warning: a step needs ")
    assert losses(tmp_path / "run")[0]["step"] == 1


def test_a_gpu_that_is_not_here_is_compared_by_what_it_is_said_to_have(run_yaml, runs, fastdraft, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    big = ("chunk_rows=100000000", "data.pack_tokens=4000000", "device=cuda", "precision=bf16", "--plan")
    assert "no GPU is here to compare this with: --gpu-gib says how much" in runs("train", run_yaml, *big)
    assert "and the GPU has 24.0 GiB" in runs("train", run_yaml, *big, "--gpu-gib", 24)
    assert "GPU has" not in runs("train", run_yaml, "device=cuda", "precision=bf16", "--plan", "--gpu-gib", 24)
    assert "--gpu-gib belongs to --plan" in refusal(fastdraft("train", run_yaml, "--gpu-gib", 24))


def test_processes_of_one_machine_share_its_memory(run_yaml, monkeypatch):
    config, whole = load_config(run_yaml, []), plan._memory_of(CPU)
    assert GIB < whole < 2**50
    monkeypatch.setattr(mesh, "machine_share", lambda: 4)
    assert plan._memory_of(CPU) == whole / 4
    monkeypatch.setattr(plan, "_memory_of", lambda device: 1000.0)
    assert "for each of 4 processes" in memory_lines(config, CPU)[0]
