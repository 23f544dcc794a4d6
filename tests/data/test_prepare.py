import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chats import chat, make_tokenizer

from fastdraft.data import prepare as room
from fastdraft.data.config import DataConfig
from fastdraft.data.conversations import BadLine, Line
from fastdraft.data.prepare import Stats, chat_tokenizer, first_samples, mapper, prepare

CHATS = [{"messages": chat(f"Question {i}?", f"Answer {i}.")} for i in range(40)]


@pytest.fixture
def config(tmp_path, write):
    def config(*rows, **kwargs):
        kwargs = {"cache_dir": str(tmp_path / "cache"), "num_workers": 0, **kwargs}
        return DataConfig(paths=[write(rows)], **kwargs)

    return config


def texts(dataset, tokenizer):
    return [tokenizer.decode(np.array(row["input_ids"])[row["loss_mask"]]) for row in dataset]


def test_train_and_eval_are_split_by_conversation(config, tokenizer):
    done = prepare(config(*CHATS, *CHATS[:20], eval_fraction=0.3), tokenizer)
    train, held_out = (texts(part, tokenizer) for part in (done.train, done.eval))
    assert set(train).isdisjoint(held_out) and len(set(train) | set(held_out)) == 40 and len(train) + len(held_out) == 60
    assert 2 < len(held_out) < 36
    longer = prepare(config({"messages": chat("new", "new")}, *CHATS, eval_fraction=0.3), tokenizer)
    assert set(held_out) <= set(texts(longer.eval, tokenizer)), "new conversations must not move old ones"
    tokens = [len(row["input_ids"]) for part in (done.train, done.eval) for row in part]
    trained = [sum(row["loss_mask"]) for part in (done.train, done.eval) for row in part]
    assert (done.stats.conversations, done.stats.samples) == (60, 60)
    assert (done.stats.tokens, done.stats.trained_tokens) == (sum(tokens), sum(trained))
    assert (done.stats.train_samples, done.stats.eval_samples) == (len(train), len(held_out))


def test_small_data_leaves_neither_side_empty(config, tokenizer):
    for fraction in (1e-9, 0.999999):
        done = prepare(config(*CHATS[:2], eval_fraction=fraction), tokenizer)
        assert (len(done.train), len(done.eval)) == (1, 1)
        assert done.none_held_out is None and "held out" not in " ".join(done.lines())
        done = prepare(config(*CHATS[:1], *CHATS[:1], eval_fraction=fraction), tokenizer)
        assert (len(done.train), len(done.eval)) == (2, 0)
        assert f"nothing is held out, so no tau_sim is measured: data.eval_fraction is {fraction:g}" in done.lines()[-1]
        assert "but the data have one conversation with a trained token, which is trained on" in done.lines()[-1]
    done = prepare(config(*CHATS, eval_fraction=0), tokenizer)
    assert len(done.eval) == 0 and "data.eval_fraction is 0; raise it" in done.lines()[-1]


def test_eval_paths(config, tokenizer, write):
    done = prepare(config(*CHATS[:5], eval_paths=[write(CHATS[5:7], "eval.jsonl")]), tokenizer)
    assert texts(done.eval, tokenizer) == ["Answer 5.<|im_end|>", "Answer 6.<|im_end|>"]
    assert texts(done.train, tokenizer) == [f"Answer {i}.<|im_end|>" for i in range(5)]
    with pytest.raises(ValueError, match="eval data needs assistant turns"):
        prepare(config(*CHATS[:5], eval_paths=[write([{"messages": chat("a")}], "eval.jsonl")]), tokenizer)


def test_cache_key_is_what_makes_the_samples(config, tokenizer, monkeypatch, tmp_path):
    first = prepare(config(*CHATS), tokenizer)
    assert not first.stats.from_cache
    again = prepare(config(*CHATS, seed=3, eval_fraction=0.5, pack_tokens=5000), make_tokenizer())
    assert again.stats.from_cache and again.stats.tokens == first.stats.tokens
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{{ 'assistant' if add_generation_prompt }}"
    )
    for other in (
        config(*CHATS, max_length=64),
        config(*CHATS, train_on="last_turn"),
        config(*CHATS, on_too_long="truncate"),
        config(*CHATS, chat_template=str(tmp_path / "t.jinja")),
        config(*CHATS, chat_template_kwargs={"enable_thinking": False}),
        config(*CHATS[1:]),
    ):
        assert not prepare(other, tokenizer).stats.from_cache
    tokenizer.add_tokens(["Answer"])
    assert not prepare(config(*CHATS), tokenizer).stats.from_cache


def test_a_processors_chat_template_json_is_unpacked(config, tmp_path):
    jinja, file = "{% for m in messages %}{{ m.content }}{% endfor %}", tmp_path / "chat_template.json"
    file.write_text(json.dumps({"chat_template": jinja}))
    assert room.read_template(config(*CHATS, chat_template=str(file))) == jinja
    for other in ({"default": jinja}, {"chat_template": None}, [{"name": "default", "template": jinja}]):
        file.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"chat_template\.json: JSON without a text 'chat_template'"):
            room.read_template(config(*CHATS, chat_template=str(file)))
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = None, str(tmp_path)
    with pytest.raises(ValueError, match=f"no chat template .* set data.chat_template to {file}"):
        prepare(config(*CHATS), tokenizer)


def test_workers_make_the_same_file(config, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "CHUNK_BYTES", 500)
    rows = [*CHATS, "not JSON"]
    alone = prepare(config(*rows, on_bad_line="skip", cache_dir=str(tmp_path / "a")), make_tokenizer())
    shared = prepare(config(*rows, on_bad_line="skip", cache_dir=str(tmp_path / "b"), num_workers=1), make_tokenizer())
    assert alone.train[:] == shared.train[:] and alone.eval[:] == shared.eval[:] and alone.stats == shared.stats
    files = [next((tmp_path / name).glob("samples-*/samples.arrow")).read_bytes() for name in "ab"]
    assert files[0] == files[1]


class Dies:
    """In place of a ChatTokenizer, in a worker process."""

    def __call__(self, conversation):
        os._exit(1)


def test_what_ends_in_a_worker_is_said_here():
    with mapper(Dies(), False, 1) as mapped:
        bad, good = Line("f:1", b"not JSON"), Line("f:2", json.dumps(CHATS[0]).encode())
        with pytest.raises(BadLine, match=r"^f:1: not JSON"):
            list(mapped(iter([[bad, good]])))
        with pytest.raises(ValueError, match=r"one of 1 worker processes .* died.*lower data\.num_workers"):
            list(mapped(iter([[good]])))


def test_workers_end_with_a_run_that_is_killed():
    program = """
import multiprocessing, time
from fastdraft.data.conversations import Line
from fastdraft.data.prepare import mapper
with mapper(None, False, 1) as mapped:
    next(mapped(iter([[]])))
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(60)
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    worker = int(run.stdout.readline())
    run.kill()
    try:
        run.communicate(timeout=20)  # the worker has the pipe's end too: to its end
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        raise


def test_a_killed_run_leaves_nothing_that_is_taken_for_a_cache(config, tokenizer, monkeypatch, tmp_path):
    write = room.write_samples

    def dies(lines, mapped, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "write_samples", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(*CHATS), tokenizer)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([], [".lock"])
    monkeypatch.setattr(room, "write_samples", write)
    assert prepare(config(*CHATS), tokenizer).stats.samples == 40


def test_a_damaged_cache_is_said(config, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "CHUNK_BYTES", 500)
    prepare(config(*CHATS), tokenizer)
    file = next(tmp_path.glob("cache/samples-*/samples.arrow"))
    whole = file.read_bytes()
    for size in (len(whole) // 2, len(whole) // 3, 10, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"the token cache .* is damaged"):
            prepare(config(*CHATS), tokenizer)


def test_full_disk_is_said(config, tokenizer, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "write_samples", full)
    with pytest.raises(OSError, match=r"cannot write the token cache under .*cache: No space left on device"):
        prepare(config(*CHATS), tokenizer)


def test_a_cache_that_cannot_be_is_said(config, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the token cache under .*file: .*name another data\.cache_dir"):
        prepare(config(*CHATS, cache_dir=str(tmp_path / "file")), tokenizer)


def read_first(config, tokenizer):
    return list(first_samples(config, chat_tokenizer(config, tokenizer, None), Stats()))


def test_bad_lines(config, tokenizer):
    rows = [CHATS[0], "{oops", CHATS[1], {"messages": [{"role": "user", "content": 5}]}, CHATS[2]]
    with pytest.raises(BadLine, match=r"data.jsonl:2: not JSON"):
        prepare(config(*rows), tokenizer)
    with pytest.raises(BadLine, match=r"data.jsonl:2: not JSON"):
        read_first(config(*rows), tokenizer)
    done = prepare(config(*rows, on_bad_line="skip"), tokenizer)
    assert (done.stats.conversations, done.stats.skipped_lines) == (3, 2)
    assert [reason.rpartition("data.jsonl:")[2][:9] for reason in done.stats.skipped] == ["2: not JS", "4: messag"]
    assert "2 malformed lines were skipped" in done.stats.lines()
    assert len(read_first(config(*rows, on_bad_line="skip"), tokenizer)) == 3


def test_what_is_read_is_what_is_trained_and_what_is_left_out(config, tokenizer):
    call = {"function": {"name": "weather", "arguments": {}}}
    answers = [chat("q", "")[1], chat("q", "no")[1] | {"weight": 0}, {"role": "assistant", "tool_calls": [call]}]
    rows = [{"messages": [*chat("q"), answer, *chat("r", "yes")]} for answer in answers]
    rows += [
        CHATS[0],
        {"messages": chat("only a question")},
        {"input_ids": [1, 2, 3, 4], "loss_mask": [1, 0, 1, 1]},
        "{oops",
    ]
    stats = prepare(config(*rows, on_bad_line="skip"), tokenizer).stats
    assert stats.conversations + stats.skipped_lines == len(rows)
    answered = sum(m["role"] == "assistant" for row in rows[:-2] for m in row["messages"])
    assert stats.turns + sum(count for count, _ in stats.left_out.values()) == answered + 2
    assert {count for count, _ in stats.left_out.values()} == {1} and len(stats.left_out) == 3
    assert f"in {stats.turns} turns" in stats.lines()[0]


def test_what_was_done_to_the_data_is_said(config, tokenizer):
    done = prepare(config(*CHATS[:3], {"messages": chat("only a question")}, max_length=40), tokenizer)
    assert done.stats.untrained_samples >= 1 and done.stats.long_samples == 3
    assert any("left out: no trained token" in line for line in done.stats.lines())
    assert any("longer than max_length" in line for line in done.stats.lines())


@pytest.mark.parametrize(
    ("rows", "kwargs", "reason"),
    [
        ([], {}, "data.jsonl: empty, no conversation in it"),
        ([{"messages": chat("a")}], {}, "1 conversations, but no trained token in them"),
        ([{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 0]}], {}, "no trained token in them"),
        (["x"], {"on_bad_line": "skip"}, "1 malformed lines were skipped, first .*data.jsonl:1: not JSON"),
        ([{"input_ids": [1, 2, 500000], "loss_mask": [0, 0, 1]}], {}, "data.jsonl:1: token id 500000 is not in the vocab"),
        (CHATS, {"chat_template": "none.jinja"}, "data.chat_template none.jinja: cannot be read"),
        (CHATS, {"eval_paths": ["none.jsonl"]}, "none.jsonl: no such file"),
    ],
)
def test_bad_input(rows, kwargs, reason, config, tokenizer):
    with pytest.raises(ValueError, match=reason):
        prepare(config(*rows, **kwargs), tokenizer, vocab_size=1000)


def test_config_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="max_length 8192 is more than pack_tokens 4096"):
        DataConfig(paths=["a"], max_length=8192)
    for kwargs in ({"paths": []}, {"paths": ["a"], "eval_fraction": 1.0}, {"paths": ["a"], "max_lenght": 5}):
        with pytest.raises(ValueError):
            DataConfig(**kwargs)
    with pytest.raises(ValueError, match="must not hold add_generation_prompt, continue_final_message"):
        DataConfig(paths=["a"], chat_template_kwargs={"continue_final_message": True, "add_generation_prompt": 1, "x": 2})


def test_nothing_is_said_to_the_log_for_ordinary_templates(config, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        prepare(config(*CHATS), tokenizer)
    assert not caplog.records, json.dumps([r.message for r in caplog.records])
