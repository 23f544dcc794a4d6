"""What ends one process of a run ends all of them, with a sentence that says which one it was, where, and why.

A process that waits for another in a collective would wait for as long as that takes, or, on a GPU, for ever. So each one
gives a sign of life every second to the store where the processes met, and threads beside the training look out for

    a message of a process that fails           within seconds, with its reason
    a process of this machine that is gone      within seconds
    a process that gives no sign of life        after `silent_s`: it is stopped, or its machine is gone
    a store that does not answer                after `silent_s`
    an own piece of work that does not end      after what `Progress` allows: it loops for ever, or its file system hangs

Each process looks at the sign of the next rank only, and at one message for all, so that a store serves many thousands.
That it does not get on is what a process says of itself, since its threads run beside a training that is stuck. While it
waits for others its time stands still. While one of those with whom it shares work has come less far it says nothing, for
a GPU's queue that is full of work with others keeps the host outside any call that is known to wait.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

BEAT_S = 1.0  # seconds between two signs of life
GRACE_S = 5.0  # for the training to end by itself once something was heard
LONGER = 5  # times as long as ever before may a piece of work take
FAILED = "failed"  # the message's key


class LostPeer(RuntimeError):
    """Another process of the run has ended; the message is a sentence for the user."""


class StoppedEarly(BaseException):
    """A signal came, here or to another process of the run, before training began. It is no Exception, so that nothing that
    loads or reads takes it for a fault of its own."""

    def __init__(self, number: int, sentence: str | None = None):
        self.number = number
        super().__init__(sentence or f"{signal.Signals(number).name} came before training began, so no step is lost")

    @classmethod
    def told_in(cls, heard: str) -> StoppedEarly | None:
        """What another process's message says of it: messages between processes are sentences, and name what ended them."""
        found = re.search(rf", which said: {cls.__name__}: (SIG[A-Z]+)", heard)
        return cls(signal.Signals[found[1]], heard) if found else None


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


@dataclass
class Progress:
    """What this process is at, as its main thread says. The watch's threads read it.

    A piece of work may take `least_s`, or LONGER times as long as the longest before that was given the same `least_s`,
    whichever is more: packs and machines differ. The first two of each name may take `first_s`: kernels are compiled in the
    first, and on a GPU the second waits for what the first has queued. The first is no measure for later ones.
    """

    first_s: float
    name: str | None = None  # of the piece of work; None: it is not timed
    least_s: float = 0.0
    moves: int = 0  # goes up whenever this process gets on
    waiting: int = 0  # calls under way in which it waits for others
    counts: dict[str, int] = field(default_factory=dict)  # how much was done with others, by the name of those who do it

    def __post_init__(self) -> None:
        self._began = self._waited = 0.0
        self._times: dict[str, int] = {}  # how often a piece of each name was begun
        self._longest: dict[float, float] = {}  # seconds, by `least_s`

    def begin(self, name: str | None, least_s: float = 0.0) -> None:
        """The piece of work before has ended, and the next begins."""
        now = time.monotonic()
        if self.name is not None and self._times[self.name] > 1:
            took = now - self._began - self._waited
            self._longest[self.least_s] = max(took, self._longest.get(self.least_s, 0.0))
        if name is not None:
            self._times[name] = self._times.get(name, 0) + 1
        self._began, self._waited = now, 0.0
        self.name, self.least_s = name, least_s
        self.moves += 1

    def allowed_s(self) -> float:
        """For the piece of work that is under way."""
        if self.name is None:
            return math.inf
        if self._times[self.name] <= 2:
            return max(self.first_s, self.least_s)
        return max(self.least_s, LONGER * self._longest.get(self.least_s, 0.0))

    def count(self, those: str) -> None:
        """Something more was done with others, or is about to be."""
        self.counts[those] = self.counts.get(those, 0) + 1
        self.moves += 1

    @contextmanager
    def meeting(self, those: str) -> Iterator[None]:
        """Something is done with others here, who may be waited for."""
        self.count(those)
        began = time.monotonic()
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
            self._waited += time.monotonic() - began
            self.moves += 1


class Watch:
    """Signs of life of this process, and a look at the others', from `start` to `stop`."""

    def __init__(
        self,
        store: KeyValueStore,
        rank: int,
        members: list[Member],  # by rank
        silent_s: float,
        progress: Progress,
        speaker: str,  # how this process names itself in a message
        then: str,  # what the user can do, the end of each sentence
        tidy: Callable[[], None] = lambda: None,  # before this process is ended from here, for at most GRACE_S
    ):
        self.store, self.rank, self.members, self.silent_s = store, rank, members, silent_s
        self.progress, self.speaker, self.then = progress, speaker, then
        self.tidy = tidy
        self._main = threading.main_thread().ident
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
        moves, got_on = -1, 0  # by beats, too: for a process that was stopped no time has passed
        while self.heard is None:
            try:
                self.store.set(f"sign/{self.rank}", json.dumps([self._beats, dict(self.progress.counts)]))
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
                if self.progress.waiting or self.progress.moves != moves:
                    moves, got_on = self.progress.moves, self._beats
                elif (self._beats - got_on) * BEAT_S > self.progress.allowed_s() and not self._waits_for_another():
                    self.heard = self.tell(self._stuck((self._beats - got_on) * BEAT_S))
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
                # A file system that hangs may be why, and must not keep this process.
                tidying = threading.Thread(target=self.tidy, daemon=True)
                tidying.start()
                tidying.join(GRACE_S)
                stopped = StoppedEarly.told_in(self.heard)
                os._exit(128 + stopped.number if stopped else 1)

    def _waits_for_another(self) -> bool:
        """Whether one of those who share work with this process has come less far in it."""
        own = dict(self.progress.counts)
        others = (json.loads(sign)[1] for sign in self.store.multi_get([f"sign/{r}" for r in range(len(self.members))]))
        return any(theirs[those] < own[those] for theirs in others for those in own.keys() & theirs.keys())

    # --- sentences ---------------------------------------------------------------------------------------------------

    def sentence(self, heard: str) -> str:
        gave_a_reason = ", which said: " in heard and not re.search(
            ", which said: (StoppedEarly|KeyboardInterrupt):", heard
        )
        return f"{heard}; {'once that is mended, ' if gave_a_reason else ''}{self.then}"

    def _silent(self, rank: int) -> str:
        stopped = rank in self._near and self.members[rank].state() == "T"
        why = "its process is stopped" if stopped else "its process hangs, or its machine is gone"
        return (
            f"another process of this run has ended or hangs: {self.named(rank)}, which gave no sign of life for "
            f"dist.silent_s={self.silent_s:g} s ({why})"
        )

    def _stuck(self, seconds: float) -> str:
        frame = sys._current_frames().get(self._main)
        where = f", in {frame.f_code.co_name} ({frame.f_code.co_filename}, line {frame.f_lineno})" if frame else ""
        return (
            f"a process of this run does not get on: {self.named(self.rank)}, which is alive and has been "
            f"{self.progress.name} for {seconds:.0f} s{where}"
        )

    def _unreachable(self, error: str) -> str:
        """Of the store, which rank 0 holds, or torchrun for it."""
        gone = 0 in self._near and self.members[0].state() is None
        why = "whose process is gone" if gone else f"or torchrun there: the store of this run cannot be reached ({error})"
        return f"another process of this run has ended: {self.named(0)}, {why}"

    def lost_peer(self, error: BaseException, timeout_s: float) -> NoReturn:
        """After `error`, with which a library said that another process does not answer: finds out which, for some
        seconds, and raises LostPeer. The process that is missed may have been heard of, or it no longer gives signs; where
        all live, one of them did not come for `timeout_s`. Raises StoppedEarly where a signal has ended it."""
        self._wait_for(lambda: self.heard is not None, 3 * BEAT_S)
        if self.heard is None:
            self.heard = self._find_missing(error, timeout_s)
        time.sleep(2 * BEAT_S)  # the store may end with this process, and the others are to hear it too
        raise StoppedEarly.told_in(self.heard) or LostPeer(self.sentence(self.heard)) from error

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
        met = [sum(json.loads(sign)[1].values()) for sign in after]
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
