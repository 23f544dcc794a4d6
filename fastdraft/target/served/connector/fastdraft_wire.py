"""How states pass from a serving engine to a trainer on another host: a TCP connection for each trainer process.

Both ends run this file, the engine in its own Python, so it imports the standard library alone. A trainer connects to the
port of `serve-target --states-port` and says hello: a mark, the server's token, and the name of a client that it has drawn.
After a mark in return only the server speaks, in frames

    name of a request, in 32 bytes    kind    number of bytes, in 8    the bytes

of the kind STATES, raw rows, or ERROR, a sentence that says why there are none. The token is drawn at each start of a
server, which tells it to those who may ask it over HTTP. A connection without it is closed, and a client gets what was
asked for under its own name alone. Who says no hello holds one of STRANGERS places for HELLO_S seconds at most, so that a
stranger takes neither the engine's memory nor its open files. Nothing is encrypted: the network between both must be one
that you trust.
"""

from __future__ import annotations

import hmac
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from queue import Empty, SimpleQueue

HELLO = struct.Struct("!8s32s16s")  # MARK, token, client
MARK = b"fdraft-1"
FRAME = struct.Struct("!32scQ")
STATES, ERROR = b"s", b"e"
HELLO_S = 10.0  # for a whole hello, and for its answer
STRANGERS = 256  # connections at a time that have not said hello; further ones are closed
IDLE_S = 5.0  # between two looks at whether a client that nothing is sent to is still there
SILENT_S = 60  # after which a peer that acknowledges nothing is dead
LONGEST_ERROR = 1 << 16


class Listener:
    """The server's end. OSError when the port cannot be had."""

    def __init__(self, host: str, port: int, token: str):
        self.token = token
        self.clients: dict[str, SimpleQueue] = {}  # what waits to be sent; None ends it
        self.lock = threading.Lock()
        self.places = threading.BoundedSemaphore(STRANGERS)
        self.closed = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.create_server((host, port), family=family, backlog=128)
        threading.Thread(target=self._accept, name="fastdraft-listener", daemon=True).start()

    @property
    def port(self) -> int:
        return self.socket.getsockname()[1]

    def serves(self, client: str) -> bool:
        return client in self.clients

    def send(self, name: str, client: str, kind: bytes, content: memoryview) -> None:
        """Sends behind what waits; a client that has left gets nothing."""
        with self.lock:
            if waiting := self.clients.get(client):
                waiting.put((FRAME.pack(name.encode(), kind, len(content)), content))

    def close(self) -> None:
        self.closed = True
        with suppress(OSError):  # wakes the thread that accepts
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        with self.lock:
            for waiting in self.clients.values():
                waiting.put(None)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self.socket.accept()
            except OSError:
                if self.closed:
                    return
                time.sleep(0.1)  # the process has no file left, or that peer is gone: others may come later
                continue
            if not self.places.acquire(blocking=False):
                peer.close()
                continue
            threading.Thread(target=self._serve, args=(peer,), name="fastdraft-sender", daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        client, waiting = None, SimpleQueue()
        try:
            try:
                client = self._greeted(peer)
            finally:
                self.places.release()
            if client is None:
                return
            with self.lock:
                self.clients[client] = waiting
            peer.sendall(MARK)
            # The kernel ends a connection whose peer is dead. One that only reads slowly is waited for.
            peer.settimeout(None)
            while (frame := _next(waiting, peer)) is not None:
                for part in frame:
                    peer.sendall(part)
        except OSError:
            pass
        finally:
            with self.lock:
                if client is not None and self.clients.get(client) is waiting:
                    del self.clients[client]
            peer.close()

    def _greeted(self, peer: socket.socket) -> str | None:
        """The name of a client that says hello in time and knows the token."""
        tune(peer)
        mark, token, name = HELLO.unpack(receive(peer, bytearray(HELLO.size), time.monotonic() + HELLO_S))
        known = mark == MARK and hmac.compare_digest(token, self.token.encode())
        return name.decode() if known and re.fullmatch(rb"[0-9a-f]{16}", name) else None


def _next(waiting: SimpleQueue, peer: socket.socket) -> tuple | None:
    """What is sent next. None at the end, which is also where the client has left: it says nothing behind its hello."""
    while True:
        try:
            return waiting.get(timeout=IDLE_S)
        except Empty:
            try:
                peer.recv(1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            return None


def say_hello(host: str, port: int, token: str, client: str) -> socket.socket:
    """The trainer's end. OSError when nobody listens there, or does not take the token."""
    peer = socket.create_connection((host, port), timeout=HELLO_S)
    try:
        tune(peer)
        peer.sendall(HELLO.pack(MARK, token.encode(), client.encode()))
        if receive(peer, bytearray(len(MARK))) != MARK:
            raise OSError("another program listens there")
        peer.settimeout(None)
    except BaseException:
        peer.close()
        raise
    return peer


def tune(peer: socket.socket) -> None:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 10),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 5),
        ("TCP_USER_TIMEOUT", SILENT_S * 1000),
    ):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def receive(
    peer: socket.socket,
    into: bytearray | memoryview,
    until: float | None = None,  # time.monotonic()
) -> bytearray | memoryview:
    """Fills `into`. OSError when the connection ends before, or the time does."""
    left = memoryview(into)
    while left:
        if until is not None:
            peer.settimeout(max(until - time.monotonic(), 0.001))
        count = peer.recv_into(left)
        if not count:
            raise OSError("the other end closed the connection")
        left = left[count:]
    return into
