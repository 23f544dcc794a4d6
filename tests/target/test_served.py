"""Features from servers: the same numbers as from a target in the process, and one sentence for everything that goes wrong.
The server is `feature_server.FeatureServer`; tests/engines has the real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from fake_http import reply
from feature_server import FeatureServer
from small_runs import by_two_ranks, losses
from tiny import refusal, save_target

from fastdraft.batch import Batch
from fastdraft.dist.watch import StoppedEarly
from fastdraft.model.proposal import DecodeSettings
from fastdraft.run.dtypes import name_run_dtypes
from fastdraft.run.finished import evaluate_run, export_run
from fastdraft.run.inputs import open_source
from fastdraft.target.served.connector import fastdraft_handover as handover
from fastdraft.train import train

CPU = torch.device("cpu")
PATIENT = {"target.timeout_s": 100}  # where the server and two trainers share busy cores


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def server(request, target_dir, folder):
    """Of this host, unless a test is `near_and_far`: then also one that takes every trainer for another host's."""
    made = FeatureServer(target_dir, folder, far=getattr(request, "param", False))
    yield made
    made.close()
    if made.far:
        made.listener.close()


near_and_far = pytest.mark.parametrize("server", [False, True], ids=["shared memory", "TCP"], indirect=True)


def pack(*lengths: int, seed: int = 0) -> Batch:
    ids = torch.randint(0, 192, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, torch.ones(sum(lengths), dtype=torch.bool), lengths)


def same_features(source, make_config, batch: Batch) -> None:
    config = make_config()
    _, ours = open_source(config, source.wanted.layers, CPU, []).capture(batch)
    _, theirs = source.capture(batch)
    torch.testing.assert_close(theirs.g, ours.g, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.f, ours.f, rtol=1e-4, atol=1e-4)


# --- the same numbers -----------------------------------------------------------------------------------------------------


@near_and_far
def test_features_are_those_of_a_target_in_the_process(server, opened, make_config, folder):
    source = opened()
    announced = [pack(5, 1, 33, 20), pack(64, seed=1), pack(2, 3, seed=2)]
    source.expect(announced)
    for batch in [*announced, pack(7, 40, seed=3)]:  # the last one comes unannounced
        same_features(source, make_config, batch)
    far = f", states over TCP from 127.0.0.1:{server.about['states_port']}" if server.far else ""
    assert source.notes == [f"the target runs in {server.url} (vLLM 0.32.0{far}), in fp32"]
    source.close()
    assert not folder.exists() if server.far else os.listdir(folder) == ["server.json"]


@pytest.mark.parametrize("layers, far", [((0, 2, 5), False), ((1, 3, 7), False), ((0, 2, 5), True)])
def test_a_server_may_hand_over_more_than_a_run_reads(target_dir, folder, make_config, layers, far):
    server = FeatureServer(target_dir, folder, layers=(0, 1, 2, 3, 5, 6), far=far)
    config = make_config(**{"target.url": server.url, "draft.overrides.layers": list(layers)})
    if 7 not in layers:
        source = open_source(config, layers, CPU, [])
    else:  # the output of the last layer is what the final norm reads, so it is always there
        source = open_source(config.model_copy(), (1, 3, 7), CPU, [])
    same_features(source, make_config, pack(9, 30))
    source.close()
    server.close()


@pytest.mark.slow
def test_a_run_has_the_losses_of_one_with_its_target_in_the_process(served, make_config, tmp_path):
    train(make_config(run_dir=str(tmp_path / "here")))
    train(served(run_dir=str(tmp_path / "served")))
    here, there = losses(tmp_path / "here"), losses(tmp_path / "served")
    assert len(here) == len(there) > 4
    for a, b in zip(here, there, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_as_if_never_stopped(served, tmp_path):
    train(served(run_dir=str(tmp_path / "whole")))
    train(served(run_dir=str(tmp_path / "stopped")))
    # The last checkpoint but one is gone on from, with another address of the same server.
    (tmp_path / "stopped" / "checkpoints" / "step-00000006").rename(tmp_path / "gone")
    config = served(run_dir=str(tmp_path / "stopped"))
    url = config.target.url[0].replace("127.0.0.1", "localhost") + "/v1/"
    config = config.model_copy(update={"target": config.target.model_copy(update={"url": [url]})})
    train(config)
    last = losses(tmp_path / "whole")[-1]
    assert losses(tmp_path / "stopped")[-1] == last


@pytest.mark.slow
def test_two_ranks_train_as_one(served, tmp_path):
    train(served(run_dir=str(tmp_path / "one"), **PATIENT))
    assert by_two_ranks(train, served(run_dir=str(tmp_path / "two"), **PATIENT), seconds=300) == [0, 0]
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=2e-4)
    assert os.listdir(tmp_path / "shared") == ["server.json"]


def test_auto_is_what_the_server_runs_and_a_plan_asks_nobody(served, server, fastdraft, tmp_path):
    config, _ = name_run_dtypes(served(**{"target.dtype": "auto"}), CPU)
    assert config.target.dtype == "fp32"
    tree = served(**{"target.dtype": "auto", "target.url": "http://127.0.0.1:9"}).model_dump(mode="json")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    code, out, _ = fastdraft("train", tmp_path / "run.yaml", "--plan")
    assert code == 0 and "target's embedding and head" in out and "target weights" not in out
    assert "which a plan does not ask; planned for bf16" in out


@pytest.mark.slow
def test_capture_fills_a_store_that_trains_as_the_server_does(served, server, fastdraft, tmp_path):
    config = served(run_dir=str(tmp_path / "online"), **PATIENT)
    train(config)
    tree = config.model_dump(mode="json")
    tree["target"]["url"] = []
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree | {"run_dir": str(tmp_path / "stored")}))
    code, _, err = fastdraft("features", "capture", tmp_path / "run.yaml", tmp_path / "store", "--url", server.url)
    assert code == 0, err
    code, _, err = fastdraft("train", tmp_path / "run.yaml", f"features.path={tmp_path / 'store'}")
    assert code == 0, err
    for a, b in zip(losses(tmp_path / "online"), losses(tmp_path / "stored"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    # Its target ran elsewhere, too, so the evaluation reads the store and the export loads no layer.
    found = evaluate_run(tmp_path / "stored", "last", None, 1, 8, DecodeSettings())
    assert found.held_out.overall.tau_sim == pytest.approx(losses(tmp_path / "stored")[-1]["eval/tau_sim"], rel=1e-6)


@pytest.mark.slow
def test_evaluate_and_export_load_no_layer_of_the_target(served, server, tmp_path, monkeypatch, fastdraft, target_dir):
    config = served()
    train(config)
    monkeypatch.setattr("fastdraft.run.inputs.load_target", lambda *_, **__: pytest.fail("the target was loaded"))
    run_dir = Path(config.run_dir)
    found = evaluate_run(run_dir, "last", None, 1, 8, DecodeSettings())
    assert found.held_out.overall.tau_sim == pytest.approx(losses(run_dir)[-1]["eval/tau_sim"], rel=1e-6)
    assert "verified for SGLang and vLLM" in export_run(run_dir, tmp_path / "out", "best", False)[-1]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "ba be"}) + "\n")
    said = refusal(fastdraft("evaluate", run_dir, "--prompts", tmp_path / "p.jsonl"))
    assert "not loaded into this process" in said and "bench serve" in said
    server.close()
    said = refusal(fastdraft("evaluate", run_dir))
    assert "cannot be reached" in said and "serve-target" in said
    other = FeatureServer(target_dir, tmp_path / "other")
    code, _, err = fastdraft("evaluate", run_dir, "--url", other.url)
    assert code == 0, err
    other.close()


# --- what a server must be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"weights": "0" * 16}, "serves another model or revision than target.path: its weights"),
        ({"config": "0" * 16}, "serves another model or revision than target.path: its config.json"),
        ({"dtype": "bfloat16"}, "runs the target in bf16, and target.dtype is fp32; start it with --dtype float32"),
        ({"dtype": "float16"}, "runs the target in float16; start it with --dtype bfloat16 or float32"),
        ({"boundaries": [2, 4, 8]}, r"hands over the states at the boundaries \[2, 4, 8\].*start it with --layers 1,3,4"),
        ({"max_model_len": 64}, "takes 64 tokens.*--max-model-len 65, or set data.max_length=63"),
        ({"vllm": "0.31.1"}, "runs vLLM 0.31.1; states are read only from the versions.*0.32"),
        ({"vllm": "0.320.0"}, "runs vLLM 0.320.0"),
    ],
)
def test_another_server_is_refused_with_what_to_do(server, opened, changes, words):
    server.start(**changes)
    with pytest.raises(ValueError, match=words):
        opened()


def test_a_server_on_another_host_is_refused(server, opened, tmp_path):
    server.about["folder"] = str(tmp_path / "not here")
    with pytest.raises(ValueError, match=r"which is not on this host"):
        opened()


def test_a_folder_of_the_same_name_on_another_host_is_refused(server, opened):
    server.about["instance"] = "another process, whose folder has this one's name"
    with pytest.raises(ValueError, match=r"which is not on this host"):
        opened()


def test_a_server_without_the_connector_is_refused(server, opened, monkeypatch):
    monkeypatch.setattr(server, "answer", lambda body, params: json.dumps({"choices": [{}], "usage": {}}))
    with pytest.raises(ValueError, match=r"hands over no states: it was not started by"):
        opened()


def test_no_server_is_refused(make_config):
    config = make_config(**{"target.url": "http://127.0.0.1:9"})
    with pytest.raises(ValueError, match=r"cannot be reached.*start it with `fastdraft serve-target`"):
        open_source(config, (1, 3, 4), CPU, [])
    config = make_config(**{"target.url": "localhost:8000"})
    with pytest.raises(ValueError, match=r"is no server's address; write http://host:port"):
        open_source(config, (1, 3, 4), CPU, [])


def test_a_head_that_is_not_the_servers_is_refused(server, opened):
    """As for a model whose vLLM scales its logits otherwise."""
    server.target.head = type(server.target.head)(server.target.head.weight, scale=0.5)
    with pytest.raises(ValueError, match=r"log-probabilities up to .* every teacher would be wrong"):
        opened()


def test_states_in_another_order_are_refused(server, opened, monkeypatch):
    run = server.run
    monkeypatch.setattr(server, "run", lambda ids: (run(ids)[0].unflatten(1, (4, -1)).flip(1).flatten(1), run(ids)[1]))
    with pytest.raises(ValueError, match=r"log-probabilities"):
        opened()


def test_a_request_that_a_server_refuses_ends_the_run_with_its_words(server, opened):
    source = opened()
    server.act = lambda s, handler, body: not reply(handler, 400, json.dumps({"error": {"message": "too long"}}))
    with pytest.raises(ValueError, match=r"HTTP 400: too long"):
        source.capture(pack(8))
    server.act = lambda s, handler, body: not reply(handler, 401, "{}")
    with pytest.raises(ValueError, match=r"set the environment variable OPENAI_API_KEY"):
        source.capture(pack(8))


def test_a_token_that_the_target_does_not_have_never_goes_out(server, opened):
    source, before = opened(), len(server.requests)
    batch = Batch(torch.tensor([3, 192, 4]), torch.ones(3, dtype=torch.bool), (3,))
    with pytest.raises(ValueError, match=r"a token outside of the target's 192"):
        source.capture(batch)
    assert len(server.requests) == before


def test_states_of_another_length_are_refused(server, opened, monkeypatch):
    source, run = opened(), server.run
    monkeypatch.setattr(server, "run", lambda ids: (run(ids)[0][1:], run(ids)[1]))
    with pytest.raises(ValueError, match=r"handed over .* bytes for 8 tokens, not"):
        source.capture(pack(8))


def test_a_server_that_reads_other_ids_is_refused(server, opened, monkeypatch):
    source, answer = opened(), server.answer
    monkeypatch.setattr(server, "answer", lambda body, params: answer(body | {"prompt": [1, *body["prompt"]]}, params))
    with pytest.raises(ValueError, match=r"read 9 tokens of a document of 8"):
        source.capture(pack(8))


# --- what may happen to a server ------------------------------------------------------------------------------------------


def test_servers_share_the_requests_and_one_that_dies_is_done_without(target_dir, server, tmp_path, opened, make_config):
    second = FeatureServer(target_dir, tmp_path / "second")
    source = opened(**{"target.url": [server.url, second.url]})
    probes = len(server.requests)
    same_features(source, make_config, pack(*[4] * 12))
    assert len(server.requests) == len(second.requests) == probes + 6
    second.close()
    second.act = lambda s, handler, body: handler.connection.shutdown(socket.SHUT_RDWR) or True
    same_features(source, make_config, pack(*[5] * 12, seed=1))
    assert source.counts()["requests_repeated"] >= 1


def test_no_more_requests_are_in_flight_than_allowed(server, opened, monkeypatch):
    monkeypatch.setattr("fastdraft.target.served.feature_server.IN_FLIGHT", 3)
    source, now, most = opened(), [], []

    def slow(s, handler, body):
        with s.lock:
            now.append(1)
            most.append(len(now))
        time.sleep(0.15)
        with s.lock:
            now.pop()

    server.act = slow
    source.capture(pack(*[3] * 20))
    assert max(most) == 3


def test_only_so_many_packs_are_under_way(server, opened):
    source, before = opened(), len(server.requests)
    batches = [pack(4, 4, seed=i) for i in range(5)]
    source.expect(batches)
    deadline = time.monotonic() + 20
    while len(server.requests) - before < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert len(server.requests) - before == 4  # of two packs
    for batch in batches:
        source.capture(batch)
    assert len(server.requests) - before == 10


def test_a_server_that_stays_away_ends_the_run_with_a_sentence(server, opened):
    source = opened(**{"target.timeout_s": 0.6})
    server.act = lambda s, handler, body: not reply(handler, 500, json.dumps({"error": {"message": "EngineDeadError"}}))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"gave no states of a document of 8 tokens for 0.6 s.*EngineDeadError.*goes on"):
        source.capture(pack(8))
    assert time.monotonic() - start < 5


def test_a_slow_answer_is_not_waited_for_for_ever(server, opened):
    source = opened(**{"target.timeout_s": 0.5})
    server.act = lambda s, handler, body: time.sleep(3)
    with pytest.raises(ValueError, match=r"did not answer in time \(ReadTimeout\)"):
        source.capture(pack(8))


def test_a_server_that_hangs_takes_the_time_once_and_others_are_asked(target_dir, server, tmp_path, opened, make_config):
    second = FeatureServer(target_dir, tmp_path / "second")
    source = opened(**{"target.url": [server.url, second.url], "target.timeout_s": 1})
    server.act = lambda s, handler, body: time.sleep(4)
    same_features(source, make_config, pack(8))  # though all of the time was the first one's
    second.act = server.act
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"for 1 s nor did 1 others; .*ReadTimeout"):
        source.capture(pack(9))
    assert time.monotonic() - start < 3.5


def test_who_waits_for_a_server_is_told_once_and_when_it_is_back(server, opened, make_config, monkeypatch):
    monkeypatch.setattr("fastdraft.target.served.source.SILENT_S", 0.6)
    source, told = opened(), []
    source.say = told.append
    end = time.monotonic() + 2
    server.act = lambda s, handler, body: time.monotonic() < end and not reply(handler, 503, "{}")
    same_features(source, make_config, pack(8, 30))
    assert [line.startswith(f"{server.url} ") for line in told] == [True, True]
    assert "has given no states for 1 s: " in told[0] and "HTTP 503" in told[0] and "target.timeout_s=5 s" in told[0]
    assert "gives states again, after " in told[1]


@pytest.mark.parametrize("announced", [True, False])
def test_who_waits_for_a_slow_pack_is_told_once(server, opened, monkeypatch, announced):
    monkeypatch.setattr("fastdraft.target.served.source.SLOW_S", 1.5)
    source, told, batch = opened(), [], pack(8, 30)
    source.say = told.append
    server.act = lambda s, handler, body: time.sleep(3.5)
    if announced:
        source.expect([batch])
    source.capture(batch)
    asked = f"of those of this process {server.url} has 2 under way"
    assert told == [f"states of a pack have been waited for 2 s, and no request has failed: {asked}"]


def test_a_signal_ends_a_run_whose_server_gives_nothing(server, served, tmp_path, monkeypatch):
    """In time for a launcher that kills after half a minute; the same command goes on from the last checkpoint."""
    monkeypatch.setattr("fastdraft.train.STOP_S", 1.5)
    train(served(run_dir=str(tmp_path / "whole"), **PATIENT))
    config = served(run_dir=str(tmp_path / "run"), **PATIENT | {"checkpoint.every": 1})
    gone, signals = threading.Event(), iter([signal.SIGTERM])

    def hang(s, handler, body):
        if len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 2 and not gone.is_set():
            with s.lock:
                for number in signals:  # one, whoever is asked first: a second would kill
                    os.kill(os.getpid(), number)
            gone.wait(30)

    server.act = hang
    start = time.monotonic()
    with pytest.raises(StoppedEarly, match=r"^SIGTERM came, and no server .* 1.5 s more, .* last checkpoint is lost"):
        train(config)
    assert time.monotonic() - start < 25
    gone.set()
    train(config)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_failure_that_passes_is_done_again(server, opened, make_config):
    source, failures = opened(), iter([503, 500])

    def fail(s, handler, body):
        status = next(failures, None)
        return status is not None and not reply(handler, status, "{}")

    server.act = fail
    same_features(source, make_config, pack(8, 30))
    assert source.counts() == {"requests_repeated": 2}


@near_and_far
def test_full_memory_is_waited_for_and_then_named(server, opened, make_config, folder):
    source, full = opened(**{"target.timeout_s": 0.2}), [True]

    def act(s, handler, body):
        if full[0]:
            s.full(body["kv_transfer_params"]["states"])
            reply(handler, 200, s.answer(body, {"instance": s.about["instance"]}))
        return full[0]

    server.act = act
    where = "" if server.far else " in .*"
    with pytest.raises(ValueError, match=rf"could not hand states over{where}: .*No space left on device"):
        source.capture(pack(8))
    full[0] = False
    same_features(source, make_config, pack(8))
    assert not list(folder.glob("*.error"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": "1" * 16}, r"serves another model or revision than target.path: its config.json"),
        ({"dtype": "bfloat16"}, r"runs the target in bf16, and target.dtype is fp32"),
        ({"boundaries": [2, 4, 8]}, r"hands over the states at the boundaries \[2, 4, 8\]"),
        ({"max_model_len": 64}, r"takes 64 tokens with the one it generates"),
        ({"vllm": "0.33.0"}, r"runs vLLM 0.33.0"),
    ],
)
def test_a_server_that_comes_back_as_another_ends_the_run(server, opened, make_config, changes, words):
    source = opened()
    same_features(source, make_config, pack(8, 30))
    server.start(instance="second", **changes)
    with pytest.raises(ValueError, match=words):
        source.capture(pack(8))


def test_a_restarted_server_is_compared_again(server, opened, make_config):
    source = opened()
    server.start(instance="second")
    same_features(source, make_config, pack(8, 30))
    assert source.servers[0].about.instance == "second"
    server.start(instance="third", weights="1" * 16)
    with pytest.raises(ValueError, match=r"serves another model or revision"):
        source.capture(pack(8))
    with pytest.raises(ValueError, match=r"serves another model or revision"):  # and stays refused
        source.capture(pack(8))


@pytest.mark.slow
def test_close_gives_up_what_is_under_way_and_leaves_nothing(server, opened, folder):
    source = opened(**{"target.timeout_s": 60})
    server.act = lambda s, handler, body: time.sleep(4)
    source.expect([pack(8, 8), pack(9)])
    time.sleep(0.2)
    start = time.monotonic()
    source.close()
    assert time.monotonic() - start < 3
    time.sleep(4.2)  # the server answers what nobody waits for
    assert os.listdir(folder) == ["server.json"]


# --- the folder -----------------------------------------------------------------------------------------------------------


def test_what_a_killed_trainer_left_is_removed_by_the_next_start(server, opened, folder):
    killed, lock = handover.new_client(str(folder))
    handover.hand_over(str(folder), f"{killed}-1", memoryview(b"rows"))
    handover.hand_over_error(str(folder), f"{killed}-2", "full")
    (folder / f".{killed}-3").write_bytes(b"half")
    other = opened()  # of a trainer that lives: the first one's files stay
    assert (folder / f"{killed}-1").read_bytes() == b"rows" and not any("removed" in note for note in other.notes)
    os.close(lock)  # as the kernel does for a process that ends, however it ends
    handover.hand_over(str(folder), f"{killed}-4", memoryview(b"late"))
    assert not (folder / f"{killed}-4").exists()
    second = opened()
    assert f"3 files of states that ended runs had left in {folder} were removed" in second.notes
    assert not [name for name in os.listdir(folder) if killed in name]
    other.capture(pack(8))


def test_files_are_for_their_user_alone_and_names_are_checked(folder, tmp_path):
    handover.open_folder(str(folder))
    client, lock = handover.new_client(str(folder))
    handover.hand_over(str(folder), f"{client}-1", memoryview(b"rows"))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in folder.iterdir())
    assert handover.is_request(f"{client}-1")
    for name in ("../x", f"../{client}-1", f"{client}-1/../../x", f"{client}", f"{client}-x", f"{client}-1\n", "", None, 7):
        assert not handover.is_request(name)
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(folder)
    for place in ("open", "link"):
        with pytest.raises(ValueError, match=r"is not a folder of this user alone"):
            handover.open_folder(str(tmp_path / place))
    os.close(lock)


def test_a_full_memory_leaves_no_half_file(folder, monkeypatch):
    handover.open_folder(str(folder))
    client, lock = handover.new_client(str(folder))
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, rows: write(file, rows[:2]) if len(rows) > 2 else _full())
    with pytest.raises(OSError, match=r"No space left"):
        handover.hand_over(str(folder), f"{client}-1", memoryview(b"rows"))
    assert os.listdir(folder) == [f"{client}.lock"]
    os.close(lock)


def _full():
    raise OSError(28, "No space left on device")


# --- settings -------------------------------------------------------------------------------------------------------------


def test_a_cache_is_refused(served):
    with pytest.raises(ValueError, match=r"features.mode: cache keeps what a target in this process gives"):
        served(**{"features.path": "x", "features.mode": "cache", "features.max_gib": 1})


@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_processes_that_share_a_pack_do_not_ask_twice(served, axis):
    with pytest.raises(ValueError, match=r"processes that share a pack .* need the same features"):
        served(**{f"dist.{axis}": 2})
    served(**{f"dist.{axis}": 2, "features.path": "a store"})  # which is read alike by all


def test_a_run_does_not_change_between_servers_and_its_own_target(served, make_config):
    train(served())
    with pytest.raises(ValueError, match=r"were a server's, and now they would be those of a target in the process"):
        train(make_config())


def test_another_target_in_the_same_place_is_refused(served, server, tmp_path, target_dir):
    other = save_target(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"serves another model or revision"):
        config = served(**{"target.path": str(other)})
        open_source(config, (1, 3, 4), CPU, [])
