"""A chat template that writes today's date: every part of a run sees the same one, on any day and in any time zone."""

from __future__ import annotations

import datetime
import io
import json
import time

import pytest
from chats import CHATML, DATED, chat, make_tokenizer
from rich.console import Console
from tiny import CHATML as TINY_CHATML
from tiny import make_tokenizer as make_tiny_tokenizer
from tiny import refusal, save_target
from transformers.utils import chat_template_utils

from fastdraft.answers.job import Sampling
from fastdraft.answers.local import open_local
from fastdraft.answers.regenerate import regenerate
from fastdraft.data.config import DataConfig, with_date
from fastdraft.data.conversations import Conversation
from fastdraft.data.prepare import prepare
from fastdraft.data.prompts import Prompt, prompt_ids
from fastdraft.data.stream import open_stream
from fastdraft.data.tokenize import ChatTokenizer
from fastdraft.model.proposal import DecodeSettings
from fastdraft.run.features import capture_features
from fastdraft.run.finished import evaluate_run
from fastdraft.train import train

ROWS = [{"messages": chat(f"Hello {i}", "How are you?")} for i in range(6)]


@pytest.fixture
def on_another_day(monkeypatch):
    """Sets the clock that transformers' templates read a week on, each time it is called."""
    days = [datetime.datetime(2030, 1, 1)]

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return days[-1]

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    chat_template_utils._compile_jinja_template.cache_clear()
    yield lambda: days.append(days[-1] + datetime.timedelta(days=7))
    chat_template_utils._compile_jinja_template.cache_clear()


def texts(prepared, tokenizer):
    return [tokenizer.decode(row["input_ids"]) for part in (prepared.train, prepared.eval) for row in part]


def test_the_cache_of_another_day_is_the_same(write, tmp_path, on_another_day):
    tokenizer = make_tokenizer(DATED)
    options = {"paths": [write(ROWS)], "cache_dir": str(tmp_path / "cache"), "num_workers": 0}
    first = prepare(DataConfig(**options), tokenizer)
    assert all("Today: 01 Jan 2026<" in text for text in texts(first, tokenizer))
    assert first.lines()[-1] == (
        "the chat template writes today's date: it is told 2026-01-01, which data.template_date sets"
    )
    on_another_day()
    again = prepare(DataConfig(**options), tokenizer)
    assert again.stats.from_cache and texts(again, tokenizer) == texts(first, tokenizer)
    other = prepare(DataConfig(**options, template_date="2024-07-26"), tokenizer)
    assert not other.stats.from_cache and all("Today: 26 Jul 2024<" in text for text in texts(other, tokenizer))
    streamed = open_stream(DataConfig(**options, streaming=True, template_date="2024-07-26"), tokenizer)
    assert texts(streamed, tokenizer)[0] in texts(other, tokenizer) and streamed.template_date == "2024-07-26"
    streamed.stream.close()


def test_worker_processes_write_the_date_too(write, tmp_path):
    tokenizer = make_tokenizer(DATED)
    config = DataConfig(paths=[write(ROWS)], cache_dir=str(tmp_path), num_workers=2, template_date="2024-07-26")
    assert all("Today: 26 Jul 2024<" in text for text in texts(prepare(config, tokenizer), tokenizer))


def test_a_template_without_a_date_does_not_depend_on_it(write, tmp_path):
    options = {"paths": [write(ROWS)], "cache_dir": str(tmp_path / "cache"), "num_workers": 0}
    first = prepare(DataConfig(**options), make_tokenizer(CHATML))
    assert not any("date" in line for line in first.lines())
    assert prepare(DataConfig(**options, template_date="2024-07-26"), make_tokenizer(CHATML)).stats.from_cache


@pytest.mark.parametrize("date", ["yesterday", "2026-13-01", 20260101.5])
def test_what_is_no_date_is_refused(date):
    with pytest.raises(ValueError, match="template_date must be a date such as 2026-01-01, got"):
        DataConfig(paths=["x.jsonl"], template_date=date)
    assert DataConfig(paths=["x.jsonl"], template_date=datetime.date(2026, 5, 1)).template_date == "2026-05-01"
    with pytest.raises(ValueError, match="must not hold strftime_now"):
        DataConfig(paths=["x.jsonl"], chat_template_kwargs={"strftime_now": "x"})


@pytest.fixture
def dated(make_config, tmp_path):
    """make_config for a target whose template writes a date."""
    target = save_target(tmp_path / "dated")
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') + ' ' }}" + TINY_CHATML
    tokenizer.add_tokens(["2026", "2024"])
    tokenizer.save_pretrained(target)
    return lambda **changes: make_config(**{"target.path": str(target), **changes})


def test_a_store_and_a_stopped_run_go_on_on_another_day(dated, tmp_path, on_another_day, capsys):
    capture_features(dated(), tmp_path / "store")
    on_another_day()
    config = dated(**{"features.path": str(tmp_path / "store"), "max_steps": 4})
    assert train(config).steps == 4
    on_another_day()
    assert train(dated(**{"features.path": str(tmp_path / "store"), "max_steps": 4})).steps == 4
    assert "the chat template writes today's date: it is told 2026-01-01" in capsys.readouterr().out
    assert "template_date: '2026-01-01'" in (tmp_path / "run" / "config.yaml").read_text()
    changed = {"data.template_date": "2024-01-01", "max_steps": 4}
    with pytest.raises(ValueError, match=r"lacks 24 of the run's 24 documents: .*template_date"):
        train(dated(**changed, **{"features.path": str(tmp_path / "store")}))
    with pytest.raises(ValueError, match=r"data\.template_date: 2026-01-01 -> 2024-01-01"):
        train(dated(**changed))


def test_evaluated_and_regenerated_prompts_have_the_date(dated, tmp_path, monkeypatch, on_another_day):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "ba be"}) + "\n")
    config = dated(**{"data.template_date": "2024-01-01", "max_steps": 2})
    train(config)
    asked = []
    monkeypatch.setattr("fastdraft.run.finished.evaluate_decode", lambda target, draft, ids, *rest: asked.extend(ids))
    evaluate_run(tmp_path / "run", "last", prompts, 1, 4, DecodeSettings())
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') + ' ' }}" + TINY_CHATML
    tokenizer.add_tokens(["2026", "2024"])
    assert asked == prompt_ids([Prompt(chat("ba be"))], tokenizer, "2024-01-01")
    assert asked != prompt_ids([Prompt(chat("ba be"))], tokenizer)

    outs = []
    for day, date in (("a", "2026-01-01"), ("b", "2026-01-01"), ("b", "2024-01-01")):
        on_another_day()
        by = open_local(config.target.path, "cpu", "fp32", 4, False, Sampling(0.0, max_new_tokens=3), date)
        if date == "2024-01-01":
            with pytest.raises(ValueError, match=r'template_date "2026-01-01" then, "2024-01-01" now'):
                regenerate([str(prompts)], tmp_path / f"{day}.jsonl", by, Console(file=io.StringIO()))
        else:
            assert regenerate([str(prompts)], tmp_path / f"{day}.jsonl", by, Console(file=io.StringIO())).complete
            outs.append((tmp_path / f"{day}.jsonl").read_bytes())
    assert outs[0] == outs[1]


def test_regenerate_refuses_a_date_that_is_none_or_idle(dated, tmp_path, fastdraft):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "ba be"}) + "\n")
    asked = ["data", "regenerate", tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl", "--template-date"]
    assert "must be a date such as" in refusal(fastdraft(*asked, "today", "--target", dated().target.path))
    assert "--template-date belongs to --target" in refusal(fastdraft(*asked, "2026-01-02", "--url", "http://localhost:1"))


def test_time_zones_give_the_same_text(dated, tmp_path, monkeypatch):
    """No clock is faked here: the local date in these two zones differs at every moment."""
    if not hasattr(time, "tzset"):
        pytest.skip("this system cannot change its time zone")
    monkeypatch.setenv("TZ", "Etc/GMT+12")
    time.tzset()
    capture_features(dated(), tmp_path / "store")
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        assert train(dated(**{"features.path": str(tmp_path / "store"), "max_steps": 1})).steps == 1
    finally:
        monkeypatch.undo()
        time.tzset()


def test_every_way_to_write_a_date_is_strftimes():
    """Also formats that are computed, macros, marks, and what stands at the template's beginning."""
    formats = ["%d %b %Y", "%Y-%m-%d", "%A, %-d %B %Y at %H:%M", "%e|%F|%D|%j|%%d", "100%%", "%I %p", "%x %X %c"]
    day = datetime.datetime(2024, 3, 5)
    for form in formats:
        for template, expected in (
            ("\n {{ strftime_now(" + repr(form) + ") }}", "\n {}"),
            ("  {% if true %}\nx{{ strftime_now(format=" + repr(form) + ") + '!' }}{% endif %}", "x{}!"),
            ("{% macro m(f) %}{{ strftime_now(f ~ '') }}{% endmacro %}{{ m(" + repr(form) + ") }}", "{}"),
            ("{%- set d = strftime_now(" + repr(form) + ") if strftime_now is defined else 'none' %}{{ d }}", "{}"),
        ):
            (text,), _ = chat_template_utils.render_jinja_template(
                [chat("a")], chat_template=with_date(template, "2024-03-05")
            )
            assert text == expected.replace("{}", day.strftime(form)), template


def test_a_fault_of_a_dated_template_is_on_its_own_line():
    with pytest.raises(ValueError, match="not valid Jinja, line 2"):
        ChatTokenizer(make_tokenizer("{{ strftime_now('%Y') }}\n{% if %}"))(Conversation("f:1", 1, tuple(chat("a", "b"))))
