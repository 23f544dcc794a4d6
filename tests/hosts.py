"""Two hosts on this machine, for what has to be shown between hosts: each has a network, processes, a name and shared
memory of its own, and a wire joins them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
# What a host does before its command: shared memory of its own, and names for itself and the other.
ENTER = """
hostname "$1"; mount -t tmpfs tmpfs /dev/shm; mount --bind "$2" /etc/hosts
shift 2; exec "$@"
"""


class Hosts:
    """Until it is left. `names`: what each one's own name leads to on it, as Debian has it; None: it is not known there."""

    def __init__(self, folder: Path, names: str | None = "127.0.1.1"):
        needed = ("ip", "unshare", "mount", "hostname")
        if os.geteuid() or not all(shutil.which(name) for name in needed):
            pytest.skip(f"making hosts needs root, {', '.join(needed)}")
        self.processes: list[subprocess.Popen] = []
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

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            self.close()
            pytest.skip(f"no host can be made here: {' '.join(command)}: {done.stderr.strip()}")

    def start(self, host: str, *command: str) -> subprocess.Popen:
        """The command on a host; what it prints is in the file `said by HOST`."""
        inside = ["ip", "netns", "exec", self.spaces[host]]
        own = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        enter = ["sh", "-ec", ENTER, "sh", host, str(self.folder / f"hosts of {host}")]
        with (self.folder / f"said by {host}").open("w") as said:
            process = subprocess.Popen([*inside, *own, *enter, *command], stdout=said, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    def said_by(self, host: str) -> str:
        return (self.folder / f"said by {host}").read_text()

    def wire(self, state: str) -> None:
        """Takes the wire away (down), or lays it again (up)."""
        self._run("ip", "-n", self.spaces["b"], "link", "set", "wire", state)

    def wait_until(self, host: str, said: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while said not in self.said_by(host):
            running = all(process.poll() is None for process in self.processes)
            assert running and time.monotonic() < deadline, self.said_by(host)[-3000:]
            time.sleep(0.05)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
