"""Runs whose hosts keep things in other places, or other things in the same place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from small_runs import by_two_ranks, losses
from tiny import save_target, write_chats

from fastdraft.config import Config
from fastdraft.target import hf
from fastdraft.train import train


def train_as_told(configs: list[Config], said: Path) -> None:
    """Trains this rank's config; what it was refused with is written down, and what it loaded its target from."""
    rank = int(os.environ["RANK"])
    load = hf.AutoModelForCausalLM.from_pretrained

    def noted(path, *args, **kwargs):
        (said / f"loaded-{rank}").write_text(str(path))
        return load(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.AutoModelForCausalLM, "from_pretrained", noted)
        try:
            train(configs[rank])
        except ValueError as error:
            (said / f"refused-{rank}").write_text(str(error))


def test_each_host_reads_its_own_target_and_keeps_its_own_cache(make_config, target_dir, tmp_path):
    train(make_config(run_dir=str(tmp_path / "one")))
    elsewhere = Path(shutil.copytree(target_dir, tmp_path / "elsewhere"))
    other = {"target.path": str(elsewhere), "data.cache_dir": str(tmp_path / "cache")}
    configs = [make_config(), make_config(**other)]
    assert by_two_ranks(train_as_told, configs, tmp_path) == [0, 0]
    assert [(tmp_path / f"loaded-{rank}").read_text() for rank in (0, 1)] == [str(target_dir), str(elsewhere)]
    assert list((tmp_path / "cache").iterdir())
    for two, one in zip(losses(configs[0].run_dir), losses(tmp_path / "one"), strict=True):
        assert {name: two[name] for name in one} == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("what", ["target", "data"])
def test_hosts_that_hold_other_things_are_refused(make_config, target_dir, tmp_path, monkeypatch, what):
    configs = [make_config(), make_config()]
    if what == "target":
        other = save_target(tmp_path / "other", seed=1)
        configs[1] = make_config(**{"target.path": str(other), "data.cache_dir": str(tmp_path / "cache")})
    else:  # a folder of each host's own, by the same name
        for rank in (0, 1):
            (tmp_path / f"host-{rank}").mkdir()
            write_chats(tmp_path / f"host-{rank}/chats.jsonl", 24, seed=rank)
        changes = {"data.paths": ["chats.jsonl"], "data.cache_dir": str(tmp_path / "cache")}
        configs = [make_config(**changes)] * 2
    assert by_two_ranks(train_there, configs, tmp_path) == [0, 0]
    name = {"target": "the fingerprint of target.path is '", "data": "data.paths holds is '24 samples, "}[what]
    for rank in (0, 1):
        refused = (tmp_path / f"refused-{rank}").read_text()
        assert name in refused and "on rank 0 (" in refused and "on rank 1 (" in refused
    assert not list(Path(configs[0].run_dir).glob("checkpoints/*"))


def train_there(configs: list[Config], said: Path) -> None:
    folder = said / f"host-{os.environ['RANK']}"
    if folder.is_dir():
        os.chdir(folder)
    train_as_told(configs, said)
