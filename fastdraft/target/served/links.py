"""How a trainer's process takes the states that a server has for it: out of shared memory, or off a TCP connection.

A request has a name. It is expected before it is sent, taken when it was answered, and forgotten whatever came of it.

# n tokens of a document, S states that the server hands over, Ht target hidden
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import httpx
import torch
from torch import Tensor

from fastdraft.target.served.connector import fastdraft_wire as wire
from fastdraft.target.served.connector.fastdraft_handover import new_client, remove_client


class NotYet(Exception):
    """No states this time, and why."""


@dataclass(frozen=True)
class Place:
    """Memory on the host for the states of one request: a tensor that they must fill, or, of an answer whose length nobody
    knows before, whatever it takes up to a largest number of bytes."""

    into: Tensor | None = None  # [n, S, Ht] contiguous
    largest: int = 0

    def room(self, url: str, size: int) -> Tensor:
        """ValueError where so many bytes cannot be this request's."""
        if self.into is None:
            if size > self.largest:
                raise ValueError(f"{url} handed over {size:,} bytes for an answer that can have {self.largest:,} at most")
            return torch.empty(size, dtype=torch.uint8)
        if size != self.into.nbytes:
            raise ValueError(f"{url} handed over {size:,} bytes for {len(self.into)} tokens, not {self.into.nbytes:,}")
        return self.into


class Link(Protocol):
    client: str  # begins the names of this process's requests

    def is_open(self) -> bool:
        """Whether states may still come."""

    def expect(self, name: str, place: Place) -> None:
        """Where the states of this request go."""

    async def take(self, name: str, timeout_s: float) -> Tensor:
        """What they filled, once they have. NotYet when they do not come, ValueError when they are of another size."""

    def forget(self, name: str) -> None:
        """From here on nothing is written for this request."""

    def close(self) -> None:
        """Leaves nothing behind."""


class SharedMemory:
    """A folder that the server writes into. OSError when this process cannot."""

    def __init__(self, url: str, folder: str):
        self.url, self.folder = url, folder
        self.client, self._lock = new_client(folder)
        self._expected: dict[str, Place] = {}

    def is_open(self) -> bool:
        return True

    def expect(self, name: str, place: Place) -> None:
        self._expected[name] = place

    async def take(self, name: str, timeout_s: float) -> Tensor:
        path = f"{self.folder}/{name}"
        deadline, wait = time.monotonic() + timeout_s, 0.0002
        while not os.path.exists(path):
            with suppress(FileNotFoundError), open(f"{path}.error") as file:
                raise NotYet(f"{self.url} could not hand states over in {self.folder}: {file.read()}")
            if time.monotonic() > deadline:
                raise NotYet(f"{self.url} answered, and its states did not come into {self.folder}")
            await asyncio.sleep(wait)
            wait = min(2 * wait, 0.01)
        into = self._expected[name].room(self.url, os.stat(path).st_size)
        # Copying runs beside the loop, which goes on answering.
        await asyncio.to_thread(_read_file, path, into)
        return into

    def forget(self, name: str) -> None:
        self._expected.pop(name, None)
        for left in (name, f"{name}.error"):
            with suppress(OSError):
                os.unlink(f"{self.folder}/{left}")

    def close(self) -> None:
        os.close(self._lock)  # from here on the server writes nothing for this client
        with suppress(OSError):
            remove_client(self.folder, self.client)


class Connection:
    """A TCP connection, whose thread receives each frame where it is expected. NotYet when it cannot be made."""

    def __init__(self, url: str, port: int, token: str):
        host = httpx.URL(url).host
        self.client, self.url, self.place = secrets.token_hex(8), url, f"{host}:{port}"
        self._loop = asyncio.get_running_loop()
        self._expected: dict[str, tuple[Place, asyncio.Future[Tensor]]] = {}
        self._changed = threading.Condition()  # guards what is expected, and who is being filled
        self._filling: str | None = None
        self._broken = ""
        self._peer: socket.socket | None = None
        self._address = host, port, token

    async def open(self) -> Connection:
        try:
            self._peer = await asyncio.to_thread(wire.say_hello, *self._address, self.client)
        except OSError as error:
            raise NotYet(
                f"{self.url} hands states over at {self.place}, which does not take a connection ({error}); the port must "
                "be open to this host"
            ) from error
        threading.Thread(target=self._receive, name="served-states", daemon=True).start()
        return self

    def is_open(self) -> bool:
        return not self._broken

    def expect(self, name: str, place: Place) -> None:
        with self._changed:
            self._expected[name] = place, self._loop.create_future()
        if self._broken:
            self._fail(self._broken)

    async def take(self, name: str, timeout_s: float) -> Tensor:
        try:
            return await asyncio.wait_for(asyncio.shield(self._expected[name][1]), timeout_s)
        except TimeoutError:
            raise NotYet(f"{self.url} answered, and its states did not come from {self.place}") from None

    def forget(self, name: str) -> None:
        with self._changed:
            _, future = self._expected.pop(name)
            if self._filling == name:  # given up halfway: nobody may write there any more, so the rest cannot be used
                with suppress(OSError):
                    self._peer.shutdown(socket.SHUT_RDWR)
                self._changed.wait_for(lambda: self._filling != name)
        future.cancel()
        if future.done() and not future.cancelled():
            future.exception()  # it may have failed after nobody waited for it

    def close(self) -> None:
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()

    # --- in the thread ---------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            while True:
                raw, kind, size = wire.FRAME.unpack(wire.receive(self._peer, bytearray(wire.FRAME.size)))
                self._receive_frame(raw.rstrip(b"\0").decode(), kind, size)
        except (OSError, ValueError) as error:  # a connection that has ended, or whose other end speaks otherwise
            self._broken = f"the connection to {self.place} has ended ({error})"
        # Outside of the lock that it takes itself, and only once nobody is being filled.
        self._loop_call(self._fail, self._broken)

    def _receive_frame(self, name: str, kind: bytes, size: int) -> None:
        with self._changed:
            place, future = self._expected.get(name, (None, None))
            self._filling = name if place is not None else None
        result: Tensor | Exception | None = None
        try:
            if kind == wire.ERROR and size <= wire.LONGEST_ERROR:
                sentence = bytes(wire.receive(self._peer, bytearray(size))).decode(errors="replace")
                result = NotYet(f"{self.url} could not hand states over: {sentence}")
            elif kind != wire.STATES:
                raise ValueError(f"a frame of the kind {kind!r} and {size} bytes")
            elif place is None:
                self._drop(size)
            else:
                try:
                    result = place.room(self.url, size)
                except ValueError as error:
                    self._drop(size)
                    result = error
                else:
                    wire.receive(self._peer, _bytes(result))
        finally:
            with self._changed:
                self._filling = None
                self._changed.notify_all()
        if future is not None:
            self._loop_call(_settle, future, result)

    def _drop(self, size: int) -> None:
        scratch = memoryview(bytearray(min(size, 1 << 20)))
        while size:
            wire.receive(self._peer, scratch[:size])
            size -= min(size, len(scratch))

    def _fail(self, sentence: str) -> None:
        for _, future in list(self._expected.values()):
            _settle(future, NotYet(sentence))

    def _loop_call(self, call, *args) -> None:
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(call, *args)


def _settle(future: asyncio.Future[Tensor], result: Tensor | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).flatten().numpy())


def _read_file(path: str, into: Tensor) -> None:
    left = _bytes(into)
    with open(path, "rb", buffering=0) as file:
        while left:
            read = file.readinto(left)
            if not read:
                raise ValueError(f"{path} has become shorter while it was read")
            left = left[read:]
