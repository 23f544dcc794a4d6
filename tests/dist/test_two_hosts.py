"""A run of two hosts, each with a network, processes, a name and shared memory of its own, on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from hosts import ADDRESSES, Hosts
from small_runs import losses
from tiny import save_target, write_chats

from fastdraft.dist import mesh


def write_run(folder: Path, **changes) -> None:
    tree = {
        "target": {"path": str(save_target(folder / "target")), "dtype": "fp32"},
        "data": {"paths": [str(folder / "chats.jsonl")], "eval_fraction": 0.05, "max_length": 128, "pack_tokens": 256}
        | {"cache_dir": str(folder / "cache"), "num_workers": 0},
        "draft": {"overrides": {"draft_vocab_size": 64}},
        "optim": {"packs_per_step": 4},
        "metrics": {"log_every": 1, "tensorboard": False},
        "max_steps": 6,
        "ttt_length": 3,
        "precision": "fp32",
        "device": "cpu",
    }
    write_chats(folder / "chats.jsonl", 100)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree | changes))


def torchrun(folder: Path, *settings: str) -> list[str]:
    """As docs/fleet.md gives it, with two processes a host."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    meet = ["--rdzv-backend", "c10d", "--rdzv-id", "draft", "--rdzv-endpoint", "a:29500"]
    return [*start, *meet, "-m", "fastdraft.cli", "train", str(folder / "run.yaml"), *settings]


@pytest.mark.slow
def test_hosts_whose_names_are_their_loopbacks(tmp_path):
    """As Debian installs them. The run is that of one process, and its files are where both see them."""
    write_run(tmp_path)
    alone = [sys.executable, "-m", "fastdraft.cli", "train", str(tmp_path / "run.yaml"), f"run_dir={tmp_path / 'one'}"]
    subprocess.run(alone, check=True, capture_output=True)
    with Hosts(tmp_path) as hosts:
        command = torchrun(tmp_path, f"run_dir={tmp_path / 'two'}", "dist.sequence=2")
        first, _ = [hosts.start(host, *command) for host in "ab"]
        assert first.wait(timeout=180) == 0, hosts.said_by("a")[-3000:]
        for rank, (host, address) in zip((0, 2), ADDRESSES.items(), strict=True):
            told = f"fastdraft, rank {rank}: {host} is 127.0.1.1 to itself, so other hosts meet it at {address} (wire)"
            assert told in hosts.said_by(host)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [x["step"] for x in one] == [x["step"] for x in two] == [*range(1, 7), 6]
    for x, y in zip(one, two, strict=True):
        for name in {"loss", "tau_sim", "grad_norm", "eval/loss"} & x.keys():
            assert y[name] == pytest.approx(x[name], rel=1e-4), name


@pytest.mark.slow
def test_the_network_goes(tmp_path):
    """All processes of both hosts end, each with a sentence that names a rank of the other."""
    write_run(tmp_path, max_steps=100_000, dist={"silent_s": 6.0})
    with Hosts(tmp_path) as hosts:
        for host in "ab":
            hosts.start(host, *torchrun(tmp_path, f"run_dir={tmp_path / 'two'}"))
        hosts.wait_until("a", "step 5/")
        hosts.wire("down")
        gone = "rank 2 on b, which gave no sign of life for dist.silent_s=6 s"
        ended = {"a": re.escape(gone), "b": "rank 0 on a, or torchrun there"}
        deadline = time.monotonic() + 60
        for host, words in ended.items():
            pattern = rf"fastdraft, rank \d: another process of this run has ended.*: {words}"
            while len(re.findall(pattern, hosts.said_by(host))) < 2:
                assert time.monotonic() < deadline, hosts.said_by(host)[-3000:]
                time.sleep(0.1)


@pytest.mark.parametrize("names, told", [(None, "127.0.0.1"), ("127.0.1.1", "127.0.1.1")])
def test_the_address_that_gloo_would_tell(names, told, tmp_path):
    asked = "from fastdraft.dist import mesh; print(mesh._address_of_name())"
    with Hosts(tmp_path, names) as hosts:
        assert hosts.start("a", sys.executable, "-c", asked).wait() == 0, hosts.said_by("a")
        assert hosts.said_by("a").split() == [told]


def test_an_interface_is_named_only_where_it_must(monkeypatch, capsys):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is afterwards what it was before
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mesh.psutil, "net_if_addrs", lambda: {"eth7": [type("", (), {"address": "10.9.8.7"})]})
    monkeypatch.setattr(mesh, "_address_towards", lambda address, port: "10.9.8.7" if address != "127.0.0.1" else address)

    def named(told: str, of_others: str = "10.9.8.6") -> str | None:
        monkeypatch.setattr(mesh, "_address_of_name", lambda: told)
        store = dist.HashStore()
        store.set("address/1", of_others)
        mesh._name_interface(store, 0, 2)
        assert store.get("address/0") == b"127.0.0.1"
        return os.environ.get("GLOO_SOCKET_IFNAME")

    assert named("10.1.2.3") is None
    assert named("127.0.1.1", of_others="127.0.0.1") is None, "the other is on this host, too"
    assert named("::1") == "eth7" and "other hosts meet it at 10.9.8.7 (eth7)" in capsys.readouterr().out
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth3")
    assert named("127.0.1.1") == "eth3" and capsys.readouterr().out == ""
