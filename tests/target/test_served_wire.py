"""States over TCP, as for a trainer on another host: the same numbers as through shared memory, a connection that only who
knows the token has, and one sentence or another try for everything that goes wrong."""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from contextlib import suppress

import pytest
import torch
from fake_http import reply
from feature_server import FeatureServer
from small_runs import losses
from test_served import pack, same_features

from fastdraft.target.served.connector import fastdraft_wire as wire
from fastdraft.target.served.server import serve_command
from fastdraft.train import train

CPU = torch.device("cpu")
CLIENT = "0123456789abcdef"


@pytest.fixture
def server(target_dir, tmp_path):
    made = FeatureServer(target_dir, tmp_path / "of-another-host", far=True)
    yield made
    made.close()
    made.listener.close()


# --- a source -------------------------------------------------------------------------------------------------------------


def test_a_run_has_the_losses_of_one_through_shared_memory(target_dir, served, make_config, tmp_path):
    near = FeatureServer(target_dir, tmp_path / "near")
    train(make_config(**{"target.url": near.url, "run_dir": str(tmp_path / "here")}))
    near.close()
    train(served(run_dir=str(tmp_path / "far")))
    here, there = losses(tmp_path / "here"), losses(tmp_path / "far")
    assert len(here) == len(there) > 4 and here == there


def test_a_server_without_a_port_says_what_another_host_needs(server, opened):
    server.about["states_port"] = None
    with pytest.raises(ValueError, match=r"which is not on this host .* start the server with --states-port"):
        opened()


def test_a_port_that_is_closed_is_named(server, opened):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server.about["states_port"] = free.getsockname()[1]
        with pytest.raises(ValueError, match=r"hands states over at 127.0.0.1:\d+, which does not take a connection"):
            opened()


def test_another_token_is_not_taken(server, opened):
    server.about["token"] = "0" * 32
    with pytest.raises(ValueError, match=r"which does not take a connection \(the other end closed the connection\)"):
        opened()


def test_a_connection_that_breaks_is_made_again(server, opened, make_config):
    source, broken = opened(), []

    def cut(s, handler, body):
        if not broken:
            broken.append(s.listener)
            s.listen()  # as a server that was started again: a new port, a new token, no old connections
        return False

    server.act = cut
    same_features(source, make_config, pack(8, 30))
    assert source.counts()["requests_repeated"] >= 1
    server.start(instance="second")
    same_features(source, make_config, pack(9, 3))
    assert source.servers[0].about.instance == "second"


def test_states_of_another_length_are_refused_and_the_connection_lives(server, opened, make_config, monkeypatch):
    source, run = opened(), server.run
    monkeypatch.setattr(server, "run", lambda ids: (run(ids)[0][1:], run(ids)[1]))
    with pytest.raises(ValueError, match=r"handed over .* bytes for 8 tokens, not"):
        source.capture(pack(8))
    monkeypatch.setattr(server, "run", run)
    link = source.servers[0].link
    same_features(source, make_config, pack(8))
    assert source.servers[0].link is link and link.is_open()


def test_states_that_do_not_come_are_waited_for_and_asked_again(server, opened, make_config):
    source, lost = opened(**{"target.timeout_s": 2}), [1]

    def lose(s, handler, body):
        if lost:
            lost.clear()
            return not reply(handler, 200, s.answer(body, {"instance": s.about["instance"]}))
        return False

    server.act = lose
    same_features(source, make_config, pack(8))
    assert source.counts() == {"requests_repeated": 1}


def test_late_states_of_a_request_that_was_given_up_are_dropped(server, opened, make_config):
    source, names = opened(**{"target.timeout_s": 2}), []

    def late(s, handler, body):
        names.append(body["kv_transfer_params"]["states"])
        if len(names) == 1:
            return not reply(handler, 200, s.answer(body, {"instance": s.about["instance"]}))
        s.listener.send(names[0], names[0].split("-")[0], wire.STATES, memoryview(b"x" * 3_000_000))
        return False

    server.act = late
    same_features(source, make_config, pack(8))
    same_features(source, make_config, pack(30))
    assert source.servers[0].link.is_open()


def test_close_ends_the_connection(server, opened):
    source = opened(**{"target.timeout_s": 60})
    server.act = lambda s, handler, body: time.sleep(2)
    source.expect([pack(8, 8), pack(9)])
    time.sleep(0.2)
    client = source.servers[0].link.client
    assert server.listener.serves(client)
    start = time.monotonic()
    source.close()
    assert time.monotonic() - start < 1.5
    deadline = time.monotonic() + 5
    while server.listener.serves(client):
        server.listener.send("late", client, wire.STATES, memoryview(b"late"))
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- the port -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener():
    made = wire.Listener("127.0.0.1", 0, "a" * 32)
    yield made
    made.close()


@pytest.mark.parametrize(
    "hello",
    [
        wire.HELLO.pack(wire.MARK, b"b" * 32, CLIENT.encode()),
        wire.HELLO.pack(b"fdraft-0", b"a" * 32, CLIENT.encode()),
        wire.HELLO.pack(wire.MARK, b"a" * 32, b"../../etc/passwd"),
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: everything\r\n\r\n".ljust(wire.HELLO.size),
    ],
)
def test_who_does_not_know_the_token_gets_nothing(listener, hello):
    with socket.create_connection(("127.0.0.1", listener.port)) as peer:
        peer.sendall(hello)
        assert peer.recv(100) == b"" and not listener.clients


def test_a_client_gets_its_own_alone(listener):
    mine, theirs = (wire.say_hello("127.0.0.1", listener.port, "a" * 32, name) for name in (CLIENT, CLIENT[::-1]))
    listener.send(f"{CLIENT}-1", CLIENT, wire.STATES, memoryview(b"rows"))
    listener.send(f"{CLIENT[::-1]}-7", CLIENT[::-1], wire.ERROR, memoryview(b"full"))
    name, kind, size = wire.FRAME.unpack(wire.receive(mine, bytearray(wire.FRAME.size)))
    assert (name.rstrip(b"\0").decode(), kind, size) == (f"{CLIENT}-1", wire.STATES, 4)
    assert wire.receive(mine, bytearray(4)) == b"rows"
    name, kind, size = wire.FRAME.unpack(wire.receive(theirs, bytearray(wire.FRAME.size)))
    assert (name.rstrip(b"\0").decode(), kind, size) == (f"{CLIENT[::-1]}-7", wire.ERROR, 4)
    for peer in (mine, theirs):
        peer.close()


def test_a_slow_reader_keeps_nobody_waiting(listener):
    slow, fast = (wire.say_hello("127.0.0.1", listener.port, "a" * 32, name) for name in (CLIENT, CLIENT[::-1]))
    much = memoryview(bytes(1 << 25))
    start = time.monotonic()
    listener.send(f"{CLIENT}-1", CLIENT, wire.STATES, much)  # more than any socket's buffer, and nobody reads it
    listener.send(f"{CLIENT[::-1]}-1", CLIENT[::-1], wire.STATES, memoryview(b"rows"))
    wire.receive(fast, bytearray(wire.FRAME.size + 4))
    assert time.monotonic() - start < 5
    wire.receive(slow, bytearray(wire.FRAME.size + len(much)))  # whole, when it does read
    for peer in (slow, fast):
        peer.close()


def until(done, seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.02)
    return done()


def senders() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "fastdraft-sender"}


def test_a_client_that_has_left_is_forgotten(monkeypatch):
    """Else each trainer of weeks leaves a thread and an open file in the engine."""
    monkeypatch.setattr(wire, "IDLE_S", 0.05)
    listener, before = wire.Listener("127.0.0.1", 0, "a" * 32), senders()
    leaving, staying = (wire.say_hello("127.0.0.1", listener.port, "a" * 32, name) for name in (CLIENT, CLIENT[::-1]))
    assert until(lambda: len(listener.clients) == 2)
    leaving.close()
    assert until(lambda: not listener.serves(CLIENT) and len(senders() - before) == 1)
    time.sleep(0.2)  # several looks at the other
    listener.send(f"{CLIENT[::-1]}-1", CLIENT[::-1], wire.STATES, memoryview(b"rows"))
    assert wire.receive(staying, bytearray(wire.FRAME.size + 4))[-4:] == b"rows"
    staying.close()
    listener.close()


def test_an_engine_without_a_free_file_goes_on_listening(monkeypatch):
    create, failed, before = socket.create_server, [], set(threading.enumerate())

    class Full:
        def __init__(self, *args, **kwargs):
            self.real = create(*args, **kwargs)

        def accept(self):
            if len(failed) < 2:
                failed.append(errno.EMFILE)
                raise OSError(errno.EMFILE, "Too many open files")
            return self.real.accept()

        def __getattr__(self, name):
            return getattr(self.real, name)

    monkeypatch.setattr(wire.socket, "create_server", Full)
    listener = wire.Listener("127.0.0.1", 0, "a" * 32)
    wire.say_hello("127.0.0.1", listener.port, "a" * 32, CLIENT).close()
    assert len(failed) == 2
    listener.close()
    assert until(lambda: set(threading.enumerate()) <= before)


def test_strangers_take_no_more_than_their_places_and_time(monkeypatch):
    monkeypatch.setattr(wire, "STRANGERS", 3)
    monkeypatch.setattr(wire, "HELLO_S", 0.6)
    listener = wire.Listener("127.0.0.1", 0, "a" * 32)
    silent = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(3)]
    further = socket.create_connection(("127.0.0.1", listener.port))
    start = time.monotonic()
    assert further.recv(1) == b"" and time.monotonic() - start < 0.5
    with suppress(OSError):  # a byte now and then gives no more time
        while time.monotonic() - start < 5:
            silent[0].sendall(b"f")
            time.sleep(0.1)
    assert time.monotonic() - start < 3
    wire.say_hello("127.0.0.1", listener.port, "a" * 32, CLIENT).close()
    for peer in (*silent, further):
        peer.close()
    listener.close()


def test_the_token_is_on_no_command_line(target_dir):
    command = serve_command("python", str(target_dir), ["--host", "10.0.0.5"], states_port=8100)
    token = command.environment["FASTDRAFT_STATES_TOKEN"]
    assert len(token) == 32 and not any(token in argument for argument in command.arguments)
    extra = json.loads(command.arguments[command.arguments.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert (extra["states_host"], extra["states_port"]) == ("10.0.0.5", 8100)
    assert "FASTDRAFT_STATES_TOKEN" not in serve_command("python", str(target_dir), []).environment
    with pytest.raises(ValueError, match=r"start a server for each rank"):
        serve_command("python", str(target_dir), ["-dp", "2"], states_port=8100)
