"""What ends one process of a run ends all of them, with a sentence that says which one it was, where, and why.

A process that waits for another in a collective would wait for as long as that takes, or, on a GPU, for ever. So each one
gives a sign of life every second to the store where the processes met, and threads beside the training look out for

    a message of a process that fails           within seconds, with its reason
    a process of this machine that is gone      within seconds
    a process that gives no sign of life        after `silent_s`: it is stopped, or its machine is gone
    a store that does not answer                after `silent_s`

Each process looks at the sign of the next rank only, and at one message for all, so that a store serves many thousands.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

BEAT_S = 1.0  # seconds between two signs of life
GRACE_S = 5.0  # for the training to end by itself once something was heard
FAILED = "failed"  # the message's key


class LostPeer(RuntimeError):
    """Another process of the run has ended; the message is a sentence for the user."""


class KeyValueStore(Protocol):
    """What is asked of torch.distributed's."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass(frozen=True)
class Member:
    """Where a process of the run is to be found."""

    host: str
    pid: int
    processes: str | None  # names what /proc shows: equal where two processes see each other; None: there is no /proc

    @classmethod
    def here(cls, host: str) -> Member:
        try:
            seen = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        except OSError:
            seen = None
        return cls(host, os.getpid(), seen)

    def state(self) -> str | None:
        """One letter of /proc, T is stopped; None: the process is gone."""
        try:
            letter = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return None
        return None if letter in "ZX" else letter


class Watch:
    """Signs of life of this process, and a look at the others', from `start` to `stop`."""

    def __init__(
        self,
        store: KeyValueStore,
        rank: int,
        members: list[Member],  # by rank
        silent_s: float,
        meetings: Callable[[], int],  # how often this process has met the others, for who comes last
        speaker: str,  # how this process names itself in a message
    ):
        self.store, self.rank, self.members, self.silent_s = store, rank, members, silent_s
        self.meetings, self.speaker = meetings, speaker
        self.heard: str | None = None  # the sentence of what has ended the run
        self._beats = 0
        self._stopped = threading.Event()
        here = members[rank].processes
        near = [other for other, member in enumerate(members) if here is not None and member.processes == here]
        self._near = [other for other in near if other != rank]
        work = (("signs", self._give_signs), ("judge", self._judge))
        self._threads = [threading.Thread(target=f, name=f"fastdraft-{name}", daemon=True) for name, f in work]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """From here on nothing is heard and nothing is ended."""
        self._stopped.set()

    def named(self, rank: int) -> str:
        return f"rank {rank} on {self.members[rank].host}"

    def tell(self, what: str) -> str:
        """Ends the run: all processes hear `what`, unless something was told before. Gives what they hear."""
        return self.store.compare_set(FAILED, "", what).decode()

    # --- the threads -------------------------------------------------------------------------------------------------

    def _give_signs(self) -> None:
        following, last, since = (self.rank + 1) % len(self.members), b"", 0
        while self.heard is None:
            try:
                self.store.set(f"sign/{self.rank}", json.dumps([self._beats, self.meetings()]))
                if self.store.check([FAILED]):
                    self.heard = self.store.get(FAILED).decode()
                gone = [other for other in self._near if self.members[other].state() is None]
                if gone and not self._stopped.is_set():
                    self.heard = self.tell(
                        f"another process of this run has ended: {self.named(gone[0])}, whose process is gone "
                        "(killed, perhaps because the machine had no memory left)"
                    )
                sign = self.store.get(f"sign/{following}") if self.store.check([f"sign/{following}"]) else b""
                if sign != last:
                    last, since = sign, self._beats
                elif self._beats - since > self.silent_s / BEAT_S:
                    self.heard = self.tell(self._silent(following))
            except Exception as error:  # of whichever kind the store's library has
                if not self._stopped.is_set():
                    self.heard = self._unreachable(str(error).splitlines()[0])
            self._beats += 1
            if self._stopped.wait(BEAT_S):
                return

    def _judge(self) -> None:
        """Ends this process where something was heard and the training, waiting in a library, cannot end itself."""
        beats, since, ticks = -1, 0, 0  # counted in own ticks: a process that was stopped itself accuses nobody
        while not self._stopped.wait(BEAT_S):
            ticks += 1
            if self._beats != beats:
                beats, since = self._beats, ticks
            elif ticks - since > self.silent_s / BEAT_S and self.heard is None:
                self.heard = self._unreachable("no answer")
            if self.heard is not None and not self._stopped.wait(GRACE_S):
                print(f"{self.speaker}: {self.sentence(self.heard)}", file=sys.stderr, flush=True)
                os._exit(1)

    # --- sentences ---------------------------------------------------------------------------------------------------

    @staticmethod
    def sentence(heard: str) -> str:
        return f"{heard}; the same command, given again, goes on"

    def _silent(self, rank: int) -> str:
        stopped = rank in self._near and self.members[rank].state() == "T"
        why = "its process is stopped" if stopped else "its process hangs, or its machine is gone"
        return (
            f"another process of this run has ended or hangs: {self.named(rank)}, which gave no sign of life for "
            f"dist.silent_s={self.silent_s:g} s ({why})"
        )

    def _unreachable(self, error: str) -> str:
        """Of the store, which rank 0 holds, or torchrun for it."""
        gone = 0 in self._near and self.members[0].state() is None
        why = "whose process is gone" if gone else f"or torchrun there: the store of this run cannot be reached ({error})"
        return f"another process of this run has ended: {self.named(0)}, {why}"

    def lost_peer(self, error: BaseException, timeout_s: float) -> NoReturn:
        """After `error`, with which a library said that another process does not answer: finds out which, for some
        seconds, and raises LostPeer. The process that is missed may have been heard of, or it no longer gives signs; where
        all live, one of them did not come for `timeout_s`."""
        self._wait_for(lambda: self.heard is not None, 3 * BEAT_S)
        if self.heard is None:
            self.heard = self._find_missing(error, timeout_s)
        time.sleep(2 * BEAT_S)  # the store may end with this process, and the others are to hear it too
        raise LostPeer(self.sentence(self.heard)) from error

    def _find_missing(self, error: BaseException, timeout_s: float) -> str:
        keys = [f"sign/{rank}" for rank in range(len(self.members))]
        try:
            before = self.store.multi_get(keys)
            self._wait_for(lambda: self.heard is not None, GRACE_S * BEAT_S)
            after = self.store.multi_get(keys)
        except Exception:  # the store is gone with the process that held it
            self._wait_for(lambda: self.heard is not None, 3 * BEAT_S)
            return self.heard or self._unreachable("it has ended")
        if self.heard is not None:
            return self.heard
        silent = [rank for rank, pair in enumerate(zip(before, after, strict=True)) if pair[0] == pair[1]]
        if silent:
            return self.tell(
                f"another process of this run has ended: {self.named(silent[0])}, which gives no sign of life any more"
            )
        met = [json.loads(sign)[1] for sign in after]
        last = min(range(len(met)), key=met.__getitem__)
        if "imed out" in str(error) and met[last] < max(met):
            return self.tell(
                f"a process of this run did not come where the others waited for dist.timeout_s={timeout_s:g} s: "
                f"{self.named(last)}, which is alive and has met the others {met[last]} times, they each other {max(met)}"
            )
        return f"another process of this run has ended, or cannot be reached ({str(error).splitlines()[0]})"

    def _wait_for(self, done: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            time.sleep(BEAT_S / 10)
