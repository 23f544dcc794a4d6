"""`data regenerate --capture`: the store has what `features capture` would have put there, and most of it came with the
answers. The server is `feature_server.FeatureServer`; tests/engines has the real one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fake_http import reply
from feature_server import FeatureServer
from small_runs import documents, losses, same_documents
from tiny import CHATML, make_tokenizer, refusal, save_answering

from fastdraft.answers.capture import Ran, refuse_masked_prompts, without_covered
from fastdraft.answers.dialogue import Dialogue
from fastdraft.data.conversations import Conversation, expand
from fastdraft.data.tokenize import ChatTokenizer
from fastdraft.features.store import Store, list_shards
from fastdraft.model.target_config import default_layers
from fastdraft.run.answers import _finds
from fastdraft.target.served.source import ANSWERS, PROBES

PROOFS = PROBES + 2 * ANSWERS  # requests before the first answer
QUESTIONS = ["ba be", "se lu so", "wan", "wo bu ba", "zu zi", "pe", "te ta to", "ka ke ku"]


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory) -> Path:
    return save_answering(tmp_path_factory.mktemp("target"))


@pytest.fixture
def server(target_dir, tmp_path):
    made = FeatureServer(target_dir, tmp_path / "shared")
    yield made
    made.close()


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Questions, and one conversation of two."""
    path = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "ba"}, {"role": "assistant", "content": "be"}, {"role": "user", "content": "lu"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*({"prompt": q} for q in QUESTIONS), {"messages": turns}]))
    return path


@pytest.fixture
def config(tree, tmp_path) -> Path:
    """The run that trains on the answers."""
    tree["target"] |= {"timeout_s": 5}
    tree["data"] |= {"paths": [str(tmp_path / "out.jsonl")], "eval_fraction": 0.3}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def regenerate(fastdraft, prompts, config, server, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdraft.target.served.source.ANSWER_TOKENS", 8)  # the server here runs one forward for each

    def call(*more) -> tuple[int, str, str]:
        own = ["--url", server.url, "--capture", tmp_path / "store", "--config", config, "--temperature", "0"]
        out = ["--out", tmp_path / "out.jsonl", "--max-new-tokens", "24"]
        return fastdraft("data", "regenerate", prompts, *out, *own, *more)

    return call


def test_the_store_is_what_a_capture_would_make(regenerate, fastdraft, config, server, tmp_path):
    code, printed, err = regenerate()
    assert code == 0, err
    assert len(server.chats) == len(QUESTIONS) + 2
    came = int(printed.split(f"{tmp_path / 'store'}: ")[1].split()[0])
    again = len(server.requests) - PROOFS
    assert came > again and came + again == len(QUESTIONS) + 1
    assert again > 0  # an answer that was cut has an end which the target did not write
    code, _, err = fastdraft("features", "capture", config, tmp_path / "captured", f"target.url={server.url}")
    assert code == 0, err
    same_documents(tmp_path / "store", tmp_path / "captured")
    assert os.listdir(tmp_path / "shared") == ["server.json"]


def test_training_from_it_is_training_from_the_target(regenerate, fastdraft, config, tmp_path):
    assert regenerate()[0] == 0
    for name, more in (("stored", [f"features.path={tmp_path / 'store'}"]), ("here", [])):
        assert fastdraft("train", config, f"run_dir={tmp_path / name}", "max_steps=2", *more)[0] == 0
    for a, b in zip(losses(tmp_path / "stored"), losses(tmp_path / "here"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_stopped_and_begun_again_nothing_is_lost_or_doubled(regenerate, server, tmp_path):
    def refuse(_server, handler, body):
        if len(server.chats) > 4 and "messages" in body:
            reply(handler, 400, json.dumps({"error": {"message": "no such setting"}}))
            return True
        return False

    server.act = refuse
    code, printed, _ = regenerate("--concurrency", "1")
    assert code == 1 and "gets the other documents once" in printed
    assert len(documents(tmp_path / "store")) > 0
    server.act = lambda *_: False
    server.chats.clear()
    code, printed, err = regenerate()
    assert code == 0, err
    assert len(server.chats) <= len(QUESTIONS) + 2 - 4
    keys = [key for path in list_shards(tmp_path / "store") for key in _keys(tmp_path / "store", path.name)]
    assert len(keys) == len(set(keys)) == len(QUESTIONS) + 1


def _keys(store: Path, name: str) -> list[bytes]:
    return next(shard.keys for shard in Store(store).shards if shard.path.name == name)


def test_answers_without_states_are_run_again(regenerate, server, tmp_path):
    """The shared memory is full while the target answers: no answer is lost by it."""

    def full(_server, _handler, body):
        if "messages" in body:
            server.full(body["kv_transfer_params"]["states"])
            body["kv_transfer_params"].pop("answer")
        return False

    server.act = full
    code, printed, err = regenerate()
    assert code == 0, err
    assert "store: 0 documents came with their answers" in printed and "No space left on device" in printed
    assert len(documents(tmp_path / "store")) == len(QUESTIONS) + 1


def test_a_server_that_says_other_ids_is_refused(regenerate, server, monkeypatch):
    run = server.states
    monkeypatch.setattr(server, "states", lambda name, ids: run(name, ids if len(server.chats) == 0 else ids[:-1]))
    assert "handed over the states of" in refusal(regenerate())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--capture", "store"], "--capture STORE and --config RUN.yaml go together"),
        (["--config", "run.yaml"], "--capture STORE and --config RUN.yaml go together"),
    ],
)
def test_half_of_what_it_needs(fastdraft, prompts, tmp_path, arguments, said):
    called = fastdraft("data", "regenerate", prompts, "--out", tmp_path / "o.jsonl", "--url", "http://x/v1", *arguments)
    assert said in refusal(called)


def test_only_servers_have_states(fastdraft, prompts, config, target_dir, tmp_path):
    more = ["--target", target_dir, "--capture", tmp_path / "store", "--config", config]
    said = refusal(fastdraft("data", "regenerate", prompts, "--out", tmp_path / "out.jsonl", *more))
    assert "takes the states from servers of `serve-target`" in said


def test_a_run_that_would_not_read_the_answers(fastdraft, prompts, config, server, tmp_path):
    more = ["--url", server.url, "--capture", tmp_path / "store", "--config", config]
    said = refusal(fastdraft("data", "regenerate", prompts, "--out", tmp_path / "other.jsonl", *more))
    assert "name that file in data.paths" in said and not server.chats


def test_what_the_command_sets_is_refused(regenerate):
    assert "--extra-body must not hold return_token_ids" in refusal(
        regenerate("--extra-body", '{"return_token_ids": false}')
    )
    assert "--extra-body must not hold stop: vLLM drops" in refusal(regenerate("--extra-body", '{"stop": ["."]}'))


def test_the_last_turn_has_the_states_of_those_it_begins_with():
    first, second, other = (Ran(np.array(ids, np.int32), torch.zeros(0)) for ids in ([1, 2], [1, 2, 3, 4], [1, 5, 6]))
    assert without_covered([], first) == [first]
    assert without_covered([first], second) == [second]
    assert without_covered([first], other) == [first, other]


@pytest.fixture
def train_blocks(config, tree):
    """Makes the run one of a DFlash draft whose mask token this word is."""

    def call(word: str) -> None:
        tree["draft"] = {"method": "dflash", "overrides": {"layers": list(default_layers(8)), "block_size": 4}}
        tree["draft"]["overrides"] |= {"num_hidden_layers": 1, "mask_token_id": make_tokenizer().get_vocab()[word]}
        tree.pop("ttt_length", None)
        config.write_text(yaml.safe_dump(tree))

    return call


def test_the_drafts_mask_token_in_a_prompt_is_named_before_anything_is_asked(regenerate, train_blocks, prompts, server):
    train_blocks("ka")
    assert f"{prompts}:8 has token" in refusal(regenerate())
    assert not server.chats and not server.requests


def test_a_given_turn_that_no_answer_keeps_may_have_the_drafts_mask_token():
    """An assistant's turn before the first question is left out of what is asked and stored."""
    tokenizer = make_tokenizer()
    turns = {"role": "assistant", "content": "ka"}, {"role": "user", "content": "ba"}
    dialogue, (kept, left_out) = (
        Dialogue(0, Conversation("f:1", 0, turns)),
        (tokenizer.get_vocab()[x] for x in ("ba", "ka")),
    )
    refuse_masked_prompts([dialogue], ChatTokenizer(tokenizer), left_out)
    with pytest.raises(ValueError, match="f:1 has token"):
        refuse_masked_prompts([dialogue], ChatTokenizer(tokenizer), kept)


def test_the_drafts_mask_token_in_an_answer_ends_the_run_there(regenerate, train_blocks, server, prompts, tmp_path):
    """And with another mask token the same command goes on."""
    train_blocks("ga")
    decode = server.tokenizer.decode
    server.tokenizer.decode = lambda ids, **more: "ga" if len(server.chats) == 3 else decode(ids, **more)
    said = refusal(regenerate("--concurrency", "1"))
    assert f"the conversation of {prompts}:3 has, with its answers, token" in said
    assert len(server.chats) == 3
    train_blocks("zus")
    code, _, err = regenerate("--concurrency", "1")
    assert code == 0, err
    assert len(server.chats) == len(QUESTIONS) + 2 + 1
    assert len(documents(tmp_path / "store")) == len(QUESTIONS) + 1


def test_states_of_other_tokens_than_the_answers_are_refused_before_anything_is_asked(regenerate, server):
    """A server whose processes go on with different tokens: from one on its rows are those of other ids."""
    run = server.states

    def states(name: str, ids: list[int]) -> None:
        drawn = server.requests[-1].get("kv_transfer_params", {}).get("answer")
        run(name, [*ids[:-5], *(5 for _ in ids[-5:])] if drawn else ids)

    server.states = states
    said = refusal(regenerate())
    assert "gives states of an answer that are" in said and "away from those of the same ids as a document" in said
    assert not server.chats
    proofs = [body for body in server.requests if body["kv_transfer_params"].get("answer")]
    assert all(body["temperature"] == 0 and body["max_tokens"] == 8 for body in proofs)
    assert any("cache_salt" in body for body in server.requests)


def test_states_that_are_no_numbers_are_refused_before_anything_is_asked(regenerate, server, monkeypatch):
    async def off(_source, _server, i, _sampling) -> float:
        return math.nan if i == 2 else 0.0

    monkeypatch.setattr("fastdraft.target.served.source.ServedSource._answer_off", off)
    assert "nan% away" in refusal(regenerate()) and not server.chats


def test_fresh_answers_do_not_go_beside_old_documents(regenerate, server, tmp_path):
    assert regenerate("--fresh")[0] == 0  # nothing is there yet
    server.chats.clear()
    said = refusal(regenerate("--fresh"))
    assert "holds the features of documents already" in said and not server.chats
    assert len(documents(tmp_path / "store")) == len(QUESTIONS) + 1
    assert (tmp_path / "out.jsonl").exists()


def test_an_answered_conversation_that_training_skips_is_skipped(regenerate, config, tree, tmp_path):
    """Training's own template refuses what the server's did not."""
    strict = "{% if messages[0]['content'] == 'pe' %}{{ raise_exception('no pe') }}{% endif %}"
    (tmp_path / "strict.jinja").write_text(strict + CHATML)
    tree["data"] |= {"chat_template": str(tmp_path / "strict.jinja"), "on_bad_line": "skip"}
    config.write_text(yaml.safe_dump(tree))
    code, _, err = regenerate()
    assert code == 0, err
    assert len(documents(tmp_path / "store")) == len(QUESTIONS)


@pytest.mark.parametrize("pattern", ["*.jsonl", "**/other/*.jsonl"])
def test_a_pattern_that_would_not_find_the_answers(fastdraft, prompts, config, tree, server, tmp_path, pattern):
    tree["data"]["paths"] = [str(tmp_path / pattern)]
    config.write_text(yaml.safe_dump(tree))
    out = tmp_path / "below" / "out.jsonl"
    more = ["--url", server.url, "--capture", tmp_path / "store", "--config", config]
    said = refusal(fastdraft("data", "regenerate", prompts, "--out", out, *more))
    assert "name that file in data.paths" in said and not server.chats


def test_patterns_find_what_glob_finds(tmp_path, monkeypatch):
    files = ["out.jsonl", "a/out.jsonl", "a/b/out.jsonl", ".a/out.jsonl", "a/.out.jsonl", "[x].jsonl", "x.jsonl"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    patterns = [
        "*.jsonl",
        "*/*.jsonl",
        "**/*.jsonl",
        "**/out.jsonl",
        "a/**/*.jsonl",
        ".a/*",
        "?/.*",
        "[x].jsonl",
        "a/../*.jsonl",
    ]
    for pattern in patterns:
        found = {os.path.abspath(file) for file in expand([pattern])}
        assert found == {os.path.abspath(file) for file in files if _finds(pattern, Path(file))}, pattern


def test_again_after_the_end_nothing_is_asked(regenerate, server, tmp_path):
    assert regenerate()[0] == 0
    written = {path.name: path.stat().st_mtime_ns for path in list_shards(tmp_path / "store")}
    server.chats.clear()
    server.requests.clear()
    assert regenerate()[0] == 0
    assert not server.chats and len(server.requests) == PROOFS
    assert written == {path.name: path.stat().st_mtime_ns for path in list_shards(tmp_path / "store")}
