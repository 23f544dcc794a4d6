"""Templates that join a call's arguments on as text (DeepSeek-V3): both spellings are tried, and the reason said is that of
the one that came further."""

import re

import pytest
from chats import TOOL, make_tokenizer

from fastdraft.data.conversations import BadLine, Conversation
from fastdraft.data.tokenize import ChatTokenizer

# As DeepSeek-V3's: an answer after a tool's turn has no header, and the tool's turn ends otherwise before one.
TEXTUAL = (
    "{% set ns = namespace(tool=false) %}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}{% set ns.tool = false %}{{ '<|assistant|>' }}"
    "{% for c in m.tool_calls %}"
    "{{ '<|call|>' + c.function.name + '\n' + c.function.arguments }}{% endfor %}{{ '</s>' }}"
    "{% elif m.role == 'assistant' %}{{ '<|/out|>' if ns.tool else '<|assistant|>' }}{% set ns.tool = false %}"
    "{{ m.content + '</s>' }}{% elif m.role == 'tool' %}{{ ('' if ns.tool else '<|out|>') + m.content }}"
    "{% set ns.tool = true %}{% endif %}{% endfor %}{% if ns.tool %}{{ '<|/out|>' }}{% endif %}"
    "{% if add_generation_prompt and not ns.tool %}{{ '<|assistant|>' }}{% endif %}"
)


def call(city: str) -> dict:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


USER, DRY, WET = (
    {"role": "user", "content": "Rain?"},
    {"role": "tool", "content": "dry"},
    {"role": "tool", "content": "wet"},
)


def tokenized(*messages: dict, **settings):
    return ChatTokenizer(make_tokenizer(TEXTUAL), **settings)(Conversation("f:1", 1, messages, [TOOL]))


def test_the_true_reason_is_said():
    messages = (USER, call("Paris"), DRY, call("Rome"), WET, {"role": "assistant", "content": "Rome."})
    done = tokenized(*messages)
    assert [where for where, _ in done.left_out] == ["f:1, message 4"] and done.samples[0].loss_mask.any()
    assert "can only concatenate" not in done.left_out[0][1]
    with pytest.raises(BadLine) as raised:
        tokenized(*messages[:4], train_on="last_turn")
    assert re.match("f:1: up to message 4: ", str(raised.value)) and "can only concatenate" not in str(raised.value)


def test_a_call_whose_place_shows_is_trained():
    assert tokenized(USER, call("Paris")).samples[0].loss_mask.any()
