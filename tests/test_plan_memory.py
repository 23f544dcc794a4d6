"""What does not fit is said, by --plan and before a run loads anything, with a setting that makes it fit."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from small_blocks import OVERRIDES, block_run
from small_runs import by_ranks, losses
from tiny import LLAMA_8B, refusal

from fastdraft import cli
from fastdraft.config import Config, load_config, parse_config
from fastdraft.dist import mesh
from fastdraft.dist.fleet import UNCOUNTED, Hardware, Layout
from fastdraft.files import GIB
from fastdraft.model import precision
from fastdraft.run import inputs, plan
from fastdraft.run.plan import fleet_planner, memory_lines, predict

CPU = torch.device("cpu")


@pytest.fixture(params=["eagle3", *OVERRIDES])
def run_yaml(request, tree, tmp_path):
    return block_run(tree, tmp_path, request.param)


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


@pytest.mark.parametrize("run_yaml", ["eagle3"], indirect=True)
def test_the_memory_of_a_gpu_plans_for_one_whatever_is_here(run_yaml, runs, fastdraft, monkeypatch):
    """`auto` is what a run on a GPU takes; a CPU whose products are slow in bf16 would take fp32."""
    monkeypatch.setattr(precision, "bf16_slowdown", lambda: 20.0)
    auto = ("train", run_yaml, "device=auto", "precision=auto", "target.dtype=auto", "data.pack_tokens=4000000", "--plan")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "predicted for one cpu device" in runs(*auto)
    out = runs(*auto, "--gpu-gib", 1)
    assert "predicted for one cuda device" in out and "and the GPU has 1.0 GiB" in out and "\nprecision: bf16\n" in out
    assert "precision: fp8" in runs(*auto, "precision=fp8", "--gpu-gib", 1)
    said = refusal(fastdraft(*auto, "device=cpu", "--gpu-gib", 1))
    assert "--gpu-gib is the memory of a GPU, and device is cpu; set device=cuda" in said
    # The GPU that is here is not asked about, even where it is too old for float8.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    here = SimpleNamespace(total_memory=80 * GIB, multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: here)
    assert "and the GPU has 1.0 GiB" in runs(*auto, "precision=fp8", "--gpu-gib", 1)


def test_processes_of_one_machine_share_its_memory(run_yaml, monkeypatch):
    config, whole = load_config(run_yaml, []), plan._memory_of(CPU)
    assert GIB < whole < 2**50
    monkeypatch.setattr(mesh, "machine_share", lambda: 4)
    assert plan._memory_of(CPU) == whole / 4
    monkeypatch.setattr(plan, "_memory_of", lambda device: 1000.0)
    assert "for each of 4 processes" in memory_lines(config, CPU)[0]


# --- processes that share a step -----------------------------------------------------------------------------------------


def test_what_is_advised_to_processes_that_share_a_pack_fits(run_yaml, runs):
    """Of one GPU, in --plan, for every method; twice as much does not fit."""
    shared = ("dist.sequence=2", "device=cuda", "precision=bf16", "target.dtype=bf16")
    large = (*shared, "chunk_rows=4096", "data.pack_tokens=4000000", "data.max_length=4000000", "--plan", "--gpu-gib", 2)
    line = runs("train", run_yaml, *large).strip().splitlines()[-1]
    assert re.match(r"warning: a step needs [\d,]+\.\d GiB by prediction, and each GPU has 2\.0 GiB; the most is ", line)
    settings = advised(line)
    assert "a step needs" not in runs("train", run_yaml, *large[:-3], *settings, *large[-3:])
    more = [f"{name}={2 * int(value)}" for name, value in (setting.split("=") for setting in settings)]
    assert "it would fit" in runs("train", run_yaml, *large[:-3], *more, *large[-3:])


def test_what_is_said_is_one_processs_plan(run_yaml):
    """Of its layout: less than as much data with no other to share it takes."""
    large = ["data.pack_tokens=4000000", "data.max_length=4000000", "target.dtype=bf16", "precision=bf16"]
    config, gpu = load_config(run_yaml, [*large, "dist.sequence=2"]), torch.device("cuda")
    (line,) = memory_lines(config, gpu, 0.001)
    shared, alone = (fleet_planner(config, Hardware())(Layout(n, sequence=n)).memory_bytes / GIB for n in (2, 1))
    assert f"a step needs {shared:.1f} GiB by prediction" in line and shared < 0.9 * alone
    assert memory_lines(config, gpu, 1.01 * shared / (1 - UNCOUNTED)) == []
    (line,) = memory_lines(config, gpu, 1.01 * shared)  # a plan of several GPUs leaves as much uncounted
    assert "6% of a GPU is left to what is not counted" in line
    assert [fleet_planner(config, Hardware(gpu_gib=x * shared))(Layout(2, sequence=2)).fits for x in (1.01, 1.08)] == [
        False,
        True,
    ]


def test_a_target_that_is_too_large_is_to_be_sharded(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": 200, "torch_dtype": "bfloat16"}))
    tree = {"target": {"path": str(tmp_path), "dtype": "bf16"}, "data": {"paths": ["chats.jsonl"], "max_length": 4096}}
    tree |= {"optim": {"packs_per_step": 8}, "precision": "bf16", "run_dir": str(tmp_path / "run")}
    monkeypatch.setattr(mesh, "world", lambda: 8)
    monkeypatch.setattr(mesh, "host_size", lambda: 8)
    config = parse_config(tree | {"dist": {"target": "replicated"}}, Config)
    (line,) = memory_lines(config, torch.device("cuda"), 80)
    assert advised(line) == ["dist.target=sharded"]
    for target in ("sharded", "auto"):
        config = parse_config(tree | {"dist": {"target": target, "sequence": 2}}, Config)
        assert memory_lines(config, torch.device("cuda"), 80) == []
    config = parse_config(tree | {"features": {"path": str(tmp_path), "mode": "read"}, "dist": {"sequence": 2}}, Config)
    assert memory_lines(config, torch.device("cuda"), 20) == []  # the target's layers are on the disk


def _train_in_little_memory(file: str, said: Path) -> None:
    plan._memory_of = lambda device: 1000.0
    sys.argv = ["fastdraft", "train", file]
    with (said / f"of {os.environ['RANK']}").open("w") as sys.stdout:
        cli.main()


@pytest.mark.parametrize("run_yaml", ["eagle3"], indirect=True)
@pytest.mark.parametrize("share", ["dist.sequence", "dist.tensor"])
def test_processes_that_share_a_step_say_it_once_and_train(run_yaml, tmp_path, tree, share):
    section, _, name = share.partition(".")
    run_yaml.write_text(yaml.safe_dump(tree | {section: {name: 2}, "max_steps": 1}))
    assert by_ranks(2, _train_in_little_memory, str(run_yaml), tmp_path) == [0, 0]
    first = (tmp_path / "of 0").read_text().replace("\n", " ")
    assert first.startswith("warning: a step needs ") and first.count("warning: a step needs") == 1
    assert "a step needs" not in (tmp_path / "of 1").read_text()
    assert losses(tmp_path / "run")[0]["step"] == 1


@pytest.mark.parametrize(("gpu_gib", "holders"), [(80, 4), (600, 1), (8, 8)])
def test_a_run_is_told_who_holds_its_target_and_why(tmp_path, monkeypatch, gpu_gib, holders):
    """On hosts of four GPUs: a host's if they can, all of them where even they cannot. What it would need is the plan's."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": 200, "torch_dtype": "bfloat16"}))
    tree = {"target": {"path": str(tmp_path), "dtype": "bf16"}, "data": {"paths": ["chats.jsonl"], "max_length": 4096}}
    config = parse_config(tree | {"precision": "bf16", "run_dir": str(tmp_path / "run")}, Config)
    monkeypatch.setattr(mesh, "world", lambda: 8)
    monkeypatch.setattr(mesh, "host_size", lambda: 4)
    of_gpu = SimpleNamespace(total_memory=gpu_gib * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of_gpu)
    chosen, told = inputs._choose_holders(config, torch.device("cuda"))
    planned = fleet_planner(config, Hardware(gpu_gib=gpu_gib, host=4))
    need = {n: planned(Layout(8, holders=n)).memory_bytes / GIB for n in (1, holders)}
    assert chosen == holders
    begin = f"the target is sharded: each of {holders} processes holds 1/{holders} of every layer"
    why = f"; whole it would need {need[1]:.0f} of the {gpu_gib:.0f} GiB of a GPU"
    never = f"by prediction it does not fit even so, with {need[holders]:.0f} GiB a GPU: see --plan --world 8"
    assert told == {1: [], 4: [begin + why], 8: [begin + why, never]}[holders]
