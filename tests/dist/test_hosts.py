"""A run of two hosts, each with a network, processes, a name and shared memory of its own, on this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from small_runs import losses
from tiny import save_target, write_chats

from fastdraft.dist import mesh

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
# What a host does before its command: shared memory of its own, and names for itself and the other.
ENTER = """
hostname "$1"; mount -t tmpfs tmpfs /dev/shm; mount --bind "$2" /etc/hosts
shift 2; exec "$@"
"""


class Hosts:
    """Two hosts, joined by a wire. `names`: what each one's own name leads to on it; None: its name is not known there."""

    def __init__(self, folder: Path, names: str | None):
        self.folder, self.spaces = folder, {host: f"fd{os.getpid()}{host}" for host in ADDRESSES}
        for host in ADDRESSES:
            self._run("ip", "netns", "add", self.spaces[host])
        a, b = self.spaces.values()
        self._run("ip", "link", "add", "wire", "netns", a, "type", "veth", "peer", "name", "wire", "netns", b)
        for host, address in ADDRESSES.items():
            inside = ("ip", "-n", self.spaces[host])
            self._run(*inside, "addr", "add", f"{address}/24", "dev", "wire")
            for link in ("wire", "lo"):
                self._run(*inside, "link", "set", link, "up")
            lines = ["127.0.0.1 localhost", *(f"{at} {other}" for other, at in ADDRESSES.items() if other != host)]
            lines += [f"{names} {host}"] if names else []
            (folder / f"hosts of {host}").write_text("\n".join(lines) + "\n")

    @staticmethod
    def _run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no host can be made here: {' '.join(command)}: {done.stderr.strip()}")

    def start(self, host: str, *command: str) -> subprocess.Popen:
        """The command on a host; what it prints is in the file `said by HOST`."""
        inside = ["ip", "netns", "exec", self.spaces[host]]
        own = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        enter = ["sh", "-ec", ENTER, "sh", host, str(self.folder / f"hosts of {host}")]
        with (self.folder / f"said by {host}").open("w") as said:
            return subprocess.Popen([*inside, *own, *enter, *command], stdout=said, stderr=subprocess.STDOUT)

    def said_by(self, host: str) -> str:
        return (self.folder / f"said by {host}").read_text()

    def cut(self) -> None:
        """Takes the wire away."""
        self._run("ip", "-n", self.spaces["b"], "link", "set", "wire", "down")

    def close(self) -> None:
        for space in self.spaces.values():
            with suppress(OSError):
                subprocess.run(["ip", "netns", "del", space], capture_output=True)


@pytest.fixture
def hosts(tmp_path, request):
    if os.geteuid() or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("making hosts needs root, ip and unshare")
    made = Hosts(tmp_path, request.param)
    processes: list[subprocess.Popen] = []
    yield made, processes
    for process in processes:
        process.kill()
        process.wait()
    made.close()


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
@pytest.mark.parametrize("hosts", ["127.0.1.1"], indirect=True)
def test_hosts_whose_names_are_their_loopbacks(hosts, tmp_path):
    """As Debian installs them. The run is that of one process, and its files are where both see them."""
    made, processes = hosts
    write_run(tmp_path)
    alone = [sys.executable, "-m", "fastdraft.cli", "train", str(tmp_path / "run.yaml"), f"run_dir={tmp_path / 'one'}"]
    subprocess.run(alone, check=True, capture_output=True)
    processes += [made.start(host, *torchrun(tmp_path, f"run_dir={tmp_path / 'two'}", "dist.sequence=2")) for host in "ab"]
    codes = [process.wait(timeout=180) for process in processes]
    assert codes[0] == 0, made.said_by("a")[-3000:]  # b's torchrun may find that of a, which keeps its store, gone
    for rank, (host, address) in zip((0, 2), ADDRESSES.items(), strict=True):
        told = f"fastdraft, rank {rank}: {host} is 127.0.1.1 to itself, so other hosts meet it at {address} (wire)"
        assert told in made.said_by(host)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [x["step"] for x in one] == [x["step"] for x in two] == [*range(1, 7), 6]
    for x, y in zip(one, two, strict=True):
        for name in {"loss", "tau_sim", "grad_norm", "eval/loss"} & x.keys():
            assert y[name] == pytest.approx(x[name], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("hosts", ["127.0.1.1"], indirect=True)
def test_the_network_goes(hosts, tmp_path):
    """All processes of both hosts end, each with a sentence that names a rank of the other."""
    made, processes = hosts
    write_run(tmp_path, max_steps=100_000, dist={"silent_s": 6.0})
    processes += [made.start(host, *torchrun(tmp_path, f"run_dir={tmp_path / 'two'}")) for host in "ab"]
    deadline = time.monotonic() + 120
    while "step 5/" not in made.said_by("a"):
        assert time.monotonic() < deadline and processes[0].poll() is None, made.said_by("a")[-3000:]
        time.sleep(0.1)
    made.cut()
    ended = {"a": r"rank 2 on b, which gave no sign of life for dist\.silent_s=6 s", "b": "rank 0 on a, or torchrun there"}
    deadline = time.monotonic() + 60
    for host, words in ended.items():
        pattern = rf"fastdraft, rank \d: another process of this run has ended.*: {words}"
        while len(re.findall(pattern, made.said_by(host))) < 2:
            assert time.monotonic() < deadline, made.said_by(host)[-3000:]
            time.sleep(0.1)


@pytest.mark.parametrize("hosts, told", [(None, "127.0.0.1"), ("127.0.1.1", "127.0.1.1")], indirect=["hosts"])
def test_the_address_that_gloo_would_tell(hosts, told):
    made, _ = hosts
    asked = "from fastdraft.dist import mesh; print(mesh._address_of_name())"
    assert made.start("a", sys.executable, "-c", asked).wait() == 0, made.said_by("a")
    assert made.said_by("a").split() == [told]


def test_an_interface_is_named_only_where_it_must(monkeypatch, capsys):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
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
